"""The report's file: offline, within its budget, escaped, and honest about what a run lacks."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench.errors import RequestError
from workbench.reports import BUDGET_BYTES, render, write_report
from workbench.reports.build import OPTIONAL, build
from workbench.reports.cards import cards
from workbench.reports.catalogue import catalogue
from workbench.reports.payload import embed, packed, plotly_bundle
from workbench.reports.statistics import pack, statistics

NASTY = "</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Elements, attributes and texts of a page; scripts apart."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.texts: list[str] = []
        self._open: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        {"script": self.scripts, "style": self.styles}.get(self._open or "", self.texts).append(data)

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def data(self) -> dict[str, Any]:
        found = json.loads(next(s for s in self.scripts if s.startswith('{"palettes"')))
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def source(demo: Any) -> str:
    return render(demo)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are left blank, for tests of everything else."""
    blank = {"figure": {"data": [], "layout": {}}, "dark": [], "height": 100, "caption": "blank"}
    monkeypatch.setattr("workbench.reports.charts.figure_pair", lambda draw: blank)


def test_file_is_within_its_budget_and_plotly_is_in_it_once(demo: Any, tmp_path: Path, source: str) -> None:
    target = write_report(demo, tmp_path / "new" / "report.html")
    assert target == tmp_path / "new" / "report.html"
    assert target.read_text(encoding="utf-8") == source, "the same run gives the same bytes"
    assert target.stat().st_size < BUDGET_BYTES == 8_000_000
    assert source.count("plotly.js v") == plotly_bundle().count("plotly.js v")
    assert [p.name for p in target.parent.iterdir()] == ["report.html"], "no temporary file is left"


@pytest.mark.usefixtures("undrawn")
def test_failed_write_leaves_the_old_file(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("workbench.reports.write.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(demo, target)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "old")]


def test_folder_as_target_is_refused(demo: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"report\.html"):
        write_report(demo, tmp_path)


def test_gallery_file_is_packed(demo: Any, source: str) -> None:
    small = render(demo, gallery=True)
    assert len(small.encode()) < 3_000_000 < len(source.encode())
    assert packed(plotly_bundle()) in small
    assert "DecompressionStream" in small


def test_nothing_is_fetched(page: Page) -> None:
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "action", "background", "poster"} & attributes.keys(), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        target = attributes.get("href", "#")
        assert target.startswith("#") or (tag == "a" and target.startswith("https://arxiv.org/")), target
    for style in page.styles:
        assert "@import" not in style
        assert "url(" not in style
    ours = [script for script in page.scripts if "plotly.js v" not in script and len(script) < 100_000]
    assert len(ours) >= 7
    for script in ours:
        assert not re.search(r"fetch\(|XMLHttpRequest|import\(|https?://(?!www\.w3\.org/2000/svg)", script), script


def test_summary_is_computed_from_the_tables(demo: Any, page: Page) -> None:
    for said in (
        "Induction is strongest in L18H6 (0.91; 4 of 270 heads reach 0.40)",
        "without its top 4 heads, induction loss goes from 1.21 to 2.58 nats per token",
        "Previous token is strongest in L3H5 (0.94; 2 of 270 heads reach 0.40)",
        "Retrieval (copy-paste) is strongest in L18H6 (0.63;",
        "ablating its top heads does no more than ablating random ones",
        "Of 6 ablations, 3 had an effect beyond matched random heads and 3 stayed within the range of random heads.",
    ):
        assert said in page.text
    scores = demo.table("head_scores")
    sinks = scores[(scores["detector"] == "sink") & (scores["value"] == 1.0)]
    first = sinks.iloc[0]
    assert f"in L{first['layer']}H{first['head']} (1.00, as {len(sinks) - 1} other heads;" in page.text


@pytest.mark.usefixtures("undrawn")
def test_summary_follows_other_numbers(demo: Any) -> None:
    scores = demo.table("head_scores").copy()
    moved = (scores["detector"] == "induction") & (scores["layer"] == 7) & (scores["head"] == 2)
    scores.loc[moved, "value"] = 0.999
    text = Page(render(replace(demo, frames=demo.frames | {"head_scores": scores}))).text
    assert "Induction is strongest in L7H2 (1.00;" in text


def test_negative_results_are_shown_as_such(page: Page) -> None:
    verdicts = [a["class"] for tag, a in page.elements if tag == "span" and "verdict" in a.get("class", "")]
    assert verdicts.count("verdict inside") == 3 + 1, "three rows of the table and one tile"
    assert "nothing particular to these heads is shown" in page.text


def test_certificate_and_provenance(page: Page) -> None:
    for said in (
        "✓ certified, 5 of 5 checks",
        "2.4e−06",
        "41.7 × below",
        "9c1f5a0e7b44d2c86f13aa90be52c7d1e8604f2b7a935dc01e2f48a6b7c3d590",
        "134,515,008",
        "seed 0",
        "torch 2.13.0",
        "15 January 2025, 09:30 UTC",
        "repeated random tokens",
        "51b0c4000000…",
        "98.6 s",
    ):
        assert said in page.text


@pytest.mark.usefixtures("undrawn")
def test_failed_check_is_not_called_certified(demo: Any) -> None:
    checks = [{"name": "logits", "measured": 0.5, "tolerance": 1e-4, "passed": False, "detail": "layer 3"}]
    manifest = demo.manifest | {"certificate": {"passed": False, "checks": checks}}
    text = Page(render(replace(demo, manifest=manifest))).text
    assert "✗ not certified, 0 of 1 checks" in text
    assert "Not every check passed" in text


def test_ids_are_unique_and_links_lead_somewhere(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    heads = page.data()["table"]["heads"]
    targets = {a["href"][1:] for tag, a in page.elements if tag == "a" and a["href"].startswith("#")}
    assert targets <= {*page.ids, *heads}
    assert {"L18H6", "L3H5", "L16H4"} <= set(page.ids), "leading heads have cards"


def test_every_figure_has_a_place_and_a_caption(page: Page) -> None:
    data = page.data()["figures"]
    places = [a["data-figure"] for _, a in page.elements if "data-figure" in a]
    assert {"map-0", "ablation", "contrast", "curve-L18H6"} <= set(places) <= set(data)
    assert set(data) - set(places) <= {name for name in data if name.startswith("pattern-")}
    assert all(figure["caption"] for figure in data.values())


def test_table_has_all_heads_and_detectors(demo: Any, page: Page) -> None:
    table = page.data()["table"]
    assert len(table["heads"]) == 270
    columns = {column["name"]: column for column in table["columns"]}
    assert set(columns) == set(demo.table("head_scores")["detector"])
    place = table["heads"].index("L18H6")
    assert columns["induction"]["value"][place] == pytest.approx(0.91)
    assert columns["induction"]["threshold"] == 0.4
    assert columns["entropy"]["threshold"] is None
    assert columns["retrieval_greedy"]["value"][place] is None


def test_dark_mode_changes_colours_only(page: Page) -> None:
    changes = page.data()["figures"]["map-0"]["dark"]
    assert changes
    assert all(isinstance(value, str) and value.startswith("#") for _, value in changes)


def nasty(demo: Any, run_with_tokens: Callable[..., Any]) -> Any:
    """The demo with markup in every text that a prompt, a model or a detector could bring."""
    run = run_with_tokens([NASTY, "<b>", f" {NASTY}", "\u2028", "'\"&amp;"] * 4)
    detectors = run.table("detectors").copy()
    for column in ("title", "measures", "unit", "paper", "caption", "positions"):
        detectors[column] = NASTY
    detectors["url"] = "javascript:alert(1)"
    verification = run.table("verification").assign(metric=NASTY, unit=NASTY, heads=NASTY, how=NASTY)
    curves = run.table("position_curves").assign(statistic=NASTY)
    info = run.table("example_info").assign(title=NASTY, caption=NASTY)
    frames = {
        "detectors": detectors,
        "verification": verification,
        "verification_draws": run.table("verification_draws").assign(metric=NASTY, heads=NASTY),
        "position_curves": curves,
        "example_info": info,
    }
    manifest = json.loads(json.dumps(run.manifest)) | {
        "title": NASTY,
        "id": NASTY,
        "command": NASTY,
        "kind": NASTY,
    }
    manifest["model"] |= {"name": NASTY, "dtype": NASTY, "architecture": NASTY}
    manifest["certificate"]["checks"][0] |= {"name": NASTY, "detail": NASTY}
    manifest["prompts"][0]["name"] = manifest["environment"]["platform"] = NASTY
    return replace(run, manifest=manifest, frames=run.frames | frames)


def test_texts_are_escaped(demo: Any, run_with_tokens: Callable[..., Any], page: Page) -> None:
    source = render(nasty(demo, run_with_tokens))
    found = Page(source)
    assert NASTY not in source
    assert "<img" not in source.replace(plotly_bundle(), "")
    assert not [tag for tag, attributes in found.elements if tag == "img" or "onerror" in attributes]
    assert not [a for _, a in found.elements if a.get("href", "").startswith("javascript:")]
    assert len(found.scripts) == len(page.scripts)
    assert found.data()["tokens"]["needle"][0] == NASTY, "the script data holds the text itself"
    labels = found.data()["figures"]["pattern-p0"]["figure"]["data"][0]["x"]
    assert "&lt;/script&gt;&lt;img" in labels[0], "plotly reads markup in labels"


@pytest.mark.parametrize("text", [NASTY, "<!--", "]]>", "\u2028", "&lt;", "ü"])
def test_embedded_json_reads_back(text: str) -> None:
    written = str(embed({text: [text, 1.5, None, float("nan")]}))
    assert json.loads(written) == {text: [text, 1.5, None, None]}
    assert not set(written) & set("<>&\u2028")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (("verification", "verification_draws"), "workbench verify"),
        (("head_scores", "position_curves"), "workbench heads"),
    ],
)
def test_missing_tables_name_the_command_that_makes_them(demo: Any, missing: tuple[str, ...], said: str) -> None:
    assert said in Page(render(demo.without(*missing))).text


def test_trace_run_without_any_table(demo: Any) -> None:
    bare = demo.without(*demo.tables, *demo.arrays)
    bare = replace(bare, manifest={"id": "x", "kind": "trace", "title": "A trace", "model": {"name": "m"}})
    source = render(bare)
    found = Page(source)
    assert len(source.encode()) < 100_000, "no chart, no plotly"
    assert "no head has been scored" in found.text
    assert "not recorded" in found.text
    assert not {"heads", "all-heads", "patterns", "domains"} & set(found.ids)


def test_trace_shows_its_statistics_and_nothing_of_detectors(traced: Any) -> None:
    source = render(traced)
    found = Page(source)
    data = found.data()
    assert [name for name in data["figures"] if name.startswith("statistic-")] == [f"statistic-{i}" for i in range(3)]
    assert {"statistics", "text", "all-heads", "certificate", "provenance"} <= set(found.ids)
    assert not {"maps", "heads", "ablation", "patterns", "domains"} & set(found.ids)
    assert "etector" not in found.text
    assert "workbench heads" not in found.text
    assert "L4H2 for first token (0.97)" in found.text
    assert "no interval and no null" in found.text
    assert "argmax" in found.text[found.text.index("Without a mean") :][:60]
    table = data["table"]
    assert [column["name"] for column in table["columns"]] == ["entropy", "first_1", "lse", "column_mean"]
    means = traced.table("statistic_means").set_index(["statistic", "layer", "head"])["mean"]
    assert table["columns"][1]["value"][table["heads"].index("L4H2")] == pytest.approx(means["first_1", 4, 2], abs=1e-4)
    links = {a["href"][1:] for tag, a in found.elements if tag == "a" and a.get("href", "").startswith("#")}
    assert links <= {*found.ids, *table["heads"]}


def test_trace_of_keys_alone_has_no_empty_section(traced: Any) -> None:
    data = traced.array("statistics")[["column_mean", "argmax"]]
    means = traced.table("statistic_means").query("statistic == 'column_mean'")
    keys = replace(traced, frames=traced.frames | {"statistic_means": means}, datasets={"statistics": data})
    found = Page(render(keys))
    assert {"text", "all-heads"} <= set(found.ids)
    assert not found.data()["figures"]
    bare = replace(keys, frames={"tokens": traced.table("tokens"), "statistic_means": means.head(0)})
    found = Page(render(bare))
    assert "Without a mean" in found.text
    assert not {"text", "all-heads", "maps", "ablation"} & set(found.ids)


def test_token_view_of_a_trace_holds_the_values(traced: Any) -> None:
    view = statistics(traced).view
    place = view["heads"].index("L7H2")
    packed_row = next(s for s in view["statistics"] if s["name"] == "lse")["rows"][place]
    steps = np.frombuffer(base64.b64decode(packed_row["steps"]), dtype="<u2").astype(float)
    values = packed_row["low"] + steps / 65_534 * (packed_row["high"] - packed_row["low"])
    np.testing.assert_allclose(values, traced.array("statistics")["lse"].values[0, 7, 2], atol=1e-3)
    assert pack(np.array([np.nan, 2.0, 4.0])) == {"low": 2.0, "high": 4.0, "steps": "//8AAP7/"}


def test_token_view_of_a_long_trace_says_what_it_leaves_out(traced_with: Callable[..., Any]) -> None:
    found = Page(render(traced_with([f" w{i}" for i in range(2_300)])))
    view = found.data()["reading"]
    assert len(view["tokens"]) == 2_000
    assert "first 2,000 of 2,300 tokens are shown" in found.text
    assert f"{len(view['heads'])} of 270 heads can be chosen" in found.text
    assert "L4H2" in view["heads"], "the head with the highest mean is among them"


def test_heads_chosen_by_hand_are_called_so(by_hand: Any) -> None:
    found = Page(render(by_hand))
    assert "2 heads chosen by hand, L5H3 and L18H6, were ablated together (mean ablation)." in found.text
    assert "Induction loss goes from 1.21 to 2.58 nats per token" in found.text
    for wrong in ("no head has been scored", "etector", "Chosen,", "top 2", "workbench heads"):
        assert wrong not in found.text
    assert "maps" not in found.ids
    assert not [a for tag, a in found.elements if tag == "a" and a.get("href") in ("#maps", "#L5H3")]
    assert "chosen by hand" in found.data()["figures"]["ablation"]["caption"]


def weak_retrieval(demo: Any, q: float) -> Any:
    """The demo with another q for every retrieval score."""
    scores = demo.table("head_scores").copy()
    scores.loc[scores["detector"] == "retrieval", "q"] = q
    return replace(demo, frames=demo.frames | {"head_scores": scores})


@pytest.mark.usefixtures("undrawn")
def test_threshold_without_significance_names_no_head(demo: Any) -> None:
    found = Page(render(weak_retrieval(demo, 0.4)))
    assert "none of them is distinguished from the null" in found.text
    assert "heads reach the threshold; none is distinguished from the null." in found.text
    table = found.data()["table"]
    column = next(c for c in table["columns"] if c["name"] == "retrieval")
    reaching = [i for i, value in enumerate(column["value"]) if value is not None and value >= 0.1]
    assert column["weak"] == reaching
    assert "Retrieval (copy-paste): reaches the threshold, not distinguished from the null" in found.text
    sure = Page(render(weak_retrieval(demo, 0.01)))
    assert "none of them is distinguished" not in sure.text
    assert next(c for c in sure.data()["table"]["columns"] if c["name"] == "retrieval")["weak"] == []


def test_thresholds_of_either_sign_are_both_drawn(demo: Any) -> None:
    known = catalogue(demo)
    bars = {bar.detector.name: bar for bar in cards(demo, known, [])[0].bars}
    low, high = bars["active_dormant"].thresholds_at
    assert low < bars["active_dormant"].null_at < high
    assert len(bars["induction"].thresholds_at) == 1
    assert bars["entropy"].thresholds_at == ()


@pytest.mark.usefixtures("undrawn")
def test_controls_that_reorder_text_are_shown_as_escapes(demo: Any, run_with_tokens: Callable[..., Any]) -> None:
    controls = [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)]
    text = "".join(controls)
    run = run_with_tokens(["a", *controls, "b"])
    manifest = json.loads(json.dumps(demo.manifest)) | {"title": text, "command": text}
    manifest["model"]["name"] = text
    info = run.table("example_info").assign(title=text, caption=text)
    source = render(replace(run, manifest=manifest, frames=run.frames | {"example_info": info}))
    ours = source.replace(plotly_bundle(), "")
    assert not set(controls) & set(ours)
    assert Page(source).data()["tokens"]["needle"][1] == "\\u202a"
    assert "<title>\\u202a" in source


@pytest.mark.parametrize(
    "missing",
    [
        ("detectors", "verification_draws"),
        ("position_curves", "example_info"),
        ("domain_contrast", "patterns"),
        ("example_tokens", "example_info"),
    ],
    ids=" ".join,
)
def test_any_part_may_be_missing(demo: Any, missing: tuple[str, ...]) -> None:
    found = Page(render(demo.without(*missing)))
    assert "L18H6" in found.text
    assert not [link for tag, link in found.elements if link.get("href") == "#patterns"] or "patterns" in found.ids


@pytest.mark.usefixtures("undrawn")
def test_empty_table_counts_as_missing(demo: Any) -> None:
    frames = demo.frames | {"verification": demo.table("verification").head(0)}
    assert "workbench verify" in Page(render(replace(demo, frames=frames))).text


def test_over_budget_packs_plotly_first(demo: Any, source: str) -> None:
    small = render(demo, budget_bytes=4_000_000)
    assert len(small.encode()) <= 4_000_000
    found = Page(small)
    assert "omitted" not in found.ids
    assert found.data() == Page(source).data()


def test_over_budget_leaves_out_the_least_important_and_says_how_to_get_it(demo: Any) -> None:
    whole = len(render(demo, gallery=True).encode())
    before = set(Page(render(demo)).data()["figures"])
    found = Page(render(demo, budget_bytes=whole - 1000))
    notice = found.text[found.text.index("To keep this file within") :][:500]
    assert "domain contrast" in notice and "pattern maps" not in notice and "layer x head maps" not in notice
    assert f"--budget {-(-whole // 1_000_000)}" in notice
    assert before - set(found.data()["figures"]) == {"contrast"}
    assert "omitted" in found.ids


@pytest.mark.parametrize("share", [0.93])
def test_every_budget_is_kept_and_what_stays_is_the_most_important(demo: Any, share: float) -> None:
    """A part is left out only where it does not fit beside what is more important."""
    content = build(demo)
    sizes, names = content.sizes(), list(OPTIONAL)
    whole = render(demo, gallery=True)
    budget = int(len(whole.encode()) * share)
    page = render(demo, budget_bytes=budget)
    spare = budget - len(page.encode())
    assert spare >= 0
    notice = Page(page).text.split("the least important first: ")[1].split(". ")[0]
    left = {name for name in sizes if OPTIONAL[name] in notice}
    for name in left:
        less = sum(sizes[other] for other in sizes if names.index(other) < names.index(name) and other not in left)
        # Markup around the data is what the estimate does not know.
        assert sizes[name] > spare + less - 20_000


def test_far_over_budget_keeps_numbers_without_charts(demo: Any) -> None:
    page = render(demo, budget_bytes=150_000)
    found = Page(page)
    assert len(page.encode()) <= 150_000
    assert not found.data()["figures"]
    assert "plotly.js v" not in page
    assert "Induction is strongest in L18H6" in found.text
    assert found.data()["table"]["columns"][0]["value"]


@pytest.mark.usefixtures("undrawn")
def test_impossible_budget_is_refused(demo: Any) -> None:
    with pytest.raises(RequestError, match="budget_bytes=10,000"):
        render(demo, budget_bytes=10_000)


def test_large_model_stays_within_the_budget(demo: Any) -> None:
    layers, heads = np.indices((80, 64))
    rng = np.random.default_rng(0)
    parts = []
    for name in ("sink", "induction", "retrieval", "entropy"):
        value = rng.beta(0.5, 5, layers.size)
        frame = pd.DataFrame({"detector": name, "layer": layers.ravel(), "head": heads.ravel(), "value": value})
        parts.append(frame.assign(model="m", low=value - 0.01, high=value + 0.01, n=50, null=0.1, p=0.01, q=0.02))
    page = render(replace(demo.without("domain_contrast"), frames=demo.frames | {"head_scores": pd.concat(parts)}))
    assert len(page.encode()) <= BUDGET_BYTES
    assert len(Page(page).data()["table"]["heads"]) == 5120
