"""What every test shares: no network, a fixed seed, and memory that shows when it is read too early."""

from __future__ import annotations

import importlib.metadata
import os
import random
from collections.abc import Iterator

import pytest
import torch

SEED = 20240229

# Read once, on the first import of huggingface_hub; a test must never wait for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read on the first import of triton, whoever imports it: without a CUDA device, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_report_header() -> str:
    packages = ("torch", "transformers", "numpy", "pandas", "plotly")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The same random numbers in every test, in whatever order the tests run."""
    import numpy as np

    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 (libraries that draw from the global generator)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin are filled with NaN (integers: the largest value), so that a kernel which
    reads memory before it writes it fails every time and not only now and then."""

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def unchecked_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls as outside of tests, where nobody checks annotations: for what a user may pass against them."""
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def trained():
    """The induction toy, trained once a session: a seed where one previous-token head does the work alone."""

    from workbench.dynamics import train_induction

    # One thread: rounding, and with it the toy, then does not depend on the machine's cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_induction(seed=23)
    finally:
        torch.set_num_threads(threads)
