"""Pairs for induction: the earlier occurrence of the last token replaced, so that nothing can be continued.

Clean: a start token, a segment of distinct tokens, and the segment again up to the token before the one that is
asked.  Corrupt: the same with the earlier occurrence of the last token replaced by one that is nowhere else.  What
changes for an induction head is the *previous token* of the answer's first occurrence: the path from a previous-token
head to the keys of the induction heads.

`handwritten_pairs` knows every effect; for a trained toy `repeat_pairs` gives the pairs, and these are the published
outcomes (two seeds, 6000 steps, shares of the gap): path patching of the previous-token head into keys -0.91, -0.83,
of others into keys and of all into queries and directly to the logits less than 0.05; noising single induction heads
-0.19 to -0.34; attribution patching ranks the previous-token head first at the corrupt prompts (0.32, 0.61) and fails
at the clean ones (0.05, 0.06), where softmax and final norm are both saturated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.dynamics.handwritten import MATCH_SCORE, handwritten_induction
from workbench.dynamics.induction_toy import BOS_ID
from workbench.dynamics.truth import PAIRS, Edge, Estimate, GroundTruth, How, Outcome, Story, level, planted
from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks.pairs import PairTask

SEGMENT, ASKED = 6, 3
VOCAB = 9


def handwritten_pairs(gains: Sequence[float] = (6.0, 4.0), *, seed: int = 0) -> GroundTruth:
    """The hand-written induction model with one induction head for each strength, all on one key/value head."""
    whole = sum(gains)
    if whole <= 0:
        raise RequestError(f"gains={tuple(gains)} add up to {whole}: there is no gap; give strengths above 0.")
    heads = [f"L1H{h}" for h in range(len(gains))]
    to_keys = Edge("L0H0", "L1KV0", "k")
    outcomes: list[Outcome] = []
    how: How
    for how, none, full in (("zero", whole, 0.0), ("noising", whole, 0.0), ("denoising", 0.0, whole)):
        toward = -1 if full < none else 1
        outcomes += [Outcome(how, level(none + toward * g), (h,)) for h, g in zip(heads, gains, strict=True)]
        outcomes += [
            Outcome(how, level(none + toward * g), edges=(Edge(h, "logits"),))
            for h, g in zip(heads, gains, strict=True)
        ]
        outcomes += [Outcome(how, level(full), ("L0H0",)), Outcome(how, level(full), edges=(to_keys,))]
        idle = [Edge("L0H0", head, "q") for head in heads] + [Edge("L0H0", "L1KV0", "v"), Edge("L0H0", "logits")]
        outcomes += [Outcome(how, level(none), edges=(edge,)) for edge in idle]
        if len(heads) > 1:
            outcomes.append(Outcome(how, level(full), tuple(heads)))
        if how == "zero":
            continue
        outcomes += [Outcome(how, level(full), (n,)) for n in ("L1KV0", "L1KV0.k", "L0KV0", "L0KV0.v")]
        outcomes += [Outcome(how, level(none), (n,)) for n in ("L1KV0.v", "L0KV0.k", "L0H0.q")]
        outcomes += [Outcome(how, level(none), (f"{head}.q",)) for head in heads]
    # At the corrupt prompts attention is even, and one score grows by MATCH_SCORE: a step far beyond the straight part.
    step = MATCH_SCORE / (1 + SEGMENT + ASKED) * whole
    estimates = [Estimate("atp", "noising", node, level(0.0)) for node in ("L0H0", "L1KV0.k")]
    estimates += [Estimate("atp", "denoising", node, level(step)) for node in ("L0H0", "L1KV0.k")]
    estimates += [Estimate("atp", "noising", h, level(-g)) for h, g in zip(heads, gains, strict=True)]
    estimates += [
        Estimate("qk fix", "noising", "L1KV0.k", level(-whole)),
        Estimate("qk fix", "denoising", "L1KV0.k", level(whole)),
    ]
    edges = [to_keys, Edge("embed", "L0H0", "q"), Edge("embed", "L0KV0", "k"), Edge("embed", "L0KV0", "v")]
    edges += [Edge("embed", h, "q") for h in heads] + [Edge(h, "logits") for h in heads] + [Edge("embed", "L1KV0", "v")]
    story = Story(
        "induction",
        "a previous-token head feeds the keys that induction heads share",
        ["embed", "L0H0", "L0KV0", "L1KV0", *heads],
        edges,
    )
    model = handwritten_induction(VOCAB, 1 + 2 * SEGMENT, gains)
    return planted(story, model, *_handwritten_prompts(seed), (whole, 0.0), outcomes, estimates, seed)


def _handwritten_prompts(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(VOCAB - 1, generator=generator) for _ in range(PAIRS)])
    segment, unused = drawn[:, :SEGMENT], drawn[:, SEGMENT]
    start = torch.full((PAIRS, 1), VOCAB - 1)
    clean = torch.cat([start, segment, segment[:, :ASKED]], dim=1)
    corrupt = clean.clone()
    corrupt[:, ASKED] = unused
    # The foil, too, stands once in the first copy only: even attention favours neither.
    return clean, corrupt, segment[:, ASKED], segment[:, ASKED + 1]


def repeat_pairs(
    count: int = 30, *, seed: int = 0, tokens: int = 64, periods: tuple[int, int] = (10, 28), length: int = 64
) -> PairTask:
    """Pairs for the trained toy: periods as in training, the last token of the second copy asked, 2p tokens long.

    The foil is another token of the segment; ids are those of `repeated_segments`.
    """
    low, high = periods
    if not 3 <= low <= high or high >= tokens or 2 * high > length or count < 1:
        raise RequestError(
            f"count={count}, periods={periods}: needs at least one pair, periods from 3 and below {tokens} tokens, and "
            f"two copies within {length} positions."
        )
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt, answers, foils, columns = [], [], [], [], []
    for _ in range(count):
        period = int(torch.randint(low, high + 1, (), generator=generator))
        drawn = (torch.randperm(tokens, generator=generator) + 1).tolist()
        segment, unused = drawn[:period], drawn[period]
        clean.append([BOS_ID, *segment, *segment[:-1]])
        corrupt.append([BOS_ID, *segment[:-2], unused, segment[-1], *segment[:-1]])
        answers.append(segment[-1])
        foils.append(segment[int(torch.randint(period - 2, (), generator=generator))])
        columns.append(2 * period - 1)
    last, first = torch.tensor(columns), torch.tensor([column // 2 for column in columns])
    return PairTask(
        name="repeats",
        caption="the earlier occurrence of the last token replaced: nothing to continue",
        seed=seed,
        specials="start token at column 0",
        clean=Batch.from_ids(clean, pad_id=BOS_ID),
        corrupt=Batch.from_ids(corrupt, pad_id=BOS_ID),
        answers=torch.tensor(answers)[:, None],
        foils=torch.tensor(foils)[:, None],
        position=last,
        roles={"END": last, "earlier": first, "answer": first + 1},
    )
