"""What an app is started with, and the bounds of what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AppSettings:
    """Where runs lie, which model is at hand, and limits that keep one user from starving the others.

    `model` is what `workbench.load` takes; without one, the pages that work live say so. `hosts` are the names under
    which requests are answered.
    """

    runs: Path
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    most_prompt_characters: int = 200_000
    most_body_bytes: int = 4 << 20
