"""Chunk keys and their ranking against an explicit computation with rotary positions of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench.errors import RequestError
from workbench.heads import DETECTORS, Settings, detect
from workbench.heads.detectors.chunks import DEPTHS, Selections, select, selected_chunks
from workbench.models.architectures import locate

LENGTH, CHOSEN = 5, 2


def rotated(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary positions written out: pairs (i, i + d/2) turn by position / base^(2 i / d)."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() / base ** (torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def test_selection_is_that_of_the_paper_with_positions_counted_inside_chunks(twin, random_task):
    subject = twin("llama")
    task = random_task([38], answers=0)
    found = selected_chunks(subject.model, task.batch, LENGTH, CHOSEN)
    projected = {name: [] for name in ("q_proj", "k_proj", "v_proj")}
    hooks = [
        getattr(layer.attention, name).register_forward_hook(
            lambda module, args, output, name=name: projected[name].append(output[0])
        )
        for layer in locate(subject.own)
        for name in projected
    ]
    with torch.no_grad():
        subject.own(task.batch.ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    config = subject.own.config
    base = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    for layer in range(3):
        q, k, v = (projected[name][layer].reshape(38, -1, 8).transpose(0, 1) for name in projected)
        for head in range(6):
            qh, kh, vh = q[head], k[head // 3], v[head // 3]
            keys = []
            for chunk in range(7):
                at = slice(chunk * LENGTH, (chunk + 1) * LENGTH)
                places = torch.arange(LENGTH)
                logits = (
                    rotated(qh[at], places, base["rope_theta"]) @ rotated(kh[at], places, base["rope_theta"]).T / 8**0.5
                )
                logits = logits.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
                centre = (logits.softmax(-1) @ vh[at]).mean(0)
                keys.append((centre @ kh[at].T / 8**0.5).softmax(-1) @ kh[at])
            keys, counts, middle, rows = torch.stack(keys), np.zeros(DEPTHS), 0, 0
            for i in range((CHOSEN + 1) * LENGTH, 38):
                chunk = i // LENGTH
                best = (keys[:chunk] @ qh[i]).topk(CHOSEN).indices.tolist()
                rows += 1
                middle += sum(0 < one < chunk - 1 for one in best)
                for one in best:
                    counts[int((one + 0.5) / chunk * DEPTHS)] += 1
            assert found.middle[0, layer, head] == pytest.approx(middle / (rows * CHOSEN))
            np.testing.assert_array_equal(found.counts[layer, head], counts)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "gemma3", "qwen3"])
def test_other_positions_and_norms_are_taken_off_too(name, twin, random_task):
    """Rotation is undone or absent; a model with full-width choice selects every chunk equally often."""
    found = selected_chunks(twin(name).model, random_task([40, 36], answers=0).batch, 4, 2)
    heads = found.counts.sum(-1)
    assert (heads[heads > 0] == (28 + 24) * 2).all() and ((found.middle >= 0) & (found.middle <= 1)).all()


def test_a_query_finds_the_chunk_that_holds_its_key():
    keys = torch.eye(8)[None]
    queries = torch.eye(8)[4].expand(1, 16, 8) + 0.1 * torch.eye(8)[0]
    share, counts, chance = select(queries, keys, 2, 1)
    # Chunks 2 to 7 choose: chunk 0 while 4 is not yet past, then chunk 4, the previous one for chunk 5's queries.
    assert share.tolist() == pytest.approx([4 / 12])
    assert counts.sum() == 12 and counts[0, 0] + counts[0, 1] + counts[0, 2] == 6
    assert chance == pytest.approx(sum((chunk - 2) / chunk for chunk in range(2, 8)) / 6)


def test_histogram_has_shares_that_sum_to_one_and_leaves_out_heads_that_do_not_exist():
    counts = np.zeros((1, 2, DEPTHS))
    counts[0, 0, 3], counts[0, 0, 4] = 3, 1
    table = Selections(np.zeros((1, 1, 2)), np.zeros(1), counts).histogram()
    assert len(table) == DEPTHS and set(table["head"]) == {0} and table.share.sum() == 1.0
    assert table.loc[table.depth.sub(0.35).abs().idxmin(), "share"] == 0.75


def test_too_short_prompts_are_refused(twin, random_task):
    with pytest.raises(RequestError, match="38 tokens"):
        selected_chunks(twin("llama").model, random_task([38], answers=0).batch, 10, 2)
    with pytest.raises(RequestError, match="0 selected"):
        selected_chunks(twin("llama").model, random_task([38], answers=0).batch, 10, 0)


def test_runs_from_text_to_table(reader):
    settings = Settings(chunk_prompts=2, chunk_prompt_length=128, chunk_length=16, chunks_selected=2)
    scores = detect(reader, ["longheads"], settings=settings)
    assert len(scores.table) == 12 and scores.table.null.nunique() == 1
    assert DETECTORS["longheads"].probe is None
