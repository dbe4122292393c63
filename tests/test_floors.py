"""The floors of the package: who may import whom.

A sub-package imports only from those on lower floors; packages side by side on one floor do not import
each other; modules import each other in no circle; and nothing in the package imports from the root
`workbench` or from the outer folders. The graph is read from the sources, so imports inside functions
and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "workbench"

# From the ground up. CONTRIBUTING.md explains them.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("kernels",),
    ("models",),
    ("tracing",),
    ("tasks",),
    ("heads", "circuits", "dynamics"),
    ("runs",),
    ("studies",),
    ("figures",),
    ("reports",),
    ("apps",),
    ("cli",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
# `datasets` and `kernels` are also packages of Hugging Face's, which the workbench does not use.
OUTER_FOLDERS = ("probes", "kernels", "apps", "datasets", "reports", "tests")


@dataclass(frozen=True)
class Import:
    """One import statement of one module, resolved to what it reaches."""

    importer: str
    target: str
    line: int
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.importer} (line {self.line}) imports {self.target}"


class _ImportReader(ast.NodeVisitor):
    """Collects the absolute dotted names that one module imports."""

    def __init__(self, module: str, is_package: bool, modules: frozenset[str]) -> None:
        self.module = module
        self.package = module if is_package else module.rpartition(".")[0]
        self.modules = modules
        self.found: list[Import] = []
        self._typing_only = False

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
            return
        self._typing_only = True
        for statement in node.body:
            self.visit(statement)
        self._typing_only = False
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            kept = parents[: len(parents) - (node.level - 1)]
            base = ".".join([*kept, base] if base else kept)
        for alias in node.names:
            # `from a import b` reaches module a.b if there is one, and else a name inside a.
            self._add(self._deepest(f"{base}.{alias.name}", base), node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).rpartition(".")[2]
        first = node.args[0] if node.args else None
        if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
            self._add(str(first.value), node.lineno)
        self.generic_visit(node)

    def _deepest(self, dotted: str, base: str) -> str:
        if dotted in self.modules or base == PACKAGE:
            return dotted
        return base

    def _add(self, target: str, line: int) -> None:
        self.found.append(Import(self.module, target, line, self._typing_only))


def read_sources(root: Path) -> dict[str, str]:
    """Module name -> source, for every module of the package under `root`."""
    sources = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


def read_imports(sources: dict[str, str]) -> list[Import]:
    """Every import of every module; the root's own lazy table of public names is left out."""
    modules = frozenset(sources)
    packages = {name.rpartition(".")[0] for name in sources} | {PACKAGE}
    imports: list[Import] = []
    for name, source in sources.items():
        if name == PACKAGE:
            continue
        reader = _ImportReader(name, name in packages, modules)
        reader.visit(ast.parse(source, filename=name))
        imports.extend(reader.found)
    return imports


def part_of(module: str) -> str:
    """`workbench.models.spec` -> `models`; `workbench.__main__` is part of the command line."""
    part = module.split(".")[1]
    return "cli" if part == "__main__" else part


def unknown_parts(sources: dict[str, str]) -> list[str]:
    return sorted({part_of(m) for m in sources if m != PACKAGE} - set(FLOOR_OF))


def floor_violations(imports: list[Import]) -> list[str]:
    """Imports that reach up, or sideways into a package of the same floor."""
    problems = []
    for item in imports:
        if not item.target.startswith(f"{PACKAGE}."):
            continue
        importer, target = part_of(item.importer), part_of(item.target)
        if importer == target or item.target == f"{PACKAGE}.__version__":
            continue
        if target not in FLOOR_OF:
            problems.append(f"{item}: import it from the sub-package that defines it, not from the root")
        elif FLOOR_OF[target] > FLOOR_OF[importer]:
            problems.append(f"{item}: {target} is above {importer}")
        elif FLOOR_OF[target] == FLOOR_OF[importer]:
            problems.append(f"{item}: {target} and {importer} stand side by side")
    return problems


def root_imports(imports: list[Import]) -> list[str]:
    return [f"{item}: import from a sub-package" for item in imports if item.target == PACKAGE]


def outer_imports(imports: list[Import]) -> list[str]:
    return [f"{item}: no outer folder is importable" for item in imports if item.target.split(".")[0] in OUTER_FOLDERS]


def cycles(imports: list[Import], modules: frozenset[str]) -> list[str]:
    """Circles among the modules that import each other while running, each as `a -> b -> a`."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for item in imports:
        if not item.typing_only and item.target in modules and item.target != item.importer:
            graph[item.importer].add(item.target)
    found: list[str] = []
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
            return
        if module in done:
            return
        for target in sorted(graph[module]):
            walk(target, [*path, module])
        done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return read_sources(ROOT)


@pytest.fixture(scope="module")
def imports(sources: dict[str, str]) -> list[Import]:
    return read_imports(sources)


def report(problems: list[str]) -> str:
    return "\n" + "\n".join(problems)


def test_every_part_of_the_package_has_a_floor(sources: dict[str, str]) -> None:
    unknown = unknown_parts(sources)
    assert not unknown, f"no floor is given for {unknown}: add them to FLOORS and to CONTRIBUTING.md"


def test_imports_reach_down_only(imports: list[Import]) -> None:
    problems = floor_violations(imports)
    assert not problems, report(problems)


def test_modules_import_each_other_in_no_circle(sources: dict[str, str], imports: list[Import]) -> None:
    problems = cycles(imports, frozenset(sources))
    assert not problems, report(problems)


def test_nothing_inside_imports_from_the_root(imports: list[Import]) -> None:
    problems = root_imports(imports)
    assert not problems, report(problems)


def test_outer_folders_are_never_imported(imports: list[Import]) -> None:
    problems = outer_imports(imports)
    assert not problems, report(problems)


def test_contributing_lists_the_same_floors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ") and "`" in line]
    listed = [tuple(name.strip(" `") for name in row.split(",")) for row in rows]
    assert listed == list(FLOORS)


SMALL = {
    "workbench": "",
    "workbench.errors": "",
    "workbench.kernels": "from workbench.kernels.rows import f as f",
    "workbench.kernels.rows": "from workbench.errors import WorkbenchError",
    "workbench.models": "",
    "workbench.heads": "from workbench.kernels import f\nfrom workbench import __version__",
    "workbench.circuits": "",
}


@pytest.mark.parametrize(
    ("module", "source", "check", "says"),
    [
        (
            "workbench.kernels.rows",
            "from workbench.models import x",
            floor_violations,
            "models is above kernels",
        ),
        ("workbench.kernels.rows", "from ..models import x", floor_violations, "models is above kernels"),
        (
            "workbench.kernels.rows",
            "from workbench import models",
            floor_violations,
            "models is above kernels",
        ),
        (
            "workbench.errors",
            "def f():\n    import workbench.kernels",
            floor_violations,
            "kernels is above errors",
        ),
        ("workbench.errors", "import_module('workbench.models')", floor_violations, "models is above errors"),
        ("workbench.heads", "import workbench.circuits", floor_violations, "side by side"),
        (
            "workbench.models",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from workbench.heads import x",
            floor_violations,
            "heads is above models",
        ),
        ("workbench.heads", "from workbench import load", floor_violations, "not from the root"),
        ("workbench.heads", "import workbench", root_imports, "import from a sub-package"),
        ("workbench.heads", "from probes.sinks import x", outer_imports, "no outer folder"),
        (
            "workbench.kernels.rows",
            "from . import f",
            lambda found: cycles(found, frozenset(SMALL)),
            "workbench.kernels -> workbench.kernels.rows -> workbench.kernels",
        ),
    ],
)
def test_each_check_catches_what_it_is_for(module: str, source: str, check, says: str) -> None:
    assert not check(read_imports(SMALL))
    (problem,) = check(read_imports(SMALL | {module: source}))
    assert says in problem
