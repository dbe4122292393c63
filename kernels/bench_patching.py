"""What it costs to patch z of every head at every position of SmolLM2-135M on indirect objects, on this machine.

Ways through the same pairs and the same weights, in one run, each timed by the clock and by processor time:

* `transformer_lens`: `get_act_patch_attn_head_out_by_pos` through its bridge, one forward pass a patch. Its cost does
  not depend on the place, so that `--sample` times that many places drawn at random, and multiplies; 0 runs all.
* `workbench`: `patch_activations(model, task, "z", "head_position")`.
* `workbench_all`: the same without leaving out places where both runs are known to be equal.

Values of all places that both ran are compared (1e-4). Printed beside the ratios: the operations that either way takes
(tokens through a layer), counted, so that the ratio can be told from what the machine adds.

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
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def timed(work: Callable[[], object]) -> tuple[object, float, float]:
    """What `work` returns, seconds by the clock, seconds of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - clock, time.process_time() - processor


def places(shape: tuple[int, int, int], sample: int) -> pd.DataFrame:
    """All places, or a random sample of them."""
    every = pd.MultiIndex.from_product([range(n) for n in shape], names=["layer", "pos", "head"]).to_frame(index=False)
    return every if sample == 0 or sample >= len(every) else every.sample(sample, random_state=0).reset_index(drop=True)


def ours(model: workbench.Model, task: PairTask, skip: bool) -> Effects:
    """z of all heads at all positions, clean into corrupt."""
    return patch_activations(
        model, task, "z", "head_position", direction="denoising", options=Options(skip_unchanged=skip)
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


def case(model: workbench.Model, bridge, task: PairTask, sample: int, repeats: int) -> list[dict[str, object]]:
    """All ways in turn, so often; then ratios."""
    tokens = task.clean.ids.shape[1]
    shape = (model.spec.n_layers, tokens, model.spec.layers[0].heads)
    index = places(shape, sample)
    everything, factor = len(index) == int(np.prod(shape)), int(np.prod(shape)) / len(index)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(task.clean.ids, names_filter=lambda name: name.endswith("hook_z"))
    seconds: dict[str, list[tuple[float, float]]] = {"transformer_lens": [], "workbench": [], "workbench_all": []}
    work, error = {}, 0.0
    for _ in range(repeats):
        effects = {}
        for way, skip in (("workbench", True), ("workbench_all", False)):
            effects[way], *spent = timed(lambda skip=skip: ours(model, task, skip))
            seconds[way].append(tuple(spent))
            work[way] = effects[way].work
        with torch.no_grad():
            found, *spent = timed(lambda: theirs(bridge, task, cache, index, everything))
        seconds["transformer_lens"].append(tuple(one * factor for one in spent))
        for one in effects.values():
            grid = one.grid("denoising", ("layer", "position", "head")) + one.corrupt.mean()
            mine = torch.as_tensor(grid)[index["layer"].values, index["pos"].values, index["head"].values]
            error = max(error, float((mine - found.double()).abs().max()))
    naive = len(task) * tokens * model.spec.n_layers * int(np.prod(shape))
    rows = []
    for way, spent in seconds.items():
        for number, clock in enumerate(("wall", "processor")):
            times = sorted(one[number] for one in spent)
            ratios = sorted(a[number] / b[number] for a, b in zip(seconds["transformer_lens"], spent, strict=True))
            low, middle, high = quartiles(times)
            ratio_low, ratio, ratio_high = quartiles(ratios)
            layer_tokens = work[way].rows if way in work else naive
            rows.append({
                "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": "smollm2-135m", "pairs": len(task),
                "tokens": tokens, "patches": int(np.prod(shape)), "way": way, "clock": clock,
                "median_s": round(middle, 3), "q25_s": round(low, 3), "q75_s": round(high, 3), "ratio": round(ratio, 2),
                "ratio_q25": round(ratio_low, 2), "ratio_q75": round(ratio_high, 2), "layer_tokens": layer_tokens,
                "work_saved": round(naive / layer_tokens, 2), "largest_error": f"{error:.1e}", "repeats": len(spent),
                "sampled": 0 if everything else len(index), "task": task.caption, "torch": torch.__version__,
                "threads": torch.get_num_threads(), "cpu": platform.machine(),
            })  # fmt: skip
    return rows


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main() -> None:
    """Every case that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--sample", type=int, default=60, help="places that TransformerLens runs; 0: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--template", type=int, default=0)
    parser.add_argument("--corruption", default="s2_io")
    parser.add_argument("--record", action="store_true", help="append rows to the recorded results")
    given = parser.parse_args()
    model = workbench.load("smollm2-135m")
    # A model of its own for the bridge, from the same weights: attaching changes how attention is computed.
    other = workbench.load("smollm2-135m")
    other.detach()
    bridge = boot(MODEL, hf_model=other.attachment.hf_model, tokenizer=other.tokenizer, device="cpu")
    for pairs in given.pairs:
        task = ioi(model.tokenizer, pairs, order="ABBA", corruption=given.corruption, templates=[given.template])
        rows = case(model, bridge, task, given.sample, given.repeats)
        for row in rows:
            print(
                f"{row['pairs']:>3} pairs  {row['way']:<17}{row['clock']:<10} {row['median_s']:>9.2f} s "
                f"[{row['q25_s']:.2f}, {row['q75_s']:.2f}]  TransformerLens takes {row['ratio']:.1f}x "
                f"[{row['ratio_q25']:.1f}, {row['ratio_q75']:.1f}]  work saved {row['work_saved']:.1f}x "
                f"error {row['largest_error']}"
            )
        if given.record:
            append(RESULTS, rows)


if __name__ == "__main__":
    main()
