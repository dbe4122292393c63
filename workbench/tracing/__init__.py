"""Sites, statistics and edits, and the model that runs them in one pass."""

from workbench.tracing import statistics as statistics
from workbench.tracing.edits import Ablation as Ablation
from workbench.tracing.edits import Edit as Edit
from workbench.tracing.edits import Patch as Patch
from workbench.tracing.edits import ablate as ablate
from workbench.tracing.edits import patch as patch
from workbench.tracing.generate import Generation as Generation
from workbench.tracing.loading import load as load
from workbench.tracing.model import Model as Model
from workbench.tracing.sites import SHAPES as SHAPES
from workbench.tracing.sites import SITES as SITES
from workbench.tracing.sites import Site as Site
from workbench.tracing.statistics import Statistic as Statistic
from workbench.tracing.trace import Trace as Trace
