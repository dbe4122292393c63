"""Attribution: what every node and edge does, estimated from gradients at a few points."""

from workbench.circuits.attribution.attribute import DIVERGENCE as DIVERGENCE
from workbench.circuits.attribution.attribute import attribute as attribute
from workbench.circuits.attribution.methods import METHODS as METHODS
from workbench.circuits.attribution.methods import Method as Method
