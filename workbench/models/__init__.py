"""What a model is: its spec, where it comes from, the proof that our view of it is right, and what it costs."""

from workbench.models.architectures import LayerModules as LayerModules
from workbench.models.attach import Attachment as Attachment
from workbench.models.attach import AttentionCall as AttentionCall
from workbench.models.batch import Batch as Batch
from workbench.models.certificate import Certificate as Certificate
from workbench.models.certificate import Check as Check
from workbench.models.certificate import attach_model as attach_model
from workbench.models.spec import Head as Head
from workbench.models.spec import LayerSpec as LayerSpec
from workbench.models.spec import Spec as Spec
