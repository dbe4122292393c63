"""Export of pages: the report of the run that is shown, within its budget, whatever texts the run holds."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from threading import Event, Thread

import pytest

from workbench.apps import export
from workbench.apps.address import Query
from workbench.apps.context import Context
from workbench.apps.library import RunLibrary
from workbench.apps.live import Live
from workbench.apps.pages import PAGES
from workbench.apps.readings import _file, asked_of
from workbench.apps.server import create_app
from workbench.apps.settings import AppSettings
from workbench.errors import RequestError
from workbench.models import Head
from workbench.reports import BUDGET_BYTES, render, write_report
from workbench.runs import Run

BY_NAME = {page.name: page for page in PAGES}
HOSTILE = "</dd></script><img src=x onerror=window.hurt=1>\"'\u202etxt.exe\0{{ 7*7 }}" + "x" * 5000


@pytest.fixture(scope="module")
def client(runs_folder):
    return create_app(AppSettings(runs_folder)).server.test_client()


@pytest.fixture(scope="module")
def context(runs_folder):
    settings = AppSettings(runs_folder)
    return Context(settings, RunLibrary(runs_folder), Live(settings))


@pytest.fixture
def noted(tmp_path, runs_folder):
    """A folder with one run, whose name and notes are hostile."""
    folder = tmp_path / "runs"
    shutil.copytree(runs_folder / "scores", folder / "a <img src=x>\u202e\n\"b';.c")
    library = RunLibrary(folder)
    for about in ("run", "L1H2", HOSTILE[:80]):
        library.write_note(next(folder.iterdir()).name, about, HOSTILE)
    return folder


class Detached:
    """A run that lies on no disk."""

    def __init__(self, run):
        self._run = run

    def __getattr__(self, name):
        return getattr(self._run, name)


class Read(HTMLParser):
    """Elements of a page, and its text outside of scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self._inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.words.append(data)


def get(client, path):
    return client.get(path, base_url="http://127.0.0.1")


def test_a_run_is_exported_as_the_command_writes_it(client, runs_folder, tmp_path):
    with get(client, export.address_of("scores")) as answer:
        page = answer.data
    assert answer.status_code == 200 and answer.mimetype == "text/html"
    assert answer.headers["Content-Disposition"] == "attachment; filename=scores.html"
    assert answer.headers["Content-Security-Policy"] and answer.headers["Cache-Control"] == "no-store"
    assert page == write_report(Run.open(runs_folder / "scores"), tmp_path / "r.html").read_bytes()
    assert 100_000 < len(page) <= BUDGET_BYTES


@pytest.mark.parametrize("run", ["needle", "patches", "nasty <b>&'"])
def test_runs_of_every_kind_are_exported_within_the_budget(client, run):
    answer = get(client, export.address_of(run))
    assert answer.status_code == 200 and len(answer.data) <= BUDGET_BYTES
    assert "img" not in Read(answer.text).tags


def test_a_head_is_exported_with_its_readings_and_opens_there(runs_folder, context, browser, tmp_path):
    client = create_app(AppSettings(runs_folder)).server.test_client()
    run = context.library.run("scores")
    side = {"circuit": "ov", "direction": 0, "sign": 1, "share": 0.5, "reads": ["</script><img>"], "writes": [" sea"]}
    kept = _file(context.live.folder, asked_of(run, Head(1, 2), ""))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"directions": [side]}))
    _, _, path = export.offered(context, BY_NAME["Head"], Query({"run": "scores", "head": "L1H2"}))
    answer = get(client, path)
    assert answer.headers["Content-Disposition"] == "attachment; filename=scores-L1H2.html"
    part = answer.text.split('<section id="readings">')[1].split("</section>")[0]
    assert "&lt;/script&gt;&lt;img&gt;" in part and "50.0 %" in part and "<img>" not in part
    (tmp_path / "head.html").write_bytes(answer.data)
    page = browser.new_page()
    page.goto((tmp_path / "head.html").as_uri())
    page.wait_for_selector("#L1H2.target")
    assert page.evaluate("location.hash") == "#L1H2"
    page.close()
    kept.unlink()
    assert 'id="readings"' not in get(client, export.address_of("scores", head="L0H0")).text
    assert get(client, export.address_of("scores", head="magic")).status_code == 400


def test_two_runs_are_exported_side_by_side(client, runs_folder):
    answer = get(client, export.address_of("scores", "scores-again"))
    assert answer.headers["Content-Disposition"] == "attachment; filename=scores-against-scores-again.html"
    a, b = (Run.open(runs_folder / name).table("head_scores") for name in ("scores", "scores-again"))
    sink = [table[table["detector"] == "sink"].set_index(["layer", "head"])["value"] for table in (a, b)]
    layer, head = (sink[1] - sink[0]).abs().idxmax()
    part = answer.text.split('<section id="difference">')[1].split("</section>")[0]
    first = part.split("<tbody>")[1].split("</tr>")[0]
    assert f">L{layer}H{head}<" in first
    assert f"{abs((sink[1] - sink[0])[layer, head]):.3f}"[:4] in first
    assert 'data-figure="difference-0"' in part and '"difference-0"' in answer.text.split('id="report-data">')[1]


def test_runs_that_have_nothing_in_common_are_refused(client, runs_folder):
    answer = get(client, export.address_of("scores", "needle"))
    assert answer.status_code == 400 and "no head scores to compare" in answer.json["error"]
    with pytest.raises(RequestError, match="runs on disk"):
        render(Run.open(runs_folder / "scores"), against=Detached(Run.open(runs_folder / "scores")))


def test_what_exceeds_the_budget_is_left_out_and_said(runs_folder):
    run, other = (Run.open(runs_folder / name) for name in ("scores", "scores-again"))
    budget = len(render(run, against=other, gallery=True).encode()) - 1
    page = render(run, against=other, budget_bytes=budget)
    assert len(page.encode()) <= budget and 'id="omitted"' in page
    assert 'id="omitted"' not in render(run, against=other)


@pytest.mark.parametrize(
    "name",
    ["", "..", "../runs", ".", "/etc/passwd", "a/b", "needle/../scores", ".scores", "a\0b", "scores\\..\\needle"],
)
def test_names_do_not_lead_out_of_the_folder(client, name):
    # Without a second name there is nothing to compare with.
    for path in (export.address_of(name), export.address_of("scores", name or "..")):
        answer = get(client, path)
        assert answer.status_code == 404 and "there is no run" in answer.json["error"]


def test_a_link_out_of_the_folder_is_not_exported(tmp_path, runs_folder):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "elsewhere").symlink_to(runs_folder / "scores")
    answer = get(create_app(AppSettings(folder)).server.test_client(), export.address_of("elsewhere"))
    assert answer.status_code == 404


def test_hostile_names_and_notes_are_text(noted, tmp_path, browser):
    name = next(noted.iterdir()).name
    answer = get(create_app(AppSettings(noted)).server.test_client(), export.address_of(name))
    assert answer.status_code == 200
    assert answer.headers["Content-Disposition"] == "attachment; filename=a_img_src_x_b_.c.html"
    read = Read(answer.text)
    assert "img" not in read.tags and "".join(read.words).count("onerror=window.hurt=1") >= 3
    assert "49" not in answer.text.split('id="notes"')[1].split("</section>")[0] and "\u202e" not in answer.text
    (tmp_path / "report.html").write_bytes(answer.data)
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("window.hurt") is None and page.locator("#notes img").count() == 0
    assert "onerror=window.hurt=1" in page.text_content("#notes")
    page.close()


def test_a_damaged_run_is_refused_with_what_is_wrong(tmp_path, runs_folder):
    shutil.copytree(runs_folder / "scores", tmp_path / "runs" / "broken")
    table = tmp_path / "runs" / "broken" / "tables" / "head_scores.parquet"
    content = bytearray(table.read_bytes())
    content[200] ^= 1
    table.write_bytes(content)
    answer = get(create_app(AppSettings(tmp_path / "runs")).server.test_client(), export.address_of("broken"))
    assert answer.status_code == 400 and "differs from its checksum" in answer.json["error"]


def test_faults_are_told_without_their_inside(client, monkeypatch):
    def fails(run, against):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(export, "render", lambda run, against, view: fails(run, against))
    answer = get(client, export.address_of("scores"))
    assert answer.status_code == 500 and "fault" in answer.json["error"] and "secret" not in answer.text


def test_only_a_few_reports_are_made_at_once(runs_folder, monkeypatch):
    begun, may_end, together = Event(), Event(), []

    def slow(run, against, view):
        together.append(1)
        begun.set()
        may_end.wait(20)
        assert sum(together) == 1, "two reports were written at the same time"
        together.pop()
        return "<p>done"

    monkeypatch.setattr(export, "render", slow)
    client = create_app(AppSettings(runs_folder)).server.test_client
    codes = []
    ask = lambda: codes.append(get(client(), export.address_of("scores")).status_code)  # noqa: E731 (a thread's work)
    server = client().application
    client = server.test_client
    threads = [Thread(target=ask) for _ in range(export.MOST_ASKED + 2)]
    for thread in threads:
        thread.start()
    begun.wait(20)
    while len(codes) < 2 and any(thread.is_alive() for thread in threads):
        threads[0].join(0.01)
    may_end.set()
    for thread in threads:
        thread.join(20)
    assert sorted(codes) == [200] * export.MOST_ASKED + [503] * 2


@pytest.mark.parametrize(
    ("page", "query", "runs"),
    [
        ("Runs", {"run": "needle"}, ("needle",)),
        ("Atlas", {"run": "scores"}, ("scores",)),
        ("Head", {"run": "scores", "head": "L1H2"}, ("scores",)),
        ("Pattern", {"run": "nasty <b>&'"}, ("nasty <b>&'",)),
        ("Circuits", {}, ("patches",)),
        ("Compare", {"a": "scores", "b": "scores-again"}, ("scores", "scores-again")),
    ],
)
def test_a_page_offers_what_it_shows(context, page, query, runs):
    disabled, told, address = export.offered(context, BY_NAME[page], Query(query))
    assert not disabled and address.startswith(export.address_of(*runs))
    assert all(run in told for run in runs) and f"at most {BUDGET_BYTES // 10**6} MB" in told


def test_pages_without_a_choice_offer_the_run_that_they_start_with(context):
    (first, *_) = BY_NAME["Atlas"].subject(context, Query({}))
    assert Run.open(context.library.path(first)).has_table("head_scores")
    assert len(BY_NAME["Compare"].subject(context, Query({}))) == 2


@pytest.mark.parametrize(
    ("page", "query"), [("Runs", {}), ("Ablation lab", {}), ("Pattern", {}), ("Atlas", {"run": "../x"})]
)
def test_pages_that_show_no_run_say_why_there_is_nothing(context, page, query):
    disabled, told, address = export.offered(context, BY_NAME[page], Query(query))
    assert disabled and told.startswith("Nothing to export: ") and not address


def test_the_button_saves_the_report_or_tells_why_not(visit, runs_folder):
    page = visit("/atlas?run=scores")
    page.wait_for_selector("#export-page:not([disabled])")
    with page.expect_download() as waiting:
        page.click("#export-page")
    assert waiting.value.suggested_filename == "scores.html"
    content = Path(waiting.value.path()).read_bytes()
    assert content.startswith(b"<!doctype html>") and len(content) <= BUDGET_BYTES
    page.wait_for_selector("text=opens offline")
    page.click("a.nav:has-text('Lab')")
    page.wait_for_selector("#export-page[disabled]")
    assert "no trial is shown" in page.get_attribute("#export-about", "title")
    assert "no trial is shown" in page.text_content("#export-why")
    assert json.dumps(page.url).count("run=") == 0


def test_the_button_tells_of_a_run_that_went_away(serve_app, browser, tmp_path, runs_folder):
    shutil.copytree(runs_folder / "scores", tmp_path / "runs" / "brief")
    page = browser.new_page()
    page.goto(serve_app(AppSettings(tmp_path / "runs")) + "/atlas?run=brief")
    page.wait_for_selector("#export-page:not([disabled])")
    shutil.rmtree(tmp_path / "runs" / "brief")
    page.click("#export-page")
    page.wait_for_selector("text=Not exported")
    assert "there is no run 'brief'" in page.text_content("body")
    page.wait_for_selector("#export-page:not([data-loading])")
    page.close()
