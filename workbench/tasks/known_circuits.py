"""Published circuits as data, by the task and model that they were found in.

Heads are counted from zero, layer first.  What two sources give differently is in the notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from workbench.tasks.pairs import KnownCircuit


def _heads(listed: str) -> tuple[str, ...]:
    """``"9.6 10.0"`` -> ``("L9H6", "L10H0")``."""
    return tuple("L{}H{}".format(*one.split(".")) for one in listed.split())


def _edges(sources: str, targets: str, inputs: str) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (source, target, one) for source in sources.split() for target in targets.split() for one in inputs.split()
    )


_MOVERS = "name_mover backup_name_mover negative_name_mover"
_IOI_EDGES = (
    *_edges("embed", "previous_token duplicate_token", "q k v"),
    *_edges("embed", "s_inhibition", "q"),
    *_edges("embed", _MOVERS, "k v"),
    *_edges("previous_token", "induction", "k v"),
    *_edges("induction duplicate_token", "s_inhibition", "k v"),
    *_edges("s_inhibition", _MOVERS, "q"),
    *((mover, "logits", "") for mover in _MOVERS.split()),
)

IOI_GPT2_SMALL = KnownCircuit(
    model="gpt2",
    paper="Wang et al. 2022, Interpretability in the wild",
    url="https://arxiv.org/abs/2211.00593",
    nodes={
        "previous_token": _heads("2.2 4.11"),
        "duplicate_token": _heads("0.1 0.10 3.0"),
        "induction": _heads("5.5 5.8 5.9 6.9"),
        "s_inhibition": _heads("7.3 7.9 8.6 8.10"),
        "name_mover": _heads("9.9 10.0 9.6"),
        "backup_name_mover": _heads("9.0 9.7 10.1 10.2 10.6 10.10 11.2 11.9"),
        "negative_name_mover": _heads("10.7 11.10"),
    },
    edges=_IOI_EDGES,
    note="5.8 and 5.9 are weak. Edges are those of ACDC's list, by class. O'Neill & Bui's copy has 11.3 for 9.0.",
)
IOI_GPT2_MEDIUM = KnownCircuit(
    model="gpt2-medium",
    paper="Merullo et al. 2023, Circuit component reuse across tasks",
    url="https://arxiv.org/abs/2310.08744",
    nodes={
        "duplicate_token": _heads("6.4"),
        "induction": _heads("9.3"),
        "s_inhibition": _heads("12.3 13.4 13.13"),
        "name_mover": _heads("15.14 16.15 17.4 18.5 19.15"),
        "negative_name_mover": _heads("19.1"),
    },
    note="The paper prints 13.14 for 13.13 in places; the released code has 13.13.",
)
COLORED_OBJECTS_GPT2_MEDIUM = KnownCircuit(
    model="gpt2-medium",
    paper="Merullo et al. 2023, Circuit component reuse across tasks",
    url="https://arxiv.org/abs/2310.08744",
    nodes={
        "duplicate_token": _heads("6.4"),
        "induction": _heads("9.3"),
        "content_gatherer": _heads("11.6 11.7 12.15"),
        "mover": _heads("15.14 16.15 17.4 18.5 19.15"),
    },
    note="IOI's inhibition heads 12.3, 13.4, 13.13 and negative mover 19.1 do not engage on this task.",
)
GREATER_THAN_GPT2_SMALL = KnownCircuit(
    model="gpt2",
    paper="Hanna et al. 2023, How does GPT-2 compute greater-than?",
    url="https://arxiv.org/abs/2305.00586",
    nodes={
        "early": (*_heads("0.1 0.3 0.5"), "L0.mlp", "L1.mlp", "L2.mlp", "L3.mlp"),
        "year_reader": _heads("5.1 5.5 6.1 6.9 7.10 8.8 8.11 9.1"),
        "upper_triangle": ("L8.mlp", "L9.mlp", "L10.mlp", "L11.mlp"),
    },
    edges=(
        *_edges("embed", "early", "q k v"),
        *_edges("early", "year_reader", "k v"),
        ("year_reader", "upper_triangle", ""),
        ("upper_triangle", "logits", ""),
    ),
    note="The paper's figure has eight year readers; its list over 10,000 samples leaves out 6.1, ACDC's 5.1 and 8.8.",
)
DOCSTRING_ATTN_ONLY_4L = KnownCircuit(
    model="attn-only-4l",
    paper="Heimersheim & Janiak 2023, A circuit for Python docstrings in a 4-layer attention-only transformer",
    url="https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn",
    nodes={
        "token_copy": _heads("0.5"),
        "previous_token": _heads("1.2 1.4"),
        "induction": _heads("2.0"),
        "argument_mover": _heads("3.0 3.6"),
    },
    edges=(
        ("embed", "L0H5", "v"),
        *_edges("embed L0H5", "L1H4", "v"),
        *_edges("embed L0H5", "L1H2 L2H0", "q k"),
        ("L1H4", "L2H0", "v"),
        *_edges("L1H4", "L3H0 L3H6", "q"),
        *_edges("L2H0 L1H2", "L3H0 L3H6", "k"),
        *_edges("embed L0H5", "L3H0 L3H6", "v"),
        ("L3H0", "logits", ""),
        ("L3H6", "logits", ""),
    ),
    note="1.4 does two jobs; 0.2 and 0.4 are minor and left out. O'Neill & Bui's copy has 1.0 for 1.2.",
)
MCQA_CHINCHILLA = KnownCircuit(
    model="chinchilla-70b",
    paper="Lieberum et al. 2023, Does circuit analysis interpretability scale?",
    url="https://arxiv.org/abs/2307.09458",
    nodes={"correct_letter": _heads("24.18 26.20 26.32 32.26 40.62")},
    note="As cited elsewhere, not read in the paper; the model is not public. 32 heads and 13 MLPs write the label.",
)
FACTS_GPT2_SMALL = KnownCircuit(
    model="gpt2",
    paper="Lv et al. 2024, Interpreting key mechanisms of factual recall in transformer-based language models",
    url="https://arxiv.org/abs/2403.19521",
    nodes={"argument_passer": _heads("9.8")},
    note="As cited elsewhere: the one head that is named for moving the country to the end.",
)
INDUCTION_GPT2_SMALL = KnownCircuit(
    model="gpt2",
    paper="Olsson et al. 2022, In-context learning and induction heads",
    url="https://arxiv.org/abs/2209.11895",
    nodes={"induction": _heads("5.1 5.5 6.9 7.2 7.10")},
    note="The heads with the highest prefix-matching scores on repeated random tokens, as cited elsewhere.",
)

KNOWN_CIRCUITS: Mapping[str, tuple[KnownCircuit, ...]] = MappingProxyType(
    {
        "ioi": (IOI_GPT2_SMALL, IOI_GPT2_MEDIUM),
        "colored_objects": (COLORED_OBJECTS_GPT2_MEDIUM,),
        "greater_than": (GREATER_THAN_GPT2_SMALL,),
        "docstring": (DOCSTRING_ATTN_ONLY_4L,),
        "mcqa": (MCQA_CHINCHILLA,),
        "facts": (FACTS_GPT2_SMALL,),
        "lag_induction": (INDUCTION_GPT2_SMALL,),
    }
)
