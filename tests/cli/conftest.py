"""A tiny model on disk with a tokenizer of its own, and ways to call the command line."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

VOCABULARY = 5000


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


@pytest.fixture(scope="session")
def call() -> Callable[..., Any]:
    """`call("runs", "list")`: the result of a command, run in this process; stdout and stderr apart."""
    from workbench.cli.app import app

    runner = CliRunner()

    def invoke(*arguments: object, **options: Any) -> Any:
        return runner.invoke(app, [str(a) for a in arguments], env={"COLUMNS": "220"}, **options)

    return invoke


@pytest.fixture(scope="session")
def heads_run(call: Callable[..., Any], model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `workbench heads` with few prompts."""
    path = tmp_path_factory.mktemp("runs") / "heads"
    result = call("heads", model_folder, "--prompts", 3, "--out", path)
    assert result.exit_code == 0, result.output
    return path
