"""Small tokenizers trained on the spot, one of each kind that cuts text differently."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from workbench.tasks import NEEDLES
from workbench.tasks.corpus import prose_text

START, END = "<s>", "</s>"
CHAT = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama-3, Qwen, SmolLM: the space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def metaspace() -> Tokenizer:
    """As Llama-2, Mistral, Gemma: spaces are written as a letter, one is put before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    lines = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="first")])
    tokenizer.decoder = decoders.Metaspace()
    return _train(tokenizer, [])


def _train(tokenizer: Tokenizer, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[START, END, "<|turn|>", "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([prose_text(), *(needle.text for needle in NEEDLES)], trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer, start: bool = False, end: bool = False, chat: bool = False) -> PreTrainedTokenizerBase:
    single = f"{START + ' ' if start else ''}$A{' ' + END if end else ''}"
    if start or end:
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(START, 0), (END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        unk_token="<unk>",
        additional_special_tokens=["<|turn|>"],
        chat_template=CHAT if chat else None,
    )


@pytest.fixture(scope="session")
def bare() -> PreTrainedTokenizerBase:
    """Adds nothing, as GPT-2's."""
    return wrap(byte_level())


@pytest.fixture(scope="session")
def starting() -> PreTrainedTokenizerBase:
    """Adds a start and an end token; cuts at spaces as Llama-2's."""
    return wrap(metaspace(), start=True, end=True)


@pytest.fixture(scope="session")
def chatting() -> PreTrainedTokenizerBase:
    return wrap(byte_level(), start=True, chat=True)


@pytest.fixture(params=["bare", "starting", "chatting"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)
