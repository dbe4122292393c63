"""What a report says of controls, of few prompts and of what to do next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from workbench.heads.inference import paired_p, unpaired_p
from workbench.reports.catalogue import catalogue
from workbench.reports.commands import heads_command, verify_command
from workbench.reports.findings import findings, remarks, summary, verification_rows
from workbench.reports.prompts import least_p
from workbench.reports.source import shown_title


def changed(demo: Any, table: str, where: str, **values: Any) -> Any:
    """The demo with other values in the rows of one detector."""
    rows = demo.table(table).copy()
    rows.loc[rows["detector"] == where, list(values)] = list(values.values())
    return replace(demo, frames=demo.frames | {table: rows})


def told(run: Any) -> str:
    known = catalogue(run)
    return str(summary(run, known, findings(run, known)))


def test_effect_beyond_the_mean_of_the_controls_is_not_called_no_more(demo: Any) -> None:
    inside = {"effect": 8.70, "low": 8.49, "high": 8.93, "ablated": 9.91}
    controls = {"control_effect": 2.62, "control_low": -0.47, "control_high": 9.54}
    said = told(changed(demo, "verification", "previous_token", **inside, **controls))
    assert (
        "induction loss from 1.21 to 9.91 nats per token (+8.70), more than random heads do on average (+2.62) but "
        "within their range (−0.47 to 9.54), so the claim stays open"
    ) in said
    alike = changed(demo, "verification", "previous_token", **inside, **controls | {"control_effect": 8.6})
    assert "Previous token is strongest" in told(alike)
    assert "stays open" not in told(alike)
    assert told(alike).count("does no more than ablating random ones") == 2


def test_effect_far_below_the_metric_is_zero(demo: Any) -> None:
    none = {"baseline": 0.62, "ablated": 0.62 - 2e-8, "effect": -2e-8, "low": -3e-8, "high": 0.0}
    run = changed(demo, "verification", "duplicate_token", **none)
    row = verification_rows(run, catalogue(run))[4]
    assert (row["baseline"], row["ablated"], row["effect"]) == ("0.620", "0.620", "0.000")
    assert row["interval"] == "0.000 to 0.000"


@pytest.mark.parametrize(("prompts", "better"), [(2, "higher"), (4, "lower"), (10, "higher"), (30, "higher")])
def test_least_p_is_what_the_test_can_give(prompts: int, better: Any) -> None:
    values = np.full((prompts, 1), 1.0 if better == "higher" else -1.0)
    assert paired_p(values, np.zeros_like(values), better, 0)[0] == pytest.approx(least_p(prompts, better))


@pytest.mark.parametrize("prompts", [2, 4])
def test_least_p_of_either_sign_bounds_both_tests(prompts: int) -> None:
    values = np.arange(prompts, dtype=float)[:, None]
    assert unpaired_p(values + 9, values, 0)[0] == pytest.approx(least_p(prompts, "either"))
    assert paired_p(values + 9, values, "either", 0)[0] >= least_p(prompts, "either")


def test_too_few_prompts_are_named_as_the_reason(demo: Any) -> None:
    few = changed(demo, "head_scores", "retrieval", n=4, p=0.0625, q=0.0625)
    said = "none of them is distinguished from the null: with 4 prompts no q below 0.05 is possible; use more prompts"
    assert said in told(few)
    assert "with 4 prompts" in remarks(few, catalogue(few))["retrieval"]
    floor = changed(demo, "head_scores", "retrieval", n=5, p=2.0**-5, q=0.4)
    assert "no p below 0.03 is possible, too large for a q below 0.05 over all heads" in told(floor)
    enough = changed(demo, "head_scores", "retrieval", n=5, p=0.2, q=0.4)
    assert "use more prompts" not in told(enough)


def test_commands_are_complete(demo: Any) -> None:
    run = replace(demo, manifest=demo.manifest | {"command": "workbench heads 'my model' --prompts 2"})
    found = findings(run, catalogue(run))
    assert verify_command(run, found) == ("workbench verify 'my model' --detector sink", "Attention sink")
    assert heads_command(run) == "workbench heads 'my model'"
    assert verify_command(demo, [])[0] == "workbench verify synthetic/30x9 --detector induction"


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ("Ablation of L1H0, L1H1, L1H2, L1H3, L12H4 in m", "Ablation of L1H0, L1H1, L1H2 and 2 more in m"),
        ("Ablation of L1H0, L1H1, L1H2 in m", "Ablation of L1H0, L1H1, L1H2 in m"),
    ],
)
def test_title_names_three_heads_at_most(demo: Any, title: str, shown: str) -> None:
    assert shown_title(replace(demo, manifest=demo.manifest | {"title": title})) == shown
