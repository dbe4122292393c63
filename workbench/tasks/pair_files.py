"""Pairs of one's own from a JSONL or CSV file (UTF-8).

Fields of a line, CSV columns of the same names; others are refused:

* ``clean``, ``corrupt``: the prompts, of equally many tokens (required);
* ``answer``: what counts as right behind the clean prompt, one token with its leading space, or a list of such (in CSV
  separated by ``|``; required);
* ``foil``: likewise, what counts against it (may be missing only for the metric "log_probability");
* ``reference``: a prompt without the task's information, for mean ablation (in all lines or in none);
* ``roles``: role -> words of the clean prompt, as ``{"S": "John"}`` or, where they come more than once,
  ``{"S2": ["John", 2]}`` for the second time; in CSV the same as JSON.  The columns are those of the clean prompt;
* ``template``: a name for prompts that belong together.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from workbench.errors import RequestError
from workbench.tasks.encoding import encode
from workbench.tasks.pair_texts import Filled, Pair, assemble, beginning, continuation
from workbench.tasks.pairs import PairTask

LARGEST_BYTES = 16 * 2**20
MOST_PAIRS = 10_000
LONGEST_TEXT = 100_000
FIELDS = ("clean", "corrupt", "answer", "foil", "reference", "roles", "template")
SUFFIXES = (".jsonl", ".csv")


def pairs_from_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    metric: str = "logit_difference",
    bos: bool | None = None,
) -> PairTask:
    """Read pairs; what does not fit is refused with its line, its field and its value.

    ``bos``: None does what the tokenizer does, True puts a start token before each prompt, False none.
    """
    file = Path(path)
    pairs: list[Pair] = []
    first = 0
    for line, fields in _rows(file):
        if len(pairs) == MOST_PAIRS:
            raise RequestError(f"{file}, line {line}: more than {MOST_PAIRS} pairs; split the file.")
        pair = _pair(tokenizer, f"{file}, line {line}", fields, metric)
        first = first or line
        if pairs and (pair.reference is None) != (pairs[0].reference is None):
            raise RequestError(f"{file}, line {line}: 'reference' is in some lines only (not as in line {first}).")
        if pairs and set(pair.clean.places) != set(pairs[0].clean.places):
            raise RequestError(
                f"{file}, line {line}: roles {sorted(pair.clean.places)} differ from those of line {first}, "
                f"{sorted(pairs[0].clean.places)}; name the same roles in all lines."
            )
        pairs.append(pair)
    if not pairs:
        raise _no_pairs(file)
    beginning(tokenizer, bos)
    caption = f"from {file.name}"
    return assemble(tokenizer, pairs, name=file.stem, caption=caption, seed=0, bos=bos, metric=metric)


def count_pairs(path: str | Path, *, metric: str = "logit_difference") -> int:
    """How many pairs a file has; refuses, as `pairs_from_file` does, what can be seen without a tokenizer."""
    file = Path(path)
    count = 0
    for line, fields in _rows(file):
        if count == MOST_PAIRS:
            raise RequestError(f"{file}, line {line}: more than {MOST_PAIRS} pairs; split the file.")
        where = f"{file}, line {line}"
        texts, _ = _plain(where, fields, metric)
        if texts["clean"] == texts["corrupt"]:
            raise _equal(where, texts["clean"])
        for name in ("answer", "foil"):
            for word in _words(fields.get(name, [])):
                _string(where, name, word)
        count += 1
    if not count:
        raise _no_pairs(file)
    return count


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _text(file)
    return _json_lines(text, file) if file.suffix.lower() == ".jsonl" else _csv_lines(text, file)


def _no_pairs(file: Path) -> RequestError:
    return RequestError(f"{file} has no pairs; write one a line with the fields clean, corrupt, answer and foil.")


def _equal(where: str, clean: str) -> RequestError:
    return RequestError(f"{where}: field 'corrupt' ({_short(clean)}) equals 'clean'; change one word.")


def _words(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _text(file: Path) -> str:
    if file.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{file} is neither {' nor '.join(SUFFIXES)}; save the pairs as one of these.")
    try:
        if not file.is_file():
            raise RequestError(f"There is no file {file}; check the path.")
        with file.open("rb") as opened:
            # What grows while it is read is refused, too.
            found = opened.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error.strerror}); check its permissions.") from error
    if len(found) > LARGEST_BYTES:
        raise RequestError(f"{file} is larger than {LARGEST_BYTES // 2**20} MiB; split it into several files.")
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = found[: error.start].count(b"\n") + 1
        raise RequestError(
            f"{file}, line {line}: byte 0x{found[error.start]:02x} is not UTF-8; save the file as UTF-8."
        ) from error


def _json_lines(text: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Only line feeds end a line: JSON strings may hold other separators.
    for line, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        yield line, _json(written, f"{file}, line {line}", "the line")


def _json(written: str, where: str, what: str) -> dict[str, Any]:
    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise RequestError(f"{where}: {twice[0]!r} comes twice in {what}; keep one.")
        return dict(items)

    try:
        found = json.loads(written, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"{where}: {what} is no JSON ({error.msg} at character {error.pos + 1}: {_short(written)}); write one "
            "object, on one line."
        ) from error
    except RecursionError as error:
        raise RequestError(f"{where}: {what} is nested too deeply; write a flat object.") from error
    if not isinstance(found, dict):
        raise RequestError(f"{where}: {_short(found)} is no JSON object; write {{...}} for {what}.")
    return found


def _csv_lines(text: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if len(set(names)) < len(names):
            raise RequestError(f"{file}, line 1: a column comes twice in {names}; keep one.")
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if None in row or None in row.values():
                raise RequestError(
                    f"{where}: there are not {len(names)} fields as in line 1; put texts with commas in quotes."
                )
            fields: dict[str, Any] = {name: value for name, value in row.items() if value}
            for name in ("answer", "foil"):
                if name in fields:
                    fields[name] = fields[name].split("|")
            if "roles" in fields:
                fields["roles"] = _json(fields["roles"], where, "the field 'roles'")
            yield reader.line_num, fields
    except csv.Error as error:
        raise RequestError(f"{file}, line {reader.line_num}: no CSV ({error}); check the quotes.") from error


def _plain(where: str, fields: Mapping[str, Any], metric: str) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Texts and places of a line, for which no tokenizer is needed."""
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise RequestError(f"{where}: field {unknown[0]!r} is unknown; choose from {', '.join(FIELDS)}.")
    needed = ("clean", "corrupt", "answer", *(() if metric == "log_probability" else ("foil",)))
    missing = [name for name in needed if name not in fields]
    if missing:
        raise RequestError(f"{where}: field {missing[0]!r} is missing; each pair needs {', '.join(needed)}.")
    texts = {name: _string(where, name, fields[name]) for name in ("clean", "corrupt", "reference", "template")
             if name in fields}  # fmt: skip
    return texts, _places(where, texts["clean"], fields.get("roles", {}))


def _pair(tokenizer: PreTrainedTokenizerBase, where: str, fields: Mapping[str, Any], metric: str) -> Pair:
    texts, places = _plain(where, fields, metric)
    clean = texts["clean"]
    _same_length(tokenizer, where, texts)
    if encode(tokenizer, clean).ids == encode(tokenizer, texts["corrupt"]).ids:
        raise _equal(where, clean)
    answers = {name: _answers(tokenizer, where, name, clean, fields.get(name, [])) for name in ("answer", "foil")}
    both = set(answers["answer"]) & set(answers["foil"])
    if both:
        raise RequestError(f"{where}: token {min(both)} is both 'answer' and 'foil' ({fields['foil']!r}); change one.")
    return Pair(
        clean=Filled(clean, places),
        corrupt=_at_columns(tokenizer, clean, texts["corrupt"], places),
        answers=answers["answer"],
        foils=answers["foil"],
        info={"template": texts.get("template")} if "template" in texts else {},
        reference=_at_columns(tokenizer, clean, texts["reference"], places) if "reference" in texts else None,
    )


def _string(where: str, name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{where}: field {name!r} is {_short(value)}; give a text.")
    if len(value) > LONGEST_TEXT:
        raise RequestError(f"{where}: field {name!r} has {len(value)} characters; at most {LONGEST_TEXT} are read.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise RequestError(f"{where}: field {name!r} has half a surrogate pair ({_short(value)}); write valid Unicode.")
    return value


def _same_length(tokenizer: PreTrainedTokenizerBase, where: str, texts: Mapping[str, str]) -> None:
    wanted = len(encode(tokenizer, texts["clean"]).ids)
    for name in ("corrupt", "reference"):
        found = wanted if name not in texts else len(encode(tokenizer, texts[name]).ids)
        if found != wanted:
            raise RequestError(
                f"{where}: field {name!r} ({_short(texts[name])}) has {found} tokens and 'clean' {wanted}; replace "
                "words by others of as many tokens."
            )


def _answers(tokenizer: PreTrainedTokenizerBase, where: str, name: str, clean: str, value: object) -> tuple[int, ...]:
    found = []
    for one in _words(value):
        word = _string(where, name, one)
        token = continuation(tokenizer, clean, word)
        if token is None:
            other = word[1:] if word.startswith(" ") else f" {word}"
            advice = f"{other!r} is one" if continuation(tokenizer, clean, other) is not None else "choose another word"
            raise RequestError(
                f"{where}: field {name!r}: {_short(word)} is not one token behind {clean[-20:]!r}; {advice}."
            )
        found.append(token)
    return tuple(dict.fromkeys(found))


def _places(where: str, clean: str, roles: object) -> dict[str, tuple[int, int]]:
    if not isinstance(roles, dict):
        raise RequestError(f"{where}: field 'roles' is {_short(roles)}; give an object, role: words.")
    places = {}
    for role, value in roles.items():
        words, time = value if isinstance(value, list) and len(value) == 2 else (value, None)
        if not isinstance(words, str) or not words.strip() or isinstance(time, bool):
            raise RequestError(f"{where}: role {role!r} is {_short(value)}; give words, or [words, which time].")
        starts = [at for at in range(len(clean)) if clean.startswith(words, at)]
        if time is None and len(starts) > 1:
            raise RequestError(
                f"{where}: role {role!r}: {_short(words)} comes {len(starts)} times in 'clean'; say which: "
                f"{json.dumps([words, 1])}."
            )
        if not isinstance(time, int | None) or not 1 <= (time or 1) <= len(starts):
            raise RequestError(
                f"{where}: role {role!r} is {_short(value)}; {_short(words)} comes {len(starts)} times in 'clean'."
            )
        first = starts[(time or 1) - 1]
        places[role] = (first, first + len(words))
    return places


def _at_columns(
    tokenizer: PreTrainedTokenizerBase, clean: str, other: str, places: Mapping[str, tuple[int, int]]
) -> Filled:
    """Another text of as many tokens, with each role at the clean prompt's column."""
    columns = {role: encode(tokenizer, clean).tokens_in(*place)[1] - 1 for role, place in places.items()}
    offsets = encode(tokenizer, other).offsets
    return Filled(other, {role: offsets[column] for role, column in columns.items()})


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
