from __future__ import annotations

import json

import pytest

from workbench.errors import RequestError
from workbench.tasks import pair_files, pairs_from_file

ONE = {"clean": "a cat and a dog and a", "corrupt": "a cat and a cow and a", "answer": " dog", "foil": " cow"}


def written(tmp_path, *lines, name="mine.jsonl"):
    file = tmp_path / name
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


@pytest.fixture
def letters():
    """One token a word of these prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate("<unk> <s> a cat and dog cow the".split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def test_jsonl_and_csv_give_the_same_task(letters, tmp_path):
    full = {**ONE, "answer": [" dog", " the"], "reference": "a the and a the and a", "template": "x"}
    full["roles"] = {"D": "dog", "A2": ["a ", 2]}
    lines = pairs_from_file(written(tmp_path, full, "", full), letters, bos=True)
    assert len(lines) == 2 and lines.name == "mine"
    assert lines.roles["D"].tolist() == [5, 5] and lines.roles["A2"].tolist() == [4, 4]
    assert lines.answers.tolist() == [[5, 7]] * 2 and lines.foils.tolist() == [[6]] * 2
    assert lines.position.tolist() == [7, 7] and lines.references.ids[0].tolist() == [1, 2, 7, 4, 2, 7, 4, 2]
    roles = json.dumps(full["roles"]).replace('"', '""')
    row = f'{ONE["clean"]},{ONE["corrupt"]}, dog| the, cow,{full["reference"]},"{roles}",x'
    table = written(
        tmp_path, "clean,corrupt,answer,foil,reference,roles,template", row, row, name="mine.csv"
    )  # fmt: skip
    assert pairs_from_file(table, letters, bos=True).hash == lines.hash


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: the line is no JSON .* write one object"),
        ("[1]", r"line 2: \[1\] is no JSON object"),
        ('{"clean": "a", "clean": "a"}', "line 2: 'clean' comes twice"),
        ('{"a":' * 100_000, "line 2: the line is (no JSON|nested too deeply)"),
        ({**ONE, "fool": " a"}, "line 2: field 'fool' is unknown; choose from clean"),
        ({key: ONE[key] for key in ("clean", "corrupt", "answer")}, "line 2: field 'foil' is missing"),
        ({**ONE, "clean": 3}, "line 2: field 'clean' is 3; give a text"),
        ({**ONE, "clean": " "}, "line 2: field 'clean' is ' '"),
        ({**ONE, "corrupt": "a cat and a"}, r"line 2: field 'corrupt' .* has 4 tokens and 'clean' 7"),
        ({**ONE, "corrupt": ONE["clean"]}, "line 2: field 'corrupt' .* equals 'clean'"),
        ({**ONE, "answer": " a cat"}, "line 2: field 'answer': ' a cat' is not one token behind"),
        ({**ONE, "answer": "dog"[:1]}, "line 2: field 'answer': 'd' is not one token"),
        ({**ONE, "foil": " dog"}, "line 2: token 5 is both"),
        ({**ONE, "answer": "\ud800"}, "half a surrogate pair"),
        ({**ONE, "roles": {"A": "a"}}, r"line 2: role 'A': 'a' comes \d times in 'clean'; say which"),
        ({**ONE, "roles": {"A": ["a ", 9]}}, r"line 2: role 'A' is \['a ', 9\]"),
        ({**ONE, "roles": {"A": "horse"}}, "line 2: role 'A' is 'horse'; 'horse' comes 0 times"),
        ({**ONE, "roles": {"A": 3}}, "line 2: role 'A' is 3; give words"),
        ({**ONE, "roles": "A"}, "line 2: field 'roles' is 'A'"),
        ({**ONE, "roles": {"D": "dog"}}, r"line 2: roles \['D'\] differ from those of line 1, \[\]"),
        ({**ONE, "reference": ONE["corrupt"]}, "line 2: 'reference' is in some lines only"),
    ],
)
def test_bad_lines_are_refused_by_number_field_and_value(letters, tmp_path, line, message):
    with pytest.raises(RequestError, match=message):
        pairs_from_file(written(tmp_path, ONE, line), letters)


def test_bad_files_are_refused(letters, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"neither \.jsonl nor \.csv"):
        pairs_from_file(tmp_path / "mine.txt", letters)
    with pytest.raises(RequestError, match="no file"):
        pairs_from_file(tmp_path / "none.csv", letters)
    with pytest.raises(RequestError, match="has no pairs"):
        pairs_from_file(written(tmp_path, ""), letters)
    (tmp_path / "latin.jsonl").write_bytes(b"\n\xe9")
    with pytest.raises(RequestError, match="line 2: byte 0xe9 is not UTF-8"):
        pairs_from_file(tmp_path / "latin.jsonl", letters)
    with pytest.raises(RequestError, match="line 2: there are not 4 fields"):
        pairs_from_file(written(tmp_path, "clean,corrupt,answer,foil", "a,b", name="short.csv"), letters)
    with pytest.raises(RequestError, match="a column comes twice"):
        pairs_from_file(written(tmp_path, "clean,clean", "a,b", name="twice.csv"), letters)
    with pytest.raises(RequestError, match="no CSV"):
        pairs_from_file(written(tmp_path, "clean,corrupt", '"a,b', name="quotes.csv"), letters)
    file = written(tmp_path, ONE, ONE)
    monkeypatch.setattr(pair_files, "MOST_PAIRS", 1)
    with pytest.raises(RequestError, match="line 2: more than 1 pairs"):
        pairs_from_file(file, letters)
    monkeypatch.setattr(pair_files, "LARGEST_BYTES", 5)
    with pytest.raises(RequestError, match="larger than 0 MiB"):
        pairs_from_file(file, letters)


def test_without_foils_the_log_probability_is_left(letters, tmp_path):
    alone = {key: ONE[key] for key in ("clean", "corrupt", "answer")}
    task = pairs_from_file(written(tmp_path, alone), letters, metric="log_probability")
    assert task.foils.numel() == 0 and task.metric == "log_probability"
