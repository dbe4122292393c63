"""`--through`: a command's model run inside another library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.parametrize(("library", "package"), [("transformer-lens", "transformer_lens"), ("nnsight", "nnsight")])
def test_a_command_runs_through_a_library(call, model_folder: str, tmp_path: Path, library: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{library} is not installed")
    out = tmp_path / "run"
    command = ["heads", model_folder, "--detectors", "entropy", "--prompts", 2, "--out", out]
    result = call("--through", library, *command)
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"]["adapter"] == library


def test_a_library_that_does_not_exist_is_refused(call) -> None:
    result = call("--through", "lens", "runs", "list")
    assert result.exit_code == 2 and "transformer-lens" in result.stderr
