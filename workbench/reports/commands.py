"""Commands that a report offers for what its run left open, complete with the run's model and detector."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from workbench.reports.source import RunLike

if TYPE_CHECKING:
    from workbench.reports.findings import Finding

_SUBCOMMANDS = ("heads", "verify", "trace", "atlas")


def model_argument(run: RunLike) -> str:
    """How the run's own command named its model, quoted for a shell; its recorded name where that is not to be seen."""
    try:
        words = shlex.split(str(run.manifest.get("command") or ""))
    except ValueError:
        words = []
    named = words[2:3] if words[:1] == ["workbench"] and words[1:2] and words[1] in _SUBCOMMANDS else []
    if named and not named[0].startswith("-"):
        return shlex.quote(named[0])
    name = run.manifest.get("model", {}).get("name")
    return shlex.quote(str(name)) if name else "MODEL"


def heads_command(run: RunLike) -> str:
    """Scores all heads."""
    return f"workbench heads {model_argument(run)}"


def verify_command(run: RunLike, found: list[Finding]) -> tuple[str, str]:
    """Tests the first detector that names a head, or else the first; and its title, empty where none was scored."""
    named = [finding for finding in found if (finding.passing or 0) > finding.weak]
    first = next(iter(named or found), None)
    if first is None:
        return f"workbench verify {model_argument(run)} --detector induction", ""
    detector = shlex.quote(first.detector.name)
    return f"workbench verify {model_argument(run)} --detector {detector}", first.detector.title
