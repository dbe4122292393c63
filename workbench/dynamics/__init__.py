"""Toys whose mechanism is known: a small model, a hand-written circuit, a trained induction task."""

from .handwritten import handwritten_induction as handwritten_induction
from .induction_toy import InductionSettings as InductionSettings
from .induction_toy import Progress as Progress
from .induction_toy import RepeatedSegments as RepeatedSegments
from .induction_toy import TrainedInduction as TrainedInduction
from .induction_toy import repeat_accuracy as repeat_accuracy
from .induction_toy import repeated_segments as repeated_segments
from .induction_toy import train_induction as train_induction
from .toy import ToyConfig as ToyConfig
from .toy import ToyModel as ToyModel
