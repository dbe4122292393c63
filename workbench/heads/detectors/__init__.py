"""Every detector by name; one module a kind of prompt."""

from workbench.heads.detector import Detector
from workbench.heads.detectors import (
    circuits,
    evaluators,
    given,
    inactive,
    lengths,
    names,
    needle,
    patterns,
    repeated,
    shape,
    sinks,
    successor,
    templates,
    text,
)

DETECTORS: dict[str, Detector] = {
    detector.name: detector
    for detector in (
        text.SINK,
        text.FIRST_TOKEN,
        text.ENTROPY,
        text.ACTIVE_DORMANT,
        *sinks.SINKS,
        *inactive.INACTIVE,
        *shape.SHAPE,
        *lengths.LENGTHS,
        *patterns.PATTERNS,
        repeated.PREVIOUS_TOKEN,
        repeated.DUPLICATE_TOKEN,
        repeated.INDUCTION,
        repeated.ECHO,
        needle.RETRIEVAL,
        needle.COPY_MASS,
        needle.RETRIEVAL_GREEDY,
        *circuits.CIRCUITS,
        successor.SUCCESSOR,
        names.NAME_COPYING,
        names.NAME_SUPPRESSION,
        evaluators.PREFIX_MATCHING,
        evaluators.TOKEN_COPYING,
        evaluators.QK_TRACE,
        *templates.TEMPLATES,
        needle.ACTIVATION_FREQUENCY,
        needle.SEMANTIC_RETRIEVAL,
        given.HEADKV_R2,
        given.JSON_RETRIEVAL,
    )
}
# What `workbench heads`, `verify` and the demo run unless told otherwise; the atlas runs all.
CORE = (
    *("sink", "first_token", "entropy", "active_dormant", "previous_token", "duplicate_token", "induction"),
    *("echo", "retrieval", "copy_mass", "retrieval_greedy"),
)
