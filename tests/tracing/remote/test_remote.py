"""Traces that run elsewhere: against the model here, through nnsight's serialisation, and what never leaves."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from workbench import ablate, patch, statistics
from workbench.errors import HeadError, RequestError
from workbench.kernels import StatisticsRequest
from workbench.models import Batch, Head
from workbench.models.testing import TINY, VOCAB_SIZE
from workbench.tracing.statistics import Measured, Statistic

nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
from workbench.models.adapters.nnsight import wrapper_around  # noqa: E402
from workbench.tracing.remote import RemoteModel, load_remote  # noqa: E402
from workbench.tracing.remote import on_server as server_side  # noqa: E402


def prompts(*lengths: int, side: str = "left") -> Batch:
    generator = torch.Generator().manual_seed(8)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return Batch.from_ids(rows, side=side)


@pytest.fixture(scope="module")
def llama() -> RemoteModel:
    return load_remote(wrapper_around(TINY["llama"](), None), False)


def close(found: torch.Tensor, truth: torch.Tensor) -> None:
    scale = max(1.0, float(truth.nan_to_num().abs().max()))
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-4 * scale, equal_nan=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TINY)
def test_every_architecture_gives_the_numbers_of_the_model_here(name: str, side: str) -> None:
    batch = prompts(23, 14, 23, side=side)
    asked: dict[str, Any] = {
        "statistics": [
            *(statistics.entropy(), statistics.argmax(), statistics.sink_mass(), statistics.column_sum()),
            *(statistics.mean_logit(), statistics.result_norm(), statistics.offset(-2), statistics.block_max(16)),
        ],
        "sites": ["resid_pre", "attn_out", "mlp_out", "z"],
        "logits": "last",
    }
    here = workbench.load(TINY[name]()).trace(batch, **asked)
    there = load_remote(wrapper_around(TINY[name](), None), False).trace(batch, **asked)
    for statistic, value in here.values.items():
        close(there[statistic].double(), value.double())
    for key, value in here.sites.items():
        close(there.sites[key][batch.mask], value[batch.mask])
    close(there.logits, here.logits)


def test_rows_are_taken_in_blocks(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.tracing.remote import model as remote_model

    batch = prompts(40)
    asked = [statistics.lse(), statistics.column_max(), statistics.column_above(0.2), statistics.diagonal()]
    whole = llama.trace(batch, statistics=asked)
    monkeypatch.setattr(remote_model._server(), "ENTRIES", 6 * 40 * 7)
    for name, value in llama.trace(batch, statistics=asked).values.items():
        close(value.double(), whole[name].double())


def test_a_request_is_shipped_and_what_returns_is_small(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.schema.request import RequestModel

    sent: list[bytes] = []
    serialize = RequestModel.serialize

    def keep(tracer: Any, compress: bool = False) -> bytes:
        sent.append(serialize(tracer, compress))
        return sent[-1]

    monkeypatch.setattr(RequestModel, "serialize", keep)
    model = workbench.load(wrapper_around(TINY["llama"](), None), remote="local")
    sent.clear()
    found: list[dict[Any, Any]] = []
    send = RemoteModel._send
    monkeypatch.setattr(RemoteModel, "_send", lambda *given: found.append(send(*given)) or found[-1])
    batch, asked = prompts(60), [statistics.entropy(), statistics.column_sum(), statistics.offset(-1)]
    trace = model.trace(batch, statistics=asked, edits=ablate(["L0H1"]))
    assert len(sent) == 1
    # The workbench is not on the server: nothing may be named that would have to be imported from it.
    assert b"workbench.tracing" not in sent[0] and b"workbench.models" not in sent[0]
    # Weights stay: the payload is the block, the plan, and the functions.
    assert len(sent[0]) < 100_000
    assert max(value.numel() for value in found[0].values()) == 6 * 60
    here = workbench.load(TINY["llama"]()).trace(batch, statistics=asked, edits=ablate(["L0H1"]))
    for name, value in here.values.items():
        close(trace[name], value)


def test_edits_in_their_order(llama) -> None:
    batch, native = prompts(17, 9, 17), workbench.load(TINY["llama"]())
    here = batch.mask & (batch.positions == 5)
    z = torch.rand(3, 17, 6, 8)
    for edits in (
        [ablate(["L0H2", "L2H5"]), patch("z", z, layer=1, heads=[0, 3])],
        [ablate(["L1H2"], positions=here, strength=0.4), patch("resid_mid", torch.ones(48), layer=1, positions=here)],
        [ablate(["L1H0", "L1H1"], "mean", reference=prompts(12, 7))],
        [ablate(["L1H0", "L2H1"], "resample", reference=prompts(17, 17, 17))],
        [
            patch("resid_post", torch.rand(3, 17, 48), layer=0),
            patch("resid_pre", torch.zeros(48), layer=2, positions=here),
        ],
    ):
        asked: dict[str, Any] = {"edits": edits, "logits": "last", "statistics": statistics.entropy()}
        found, truth = llama.trace(batch, **asked), native.trace(batch, **asked)
        close(found.logits, truth.logits)
        close(found["entropy"], truth["entropy"])


def test_means_are_taken_there(llama) -> None:
    reference, wanted = prompts(12, 7), [Head(0, 1), Head(2, 5)]
    found = llama.head_outputs(reference, wanted, mean=True)
    truth = workbench.load(TINY["llama"]()).head_outputs(reference, wanted, mean=True)
    for head in wanted:
        close(found[head], truth[head])


def test_without_a_key_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.intervention.backends.remote import RemoteBackend

    sent: list[Any] = []
    monkeypatch.setattr(RemoteBackend, "__call__", lambda self, tracer=None: sent.append(tracer))
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    lm = wrapper_around(TINY["llama"](), None)
    for remote in (True, "https://example.org"):
        with pytest.raises(
            RequestError, match=r"needs an API key, and none is set\. .* NDIF_API_KEY, .* Nothing was sent"
        ):
            workbench.load(lm, remote=remote)
    with pytest.raises(RequestError, match="needs an API key"):
        workbench.load("someone/model", remote=True)
    assert not sent


def test_what_needs_the_model_here_is_refused_by_name(llama) -> None:
    batch = prompts(9)
    for run, match in (
        (
            lambda: llama.trace(batch, edits=ablate(["L0H0"], "uniform")),
            r"ablate\(how='uniform'\) needs the model on this",
        ),
        (
            lambda: llama.trace(batch, edits=patch("pattern", torch.zeros(1, 6, 9, 9), layer=0)),
            r"patch\('pattern'\) does not",
        ),
        (lambda: llama.trace(batch, sites=["result"]), "Site 'result' needs the model's weights"),
        (
            lambda: llama.trace(batch, statistics=statistics.value_mass("x", lambda v: v.sum(-1))),
            "'x' applies a function of",
        ),
        (lambda: llama.trace(batch, statistics=statistics.value_mass("u", torch.zeros(3, 6, 8))), "'u' is read off z"),
        (lambda: llama.generate(batch), r"generate\(\) needs the model on this machine"),
        (lambda: llama.attachment.hf_model, "needs the model's 'hf_model' on this machine"),
    ):
        with pytest.raises(RequestError, match=match):
            run()
    with pytest.raises(HeadError, match="L9H0 does not exist"):
        llama.trace(batch, edits=ablate(["L9H0"]))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_statistic_that_looks_at_tensors_of_the_server_is_refused(llama, name: str) -> None:
    def read(measured: Measured) -> torch.Tensor:
        return torch.linalg.vector_norm(getattr(measured.call, name), dim=-1)

    mine = Statistic("mine", StatisticsRequest(lse=True), read)
    with pytest.raises(RequestError, match="looks at q, k or v itself, which stay on the server"):
        llama.trace(prompts(9), statistics=mine)


def test_what_is_no_model_of_nnsight_is_refused() -> None:
    with pytest.raises(RequestError, match=r"a LlamaForCausalLM is none; make one: nnsight.TransformersModel"):
        load_remote(TINY["llama"](), "local")
    with pytest.raises(RequestError, match="device is the server's own choice"):
        workbench.load(wrapper_around(TINY["llama"](), None), remote="local", device="cpu")


def test_a_model_whose_weights_are_elsewhere_is_described() -> None:
    """The shape is read off a model without weights; the first request then goes where they are."""
    lm = wrapper_around(TINY["llama"](), None)
    asked: list[int] = []

    class Asked(RemoteModel):
        def _certified(self) -> Any:
            asked.append(self.spec.n_layers)
            return super()._certified()

    assert Asked(lm, False).spec.n_layers == 3 and asked == [3]
    lm._module.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        Asked(lm, False)
    assert asked == [3, 3]


def test_the_server_side_knows_torch_alone() -> None:
    tree = ast.parse(Path(str(server_side.__file__)).read_text(encoding="utf-8"))
    modules = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {alias.name for node in modules if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in modules if isinstance(node, ast.ImportFrom)}
    assert named == {"__future__", "typing", "torch"}
