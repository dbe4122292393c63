"""Models whose mechanism is known: planted circuits, compiled programs, a trained induction toy."""

from .compiled import compiled as compiled
from .copying import copying as copying
from .copying import negative_head as negative_head
from .handwritten import handwritten_induction as handwritten_induction
from .induction_pairs import handwritten_pairs as handwritten_pairs
from .induction_pairs import repeat_pairs as repeat_pairs
from .induction_toy import InductionSettings as InductionSettings
from .induction_toy import Progress as Progress
from .induction_toy import RepeatedSegments as RepeatedSegments
from .induction_toy import TrainedInduction as TrainedInduction
from .induction_toy import repeat_accuracy as repeat_accuracy
from .induction_toy import repeated_segments as repeated_segments
from .induction_toy import train_induction as train_induction
from .linear import linear_network as linear_network
from .planted import cancellation as cancellation
from .planted import gate as gate
from .planted import self_repair as self_repair
from .toy import ToyConfig as ToyConfig
from .toy import ToyModel as ToyModel
from .truth import Edge as Edge
from .truth import Estimate as Estimate
from .truth import GroundTruth as GroundTruth
from .truth import Outcome as Outcome
