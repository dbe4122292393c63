"""Documents first, then a query that one of them answers: prompts for query-focused retrieval heads.

After Zhang et al. 2025, Query-focused retrieval heads (QRHead, arXiv 2506.09944): numbered paragraphs with titles, an
instruction, the query, and the header of the reply. Every prompt comes with its calibration: the same documents with
``N/A`` for a query. As the documents stand before the query, they are the same tokens at the same places in both.

Documents are short invented notes, one of which (the gold one) answers the query; each is the answer to its own query
and stands as a distractor in other prompts, so that no document is special by its style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.models import Batch
from workbench.tasks import corpus
from workbench.tasks.encoding import encode, padding_id
from workbench.tasks.task import Task
from workbench.tasks.turns import Turn, check_counts

NO_QUERY = "N/A"
_HEAD = "Here are some paragraphs: \n\n"
_ASK = " Please find information that are relevant to the following query in the paragraphs above.\n\nQuery: "


@dataclass(frozen=True)
class Note:
    """A document, and a question that it alone answers."""

    title: str
    text: str
    question: str


NOTES: tuple[Note, ...] = (
    Note(
        "The lamp of Orrin Point",
        "The lamp at Orrin Point burns seal oil in winter and olive oil in summer. Its keeper, Maud Tallis, climbs "
        "the two hundred steps every evening and writes the colour of the sky into a green book.",
        "How many steps does the keeper of the lighthouse climb?",
    ),
    Note(
        "Bread in Dunhallow",
        "In Dunhallow bread is baked only on Thursdays, when the wind comes from the hills. The dough rests in cedar "
        "boxes, and the first loaf is given to whoever arrives last.",
        "On which day of the week do people in Dunhallow bake?",
    ),
    Note(
        "A bridge of rope",
        "The gorge at Tessaly is crossed by a bridge that is woven anew every third spring. Eleven families bring the "
        "grass for it, and the oldest weaver walks over it first, with a goat on her shoulders.",
        "Who is the first to cross the new bridge?",
    ),
    Note(
        "The clock collector",
        "Anselm Rook owned forty clocks, and none of them showed the same hour. He said that he liked to choose his "
        "time in the morning, as others choose a hat, and he was never late.",
        "What did the man who was never late collect?",
    ),
    Note(
        "Swimming lessons",
        "The school on Lake Imber teaches every child to swim before it teaches the alphabet. Lessons begin in June, "
        "and the teacher, who is afraid of boats, gives them from a floating desk.",
        "What is the swimming teacher afraid of?",
    ),
    Note(
        "The quiet orchestra",
        "The orchestra of Velm plays with wooden spoons on glass. Its concerts last nine minutes, the audience sits "
        "on the stage, and applause is forbidden, since it would break the instruments.",
        "Why may nobody clap after a concert in Velm?",
    ),
    Note(
        "Snow maps",
        "Before there were printed maps, the postmen of Kaldra drew their routes in fresh snow on the market square. "
        "By noon the sun had erased them, so that no bandit could learn the way.",
        "How did postmen in Kaldra keep their routes secret?",
    ),
    Note(
        "The blue goat",
        "Farmer Iddo dyed his goat blue to find it in the fog. The goat liked the colour so much that it refused to "
        "be washed, and the village put it on its coat of arms.",
        "Which animal is on the coat of arms of the village?",
    ),
    Note(
        "Letters to the river",
        "Children of Marrow Ferry write to the river when they lose a tooth. The ferryman answers each letter in "
        "verse, on brown paper, and signs with the drawing of a heron.",
        "What does the ferryman draw under his letters?",
    ),
    Note(
        "A garden under ground",
        "The miners of Pell grow pears in an old shaft, where mirrors bring down the light. The pears are white, "
        "taste of pepper, and are sold at twice the price of any other.",
        "What do the pears that miners grow taste of?",
    ),
)


def document_queries(
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 6,
    documents: int = 5,
    seed: int = 0,
    notes: Sequence[Note] = NOTES,
    chat: bool | None = None,
) -> tuple[Task, Task]:
    """Prompts with a query, and their calibration with `N/A` in its place.

    Every note is the gold document in turn; its place among the others moves from prompt to prompt.

    Spans: `document_0` and so on, `gold` (the document that answers) and `query`: instruction, query and all that
    follows. `info` has the gold document's place under "gold".
    """
    check_counts("document_queries", [("prompts", prompts, 1), ("documents", documents, 2)])
    if documents > len(notes):
        raise RequestError(f"{documents} documents a prompt, but there are {len(notes)} notes; ask for fewer.")
    rng, turn = np.random.default_rng(seed), Turn.of(tokenizer, chat)
    cells: dict[str, list[tuple[tuple[int, ...], dict[str, tuple[int, int]], str]]] = {"asked": [], "none": []}
    places = []
    for prompt in range(prompts):
        gold = notes[prompt % len(notes)]
        others = [note for note in notes if note is not gold]
        chosen = [others[index] for index in rng.choice(len(others), documents - 1, replace=False)]
        place = (prompt + prompt // documents) % documents
        chosen.insert(place, gold)
        places.append(place)
        cells["asked"].append(_build(tokenizer, turn, chosen, place, gold.question))
        cells["none"].append(_build(tokenizer, turn, chosen, place, NO_QUERY))
    for (with_query, spans, _), (without, _, _) in zip(cells["asked"], cells["none"], strict=True):
        end = spans[f"document_{documents - 1}"][1]
        if with_query[:end] != without[:end]:
            raise RequestError("This tokenizer cuts the documents differently with another query behind them.")
    settings = {"prompts": prompts, "documents": documents, "chat": turn.chat}
    asked, none = (
        _assemble(tokenizer, turn, cells[query], places, seed, settings | {"query": query}) for query in cells
    )
    return asked, none


def document_spans(task: Task) -> Int[Tensor, "prompt document 2"]:
    """The documents' columns, in the order in which they stand."""
    return torch.stack([task.spans[f"document_{at}"] for at in range(int(str(task.settings["documents"])))], dim=1)


def _build(
    tokenizer: PreTrainedTokenizerBase, turn: Turn, notes: Sequence[Note], gold: int, query: str
) -> tuple[tuple[int, ...], dict[str, tuple[int, int]], str]:
    text, bounds = turn.before + _HEAD, []
    for number, note in enumerate(notes, start=1):
        document = f"[{number}] {note.title}\n{note.text}"
        bounds.append((len(text), len(text) + len(document)))
        text += document + "\n\n"
    query_at = len(text)
    text += _ASK + query + turn.after
    whole, shift = encode(tokenizer, text), len(turn.prefix.ids)
    spans = {f"document_{at}": whole.tokens_in(*bound) for at, bound in enumerate(bounds)}
    spans["gold"] = spans[f"document_{gold}"]
    spans["query"] = (whole.tokens_in(query_at, len(text))[0], len(whole.ids))
    moved = {name: (first + shift, last + shift) for name, (first, last) in spans.items()}
    return (*turn.prefix.ids, *whole.ids), moved, text


def _assemble(
    tokenizer: PreTrainedTokenizerBase,
    turn: Turn,
    cells: Sequence[tuple[tuple[int, ...], dict[str, tuple[int, int]], str]],
    places: Sequence[int],
    seed: int,
    settings: dict[str, object],
) -> Task:
    texts = [text for _, _, text in cells]
    batch = Batch.from_ids([ids for ids, _, _ in cells], pad_id=padding_id(tokenizer), texts=texts)
    nothing = torch.zeros(len(cells), 0, dtype=torch.long)
    asks = "a query that one of them answers" if settings["query"] == "asked" else "N/A in place of a query"
    return Task(
        name="documents",
        caption=f"{len(cells)} prompts of {settings['documents']} short documents and {asks}; {turn.prefix.policy}.",
        seed=seed,
        batch=batch,
        specials=turn.prefix.policy,
        answer_ids=nothing,
        answer_positions=nothing,
        spans={name: torch.tensor([spans[name] for _, spans, _ in cells]) for name in cells[0][1]},
        settings=settings | {"texts_sha256": corpus.digest(texts)},
        info=tuple({"gold": place} for place in places),
    )
