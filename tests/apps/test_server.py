"""The server: what it answers to whom, and that names lead nowhere else."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from workbench.apps.address import link, read_choice, read_heads, read_list, read_number, read_query, to_query
from workbench.apps.library import NoteChanged, RunLibrary
from workbench.apps.server import create_app
from workbench.apps.settings import AppSettings
from workbench.errors import RequestError, RunError, RunNotFound


@pytest.fixture(scope="module")
def client(runs_folder):
    return create_app(AppSettings(runs_folder)).server.test_client()


def get(client, path, **headers):
    return client.get(path, base_url="http://127.0.0.1", headers=headers)


def test_every_answer_forbids_scripts_and_sources_of_others(client):
    for path in ("/", "/theme.css", "/zoom/needle/l4h2/about", "/zoom/none/l4h2/about", "/assets/zoom.js"):
        with get(client, path) as answer:
            headers = answer.headers
        policy = headers["Content-Security-Policy"]
        scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
        assert "unsafe" not in scripts and "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and "Server" not in headers


def test_other_hosts_and_origins_are_refused(client):
    assert get(client, "/").status_code == 200
    assert client.get("/", base_url="http://evil.example").status_code == 403
    assert get(client, "/", Origin="http://evil.example").status_code == 403
    assert get(client, "/", Origin="http://127.0.0.1").status_code == 200


def test_a_callback_larger_than_allowed_is_refused(client):
    answer = client.post("/_dash-update-component", base_url="http://127.0.0.1", json="x" * (5 << 20))
    assert answer.status_code == 413


@pytest.mark.parametrize("body", [{}, [], "x", None, {"output": []}, {"output": "no.such", "inputs": []}])
def test_a_callback_that_no_page_sends_is_refused(client, body):
    answer = client.post("/_dash-update-component", base_url="http://127.0.0.1", json=body)
    assert answer.status_code == 400
    answer = client.post("/_dash-update-component", base_url="http://127.0.0.1", data=b"\xff{")
    assert answer.status_code == 400


@pytest.mark.parametrize("name", ["..", "../runs", ".", "", "/etc", "a/b", "needle/../needle", ".needle", "a\0b"])
def test_names_do_not_lead_out_of_the_folder(client, runs_folder, name):
    with pytest.raises(RunNotFound):
        RunLibrary(runs_folder).path(name)
    answer = get(client, f"/zoom/{quote(name, safe='')}/l4h2/about")
    # An address that is none of ours gets the empty page, which reads nothing.
    assert answer.status_code == 404 or answer.mimetype == "text/html"


def test_a_link_out_of_the_folder_is_not_followed(tmp_path, runs_folder):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "elsewhere").symlink_to(runs_folder / "needle")
    with pytest.raises(RunNotFound):
        RunLibrary(folder).run("elsewhere")


def test_the_library_reads_a_run_again_only_when_it_changed(runs_folder):
    library = RunLibrary(runs_folder)
    assert library.run("needle") is library.run("needle")
    assert library.frame("needle", "tokens") is library.frame("needle", "tokens")
    assert list(library.table()["name"]) and library.table() is library.table()


def test_notes_lie_beside_the_run_and_leave_it_valid(tmp_path):
    from workbench.runs import Run, RunWriter

    with RunWriter.open(tmp_path / "runs" / "a", kind="heads", title="T", fingerprint={}) as writer:
        writer.finish()
    library = RunLibrary(tmp_path / "runs")
    library.write_note("a", "L1H2", "looks back <b>")
    library.write_note("a", "run", "first")
    assert library.notes("a") == {"L1H2": "looks back <b>", "run": "first"}
    library.write_note("a", "run", "")
    assert library.notes("a") == {"L1H2": "looks back <b>"}
    Run.open(tmp_path / "runs" / "a")
    # Whoever has not seen what is stored by now does not write over it; the same words are no conflict.
    library.write_note("a", "L1H2", "B's", read="looks back <b>")
    with pytest.raises(NoteChanged) as changed:
        library.write_note("a", "L1H2", "A's", read="looks back <b>")
    assert changed.value.stored == "B's" == library.notes("a")["L1H2"]
    library.write_note("a", "L1H2", "B's", read="")
    with pytest.raises(NoteChanged):
        library.write_note("a", "L1H2", "", read="looks back <b>")
    with pytest.raises(RequestError, match="10000 are allowed"):
        library.write_note("a", "run", "x" * 10_001)
    (tmp_path / "runs" / "a" / "notes.json").write_text("[")
    with pytest.raises(RunError, match="cannot be read"):
        library.notes("a")


def test_only_runs_are_deleted(tmp_path):
    from workbench.runs import RunWriter

    with RunWriter.open(tmp_path / "a", kind="heads", title="T", fingerprint={}) as writer:
        writer.finish()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    library = RunLibrary(tmp_path)
    with pytest.raises(RunError, match="left alone"):
        library.delete("precious")
    library.delete("a")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["precious"]


def test_addresses_say_what_a_page_shows():
    assert read_query(to_query({"run": "a b&c", "head": "L1H2", "empty": "", "none": None})) == {
        "run": "a b&c",
        "head": "L1H2",
    }
    assert link("/atlas", run="x") == "/atlas?run=x" and link("/atlas") == "/atlas"
    assert read_query("?a=1&a=2&b=%00") == {"a": "2"} and read_query(None) == {}
    assert read_query("?" + "&".join(f"k{i}=1" for i in range(500))) == {}
    query = {"how": "max", "list": "a,b,,a,zz", "n": "1e9", "heads": "L1H2,4.2,nonsense,L1H2"}
    assert read_choice(query, "how", ["mean", "max"], "mean") == "max"
    assert read_choice(query, "other", ["mean"], "mean") == "mean"
    assert read_list(query, "list", ["a", "b"]) == ["a", "b"] and read_list(query, "list") == ["a", "b", "zz"]
    assert read_number(query, "n", 0, 10, 5) == 5 and read_number({"n": "nan"}, "n", 0, 10, 5) == 5
    assert read_heads(query) == ["L1H2", "L4H2"]
