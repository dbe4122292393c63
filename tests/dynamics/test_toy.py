from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from workbench.dynamics import ToyConfig, ToyModel
from workbench.errors import RequestError


@pytest.fixture
def model() -> ToyModel:
    torch.manual_seed(0)
    config = ToyConfig(
        vocab_size=11, hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=5, scaling=0.7,
        max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    return ToyModel(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 11, (3, 17), generator=torch.Generator().manual_seed(1))


def by_hand(model: ToyModel, ids: torch.Tensor) -> torch.Tensor:
    """The same model, head by head and query by query, in float64."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if not config.layer_norm:
            return x
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["token_embedding.weight"][ids] + w["position_embedding.weight"][: ids.shape[1]]
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        at = f"blocks.{layer}.attention"
        normed = norm(x, f"blocks.{layer}.norm")
        added = torch.zeros_like(x)
        for head in range(config.num_attention_heads):
            q_rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            k_rows = slice(head // group * config.head_dim, (head // group + 1) * config.head_dim)
            q = normed @ w[f"{at}.query.weight"][q_rows].T
            k = normed @ w[f"{at}.key.weight"][k_rows].T
            v = normed @ w[f"{at}.value.weight"][k_rows].T
            for i in range(ids.shape[1]):
                a = torch.softmax(config.scaling * (k[:, : i + 1] @ q[:, i, :, None])[..., 0], dim=-1)
                z = (a[..., None] * v[:, : i + 1]).sum(1)
                added[:, i] += z @ w[f"{at}.output.weight"][:, q_rows].T
        x = x + added
    return norm(x, "final_norm") @ w["unembedding.weight"].T


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_logits_equal_those_by_hand(model, ids, implementation, layer_norm):
    if not layer_norm:
        config = model.config.to_dict() | {"layer_norm": False}
        model = ToyModel(ToyConfig(**config)).eval()
    model = model.double()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(ids).logits
    # Eager attention takes its softmax in float32, as Llama's does.
    torch.testing.assert_close(logits, by_hand(model, ids), atol=2e-5, rtol=1e-5)


def test_a_registered_attention_function_is_called_with_grouped_keys(model, ids, monkeypatch):
    seen = []

    def spy(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        seen.append((module.layer_idx, query.shape, key.shape, value.shape, scaling, module.is_causal))
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "spy", spy)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "spy", sdpa_mask)
    assert model._can_set_attn_implementation()
    model.set_attn_implementation("spy")
    with torch.no_grad():
        logits = model(ids).logits
    q, kv = (3, 6, 17, 5), (3, 2, 17, 5)
    assert seen == [(layer, q, kv, kv, 0.7, True) for layer in range(2)]
    embedded = model.token_embedding(ids) + model.position_embedding(torch.arange(17))
    torch.testing.assert_close(logits, model.unembedding(model.final_norm(embedded)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(model, ids, implementation, side):
    model.set_attn_implementation(implementation)
    lengths = [17, 1, 9]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(17 - length, 17) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = ids[row, :length], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=positions).logits
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(logits[row, mask[row].bool()], alone, atol=1e-5, rtol=1e-5)


def test_logits_to_keep_selects_positions(model, ids):
    with torch.no_grad():
        whole = model(ids).logits
        assert torch.equal(model(ids, logits_to_keep=0).logits, whole)
        rows = torch.tensor([[0, 3], [5, 5], [16, 1]])
        for keep, expected in [
            (1, whole[:, -1:]),
            (4, whole[:, -4:]),
            (torch.tensor([2, 9]), whole[:, [2, 9]]),
            (rows, torch.stack([whole[p, rows[p]] for p in range(3)])),
        ]:
            torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected)


def test_generation_with_a_cache_equals_growing_prompts(model, ids):
    grown = ids
    with torch.no_grad():
        for _ in range(6):
            grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], dim=1)
        real = torch.ones_like(ids)
        generated = model.generate(ids, attention_mask=real, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, grown)


def test_the_loss_is_that_of_the_next_tokens(model, ids):
    with torch.no_grad():
        found = model(ids, labels=ids)
        log_p = found.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    torch.testing.assert_close(found.loss, -log_p.mean())


def test_saving_and_loading_keeps_config_and_weights(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    again = ToyModel.from_pretrained(tmp_path).eval()
    shape = (
        "vocab_size",
        "num_key_value_heads",
        "head_dim",
        "scaling",
        "layer_norm",
        "max_position_embeddings",
    )
    for field in shape:
        assert getattr(again.config, field) == getattr(model.config, field)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_impossible_requests_are_refused(model, ids):
    with pytest.raises(RequestError, match="num_key_value_heads=4"):
        ToyConfig(num_attention_heads=6, num_key_value_heads=4)
    with pytest.raises(RequestError, match="33 tokens exceed the 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(RequestError, match="either input_ids or inputs_embeds"):
        model()
