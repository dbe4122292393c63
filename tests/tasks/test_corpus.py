from __future__ import annotations

import ast
import re
import sysconfig
from pathlib import Path

import pytest

from workbench.errors import SourceError
from workbench.tasks import corpus


def test_prose_is_running_text():
    pieces = [piece for document in corpus.prose_documents() for piece in document.pieces]
    assert len(pieces) > 200
    assert len(set(pieces)) == len(pieces)
    for piece in pieces:
        assert piece[0].isupper()
        assert piece.endswith((".", ".)"))
        assert "\n" not in piece
        assert "  " not in piece
        assert not re.search(r"::=|>>>|\+--|====|\*\*\*\*| \[\d+\]", piece), piece


def test_prose_begins_anywhere_and_wraps_around():
    whole, turned = corpus.prose_text(), corpus.prose_text(3)
    assert turned != whole
    assert sorted(whole.split("\n\n")) == sorted(turned.split("\n\n"))
    assert whole.index(turned[:200]) > 0


def test_markup_is_removed_and_blocks_are_left_out():
    topic = (
        "The title\n*********\n\n"
        "An *emphasised* word in a paragraph that runs over\ntwo lines of text, with a mark [3] in it.\n\n"
        "   indented = code(block)\n\n"
        "* a list item that is long enough to be taken for a paragraph by its number of words.\n\n"
        "| a table | that is long enough to be taken for a paragraph by its number of words alone. |\n\n"
        "rule ::= a grammar rule long enough to be taken for a paragraph by its number of words.\n\n"
        "A paragraph that introduces a block which was left out ends in a colon, like this one:\n\n"
        "Too short."
    )
    assert corpus._paragraphs(topic) == [
        "An emphasised word in a paragraph that runs over two lines of text, with a mark in it."
    ]


def test_sentences_end_at_full_stops_only():
    text = 'One here, e.g. this. Version 3.11 is "old." Really? Yes!\n\nThe end.'
    ends = [text[:end].split()[-1] for end in corpus.sentence_ends(text)]
    assert ends == ["this.", '"old."', "Really?", "Yes!", "end."]


def test_code_has_no_docstrings_and_still_parses():
    files = [path for path in corpus.code_files() if path.name in ("heapq.py", "textwrap.py", "bisect.py")]
    assert len(files) == 3
    for path in files:
        document = corpus.code_document(path)
        assert document.pieces
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert ast.get_docstring(node) is None


def test_code_that_is_nothing_but_a_docstring_is_dropped(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        'class Empty:\n    """Only words."""\n\n\n'
        '@decorated\ndef f(x):\n    """Words."""\n    # A comment stays.\n    return x\n\n\n'
        'def g(): "words"; return 1\n'
    )
    assert corpus.code_document(path).pieces == ("@decorated\ndef f(x):\n    # A comment stays.\n    return x",)


def test_a_python_without_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    corpus.code_files.cache_clear()
    try:
        with pytest.raises(SourceError, match=re.escape(str(tmp_path))):
            corpus.code_files()
    finally:
        monkeypatch.undo()
        corpus.code_files.cache_clear()
    assert Path(corpus.code_files()[0]).exists()


def test_the_digest_tells_where_texts_end():
    assert corpus.digest(["ab", "c"]) != corpus.digest(["a", "bc"])
    assert corpus.digest(["ab", "c"]) == corpus.digest(iter(("ab", "c")))
