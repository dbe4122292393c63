"""A two-layer induction model written by hand: every attention score and logit is known before it runs.

Attention only, one head a layer (unless asked otherwise), no layer norm, score scale one, no training.  The
residual stream has four blocks, in this order, for V tokens and T positions::

    cur   [0, V)          the token at this position (written by the token embedding)
    prev  [V, 2V)         the token before (written by L0H0)
    out   [2V, 3V)        the prediction (written by L1H0, read by the unembedding)
    pos   [3V, 3V + T)    the position (written by the position embedding)

* L0H0, previous token: the query of position t matches the key of position t - 1 with score 30; copies
  cur to prev.
* L1H0, induction: the query of token x matches every key whose *previous* token is x with score 30;
  copies cur to out, times ten.

The last token id is the beginning-of-sequence token and has to stand at position 0: without it the first
token attends to itself in L0H0 and counts as its own predecessor. With |s| distinct tokens, ``[BOS, s,
s]`` is predicted without error on the second copy; without L0H0 the model knows nothing. Both softmaxes
are saturated, so gradients through the keys vanish although patching them has the full effect.

With several gains there are as many query heads a layer, and they share one key/value head: in layer 0 the others do
nothing, in layer 1 each is an induction head of its own strength.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.dynamics.toy import ToyAttention, ToyConfig, ToyModel
from workbench.errors import RequestError

MATCH_SCORE = 30.0
OUTPUT_GAIN = 10.0


def handwritten_induction(vocab: int = 9, max_positions: int = 14, gains: Sequence[float] = (OUTPUT_GAIN,)) -> ToyModel:
    """Build the model; token ids ``0 .. vocab - 2`` are free and ``vocab - 1`` is the start token."""
    if vocab < 3 or max_positions < 4:
        raise RequestError(
            f"vocab={vocab}, max_positions={max_positions}: induction needs a start token and two others, "
            "and four positions; ask for at least 3 and 4."
        )
    if not gains:
        raise RequestError("gains=(): a layer needs a head; give at least one strength.")
    config = ToyConfig(
        vocab_size=vocab,
        hidden_size=3 * vocab + max_positions,
        num_hidden_layers=2,
        num_attention_heads=len(gains),
        num_key_value_heads=1,
        head_dim=(width := max(vocab, max_positions)),
        max_position_embeddings=max_positions,
        scaling=1.0,
        layer_norm=False,
        bos_token_id=vocab - 1,
    )
    model = ToyModel(config)
    cur, prev, out, pos = 0, vocab, 2 * vocab, 3 * vocab
    token, position = torch.arange(vocab), torch.arange(max_positions)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.token_embedding.weight[token, cur + token] = 1.0
        model.position_embedding.weight[position, pos + position] = 1.0
        model.unembedding.weight[token, out + token] = 1.0

        first: ToyAttention = model.blocks[0].attention  # type: ignore[assignment]
        first.query.weight[position, pos + position] = MATCH_SCORE
        first.key.weight[position[1:], pos + position[:-1]] = 1.0
        first.value.weight[token, cur + token] = 1.0
        first.output.weight[prev + token, token] = 1.0

        second: ToyAttention = model.blocks[1].attention  # type: ignore[assignment]
        second.key.weight[token, prev + token] = 1.0
        second.value.weight[token, cur + token] = 1.0
        for head, gain in enumerate(gains):
            second.query.weight[head * width + token, cur + token] = MATCH_SCORE
            second.output.weight[out + token, head * width + token] = gain
    model.eval()  # type: ignore[no-untyped-call]
    return model
