"""What finding retrieval heads costs: our decoding with drafts and shared beginnings, against the published loop.

The same trials (a grid of the published needles, our own, lengths and depths) go both ways, in one process, until
enough are accepted (ROUGE-1 recall above one half); those that fail in between cost both ways their time.

* `published`: for each trial prefill with SDPA of all prompt tokens but the last, then token-by-token decoding with
  eager attention and `output_attentions`, and at each step the heaviest key of each head in a Python loop; at most 50
  tokens, to the end token or a line break (`tests/heads/published_retrieval.py`).
* `ours`: `written_answers` with the heaviest key as the only statistic on all these trials together, then the scores:
  a beginning that prompts share is run once, the gold reply is tried as a draft, and answers are read several rows at
  a time.

Timed is everything from token ids to scores of each trial; building prompts and loading the model are not. Both write
the same tokens and give the same scores, by the paper's count (each key once) and the code's (every hit): the run stops
if not.

Run by hand:  python kernels/bench_retrieval.py --accepted 10 --longest 2048
Prints seconds, quartiles of the loop's trials and the ratio; appends one row a way to kernels/results/retrieval.csv.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics as quantiles
import sys
import time
from dataclasses import replace
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
from workbench.tasks import NEEDLES, PUBLISHED_NEEDLES, Task, accepted, needle_grid

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


def published(model, task: Task, stops: set[int], enough: int):
    """Trial after trial until enough are accepted: what each found and took."""
    loop, hf = published_module().published_loop, model.attachment.hf_model
    spans, found, seconds, good = task.spans["answer_in_needle"].tolist(), [], [], 0
    try:
        for index, prompt in enumerate(prompts_of(task.decoding)):
            began = time.perf_counter()
            one = loop(hf, prompt, tuple(spans[index]), NEW_TOKENS, stops)
            text = model.tokenizer.decode([token for token in one.written if token not in stops])
            right = bool(accepted([text], [task.answers[index]])[0])
            seconds.append(time.perf_counter() - began)
            found.append((one, right))
            good += right
            if good == enough:
                break
    finally:
        hf.set_attn_implementation(KEY)
    return found, seconds


def check(task: Task, theirs, found, scores) -> None:
    """The same tokens, the same trials accepted, the same scores."""
    for index, (one, right) in enumerate(theirs):
        assert found.ids[index][found.ids[index] >= 0].tolist() == one.written, f"trial {index}: other tokens"
        assert right == (index in scores), f"trial {index}: accepted by one way alone"
        if right:
            first, last = task.spans["answer_in_needle"][index].tolist()
            np.testing.assert_allclose(scores[index][0], one.shares(last - first), atol=1e-6)
            np.testing.assert_allclose(scores[index][1], one.counter, atol=1e-6)


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Quartiles."""
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    low, median, high = quantiles.quantiles(seconds, n=4, method="inclusive")
    return low, median, high


def select(task: Task, count: int) -> Task:
    """The first trials of a grid."""

    def cut(value: torch.Tensor) -> torch.Tensor:
        return value[:count]

    assert task.decoding is not None and task.answer_keys is not None
    return replace(
        task, batch=task.batch.select(range(count)), decoding=task.decoding.select(range(count)),
        answers=task.answers[:count], answer_ids=cut(task.answer_ids), answer_keys=cut(task.answer_keys),
        answer_positions=cut(task.answer_positions), info=task.info[:count],
        spans={name: cut(span) for name, span in task.spans.items()},
        keys={name: cut(keys) for name, keys in task.keys.items()},
    )  # fmt: skip


def main() -> None:
    """The loop first, to know how many trials are needed; then ours on the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--accepted", type=int, default=10)
    parser.add_argument("--shortest", type=int, default=256)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--lengths", type=int, default=4)
    parser.add_argument("--depths", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    model = workbench.load(arguments.model)
    stops = {model.tokenizer.eos_token_id, *model.tokenizer("\n", add_special_tokens=False)["input_ids"]}
    lengths = np.round(np.linspace(arguments.shortest, arguments.longest, arguments.lengths)).astype(int).tolist()
    task = needle_grid(model.tokenizer, lengths, arguments.depths, 0, (*PUBLISHED_NEEDLES, *NEEDLES))
    written_answers(model, needle_grid(model.tokenizer, (256,), 1, 0, NEEDLES[:1]), [s.argmax()], 4)
    theirs, seconds = published(model, task, stops, arguments.accepted)
    good, loop = sum(right for _, right in theirs), sum(seconds)
    same = select(task, len(theirs))
    took = []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        found, scores = ours(model, same, stops)
        took.append(time.perf_counter() - began)
    check(same, theirs, found, scores)
    best = spread(took)[1]
    tokens = int(same.decoding.mask.sum())
    print(
        f"{arguments.model}, float32, {torch.get_num_threads()} threads, {os.cpu_count()} CPUs, {platform.platform()}"
    )
    print(f"{len(theirs)} trials of {min(lengths)} to {max(lengths)} tokens ({tokens} in all), {good} accepted")
    low, median, high = spread(seconds)
    print(f"published  {loop:8.2f} s in all, a trial {median:.2f} s [{low:.2f}, {high:.2f}]")
    low, median, high = spread(took)
    print(f"ours       {median:8.2f} s in all [{low:.2f}, {high:.2f}] over {len(took)} runs")
    print(f"ratio      {loop / best:8.2f}, tokens and scores the same")
    shared = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": arguments.model, "trials": len(theirs),
        "accepted": good, "longest": max(lengths), "tokens": tokens, "dtype": "float32", "torch": torch.__version__,
        "threads": torch.get_num_threads(), "cpu": platform.processor() or platform.machine(),
    }  # fmt: skip
    append(
        RESULTS,
        [
            shared | {"way": "published", "seconds": round(loop, 3), "repeats": 1, "ratio": 1.0},
            shared | {"way": "ours", "seconds": round(best, 3), "repeats": len(took), "ratio": round(loop / best, 3)},
        ],
    )


if __name__ == "__main__":
    main()
