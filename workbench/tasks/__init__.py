"""Prompts with labelled positions, and the metrics that score a model on them."""

from .domains import DOMAINS as DOMAINS
from .domains import text_domains as text_domains
from .long_texts import TOKEN_CLASSES as TOKEN_CLASSES
from .long_texts import long_texts as long_texts
from .long_texts import token_classes as token_classes
from .metrics import ANSWER_LOG_PROBABILITY as ANSWER_LOG_PROBABILITY
from .metrics import ANSWER_MATCH as ANSWER_MATCH
from .metrics import COPY_ACCURACY as COPY_ACCURACY
from .metrics import HELD_OUT_LOSS as HELD_OUT_LOSS
from .metrics import INDUCTION_LOSS as INDUCTION_LOSS
from .metrics import METRICS as METRICS
from .metrics import NEEDLE_RECALL as NEEDLE_RECALL
from .metrics import Metric as Metric
from .metrics import Readings as Readings
from .metrics import TextMetric as TextMetric
from .metrics import accepted as accepted
from .metrics import needle_recall as needle_recall
from .metrics import read_answers as read_answers
from .needle import needle_grid as needle_grid
from .needles import NEEDLES as NEEDLES
from .needles import Needle as Needle
from .plain import one_token as one_token
from .plain import random_tokens as random_tokens
from .repeats import repeated_tokens as repeated_tokens
from .task import NONE as NONE
from .task import Task as Task
