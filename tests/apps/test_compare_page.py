"""Compare and the head's card on small models: intact and without a head, two shapes, two texts, weights read."""

from __future__ import annotations

import shutil
import time
from urllib.parse import parse_qs, urlparse

import pytest

import workbench
from workbench.apps.address import Query
from workbench.apps.context import Context
from workbench.apps.library import RunLibrary
from workbench.apps.live import Live
from workbench.apps.pages import compare
from workbench.apps.settings import AppSettings
from workbench.heads import Settings
from workbench.heads.weights import read_weights
from workbench.models.testing import build
from workbench.runs import RunWriter, compare_runs
from workbench.runs.readings import TABLE, stored_directions
from workbench.studies import SurveySettings, survey
from workbench.studies.readings import readings_table
from workbench.studies.without import without

SMALL = Settings(text_prompts=6, text_length=24, repeat_prompts=6, repeat_length=10)
ASKED = SurveySettings(
    detectors=("entropy", "first_token", "sink", "active_dormant"), verify=(), detection=SMALL, examples=2
)
DRAWN = "document.querySelectorAll('.js-plotly-plot .main-svg').length > 0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("compare") / "runs"
    model = workbench.load(model_folder)
    survey(model, folder / "intact", settings=ASKED)
    # Which runs are the newest is told by the second.
    time.sleep(1.1)
    survey(without(model, ["L0H1"], "zero", SMALL), folder / "without", settings=ASKED)
    for name, text in (("one", "The class statement defines a class."), ("two", "x = [1, 2, 3]\nprint(x)")):
        time.sleep(1.1)
        trace = model.trace(text, statistics=[workbench.statistics.entropy()])
        with RunWriter.open(folder / name, kind="trace", title=name, fingerprint={}) as writer:
            table = trace.means()["entropy"].rename(columns={"value": "mean"}).assign(statistic="entropy")
            writer.table("statistic_means", table[["statistic", "layer", "head", "mean"]])
            writer.manifest["model"] = {"name": "tiny", "layers": 3, "heads": 4}
            writer.finish()
    readings = readings_table(model, read_weights(model, draws=9))
    model.detach()
    deeper = workbench.load(
        (
            build("llama", vocab_size=5000, hidden_size=24, intermediate_size=32, num_attention_heads=3,
                  num_key_value_heads=1, num_hidden_layers=5, max_position_embeddings=512),
            model.tokenizer,
        )
    )  # fmt: skip
    survey(deeper, folder / "deeper", settings=ASKED)
    with RunWriter.open(folder / "kept", kind="atlas", title="Kept", fingerprint={}) as writer:
        intact = workbench.Run.open(folder / "intact")
        for name in ("head_scores", "detectors"):
            writer.table(name, intact.table(name))
        writer.table(TABLE, readings)
        writer.manifest["model"] = {"name": "elsewhere"}
        writer.finish()
    return folder


@pytest.fixture
def address(serve_app, folder, model_folder):
    return serve_app(AppSettings(folder, model=model_folder))


def query(page):
    return {key: value[0] for key, value in parse_qs(urlparse(page.url).query).items()}


def test_a_run_without_a_head_beside_the_intact_one(visit):
    page = visit("/compare?a=intact&b=without&detector=entropy")
    page.until(DRAWN)
    notes = page.text_content("#compare-notes")
    assert "B is without L0H1 (zero ablation)" in notes and "paired over the prompts" in notes
    assert "Up to layer 0 nothing can answer: the largest difference there is 0" in notes
    page.until("document.querySelector('#compare-map .js-plotly-plot')?.data")
    assert "removed" in page.evaluate("document.querySelector('#compare-map .js-plotly-plot').data.map(t => t.name)")
    page.wait_for_selector("#compare-table .ag-row")
    every = page.evaluate("document.querySelectorAll('#compare-table .ag-center-cols-container .ag-row').length")
    # By the keyboard: the switch leaves only what is told from zero, here and in the address.
    page.focus("#compare-told")
    page.keyboard.press("Space")
    page.until("location.search.includes('told=1')")
    page.until("document.querySelector('#compare-map .js-plotly-plot')?.data")
    assert query(page) == {"a": "intact", "b": "without", "detector": "entropy", "told": "1"}
    page.wait_for_timeout(300)
    told = page.evaluate("document.querySelectorAll('#compare-table .ag-center-cols-container .ag-row').length")
    assert told < every
    again = visit("/compare?" + urlparse(page.url).query)
    again.until("document.querySelector('#compare-told')?.checked === true")


def test_two_runs_that_fit_each_other_come_first(tmp_path, folder):
    for name in ("intact", "without", "one"):
        shutil.copytree(folder / name, tmp_path / name)
    settings = AppSettings(tmp_path)
    context = Context(settings, RunLibrary(tmp_path), Live(settings))
    # The newest is a trace, with which neither of the others can be compared.
    assert compare.PAGE.subject(context, Query({})) == ["intact", "without"]
    assert compare.PAGE.subject(context, Query({"a": "without"})) == ["without", "intact"]
    assert compare.PAGE.subject(context, Query({"b": "without"})) == ["intact", "without"]
    shutil.copytree(folder / "two", tmp_path / "two")
    assert compare.PAGE.subject(context, Query({})) == ["one", "two"]
    assert compare.PAGE.subject(context, Query({"b": "one"})) == ["two", "one"]
    assert compare.PAGE.subject(context, Query({"a": "one", "b": "intact"})) == ["one", "intact"]


def test_other_prompts_are_said_to_make_differences_before_a_removed_head(folder):
    runs = [workbench.Run.open(folder / name) for name in ("intact", "without")]
    asked = compare._Asked("intact", "without", *runs, "index", 0.2, False)
    rows = compare_runs(*runs)
    rows = rows[rows["detector"] == "entropy"].copy()
    rows.loc[(rows["layer"] == 0) & (rows["head"] == 2), ["difference", "q"]] = [0.25, 0.01]
    (text,) = compare._repair(asked, rows, same_prompts=False)
    assert "comes from other prompts (1 of 4 heads are told from zero; the largest difference is 0.250)" in text
    assert "other prompts" not in compare._repair(asked, rows, same_prompts=True)[0]


def test_what_the_address_asks_in_vain_is_told(visit):
    page = visit("/compare?a=intact&b=without&detector=nonsense&by=magic&window=9&told=perhaps")
    page.until(DRAWN)
    text = page.text_content("main")
    for given in ("detector=nonsense", "by=magic", "window=9", "told=perhaps"):
        assert given in text
    # By the folder's name; the identifier is at hand.
    run_id = page.evaluate("document.querySelector('#compare-a').closest('span[title]').title")
    assert run_id.startswith("Identifier: ") and page.input_value("#compare-a") == "intact"
    page = visit("/compare?a=intact&b=nowhere")
    page.until("document.body.textContent.includes(\"no run 'nowhere'\")")


def test_models_of_two_shapes_are_aligned(visit):
    page = visit("/compare?a=intact&b=deeper")
    page.wait_for_selector("#aligned-table .ag-row")
    text = page.text_content("main")
    assert "9 pairs by" in text and "3 heads of A and 6 of B stay alone" in text
    assert "It does not say that they compute the same" in text
    page.wait_for_selector("#aligned-tops .ag-row")
    assert page.locator("figure").count() == 2
    # One shape can be aligned too, on demand; a model beside itself finds its own heads.
    page = visit("/compare?a=intact&b=without&by=profile&window=0.1")
    page.wait_for_selector("#aligned-table .ag-row")
    assert page.input_value("#compare-by") == "Aligned heads"


def test_two_texts_are_compared_without_intervals_and_say_so(visit):
    page = visit("/compare?a=one&b=two")
    page.until(DRAWN)
    text = page.text_content("main")
    assert "one text has no interval" in text and "none could be judged" in text
    # A trace and head scores have nothing in common: the choices stay.
    page = visit("/compare?a=one&b=intact")
    page.wait_for_selector(".refusal")
    assert page.locator("#compare-a").count() == 1


def test_the_weights_of_a_head_are_read_and_kept(visit):
    page = visit("/head?run=intact&head=L1H2")
    page.wait_for_selector("#head-tokens")
    # Its course over positions and its contrast of domains are there, although it leads by no detector.
    titles = page.eval_on_selector_all("figure", "all => all.map(one => one.dataset.title)")
    assert {"Statistics of L1H2 over position", "First-token mass of L1H2 by domain"} <= set(titles)
    page.fill("#head-tokens", "class <b> statement")
    page.keyboard.press("Enter")
    page.until("location.search.includes('reading=')")
    page.until("document.querySelector('#head-reading-outcome table') !== null")
    text = page.text_content("#head-reading-outcome")
    assert "OV: what it writes" in text and "Strongest directions of QK" in text and "2 query heads share" in text
    assert "' class'" in text or "'class'" in text
    # Kept: without the trial's identifier it is there at once.
    again = visit("/head?run=intact&head=L1H2&tokens=class+%3Cb%3E+statement")
    again.wait_for_selector("#head-reading-outcome table")
    reloaded = visit("/head?" + urlparse(page.url).query)
    reloaded.wait_for_selector("#head-reading-outcome table")
    page.fill("#head-tokens", "x" * 300)
    page.click("#head-read")
    page.until("document.body.textContent.includes('300 characters')")


def test_stored_directions_are_shown_where_the_model_is_not_at_hand(visit, folder):
    run = workbench.Run.open(folder / "kept")
    expected = stored_directions(run.table(TABLE), 1, 2)
    page = visit("/head?run=kept&head=L1H2")
    page.wait_for_selector("#head-reading-outcome table")
    text = page.text_content("#head-reading-outcome")
    assert repr(expected[0]["reads"][0])[:44] in text and "workbench serve RUNS --model elsewhere" in text
    assert page.locator("#head-read").count() == 0
    page = visit("/head?run=deeper&head=L1H2")
    assert "keeps no readings" in page.text_content("#head-reading-outcome")


def test_narrow_and_dark_pages_do_not_overflow(visit):
    for path in ("/compare?a=intact&b=without", "/compare?a=intact&b=deeper", "/head?run=kept&head=L1H2"):
        page = visit(path, viewport={"width": 800, "height": 800}, color_scheme="dark")
        page.wait_for_selector("main h2, main h3")
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), path
