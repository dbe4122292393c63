"""The token view in a browser: pointed at, locked, moved by keyboard, chosen from small maps, restored, saved, live."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.apps.ledger import Ledger
from workbench.apps.settings import AppSettings
from workbench.apps.tokens.prompts import measure, patterns_folder
from workbench.runs import Run, RunWriter
from workbench.runs.patterns import Masking, open_pattern, pattern_tensors, write_pattern

COUNT = 36
READY = "document.querySelector('.tokens-view')?.dataset.ready === 'yes'"
# Half of its rows goes to a learned sink.
SUNK = (3, 2)
HEADS = [(layer, head) for layer in range(1, 4) for head in range(3)]
NASTY = {
    3: "<img src=x onerror=window.hurt=1>",
    4: "\u202egnp.exe",
    5: "\0\x1b[31m",
    6: " " + "long" * 25_000,
    7: "\"'`${}\\",
    8: "\u05e9\u05dc\u05d5\u05dd",
    9: "=cmd|' /C calc'!A0",
    10: "</script><script>window.hurt=1</script>",
    11: ".\n",
}


def write_short_run(path: Path) -> None:
    """Nine heads on 36 tokens, some of them hostile; L2H1 looks back to token 12 from token 20, hard."""
    generator = torch.Generator().manual_seed(3)
    texts = [NASTY.get(at, f" w{at}") for at in range(COUNT)]
    masking = Masking(0.5)
    with RunWriter.open(path, kind="trace", title="Short", fingerprint={}) as writer:
        for head in HEADS:
            q, k = (torch.randn(COUNT, 8, generator=generator) for _ in range(2))
            if head == (2, 1):
                q[:, 0], k[:, 0] = 0.0, 0.0
                q[20, 0], k[12, 0] = 8.0, 2.0
            tensors = pattern_tensors(q, k, masking)
            if head == SUNK:
                tensors["lse"] += np.float32(np.log(2))
            write_pattern(writer, head, tensors, masking, model="toy")
        writer.table("tokens", pd.DataFrame({"position": range(COUNT), "token_id": range(COUNT), "text": texts}))
        writer.done("all")
        writer.finish()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "runs"
    write_short_run(folder / "short")
    return folder


@pytest.fixture
def address(serve_app, folder, model_folder):
    """In place of the one that all other pages share: these runs, and a model."""
    return serve_app(AppSettings(folder, model=model_folder))


@pytest.fixture(scope="module")
def exact(folder):
    """`exact("L2H1")`: the whole pattern in float64, from what is stored."""

    def matrix(name):
        stored = open_pattern(Run.open(folder / "short"), name.lower())
        q, k = (stored.tensors.read(one).astype(np.float64) for one in ("q", "k"))
        logits = np.where(np.tri(COUNT, dtype=bool), q @ k.T * 0.5, -np.inf)
        found = np.exp(logits - logits.max(1, keepdims=True))
        return found / found.sum(1, keepdims=True)

    return matrix


def word(at, head="L2H1"):
    return f'.tok-card[data-head="{head}"] .tok[data-at="{at}"]'


def pair(page, head="L2H1"):
    """The exact weight that a card tells, once it tells one."""
    place = f'.tok-card[data-head="{head}"] .tok-pair'
    page.until(f"document.querySelector('{place}').dataset.value !== undefined")
    return float(page.get_attribute(place, "data-value"))


def query(page):
    return {key: value[0] for key, value in parse_qs(urlparse(page.url).query).items()}


def shade(page, at, head="L2H1"):
    """Which way a word is shaded, and how strongly."""
    found = page.evaluate(f"document.querySelector('{word(at, head)}').style.background")
    if not found:
        return None, 0.0
    way = "forth" if "--forth" in found else "back"
    return way, float(found.split(")")[1].split("%")[0])


def opened(visit, **fields):
    page = visit("/pattern?run=short" + "".join(f"&{key}={value}" for key, value in fields.items()))
    page.until(READY)
    return page


def test_pointing_shades_both_ways_and_locking_tells_exact_weights(visit, exact):
    page = opened(visit, heads="L2H1")
    matrix = exact("L2H1")
    assert matrix[20, 12] > 0.9
    page.hover(word(20))
    page.until(f"document.querySelector('{word(20)}').classList.contains('focus')")
    top = matrix[:, 1:].max()
    for at in (2, 12, 19):
        way, strength = shade(page, at)
        expected = 62 * np.sqrt(matrix[20, at] / top)
        assert (way == "back" and abs(strength - expected) < 0.1) or (way is None and expected < 0.7)
    way, strength = shade(page, 30)
    assert way == "forth" and abs(strength - 62 * np.sqrt(matrix[30, 20] / top)) < 0.1
    # The first position is told by a bar instead.
    assert shade(page, 0) == (None, 0.0)
    bar = page.evaluate(f"document.querySelector('{word(0)}').style.getPropertyValue('--mass')")
    assert abs(float(bar) - matrix[20, 0]) < 1e-4
    back = page.locator("path.back").evaluate_all("arcs => arcs.map((arc) => Number(arc.dataset.at))")
    forth = page.locator("path.forth").evaluate_all("arcs => arcs.map((arc) => Number(arc.dataset.at))")
    assert set(back) == {at for at in range(1, 20) if matrix[20, at] >= 0.05} and 12 in back
    assert set(forth) == set(sorted(range(21, COUNT), key=lambda at: -matrix[at, 20])[:12]) & {
        at for at in range(21, COUNT) if matrix[at, 20] >= 0.05
    }

    tip = page.text_content(".tok-tip")
    assert "looks most at “w12” (12): 0.9" in tip and "is looked at most by" in tip

    page.click(word(20))
    page.until("location.search.includes('at=20')")
    page.hover(word(12))
    assert abs(pair(page) - matrix[20, 12]) < 1e-6
    assert "(20)" in page.text_content(".tok-tip") and f"{matrix[20, 12]:.4f}"[:5] in page.text_content(".tok-tip")
    page.hover(word(33))
    page.until("document.querySelector('.tok-pair').textContent.includes('(33)')")
    assert abs(pair(page) - matrix[33, 20]) < 1e-6
    page.click(word(20))
    page.until("!location.search.includes('at=')")
    page.click(word(25))
    page.until("location.search.includes('at=25')")
    page.keyboard.press("Escape")
    page.until("!location.search.includes('at=')")


def test_the_keyboard_moves_locks_and_chooses_heads(visit, exact):
    page = opened(visit, heads="L2H1")
    page.focus(word(20))
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.at") == "19"
    page.keyboard.press("Enter")
    page.until("location.search.includes('at=19')")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.at") == str(COUNT - 1)
    assert abs(pair(page) - exact("L2H1")[COUNT - 1, 19]) < 1e-6
    page.keyboard.press("ArrowUp")
    above = page.evaluate("document.activeElement.getBoundingClientRect().top")
    assert above < page.evaluate(f"document.querySelector('{word(COUNT - 1)}').getBoundingClientRect().top")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.at") == "0"
    # One word of each card is in the order of tabs, and one small map.
    assert page.locator(".tok[tabindex='0']").count() == 1 and page.locator(".tok-thumb[tabindex='0']").count() == 1
    page.keyboard.press("Escape")
    page.until("!location.search.includes('at=')")
    page.focus(".tok-thumb[data-head=L1H0]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.until("location.search.includes('heads=L2H1%2CL1H1')")
    page.until(READY)
    assert page.locator(".tok-card").count() == 2
    assert page.get_attribute(".tok-thumb[data-head=L1H1]", "aria-pressed") == "true"
    page.keyboard.press("Space")
    page.until("document.querySelectorAll('.tok-card').length === 1")


def test_heads_stand_side_by_side_and_share_the_token(visit, exact):
    page = opened(visit, heads="L2H1,L1H0", at=20)
    page.hover(word(15, "L1H0"))
    assert abs(pair(page, "L1H0") - exact("L1H0")[20, 15]) < 1e-6
    assert abs(pair(page, "L2H1") - exact("L2H1")[20, 15]) < 1e-6
    boxes = [page.locator(f'.tok-card[data-head="{name}"]').bounding_box() for name in ("L2H1", "L1H0")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    for name in ("L1H1", "L1H2", "L2H0", "L2H2"):
        page.click(f".tok-thumb[data-head={name}]")
    page.click(".tok-thumb[data-head=L3H0]")
    assert "6 heads are shown at most" in page.text_content(".tok-told")
    assert page.locator(".tok-card").count() == 6 and len(query(page)["heads"].split(",")) == 6
    page.until(READY)
    page.click('.tok-card[data-head="L1H1"] .tok-head button')
    assert page.locator(".tok-card").count() == 5 and "L1H1" not in query(page)["heads"]
    page.evaluate("localStorage.setItem('head-set', JSON.stringify(['L3H2', 'L9H9', 'L3H1']))")
    page.click(".tok-set")
    page.until("location.search.includes('heads=L3H2%2CL3H1')")


def test_the_address_restores_heads_token_and_options(visit):
    page = opened(visit)
    page.click(".tok-thumb[data-head=L3H2]")
    page.click(word(14, "L3H2"))
    page.select_option(".tok-opt-arcs", "0.3")
    page.select_option(".tok-opt-show", "back")
    page.select_option(".tok-opt-scale", "linear")
    page.check(".tok-opt-first")
    page.uncheck(".tok-opt-maps")
    fields = query(page)
    assert fields["at"] == "14" and fields["first"] == "1" and fields["maps"] == "0" and fields["scale"] == "linear"
    again = visit("/pattern?" + urlparse(page.url).query)
    again.until(READY)
    assert query(again) == fields
    heads = [card.get_attribute("data-head") for card in again.locator(".tok-card").all()]
    assert heads == fields["heads"].split(",")
    assert "locked" in again.get_attribute(word(14, "L3H2"), "class")
    assert again.input_value(".tok-opt-arcs") == "0.3" and again.input_value(".tok-opt-show") == "back"
    assert again.is_checked(".tok-opt-first") and again.locator(".tok-map:visible").count() == 0
    # What an address cannot mean is left out.
    wrong = visit("/pattern?run=short&heads=L9H9,%3Cb%3E&at=999&arcs=7&show=x")
    wrong.until(READY)
    assert set(query(wrong)) == {"run", "heads"}


def test_hostile_tokens_are_text_within_bounds(visit):
    page = opened(visit, heads="L2H1", at=10)
    texts = page.locator(".tok-card .tok").all_text_contents()
    assert texts[3] == NASTY[3] and texts[10] == NASTY[10] and texts[8] == NASTY[8]
    assert texts[4] == "\\u202egnp.exe" and texts[5] == "\\x00\\x1b[31m" and texts[6] == ("long" * 15)[:59] + "…"
    assert page.locator(".tokens-view :is(script, b), .tok-card img").count() == 0
    for at in NASTY:
        page.hover(word(at))
        box = page.locator(word(at)).bounding_box()
        assert box["width"] < 320 and box["height"] < 40
        tip = page.locator(".tok-tip").bounding_box()
        assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 1280
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    isolated = page.evaluate(f"getComputedStyle(document.querySelector('{word(8)}')).unicodeBidi")
    assert "isolate" in isolated
    # A Hebrew word stands between its neighbours, not around them.
    left, middle, right = (page.locator(word(at)).bounding_box()["x"] for at in (7, 8, 9))
    assert (
        left < middle < right or page.locator(word(7)).bounding_box()["y"] != page.locator(word(9)).bounding_box()["y"]
    )


def test_the_map_points_at_tokens(visit, exact):
    page = opened(visit, heads="L2H1")
    canvas = page.locator(".tok-map canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    # Tokens are written beside maps of few: 84 pixels left, 78 above, 4 below and on the right.
    cell = (box["width"] - 88) / COUNT
    page.mouse.move(box["x"] + 84 + 12.5 * cell, box["y"] + 78 + 20.5 * cell)
    assert abs(pair(page) - exact("L2H1")[20, 12]) < 1e-6
    page.until(f"document.querySelector('{word(20)}').classList.contains('focus')")
    assert "other" in page.get_attribute(word(12), "class")
    page.mouse.click(box["x"] + 84 + 12.5 * cell, box["y"] + 78 + 20.5 * cell)
    page.until("location.search.includes('at=20')")
    page.keyboard.press("Escape")
    page.until("!location.search.includes('at=')")
    # Above the diagonal there is nothing.
    page.mouse.move(box["x"] + 84 + 30.5 * cell, box["y"] + 78 + 5.5 * cell)
    page.until("document.querySelector('.tok-tip').hidden")


def saved(page, label):
    with page.expect_download() as download:
        page.click(f'button[aria-label="L2H1: {label}"]')
    return Path(download.value.path()).read_bytes()


def test_words_map_and_weights_are_saved(visit, exact):
    page = opened(visit, heads="L2H1", at=20)
    rows = list(csv.reader(io.StringIO(saved(page, "save weights as CSV").decode())))
    assert (
        rows[0] == ["query", "key", "query token", "key token", "weight"] and len(rows) == 1 + COUNT * (COUNT + 1) // 2
    )
    matrix = exact("L2H1")
    assert max(abs(float(row[4]) - matrix[int(row[0]), int(row[1])]) for row in rows[1:]) < 1e-6
    # No cell is a formula, and the text is still there.
    assert {row[3] for row in rows[1:] if row[1] == "9"} == {"'=cmd|' /C calc'!A0"}
    for label in ("save words as PNG", "save map as PNG"):
        assert saved(page, label).startswith(b"\x89PNG")
    words, whole = (ET.fromstring(saved(page, f"save {what} as SVG")) for what in ("words", "map"))
    name = "{http://www.w3.org/2000/svg}"
    texts = [one.text for one in words.iter(name + "text")]
    assert texts[3] == NASTY[3] and len(texts) == COUNT and len(list(words.iter(name + "path"))) > 0
    assert len(list(whole.iter(name + "image"))) == 1 and not list(words.iter(name + "script"))


def test_what_no_token_gets_is_told(visit):
    page = opened(visit, heads="L3H2,L2H1", at=20)
    told = [page.text_content(f'.tok-card[data-head="{name}"] .tok-says') for name in ("L3H2", "L2H1")]
    assert "on no token 0.50" in told[0] and "on no token" not in told[1]


def test_an_address_of_one_pattern_shows_that_head(visit):
    page = opened(visit, heads="L3H2")
    page.click("main >> text=Zoomable map")
    page.click("main >> text=L2H2")
    page.wait_for_selector(".zoom-stage canvas")
    page.click("main >> text=Token by token")
    page.wait_for_selector('.tok-card[data-head="L2H2"]')
    assert page.locator(".tok-card").count() == 1


def test_short_stored_patterns_have_both_views(visit):
    page = opened(visit)
    page.click("main >> text=Zoomable map")
    page.wait_for_selector(".zoom-stage canvas")
    assert query(page)["view"] == "map"
    page.click("main >> text=Token by token")
    page.wait_for_selector(".tok-card")
    assert "view" not in query(page)


def test_small_maps_and_words_follow_light_and_dark(visit):
    page = opened(visit, heads="L2H1", at=20)
    page.until("document.querySelectorAll('.tok-thumb[data-drawn]').length === 9")
    picture = "document.querySelector('.tok-thumb img').src"
    light = page.evaluate(picture)
    page.click("#toggle-scheme")
    page.wait_for_selector("[data-mantine-color-scheme=dark]", state="attached")
    # The page is built anew, some time after the colours have changed.
    page.until(f"!['', {json.dumps(light)}].includes(document.querySelector('.tok-thumb img')?.src ?? '')")
    strength = f"parseFloat((document.querySelector('{word(12)}')?.style.background || '').split(')')[1])"
    page.until(f"{strength} > 40 && {strength} <= 50")
    assert query(page)["at"] == "20"


def test_a_prompt_typed_on_the_page_is_measured_kept_and_restored(visit, folder, model_folder):
    page = visit("/pattern?heads=L2H1")
    page.fill("#pattern-prompt", "The <b>class</b> statement defines a class; the class statement")
    page.click("#pattern-show")
    page.wait_for_selector(".tok-card")
    page.until(READY)
    assert "12 heads" in page.text_content("#pattern-outcome") and page.locator(".tok-thumb").count() == 12
    assert page.locator("main b").count() == 0 and "workbench trace" in page.text_content("#pattern-outcome details")
    # The head that another page's link named.
    assert query(page)["heads"] == "L2H1"
    page.click(".tok-thumb[data-head=L1H3]")
    page.until(READY)
    page.click(word(5, "L1H3"))
    page.hover(word(2, "L1H3"))
    told = pair(page, "L1H3")

    from workbench import load

    model = load(model_folder)
    batch = model.batch("The <b>class</b> statement defines a class; the class statement")
    own = model.trace(batch, sites=["blocks.1.attn.hook_pattern"]).site("pattern", 1)
    assert abs(told - float(own[0, 3, 5, 2])) < 1e-5
    model.detach()

    again = visit("/pattern?" + urlparse(page.url).query)
    again.until(READY)
    assert query(again) == query(page) and query(again)["at"] == "5"
    assert again.input_value("#pattern-prompt").startswith("The <b>class</b>")
    # Another prompt keeps the heads that were chosen.
    again.fill("#pattern-prompt", "Another one")
    again.click("#pattern-show")
    again.until(f"!location.search.includes('{query(page)['job']}')")
    again.until(READY)
    assert query(again)["heads"] == "L2H1,L1H3"
    outcome = json.loads((folder / ".lab" / f"{query(again)['job']}.json").read_text())
    assert outcome["asked"]["prompt"] == "Another one"


def test_a_prompt_that_is_being_measured_survives_a_reload(visit, folder, model_folder):
    from workbench import load

    model = load(model_folder)
    result = measure(model, "The class statement", patterns_folder(folder / ".lab"), lambda done, total: None)
    model.detach()
    ledger, asked = Ledger(folder / ".lab"), {"prompt": "The class statement"}
    job = ledger.open({"asked": asked})
    page = visit(f"/pattern?job={job}&heads=L2H3")
    assert page.input_value("#pattern-prompt") == "The class statement"
    page.reload()
    page.wait_for_selector("#pattern-outcome [role=status]")
    assert "waiting" in page.text_content("#pattern-outcome")
    ledger.close(job, {"status": "done", "result": result, "asked": asked})
    page.until(READY)
    assert page.locator('.tok-card[data-head="L2H3"] .tok').count() == len(result["tokens"])
    # What is no prompt's says so.
    trial = ledger.open({})
    ledger.close(trial, {"status": "done", "result": {"model": "toy"}, "asked": {}})
    assert "trial of the lab" in visit(f"/pattern?job={trial}").text_content("main")
    lost = ledger.open({})
    ledger.close(lost, {"status": "cancelled", "asked": asked})
    assert "was cancelled" in visit(f"/pattern?job={lost}").text_content("main")


def test_prompts_that_cannot_be_shown_are_refused_on_the_page(visit):
    page = visit("/pattern")
    page.click("#pattern-show")
    page.until("document.body.textContent.includes('There is no prompt')")
    page.fill("#pattern-prompt", "word " * 600)
    page.click("#pattern-show")
    page.until("document.querySelector('#pattern-outcome').textContent.includes('512 can be shown')")
    page = visit("/pattern?job=AAAAAAAAAAAAAAAA")
    assert "no trial" in page.text_content("main")
