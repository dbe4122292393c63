"""Discovery: which parts of a model, or which edges between them, do a task."""

from workbench.circuits.discovery.found import Found as Found
from workbench.circuits.discovery.methods import METHODS as METHODS
from workbench.circuits.discovery.methods import discover as discover
from workbench.circuits.discovery.methods import settings_of as settings_of
