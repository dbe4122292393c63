"""`workbench trace --patterns`: what is stored of a head is the model's own pattern; `serve` wants a folder."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.runs import Run
from workbench.runs.patterns import open_pattern

TEXT = "The class statement defines a class object. A class definition is an executable statement."


@pytest.fixture(scope="module")
def stored(call, model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "trace"
    result = call("trace", model_folder, "--prompt", TEXT, "--patterns", "L1H2,L2H0", "--out", path)
    assert result.exit_code == 0, result.output
    return path, result


def test_stored_patterns_are_the_models_own(stored, model_folder):
    import workbench

    path, result = stored
    assert "workbench serve" in result.stdout
    run = Run.open(path)
    assert run.tensor_files == ("l1h2", "l2h0") and run.manifest["patterns"]["l1h2"]["head"] == 2
    model = workbench.load(model_folder)
    trace = model.trace(TEXT, sites=["pattern"])
    for name, layer, head in (("l1h2", 1, 2), ("l2h0", 2, 0)):
        pattern = open_pattern(run, name)
        every = slice(0, pattern.tokens)
        expected = trace.site("pattern", layer)[0, head].numpy()
        assert np.allclose(pattern.entries(every, every).numpy(), expected, atol=1e-6)
        assert np.allclose(pattern.strip("sink", pattern.tokens), expected[:, 0], atol=1e-6)
    assert next(iter(run.table("tokens")["text"])) and len(run.table("tokens")) == pattern.tokens
    model.detach()


def test_reading_in_chunks_stores_the_same(stored, call, model_folder, tmp_path):
    whole = Run.open(stored[0])
    result = call(
        "trace", model_folder, "--prompt", TEXT, "--patterns", "L1H2,L2H0", "--chunk", 7, "--out", tmp_path / "chunked"
    )
    assert result.exit_code == 0, result.output
    chunked = Run.open(tmp_path / "chunked")
    for name in whole.tensor_files:
        first, second = open_pattern(whole, name), open_pattern(chunked, name)
        every = slice(0, first.tokens)
        assert np.allclose(first.entries(every, every).numpy(), second.entries(every, every).numpy(), atol=1e-5)
    means = [run.table("statistic_means").set_index(["statistic", "layer", "head"])["mean"] for run in (whole, chunked)]
    assert np.allclose(*means, rtol=1e-4, atol=1e-5)
    result = call("trace", model_folder, "--prompt", TEXT, "--chunk", 0, "--out", tmp_path / "none")
    assert result.exit_code == 2


def test_wrong_heads_and_folders_are_refused(call, model_folder, tmp_path):
    result = call("trace", model_folder, "--prompt", TEXT, "--patterns", "L9H0", "--out", tmp_path / "x")
    assert result.exit_code == 2 and "layers run from 0 to 2" in result.stderr
    result = call("serve", tmp_path / "nowhere")
    assert result.exit_code == 2 and "no folder" in result.stderr
