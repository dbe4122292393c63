"""Models that run elsewhere, traced as one's own (NDIF, through nnsight)."""

from workbench.tracing.remote.model import RemoteModel as RemoteModel
from workbench.tracing.remote.model import load_remote as load_remote
