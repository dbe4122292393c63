"""Circuits: what is moved between two runs of a model, and what that says about its parts."""

from workbench.circuits.effects import Effects as Effects
from workbench.circuits.effects import Work as Work
from workbench.circuits.patching import Options as Options
from workbench.circuits.patching import patch_activations as patch_activations
from workbench.circuits.patching import patch_changes as patch_changes
from workbench.circuits.spots import PATCH_SITES as PATCH_SITES
from workbench.circuits.spots import Change as Change
from workbench.circuits.spots import Spot as Spot
from workbench.circuits.spots import scan as scan
from workbench.circuits.spots import spot as spot
