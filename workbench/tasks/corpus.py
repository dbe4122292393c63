"""Text that comes with any Python: prose from pydoc's topics, code from the standard library's sources.

Prose: the language reference as `pydoc_data.topics` stores it, running paragraphs only; titles, tables,
lists, grammar and code blocks are left out, emphasis and footnote marks are removed, repeated paragraphs
are kept once. Code: top-level functions and classes of the standard library's modules, without docstrings.

Both differ between Python versions, so whoever draws from them records `digest` of what was drawn.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from workbench.errors import SourceError

MIN_WORDS = 12

_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([^\s*](?:[^*]*[^\s*])?)\*{1,2}(?![\w*])")
_FOOTNOTE = re.compile(r"\s?\[(?:\d+|#\w*)\]")
# A paragraph that holds any of these is a table, a grammar rule, a prompt, a list item or a directive.
_NOT_PROSE = re.compile(r"::=|>>>|^\s*(?:[-+|=*~^]{2,}|[*\-] |\d+\. |\.\. |\[\w+\] )|\||::|\n\s", re.MULTILINE)
# Ends a sentence: not the dot of "e.g." or of an initial; what follows is space or the end.
_SENTENCE_END = re.compile(r"(?<=[\w)\"”\]][\w)\"”\]])(?<!\be\.g)(?<!\bi\.e)(?<!\betc)[.!?][\")”]*(?=\s|$)")


@dataclass(frozen=True)
class Document:
    """A text in pieces (paragraphs; functions and classes) that each make a sensible start."""

    name: str
    pieces: tuple[str, ...]
    joint: str

    @property
    def text(self) -> str:
        """The pieces in order."""
        return self.joint.join(self.pieces)


def digest(texts: Iterable[str]) -> str:
    """SHA-256 over texts, each ended by a zero byte."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode() + b"\0")
    return total.hexdigest()


def sentence_ends(text: str) -> list[int]:
    """Character positions right behind each sentence."""
    return [found.end() for found in _SENTENCE_END.finditer(text)]


@cache
def prose_documents() -> tuple[Document, ...]:
    """One document for each pydoc topic that has prose, by name."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as missing:
        raise SourceError(
            "This Python lacks pydoc_data, the source of the prose; install its standard library in full."
        ) from missing
    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = [paragraph for paragraph in _paragraphs(topics[name]) if paragraph not in seen]
        seen.update(paragraphs)
        if paragraphs:
            documents.append(Document(name, tuple(paragraphs), "\n\n"))
    return tuple(documents)


@cache
def code_files() -> tuple[Path, ...]:
    """The standard library's top-level modules that are Python source, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(path for path in sorted(root.glob("*.py")) if not path.name.startswith("_"))
    if not files:
        raise SourceError(f"{root} holds no Python sources, the source of the code; use a Python that has them.")
    return files


@cache
def code_document(path: Path) -> Document:
    """The functions and classes of one module, without docstrings."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    pieces = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            piece = _without_docstrings(node, lines)
            if piece:
                pieces.append(piece)
    return Document(path.name, tuple(pieces), "\n\n")


def prose_text(start: int = 0) -> str:
    """All prose as one text, beginning at the given piece and wrapping around."""
    pieces = [piece for document in prose_documents() for piece in document.pieces]
    start %= len(pieces)
    return "\n\n".join([*pieces[start:], *pieces[:start]])


def _paragraphs(topic: str) -> list[str]:
    found = []
    for block in re.split(r"\n\s*\n", topic):
        paragraph = block.strip("\n")
        if not paragraph or paragraph[0].isspace() or _NOT_PROSE.search(paragraph):
            continue
        text = " ".join(paragraph.split())
        text = _FOOTNOTE.sub("", _EMPHASIS.sub(r"\1", text))
        text = text.removesuffix("..") + "." if text.endswith("..") else text
        # A paragraph ending in a colon introduces a block that was left out.
        if text[0].isupper() and text.endswith((".", ".)")) and len(text.split()) >= MIN_WORDS:
            found.append(text)
    return found


def _without_docstrings(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: Sequence[str]) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    dropped: set[int] = set()
    for inner in ast.walk(node):
        if not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(inner, clean=False) is None:
            continue
        if len(inner.body) == 1:
            return ""
        docstring = inner.body[0]
        # A one-line `def f(): "text"; return 1` is not worth taking apart.
        if docstring.lineno == inner.lineno or docstring.lineno == inner.body[1].lineno:
            return ""
        dropped.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    kept = [lines[at - 1] for at in range(first, (node.end_lineno or first) + 1) if at not in dropped]
    return "\n".join(line.rstrip() for line in kept)
