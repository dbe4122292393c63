"""Compiles RASP programs to transformer weights with tracr and writes them beside this file.

    python -m venv tracr && tracr/bin/pip install tracr-pypi==1.0.0 safetensors
    tracr/bin/python make.py [NAME ...]

Needed only to change a program: what it writes is in the repository, and reading it needs neither tracr nor jax.
Everything is compiled with causal attention, since the models run as decoders.  Six programs are tracr's own, as
they mean under causal evaluation; `reverse` and `sort` are ours, because tracr's need to see later tokens: here the
output is written after the input, as a decoder would.

Each program gives ``NAME.safetensors`` (weights under the names of `ToyModel`) and ``NAME.json`` (vocabulary, shape,
what each head and MLP reads and writes, cases with the outputs of tracr's own evaluation of the program).
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling, lib
from tracr.rasp import causal_eval, rasp

HERE = Path(__file__).parent
BOS = "BOS"
BAR = "|"
CASES = 120


@dataclass(frozen=True)
class Program:
    """A RASP program, and the sequences (without the start token) that it is meant for."""

    name: str
    does: str
    source: str
    build: Callable[[], rasp.SOp]
    vocabulary: tuple[Hashable, ...]
    length: int
    sequences: Callable[[], Iterator[tuple[Hashable, ...]]]


def anything(vocabulary: Sequence[Hashable], lengths: Sequence[int]) -> Callable[[], Iterator[tuple[Hashable, ...]]]:
    """All sequences of these lengths."""
    return lambda: itertools.chain.from_iterable(itertools.product(vocabulary, repeat=n) for n in lengths)


def counted(key: Callable[[Any], bool], sop: rasp.SOp, most: int, name: str) -> rasp.SOp:
    """How many tokens so far satisfy `key`, at most `most`: fewer values make a smaller model."""
    width = rasp.SelectorWidth(rasp.Select(sop, sop, lambda k, q: key(k)))
    return rasp.Map(lambda count: min(count, most), width).named(name)


def reverse() -> rasp.SOp:
    """``x1 .. xn | xn .. x1``: each token from the bar on is followed by the right next one."""
    passed = counted(lambda token: token == BAR, rasp.tokens, 1, "passed")
    length = counted(lambda bars: bars == 0, passed, 4, "length")
    # The bar stands at n; at n + j the token of n - 1 - j is due.
    source = rasp.SequenceMap(lambda n, i: 2 * n - 1 - i, length, rasp.indices).named("source")
    return rasp.Aggregate(rasp.Select(rasp.indices, source, rasp.Comparison.EQ), rasp.tokens).named("reverse")


def reversals() -> Iterator[tuple[Hashable, ...]]:
    """Inputs with all of their outputs but the last, which is asked."""
    for n in (2, 3, 4):
        for x in itertools.product("abc", repeat=n):
            yield (*x, BAR, *x[:0:-1])


def sort() -> rasp.SOp:
    """``x | x | sorted x``, without repeats: ranks are known only once all was read, so it is read twice."""
    reading = counted(lambda token: token == BAR, rasp.tokens, 2, "reading")
    item = rasp.SequenceMap(lambda r, x: (r, x), reading, rasp.tokens).named("item")
    smaller = rasp.Select(item, item, lambda k, q: k[0] == 0 and BAR not in (k[1], q[1]) and k[1] < q[1])
    rank = rasp.Map(lambda count: min(count, 2), rasp.SelectorWidth(smaller)).named("rank")
    written = counted(lambda bars: bars == 2, reading, 3, "written")
    place = rasp.SequenceMap(lambda one, r: r + 1 if one[0] == 1 and one[1] != BAR else 0, item, rank).named("place")
    # At the second bar one token of the third part is there, the bar itself, and the smallest is due.
    due = rasp.Select(place, written, lambda k, q: k == q and k > 0)
    return rasp.Aggregate(due, rasp.tokens).named("sort")


def sortings() -> Iterator[tuple[Hashable, ...]]:
    """Inputs, read twice, with all of their outputs but the last, which is asked."""
    for n in (2, 3):
        for x in itertools.permutations("1234", n):
            yield (*x, BAR, *x, BAR, *sorted(x)[:-1])


TRACR = "tracr.compiler.lib"
PROGRAMS = (
    Program(
        "frac_prevs", "share of x among the tokens so far", f"{TRACR}.make_frac_prevs(tokens == 'x')",
        lambda: lib.make_frac_prevs((rasp.tokens == "x").named("is_x")), tuple("wxyz"), 5, anything("wxyz", (3, 4, 5)),
    ),
    Program(
        "hist", "how often this token came so far, itself included", f"{TRACR}.make_hist()",
        lib.make_hist, tuple("abc"), 5, anything("abc", (3, 4, 5)),
    ),
    Program(
        "count", "how often a came so far", f"{TRACR}.make_count(tokens, 'a')",
        lambda: lib.make_count(rasp.tokens, "a"), tuple("abc"), 5, anything("abc", (3, 4, 5)),
    ),
    Program(
        "shift", "the token two before", f"{TRACR}.shift_by(2, tokens)",
        lambda: lib.shift_by(2, rasp.tokens), tuple("abc"), 5, anything("abc", (3, 4, 5)),
    ),
    Program(
        "detect_pattern", "whether b stands here and a before it", f"{TRACR}.detect_pattern(tokens, 'ab')",
        lambda: lib.detect_pattern(rasp.tokens, "ab"), tuple("abc"), 5, anything("abc", (3, 4, 5)),
    ),
    Program(
        "pair_balance", "share of ( less share of ) so far", f"{TRACR}.make_pair_balance(tokens, '(', ')')",
        lambda: lib.make_pair_balance(rasp.tokens, "(", ")"), tuple("()"), 5, anything("()", (3, 4, 5)),
    ),
    Program(
        "reverse", "the input backwards, after a bar", "reverse() of make.py",
        reverse, (*"abc", BAR), 8, reversals,
    ),
    Program(
        "sort", "the input sorted, after it was read twice", "sort() of make.py",
        sort, (*"1234", BAR), 10, sortings,
    ),
)  # fmt: skip


def arrays(compiled: Any, vocabulary: dict[Hashable, int], outputs: list[int], size: int) -> dict[str, np.ndarray]:
    """The weights under the names of `ToyModel`: linear maps as [out, in]."""
    params = {name: {key: np.asarray(value, np.float32) for key, value in part.items()}
              for name, part in compiled.params.items()}  # fmt: skip
    found = {
        "token_embedding.weight": np.zeros((size, params["token_embed"]["embeddings"].shape[1]), np.float32),
        "position_embedding.weight": params["pos_embed"]["embeddings"],
    }
    found["token_embedding.weight"][: len(vocabulary)] = params["token_embed"]["embeddings"]
    unembedding = np.zeros_like(found["token_embedding.weight"])
    for token, column in zip(outputs, output_columns(compiled), strict=True):
        unembedding[token, column] = 1.0
    found["unembedding.weight"] = unembedding
    for layer in range(compiled.model_config.num_layers):
        attention, mlp = f"transformer/layer_{layer}/attn", f"transformer/layer_{layer}/mlp"
        for ours, theirs in (("query", "query"), ("key", "key"), ("value", "value"), ("output", "linear")):
            part = params[f"{attention}/{theirs}"]
            assert not part["b"].any(), "attention has no biases here"
            found[f"blocks.{layer}.attention.{ours}.weight"] = part["w"].T
        for ours, theirs in (("inward", "linear_1"), ("outward", "linear_2")):
            found[f"blocks.{layer}.mlp.{ours}.weight"] = params[f"{mlp}/{theirs}"]["w"].T
            found[f"blocks.{layer}.mlp.{ours}.bias"] = params[f"{mlp}/{theirs}"]["b"]
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def output_columns(compiled: Any) -> list[int]:
    """Residual coordinates of the output values, in the order of its encoder; one of a numerical output."""
    labels = compiled.residual_labels
    return [labels.index(label) for label in compiled.output_labels]


def output_labels(compiled: Any, name: str) -> list[str]:
    """Names of the residual coordinates that hold the output."""
    encoding = getattr(compiled.output_encoder, "encoding_map", None)
    if encoding is None:
        return [name]
    return [f"{name}:{value}" for value in encoding]


def parts(found: dict[str, np.ndarray], labels: list[str], heads: int, width: int, layers: int) -> dict[str, Any]:
    """What each head and MLP reads and writes, by the names of residual coordinates; those that write nothing left
    out."""

    def named(used: np.ndarray) -> list[str]:
        return [label for label, one in zip(labels, used, strict=True) if one]

    about: dict[str, Any] = {}
    for layer in range(layers):
        at = f"blocks.{layer}"
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            q, k, v = (found[f"{at}.attention.{name}.weight"][rows] for name in ("query", "key", "value"))
            out = found[f"{at}.attention.output.weight"][:, rows]
            moved = out @ v
            if moved.any():
                scores = q.T @ k
                about[f"L{layer}H{head}"] = {
                    "q": named(scores.any(1)), "k": named(scores.any(0)), "v": named(moved.any(0)),
                    "writes": named(moved.any(1)),
                }  # fmt: skip
        inward, outward = found[f"{at}.mlp.inward.weight"], found[f"{at}.mlp.outward.weight"]
        if outward.any():
            alive = outward.any(0)
            about[f"L{layer}.mlp"] = {"in": named(inward[alive].any(0)), "writes": named(outward.any(1))}
    return about


def cases(program: Program, sop: rasp.SOp) -> list[dict[str, Any]]:
    """Sequences with the outputs of tracr's own causal evaluation, at most `CASES`, drawn with a fixed seed."""
    sequences = list(program.sequences())
    drawn = sequences if len(sequences) <= CASES else random.Random(0).sample(sequences, CASES)
    return [{"input": list(one), "output": list(causal_eval.evaluate(sop, list(one)))} for one in drawn]


def write(program: Program) -> str:
    """Compile one program, check it, write both of its files; returns a line about it."""
    sop = program.build()
    compiled = compiling.compile_rasp_to_model(
        sop, vocab=set(program.vocabulary), max_seq_len=program.length, compiler_bos=BOS, causal=True
    )
    config, labels = compiled.model_config, list(compiled.residual_labels)
    vocabulary = dict(compiled.input_encoder.encoding_map)
    compiled.output_labels = output_labels(compiled, sop.label)
    encoding = getattr(compiled.output_encoder, "encoding_map", None)
    words = [str(token) for token in vocabulary]
    outputs: dict[str, int] = {}
    for value in ["value"] if encoding is None else encoding:
        if value in vocabulary:
            outputs[str(value)] = vocabulary[value]
        else:
            outputs[str(value)] = len(words)
            words.append(f"={value}")
    found = arrays(compiled, vocabulary, list(outputs.values()), len(words))
    about = parts(found, labels, config.num_heads, config.key_size, config.num_layers)
    tried = cases(program, sop)
    check(compiled, tried, encoding is None)
    facts = {
        "name": program.name, "does": program.does, "source": program.source, "tracr": version("tracr-pypi"),
        "layers": config.num_layers, "heads": config.num_heads, "head_dim": config.key_size,
        "mlp": config.mlp_hidden_size, "width": len(labels), "positions": program.length + 1,
        "numerical": encoding is None, "residual": labels, "vocabulary": words, "outputs": outputs,
        "parts": about, "unembedding": compiled.output_labels, "cases": tried,
    }  # fmt: skip
    save_file(found, HERE / f"{program.name}.safetensors")
    (HERE / f"{program.name}.json").write_text(dumped(facts), encoding="utf-8")
    return f"{program.name}: {sum(a.size for a in found.values())} numbers, {list(about)}"


def check(compiled: Any, tried: list[dict[str, Any]], numerical: bool) -> None:
    """tracr's compiled model gives the outputs of its own evaluation, where they are defined."""
    for case in tried:
        decoded = compiled.apply([BOS, *case["input"]]).decoded[1:]
        for said, meant in zip(decoded, case["output"], strict=True):
            assert meant is None or (abs(said - meant) < 1e-3 if numerical else said == meant), (case, decoded)


def dumped(facts: dict[str, Any]) -> str:
    """JSON with a line a field, and a line a case."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items() if key != "cases"]
    tried = ",\n".join(f"  {json.dumps(case)}" for case in facts["cases"])
    return "{\n" + ",\n".join(lines) + f',\n "cases": [\n{tried}\n ]\n}}\n'


if __name__ == "__main__":
    wanted = set(sys.argv[1:])
    for one in PROGRAMS:
        if not wanted or one.name in wanted:
            print(write(one))
