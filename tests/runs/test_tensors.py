from __future__ import annotations

import json

import numpy as np
import pytest

from workbench.errors import RequestError, RunCorrupt
from workbench.runs import Run, RunWriter


def write(path, **tensors):
    with RunWriter.open(path, kind="pattern", title="T", fingerprint={}) as writer:
        writer.tensors("head", tensors)
        writer.done("head")
        return writer.finish()


def test_parts_of_tensors_are_read_as_written(tmp_path):
    q = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    run = write(tmp_path / "run", q=q, half=q.astype(np.float16)[::2])
    found = Run.open(run.path).tensors("head")
    assert found.names == ("half", "q") and found.shape("q") == (100, 8) and "q" in found and "k" not in found
    assert np.array_equal(found.read("q", slice(3, 7)), q[3:7])
    assert np.array_equal(found.read("half"), q.astype(np.float16)[::2])
    with pytest.raises(RequestError, match="no tensor 'k'; it has half, q"):
        found.read("k")
    with pytest.raises(RequestError, match="no tensors 'other'; it has: head"):
        run.tensors("other")


def test_tensors_count_in_the_checks_of_a_run(tmp_path):
    run = write(tmp_path / "run", q=np.zeros((4, 2), dtype=np.float32))
    file = run.path / "tensors" / "head.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(bytes(content))
    Run.open(run.path, verify=False)
    with pytest.raises(RunCorrupt, match="tensors/head differs from its checksum"):
        Run.open(run.path)
    file.write_bytes(b"short")
    with pytest.raises(RunCorrupt, match="tensors/head has 5 bytes"):
        Run.open(run.path, verify=False)


def test_what_cannot_be_held_is_refused(tmp_path):
    with RunWriter.open(tmp_path / "run", kind="pattern", title="T", fingerprint={}) as writer:
        with pytest.raises(RequestError, match="'q' is object"):
            writer.tensors("head", {"q": np.array([{}], dtype=object)})
        with pytest.raises(RequestError, match="nothing to write"):
            writer.tensors("other", {})


def test_runs_without_tensors_do_not_mention_them(tmp_path):
    with RunWriter.open(tmp_path / "run", kind="heads", title="T", fingerprint={}) as writer:
        run = writer.finish()
    assert "tensors" not in json.loads((run.path / "manifest.json").read_text())
    assert not (run.path / "tensors").exists() and Run.open(run.path).tensor_files == ()
