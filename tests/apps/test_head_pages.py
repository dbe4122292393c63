"""Atlas, head, compare and circuits in a browser: what is chosen on one part shows on the others and in the address."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

DRAWN = "document.querySelectorAll('.js-plotly-plot .main-svg').length > 0"


def query(page):
    return {key: value[0] for key, value in parse_qs(urlparse(page.url).query).items()}


def click_cell(area, across, down):
    """Click a map at shares of its width and height."""
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    area.click(position={"x": box["width"] * across, "y": box["height"] * down})


def test_choosing_heads_joins_table_scatter_and_address(visit):
    page = visit("/atlas?run=scores")
    page.until(DRAWN)
    page.wait_for_selector("#atlas-table .ag-row")
    page.click("#atlas-table .ag-row[row-id='L1H2'] .ag-checkbox-input")
    page.until("location.search.includes('heads=L1H2')")
    page.until("document.querySelector('#atlas-scatter .js-plotly-plot').data[0].selectedpoints?.length === 1")
    assert "1 chosen: L1H2" in page.text_content("#atlas-selected")
    page.click("#atlas-keep")
    page.until("document.querySelector('#set-size').textContent === '1 head chosen'")

    again = visit("/atlas?" + urlparse(page.url).query)
    again.until(DRAWN)
    again.until("document.querySelector('#atlas-selected').textContent.includes('L1H2')")
    again.click("#atlas-clear")
    again.until("!location.search.includes('heads=')")


def test_axes_filters_and_maps_follow_the_address(visit):
    page = visit("/atlas?run=scores&maps=sink,retrieval&x=retrieval&y=sink&colour=induction&size=sink&q=0.5&by=sink")
    page.until(DRAWN)
    title = "document.querySelector('#atlas-scatter .js-plotly-plot').layout.xaxis.title.text"
    assert "Retrieval" in page.evaluate(title) and "<img" not in page.evaluate(title)
    assert page.locator("#atlas-map-graph .js-plotly-plot").count() == 1
    page = visit("/atlas?run=scores&x=nonsense&q=-3&maps=nothing&heads=L1H2,L9H9,foo")
    page.until(DRAWN)
    told = page.text_content("#not-honoured")
    assert re.search(r"x=nonsense: there is no such choice here; \w+ is taken\.", told)
    assert "q=-3: a number from 0 to 1 is needed; 1 is taken." in told and "maps=nothing" in told
    assert "heads=L9H9: the run has no such head" in told and "heads=foo: this names no head" in told
    assert page.text_content("#atlas-selected") == "1 chosen: L1H2"
    page = visit("/head?run=scores&head=<b>")
    assert "head=<b>: this names no head, as L18H6 does; L0H0 is shown." in page.text_content("#not-honoured")
    assert visit("/atlas?run=scores&x=sink&q=0.5&heads=L1H2").locator("#not-honoured").count() == 0


def test_a_map_cell_chooses_its_head(visit):
    page = visit("/atlas?run=scores&maps=sink")
    page.until("document.querySelectorAll('#atlas-map-graph .js-plotly-plot .hm').length > 0")
    click_cell(page.locator("#atlas-map-graph .nsewdrag").first, 0.12, 0.5)
    page.until("location.search.includes('heads=L2H0')")


def test_a_head_has_its_evidence_and_a_note_that_stays(visit, runs_folder):
    page = visit("/head?run=scores&head=L1H2")
    page.until(DRAWN)
    text = page.text_content("main")
    for words in ("Head L1H2", "Keys by mean attention", "Causal evidence", "First-token", "earlier copy"):
        assert words.lower() in text.lower(), words
    page.wait_for_selector("#head-causal .ag-row")
    page.fill("#head-note", "looks <b>back</b>")
    page.click("#head-note-save")
    page.until("document.querySelector('#head-note-said').textContent.startsWith('Saved')")
    again = visit("/head?run=scores&head=L1H2")
    again.wait_for_selector("#head-note")
    assert again.input_value("#head-note") == "looks <b>back</b>"
    page = visit("/head?run=scores&head=L9H9")
    assert "no scores of L9H9" in page.text_content("main")


def test_a_note_that_another_browser_changed_is_not_written_over(visit, runs_folder):
    path = "/head?run=scores-again&head=L0H3"
    first, second = visit(path), visit(path)
    for page, text in ((first, "the first's"), (second, "the second's")):
        page.until(DRAWN)
        page.fill("#head-note", text)
        page.click("#head-note-save")
        answered = "['said', 'other'].some((part) => document.getElementById('head-note-' + part).textContent)"
        page.until(answered)
    notes = runs_folder / "scores-again" / "notes.json"
    assert "the first's" in notes.read_text() and "the second's" not in notes.read_text()
    assert second.input_value("#head-note") == "the second's"
    assert second.text_content("#head-note-stored") == "the first's"
    second.click("#head-note-save")
    second.until("document.querySelector('#head-note-said').textContent.startsWith('Saved')")
    assert "the second's" in notes.read_text() and second.locator("#head-note-stored").count() == 0
    first.click("#head-note-save")
    first.wait_for_selector("#head-note-stored")
    assert "the second's" in notes.read_text() and first.input_value("#head-note") == "the first's"
    notes.unlink()


@pytest.mark.parametrize(
    "where",
    [
        "/atlas?run=scores&maps=induction&x=induction&y=sink&q=0.5&by=induction&heads=L0H1",
        # The filter hides the chosen heads from the table; they stay chosen.
        "/atlas?run=scores&maps=sink&x=induction&y=sink&q=0.01&by=induction&heads=L0H1,L2H3",
        "/atlas?run=scores",
        "/atlas",
        "/head?run=scores&head=L1H2&tokens=+river",
        "/lab?heads=L0H0,L1H2&how=frozen_zero&strength=0.5&draws=20",
        "/compare?a=scores&b=scores-again&detector=sink",
        "/circuits?run=patches&edges=1",
        "/pattern?run=needle",
        "/?run=needle&search=needle",
    ],
)
def test_an_address_is_not_rewritten_by_the_page_that_it_opens(visit, where):
    page = visit(where)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1200)
    path, mark, fields = where.partition("?")
    found = page.evaluate("location.pathname + location.search")
    # The zoomable pattern adds where its view is.
    assert found.startswith(f"{where}&row=") if path == "/pattern" else found == path + mark + fields
    if "heads=" in where and path == "/atlas":
        assert f"{fields.split('heads=')[1].count(',') + 1} chosen" in page.text_content("#atlas-selected")


def test_two_runs_are_compared(visit):
    page = visit("/compare?a=scores&b=scores-again&detector=sink")
    page.until(DRAWN)
    page.wait_for_selector("#compare-table .ag-row")
    assert page.locator("figure").count() == 2
    page = visit("/compare?a=scores&b=needle")
    assert "no head scores" in page.text_content("main")


def test_a_patch_is_told_pair_by_pair_and_edges_are_thinned(visit):
    page = visit("/circuits?run=patches")
    page.until(DRAWN)
    page.wait_for_selector("#circuits-graph canvas")
    assert "3 of 3 edges" in page.text_content("#circuits-shown")
    page.until("document.querySelectorAll('.js-plotly-plot .hm').length > 0")
    click_cell(page.locator("main .nsewdrag").first, 0.12, 0.1)
    page.wait_for_selector("#circuits-prompts .ag-row")
    assert query(page)["cell"].startswith("L") and "Patch of L" in page.text_content("#circuits-cell")
    assert page.input_value("#circuits-choose") == query(page)["cell"]
    # Without a mouse: a part of the name, arrow, Enter.
    page.focus("#circuits-choose")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("L3H2")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.until("document.querySelector('#circuits-cell').textContent.includes('Patch of L3H2')")
    assert query(page)["cell"] == "L3H2"
    page = visit("/circuits?run=patches&edges=1&cell=L0H1")
    page.wait_for_selector("#circuits-prompts .ag-row")
    assert "1 of 3 edges" in page.text_content("#circuits-shown")


def test_figures_are_saved_as_pictures_and_numbers(visit):
    page = visit("/compare?a=scores&b=scores-again&detector=sink")
    page.until(DRAWN)
    for kind, start in (("csv", b"series,x,y"), ("svg", b"<svg"), ("png", b"\x89PNG")):
        with page.expect_download() as waiting:
            page.locator(f"figure [data-export={kind}]").first.click()
        content = Path(waiting.value.path()).read_bytes()
        assert content.startswith(start) and waiting.value.suggested_filename.endswith(f".{kind}")
        assert kind != "csv" or content.count(b"\r\n") > 20
