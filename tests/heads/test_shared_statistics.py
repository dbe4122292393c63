"""One pass serves several detectors: what they share is taken once, and one name never stands for two things."""

from __future__ import annotations

from dataclasses import replace

import pytest

from workbench.errors import RequestError
from workbench.heads import DETECTORS
from workbench.heads.kinds import wanted_statistics
from workbench.tasks import repeated_tokens
from workbench.tracing import statistics as S

TASK = repeated_tokens(40, prompts=2, length=6, copies=2, bos_id=0)


def asking(name, *statistics):
    return replace(DETECTORS["entropy"], name=name, statistics=lambda task: list(statistics))


def test_what_detectors_share_is_taken_once():
    names = [one.name for one in wanted_statistics(TASK, [DETECTORS["echo"], DETECTORS["razor_induction"]])]
    assert len(names) == len(set(names)) and {"echo_keys", "induction_keys", "null_keys"} <= set(names)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (S.top_k(2)[0], S.top_k(5)[0]),
        (S.at_keys("key", TASK.keys["duplicate"]), S.at_keys("key", TASK.keys["null"])),
        (S.mass("span", TASK.batch.mask), S.mass("span", ~TASK.batch.mask)),
        (S.mass("values", TASK.batch.mask), S.value_mass("values")),
        (S.value_mass("size"), S.value_norm().__class__("size", S.value_norm().request, S.value_norm().read)),
    ],
    ids=["top_k", "at_keys", "mass", "mass and values", "values and none"],
)
def test_one_name_for_two_things_is_refused(one, other):
    with pytest.raises(RequestError, match=f"'first' and 'second' ask for different statistics called {one.name!r}"):
        wanted_statistics(TASK, [asking("first", one), asking("second", S.entropy(), other)])
    assert len(wanted_statistics(TASK, [asking("first", one), asking("second", one)])) == 1
