"""The layout of the repository, the size of its modules and what importing costs."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
OUTER_FOLDERS = ("probes", "kernels", "apps", "datasets", "reports")
PARTS = ("kernels", "models", "tracing", "tasks", "heads", "runs", "figures", "reports", "cli")
MODULE_LINES = 400
FUNCTION_LINES = 60
KERNEL_LINES = 100
HEAVY = {"torch", "transformers", "dash", "transformer_lens", "nnsight", "pandas", "plotly"}


def sources() -> list[Path]:
    return sorted((ROOT / "workbench").rglob("*.py"))


def run_python(code: str) -> str:
    """What a new interpreter, started in the root of the repository, prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PARTS)
def test_the_package_has_its_parts(name: str) -> None:
    assert (ROOT / "workbench" / name / "__init__.py").is_file()


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "workbench" / "py.typed").is_file()


@pytest.mark.parametrize("name", OUTER_FOLDERS)
def test_outer_folders_say_what_they_hold(name: str) -> None:
    readme = ROOT / name / "README.md"
    assert readme.is_file()
    assert readme.read_text(encoding="utf-8").startswith(f"# {name}")


@pytest.mark.parametrize("name", [*OUTER_FOLDERS, "tests"])
def test_outer_folders_are_no_packages(name: str) -> None:
    assert not list((ROOT / name).rglob("__init__.py"))


def test_hugging_face_datasets_is_not_hidden_by_our_folder() -> None:
    where = run_python("import datasets; from datasets import load_dataset; print(datasets.__file__)")
    assert ROOT / "datasets" not in Path(where.strip()).parents


def test_modules_are_short() -> None:
    lengths = {p.relative_to(ROOT): len(p.read_text(encoding="utf-8").splitlines()) for p in sources()}
    long = [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > MODULE_LINES]
    assert not long, f"over {MODULE_LINES} lines:\n" + "\n".join(long)


def test_functions_are_short() -> None:
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                # What a function says of itself may be as long as its reader needs.
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            # A kernel is a straight run of loads and stores, with a page of parameters.
            kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if lines > (KERNEL_LINES if kernel else FUNCTION_LINES):
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not long, f"over {FUNCTION_LINES} lines:\n" + "\n".join(long)


def test_what_the_package_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = {_normal(re.split(r"[\[<>=~! ]", line)[0]) for line in [*project["dependencies"], *extras]}
    provided_by = importlib.metadata.packages_distributions()
    undeclared = []
    for path in sources():
        for module in sorted(_imported(path) - sys.stdlib_module_names - {"workbench"}):
            owners = {_normal(name) for name in provided_by.get(module, [module])}
            if not owners & declared:
                undeclared.append(f"{path.relative_to(ROOT)} imports {module}, from {sorted(owners)}")
    assert not undeclared, "not in pyproject.toml:\n" + "\n".join(undeclared)


def test_the_lock_satisfies_what_is_declared() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = dict(line.partition(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))
    versions = {_normal(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        pinned = versions.get(_normal(wanted.name))
        assert pinned is not None, f"{wanted.name} has no line in requirements.lock"
        assert pinned in wanted.specifier, f"requirements.lock has {wanted.name} {pinned}, not {wanted}"


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _imported(path: Path) -> set[str]:
    """The top-level modules that a module names in absolute imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = set(json.loads(run_python("import json, sys, workbench; print(json.dumps(sorted(sys.modules)))")))
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("workbench")} == {"workbench"}


def test_help_imports_nothing_heavy() -> None:
    code = """
import json, sys
from workbench.cli import main
sys.argv = ["workbench", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print()
print(json.dumps(sorted(sys.modules)))
"""
    *text, modules = run_python(code).strip().splitlines()
    assert "workbench" in "\n".join(text)
    assert not set(json.loads(modules)) & HEAVY
