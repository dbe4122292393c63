"""Named sets of detectors, for those who would not name each."""

from __future__ import annotations

from workbench.errors import RequestError
from workbench.heads.detector import Detector
from workbench.heads.detectors import CORE, DETECTORS
from workbench.heads.kinds import KINDS

SETS = {
    "core": "what `workbench heads` runs",
    "fast": "all but the costly ones",
    "all": "every detector",
}


def is_costly(detector: Detector) -> bool:
    """Whether it takes minutes where others take seconds, by itself or by the run of its kind."""
    return detector.costly or KINDS[detector.kind].costly


def members(name: str) -> tuple[str, ...]:
    """The detectors of a set, in the order of `DETECTORS`."""
    if name not in SETS:
        raise RequestError(f"No set of detectors {name!r}; there are {', '.join(SETS)}.")
    if name == "core":
        return tuple(CORE)
    return tuple(one for one, detector in DETECTORS.items() if name == "all" or not is_costly(detector))
