"""The report in a real browser: deep links, sorting, filters, theme, token view, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from workbench.reports import write_report

NASTY = "</script><img src=x onerror=window.hurt=1>"


@pytest.fixture(scope="module")
def address(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(demo, tmp_path_factory.mktemp("report") / "report.html").as_uri()


@contextmanager
def watched(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens pages; at the end there must have been no error and no request but for the file."""
    pages, troubles = [], []

    def note_request(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            troubles.append(request.url)

    def opened(fragment: str = "", url: str = "", **settings: Any) -> Any:
        page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | settings))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", note_request)
        page.goto((url or address) + fragment)
        page.wait_for_selector("html[data-charts]", state="attached")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert troubles == []


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    with watched(browser, address) as opened:
        yield opened


@pytest.fixture(scope="module")
def opened_once(browser: Any, address: str) -> Iterator[Any]:
    with watched(browser, address) as opened:
        yield opened()


@pytest.fixture
def table_page(opened_once: Any) -> Any:
    """The report with its table as at first."""
    opened_once.select_option("[name=size]", label="15")
    opened_once.click("[name=reset]")
    return opened_once


def rows(page: Any) -> list[str]:
    found = page.locator("#all-heads tbody th").all_text_contents()
    assert isinstance(found, list)
    return found


def in_view(page: Any, selector: str) -> bool:
    """Whether an element ends up in view: some time is allowed for, as charts above it are drawn late."""
    inside = (
        "s => { const y = document.querySelector(s)?.getBoundingClientRect().top; return y > -10 && y < innerHeight; }"
    )
    page.wait_for_function(inside, arg=selector, timeout=15_000)
    page.wait_for_timeout(900)
    return bool(page.evaluate(inside, selector))


def test_deep_link_opens_and_marks_a_card(visit: Callable[..., Any]) -> None:
    page = visit("#L18H6")
    assert in_view(page, "#L18H6")
    assert "target" in page.locator("#L18H6").get_attribute("class")
    assert page.evaluate("document.activeElement.textContent") == "L18H6"


def test_deep_link_to_a_head_without_a_card_marks_its_row(visit: Callable[..., Any]) -> None:
    page = visit("#L7H3")
    assert page.locator("[id=L7H3]").count() == 0
    assert in_view(page, "#row-L7H3")
    assert "marked" in page.locator("#row-L7H3").get_attribute("class")


def test_deep_link_clears_a_filter_that_hides_the_head(visit: Callable[..., Any]) -> None:
    page = visit()
    page.fill("[name=text]", "L2")
    page.evaluate("location.hash = '#L7H3'")
    page.wait_for_selector("#row-L7H3.marked")
    assert page.input_value("[name=text]") == ""


def test_click_on_a_map_leads_to_the_head(visit: Callable[..., Any]) -> None:
    page = visit()
    page.locator("[data-figure=map-3]").scroll_into_view_if_needed()
    plot = page.locator("[data-figure=map-3] .nsewdrag")
    plot.wait_for()
    box = plot.bounding_box()
    # induction, layer 18 of 30, head 6 of 9
    page.mouse.click(box["x"] + box["width"] * 6.5 / 9, box["y"] + box["height"] * 18.5 / 30)
    page.wait_for_function("location.hash === '#L18H6'")


def test_hover_on_a_map_shows_the_numbers(visit: Callable[..., Any]) -> None:
    page = visit()
    page.locator("[data-figure=map-3]").scroll_into_view_if_needed()
    plot = page.locator("[data-figure=map-3] .nsewdrag")
    plot.wait_for()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 6.4 / 9, box["y"] + box["height"] * 18.4 / 30)
    page.mouse.move(box["x"] + box["width"] * 6.5 / 9, box["y"] + box["height"] * 18.5 / 30)
    page.wait_for_selector("[data-figure=map-3] .hovertext")
    said = page.locator("[data-figure=map-3] .hovertext").text_content()
    for part in ("L18H6", "0.910", "95 % interval", "null 0.031", "q 0.0"):
        assert part in said


def test_columns_sort_both_ways(table_page: Any) -> None:
    page = table_page
    assert rows(page)[:2] == ["L0H0", "L0H1"]
    header = page.locator("#all-heads thead th").nth(4)
    header.locator("button").click()
    assert rows(page)[:4] == ["L18H6", "L20H1", "L11H4", "L22H8"]
    assert header.get_attribute("aria-sort") == "descending"
    header.locator("button").click()
    assert "L18H6" not in rows(page)
    assert header.get_attribute("aria-sort") == "ascending"


def test_text_filter_means_layers_and_heads(table_page: Any) -> None:
    page = table_page
    page.fill("[name=text]", "L1")
    assert rows(page) == [f"L1H{head}" for head in range(9)]
    page.fill("[name=text]", "l18h6, H2")
    assert page.locator(".count").text_content() == "31 of 270 heads"
    page.fill("[name=text]", "L99")
    assert rows(page) == []
    page.click("[name=reset]")
    assert page.locator(".count").text_content() == "270 of 270 heads"


def test_threshold_filter_starts_at_the_published_value(table_page: Any) -> None:
    page = table_page
    page.select_option("[name=detector]", label="Induction")
    assert page.input_value("[name=least]") == "0.4"
    assert rows(page) == ["L18H6", "L20H1", "L11H4", "L22H8"]
    page.fill("[name=least]", "0.7")
    assert rows(page) == ["L18H6", "L20H1"]
    page.select_option("[name=detector]", label="Active-dormant contrast")
    assert "L16H4" in rows(page)
    assert page.locator(".bound").text_content() == "at least ±"
    page.select_option("[name=detector]", label="Entropy")
    assert page.input_value("[name=least]") == ""


def test_pages_of_the_table(table_page: Any) -> None:
    page = table_page
    assert len(rows(page)) == 15
    page.click("[name=next]")
    assert rows(page)[0] == "L1H6"
    page.select_option("[name=size]", label="all")
    assert len(rows(page)) == 270


def test_cells_have_value_interval_and_q(table_page: Any) -> None:
    page = table_page
    page.fill("[name=text]", "L18H6")
    cell = page.locator("#row-L18H6 td").nth(3)
    assert cell.locator(".value").text_content() == "0.91"
    assert " to " in cell.locator(".span").text_content()
    assert cell.locator(".q").text_content().startswith("q 0.0")
    assert "passes" in cell.get_attribute("class")
    assert page.locator("#row-L18H6 td").nth(5).text_content() == "–", "a score that could not be taken"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_system_and_the_button(visit: Callable[..., Any], scheme: str) -> None:
    page = visit(color_scheme=scheme)
    page_colour = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(251, 251, 249)", "dark": "rgb(18, 22, 27)"}
    assert page.evaluate(page_colour) == colours[scheme]
    other = {"light": "dark", "dark": "light"}[scheme]
    page.locator("[data-figure=map-0]").scroll_into_view_if_needed()
    page.wait_for_selector("[data-figure=map-0] .hm")
    ink = "getComputedStyle(document.querySelector('[data-figure=map-0] .xtick text')).fill"
    before = page.evaluate(ink)
    page.click("#theme")
    assert page.evaluate(page_colour) == colours[other]
    assert page.get_attribute("#theme", "aria-pressed") == str(other == "dark").lower()
    assert page.evaluate(ink) != before, "charts follow"
    page.reload()
    assert page.evaluate(page_colour) == colours[other], "the choice is kept"


def test_token_view_follows_pointer_click_and_keys(visit: Callable[..., Any]) -> None:
    page = visit("#L18H6")
    card = page.locator("#L18H6")
    words, says = card.locator(".word"), card.locator(".says")
    assert words.count() == 37
    assert "“the” at position 9 attends to “code”" in says.text_content()
    words.nth(6).hover()
    assert "at position 6" in says.text_content()
    assert "masked" in words.nth(7).get_attribute("class")
    words.nth(6).click()
    words.nth(9).hover()
    assert "at position 6" in says.text_content(), "a click keeps the choice"
    page.keyboard.press("ArrowRight")
    assert "at position 7" in says.text_content()
    page.keyboard.press("Enter")
    assert words.nth(7).get_attribute("aria-pressed") == "true"


def test_shading_is_the_attention_without_the_first_token(visit: Callable[..., Any]) -> None:
    page = visit("#L14H2")
    words = page.locator("#L14H2 .word")
    assert words.nth(0).evaluate("word => word.style.background") == ""
    assert float(words.nth(0).evaluate("word => word.style.getPropertyValue('--mass')")) > 0.5


def test_head_selector_changes_words_and_map(visit: Callable[..., Any]) -> None:
    page = visit("#patterns")
    explorer = page.locator("#explorer")
    explorer.locator("select").select_option(label="L3H5 · A code word, asked for later")
    assert "attends to" in explorer.locator(".says").text_content()
    assert "L3H5" in explorer.locator("figcaption").text_content()
    assert explorer.locator(".canvas").get_attribute("data-figure").startswith("pattern-")
    explorer.locator(".word").nth(5).hover()
    assert explorer.locator(".arcs path").count() >= 1
    explorer.locator("#incoming").check()
    assert "is attended to by" in explorer.locator(".says").text_content()
    explorer.locator("#arcs").uncheck()
    assert explorer.locator(".arcs path").count() == 0


def test_link_from_a_card_opens_the_large_view(visit: Callable[..., Any]) -> None:
    page = visit("#L3H5")
    page.locator("#L3H5 [data-open-pattern]").click()
    assert page.locator("#explorer select option:checked").text_content().startswith("L3H5")


def test_page_never_scrolls_sideways(visit: Callable[..., Any]) -> None:
    page = visit()
    for width in (400, 800, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_print_draws_all_figures_in_light_colours(visit: Callable[..., Any]) -> None:
    page = visit(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    figures = page.locator(".canvas[data-figure]")
    assert page.locator(".canvas .main-svg[viewBox]").count() >= figures.count()
    assert page.locator(".canvas[aria-busy]").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("header.bar").is_visible()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme ?? ''") == ""


def test_print_has_every_row_of_the_table(visit: Callable[..., Any]) -> None:
    page = visit()
    page.click("[name=next]")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert len(rows(page)) == 270
    page.emulate_media(media="print")
    assert not page.locator(".left-out").is_visible()
    page.emulate_media(media="screen")
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert rows(page)[0] == "L1H6", "the reader's page is back"
    assert len(rows(page)) == 15
    page.fill("[name=text]", "L1")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert len(rows(page)) == 9
    page.emulate_media(media="print")
    assert page.locator(".left-out").text_content().startswith("261 of 270 heads are left out by the filter")
    assert page.locator(".left-out").is_visible()


def test_table_fits_a_laptop_and_shows_where_it_is_cut(visit: Callable[..., Any], demo: Any, tmp_path: Path) -> None:
    scores, about = demo.table("head_scores"), demo.table("detectors")
    more = [f"previous_token_{i}" for i in range(3)]
    twin = scores[scores["detector"] == "previous_token"]
    row = about[about["detector"] == "previous_token"]
    frames = {
        "head_scores": pd.concat([scores, *(twin.assign(detector=name) for name in more)]),
        "detectors": pd.concat([about, *(row.assign(detector=name, title="Copies after a needle") for name in more)]),
    }
    eleven = replace(demo, frames=demo.frames | frames)
    page = visit(url=write_report(eleven, tmp_path / "eleven.html").as_uri())
    fits = "(box => box.scrollWidth <= box.clientWidth)(document.querySelector('#all-heads .scroll'))"
    assert page.evaluate(fits)
    page.set_viewport_size({"width": 700, "height": 900})
    assert not page.evaluate(fits)
    first = page.locator("#all-heads tbody th").first
    before = first.bounding_box()["x"]
    page.evaluate("document.querySelector('#all-heads .scroll').scrollLeft = 200")
    assert first.bounding_box()["x"] == pytest.approx(before), "the heads' names stay"
    assert "gradient" in page.evaluate("getComputedStyle(document.querySelector('#all-heads .scroll')).backgroundImage")


def test_score_like_the_null_is_marked_and_not_bold(visit: Callable[..., Any], demo: Any, tmp_path: Path) -> None:
    scores = demo.table("head_scores").copy()
    scores.loc[scores["detector"] == "retrieval", "q"] = 0.4
    run = replace(demo, frames=demo.frames | {"head_scores": scores})
    page = visit("#L18H6", url=write_report(run, tmp_path / "weak.html").as_uri())
    weight = "e => Number(getComputedStyle(e).fontWeight)"
    cells = page.locator("#row-L18H6 td")
    assert cells.nth(3).locator(".value").evaluate(weight) >= 600
    assert cells.nth(4).locator(".value").evaluate(weight) < 600
    assert "○" in cells.nth(4).locator(".value").evaluate("e => getComputedStyle(e, '::before').content")
    bars = page.locator("#L18H6 .bar-row")
    assert bars.nth(3).locator(".name").evaluate(weight) >= 600
    assert bars.nth(4).locator(".name").evaluate(weight) < 600
    assert "not distinguished" in bars.nth(4).text_content()


def test_link_to_a_head_that_does_not_exist_is_answered(visit: Callable[..., Any]) -> None:
    page = visit("#L99H9")
    notice = page.locator("#unknown")
    notice.wait_for()
    assert "No head L99H9 in this model: it has 30 layers of 9 heads." in notice.text_content()
    notice.locator("button").click()
    assert not notice.is_visible()
    page.evaluate("location.hash = '#L3H9'")
    notice.wait_for()
    page.evaluate("location.hash = '#L18H6'")
    notice.wait_for(state="hidden")


def test_trace_is_read_token_by_token(visit: Callable[..., Any], traced: Any, tmp_path: Path) -> None:
    page = visit("#L4H2", url=write_report(traced, tmp_path / "trace.html").as_uri())
    assert in_view(page, "#row-L4H2")
    page.locator("[data-figure=statistic-1]").scroll_into_view_if_needed()
    page.wait_for_selector("[data-figure=statistic-1] .hm")
    view = page.locator("#reading")
    view.locator("[name=statistic]").select_option(label="first token")
    assert view.locator("[name=head] option:checked").text_content() == "L4H2"
    words = view.locator(".word")
    assert words.count() == 37
    words.nth(9).hover()
    assert "“the” at position 9, L4H2: first token 0.97" in view.locator(".says").text_content()
    assert words.nth(9).evaluate("word => word.style.background") != ""
    assert words.nth(0).evaluate("word => word.style.background") == "", "position 0 is left out of the colours"
    view.locator("[name=head]").select_option(label="L7H2")
    words.nth(9).focus()
    page.keyboard.press("Home")
    assert "at position 0, L7H2: first token 1.00" in view.locator(".says").text_content()


def test_controls_of_direction_cannot_reorder_the_page(
    visit: Callable[..., Any], run_with_tokens: Callable[..., Any], traced_with: Callable[..., Any], tmp_path: Path
) -> None:
    tokens = ["a\u202ebc", " \u2066x", "\u05d0\u05d1", "z\u200f"] * 3
    page = visit("#L18H6", url=write_report(run_with_tokens(tokens), tmp_path / "bidi.html").as_uri())
    first = page.locator("#L18H6 .word").first
    assert first.text_content() == "a\\u202ebc"
    assert first.evaluate("word => getComputedStyle(word).unicodeBidi") == "isolate"
    assert page.locator("#L18H6 .word").nth(2).text_content() == "\u05d0\u05d1", "letters of any script stay"
    # words of a script that runs to the left keep the order of the tokens
    lefts = [page.locator("#L18H6 .word").nth(i).bounding_box()["x"] for i in range(4)]
    assert lefts == sorted(lefts)
    page = visit(url=write_report(traced_with(tokens), tmp_path / "bidi-trace.html").as_uri())
    assert page.locator("#reading .word").first.text_content() == "a\\u202ebc"
    controls = "/[\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]/.test(document.documentElement.textContent)"
    assert not page.evaluate(f"document.querySelectorAll('script').forEach(s => s.remove()), {controls}")


def test_packed_file_draws_the_same(visit: Callable[..., Any], demo: Any, tmp_path: Path) -> None:
    packed = write_report(demo, tmp_path / "packed.html", gallery=True)
    page = visit(url=packed.as_uri())
    page.locator("[data-figure=map-0]").scroll_into_view_if_needed()
    page.wait_for_selector("[data-figure=map-0] .hm")


def test_markup_in_tokens_stays_text(
    visit: Callable[..., Any], run_with_tokens: Callable[..., Any], tmp_path: Path
) -> None:
    run = run_with_tokens([NASTY, "a", f" {NASTY}", "<a href='https://example.org'>x</a>"] * 3)
    page = visit("#L18H6", url=write_report(run, tmp_path / "nasty.html").as_uri())
    assert page.locator("#L18H6 .word").first.text_content() == NASTY
    page.locator("#explorer .canvas").scroll_into_view_if_needed()
    page.wait_for_selector("#explorer .hm")
    assert page.evaluate("window.hurt") is None
    assert page.locator("img").count() == 0
    assert page.locator("#explorer a").count() == 0


def test_run_without_scores_and_without_charts_opens(visit: Callable[..., Any], demo: Any, tmp_path: Path) -> None:
    bare = demo.without(*demo.tables, *demo.arrays)
    page = visit(url=write_report(bare, tmp_path / "bare.html").as_uri())
    assert page.locator("#maps .missing").is_visible()
    slim = write_report(demo, tmp_path / "slim.html", budget_bytes=150_000)
    page = visit(url=slim.as_uri())
    assert len(rows(page)) == 15
    assert page.locator("#omitted").is_visible()
