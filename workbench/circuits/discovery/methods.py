"""Methods of discovery by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from workbench.circuits.discovery.acdc import acdc
from workbench.circuits.discovery.flow import flow_routes
from workbench.circuits.discovery.found import Found
from workbench.circuits.discovery.gating import causal_head_gating
from workbench.circuits.discovery.hisp import hisp
from workbench.circuits.discovery.optimal import optimal_ablation
from workbench.circuits.discovery.probing import subnetwork_probing
from workbench.circuits.discovery.pruning import edge_pruning
from workbench.circuits.discovery.ugs import ugs
from workbench.errors import RequestError
from workbench.tasks.pairs import PairTask
from workbench.tracing import Model

METHODS: dict[str, Callable[..., Found]] = {
    "acdc": acdc,
    "hisp": hisp,
    "subnetwork probing": subnetwork_probing,
    "edge pruning": edge_pruning,
    "ugs": ugs,
    "optimal ablation": optimal_ablation,
    "information flow routes": flow_routes,
    "causal head gating": causal_head_gating,
}


def discover(model: Model, task: PairTask, method: str = "acdc", **settings: Any) -> Found:
    """Find what matters by a method of `METHODS`; `settings` are those of its function, `seed` and `progress` too."""
    if method not in METHODS:
        raise RequestError(f"method={method!r} is unknown; choose from {', '.join(METHODS)}.")
    known = settings_of(method)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise RequestError(f"{method} has no setting {unknown[0]!r}; it has {', '.join(known)}.")
    return METHODS[method](model, task, **settings)


def settings_of(method: str) -> dict[str, Any]:
    """A method's settings with their defaults."""
    parameters = inspect.signature(METHODS[method]).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
