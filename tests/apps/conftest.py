"""A folder of small runs and the app over it, served on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from workbench.apps.server import create_app, open_port
from workbench.apps.settings import AppSettings
from workbench.runs import RunWriter
from workbench.runs.patterns import Masking, pattern_tensors, write_pattern

TOKENS = 3000
# Tags, quotes, a right-to-left override, a null byte's picture, spreadsheet formulas.
NASTY = "</script><img src=x onerror=window.hurt=1>\"'\u202egnp=cmd|'"


def write_pattern_run(path: Path, tokens: int = TOKENS, title: str = "A pattern") -> None:
    """One head with a sink on position 0 and a needle at key 1234 that row 2500 finds."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(tokens, 8, generator=generator) for _ in range(2))
    q[:, 0] += 2
    k[0, 0] += 6
    # One direction is the needle's alone.
    q[:, 1], k[:, 1] = 0.0, 0.0
    q[2500, 1], k[1234, 1] = 8.0, 8.0
    masking = Masking(0.35)
    with RunWriter.open(path, kind="trace", title=title, fingerprint={}) as writer:
        write_pattern(writer, (4, 2), pattern_tensors(q, k, masking), masking, model=NASTY)
        texts = [NASTY if at == 1234 else f" t{at}" for at in range(tokens)]
        writer.table("tokens", pd.DataFrame({"position": range(tokens), "token_id": range(tokens), "text": texts}))
        writer.manifest["model"] = {"name": NASTY, "dtype": "float32", "device": "cpu"}
        writer.done("all")
        writer.finish()


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "runs"
    write_pattern_run(folder / "needle")
    write_pattern_run(folder / "nasty <b>&'", tokens=2600, title=NASTY)
    return folder


@contextmanager
def serving(settings: AppSettings) -> Iterator[str]:
    """The address of the app; ends with the context."""
    server = open_port(create_app(settings), 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        server.close()
        server.task_dispatcher.shutdown()
        thread.join(5)


@pytest.fixture(scope="session")
def address(runs_folder: Path) -> Iterator[str]:
    with serving(AppSettings(runs_folder)) as found:
        yield found


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """`visit("/pattern?run=needle")` opens a page, `page.until(script)` waits.

    At the end there must have been no error, and no request but to the app.
    """
    pages: list[Any] = []
    troubles: list[str] = []

    def note(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            troubles.append(request.url)

    def until(page: Any, expression: str) -> None:
        # Playwright's own wait compiles text in the page, which the policy forbids.
        ends = time.monotonic() + 20
        while not page.evaluate(expression):
            assert time.monotonic() < ends, f"never came true: {expression}"
            page.wait_for_timeout(50)

    def opened(path: str = "/", **settings: Any) -> Any:
        page = browser.new_page(**({"viewport": {"width": 1280, "height": 800}} | settings))
        page.set_default_timeout(20_000)
        page.until = partial(until, page)
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", note)
        page.goto(address + path)
        page.wait_for_selector("main > *")
        pages.append(page)
        return page

    yield opened
    hurt = [page.evaluate("window.hurt") for page in pages]
    for page in pages:
        page.close()
    assert troubles == [] and not any(hurt)
