"""Numbers and texts as figures and reports write them."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.figures.text import in_order, interval, number, probability, readable, safe, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.934, "0.93"),
        (0.0534, "0.053"),
        (0.0012, "0.0012"),
        (-1.5, "−1.50"),
        (0, "0"),
        (12_345.6, "12,346"),
        (0.0000123, "1.2e−05"),
        (float("nan"), "–"),
        (None, "–"),
        (float("-inf"), "−∞"),
        (np.float32(0.5), "0.50"),
        (np.int64(3), "3.00"),
    ],
)
def test_number(value: object, text: str) -> None:
    assert number(value) == text


def test_number_with_fixed_places_writes_no_negative_zero() -> None:
    assert number(-0.0004, places=2) == "0.00"
    assert number(0.005, places=3) == "0.005"


def test_bounds_of_an_interval_share_their_decimals() -> None:
    assert interval(0.0061, 0.03) == "0.006 to 0.030"
    assert interval(-0.5, 1.25) == "−0.50 to 1.25"
    assert interval(float("nan"), 1.0) == ""


def test_signed_and_probability() -> None:
    assert [signed(0.5), signed(-0.5), signed(0.0)] == ["+0.50", "−0.50", "0.00"]
    assert [probability(v) for v in (0.00001, 0.004, 0.25, None)] == ["< 0.001", "0.004", "0.25", "–"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("first_1", "first token"),
        ("first_4, code", "first 4 tokens, code"),
        ("offset_-3", "token at offset −3"),
        ("answer_log_prob", "answer log-probability"),
        ("needle_recall", "needle recall"),
    ],
)
def test_names_for_readers(name: str, text: str) -> None:
    assert readable(name) == text


def test_tokens_cannot_bring_markup_into_a_figure() -> None:
    assert safe("</script><img onerror=x>") == "&lt;/script&gt;&lt;img onerror=x&gt;"
    assert safe(" the\n") == "␣the↵"
    assert safe("\x07") == "\\x07"
    assert safe("a\u202eb") == "a\\u202eb"
    assert safe("") == "∅"


def test_controls_of_direction_become_escapes_and_letters_stay() -> None:
    assert in_order("a\u202eb\u2066\u200f") == "a\\u202eb\\u2066\\u200f"
    assert in_order("\u05d0\u05d1 \u0627\n") == "\u05d0\u05d1 \u0627\n"


def test_what_is_far_below_its_companions_is_zero() -> None:
    assert signed(-2.0e-8, beside=(0.62, 0.62)) == "0.00"
    assert signed(-3.0e-5, beside=(0.62, 0.62)) == "0.00"
    assert signed(-0.003, beside=(0.62, 0.617)) == "−0.0030"
    assert signed(2.0e-5, beside=(1e-4, 1.2e-4)) == "+2.0e−05"
    assert number(1e-17, beside=(0.62,)) == "0.00"
    assert interval(-3e-8, 1e-8) == "0.00 to 0.00"
