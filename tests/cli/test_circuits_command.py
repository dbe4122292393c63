"""`workbench circuits patch` and `tasks`, end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from workbench.runs import Run

TASK = ("--task", "lag_induction", "--pairs", 4)


@pytest.fixture(scope="module")
def patch_run(call, model_folder, tmp_path_factory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("runs") / "patch"
    result = call("circuits", "patch", model_folder, *TASK, "--site", "z,v", "--out", path)
    assert result.exit_code == 0, result.output
    return path, result.stdout


def test_a_patch_run_holds_the_tables_and_says_what_comes_next(patch_run, model_folder):
    path, printed = patch_run
    run = Run.open(path)
    assert run.kind == "patch"
    effects, prompts, pairs = (run.table(name) for name in ("effects", "prompt_effects", "pairs"))
    # Query heads for z, key/value heads for v, both directions.
    assert effects.groupby(["site", "direction"]).size().to_dict() == {
        ("z", "denoising"): 12, ("z", "noising"): 12, ("v", "denoising"): 6, ("v", "noising"): 6,
    }  # fmt: skip
    assert {"effect", "effect_low", "effect_high", "recovery", "low", "high", "p", "q", "n"} <= set(effects)
    assert len(prompts) == 4 * len(effects) and len(pairs) == 4
    means = prompts.groupby(["direction", "site", "node"])["effect"].mean()
    for row in effects.itertuples():
        assert means[row.direction, row.site, row.node] == pytest.approx(row.effect, abs=1e-9)
    about = run.manifest["circuits"]
    assert about["clean"] == pytest.approx(pairs["clean"].mean()) and about["n"] == 4
    assert about["work"]["naive_rows"] > about["work"]["rows"] > 0
    assert run.manifest["prompts"][0]["n"] == 4 and run.manifest["settings"]["seed"] == 0
    for text in ("What is restored", "What is broken", "Report:", "--paths", "p cannot fall below"):
        assert text in printed


def test_it_equals_the_library(patch_run, model_folder):
    from workbench.circuits import patch_activations
    from workbench.studies.pairs import find_pairs
    from workbench.tracing import load

    model = load(model_folder)
    expected = patch_activations(model, find_pairs(model, "lag_induction", 4), "z", "head").table()
    found = Run.open(patch_run[0]).table("effects").query("site == 'z'")
    assert np.allclose(found["effect"], expected["effect"], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "columns", "count"),
    [
        (["--site", "resid_pre", "--layers", "0-1", "--direction", "noising"], {"position"}, None),
        (["--by", "head_position", "--positions", "END,B1"], {"position", "head"}, 3 * 4 * 2 * 2),
        (["--paths", "logits", "--form", "strict"], {"receiver"}, 2 * 15),
        (["--paths", "L2H1.q,L2KV0.v", "--apart", "--direction", "denoising"], {"receiver"}, None),
    ],
)
def test_other_forms(call, model_folder, tmp_path, arguments, columns, count):
    result = call("circuits", "patch", model_folder, *TASK, *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    effects = Run.open(tmp_path / "run").table("effects")
    assert columns <= set(effects) and effects[list(columns)].notna().all(axis=None)
    assert count is None or len(effects) == count
    assert effects["effect"].notna().any()
    if "--apart" in arguments:
        # Two inputs of layer 2, from two layers of four heads and an MLP each, and from layer 2 that cannot reach.
        assert set(effects["receiver"]) == {"L2H1.q", "L2KV0.v"}
        late = effects[effects["layer"] == 2]
        assert np.allclose(late["effect"], 0, atol=1e-5) and (effects["effect"].abs() > 1e-6).any()


def test_pairs_from_a_file(call, model_folder, tmp_path):
    rows = [
        {"clean": f"the {a} is", "corrupt": f"the {b} is", "answer": " the", "foil": " in", "roles": {"WORD": a}}
        for a, b in (("object", "value"), ("value", "list"), ("list", "object"))
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ("circuits", "patch", model_folder, "--task", file, "--out", tmp_path / "run", "--by", "head_position")
    result = call(*words)
    assert result.exit_code == 0, result.output
    run = Run.open(tmp_path / "run")
    assert run.manifest["circuits"]["task"] == "own" and len(run.table("pairs")) == 3
    assert run.table("positions")["role"].tolist() == ["", "WORD", "END"]
    too_many = call(*words[:5], "--out", tmp_path / "b", "--pairs", 9)
    assert too_many.exit_code == 2 and "fewer than the 9" in too_many.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "ioy"], "Did you mean 'ioi'"),
        (["--task", "none.csv"], "There is no file none.csv"),
        (["--task", "ioi", "--site", "zz"], "'zz' cannot be patched"),
        (["--task", "ioi", "--site", "mlp_out", "--by", "head"], "has no heads"),
        (["--task", "ioi", "--by", "key"], "the site pattern alone"),
        (["--task", "ioi", "--paths", "L9H9"], "is no receiver"),
        (["--task", "ioi", "--paths", "logits", "--site", "z"], "leave out --site"),
        (["--task", "ioi", "--apart"], "--apart is about receivers"),
        (["--task", "ioi", "--layers", "3-1"], "names no layers"),
        (
            ["--task", "ioi", "--positions", "S2"],
            "--by head, which patches all tokens together; add --by head_position",
        ),
        (["--task", "ioi", "--site", "mlp_out", "--by", "layer", "--positions", "0"], "add --by position."),
        (["--task", "ioi", "--site", "pattern", "--by", "key", "--positions", "END"], "as numbers, and 'END' is none"),
        (["--task", "ioi", "--form", "strict"], "--form is about receivers"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_loads(call, arguments, message):
    result = call("circuits", "patch", "no-such-model", *arguments)
    assert result.exit_code == 2 and message in result.stderr


GOOD = {"clean": "the object is", "corrupt": "the value is", "answer": " the", "foil": " in"}


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([GOOD], [], "has one pair, of which nothing can be told from chance; write 2 pairs or more"),
        ([GOOD, GOOD], ["--pairs", 3], "has 2 pairs, fewer than the 3 asked for"),
        ([GOOD, GOOD | {"answers": "x"}], [], "line 2: field 'answers' is unknown"),
        ([GOOD, GOOD | {"corrupt": GOOD["clean"]}], [], "equals 'clean'"),
        ([GOOD, GOOD | {"foil": [" in", 3]}], [], "line 2: field 'foil' is 3; give a text"),
        ([GOOD, GOOD | {"roles": {"A": "horse"}}], [], "comes 0 times in 'clean'"),
        ([], [], "has no pairs"),
    ],
)
@pytest.mark.parametrize("command", ["patch", "attribute"])
def test_files_are_checked_before_a_model_loads(call, tmp_path, command, lines, arguments, message):
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    result = call("circuits", command, "no-such-model", "--task", file, *arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message", "loaded"),
    [
        (["--layers", "30"], "Layer 30 does not exist: layers run from 0 to 2", False),
        (["--paths", "L99H1.q"], "Layer 99 does not exist", False),
        (["--paths", "L2H30.q"], "L2H30 does not exist: heads of layer 2 run from 0 to 3", False),
        (["--paths", "L2KV7.v"], "key/value heads of layer 2 run from 0 to 1", True),
        (["--by", "head_position", "--positions", "99"], "No prompt has position 99: positions of the longest", True),
        (["--by", "head_position", "--positions", "FOO"], "no role 'FOO'; its roles are", True),
    ],
)
def test_places_that_do_not_exist_are_refused_before_any_run(call, model_folder, tmp_path, arguments, message, loaded):
    result = call("circuits", "patch", model_folder, *TASK, *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
    assert ("checks of its certificate" in result.stderr) == loaded and "baseline" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_what_comes_next_names_a_head_that_receives_or_nothing(call, model_folder, patch_run, tmp_path):
    from workbench.studies.patches import receivers

    said = patch_run[1].partition("--paths ")[2].split()[0]
    (named,) = receivers((said,))
    rows = Run.open(patch_run[0]).table("effects").query("site == 'z' and layer > 0")
    top = rows.loc[rows["effect"].abs().idxmax()]
    assert (named.layer, named.head, named.site) == (top["layer"], top["head"], "q")
    # By position, z is of all heads of a layer together, and no head's.
    words = ("--site", "z,resid_pre", "--direction", "noising", "--out", tmp_path / "run")
    result = call("circuits", "patch", model_folder, *TASK, *words)
    assert result.exit_code == 0 and "--paths" not in result.stdout, result.output


def test_tasks_are_listed_and_measured(call, model_folder):
    from workbench.circuits import PATCH_SITES
    from workbench.circuits.spots import BYS
    from workbench.cli.circuit_options import SITES, TASKS, MetricName
    from workbench.cli.circuits import ByName, FormName
    from workbench.tasks.pair_tasks import PAIR_TASKS
    from workbench.tasks.pairs import METRICS

    assert (tuple(PAIR_TASKS), PATCH_SITES) == (TASKS, SITES)
    assert ({one.value for one in ByName}, {one.value for one in MetricName}) == (set(BYS), set(METRICS))
    assert {one.value for one in FormName} == {"wang", "strict"}
    plain = call("circuits", "tasks")
    assert plain.exit_code == 0 and set(PAIR_TASKS) <= set(plain.stdout.split())
    measured = call("circuits", "tasks", model_folder, "--pairs", 4)
    assert measured.exit_code == 0, measured.output
    # Random weights know nothing; a tokenizer without names says what it lacks.
    assert "%" in measured.stdout and "as single tokens" in measured.stdout


def test_a_run_is_shown_again(call, patch_run):
    result = call("runs", "show", patch_run[0])
    assert result.exit_code == 0, result.output
    assert "What is restored" in result.stdout and "4 pairs, logit difference" in result.stdout


class Stopping:
    """Interrupts before a step, once; notes what was kept."""

    def __init__(self, at: str | None) -> None:
        self.at = at
        self.kept: dict[str, bool] = {}

    def step(self, name: str, title: str, kept: bool) -> None:
        self.kept[name] = kept
        if name == self.at:
            raise KeyboardInterrupt

    def advance(self, done: int, total: int) -> None:
        return None


def test_an_interrupted_run_goes_on_with_the_other_direction(patch_run, model_folder, tmp_path):
    from workbench.studies.pairs import find_pairs
    from workbench.studies.patches import PatchSettings
    from workbench.studies.patches import patch_run as run_patches
    from workbench.tracing import load

    model, settings = load(model_folder), PatchSettings()
    task = find_pairs(model, "lag_induction", 4)
    with pytest.raises(KeyboardInterrupt):
        run_patches(model, task, tmp_path / "run", settings=settings, reporter=Stopping("patch:z:noising"))
    again = Stopping(None)
    run = run_patches(model, task, tmp_path / "run", settings=settings, reporter=again)
    assert again.kept == {"baseline": True, "patch:z:denoising": True, "patch:z:noising": False}
    whole = Run.open(patch_run[0]).table("effects").query("site == 'z'").reset_index(drop=True)
    assert np.allclose(run.table("effects")["effect"], whole["effect"], atol=1e-5)
    assert list(run.table("effects")["direction"]) == list(whole["direction"])
