"""Ways to call the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner


@pytest.fixture(scope="session")
def call() -> Callable[..., Any]:
    """`call("runs", "list")`: the result of a command, run in this process; stdout and stderr apart."""
    from workbench.cli.app import app

    runner = CliRunner()

    def invoke(*arguments: object, **options: Any) -> Any:
        return runner.invoke(app, [str(a) for a in arguments], env={"COLUMNS": "220"}, **options)

    return invoke


@pytest.fixture(scope="session")
def heads_run(call: Callable[..., Any], model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `workbench heads` with few prompts."""
    path = tmp_path_factory.mktemp("runs") / "heads"
    result = call("heads", model_folder, "--prompts", 3, "--out", path)
    assert result.exit_code == 0, result.output
    return path
