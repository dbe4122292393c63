"""Reports of what the lab and the pattern's page have at hand: trials, studies, the view of a pattern."""

from __future__ import annotations

import base64
import io
import re
import secrets

import numpy as np
import pytest
from PIL import Image

from workbench.apps import export
from workbench.apps.ledger import Ledger
from workbench.apps.library import RunLibrary
from workbench.apps.server import create_app
from workbench.apps.settings import AppSettings
from workbench.apps.trial_run import TrialRun
from workbench.apps.trials import Trial, run_trial
from workbench.apps.zoom.picture import pattern_view
from workbench.errors import RequestError
from workbench.reports import BUDGET_BYTES, RunLike, render
from workbench.runs import Run
from workbench.studies import read_study

NASTY = "The </script><img src=x onerror=window.hurt=1> class \u202e statement"


@pytest.fixture(scope="module")
def trial(model_folder):
    """A finished trial of a prompt and a probe, as the lab keeps it."""
    from workbench import load

    model = load(model_folder)
    asked = Trial(("L0H1", "L1H3"), how="zero", strength=0.5, prompt=NASTY, new_tokens=4, probe="induction")
    result = run_trial(model, asked, lambda done, total: None)
    model.detach()
    return {"status": "done", "result": result, "asked": asked.as_dict()}


@pytest.fixture
def lab(tmp_path, trial):
    """A server over a folder with the trial, and the trial's name."""
    ledger, name = Ledger(tmp_path / ".lab"), secrets.token_urlsafe(12)
    ledger.close(name, trial)
    client = create_app(AppSettings(tmp_path, model="smollm2-135m")).server.test_client()
    return lambda address: client.get(address, base_url="http://127.0.0.1"), name


def test_a_trial_is_a_run_to_reports(trial):
    run = TrialRun("x" * 16, trial)
    assert isinstance(run, RunLike) and run.manifest["certificate"]["passed"] and "50 % zero" in run.title
    page = render(run)
    assert len(page.encode()) <= BUDGET_BYTES
    for section in ("trial", "ablation", "certificate", "provenance"):
        assert f'<section id="{section}"' in page
    shown = page.split('<section id="trial"')[1].split("</section>")[0]
    assert "50 % zero" in shown and "<img" not in page and "\u202e" not in page
    before = "".join(trial["result"]["prompt"]["before"]["new"])
    text = re.sub(r"<[^>]+>", "", shown)
    assert before.strip()[:3] in text and "strength = 0.5" in text
    assert 'data-figure="losses"' in shown and 'data-figure="ablation"' in page


def test_a_trial_that_is_not_done_has_no_report():
    with pytest.raises(RequestError, match="is running"):
        TrialRun("x" * 16, {"status": "running"})


def test_a_trial_is_exported_and_saved_as_a_study(lab, tmp_path):
    get, name = lab
    answer = get(export.address_of(trial=name))
    assert answer.status_code == 200 and f"trial-{name}.html" in answer.headers["Content-Disposition"]
    answer = get(export.study_of(name))
    assert answer.headers["Content-Disposition"] == "attachment; filename=study.toml"
    assert "workbench study run probes/from-the-lab --model smollm2-135m" in answer.text
    (tmp_path / "study.toml").write_bytes(answer.data)
    (cell,) = read_study(tmp_path).cells("smollm2-135m")
    assert '"strength":0.5' in cell.parameters.replace(" ", "")
    for wrong in ("../../etc/passwd", "x" * 16, ""):
        assert get(f"/export/study.toml?trial={wrong}").status_code == 400


def test_a_view_is_drawn_as_the_page_shows_it(runs_folder):
    """The picture's pixels are the shades of the cells; the highest cell is the needle."""
    library = RunLibrary(runs_folder)
    view = pattern_view(library, "needle", "l4h2", {"row": "2300", "key": "1100", "span": "400", "scale": "linear"})
    assert (view.rows, view.keys, view.cell, view.scale) == ((2300, 2700), (1100, 1500), 1, "linear")
    assert (view.peaks[0].row, view.peaks[0].key) == (2500, 1234)
    pattern = library.pattern("needle", "l4h2")
    exact = float(pattern.entries(slice(2500, 2501), slice(1234, 1235))[0, 0])
    assert view.peaks[0].value == pytest.approx(exact, rel=1e-5)
    image = np.array(Image.open(io.BytesIO(view.pictures["light"])).convert("RGBA"))
    assert image.shape == (400, 400, 4) and image[..., 3].min() == 255
    dark, pale = image[200, 134, :3].astype(int).sum(), np.median(image[..., :3].astype(int).sum(-1))
    assert dark < pale
    whole = pattern_view(library, "needle", "l4h2", {"span": "nonsense", "how": "mean", "row": "-4"})
    assert whole.rows == whole.keys == (0, 3000) and whole.how == "mean"
    image = np.array(Image.open(io.BytesIO(whole.pictures["light"])).convert("RGBA"))
    assert image[0, -1, 3] == 0 and image[-1, 0, 3] == 255


def test_the_view_at_hand_is_in_the_report_and_goes_last(runs_folder):
    client = create_app(AppSettings(runs_folder)).server.test_client()
    address = export.address_of("needle", pattern="l4h2", row="2300", key="1100", span="400")
    page = client.get(address, base_url="http://127.0.0.1").text
    part = page.split('<section id="view"')[1].split("</section>")[0]
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", part)
    assert len(images) == 2 and all(base64.b64decode(one)[:4] == b"\x89PNG" for one in images)
    assert "2,300 to 2,699" in part and "Strips" in part and "logarithmic, from 1e-06" in part
    assert 'class="strip"' in part and "<img" not in page
    view = pattern_view(RunLibrary(runs_folder), "needle", "l4h2", {})
    run = Run.open(runs_folder / "needle")
    small = render(run, view=view, budget_bytes=len(render(run).encode()) + view.size // 4)
    assert "data:image/png" not in small and "picture of the pattern" in small and "--budget" in small
    assert client.get(export.address_of("needle", pattern="L9H9"), base_url="http://127.0.0.1").status_code in (
        400,
        404,
    )
