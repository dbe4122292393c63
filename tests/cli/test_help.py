from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest

HEAVY = {"torch", "transformers", "pandas", "plotly", "xarray", "zarr", "scipy", "numpy", "jinja2"}
COMMANDS = (
    [],
    ["demo"],
    ["trace"],
    ["heads"],
    ["atlas"],
    ["verify"],
    ["circuits"],
    ["circuits", "tasks"],
    ["circuits", "patch"],
    ["report"],
    ["export"],
    ["models"],
    ["models", "check"],
    ["models", "list"],
    ["runs"],
    ["runs", "list"],
    ["runs", "show"],
    ["runs", "compare"],
    ["study"],
    ["study", "run"],
    ["study", "show"],
    ["study", "figure"],
)
ASK_ALL = f"""
import json, sys
from typer.testing import CliRunner
from workbench.cli.app import app
codes = [CliRunner().invoke(app, [*command, "--help"]).exit_code for command in {COMMANDS!r}]
assert not any(codes), codes
print(json.dumps(sorted(sys.modules)))
"""


def test_no_help_imports_anything_heavy():
    done = subprocess.run([sys.executable, "-c", ASK_ALL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout)) & HEAVY


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(call, command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: workbench {' '.join(command)}".rstrip())


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "workbench", "--version"], capture_output=True, text=True, timeout=120)
    from workbench import __version__

    assert (done.returncode, done.stdout) == (0, f"workbench {__version__}\n")


def test_a_misspelt_command_is_answered_with_the_nearest(call):
    result = call("hads")
    assert result.exit_code == 2
    assert "Did you mean 'heads'?" in result.stderr


def test_names_in_the_help_are_those_that_exist():
    from workbench.cli.atlas import MapName, SetName
    from workbench.cli.export import FormatName, JoinName
    from workbench.cli.options import DETECTOR_NAMES
    from workbench.cli.study import EngineName
    from workbench.cli.verify import HowName, ProbeName
    from workbench.heads import CORE
    from workbench.heads.clusters import METHODS
    from workbench.heads.probes import _BUILDERS
    from workbench.heads.sets import SETS
    from workbench.runs.interchange import Join
    from workbench.studies.engine import ENGINES
    from workbench.tracing.edits import HOWS

    assert set(DETECTOR_NAMES) == set(CORE)
    assert {how.value for how in HowName} == set(HOWS)
    assert {group.value for group in SetName} == set(SETS)
    assert {method.value for method in MapName} == set(METHODS)
    assert {join.value for join in JoinName} == set(get_args(Join))
    assert {engine.value for engine in EngineName} == set(ENGINES)
    assert {form.value for form in FormatName} == {"retrieval-head", "duo", "headvis"}
    assert {probe.value for probe in ProbeName} == set(_BUILDERS)


def test_every_named_statistic_can_be_asked_for():
    from workbench.cli.trace import DEFAULT_STATISTICS, PLAIN_STATISTICS, SIZED_STATISTICS, parse_statistics

    sized = [f"{kind}_-16" if kind == "offset" else f"{kind}_16" for kind in SIZED_STATISTICS]
    found = [statistic.name for statistic in parse_statistics(",".join([*PLAIN_STATISTICS, *sized]))]
    pairs = [name for one in sized for name in (["top_k", "top_k_mass"] if one == "top_k_16" else [one])]
    assert found == [*PLAIN_STATISTICS, *pairs]
    assert len(parse_statistics(DEFAULT_STATISTICS)) == 6


def test_every_statistic_without_labels_has_a_name_here():
    from workbench.cli.trace import BOUND_STATISTICS, PLAIN_STATISTICS, SIZED_STATISTICS, parse_statistics
    from workbench.tracing import statistics

    made = {
        name
        for name, value in vars(statistics).items()
        if getattr(value, "__module__", "") == statistics.__name__ and not name.startswith("_") and name[0].islower()
    }
    # These take tensors or functions.
    given = {"mass", "at_keys", "column_weighted", "value_mass"}
    assert made - given == {*PLAIN_STATISTICS, *SIZED_STATISTICS, *BOUND_STATISTICS}
    names = ["above_0.1", "above_0.25", "column_above_0.3", "diagonal", "diagonal_last_4", "block_max_32"]
    assert [one.name for one in parse_statistics(",".join(names).replace("0.25", ".25"))] == names
