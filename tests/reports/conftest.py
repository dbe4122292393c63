"""A synthetic run with the shape of a demo on a 30-layer, 9-head model; all numbers are made here.

It obeys the run schema but belongs to no model. `SyntheticRun` offers what a report reads of a run and
nothing more.
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
    "The| harbour| master| wrote| down| the| code| for| the| blue| gate|:| Kest|rel|-|seven|.|\n|Later"
    "| that| evening| a| pilot| asked| for| it|,| and| she| answered|:| Kest|rel|-|seven|."
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


MASS, SHARE = "attention mass", "share"
TEXTS, REPEATS = (
    "100 texts of 64 tokens",
    "10 prompts of 50 random tokens, three times",
)
# detector | title | what it measures | unit | threshold | better | paper | arXiv | positions | prompts
DETECTORS = f"""
sink | Attention sink | share of prompts in which position 0 draws more than 0.3 of attention | {SHARE}\
 | 0.5 | higher | Gu et al. 2025, When attention sink emerges | 2410.10781 | all queries | {TEXTS}
previous_token | Previous token | mean attention to the token just before | {MASS}\
 | 0.4 | higher | Olsson et al. 2022, Induction heads | 2209.11895 | all queries but the first | {REPEATS}
duplicate_token | Duplicate token | mean attention to the earlier copy of the query's token | {MASS}\
 | 0.2 | higher | Wang et al. 2022, Interpretability in the wild | 2211.00593 | second copy | {REPEATS}
induction | Induction | mean attention to the token after the earlier copy | {MASS}\
 | 0.4 | higher | Olsson et al. 2022, Induction heads | 2209.11895 | second copy | {REPEATS}
retrieval | Retrieval (copy-paste) | share of the needle's tokens that were the top key when due | {SHARE}\
 | 0.1 | higher | Wu et al. 2024, Retrieval head | 2404.15574 | answer rows | a grid of 10 needles
retrieval_greedy | Retrieval (greedy) | the same while the model writes by itself | {SHARE}\
 | 0.1 | higher | Wu et al. 2024, Retrieval head | 2404.15574 | decoding steps | no accepted trial
entropy | Entropy | mean entropy of a row of attention | nats\
 | nan | lower | Clark et al. 2019, What does BERT look at? | 1906.04341 | all queries but the first | {TEXTS}
active_dormant | Active-dormant contrast | first-token share on prose less that on code | {MASS}\
 | 0.1 | either | Guo et al. 2024, Active-dormant heads | 2410.13835 | later queries | 50 texts of each
"""


def _detectors() -> pd.DataFrame:
    rows = []
    for line in DETECTORS.strip().splitlines():
        name, title, measures, unit, bar, better, paper, arxiv, where, on = map(str.strip, line.split(" | "))
        caption = f"{measures[0].upper()}{measures[1:]}. Measured on {on}."
        link = f"https://arxiv.org/abs/{arxiv}"
        rows.append((name, title, measures, unit, float(bar), paper, link, caption, where, better))
    columns = "detector title measures unit threshold paper url caption positions better".split()
    return pd.DataFrame(rows, columns=columns)


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
        "retrieval": np.round(few[3] * 0.4 * (depth > 0.25) * 50) / 50,
        "retrieval_greedy": np.full(shape, np.nan),
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
    # a share of prompts: most heads of the deeper layers are sinks on every one
    grids["sink"] = np.round(np.clip((grids["sink"] - 0.25) * 2.2, 0, 1), 2)
    return grids


def _scores(rng: np.random.Generator, grids: dict[str, np.ndarray[Any, Any]]) -> pd.DataFrame:
    rows = []
    for name, grid in grids.items():
        null = 2.9 if name == "entropy" else 0.0 if name == "active_dormant" else 0.031
        for (layer, head), found in np.ndenumerate(grid):
            value = float(found)
            half = 0.012 + 0.05 * abs(value) * float(rng.random())
            p = float(np.clip(np.exp(-abs(value - null) * 60) * rng.random(), 0.0005, 1))
            count = 100 if np.isfinite(value) else 0
            rows.append((name, layer, head, value, value - half, value + half, count, null, p))
    columns = "detector layer head value low high n null p".split()
    frame = pd.DataFrame(rows, columns=columns)
    order = frame["p"].rank(method="first")
    return frame.assign(model="synthetic/30x9", q=(frame["p"] * len(frame) / order).clip(upper=1.0))


# detector, heads, metric, baseline, effect, half width, mean and spread of the controls, p, q
ABLATIONS = (
    ("induction", "L18H6", "induction_loss", 1.21, 0.11, 0.06, 0.02, 0.09, 0.09, 0.12),
    ("induction", "L18H6 L20H1 L11H4 L22H8", "induction_loss", 1.21, 1.37, 0.16, 0.05, 0.06, 0.001, 0.004),
    ("retrieval", "L18H6 L21H0 L24H3 L11H4", "needle_recall", 0.84, -0.51, 0.08, -0.03, 0.04, 0.001, 0.004),
    ("previous_token", "L3H5 L1H2", "induction_loss", 1.21, 0.64, 0.11, 0.04, 0.07, 0.002, 0.005),
    ("duplicate_token", "L2H7 L5H1 L6H3 L9H2", "needle_recall", 0.84, -0.02, 0.05, -0.03, 0.04, 0.62, 0.62),
    ("sink", "L14H2 L15H1 L17H7 L19H3", "held_out_loss", 3.02, 0.018, 0.012, 0.03, 0.02, 0.7, 0.7),
)
METRICS = {
    "induction_loss": ("nats per token", "lower", "Random tokens, twice; 8 prompts of 50."),
    "needle_recall": ("ROUGE-1 recall", "higher", "A fact in a text of 128 tokens, at 3 depths."),
    "held_out_loss": ("nats per token", "lower", "Prose and code, 8 texts of 64 tokens each."),
}


def _verification(rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows, draws = [], []
    for detector, heads, metric, base, effect, half, mean, spread, p, q in ABLATIONS:
        (unit, better, caption), k = METRICS[metric], len(heads.split())
        drawn = rng.normal(mean, spread, 20)
        own = {"detector": detector, "k": k, "heads": heads, "how": "mean", "metric": metric, "unit": unit}
        found = {"baseline": base, "ablated": base + effect, "effect": effect, "low": effect - half}
        control = {"control_effect": drawn.mean(), "control_low": np.quantile(drawn, 0.025)}
        control["control_high"] = np.quantile(drawn, 0.975)
        tests = {"high": effect + half, "draws": 20, "p": p, "q": q, "n": 64, "caption": caption}
        rows.append({**own, "better": better, **found, **control, **tests})
        for index, value in enumerate(drawn):
            named = " ".join(f"L{rng.integers(LAYERS)}H{rng.integers(HEADS)}" for _ in range(k))
            draws.append((detector, k, metric, index, named, base + float(value), float(value)))
    columns = "detector k metric draw heads value effect".split()
    return pd.DataFrame(rows), pd.DataFrame(draws, columns=columns)


def _curves(rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    positions = np.unique(np.geomspace(1, 511, 80).astype(int))
    for detector, layer, head, statistic, level in (
        ("sink", 14, 2, "first_1, prose", 0.96),
        ("previous_token", 3, 5, "offset_-1", 0.94),
        ("previous_token", 3, 5, "first_1", 0.02),
        ("induction", 18, 6, "induction_key", 0.91),
        ("induction", 18, 6, "first_1", 0.05),
        ("induction", 20, 1, "induction_key", 0.78),
        ("induction", 11, 4, "induction_key", 0.62),
        ("retrieval", 21, 0, "needle_key", 0.41),
        ("entropy", 0, 3, "entropy", 4.2),
        ("active_dormant", 16, 4, "first_1, prose", 0.6),
        ("active_dormant", 16, 4, "first_1, code", 0.2),
    ):
        shape = level * (1 - np.exp(-positions / 20)) if "first" not in statistic else level * positions**-0.05
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
    for index, (layer, _) in enumerate(heads):
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
                dict(zip(("name", "measured", "tolerance", "passed", "detail"), check, strict=True)) for check in checks
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
    examples = [("needle", i, i, text) for i, text in enumerate(tokens)]
    info = [("needle", "A code word, asked for later", "The last tokens copy the code word from the first line.")]
    return SyntheticRun(
        manifest=_manifest(),
        frames={
            "head_scores": _scores(rng, grids),
            "detectors": _detectors(),
            "verification": verification,
            "verification_draws": draws,
            "position_curves": _curves(rng),
            "domain_contrast": _contrast(rng, grids),
            "example_tokens": pd.DataFrame(examples, columns=["example", "position", "token_id", "text"]),
            "example_info": pd.DataFrame(info, columns=["example", "title", "caption"]),
        },
        datasets={"patterns": _patterns(rng, tokens)},
    )


ROW_STATISTICS, KEY_STATISTICS = ("entropy", "first_1", "lse"), ("column_mean",)


def make_trace(tokens: list[str] | None = None, heads: int = HEADS) -> SyntheticRun:
    """What `workbench trace` writes: values by position, their means, the tokens; L4H2 rests on the first token."""
    rng = np.random.default_rng(1)
    texts = tokens or TOKENS
    shape = (1, LAYERS, heads, len(texts))
    values = {
        "entropy": np.abs(rng.normal(2, 0.6, shape)),
        "first_1": rng.beta(2, 8, shape),
        "lse": rng.normal(1, 3, shape),
        "column_mean": rng.beta(1, 20, shape),
    }
    values["first_1"][0, 4, 2] = 0.97
    values["first_1"][..., 0] = 1.0
    values["entropy"][..., 0] = 0.0
    dims = {name: ("prompt", "layer", "head", "key" if name in KEY_STATISTICS else "query") for name in values}
    keys = rng.integers(0, len(texts), shape)
    arrays = {name: (dims[name], found.astype(np.float32)) for name, found in values.items()}
    data = xr.Dataset(arrays | {"argmax": (("prompt", "layer", "head", "query"), keys)})
    means = [
        (name, layer, head, float(found[0, layer, head].mean()))
        for name, found in values.items()
        for layer, head in np.ndindex(LAYERS, heads)
    ]
    manifest = _manifest() | {"kind": "trace", "title": "Attention of Synthetic-135M over one text"}
    manifest["model"] = manifest["model"] | {"heads": heads}
    return SyntheticRun(
        manifest=manifest,
        frames={
            "tokens": pd.DataFrame({"position": range(len(texts)), "token_id": range(len(texts)), "text": texts}),
            "statistic_means": pd.DataFrame(means, columns=["statistic", "layer", "head", "mean"]),
        },
        datasets={"statistics": data},
    )


@pytest.fixture(scope="session")
def demo() -> SyntheticRun:
    return make_run()


@pytest.fixture(scope="session")
def traced() -> SyntheticRun:
    return make_trace()


@pytest.fixture(scope="session")
def traced_with() -> Callable[..., SyntheticRun]:
    return make_trace


@pytest.fixture(scope="session")
def by_hand(demo: SyntheticRun) -> SyntheticRun:
    """What `workbench verify --heads L5H3,L18H6` writes."""
    table = demo.table("verification").iloc[[1]].assign(detector="chosen", k=2, heads="L5H3 L18H6")
    draws = demo.table("verification_draws").query("detector == 'induction' and k == 4").assign(detector="chosen", k=2)
    manifest = demo.manifest | {"kind": "verify", "title": "Ablation of L5H3, L18H6 in Synthetic-135M"}
    return SyntheticRun(manifest, {"verification": table, "verification_draws": draws})


@pytest.fixture(scope="session")
def run_with_tokens() -> Callable[[list[str]], SyntheticRun]:
    return make_run
