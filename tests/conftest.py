"""What every test shares: no network, a fixed seed, and memory that shows when it is read too early."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pydoc_data.topics
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SEED = 20240229
# Tokens of the tiny model's tokenizer.
VOCABULARY = 5000

# Read once, on the first import of huggingface_hub; a test must never wait for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read on the first import of triton, whoever imports it: without a CUDA device, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_report_header() -> str:
    packages = ("torch", "transformers", "numpy", "pandas", "plotly")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def chromium() -> str | None:
    """The system's Chromium, or the one that WORKBENCH_CHROMIUM names; never one that a tool downloads."""
    named = os.environ.get("WORKBENCH_CHROMIUM")
    known = (named, "/usr/bin/chromium", shutil.which("chromium"), shutil.which("google-chrome"))
    return next((path for path in known if path and Path(path).exists()), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless browser. Without Chromium (Debian: `apt-get install chromium`) tests that ask for it are skipped,
    except where CI is set."""
    if os.environ.get("CI"):
        sync_api = importlib.import_module("playwright.sync_api")
    else:
        sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
        if chromium() is None:
            pytest.skip("no Chromium found; install it (apt-get install chromium) or name it in WORKBENCH_CHROMIUM")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        yield browser
        browser.close()


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


def save_tokenizer(folder: Path) -> None:
    """Byte-level pairs, learnt from pydoc's topics; one special token that begins and ends texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    topics = sorted(pydoc_data.topics.topics.items())
    tokenizer.train_from_iterator([text for _, text in topics], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer Llama with random weights; its name holds what rich would read as markup."""
    from workbench.models.testing import build

    folder = tmp_path_factory.mktemp("models") / "tiny[red]"
    model = build(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=0,
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)
