"""AttentionInfluence: how much worse a text is predicted without the heads that retrieve (arXiv 2505.07293).

For each document the mean loss of the model as it is, and with the heads' attention uniform over the keys that each
query sees; the score is (L_masked - L_base) / L_base. The paper's 1/L over a causal row does not sum to one, so the
causal version is taken. One figure of the paper divides by the masked loss; its equation, and this, by the base. The
paper's heads are the top 5 % on the JSON task (detector `json_retrieval`); it keeps the top 20 % of each domain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.models import Head
from workbench.tracing import Model, ablate

SELECTED = 0.2


def influence(
    model: Model, heads: Iterable[Head | str], documents: Mapping[str, Sequence[str]], *, selected: float = SELECTED
) -> pd.DataFrame:
    """One row a document: domain, document (its place there), tokens, loss and loss without the heads (nats a token),
    influence (their relative difference), rank within the domain (1: the largest) and whether it is among the
    `selected` share of its domain.

    Domains differ in loss, so documents are compared within theirs alone: no rank reaches across.
    """
    chosen = list(heads)
    if not chosen:
        raise RequestError("No heads to mask; name some, e.g. the top of detector 'json_retrieval'.")
    given: object = documents
    if not isinstance(given, Mapping) or not given:
        raise RequestError("documents: give texts by domain, e.g. {'prose': [...], 'code': [...]}.")
    if not 0 < selected <= 1:
        raise RequestError(f"selected={selected}: a share above 0 and up to 1 is needed.")
    tables = [_domain(model, chosen, name, texts, selected) for name, texts in documents.items()]
    return pd.concat(tables, ignore_index=True)


def _domain(
    model: Model, heads: Sequence[Head | str], domain: str, texts: Sequence[str], selected: float
) -> pd.DataFrame:
    if isinstance(texts, str) or not len(texts):
        raise RequestError(f"Domain {domain!r}: give a list of at least one text.")
    batch = model.batch(list(texts))
    short = (batch.lengths < 2).nonzero().flatten().tolist()
    if short:
        raise RequestError(f"Document {short[0]} of {domain!r} has one token, so nothing to predict; leave it out.")
    base, without = (
        model.trace(batch, edits=edits, loss=True).loss for edits in ((), [ablate(heads, "uniform")])
    )  # fmt: skip
    assert base is not None and without is not None
    losses = [np.asarray(loss.double().nanmean(1).numpy()) for loss in (base, without)]
    score = (losses[1] - losses[0]) / losses[0]
    rank = (-score).argsort().argsort() + 1
    return pd.DataFrame(
        {
            "model": model.source.name, "domain": domain, "document": np.arange(len(texts)),
            "tokens": batch.lengths.cpu().numpy(), "loss": losses[0], "loss_masked": losses[1], "influence": score,
            "rank": rank, "selected": rank <= max(1, round(selected * len(texts))),
        }
    )  # fmt: skip
