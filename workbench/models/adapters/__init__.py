"""Libraries around a model that we attach to: TransformerLens and nnsight, beside Hugging Face itself."""

from workbench.models.adapters.choose import host_of as host_of
from workbench.models.adapters.choose import unwrapped as unwrapped
from workbench.models.adapters.host import ADAPTERS as ADAPTERS
from workbench.models.adapters.host import Adapter as Adapter
from workbench.models.adapters.host import Host as Host
from workbench.models.adapters.host import plain as plain
