"""Every measurement that a study can ask for, by name."""

from workbench.studies.measurements.base import Bench as Bench
from workbench.studies.measurements.base import Measurement as Measurement
from workbench.studies.measurements.base import Parameters as Parameters
from workbench.studies.measurements.base import Tables as Tables
from workbench.studies.measurements.claims import CLAIMS
from workbench.studies.measurements.found import FOUND
from workbench.studies.measurements.letters import LETTERS
from workbench.studies.measurements.pairs import BEHAVIOUR
from workbench.studies.measurements.recall import RECALL
from workbench.studies.measurements.reuse import REUSE
from workbench.studies.measurements.saturation import SATURATION
from workbench.studies.measurements.sinks import SINKS
from workbench.studies.measurements.texts import TEXTS
from workbench.studies.measurements.years import YEARS

MEASUREMENTS: dict[str, Measurement] = {
    one.name: one
    for one in (*CLAIMS, *SINKS, *TEXTS, *BEHAVIOUR, *REUSE, *RECALL, *YEARS, *LETTERS, *FOUND, *SATURATION)
}
