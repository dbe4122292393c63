"""Every error that the workbench raises on purpose.

```
WorkbenchError
├── RequestError        an argument that cannot be honoured (also a ValueError)
│   ├── HeadError       a head, layer or site that the model does not have
│   └── MemoryRefused   the prediction exceeds the memory that is allowed
├── ModelRefused        a model that we cannot reproduce
│   └── CertificateFailed   a check on attach was out of tolerance
├── SourceError         a model that cannot be found or read
├── MissingExtra        an optional package is not installed
└── RunError            a run on disk
    ├── RunNotFound     nothing at that path
    ├── RunLocked       another process is writing it
    ├── RunCorrupt      files are missing or their checksums differ
    └── RunTooNew       written by a later format
```

The command line prints the message as one paragraph and exits with 2, so each message names the value
that was wrong and the next step.
"""

from __future__ import annotations


class WorkbenchError(Exception):
    """Root of all errors raised on purpose."""


class RequestError(WorkbenchError, ValueError):
    """An argument that cannot be honoured."""


class HeadError(RequestError):
    """A head, layer or site that the model does not have."""


class MemoryRefused(RequestError):
    """The predicted peak exceeds the memory that is allowed; raised before anything is allocated."""


class ModelRefused(WorkbenchError):
    """A model whose attention we cannot reproduce; the message names the field or the check."""


class CertificateFailed(ModelRefused):
    """A check on attach was out of tolerance."""


class SourceError(WorkbenchError):
    """A model that cannot be found or read."""


class MissingExtra(WorkbenchError, ImportError):
    """An optional package is not installed; the message has the pip line."""


class RunError(WorkbenchError):
    """A run on disk that cannot be used."""


class RunNotFound(RunError):
    """There is no run at that path."""


class RunLocked(RunError):
    """Another process is writing this run."""


class RunCorrupt(RunError):
    """Files of the run are missing, unreadable or differ from their checksums."""


class RunTooNew(RunError):
    """The run was written by a later version of the format."""
