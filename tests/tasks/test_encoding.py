from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from workbench.errors import RequestError
from workbench.tasks.encoding import default_prefix, encode, padding_id, special_ids, start_token


def test_the_policy_names_what_the_tokenizer_adds_before_a_text(bare, starting):
    assert default_prefix(bare).ids == ()
    assert "nothing" in default_prefix(bare).policy
    assert default_prefix(starting).ids == (0,)
    assert "<s>" in default_prefix(starting).policy


def test_a_start_token_can_be_asked_for_where_none_is_added(bare):
    assert start_token(bare).ids == (0,)


def test_the_end_token_stands_in_for_a_missing_start_token(bare):
    no_start = PreTrainedTokenizerFast(tokenizer_object=bare.backend_tokenizer, eos_token="</s>")
    assert start_token(no_start).ids == (1,)
    assert "for want of" in start_token(no_start).policy
    neither = PreTrainedTokenizerFast(tokenizer_object=bare.backend_tokenizer)
    with pytest.raises(RequestError, match="bos=False"):
        start_token(neither)
    assert padding_id(neither) == 0
    assert padding_id(no_start) == 1


def test_special_ids_hold_all_special_tokens(bare):
    assert {0, 1, 2, 3} <= special_ids(bare)
    assert max(special_ids(bare)) == 3


def test_offsets_leave_leading_space_out_and_cover_all_characters(tokenizer):
    text = "The keeper of Varn hides  a compass.\n\nBehind: “barrels”."
    encoded = encode(tokenizer, text)
    assert 0 not in encoded.ids
    covered = {at for first, last in encoded.offsets for at in range(first, last)}
    assert {at for at, letter in enumerate(text) if not letter.isspace()} <= covered
    for first, last in encoded.offsets:
        assert first == last or not text[first].isspace()


def test_tokens_of_a_span_decode_to_it(tokenizer):
    text = "The lighthouse keeper hides her compass behind the third blue barrel. And more."
    words = "compass behind the third blue barrel"
    encoded = encode(tokenizer, text)
    first = text.index(words)
    begin, end = encoded.tokens_in(first, first + len(words))
    assert tokenizer.decode(list(encoded.ids[begin:end])).strip() == words
    with pytest.raises(RequestError, match="No token"):
        encoded.tokens_in(len(text), len(text) + 5)
