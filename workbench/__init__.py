"""Attention Workbench: find, measure and test the attention heads of language models.

```python
import workbench
from workbench import statistics

model = workbench.load("smollm2-135m")
trace = model.trace(["one prompt", "another"], statistics=[statistics.entropy(), statistics.first(1)])
trace["entropy"]  # [prompt, layer, head, query]
```

Nothing is imported until it is used: a name below loads its sub-package when it is first read, so that
`import workbench` and `workbench --help` answer at once and pull in neither torch nor an optional package.
Inside the package, import from the sub-package that defines a name, never from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench import errors as errors
    from workbench.figures.shown import show as show
    from workbench.heads import detect as detect
    from workbench.heads import verify as verify
    from workbench.models import Batch as Batch
    from workbench.models import Certificate as Certificate
    from workbench.models import Head as Head
    from workbench.models import LayerSpec as LayerSpec
    from workbench.models import Spec as Spec
    from workbench.reports import write_report as write_report
    from workbench.runs import Run as Run
    from workbench.tracing import Model as Model
    from workbench.tracing import Trace as Trace
    from workbench.tracing import ablate as ablate
    from workbench.tracing import load as load
    from workbench.tracing import patch as patch
    from workbench.tracing import statistics as statistics

__version__ = "0.1.0"

# Public name -> where it lives: the sub-package that defines it, or its own path if it is a module.
_HOME = {
    "Batch": "workbench.models",
    "Certificate": "workbench.models",
    "Head": "workbench.models",
    "LayerSpec": "workbench.models",
    "Model": "workbench.tracing",
    "Run": "workbench.runs",
    "Spec": "workbench.models",
    "Trace": "workbench.tracing",
    "ablate": "workbench.tracing",
    "detect": "workbench.heads",
    "errors": "workbench.errors",
    "load": "workbench.tracing",
    "patch": "workbench.tracing",
    "show": "workbench.figures.shown",
    "statistics": "workbench.tracing.statistics",
    "verify": "workbench.heads",
    "write_report": "workbench.reports",
}

__all__ = [
    "Batch",
    "Certificate",
    "Head",
    "LayerSpec",
    "Model",
    "Run",
    "Spec",
    "Trace",
    "ablate",
    "detect",
    "errors",
    "load",
    "patch",
    "show",
    "statistics",
    "verify",
    "write_report",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Out of sight of type checkers, which would otherwise let every misspelt name pass.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(
                f"module 'workbench' has no attribute {name!r}; it has {', '.join(__all__)}", name=name
            )
        module = import_module(home)
        value = module if home.endswith(f".{name}") else getattr(module, name)
        globals()[name] = value
        return value
