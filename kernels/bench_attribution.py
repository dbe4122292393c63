"""What attribution of every edge of SmolLM2-135M takes on indirect objects, on this machine.

For each method: seconds by the clock and by processor time (another process on the same cores makes the first longer,
and through shared caches the second as well), the process's peak memory with the loaded model, the passes of single
prompts, how many an exact score of every edge would take, and how many times less work that is (a backward pass of
activations with all readers' ways back counted as two forward passes). Beside it, the cost in plain forward passes of
the same prompts, measured in the same process.

Run by hand:  OMP_NUM_THREADS=2 python kernels/bench_attribution.py --pairs 20 --methods eap-ig
Appends one row a method to kernels/results/attribution.csv with --record.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from record import append

import workbench
from workbench.circuits import attribute
from workbench.tasks.ioi import ioi
from workbench.tasks.pairs import PairTask

RESULTS = Path(__file__).parent / "results" / "attribution.csv"
# A backward pass, the readers' ways back included, in forward passes.
BACKWARD = 2


def high_water() -> int:
    """Peak resident bytes of this process."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def timed(work: Callable[[], object]) -> tuple[object, float, float]:
    """What `work` returns, seconds by the clock, seconds of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - clock, time.process_time() - processor


def plain(model: workbench.Model, task: PairTask) -> float:
    """Processor seconds of one forward pass of every clean prompt, the second time."""
    for _ in range(2):
        _, _, processor = timed(lambda: model.trace(task.clean, logits="last"))
    return processor


def case(model: workbench.Model, task: PairTask, method: str, steps: int, forward: float) -> dict[str, object]:
    """One method on all pairs."""
    found, clock, processor = timed(lambda: attribute(model, task, method, steps=steps))
    forwards, backwards, exact = (found.work[name] for name in ("forwards", "backwards", "exact"))
    spent = forwards + BACKWARD * backwards
    gap = float((found.clean - found.corrupt).mean())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": "smollm2-135m", "method": method,
        "steps": steps, "pairs": len(task), "tokens": int(task.clean.lengths.sum()), "edges": found.graph.count,
        "wall_s": round(clock, 2), "processor_s": round(processor, 2), "peak_gb": round(high_water() / 1e9, 3),
        "forwards": forwards, "backwards": backwards, "exact": exact, "work_saved": round(exact / spent, 1),
        "plain_forward_processor_s": round(forward, 2), "gap": round(gap, 3),
        "completeness": round(float(found.nodes[0]) / gap, 4), "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.machine(),
    }  # fmt: skip


def tell(row: dict[str, object]) -> None:
    """Print a case."""
    print(
        f"{row['method']} ({row['steps']} steps), {row['pairs']} pairs, {row['tokens']} tokens, "
        f"{row['edges']:,} edges\n"
        f"  {row['wall_s']} s by the clock, {row['processor_s']} s of processor time, {row['threads']} threads, load "
        f"average {row['load']}; peak {row['peak_gb']} GB with the model\n"
        f"  {row['forwards']} forward and {row['backwards']} backward passes, exact edges: {row['exact']:,}, "
        f"{row['work_saved']:,} times as much work\n"
        f"  a plain forward pass of all clean prompts: {row['plain_forward_processor_s']} s of processor time\n"
        f"  edges from the embeddings add up to {row['completeness']} of the gap {row['gap']}",
        flush=True,
    )


def main() -> None:
    """Every method that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=["eap-ig"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--templates", type=int, nargs="+", help="IOI templates (default: all)")
    parser.add_argument("--record", action="store_true", help="append rows to the recorded results")
    given = parser.parse_args()
    model = workbench.load("smollm2-135m")
    chosen = {} if given.templates is None else {"templates": given.templates}
    task = ioi(model.tokenizer, given.pairs, **chosen)
    forward = plain(model, task)
    for method in given.methods:
        row = case(model, task, method, given.steps, forward)
        tell(row)
        if given.record:
            append(RESULTS, [row])


if __name__ == "__main__":
    main()
