"""What it costs to capture attention statistics of every head of a real model, on this machine.

Four ways through the same tokens, in one run, each in a process of its own (peak memory is the process's):

* `plain`: the model's forward pass with stock SDPA, nothing captured.
* `statistics`: `Model.trace` with every row and column statistic of the first slice.
* `eager`: `output_attentions=True` with eager attention: the full matrices, and nothing computed from them.
* `eager_statistics`: the same, and the same statistics read off the matrices, layer by layer.

Run by hand:  python kernels/bench_capture.py --tokens 512 2048 4096 --repeats 5
Prints medians with quartiles, ratios to `plain`, and peak memory beyond the loaded model; appends one row a case to
kernels/results/capture.csv.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics as quantiles
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from record import append

WAYS = ("plain", "statistics", "eager", "eager_statistics")
RESULTS = Path(__file__).parent / "results" / "capture.csv"


def high_water() -> int:
    """Peak resident bytes since the last `reset`."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_high_water() -> int:
    """Give freed memory back, forget the peak so far; returns what is resident now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return high_water()


def all_statistics():
    """Every row and column statistic of the first slice."""
    from workbench import statistics as s

    return [
        s.lse(), s.entropy(), s.max_prob(), s.argmax(), s.top_k(4), s.first(1), s.first(4), s.recent(16),
        s.offset(-1), s.distance(), s.column_sum(), s.column_mean(), s.column_last(64), s.column_max(),
        s.value_norm(), s.output_norm(), s.result_norm(),
    ]  # fmt: skip


def naive_statistics(a):
    """The same, read off one layer's full pattern [1, head, query, key]."""
    import torch

    n = a.shape[-1]
    i = torch.arange(n)
    return [
        torch.special.entr(a).sum(-1), *a.max(-1), *a.topk(4, -1), a[..., 0], a[..., :4].sum(-1),
        torch.stack([a[..., r, max(0, r - 15) : r + 1].sum(-1) for r in range(n)], -1),
        a.diagonal(-1, -2, -1), (a * (i[:, None] - i)).sum(-1), a.sum(-2), a[..., -64:, :].sum(-2), a.amax(-2),
    ]  # fmt: skip


def child(way: str, model_name: str, tokens: int, repeats: int) -> dict:
    """One case in this process: seconds of each repeat, peak memory beyond the loaded and warmed-up model."""
    import torch

    import workbench

    model = workbench.load(model_name)
    hf = model.attachment.hf_model
    ids = torch.randint(0, model.spec.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    if way != "statistics":
        model.detach()
        hf.set_attn_implementation("eager" if way.startswith("eager") else "sdpa")

    def run(ids):
        if way == "statistics":
            return model.trace(workbench.Batch.from_ids(ids.tolist()), statistics=all_statistics())
        with torch.no_grad():
            found = hf(ids, use_cache=False, logits_to_keep=1, output_attentions=way.startswith("eager"))
            return found if way != "eager_statistics" else [naive_statistics(a) for a in found.attentions]

    run(ids[:, :64])
    seconds, peaks = [], []
    for _ in range(repeats):
        before = reset_high_water()
        began = time.perf_counter()
        kept = run(ids)
        seconds.append(time.perf_counter() - began)
        peaks.append(high_water() - before)
        del kept
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"seconds": seconds, "peak_bytes": max(peaks)} | facts


def fits(way: str, tokens: int, layers: int = 30, heads: int = 9) -> str | None:
    """Why a case cannot run here: the matrices of all layers are held at once under `output_attentions`."""
    if not way.startswith("eager"):
        return None
    need = (layers + 2) * heads * tokens**2 * 4 + 2 * 1024**3
    with open("/proc/meminfo", encoding="ascii") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return None if need < free else f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def measure(way: str, arguments: argparse.Namespace, tokens: int) -> dict | None:
    """Run one case in a child process and describe it."""
    reason = fits(way, tokens)
    if reason:
        print(f"{tokens:>7} {way:<17} not run: {reason}", flush=True)
        return None
    repeats = arguments.repeats if not way.startswith("eager") else min(arguments.repeats, arguments.eager_repeats)
    command = [sys.executable, __file__, "--child", way, "--model", arguments.model, "--tokens", str(tokens),
               "--repeats", str(repeats)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed (out of memory?)"])[-1]
        print(f"{tokens:>7} {way:<17} failed with {done.returncode}: {last[:80]}", flush=True)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(way: str, tokens: int, found: dict, plain: float | None, model: str) -> dict:
    """Print a case and return its row."""
    low, median, high = spread(found["seconds"])
    ratio = median / plain if plain else 1.0
    per_token = found["peak_bytes"] / tokens
    print(
        f"{tokens:>7} {way:<17} {median:8.2f} s [{low:.2f}, {high:.2f}]  {ratio:6.2f} x plain   "
        f"peak {found['peak_bytes'] / 2**20:9.1f} MiB  {per_token / 1024:7.1f} KiB per token",
        flush=True,
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": model, "tokens": tokens, "way": way,
        "median_s": round(median, 4), "q25_s": round(low, 4), "q75_s": round(high, 4), "repeats": len(found["seconds"]),
        "ratio_to_plain": round(ratio, 3), "peak_mib": round(found["peak_bytes"] / 2**20, 1), "dtype": "float32",
        "torch": found["torch"], "threads": found["threads"], "cpu": platform.processor() or platform.machine(),
    }  # fmt: skip


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Quartiles."""
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    low, median, high = quantiles.quantiles(seconds, n=4, method="inclusive")
    return low, median, high


def main() -> None:
    """Run every case and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager-repeats", type=int, default=2)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.model, arguments.tokens[0], arguments.repeats)))
        return
    print(f"{arguments.model}, float32, {platform.platform()}, {os.cpu_count()} CPUs; median [quartiles]")
    rows = []
    for tokens in arguments.tokens:
        plain = None
        for way in WAYS:
            found = measure(way, arguments, tokens)
            if found is None:
                continue
            row = report(way, tokens, found, plain, arguments.model)
            plain = row["median_s"] if way == "plain" else plain
            rows.append(row)
    append(RESULTS, rows)


if __name__ == "__main__":
    main()
