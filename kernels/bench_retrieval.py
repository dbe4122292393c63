"""What finding retrieval heads costs: our decoding of a whole grid of needles, against the published loop.

The trials are those of the published grid's shape: for each needle lengths x depths (20 x 10), the haystack of a needle
cut to each length. Both ways run in one process:

* `published`: for each trial prefill with SDPA of all prompt tokens but the last, then token-by-token decoding with
  eager attention and `output_attentions`, and at each step the heaviest key of each head in a Python loop; at most 50
  tokens, to the end token or a line break (`tests/heads/published_retrieval.py`).
* `ours`: `written_answers` with the heaviest key as the only statistic on all trials together, then the scores: a
  beginning that prompts share is run once, and answers are written side by side.

Timed is everything from token ids to scores of each trial; building prompts and loading the model are not. The grid is
long for the loop (a trial takes seconds), so it runs every `--every`-th trial, and its time for the grid is that times
`--every`; 1 runs all. On every trial that both run they write the same tokens and give the same scores, by the paper's
count (each key once) and the code's (every hit): the run stops if not.

Printed beside seconds and ratio: tokens of all prompts over those of their tree (what sharing beginnings can save at
most), the seconds of the process on its processors (which count on a machine that does other things too; with one
thread), and the peak of memory beyond the loaded model.

Run by hand:  python kernels/bench_retrieval.py --needles 1 --every 11
Appends one row a way to kernels/results/retrieval.csv.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import resource
import statistics as quantiles
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from record import append

import workbench
from workbench import statistics as s
from workbench.heads.answers import prompts_of, written_answers
from workbench.heads.detector import Part
from workbench.heads.detectors.needle import accepted_trials
from workbench.models.attach import KEY
from workbench.tasks import PUBLISHED_NEEDLES, Task, accepted, needle_grid

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "retrieval.csv"
NEW_TOKENS = 50


def published_module():
    """The loop, as the tests hold ours against it."""
    path = HERE.parent / "tests" / "heads" / "published_retrieval.py"
    spec = importlib.util.spec_from_file_location("published_retrieval", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ours(model, task: Task, stops: set[int]):
    """Every trial of the task; scores of the accepted ones by either count."""
    found = written_answers(model, task, [s.argmax()], NEW_TOKENS, stop_ids=sorted(stops))
    trials = accepted_trials(Part(task, found))
    return found, {index: (one.copied(one.hits()), one.counted(one.hits())) for index, one in trials}


def published(model, task: Task, stops: set[int], chosen: Iterable[int]):
    """What the loop found in each of some trials, and what each took."""
    loop, hf = published_module().published_loop, model.attachment.hf_model
    prompts, spans = prompts_of(task.decoding), task.spans["answer_in_needle"].tolist()
    found, clocks = {}, []
    try:
        for index in chosen:
            clock = Clock()
            one = loop(hf, prompts[index], tuple(spans[index]), NEW_TOKENS, stops)
            text = model.tokenizer.decode([token for token in one.written if token not in stops])
            found[index] = (one, bool(accepted([text], [task.answers[index]])[0]))
            clocks.append(clock.stop())
    finally:
        hf.set_attn_implementation(KEY)
    return found, clocks


@dataclass
class Clock:
    """Seconds on the wall and on the processors."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def stop(self) -> Clock:
        """The seconds since."""
        return Clock(time.perf_counter() - self.wall, time.process_time() - self.cpu)


def check(task: Task, theirs, found, scores) -> None:
    """The same tokens, the same trials accepted, the same scores."""
    for index, (one, right) in theirs.items():
        assert found.ids[index][found.ids[index] >= 0].tolist() == one.written, f"trial {index}: other tokens"
        assert right == (index in scores), f"trial {index}: accepted by one way alone"
        if right:
            first, last = task.spans["answer_in_needle"][index].tolist()
            np.testing.assert_allclose(scores[index][0], one.shares(last - first), atol=1e-6)
            np.testing.assert_allclose(scores[index][1], one.counter, atol=1e-6)


def tree_tokens(prompts: list[list[int]]) -> int:
    """Tokens that any two prompts share from their beginning counted once."""
    count, last = 0, []
    for prompt in sorted(prompts):
        same = next((at for at, (a, b) in enumerate(zip(prompt, last, strict=False)) if a != b), None)
        count += len(prompt) - (min(len(prompt), len(last)) if same is None else same)
        last = prompt
    return count


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Quartiles."""
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    low, median, high = quantiles.quantiles(seconds, n=4, method="inclusive")
    return low, median, high


def peak_mib() -> float:
    """Of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Ours on the grid, the loop on its share of it, and the two compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--needles", type=int, default=3, help="of the three published ones")
    parser.add_argument("--shortest", type=int, default=256)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--lengths", type=int, default=20)
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--every", type=int, default=11, help="the loop runs every so-manieth trial")
    parser.add_argument("--least", type=int, default=10, help="trials of the grid that have to be accepted")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    model = workbench.load(arguments.model)
    stops = {model.tokenizer.eos_token_id, *model.tokenizer("\n", add_special_tokens=False)["input_ids"]}
    lengths = np.round(np.linspace(arguments.shortest, arguments.longest, arguments.lengths)).astype(int).tolist()
    task = needle_grid(model.tokenizer, lengths, arguments.depths, 0, PUBLISHED_NEEDLES[: arguments.needles])
    written_answers(model, needle_grid(model.tokenizer, (256,), 1, 0, PUBLISHED_NEEDLES[:1]), [s.argmax()], 4)
    before, clock = peak_mib(), Clock()
    found, scores = ours(model, task, stops)
    took, memory = clock.stop(), peak_mib() - before
    print(f"ours: {took.wall:.1f} s, {took.cpu:.1f} s of processors, {len(scores)} accepted", flush=True)
    theirs, clocks = published(model, task, stops, range(0, len(task), arguments.every))
    check(task, theirs, found, scores)
    assert len(scores) >= arguments.least, f"only {len(scores)} trials accepted"
    prompts = prompts_of(task.decoding)
    tokens, tree = sum(map(len, prompts)), tree_tokens(prompts)
    share = len(task) / len(clocks)
    loop = Clock(sum(one.wall for one in clocks) * share, sum(one.cpu for one in clocks) * share)
    print(
        f"{arguments.model}, float32, {torch.get_num_threads()} threads, {os.cpu_count()} CPUs, {platform.platform()}, "
        f"load {load:.1f} at the start"
    )
    print(
        f"{len(task)} trials of {min(lengths)} to {max(lengths)} tokens, {len(scores)} accepted; {tokens} tokens, "
        f"{tree} in the tree of prompts ({tokens / tree:.2f} to 1)"
    )
    low, median, high = spread([one.cpu for one in clocks])
    right = sum(right for _, right in theirs.values())
    print(
        f"published  {loop.wall:8.1f} s, {loop.cpu:8.1f} of processors, by {len(clocks)} trials ({right} accepted); "
        f"a trial {median:.2f} [{low:.2f}, {high:.2f}]"
    )
    print(f"ours       {took.wall:8.1f} s, {took.cpu:8.1f} of processors, {memory:.0f} MiB")
    print(f"ratio      {loop.wall / took.wall:8.2f}, {loop.cpu / took.cpu:8.2f} of processors; tokens, scores the same")
    shared = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": arguments.model,
        "grid": f"{arguments.needles} x {arguments.lengths} x {arguments.depths}", "trials": len(task),
        "accepted": len(scores), "compared": len(clocks), "longest": max(lengths), "tokens": tokens, "tree": tree,
        "dtype": "float32", "torch": torch.__version__, "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(), "load": round(load, 2),
    }  # fmt: skip
    rows = [
        {"way": way, "seconds": round(clock.wall, 2), "cpu_seconds": round(clock.cpu, 2),
         "ratio": round(loop.wall / clock.wall, 3), "cpu_ratio": round(loop.cpu / clock.cpu, 3), "peak_mib": peak}
        for way, clock, peak in (("published", loop, ""), ("ours", took, round(memory)))
    ]  # fmt: skip
    append(RESULTS, [shared | row for row in rows])


if __name__ == "__main__":
    main()
