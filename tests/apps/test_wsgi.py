"""The deployable: what its environment variables set, and the command that its container starts."""

from __future__ import annotations

import http.client
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

APPS = Path(__file__).resolve().parents[2] / "apps"


@pytest.fixture
def app(monkeypatch, runs_folder):
    monkeypatch.setenv("WORKBENCH_RUNS", str(runs_folder))
    monkeypatch.setenv("WORKBENCH_HOSTS", "workbench.example.org, inner")
    monkeypatch.setenv("WORKBENCH_MODEL", "")
    return runpy.run_path(str(APPS / "wsgi.py"))


def test_only_configured_hosts_are_served(app):
    client = app["app"].test_client()
    for host in ("workbench.example.org", "inner:8050"):
        assert client.get("/", base_url=f"http://{host}").status_code == 200
    for host in ("127.0.0.1", "evil.example", "workbench.example.org.evil.example"):
        assert client.get("/", base_url=f"http://{host}").status_code == 403


def test_settings_come_from_the_environment(app, monkeypatch, runs_folder):
    assert app["settings"].runs == runs_folder and app["settings"].model is None
    for name in ("WORKBENCH_RUNS", "WORKBENCH_HOSTS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORKBENCH_MODEL", "smollm2-135m")
    settings = runpy.run_path(str(APPS / "wsgi.py"))["settings"]
    assert (str(settings.runs), settings.model, settings.hosts) == ("runs", "smollm2-135m", ("127.0.0.1", "localhost"))


def test_the_command_of_the_container_serves_runs(runs_folder):
    found = re.search(r"^CMD (\[.*\])$", (APPS / "Containerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    program, *words = json.loads(found[1])
    assert program.endswith("/waitress-serve") and "--listen=0.0.0.0:8050" in words
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words[words.index("--listen=0.0.0.0:8050")] = f"--listen=127.0.0.1:{port}"
    settings = {"WORKBENCH_RUNS": str(runs_folder), "WORKBENCH_HOSTS": "workbench.example.org"}
    server = subprocess.Popen([sys.executable, "-m", "waitress", *words], cwd=APPS, env=os.environ | settings)
    try:
        assert ask(server, port, "/export/report.html?run=scores", "workbench.example.org") == (200, None)
        assert ask(server, port, "/", "127.0.0.1") == (403, None)
    finally:
        server.terminate()
        server.wait(20)


def ask(server, port, path, host):
    """Status and `Server` header of an answer, once the server listens."""
    ends = time.monotonic() + 60
    while True:
        assert server.poll() is None and time.monotonic() < ends, "the server does not answer"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
        except ConnectionRefusedError:
            time.sleep(0.2)
            continue
        answer.read()
        connection.close()
        return answer.status, answer.headers["Server"]


def test_what_the_image_copies_is_there():
    text = (APPS / "Containerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]
    assert {"workbench", "apps/wsgi.py", "requirements.lock"} <= set(copied)
    assert all((APPS.parent / name).exists() for name in copied)
