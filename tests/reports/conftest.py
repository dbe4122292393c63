"""A synthetic run with the shape of a demo on a 30-layer, 9-head model; all numbers are made here from one seed.

It obeys the run schema but belongs to no model. `SyntheticRun` offers what a report reads of a run and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

LAYERS, HEADS = 30, 9
TEXT = (
    "The| harbour| master| wrote| down| the| code| for| the| blue| gate|:| Kest|rel|-|seven|.|\n|Later| that| evening"
    "| a| pilot| asked| for| it|,| and| she| answered|:| Kest|rel|-|seven|."
)
TOKENS = ["<|endoftext|>", *TEXT.split("|")]


@dataclass(frozen=True)
class SyntheticRun:
    """Stands in for a run on disk."""

    manifest: dict[str, Any]
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    datasets: dict[str, xr.Dataset] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return str(self.manifest["title"])

    @property
    def tables(self) -> list[str]:
        return list(self.frames)

    @property
    def arrays(self) -> list[str]:
        return list(self.datasets)

    def table(self, name: str) -> pd.DataFrame:
        return self.frames[name]

    def has_table(self, name: str) -> bool:
        return name in self.frames

    def array(self, name: str) -> xr.Dataset:
        return self.datasets[name]

    def without(self, *names: str) -> SyntheticRun:
        kept = {name: frame for name, frame in self.frames.items() if name not in names}
        arrays = {name: data for name, data in self.datasets.items() if name not in names}
        return replace(self, frames=kept, datasets=arrays)


# detector: title, measures, unit, threshold, paper, url, caption, positions
DETECTORS: dict[str, tuple[str, str, str, float, str, str, str, str]] = {
    "sink": (
        "Attention sink",
        "attention mass on position 0",
        "share of attention",
        0.3,
        "Gu et al. 2024",
        "https://arxiv.org/abs/2410.10781",
        "Mean attention from all queries to position 0 on 100 natural sequences of 64 tokens.",
        "all queries",
    ),
    "previous_token": (
        "Previous token",
        "attention to the token just before the query",
        "share of attention",
        0.4,
        "Olsson et al. 2022",
        "https://arxiv.org/abs/2209.11895",
        "Mean attention at offset -1 on natural text.",
        "all queries but the first",
    ),
    "duplicate_token": (
        "Duplicate token",
        "attention to an earlier copy of the query token",
        "share of attention",
        0.4,
        "Wang et al. 2022",
        "https://arxiv.org/abs/2211.00593",
        "Mean attention to the same token in the first copy, on repeated random tokens.",
        "second copy",
    ),
    "induction": (
        "Induction",
        "attention to the token after an earlier copy",
        "share of attention",
        0.4,
        "Olsson et al. 2022",
        "https://arxiv.org/abs/2209.11895",
        "Mean attention to the token that followed the same token before, on repeated random tokens.",
        "second copy",
    ),
    "retrieval": (
        "Copy-paste retrieval",
        "how often the top key is the needle token being copied",
        "share of needle tokens",
        0.1,
        "Wu et al. 2024",
        "https://arxiv.org/abs/2404.15574",
        "Share of needle tokens that the head attends to most while the model copies them, needle grid of 6 x 5.",
        "queries before answer tokens",
    ),
    "entropy": (
        "Entropy",
        "spread of attention over keys",
        "nats",
        float("nan"),
        "Clark et al. 2019",
        "https://arxiv.org/abs/1906.04341",
        "Mean entropy of attention rows on natural text of 512 tokens.",
        "all queries",
    ),
    "active_dormant": (
        "Active-dormant contrast",
        "difference of first-token mass between prose and code",
        "share of attention",
        float("nan"),
        "Guo et al. 2024",
        "https://arxiv.org/abs/2410.13835",
        "First-token mass on prose minus first-token mass on code.",
        "all queries",
    ),
}


def _grids(rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    depth = np.linspace(0, 1, LAYERS)[:, None]
    shape = (LAYERS, HEADS)
    sink = np.clip(0.12 + 0.9 * depth**0.5 * rng.beta(6, 2.2, shape), 0.01, 0.985)
    sink[:2] *= 0.15
    rest = 1 - sink
    few = rng.beta(0.35, 9, (4, *shape))
    grids = {
        "sink": sink,
        "previous_token": np.clip(few[0] * rest + 0.03, 0, 1),
        "duplicate_token": few[1] * 0.6,
        "induction": few[2] * (depth > 0.2),
        "retrieval": few[3] * 0.4 * (depth > 0.25),
        "entropy": 0.3 + 4.8 * rest * rng.beta(5, 3, shape),
        "active_dormant": rng.normal(0, 0.05, shape),
    }
    for name, layer, head, value in (
        ("previous_token", 3, 5, 0.94),
        ("previous_token", 1, 2, 0.71),
        ("induction", 18, 6, 0.91),
        ("induction", 20, 1, 0.78),
        ("induction", 11, 4, 0.62),
        ("induction", 22, 8, 0.47),
        ("retrieval", 18, 6, 0.63),
        ("retrieval", 21, 0, 0.41),
        ("retrieval", 24, 3, 0.22),
        ("duplicate_token", 2, 7, 0.66),
        ("active_dormant", 16, 4, 0.52),
        ("active_dormant", 9, 1, -0.28),
    ):
        grids[name][layer, head] = value
        if name in ("previous_token", "induction"):
            grids["sink"][layer, head] = min(grids["sink"][layer, head], 0.95 - value)
    return grids


def _scores(rng: np.random.Generator, grids: dict[str, np.ndarray[Any, Any]]) -> pd.DataFrame:
    rows = []
    for name, grid in grids.items():
        null = 1.4 if name == "entropy" else 0.0 if name == "active_dormant" else 0.031
        for layer in range(LAYERS):
            for head in range(HEADS):
                value = float(grid[layer, head])
                half = 0.012 + 0.05 * abs(value) * float(rng.random())
                strength = abs(value - null)
                p = float(np.clip(np.exp(-strength * 60) * rng.random(), 0.0005, 1))
                rows.append(
                    (
                        "synthetic/30x9",
                        name,
                        layer,
                        head,
                        value,
                        value - half,
                        value + half,
                        100,
                        null,
                        p,
                        0.0,
                    )
                )
    columns = "model detector layer head value low high n null p q".split()
    frame = pd.DataFrame(rows, columns=columns)
    order = frame["p"].rank(method="first")
    return frame.assign(q=(frame["p"] * len(frame) / order).clip(upper=1.0))


def _verification(rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    # detector, k, heads, metric, unit, better, baseline, effect, half width, control mean, spread, p, q
    cases = [
        ("induction", 1, "L18H6", "loss on the second copy", "nats", "lower", 1.21, 0.11, 0.06, 0.02, 0.09, 0.09, 0.12),
        ("induction", 4, "L18H6 L20H1 L11H4 L22H8", "loss on the second copy", "nats", "lower", 1.21, 1.37, 0.16, 0.05, 0.06, 0.001, 0.004),
        ("retrieval", 4, "L18H6 L21H0 L24H3 L11H4", "needle recall", "share", "higher", 0.84, -0.51, 0.08, -0.03, 0.04, 0.001, 0.004),
        ("previous_token", 2, "L3H5 L1H2", "loss on the second copy", "nats", "lower", 1.21, 0.64, 0.11, 0.04, 0.07, 0.002, 0.005),
        ("duplicate_token", 4, "L2H7 L5H1 L6H3 L9H2", "needle recall", "share", "higher", 0.84, -0.02, 0.05, -0.03, 0.04, 0.62, 0.62),
        ("sink", 8, "L14H2 L15H1 L17H7 L19H3 L21H5 L22H4 L23H1 L25H6", "held-out loss", "nats", "lower", 3.02, 0.018, 0.012, 0.03, 0.02, 0.7, 0.7),
    ]  # fmt: skip
    rows, draws = [], []
    for detector, k, heads, metric, unit, better, base, effect, half, mean, spread, p, q in cases:
        drawn = rng.normal(mean, spread, 20)
        low, high = np.quantile(drawn, [0.025, 0.975])
        rows.append(
            (detector, k, heads, "mean", metric, unit, better, base, base + effect, effect, effect - half)
            + (effect + half, float(drawn.mean()), float(low), float(high), 20, p, q, 64)
        )
        for index, value in enumerate(drawn):
            named = " ".join(f"L{rng.integers(LAYERS)}H{rng.integers(HEADS)}" for _ in range(k))
            draws.append((detector, k, metric, index, named, base + float(value), float(value)))
    columns = (
        "detector k heads how metric unit better baseline ablated effect low high "
        "control_effect control_low control_high draws p q n"
    )
    return pd.DataFrame(rows, columns=columns.split()), pd.DataFrame(
        draws, columns="detector k metric draw heads value effect".split()
    )


def _curves(rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    positions = np.unique(np.geomspace(1, 511, 80).astype(int))
    for detector, layer, head, statistic, level in (
        ("sink", 14, 2, "first_1", 0.96),
        ("previous_token", 3, 5, "offset_-1", 0.94),
        ("previous_token", 3, 5, "first_1", 0.02),
        ("induction", 18, 6, "induction mass", 0.91),
        ("induction", 18, 6, "first_1", 0.05),
        ("induction", 20, 1, "induction mass", 0.78),
        ("induction", 11, 4, "induction mass", 0.62),
        ("retrieval", 21, 0, "needle mass", 0.41),
        ("entropy", 0, 3, "entropy", 4.2),
        ("active_dormant", 16, 4, "first_1", 0.6),
    ):
        shape = level * (1 - np.exp(-positions / 20)) if statistic != "first_1" else level * positions**-0.05
        noisy = np.clip(shape + rng.normal(0, 0.015 * level, positions.size), 0, None)
        top = 1.0 if statistic != "entropy" else np.inf
        rows += [
            (detector, layer, head, statistic, int(p), float(min(v, top)))
            for p, v in zip(positions, noisy, strict=True)
        ]
    return pd.DataFrame(rows, columns="detector layer head statistic position value".split())


def _contrast(rng: np.random.Generator, grids: dict[str, np.ndarray[Any, Any]]) -> pd.DataFrame:
    rows = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            middle, gap = grids["sink"][layer, head], grids["active_dormant"][layer, head]
            for domain, sign in (("prose", 0.5), ("code", -0.5)):
                value = float(np.clip(middle + sign * gap, 0.005, 0.99))
                half = 0.01 + 0.02 * float(rng.random())
                rows.append((layer, head, domain, value, value - half, value + half, 48))
    return pd.DataFrame(rows, columns="layer head domain value low high n".split())


def _patterns(rng: np.random.Generator, tokens: list[str]) -> xr.Dataset:
    size = len(tokens)
    heads = [(14, 2), (3, 5), (18, 6), (20, 1), (21, 0)]
    patterns = np.zeros((len(heads), size, size), dtype=np.float32)
    for index, (layer, head) in enumerate(heads):
        logits = rng.normal(0, 0.8, (size, size))
        logits[:, 0] += 5.5 if layer == 14 else 2.5
        for query in range(size):
            if layer == 3 and query:
                logits[query, query - 1] += 6
            earlier = [j + 1 for j in range(query) if tokens[j] == tokens[query] and j + 1 < query]
            if layer in (18, 20, 21):
                logits[query, earlier[-1:]] += 6
        logits[np.triu_indices(size, 1)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        patterns[index] = weights / weights.sum(-1, keepdims=True)
    return xr.Dataset(
        {"pattern": (("example_head", "query", "key"), patterns)},
        coords={
            "example": ("example_head", ["needle"] * len(heads)),
            "layer": ("example_head", [layer for layer, _ in heads]),
            "head": ("example_head", [head for _, head in heads]),
        },
    )


def _manifest() -> dict[str, Any]:
    checks = [
        ("logits equal the untouched model", 0.0, 1e-4, True, "largest difference over 4 prompts"),
        ("attention output rebuilt from q, k, v", 2.4e-6, 1e-4, True, "worst layer: 17"),
        ("rows sum to one", 3.6e-7, 1e-5, True, "largest deviation over all rows"),
        ("left and right padding change nothing", 8.1e-6, 1e-4, True, "real tokens only"),
        ("an edit changes the logits", 3.87, 0.001, True, "has to be larger than the tolerance"),
    ]
    return {
        "format": 1,
        "id": "demo-7f3a91c2",
        "kind": "demo",
        "title": "Attention heads of Synthetic-135M",
        "created": "2025-01-15T09:30:12+00:00",
        "finished": "2025-01-15T09:33:08+00:00",
        "command": "workbench demo",
        "model": {
            "name": "synthetic/30x9",
            "architecture": "LlamaForCausalLM",
            "revision": None,
            "weights_sha256": "9c1f5a0e7b44d2c86f13aa90be52c7d1e8604f2b7a935dc01e2f48a6b7c3d590",
            "dtype": "float32",
            "device": "cpu",
            "layers": LAYERS,
            "heads": HEADS,
            "kv_heads": 3,
            "head_dim": 64,
            "d_model": 576,
            "vocab_size": 49152,
            "parameters": 134515008,
            "special_tokens": "none added",
        },
        "certificate": {
            "passed": True,
            "checks": [
                dict(zip(("name", "measured", "tolerance", "passed", "detail"), check, strict=True))
                for check in checks
            ],
        },
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "workbench": "0.1.0",
            "platform": "Linux x86_64",
            "threads": 2,
        },
        "settings": {"seed": 0, "bootstrap": 2000, "draws": 20},
        "prompts": [
            {"name": "natural text", "n": 100, "tokens": 6400, "sha256": "51b0c4" + "0" * 58},
            {"name": "repeated random tokens", "n": 32, "tokens": 8224, "sha256": "ee1290" + "0" * 58},
            {"name": "needle grid", "n": 30, "tokens": 15360, "sha256": "0a77f2" + "0" * 58},
        ],
        "seconds": {"load and certify": 9.2, "capture": 61.0, "score": 4.1, "verify": 98.6, "examples": 1.3},
        "tables": {},
        "arrays": {},
    }


def make_run(tokens: list[str] | None = None, seed: int = 0) -> SyntheticRun:
    """The whole synthetic demo; `tokens` replaces the texts of the example prompt."""
    rng = np.random.default_rng(seed)
    grids = _grids(rng)
    tokens = tokens or TOKENS
    verification, draws = _verification(rng)
    columns = "title measures unit threshold paper url caption positions".split()
    detectors = pd.DataFrame(
        [(name, *row) for name, row in DETECTORS.items()], columns=["detector", *columns]
    )
    examples = [("needle", i, i, text) for i, text in enumerate(tokens)]
    info = [
        ("needle", "A code word, asked for later", "The last tokens copy the code word from the first line.")
    ]
    return SyntheticRun(
        manifest=_manifest(),
        frames={
            "head_scores": _scores(rng, grids),
            "detectors": detectors,
            "verification": verification,
            "verification_draws": draws,
            "position_curves": _curves(rng),
            "domain_contrast": _contrast(rng, grids),
            "example_tokens": pd.DataFrame(examples, columns=["example", "position", "token_id", "text"]),
            "example_info": pd.DataFrame(info, columns=["example", "title", "caption"]),
        },
        datasets={"patterns": _patterns(rng, tokens)},
    )


@pytest.fixture(scope="session")
def demo() -> SyntheticRun:
    return make_run()


@pytest.fixture(scope="session")
def run_with_tokens() -> Callable[[list[str]], SyntheticRun]:
    return make_run
