"""Linear probes where the answer is known: planted in one head, absent, a matter of tokens, and in a toy model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

import workbench
from workbench.errors import RequestError
from workbench.heads.linear import UNLABELLED, Labels, Vectors, _check, control_labels, fit, probe_linearly
from workbench.models import Batch
from workbench.models.testing import build

PROMPTS, EACH, TYPES, WIDTH = 20, 12, 30, 8


@pytest.fixture
def planted(seed):
    """Vectors where the class lies along one direction, independent of the token type."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(2, size=PROMPTS * EACH)
    tokens = rng.integers(TYPES, size=PROMPTS * EACH)
    features = rng.normal(size=(PROMPTS * EACH, WIDTH))
    return features, classes, tokens, np.repeat(np.arange(PROMPTS), EACH)


def fitted(features, classes, tokens, prompts, folds=5, seed=0):
    vectors = Vectors(features, classes, tokens, prompts)
    return fit(vectors, control_labels(tokens, classes, seed), _check(vectors, folds), seed)


def test_a_planted_direction_is_found_and_is_selective(planted):
    features, classes, tokens, prompts = planted
    features[:, 3] += 6 * classes
    found = fitted(features, classes, tokens, prompts)
    assert found.accuracy > 0.97 and 0.35 < found.control < 0.65 and found.selectivity_low > 0.25
    assert found.low <= found.accuracy <= found.high
    assert found.selectivity == pytest.approx(found.accuracy - found.control)
    # Units and offsets do not matter: the probe standardises.
    scaled = fitted(features * np.geomspace(1e-3, 1e3, WIDTH) + 50, classes, tokens, prompts)
    assert scaled.accuracy == pytest.approx(found.accuracy, abs=0.01)


def test_where_there_is_nothing_accuracy_is_chance_and_the_interval_holds_it(planted):
    found = fitted(*planted)
    assert found.low < 0.5 < found.high and found.selectivity_low < 0 < found.selectivity_high


def test_vectors_that_only_tell_the_token_are_not_selective(planted):
    """One-hot tokens, and a label that is a matter of the token: both tasks are remembered."""
    _, _, tokens, prompts = planted
    kind = np.random.default_rng(0).integers(2, size=TYPES)
    found = fitted(np.eye(TYPES)[tokens], kind[tokens], tokens, prompts)
    assert found.accuracy > 0.95 and found.control > 0.95 and abs(found.selectivity) < 0.05


def test_no_prompt_is_in_both_halves(planted):
    """Each prompt has one class and a direction of its own: only a probe that saw the prompt could know."""
    rng = np.random.default_rng(3)
    _, _, tokens, prompts = planted
    classes = rng.permutation(np.arange(PROMPTS) % 2)[prompts]
    features = np.eye(PROMPTS)[prompts]
    assert fitted(features, classes, tokens, prompts).accuracy < 0.7
    for train, test in _check(Vectors(features, classes, tokens, prompts), 4):
        assert not set(prompts[train]) & set(prompts[test])


def test_accuracy_is_balanced_over_classes(planted):
    """Against scikit-learn's own cross-validated predictions."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, _, tokens, prompts = planted
    classes = (np.random.default_rng(4).random(len(tokens)) < 0.15).astype(np.int64)
    features[:, 0] += 1.2 * classes
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced"))
    guess = cross_val_predict(model, features, classes, groups=prompts, cv=GroupKFold(5))
    found = fitted(features, classes, tokens, prompts)
    assert found.accuracy == pytest.approx(balanced_accuracy_score(classes, guess))


def test_control_labels_are_one_for_each_type_with_all_classes():
    tokens = np.array([5, 5, 7, 9, 9, 9, 11, 5])
    classes = np.array([0, 1, 2, 0, 0, 0, 0, 0])
    for seed in range(20):
        control = control_labels(tokens, classes, seed)
        assert set(control) == {0, 1, 2}
        assert all(len(set(control[tokens == token])) == 1 for token in tokens)
    with pytest.raises(RequestError, match="2 token types cannot have 3 classes"):
        control_labels(np.array([1, 2, 2]), np.array([0, 1, 2]))


@pytest.fixture(scope="module")
def model():
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    return workbench.load(build("llama", **sizes))


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 15, (12,), generator=generator)
    return Batch.from_ids([torch.randint(1, 64, (int(n),), generator=generator).tolist() for n in lengths])


@pytest.fixture(scope="module")
def labels(batch):
    """Whether a token is one of the upper half of the vocabulary; not at the first position."""
    values = (batch.ids >= 32).long()
    values[~batch.mask] = UNLABELLED
    values[:, 0] = UNLABELLED
    return Labels(batch, values, ("lower", "upper"))


def test_the_label_that_one_head_carries_is_found_in_that_head_alone(model, batch):
    """The label is the sign of a projection of L1H2's output itself."""
    z = model.trace(batch, sites=["blocks.1.attn.hook_z"]).site("z", 1)[:, :, 2]
    direction = torch.randn(z.shape[-1], generator=torch.Generator().manual_seed(1))
    values = (z @ direction > (z @ direction)[batch.mask].median()).long()
    values[~batch.mask] = UNLABELLED
    found = probe_linearly(model, Labels(batch, values), sites=("z",), layers=[1], folds=4).table.set_index("head")
    assert found.accuracy.idxmax() == 2 and found.accuracy[2] > 0.85
    assert found.positions.eq(int(batch.mask.sum())).all() and found.prompts.eq(12).all()


def test_a_table_of_heads_and_streams_in_which_tokens_can_be_read_early(model, labels):
    seen = []
    found = probe_linearly(
        model, labels, sites=("z", "resid_pre"), folds=3, progress=lambda done, total: seen.append((done, total))
    )
    table = found.table
    assert len(table) == 2 * (4 + 1) and set(table[table.site == "resid_pre"]["head"]) == {-1}
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
    assert found.chance == 0.5 and found.classes == ("lower", "upper") and 0.5 < found.types_shared <= 1
    stream = table[(table.site == "resid_pre") & (table.layer == 0)].iloc[0]
    # The embedding of a random model is a matter of the token: what it tells is remembered, for the control as well.
    assert abs(stream.selectivity) < 0.25


def test_what_cannot_be_probed_is_refused(model, labels, batch):
    with pytest.raises(RequestError, match=r"sites=\('mlp',\)"):
        probe_linearly(model, labels, sites=("mlp",))
    with pytest.raises(RequestError, match="folds=13 of 12 prompts"):
        probe_linearly(model, labels, folds=13)
    one = torch.full_like(batch.ids, UNLABELLED)
    one[:, 1] = 0
    with pytest.raises(RequestError, match="1 class"):
        probe_linearly(model, Labels(batch, one))
    one[0, 2] = 1
    with pytest.raises(RequestError, match="occurs in one prompt only"):
        probe_linearly(model, Labels(batch, one))
    with pytest.raises(RequestError, match="on padding"):
        Labels(batch, torch.zeros_like(batch.ids))
    with pytest.raises(RequestError, match="do not fit"):
        Labels(batch, batch.ids[:, 1:])
