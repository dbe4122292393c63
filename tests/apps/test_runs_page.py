"""The page of runs in a browser: search, provenance, deletion with confirmation."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import quote

import pytest


@pytest.fixture
def spare(runs_folder: Path):
    """A run that a test may delete."""
    shutil.copytree(runs_folder / "needle", runs_folder / "spare")
    yield "spare"
    shutil.rmtree(runs_folder / "spare", ignore_errors=True)


def test_runs_are_listed_searched_and_explained(visit):
    page = visit("/")
    page.wait_for_selector(".ag-row")
    names = page.locator(".ag-row [col-id=name]").all_text_contents()
    assert set(names) == {"needle", "nasty <b>&'", "scores", "scores-again", "patches"}
    to = "[...document.querySelectorAll('.ag-row [col-id=name] a')].map((a) => a.getAttribute('href'))"
    found = dict(zip(page.locator(".ag-row [col-id=name] a").all_text_contents(), page.evaluate(to), strict=True))
    assert found["scores"] == "/atlas?run=scores" and found["patches"] == "/circuits?run=patches"
    assert found["needle"] == "/pattern?run=needle&pattern=l4h2"
    page.fill("#runs-search", "needle")
    page.until("document.querySelectorAll('.ag-center-cols-container .ag-row').length === 1")
    page.click(".ag-center-cols-container .ag-row [col-id=title]")
    page.wait_for_selector("#runs-chosen dl")
    page.until("location.search.includes('run=needle')")
    assert "search=needle" in page.url
    again = visit("/" + page.url.split("/", 3)[3])
    again.wait_for_selector("#runs-chosen dl")
    assert again.input_value("#runs-search") == "needle" and "L4H2" not in again.title()


def test_hostile_names_are_text(visit):
    page = visit("/?run=" + quote("nasty <b>&'"))
    page.wait_for_selector("#runs-chosen dl")
    assert "onerror=window.hurt=1" in page.text_content("#runs-chosen")
    assert page.locator("main img").count() == 0
    page.click(".ag-row [col-id=name] a:has-text('nasty')")
    page.wait_for_selector("main")


def test_a_run_is_deleted_only_after_a_question(visit, spare, runs_folder):
    page = visit("/")
    page.wait_for_selector(".ag-row")
    page.click(".ag-center-cols-container .ag-row:has(a:text-is('spare')) [col-id=title]")
    page.click("#runs-delete-open")
    page.wait_for_selector("#runs-delete-yes")
    assert page.text_content("#runs-delete-name") == spare
    page.click("#runs-delete-no")
    page.wait_for_selector("#runs-delete-yes", state="hidden")
    assert (runs_folder / spare).is_dir()
    page.click("#runs-delete-open")
    page.click("#runs-delete-yes")
    page.until("!document.querySelector('.ag-center-cols-container').textContent.includes('spare')")
    assert not (runs_folder / spare).exists()


def test_a_narrow_window_shows_page_and_navigation(visit):
    page = visit("/compare?a=scores&b=scores-again", viewport={"width": 800, "height": 900})
    page.wait_for_selector("#compare-table .ag-row")
    # What is clicked has to be on top: a navigation over the page would take it.
    page.click("main h2")
    page.click("nav a:text-is('Runs')")
    page.wait_for_selector("#runs-search")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
