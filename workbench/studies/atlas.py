"""An atlas: every detector of a chosen set on one model, where they agree, and which kinds of heads there are.

1. The steps of a survey (`detect:<kind>`, `examples`), tolerant: what cannot run on the model is listed with its
   reason. Prompts of one kind share their passes; each step is kept when the next is interrupted.
2. `agreement`: rank correlations and overlaps of all pairs of detectors.
3. `clusters`: clusters of heads on all scores, and their map in two dimensions.
4. `readings`: which tokens the strongest directions of all heads' circuits read and write, where any detector reads
   weights.

Tables beyond those of a survey: `agreement`, `overlap`, `head_clusters`, `cluster_info`, `circuit_directions`,
`skipped`; the manifest's
`atlas` holds the axes and the silhouettes. No causal check: `workbench verify` makes those, detector by detector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from workbench.errors import RequestError
from workbench.heads import Settings
from workbench.heads.agreement import agreement
from workbench.heads.clusters import METHODS, Method, cluster_heads
from workbench.heads.detection import choose
from workbench.heads.sets import members
from workbench.heads.weights import WEIGHTS
from workbench.runs import Run, RunWriter
from workbench.studies.readings import write_readings
from workbench.studies.survey import Reporter, Step, SurveySettings, survey
from workbench.tracing import Model

KIND = "atlas"
# Heads whose patterns are kept for the token view.
EXAMPLES = 12


def atlas_settings(
    detectors: tuple[str, ...] | None = None, *, group: str = "fast", detection: Settings | None = None
) -> SurveySettings:
    """A survey of the named detectors, or of a set (`workbench.heads.sets`), as an atlas runs it."""
    return SurveySettings(
        detectors=detectors or members(group),
        verify=(),
        top=1,
        examples=EXAMPLES,
        tolerant=True,
        detection=detection or Settings(),
    )


def atlas(
    model: Model,
    path: str | Path,
    *,
    settings: SurveySettings | None = None,
    method: Method = "pca",
    overwrite: bool = False,
    reporter: Reporter | None = None,
    command: str | None = None,
) -> Run:
    """Run an atlas of a model into a run of kind `atlas` at `path`; continues one that was interrupted.

    Raises `RequestError` where not one detector can run, and what `survey` raises.
    """
    if method not in METHODS:
        raise RequestError(f"method={method!r} makes no map; choose one of {', '.join(METHODS)}.")
    settings = replace(settings or atlas_settings(), method=method)
    seed = settings.detection.seed
    return survey(
        model,
        path,
        settings=settings,
        kind=KIND,
        title=f"Atlas of the attention heads of {model.source.name}",
        overwrite=overwrite,
        reporter=reporter,
        command=command,
        then=(
            Step("agreement", "rank correlations and overlaps of the detectors", partial(_agreement, seed=seed)),
            Step("clusters", "kinds of heads, and their map", partial(_clusters, method=method, seed=seed)),
            *[
                Step("readings", "tokens that circuits read and write", partial(write_readings, model=model))
                for _ in range(_reads_weights(settings))
            ],
        ),
    )


def more_steps(settings: SurveySettings) -> int:
    """How many steps come after those of a survey."""
    return 2 + _reads_weights(settings)


def _reads_weights(settings: SurveySettings) -> bool:
    return any(detector.kind == WEIGHTS.name for detector in choose(settings.detectors))


def _agreement(writer: RunWriter, seed: int) -> None:
    scores, detectors = writer.written("head_scores"), writer.written("detectors")
    found = agreement(scores, detectors, seed=seed)
    if len(found.correlations):
        writer.table("agreement", found.correlations)
        writer.table("overlap", found.overlaps)


def _clusters(writer: RunWriter, method: Method, seed: int) -> None:
    """Clusters and map; a model too small for any has none, and the manifest says why."""
    try:
        found = cluster_heads(writer.written("head_scores"), writer.written("detectors"), method=method, seed=seed)
    except RequestError as error:
        writer.manifest["atlas"] = {"no_map": str(error)}
        return
    writer.table("head_clusters", found.heads)
    writer.table("cluster_info", found.clusters)
    about: Mapping[str, Any] = {
        "method": found.method, "axes": list(found.axes), "silhouette": found.silhouette,
        "null_silhouette": found.null_silhouette, "null_highest": found.null_highest,
        "structured": found.structured, "left_out": found.left_out,
    }  # fmt: skip
    writer.manifest["atlas"] = dict(about)
