"""The public names of `workbench`: which they are, that each resolves, that nothing else does."""

from __future__ import annotations

import ast
import re
import tomllib
import types
from pathlib import Path

import pytest

import workbench

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = {
    "Batch": "workbench.models",
    "Certificate": "workbench.models",
    "Head": "workbench.models",
    "LayerSpec": "workbench.models",
    "Model": "workbench.tracing",
    "Run": "workbench.runs",
    "Spec": "workbench.models",
    "Trace": "workbench.tracing",
    "ablate": "workbench.tracing",
    "detect": "workbench.heads",
    "errors": "workbench",
    "load": "workbench.tracing",
    "patch": "workbench.tracing",
    "show": "workbench.figures.shown",
    "statistics": "workbench.tracing",
    "verify": "workbench.heads",
    "write_report": "workbench.reports",
}
MODULES = {"errors", "statistics"}


def test_the_public_names_are_exactly_these() -> None:
    assert workbench.__all__ == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_resolves(name: str) -> None:
    value = getattr(workbench, name)
    if name in MODULES:
        assert isinstance(value, types.ModuleType)
        assert value.__name__ == f"{PUBLIC[name]}.{name}"
    else:
        assert callable(value), f"workbench.{name} is {value!r}: a class or a function was expected"
        assert value.__doc__, f"workbench.{name} has no docstring"
        assert value.__module__.startswith(PUBLIC[name]), f"workbench.{name} comes from {value.__module__}"


def test_dir_lists_the_public_names() -> None:
    assert set(PUBLIC) <= set(dir(workbench))


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=re.escape("'lode'; it has Batch, ")):
        workbench.lode  # noqa: B018 (the read is the test)


def test_type_checkers_see_the_same_names_as_readers() -> None:
    tree = ast.parse((ROOT / "workbench" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.asname: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == PUBLIC


def test_the_version_is_the_one_at_the_top_of_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["version"]["path"] == "workbench/__init__.py"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[([^\]]+)\]", changelog, flags=re.MULTILINE)
    assert headings[0] == "Unreleased", "new entries go under [Unreleased], at the top"
    released = headings[1:]
    assert not released or released[0] == workbench.__version__
