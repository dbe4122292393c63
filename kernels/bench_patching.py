"""What it costs to patch z of every head at every position of SmolLM2-135M on indirect objects, on this machine.

Ways through the same pairs and the same weights, in one run, each timed by the clock and by processor time:

* `transformer_lens`: `get_act_patch_attn_head_out_by_pos` through its bridge, one forward pass a patch. Its cost does
  not depend on the place, so that `--sample` times that many places drawn at random, and multiplies; 0 runs all.
* `workbench`: `patch_activations(model, task, "z", "head_position")`.
* `workbench_all`: the same without leaving out places where both runs are known to be equal.

On a busy machine `--every 6` has ours patch every sixth layer only, and multiplies by the operations (a patch sends
tokens through its own layer and those after it); `--ways` leaves a way out. Samples are named in what is printed and
recorded. Values of all places that both ran are compared (1e-4). Printed beside the ratios: the operations that either
way takes (tokens through a layer), counted, so that the ratio can be told from what the machine adds.

Run by hand:  python kernels/bench_patching.py --pairs 1 16 --repeats 3
Appends one row a case to kernels/results/patching.csv.
"""

from __future__ import annotations

import argparse
import platform
import statistics as quantiles
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from record import append
from transformer_lens import patching
from transformer_lens.model_bridge.sources.transformers.source import boot

import workbench
from workbench.circuits import Effects, Options, patch_activations
from workbench.tasks.ioi import ioi
from workbench.tasks.pairs import PairTask

RESULTS = Path(__file__).parent / "results" / "patching.csv"
WAYS = ("workbench", "workbench_all")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def timed(work: Callable[[], object]) -> tuple[object, float, float]:
    """What `work` returns, seconds by the clock, seconds of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - clock, time.process_time() - processor


def places(shape: tuple[int, int, int], sample: int, layers: list[int]) -> pd.DataFrame:
    """All places of these layers, or a random sample of them."""
    axes = [layers, range(shape[1]), range(shape[2])]
    every = pd.MultiIndex.from_product(axes, names=["layer", "pos", "head"]).to_frame(index=False)
    return every if sample == 0 or sample >= len(every) else every.sample(sample, random_state=0).reset_index(drop=True)


def ours(model: workbench.Model, task: PairTask, skip: bool, layers: list[int]) -> Effects:
    """z of all heads at all positions of these layers, clean into corrupt."""
    return patch_activations(
        model, task, "z", "head_position", direction="denoising", layers=layers, options=Options(skip_unchanged=skip)
    )


def theirs(bridge, task: PairTask, cache, index: pd.DataFrame, everything: bool) -> torch.Tensor:
    """Mean metric of each place."""

    def metric(logits):
        return task.score(logits).mean()

    if everything:
        found = patching.get_act_patch_attn_head_out_by_pos(bridge, task.corrupt.ids, cache, metric)
        return found.flatten()
    return patching.generic_activation_patch(
        bridge, task.corrupt.ids, cache, metric,
        patch_setter=patching.layer_pos_head_vector_patch_setter, activation_name="z", index_df=index,
    )  # fmt: skip


def case(
    model: workbench.Model, bridge, task: PairTask, sample: int, repeats: int, ways: list[str], every: int
) -> list[dict[str, object]]:
    """All ways in turn, so often; then ratios."""
    tokens, count = task.clean.ids.shape[1], model.spec.n_layers
    shape = (count, tokens, model.spec.layers[0].heads)
    layers = list(range(every // 2, count, every))
    # Layers that a patch goes through, from its own on, in all of them and in these.
    more = sum(count - layer for layer in range(count)) / sum(count - layer for layer in layers)
    index = places(shape, sample, layers)
    everything, factor = len(index) == int(np.prod(shape)), int(np.prod(shape)) / len(index)
    with torch.no_grad():
        bridge(task.corrupt.ids[:1])
        _, cache = bridge.run_with_cache(task.clean.ids, names_filter=lambda name: name.endswith("hook_z"))
    seconds: dict[str, list[tuple[float, float]]] = {"transformer_lens": []} | {way: [] for way in ways}
    work, error = {}, 0.0
    for _ in range(repeats):
        effects = {}
        for way in ways:
            effects[way], *spent = timed(lambda way=way: ours(model, task, way == "workbench", layers))
            seconds[way].append(tuple(one * more for one in spent))
            work[way] = round(effects[way].work.rows * more)
        with torch.no_grad():
            found, *spent = timed(lambda: theirs(bridge, task, cache, index, everything))
        seconds["transformer_lens"].append(tuple(one * factor for one in spent))
        for one in effects.values():
            grid = one.grid("denoising", ("layer", "position", "head")) + one.corrupt.mean()
            mine = torch.from_numpy(grid[tuple(index[axis].to_numpy() for axis in ("layer", "pos", "head"))])
            error = max(error, float((mine - found.double()).abs().max()))
    naive = len(task) * tokens * model.spec.n_layers * int(np.prod(shape))
    rows = []
    for way, spent in seconds.items():
        for number, clock in enumerate(("wall", "processor")):
            times = sorted(one[number] for one in spent)
            ratios = sorted(a[number] / b[number] for a, b in zip(seconds["transformer_lens"], spent, strict=True))
            low, middle, high = quartiles(times)
            ratio_low, ratio, ratio_high = quartiles(ratios)
            layer_tokens = work.get(way, naive)
            rows.append({
                "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": "smollm2-135m", "pairs": len(task),
                "tokens": tokens, "patches": int(np.prod(shape)), "way": way, "clock": clock,
                "median_s": round(middle, 3), "q25_s": round(low, 3), "q75_s": round(high, 3), "ratio": round(ratio, 2),
                "ratio_q25": round(ratio_low, 2), "ratio_q75": round(ratio_high, 2), "layer_tokens": layer_tokens,
                "work_saved": round(naive / layer_tokens, 2), "largest_error": f"{error:.1e}", "repeats": len(spent),
                "sampled": 0 if everything else len(index), "layers_run": len(layers), "task": task.caption,
                "torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.machine(),
            })  # fmt: skip
    return rows


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def tell(rows: list[dict[str, object]]) -> None:
    """Print a case."""
    about = rows[0]
    how = "drawn at random, its time multiplied" if about["sampled"] else "all"
    layers = f"{about['layers_run']} layers, its time multiplied by the layers to go through"
    print(
        f"{about['pairs']} pairs of {about['tokens']} tokens, {about['patches']} places, of which TransformerLens runs "
        f"{about['sampled'] or about['patches']} ({how}), ours those of {layers}; equal to {about['largest_error']}; "
        f"{about['repeats']} rounds of all ways in turn, {about['threads']} threads"
    )
    for row in rows:
        print(
            f"  {row['way']:<17}{row['clock']:<10} {row['median_s']:>9.2f} s [{row['q25_s']:.2f}, {row['q75_s']:.2f}]"
            f"  {row['ratio']:.1f}x [{row['ratio_q25']:.1f}, {row['ratio_q75']:.1f}]  "
            f"{row['layer_tokens']:,} tokens through layers, saved {row['work_saved']:.1f}x",
            flush=True,
        )


def main() -> None:
    """Every case that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 16])
    case_by_case = "one number, or one for each of --pairs"
    for name, default, what in (
        ("--sample", 60, "places that TransformerLens runs; 0: all"),
        ("--repeats", 3, "rounds of all ways in turn"),
        ("--every", 1, "ours patches every so many-th layer; 1: all"),
    ):
        parser.add_argument(name, type=int, nargs="+", default=[default], help=f"{what} ({case_by_case})")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--template", type=int, default=0)
    parser.add_argument("--corruption", default="s2_io")
    parser.add_argument("--record", action="store_true", help="append rows to the recorded results")
    given = parser.parse_args()
    model = workbench.load("smollm2-135m")
    # A model of its own for the bridge, from the same weights: attaching changes how attention is computed.
    other = workbench.load("smollm2-135m")
    other.detach()
    bridge = boot(MODEL, hf_model=other.attachment.hf_model, tokenizer=other.tokenizer, device="cpu")
    options = (given.sample, given.repeats, given.every)
    numbers = [option * len(given.pairs) if len(option) == 1 else option for option in options]
    for pairs, sample, repeats, every in zip(given.pairs, *numbers, strict=True):
        task = ioi(model.tokenizer, pairs, order="ABBA", corruption=given.corruption, templates=[given.template])
        # What runs first pays for what is only made once.
        ours(model, task.select([0]), True, [model.spec.n_layers - 1])
        rows = case(model, bridge, task, sample, repeats, given.ways, every)
        tell(rows)
        if given.record:
            append(RESULTS, rows)


if __name__ == "__main__":
    main()
