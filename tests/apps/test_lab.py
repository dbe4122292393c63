"""The ablation lab: trials run one after the other, are kept, cancelled, refused, and shown on the page."""

from __future__ import annotations

import json
import re
import threading
import time

import numpy as np
import pytest

from workbench.apps.context import Context
from workbench.apps.library import RunLibrary
from workbench.apps.live import MOST_WAITING, Live
from workbench.apps.pages.lab import top_heads
from workbench.apps.settings import AppSettings
from workbench.apps.trials import HOWS, Trial, _edit, read_trial, run_trial
from workbench.errors import RequestError
from workbench.models import Head


@pytest.fixture(scope="module")
def model(model_folder):
    from workbench import load

    model = load(model_folder)
    yield model
    model.detach()


def quiet(done, total):
    """Nobody watches."""


def wait_for(live, name, *states):
    ends = time.monotonic() + 60
    while (state := live.state(name))["status"] not in states:
        assert time.monotonic() < ends
        time.sleep(0.02)
    return state


def test_a_prompt_is_measured_intact_and_ablated(model):
    trial = Trial(("L0H0", "L1H3"), how="zero", prompt="The class statement defines", new_tokens=5)
    found = run_trial(model, trial, quiet)["prompt"]
    batch = model.batch(trial.prompt)
    intact = model.trace(batch, loss=True, logits="last")
    expected = intact.logits[0, -1].softmax(-1).topk(10)
    assert [one["id"] for one in found["before"]["next"]] == expected.indices.tolist()
    assert np.allclose([one["p"] for one in found["before"]["next"]], expected.values.numpy(), atol=1e-6)
    assert np.allclose(found["before"]["loss"], intact.loss[0].numpy(), atol=1e-5)
    assert len(found["before"]["loss"]) == len(found["tokens"]) - 1
    assert found["before"]["loss"] != found["after"]["loss"]
    assert found["before"]["new"] == [
        model.tokenizer.decode([i]) for i in model.generate(batch, max_new_tokens=5).ids[0].tolist() if i >= 0
    ]


@pytest.mark.parametrize("how", HOWS)
def test_every_form_continues_a_prompt(model, how):
    """At strength 0 nothing changes, and at 1 the continuation is that of the tokens' own rows."""
    fields = {"how": how, "prompt": "The class statement defines", "new_tokens": 6}
    seen = []
    none = run_trial(model, Trial(("L0H0", "L1H3"), strength=0.0, **fields), lambda *done: seen.append(done))["prompt"]
    assert none["before"] == none["after"]
    assert all(done <= total for done, total in seen) and len({total for _, total in seen}) == 1
    trial = Trial(("L0H0", "L1H3"), **fields)
    found = run_trial(model, trial, quiet)["prompt"]
    assert found["before"] == none["before"] and found["after"]["loss"] != found["before"]["loss"]
    ids = model.batch(trial.prompt).ids[0].tolist()
    edit = _edit(model, trial, [Head(0, 0), Head(1, 3)], len(ids) + 6)
    for text in found["after"]["new"]:
        token = int(model.trace([ids], edits=[edit], logits="last").logits[0, -1].argmax())
        assert model.tokenizer.decode([token]) == text
        ids.append(token)


def test_what_is_run_anew_is_bounded(model, monkeypatch):
    monkeypatch.setattr("workbench.apps.trials.MOST_ANEW", 20)
    trial = Trial(("L0H0",), how="frozen_zero", prompt="word " * 30, new_tokens=5)
    with pytest.raises(RequestError, match="Shorten the prompt"):
        run_trial(model, trial, quiet)


def test_a_probe_is_compared_with_random_heads(model):
    rows = run_trial(model, Trial(("L0H1",), how="zero", probe="induction"), quiet)["probe"]
    assert rows[0]["metric"] == "induction_loss" and rows[0]["draws"] == 10
    assert rows[0]["control_low"] <= rows[0]["control_effect"] <= rows[0]["control_high"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"heads": ""}, "No heads"),
        ({"heads": "L1H2"}, "nothing to measure"),
        ({"heads": "nonsense", "probe": "induction"}, "names no head"),
        ({"heads": "L1H2", "probe": "magic"}, "choose one of"),
        ({"heads": "L1H2", "probe": "induction", "how": "vaporise"}, "no ablation"),
        ({"heads": "L1H2", "probe": "needle", "how": "resample"}, "choose the probe 'answer'"),
        ({"heads": "L1H2", "prompt": "x", "strength": "2"}, "strength=2.0"),
        ({"heads": "L1H2", "prompt": "x", "strength": "nan"}, "strength=nan"),
        ({"heads": "L1H2", "prompt": "x", "strength": "half"}, "from 0 to 1"),
        ({"heads": "L1H2", "prompt": "x", "new_tokens": "9999"}, "new_tokens=9999"),
        ({"heads": "L1H2", "prompt": "x", "draws": "many"}, "whole number"),
        ({"heads": ",".join(f"L0H{i}" for i in range(600)), "prompt": "x"}, "512 at most"),
    ],
)
def test_wrong_trials_are_refused_with_the_reason(fields, words):
    with pytest.raises(RequestError, match=words):
        read_trial(fields)


def test_a_trial_becomes_a_study_that_is_valid(tmp_path):
    from workbench.studies import read_study

    trial = Trial(("L0H1", "L1H0"), how="zero", probe="induction", draws=12, seed=3, strength=0.25)
    text, command = trial.study("smollm2-135m")
    assert "workbench study run" in command
    (tmp_path / "study.toml").write_text(text)
    (cell,) = read_study(tmp_path).cells("smollm2-135m")
    asked = json.loads(cell.parameters)
    for name, value in (
        ("heads", ["L0H1", "L1H0"]),
        ("how", "zero"),
        ("probe", "induction"),
        ("draws", 12),
        ("seed", 3),
        ("strength", 0.25),
    ):
        assert asked[name] == value
    assert cell.measurement == "verify"


def test_trials_are_kept_on_disk_and_unknown_ones_refused(tmp_path, model_folder):
    settings = AppSettings(tmp_path, model=model_folder)
    live = Live(settings)
    name = live.submit({"heads": ["L0H0"]}, lambda model, progress: {"layers": model.spec.n_layers})
    assert wait_for(live, name, "done")["result"] == {"layers": 3}
    live.close()
    # Another server over the same folder finds it.
    assert Live(settings).state(name)["asked"] == {"heads": ["L0H0"]}
    for wrong in ("../../etc/passwd", "short", "x" * 16):
        with pytest.raises(RequestError):
            live.state(wrong)


def test_trials_wait_are_cancelled_and_fail_alone(tmp_path, model_folder):
    live = Live(AppSettings(tmp_path, model=model_folder))
    go = threading.Event()

    def slow(model, progress):
        go.wait(30)
        progress(1, 2)
        return {}

    def broken(model, progress):
        raise ZeroDivisionError("a secret of the server")

    def refused(model, progress):
        raise RequestError("The prompt has 9 tokens.")

    first, second = live.submit({}, slow), live.submit({}, slow)
    third, fourth = live.submit({}, broken), live.submit({}, refused)
    wait_for(live, first, "running")
    assert live.state(second)["status"] == "waiting"
    assert live.state(second)["step"] == "waiting: 1 trial before it"
    assert live.state(third)["step"] == "waiting: 2 trials before it"
    live.cancel(second)
    assert live.state(third)["step"] == "waiting: 1 trial before it"
    for _ in range(MOST_WAITING - 3):  # what was given up no longer waits
        live.submit({}, slow)
    with pytest.raises(RequestError, match="16 trials are waiting already"):
        live.submit({}, slow)
    go.set()
    assert wait_for(live, first, "done")["result"] == {}
    assert wait_for(live, second, "cancelled")
    failed = wait_for(live, third, "failed")["error"]
    assert "secret" not in failed and "terminal" in failed
    assert wait_for(live, fourth, "failed")["error"] == "The prompt has 9 tokens."
    live.close()


def test_without_a_model_the_lab_says_how_to_get_one(visit, tmp_path):
    page = visit("/lab")
    assert "--model" in page.text_content("main")
    with pytest.raises(RequestError, match="no model here"):
        Live(AppSettings(tmp_path)).submit({}, lambda model, progress: {})


def test_a_trial_in_the_browser_is_run_linked_and_repeated(browser, serve_app, runs_folder, model_folder):
    """Strength and start by keyboard; the address alone restores it; nothing is told on the console."""
    address = serve_app(AppSettings(runs_folder, model=model_folder))
    page = browser.new_page()
    page.set_default_timeout(30_000)
    told = []
    page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(address + "/lab?heads=L0H0,L1H2&how=frozen_zero")
    page.wait_for_selector("#lab-run")
    page.fill("#lab-prompt", "The <b>class</b> statement defines")
    page.fill("#lab-new_tokens", "4")
    page.focus("#lab-strength [role=slider]")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    page.focus("#lab-run")
    page.keyboard.press("Enter")
    page.wait_for_selector("#lab-losses .main-svg")
    text = page.text_content("#lab-outcome")
    assert "Continuation (greedy)" in text and "Next token" in text and "strength = 0.8" in text
    assert page.locator("#lab-outcome b").count() == 0
    assert all(part in page.url for part in ("trial=", "strength=0.8", "how=frozen_zero"))
    assert page.locator("#lab-history-list li").count() == 1
    page.wait_for_selector("#export-page:not([disabled])")
    with page.expect_download() as waiting:
        page.click("#export-page")
    assert waiting.value.suggested_filename.startswith("trial-")
    again = browser.new_page()
    again.goto(page.url)
    again.wait_for_selector("#lab-losses .main-svg", timeout=30_000)
    assert again.input_value("#lab-prompt") == "The <b>class</b> statement defines"
    assert again.get_attribute("#lab-strength [role=slider]", "aria-valuenow") == "0.8"
    # Where the trial was cleared away, the address still says what it was.
    again.goto(page.url.split("&trial=")[0] + "&trial=" + "x" * 16)
    again.wait_for_selector("text=There is no trial")
    assert again.input_value("#lab-prompt") == "The <b>class</b> statement defines"
    assert not told
    page.close()
    again.close()


def test_a_cancelled_trial_says_so_and_runs_again(browser, serve_app, runs_folder, model_folder):
    """What was asked stands there; the server's silence is told while a page waits for it."""
    address = serve_app(AppSettings(runs_folder, model=model_folder))
    live = Live(AppSettings(runs_folder, model=model_folder))
    trial = Trial(("L0H0",), how="zero", prompt="The <b>class</b>", new_tokens=2, draws=12)
    name = live.ledger.open({"asked": trial.as_dict()})
    live.cancel(name)
    page = browser.new_page()
    page.set_default_timeout(30_000)
    page.goto(address + f"/lab?trial={name}&draws=3&how=magic")
    page.wait_for_selector("#lab-ended")
    text = page.text_content("#lab-ended")
    assert "Cancelled" in text and "cannot be shown" not in text
    assert "1 head, zero: The <b>class</b> (L0H0)" in text
    page.click("#lab-ended button")
    page.wait_for_selector("#lab-losses .main-svg")
    assert name not in page.url and "draws=12" in page.url
    assert "1 head, " in page.text_content("#lab-history-list li")
    # A trial that waits for ever, and a server that is gone.
    page.goto(address + "/lab?trial=" + live.ledger.open({"asked": trial.as_dict()}))
    page.wait_for_selector("text=waiting: it is next")
    asks = re.compile("_dash-update-component")
    page.route(asks, lambda route: route.abort())
    page.wait_for_selector("#silent:has-text('The server does not answer')")
    page.unroute(asks)
    page.wait_for_selector("#silent", state="hidden")
    page.close()
    live.close()


def test_numbers_that_an_address_gets_wrong_are_told(browser, serve_app, runs_folder, model_folder):
    page = browser.new_page()
    page.goto(serve_app(AppSettings(runs_folder, model=model_folder)) + "/lab?heads=L0H0&draws=3&how=magic")
    page.wait_for_selector("#not-honoured")
    told = page.text_content("#not-honoured")
    assert "draws=3: a number from 10 to 50 is needed; 10 is taken." in told
    assert "how=magic: there is no such choice here; mean is taken." in told
    page.close()


def test_heads_are_taken_from_a_detector(runs_folder):
    context = Context(AppSettings(runs_folder), RunLibrary(runs_folder), Live(AppSettings(runs_folder)))
    table = context.library.run("scores").table("head_scores")
    own = table[table["detector"] == "sink"].nlargest(3, "value")
    expected = [f"L{layer}H{head}" for layer, head in zip(own["layer"], own["head"], strict=True)]
    assert top_heads(context, "scores", "sink", 3) == expected
    with pytest.raises(RequestError, match="no scores of 'magic'"):
        top_heads(context, "scores", "magic", 3)
