"""Cells in several processes and on Ray: the same numbers, lost workers made good, nothing measured twice."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.models.testing import TINY
from workbench.studies import run_study, several
from workbench.studies.engine import Local, make_engine
from workbench.studies.several import RETRIES, OnRay, Processes
from workbench.studies.spec import Study
from workbench.studies.store import Store

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra 'ray'")
# Ray leaves sockets and files to the collector.
quiet = pytest.mark.filterwarnings("ignore")
CELLS = 64


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "tiny"
    TINY["llama"]().save_pretrained(folder)
    return folder


def sweep(tiny: Path, cells: int = CELLS) -> Study:
    """So many cells of a few hundredths of a second."""
    text = f"""
        [study]
        name = "sweep"
        title = "T"
        question = "Q"
        model = {json.dumps(str(tiny))}

        [[cells]]
        measurement = "sink_rates"
        set = {{ prompts = 2, length = 12, source = "random" }}
        grid = {{ seed = {list(range(cells))} }}
    """
    return Study.model_validate(tomllib.loads(text))


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """What one process finds."""
    return run_study(sweep(tiny), tmp_path_factory.mktemp("alone") / "run", engine=Local())


class Counting:
    """An engine that keeps which cells came back, and does something after a few of them."""

    def __init__(self, engine, after: int = 0, act=None) -> None:
        self.engine, self.after, self.act = engine, after, act
        self.seen: Counter[str] = Counter()

    def results(self, cells, begin, progress):
        for result in self.engine.results(cells, begin, progress):
            self.seen[result.cell.id] += 1
            yield result
            if self.act is not None and sum(self.seen.values()) == self.after:
                self.act()


def same(found, expected) -> None:
    assert found.failed == expected.failed == {}
    assert found.run.tables == expected.run.tables
    for name in expected.run.tables:
        pd.testing.assert_frame_equal(found.run.table(name), expected.run.table(name))


def test_two_processes_give_the_same(tiny, alone, tmp_path) -> None:
    engine = Counting(Processes(2))
    same(run_study(sweep(tiny), tmp_path / "run", engine=engine), alone)
    assert len(engine.seen) == CELLS and set(engine.seen.values()) == {1}


@needs_ray
@quiet
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers_give_the_same(tiny, alone, tmp_path, workers) -> None:
    engine = Counting(OnRay(workers=workers))
    same(run_study(sweep(tiny), tmp_path / "run", engine=engine), alone)
    assert len(engine.seen) == CELLS and set(engine.seen.values()) == {1}


@needs_ray
@quiet
def test_a_lost_node_loses_nothing(tiny, alone, tmp_path) -> None:
    """A cluster of two nodes with one processor each; one is killed after nine cells."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    nodes: list[int] = []

    def kill() -> None:
        nodes.append(sum(one["Alive"] for one in ray.nodes()))
        cluster.remove_node(node, allow_graceful=False)

    engine = Counting(OnRay(address=cluster.address), after=9, act=kill)
    try:
        same(run_study(sweep(tiny), tmp_path / "run", engine=engine), alone)
    finally:
        cluster.shutdown()
    assert nodes == [2], "both nodes were there when one was killed"
    assert len(engine.seen) == CELLS and set(engine.seen.values()) == {1}


@needs_ray
@quiet
def test_a_killed_driver_goes_on(tiny, alone, tmp_path) -> None:
    class Killed(BaseException):
        """Stands for whatever ends the driver."""

    def die() -> None:
        raise Killed

    first = Counting(OnRay(workers=2), after=5, act=die)
    with pytest.raises(Killed):
        run_study(sweep(tiny), tmp_path / "run", engine=first)
    kept = [cell.id for cell in sweep(tiny).cells() if Store(tmp_path / "run").has(cell)]
    assert len(kept) == 5
    second = Counting(OnRay(workers=2))
    same(run_study(sweep(tiny), tmp_path / "run", engine=second), alone)
    assert set(second.seen) & set(kept) == set() and len(second.seen) == CELLS - 5


# Processes find what they run by its module, so it is written as one.
DYING = """
import os
from pathlib import Path

from workbench.studies import several

MARK = Path({mark!r})
real = several.measure_here


def always(cell, device):
    os._exit(9)


def once(cell, device):
    if "2" in str(dict(cell.axes)["seed"]) and not MARK.exists():
        MARK.touch()
        os._exit(9)
    return real(cell, device)
"""


@pytest.fixture
def dying(tmp_path, monkeypatch):
    """A module of measurements that end their process: what a cell that takes all memory does."""
    (tmp_path / "dying_cells.py").write_text(DYING.format(mark=str(tmp_path / "died")))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("dying_cells")
    del sys.modules["dying_cells"]


def test_a_process_that_dies_is_made_good(tiny, tmp_path, monkeypatch, dying) -> None:
    monkeypatch.setattr(several, "measure_here", dying.once)
    engine = Counting(Processes(2))
    found = run_study(sweep(tiny, 6), tmp_path / "run", engine=engine)
    assert dying.MARK.exists() and found.failed == {}
    assert len(engine.seen) == 6 and set(engine.seen.values()) == {1}


def test_a_cell_that_always_kills_its_process_is_told(tiny, tmp_path, monkeypatch, dying) -> None:
    monkeypatch.setattr(several, "measure_here", dying.always)
    with pytest.raises(RequestError, match=f"lost {RETRIES + 1} times.*fewer workers"):
        run_study(sweep(tiny, 1), tmp_path / "run", engine=Processes(2))


def test_engines_by_name() -> None:
    assert make_engine("local") == Local() and make_engine("local", workers=1) == Local()
    assert make_engine("local", "cpu", 3) == Processes(3, "cpu")
    with pytest.raises(RequestError, match="workers=0"):
        make_engine("local", workers=0)
    with pytest.raises(RequestError, match="engine 'ray'"):
        make_engine("local", address="ray://a:1")
    if find_spec("ray") is not None:
        assert make_engine("ray", None, 2, "a:1") == OnRay(None, 2, "a:1")
