"""A folder of small runs and the app over it, served on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

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


LAYERS, HEADS = 5, 4
DETECTORS = {"sink": "Attention sink", "induction": "Induction", "retrieval": f"Retrieval {NASTY}"}


def write_scores_run(path: Path, seed: int = 0) -> None:
    """Three detectors' scores of 20 heads, with a pattern, curves, a contrast and a verification."""
    rng = np.random.default_rng(seed)
    heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    rows, described = [], []
    for name, title in DETECTORS.items():
        values = rng.uniform(0, 1, len(heads))
        order = (-values).argsort().argsort() + 1
        for (layer, head), value, rank in zip(heads, values, order, strict=True):
            rows.append(("toy", name, layer, head, value, value - 0.05, value + 0.05, 8, 0.1, 0.01, 0.02, rank))
        about = {"title": title, "measures": f"what {name} measures", "unit": "share", "threshold": 0.5, "paper": "P",
                 "url": "", "caption": "Made up.", "positions": "all", "better": "higher", "null": "shuffled",
                 "note": "", "prompts": 8}  # fmt: skip
        described.append({"detector": name, **about})
    columns = "model detector layer head value low high n null p q rank".split()
    tokens = [f" w{at}" for at in range(6)]
    pattern = np.tril(rng.uniform(0.1, 1, (1, 6, 6))).astype(np.float32)
    check = {"detector": "induction", "k": 2, "heads": "L1H2 L2H3", "how": "mean", "metric": "induction_loss",
             "unit": "nats", "better": "lower", "baseline": 1.0, "ablated": 2.0, "effect": 1.0, "low": 0.8, "high": 1.2,
             "control_effect": 0.1, "control_low": 0.0, "control_high": 0.3, "draws": 10, "beaten": 10, "p": 0.01,
             "n": 8, "caption": "Made up.", "different_draws": 10, "other_layers": 0, "q": 0.02}  # fmt: skip
    with RunWriter.open(path, kind="demo", title="Scores", fingerprint={"seed": seed}) as writer:
        writer.table("head_scores", pd.DataFrame(rows, columns=columns))
        writer.table("detectors", pd.DataFrame(described))
        curve = [("induction", 1, 2, "earlier copy", at, 0.1 * at) for at in range(8)]
        writer.table(
            "position_curves", pd.DataFrame(curve, columns="detector layer head statistic position value".split())
        )
        contrast = [
            (layer, head, domain, rng.uniform(), 0.1, 0.9, 8) for layer, head in heads for domain in ("prose", "code")
        ]
        writer.table("domain_contrast", pd.DataFrame(contrast, columns="layer head domain value low high n".split()))
        writer.table("verification", pd.DataFrame([check]))
        listed = [("prose", at, at, NASTY if at == 3 else text) for at, text in enumerate(tokens)]
        writer.table("example_tokens", pd.DataFrame(listed, columns="example position token_id text".split()))
        places = {name: ("example_head", [value]) for name, value in (("example", "prose"), ("layer", 1), ("head", 2))}
        writer.array("patterns", xr.Dataset({"pattern": (("example_head", "query", "key"), pattern)}, coords=places))
        writer.manifest["model"] = {"name": NASTY, "dtype": "float32", "device": "cpu"}
        writer.manifest["certificate"] = {"passed": True}
        writer.done("all")
        writer.finish()


def write_patch_run(path: Path) -> None:
    """Patches of 20 heads in both directions on four pairs, and ten edges with scores."""
    rng = np.random.default_rng(0)
    effects, prompts = [], []
    for direction in ("denoising", "noising"):
        for layer in range(LAYERS):
            for head in range(HEADS):
                node, values = f"L{layer}H{head}", rng.normal(0, 0.3, 4)
                mean = float(values.mean())
                effects.append((direction, node, layer, "z", head, None, None, "logit_difference", 4, mean, mean,
                                mean - 0.1, mean + 0.1, mean / 8, mean / 8 - 0.02, mean / 8 + 0.02, 0.1, 0.2,
                                ""))  # fmt: skip
                prompts += [
                    (direction, node, layer, "z", head, None, None, at, v, v, 4.0, -4.0) for at, v in enumerate(values)
                ]
    names = (
        "direction node layer site head position key metric n value effect effect_low effect_high recovery low high p q"
    )
    table = pd.DataFrame(effects, columns=[*names.split(), "reason"]).astype({"position": "object", "key": "Int64"})
    each = "direction node layer site head position key prompt value effect clean corrupt".split()
    edges = [("embed", "L1H2", "q", 0.5), ("L1H2", "logits", "", -0.8), ("L0.mlp", "L1H2", "v", 0.1)]
    with RunWriter.open(path, kind="patch", title="Patches", fingerprint={}) as writer:
        writer.table("effects", table.assign(position=table["position"].astype("str")))
        writer.table("prompt_effects", pd.DataFrame(prompts, columns=each).astype({"position": "str", "key": "Int64"}))
        scored = pd.DataFrame(edges, columns=["source", "target", "through", "score"])
        scored = scored.assign(low=scored["score"] - 0.1, high=scored["score"] + 0.1)
        writer.table("edge_scores", scored)
        writer.manifest["circuits"] = {
            "what": "patch", "task": "ioi", "caption": "4 pairs.", "metric": "logit_difference", "n": 4, "clean": 4.0,
            "corrupt": -4.0, "directions": ["denoising", "noising"], "sites": ["z"], "by": "head",
            "ablation": "the other run", "asked": ["toy", "ioi", 4, 0], "dropped": {}, "roles": [], "right": 1.0,
            "templates": 1, "known_circuit": None,
        }  # fmt: skip
        writer.done("all")
        writer.finish()


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "runs"
    write_pattern_run(folder / "needle")
    write_pattern_run(folder / "nasty <b>&'", tokens=2600, title=NASTY)
    write_scores_run(folder / "scores")
    write_scores_run(folder / "scores-again", seed=1)
    write_patch_run(folder / "patches")
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


@pytest.fixture
def serve_app() -> Iterator[Callable[[AppSettings], str]]:
    """`serve_app(settings)`: the address of another app, which ends with the test."""
    with ExitStack() as stack:
        yield lambda settings: stack.enter_context(serving(settings))


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
