from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import workbench
from workbench.runs import environment
from workbench.runs.machine import _gpus, _processor

ROOT = Path(workbench.__file__).parents[1]


def test_versions_and_machine():
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert found["torch"] == metadata.version("torch")
    assert found["transformers"] == metadata.version("transformers")
    assert found["workbench"] == workbench.__version__
    assert found["threads"] >= 1
    assert found["cpu"]
    assert found["platform"]
    assert json.loads(json.dumps(found)) == found


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from workbench.runs import environment; environment();"
        "print([m for m in ('torch', 'transformers', 'dash', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_a_loaded_torch_says_threads_and_gpus(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda i: f"GPU {i}")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 7, cuda=cuda))
    found = environment()
    assert found["threads"] == 7
    assert found["gpu"] == ["GPU 0", "GPU 1"]
    cuda.is_available = lambda: False
    assert environment()["gpu"] == []


def test_without_torch_the_system_is_asked(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t NVIDIA H100\nIRQ: 5\n")
    assert _gpus(tmp_path) == ["NVIDIA H100"]
    assert _gpus(tmp_path / "none") == []
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Xeon: fast\n")
    assert _processor(tmp_path / "cpuinfo") == "Xeon: fast"
    assert _processor(tmp_path / "nowhere")
