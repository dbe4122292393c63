"""Who runs the lab's trials: threads of several servers over one folder, and a worker of Celery's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from workbench.apps import ledger as ledger_module
from workbench.apps.celery_worker import connected, worker
from workbench.apps.ledger import GONE, Heart, Ledger
from workbench.apps.live import Live
from workbench.apps.server import create_app
from workbench.apps.settings import AppSettings
from workbench.apps.trials import Trial
from workbench.errors import RequestError

TRIAL = Trial(("L0H0",), how="zero", prompt="The class statement", new_tokens=2).as_dict()


def wait_for(live, name, *states, seconds=90):
    ends = time.monotonic() + seconds
    while (state := live.state(name))["status"] not in states:
        assert time.monotonic() < ends, state
        time.sleep(0.05)
    return state


def lab_of(folder):
    return folder / ".lab"


def test_any_process_over_the_folder_answers_and_cancels(tmp_path, model_folder):
    """Two servers share nothing but files."""
    settings = AppSettings(tmp_path, model=model_folder)
    one, other = Live(settings), Live(settings)
    begun, asked = threading.Event(), []

    def slow(model, progress):
        for step in range(400):
            progress(step, 400)
            begun.set()
            asked.append(step)
            time.sleep(0.05)
        return {}

    name = one.submit({"heads": ["L0H0"]}, slow)
    assert begun.wait(30)
    ends = time.monotonic() + 20
    while not other.state(name)["done"]:
        assert time.monotonic() < ends
        time.sleep(0.05)
    state = other.state(name)
    assert (state["status"], state["total"], state["asked"]) == ("running", 400, {"heads": ["L0H0"]})
    waits = one.submit({}, slow)
    other.cancel(waits)
    assert one.state(waits)["status"] == "cancelled"
    other.cancel(name)
    assert wait_for(one, name, "cancelled")["asked"] == {"heads": ["L0H0"]}
    assert len(asked) < 400
    one.close()
    other.close()
    assert not list(lab_of(tmp_path).glob("*.stop")) and not list(lab_of(tmp_path).glob("*.open"))


def test_a_named_job_runs_here_as_well(tmp_path, model_folder):
    live = Live(AppSettings(tmp_path, model=model_folder))
    name, wrong = live.submit(TRIAL, "trial"), live.submit({}, "os.system")
    assert wait_for(live, name, "done")["result"]["prompt"]["tokens"]
    assert "no work called 'os.system'" in wait_for(live, wrong, "failed")["error"]
    live.close()


def test_who_ends_the_server_ends_its_trials(tmp_path, model_folder):
    live = create_app(AppSettings(tmp_path, model=model_folder)).server.extensions["workbench-live"]
    began = threading.Event()

    def endless(model, progress):
        while True:
            began.set()
            progress(0, 1)
            time.sleep(0.01)

    running, waiting = live.submit({}, endless), live.submit({}, endless)
    assert began.wait(30)
    live.close()
    assert live.state(running)["status"] == "cancelled" and live.state(waiting)["status"] != "done"


def test_a_trial_whose_worker_is_gone_is_told_of(tmp_path):
    ledger = Ledger(tmp_path)
    name, queued = ledger.open({"asked": {"how": "zero"}}), ledger.open({"queue": True})
    long_ago = time.time() - GONE - 1
    for each in (name, queued):
        os.utime(tmp_path / f"{each}.open", (long_ago, long_ago))
    found = ledger.state(name)
    assert found["status"] == "failed" and "Run it again" in found["error"] and found["asked"] == {"how": "zero"}
    assert ledger.waiting() == 0
    # In a queue it may wait for long; once it runs, its worker has to be heard of.
    assert ledger.state(queued)["status"] == "waiting"
    ledger.update(queued, {"status": "running", "queue": True})
    os.utime(tmp_path / f"{queued}.open", (long_ago, long_ago))
    assert ledger.state(queued)["status"] == "failed"


def test_a_heart_keeps_trials_alive_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "BEAT", 0.02)
    ledger = Ledger(tmp_path)
    kept, left = ledger.open({}), ledger.open({})
    long_ago = time.time() - GONE - 1
    for each in (kept, left):
        os.utime(tmp_path / f"{each}.open", (long_ago, long_ago))
    heart = Heart(ledger)
    heart.add(kept)
    ends = time.monotonic() + 20
    while ledger.state(kept)["status"] != "waiting":
        assert time.monotonic() < ends
        time.sleep(0.01)
    assert heart.end() == [kept] and ledger.state(left)["status"] == "failed"


def test_outcomes_beyond_the_most_kept_and_forgotten_trials_are_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "MOST_KEPT", 2)
    ledger = Ledger(tmp_path)
    forgotten = ledger.open({})
    os.utime(tmp_path / f"{forgotten}.open", (0, 0))
    names = [ledger.open({}) for _ in range(4)]
    for at, name in enumerate(names):
        ledger.close(name, {"status": "done"})
        os.utime(tmp_path / f"{name}.json", (1e9 + at, 1e9 + at))
    ledger.close(ledger.open({}), {"status": "done"})
    assert len(list(tmp_path.glob("*.json"))) == 2 and not list(tmp_path.glob("*.open"))


@pytest.fixture
def queued(tmp_path, model_folder):
    """The settings of a server that sends its trials, and a way to start a worker for them."""
    settings = AppSettings(tmp_path, model=model_folder, celery="filesystem://")
    started = []

    def start(model=model_folder):
        told = {"WORKBENCH_RUNS": str(tmp_path), "WORKBENCH_MODEL": model, "WORKBENCH_CELERY": "filesystem://"}
        command = [sys.executable, "-m", "celery", "-A", "workbench.apps.celery_worker", "worker", "-P", "solo"]
        log = (tmp_path / "worker.log").open("wb")
        one = subprocess.Popen(
            [*command, "-Q", "workbench", "--loglevel", "INFO", "--without-gossip", "--without-mingle"],
            env=os.environ | told | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, stdout=log, stderr=log,
        )  # fmt: skip
        started.append((one, log))
        return one

    yield settings, start
    for one, log in started:
        one.terminate()
        try:
            one.wait(30)
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()
        log.close()


def test_a_worker_of_celery_runs_trials_for_any_server(queued):
    settings, start = queued
    live = Live(settings)
    name, given_up, unknown = (live.submit(TRIAL, work) for work in ("trial", "trial", "os.system"))
    live.cancel(given_up)
    assert live.state(name)["status"] == "waiting" and live.state(given_up)["status"] == "cancelled"
    # What lies in the queue is JSON, and no more than was asked for.
    messages = [json.loads(file.read_text()) for file in (lab_of(settings.runs) / "queue").glob("*.msg")]
    assert len(messages) == 3 and {one["content-type"] for one in messages} == {"application/json"}
    start()
    found = wait_for(live, name, "done", "failed")
    assert found["status"] == "done", found
    here = Live(AppSettings(settings.runs, model=settings.model))
    own = wait_for(here, here.submit(TRIAL, "trial"), "done")
    assert found["result"]["prompt"]["before"]["new"] == own["result"]["prompt"]["before"]["new"]
    assert found["asked"]["heads"] == ["L0H0"]
    assert "no work called" in wait_for(live, unknown, "failed")["error"]
    # The worker has read of the one that was given up, and written it down.
    ends = time.monotonic() + 30
    while not (lab_of(settings.runs) / f"{given_up}.json").exists():
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert live.state(given_up)["status"] == "cancelled"
    # One that runs is given up, too.
    long = {**TRIAL, "prompt": "", "probe": "perplexity", "draws": 50, "how": "zero"}
    running = live.submit(long, "trial")
    wait_for(live, running, "running")
    Live(settings).cancel(running)
    assert wait_for(live, running, "cancelled")
    here.close()


def test_a_worker_with_another_model_refuses(queued):
    settings, _ = queued
    live = Live(settings)
    name = live.submit(TRIAL, "trial")
    other = worker(AppSettings(settings.runs, model="another", celery="filesystem://"))
    other.tasks["workbench.trial"](name, "trial", TRIAL, settings.model)
    assert "holds another" in live.state(name)["error"]


def test_without_a_worker_the_page_hears_how_to_start_one(queued):
    settings, _ = queued
    live = Live(settings)
    name = live.submit(TRIAL, "trial")
    long_ago = time.time() - 3600
    os.utime(lab_of(settings.runs) / f"{name}.open", (long_ago, long_ago))
    state = live.state(name)
    assert state["status"] == "waiting" and "celery -A workbench.apps.celery_worker worker" in state["step"]


def test_nothing_but_json_is_sent_or_taken(queued):
    settings, _ = queued
    conf = connected(settings).conf
    assert conf.accept_content == ["json"] and conf.task_serializer == "json" and conf.task_ignore_result
    with pytest.raises(RequestError, match="cannot be sent"):
        Live(settings).submit({}, lambda model, progress: {})


def test_a_queue_that_is_not_there_is_told_of_and_nothing_is_left(tmp_path):
    live = Live(AppSettings(tmp_path, model="m", celery="amqp://user:secret@127.0.0.1:1//"))
    with pytest.raises(RequestError, match="cannot be reached") as found:
        live.submit(TRIAL, "trial")
    assert "secret" not in str(found.value) and "WORKBENCH_CELERY" in str(found.value)
    assert not list(lab_of(tmp_path).glob("*.open"))


def test_a_worker_without_its_settings_says_which(monkeypatch):
    monkeypatch.delenv("WORKBENCH_CELERY", raising=False)
    with pytest.raises(RequestError, match="WORKBENCH_CELERY"):
        worker(AppSettings.from_environment())
    monkeypatch.setenv("WORKBENCH_DTYPE", "int3")
    with pytest.raises(RequestError, match="WORKBENCH_DTYPE='int3'"):
        AppSettings.from_environment()
