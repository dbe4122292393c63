"""The zoomable pattern in a browser: drawn, moved by mouse and keyboard, restored by its address."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from urllib.parse import parse_qs, urlparse
from xml.etree import ElementTree

import numpy as np
from PIL import Image

READY = "document.querySelector('.zoom-stage')?.dataset.ready === 'yes'"


def query(page):
    page.wait_for_timeout(400)
    return {key: value[0] for key, value in parse_qs(urlparse(page.url).query).items()}


def test_the_map_is_drawn_moved_and_restored(visit):
    page = visit("/pattern?run=needle")
    page.until(READY)
    whole = query(page)
    assert whole["row"] == whole["key"] == "0.00"
    page.fill(".zoom-above", "0.9")
    page.fill(".zoom-row", "2499")
    page.fill(".zoom-key", "100")
    page.click(".zoom-go")
    page.until("document.querySelector('.zoom-told').textContent.startsWith('row 2499')")
    page.click(".zoom-next")
    page.until("document.querySelector('.zoom-told').textContent.startsWith('row 2500')")
    told = page.text_content(".zoom-told")
    # The token is one of tags and quotes; it is shown as text.
    assert "key 1234" in told and "<img src=x" in told and float(page.get_attribute(".zoom-told", "data-value")) > 0.9
    page.until(READY)
    near = query(page)
    assert float(near["span"]) < 300 and float(near["row"]) < 2500 < float(near["row"]) + float(near["span"])

    again = visit(f"/pattern?{urlparse(page.url).query}")
    again.until(READY)
    assert query(again) == near


def test_the_keyboard_moves_and_zooms(visit):
    page = visit("/pattern?run=needle&span=400&row=2000&key=1000")
    page.until(READY)
    page.focus(".zoom-stage")
    before = query(page)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    moved = query(page)
    assert float(moved["row"]) > float(before["row"]) and float(moved["key"]) > float(before["key"])
    page.keyboard.press("+")
    assert float(query(page)["span"]) * 2 == float(moved["span"])
    page.keyboard.press("Home")
    page.until("location.search.includes('row=0.00')")


def test_the_pointer_tells_the_exact_entry_and_both_tokens(visit):
    page = visit("/pattern?run=needle&span=40&row=2495&key=1230")
    page.until(READY)
    box = page.locator(".zoom-stage canvas").bounding_box()
    size = 40 / (box["width"] - 128)
    page.mouse.move(box["x"] + 128 + 4.5 / size, box["y"] + 74 + 5.5 / size)
    page.until("document.querySelector('.zoom-told').textContent.startsWith('row 2500')")
    assert '" t2500"' in page.text_content(".zoom-told")


def test_the_next_entry_goes_on_from_the_view_and_says_what_it_leaves_out(visit):
    told = "document.querySelector('.zoom-told').textContent"
    page = visit("/pattern?run=needle&row=2400&key=1200&span=300")
    page.until(READY)
    page.fill(".zoom-above", "0.95")
    page.focus(".zoom-stage")
    page.keyboard.press("n")
    # Not the first of the whole pattern: the first of the view.
    page.until(f"{told}.startsWith('row 2500')")
    assert "key 0 left out of the search" in page.text_content(".zoom-told")
    page.keyboard.press("n")
    page.until(f"{told}.includes('round again') || {told}.includes('the only one')")
    # Away from the last place, it is the view that counts.
    page.keyboard.press("Home")
    page.fill(".zoom-row", "2498")
    page.fill(".zoom-key", "1200")
    page.click(".zoom-go")
    page.until(f"{told}.startsWith('row 2498')")
    page.click(".zoom-next")
    page.until(f"{told}.startsWith('row 2500')")
    page.check(".zoom-first")
    page.until("location.search.includes('first=1')")
    page = visit("/pattern?run=needle&first=1")
    page.until(READY)
    page.fill(".zoom-above", "0.95")
    page.click(".zoom-next")
    page.until(f"{told}.startsWith('row 0 ') && {told}.includes('to key 0 ')")
    assert "left out" not in page.text_content(".zoom-told")


def saved(page, kind):
    with page.expect_download() as waiting:
        page.click(f".zoom-{kind}")
    assert waiting.value.suggested_filename == f"L4H2-pattern.{kind}"
    return Path(waiting.value.path()).read_bytes()


def test_a_view_is_saved_as_picture_vectors_and_numbers(visit):
    page = visit("/pattern?run=needle&row=2495&key=1230&span=40")
    page.until(READY)
    page.wait_for_timeout(500)
    assert saved(page, "png").startswith(b"\x89PNG")
    drawing = ElementTree.fromstring(saved(page, "svg"))
    named = {kind: drawing.findall(f".//{{http://www.w3.org/2000/svg}}{kind}") for kind in ("image", "text", "rect")}
    assert len(named["image"]) == 1 and named["image"][0].get("href").startswith("data:image/png;base64,")
    words = [one.text for one in named["text"]]
    assert "key (source)" in words and "query (destination)" in words and "2,500" in words
    # Strips of the view's columns and rows beside the ground.
    assert len(named["rect"]) > 50
    picture = base64.b64decode(named["image"][0].get("href").partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    lines = list(csv.reader(io.StringIO(saved(page, "csv").decode())))
    assert lines[0] == ["row", "key", "probability", "row token", "key token"]
    (needle,) = [line for line in lines if line[:2] == ["2500", "1234"]]
    assert float(needle[2]) > 0.9 and needle[3] == " t2500" and "<img src=x" in needle[4]
    page = visit("/pattern?run=needle")
    page.until(READY)
    lines = list(csv.reader(io.StringIO(saved(page, "csv").decode())))
    assert lines[0] == ["first row", "last row", "first key", "last key", "maximum of the cell"]


def test_dark_and_linear_are_kept(visit):
    page = visit("/pattern?run=needle&scale=linear&how=mean")
    page.until(READY)
    assert page.input_value(".zoom-scale") == "linear" and page.input_value(".zoom-how") == "mean"
    assert float(page.text_content(".zoom-top")) < 0.1
    page.click("#toggle-scheme")
    page.wait_for_selector("[data-mantine-color-scheme=dark]", state="attached")
    page.until(READY)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(18, 22, 27)"
    page.reload()
    page.wait_for_selector("[data-mantine-color-scheme=dark]", state="attached")


def test_runs_without_patterns_and_unknown_ones_say_what_to_do(visit):
    page = visit("/pattern?run=no-such-run")
    assert "no run 'no-such-run'" in page.text_content("main")
    page = visit("/pattern")
    # Two stored ones, and examples with each of the two runs of scores.
    assert page.locator("main li").count() == 4
    page = visit("/nowhere")
    assert "no page /nowhere" in page.text_content("main")


def test_a_head_that_is_not_stored_is_refused_with_those_that_are(visit):
    for wrong in ("head=L5H5", "head=x", "head=L5H5&pattern=l4h2"):
        page = visit(f"/pattern?run=needle&{wrong}")
        page.wait_for_selector(".refusal")
        assert wrong[5:].partition("&")[0] in page.text_content("main") and page.locator(".zoom").count() == 0
        assert page.is_disabled("#export-page") or "l4h2" not in page.get_attribute("#export-about", "title")
    page.click("main .chips a")
    page.until(READY)
    page = visit("/pattern?run=needle&head=L4H2")
    page.until(READY)
    assert "Pattern of L4H2" in page.text_content("main")
