"""Circuits as files: the JSON of the MIB circuit track (that of EAP-IG's `Graph.to_json`), and GraphML.

MIB names nodes `input`, `a0.h1`, `m0`, `logits` and edges `a0.h1->a1.h2<q>`. Its graphs know no key/value heads: with
grouped queries each edge into k or v stands there once for every query head of the group, with an equal part of the
score; read back, the parts are added and the edge is kept if any of them is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from workbench.circuits.circuit import Circuit
from workbench.circuits.graph import Graph, layer_of
from workbench.errors import RequestError

_SPACE = "http://graphml.graphdrawing.org/xmlns"
_FIELDS = {"through": "string", "kept": "boolean", "score": "double"}
# Larger files are no circuits of ours, and XML is read whole.
LARGEST = 1 << 28


def write_mib(circuit: Circuit, path: Path | str, d_model: int) -> None:
    """The graph with scores and what is kept, as MIB's evaluation reads it (`d_model` is a field of its header)."""
    graph = circuit.graph
    heads, kv_heads = _shape(graph)
    whole = circuit.pruned()
    nodes = {_mib(name): {"in_graph": bool(there)} for name, there in zip(graph.writers, whole.writers, strict=True)}
    nodes["logits"] = {"in_graph": True}
    edges = {name: {"score": score, "in_graph": kept} for name, score, kept in _mib_edges(circuit)}
    header = {
        "n_layers": len(graph.layers),
        "n_heads": heads,
        "parallel_attn_mlp": _parallel(graph),
        "d_model": d_model,
        "n_key_value_heads": kv_heads,
    }
    document = {"cfg": header, "nodes": nodes, "edges": edges}
    Path(path).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")


def read_mib(graph: Graph, path: Path | str) -> Circuit:
    """A circuit of this graph from MIB's JSON, its scores with it.

    Raises `RequestError` for a file of another shape of model, or whose edges this graph does not have.
    """
    document = _json(Path(path))
    header = document["cfg"]
    heads, _ = _shape(graph)
    own = {"n_layers": len(graph.layers), "n_heads": heads, "parallel_attn_mlp": _parallel(graph)}
    for name, value in own.items():
        if header.get(name) != value:
            raise RequestError(f"{path}: {name} is {header.get(name)!r}, but this model has {value}.")
    places = {
        name: (one, two)
        for one, two in np.argwhere(graph.exists).tolist()
        for name in _names(graph, graph.writers[one], *graph.readers[two])
    }
    kept, scores = np.zeros_like(graph.exists), np.full(graph.exists.shape, np.nan)
    for name, entry in document["edges"].items():
        if name not in places:
            raise RequestError(f"{path}: {name!r} is no edge of this model.")
        where = places[name]
        kept[where] |= _flag(entry, f"{path}: {name}")
        score = entry.get("score")
        if isinstance(score, int | float) and math.isfinite(score):
            scores[where] = score + (0.0 if np.isnan(scores[where]) else scores[where])
    return Circuit(graph, kept, Path(path).stem, "read from MIB's JSON", (), scores)


def write_graphml(circuit: Circuit, path: Path | str, *, every: bool = False) -> None:
    """Kept edges (or `every` edge) with their input, score and whether they are kept, for Gephi, yEd or networkx."""
    graph = circuit.graph
    ElementTree.register_namespace("", _SPACE)
    root = ElementTree.Element(f"{{{_SPACE}}}graphml")
    for name, kind in _FIELDS.items():
        about = {"id": name, "for": "edge", "attr.name": name, "attr.type": kind}
        ElementTree.SubElement(root, f"{{{_SPACE}}}key", about)
    ElementTree.SubElement(
        root, f"{{{_SPACE}}}key", {"id": "layer", "for": "node", "attr.name": "layer", "attr.type": "int"}
    )
    for name in ("name", "method"):
        ElementTree.SubElement(
            root, f"{{{_SPACE}}}key", {"id": name, "for": "graph", "attr.name": name, "attr.type": "string"}
        )
    found = ElementTree.SubElement(root, f"{{{_SPACE}}}graph", {"id": "circuit", "edgedefault": "directed"})
    _data(found, "name", circuit.name)
    _data(found, "method", circuit.method)
    chosen = graph.exists if every else circuit.kept
    ends = [(graph.writers[one], *graph.readers[two]) for one, two in np.argwhere(chosen)]
    named = {name for source, target, _ in ends for name in (source, target)}
    for node in sorted(named, key=lambda name: (layer_of(name) if layer_of(name) is not None else -1, name)):
        element = ElementTree.SubElement(found, f"{{{_SPACE}}}node", {"id": node})
        layer = layer_of(node)
        if layer is not None:
            _data(element, "layer", str(layer))
    for (one, two), (source, target, through) in zip(np.argwhere(chosen), ends, strict=True):
        about = {"id": f"{source}->{target}.{through}", "source": source, "target": target}
        element = ElementTree.SubElement(found, f"{{{_SPACE}}}edge", about)
        _data(element, "through", through)
        _data(element, "kept", "true" if circuit.kept[one, two] else "false")
        if circuit.scores is not None and not np.isnan(circuit.scores[one, two]):
            _data(element, "score", repr(float(circuit.scores[one, two])))
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def read_graphml(graph: Graph, path: Path | str) -> Circuit:
    """A circuit of this graph from GraphML as `write_graphml` makes it."""
    text = _text(Path(path))
    # Entities are what makes small XML files large.
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise RequestError(f"{path} declares a document type, which circuits do not need; it is not read.")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as reason:
        raise RequestError(f"{path} is no XML: {reason}.") from None
    found = root.find(f"{{{_SPACE}}}graph")
    if found is None:
        raise RequestError(f"{path} has no graph in it; write it with write_graphml.")
    kept, scores = np.zeros_like(graph.exists), np.full(graph.exists.shape, np.nan)
    for element in found.iterfind(f"{{{_SPACE}}}edge"):
        data = _read_data(element)
        source, target = element.get("source", ""), element.get("target", "")
        where = graph.writer(source), graph.reader(target, data.get("through", ""))
        if not graph.exists[where]:
            raise RequestError(f"{path}: there is no edge from {source} to {target} in this model.")
        kept[where] = data.get("kept", "true") == "true"
        if "score" in data:
            scores[where] = _number(data["score"], path)
    about = _read_data(found)
    return Circuit(graph, kept, about.get("name", Path(path).stem), about.get("method", ""), (), scores)


def _mib_edges(circuit: Circuit) -> Iterator[tuple[str, float, bool]]:
    graph = circuit.graph
    for one, two in np.argwhere(graph.exists):
        names = _names(graph, graph.writers[one], *graph.readers[two])
        score = 0.0 if circuit.scores is None else float(np.nan_to_num(circuit.scores[one, two]))
        for name in names:
            yield name, score / len(names), bool(circuit.kept[one, two])


def _names(graph: Graph, source: str, target: str, through: str) -> list[str]:
    """An edge's names in MIB: one, or one for each query head of a KV head's group."""
    if "KV" not in target:
        return [f"{_mib(source)}->{_mib(target)}" + (f"<{through}>" if through else "")]
    heads = [graph.writers[place] for place in graph.feeds(graph.reader(target, through))]
    return [f"{_mib(source)}->{_mib(head)}<{through}>" for head in heads]


def _mib(node: str) -> str:
    if node == "embed":
        return "input"
    if node == "logits":
        return node
    return f"m{layer_of(node)}" if node.endswith(".mlp") else "a{}.h{}".format(*node[1:].split("H"))


def _shape(graph: Graph) -> tuple[int, int]:
    """Heads and KV heads of every layer; MIB knows no layers of different shapes."""
    found = {(one.q.stop - one.q.start, one.k.stop - one.k.start) for one in graph.layers}
    if len(found) > 1:
        raise RequestError("MIB's format knows one number of heads for all layers, and this model has several.")
    return found.pop()


def _parallel(graph: Graph) -> bool:
    """Whether MLPs do not read their own layer's heads."""
    return any(
        one.mlp.stop > one.mlp.start and not bool(graph.exists[one.heads, one.mlp].any()) for one in graph.layers
    )


def _text(path: Path) -> str:
    if not path.is_file():
        raise RequestError(f"{path} is no file.")
    if path.stat().st_size > LARGEST:
        raise RequestError(f"{path} has {path.stat().st_size} bytes; circuits of up to {LARGEST} are read.")
    return path.read_text(encoding="utf-8")


def _json(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(_text(path))
    except ValueError as reason:
        raise RequestError(f"{path} is no JSON: {reason}.") from None
    for name in ("cfg", "nodes", "edges"):
        if not isinstance(document, dict) or not isinstance(document.get(name), dict):
            raise RequestError(f"{path} has no table {name!r}; it is not in MIB's format.")
    found: Mapping[str, Any] = document
    return found


def _flag(entry: object, where: str) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("in_graph"), bool):
        raise RequestError(f"{where} does not say whether it is 'in_graph'.")
    return bool(entry["in_graph"])


def _data(parent: ElementTree.Element, key: str, text: str) -> None:
    ElementTree.SubElement(parent, f"{{{_SPACE}}}data", {"key": key}).text = text


def _read_data(element: ElementTree.Element) -> dict[str, str]:
    return {one.get("key", ""): one.text or "" for one in element.iterfind(f"{{{_SPACE}}}data")}


def _number(text: str, path: Path | str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{path}: score {text!r} is no number.") from None
