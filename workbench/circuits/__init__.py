"""Circuits: what is moved between two runs of a model, and what that says about its parts."""

from workbench.circuits.effects import Effects as Effects
from workbench.circuits.effects import Work as Work
from workbench.circuits.graph import Graph as Graph
from workbench.circuits.graph import Scores as Scores
from workbench.circuits.knockout import attention_edges as attention_edges
from workbench.circuits.knockout import knock_out as knock_out
from workbench.circuits.mediation import mediation as mediation
from workbench.circuits.patching import Options as Options
from workbench.circuits.patching import patch_activations as patch_activations
from workbench.circuits.patching import patch_changes as patch_changes
from workbench.circuits.paths import patch_paths as patch_paths
from workbench.circuits.spots import PATCH_SITES as PATCH_SITES
from workbench.circuits.spots import Change as Change
from workbench.circuits.spots import Spot as Spot
from workbench.circuits.spots import scan as scan
from workbench.circuits.spots import spot as spot
from workbench.circuits.subspaces import Subspace as Subspace
from workbench.circuits.subspaces import orthonormal as orthonormal
from workbench.circuits.subspaces import patch_subspaces as patch_subspaces
from workbench.circuits.subspaces import principal_subspace as principal_subspace
from workbench.circuits.subspaces import written_subspace as written_subspace
