"""A model that runs elsewhere: on NDIF, through nnsight, with everything reduced there.

Nothing of ours can hook a model on a server. So a trace is written as one of nnsight's: q, k and v are read where each
layer calls its attention function (nnsight's `.source`), reduced to numbers by head and token on the server
(`on_server`, shipped as source), and edits are writes at the same places. What comes back is O(heads x tokens), and
whatever sites and logits were asked for.

`RemoteModel` answers `trace` as `Model` does, so tasks and the detectors that read traces run on it. What needs the
model's own modules here (decoding, circuits, weights, gradients), and edits that need a second look at keys, is refused
by name. `remote="local"` ships a trace through nnsight's serialisation and runs it on this machine; `remote=False` runs
the same trace without that.

Prompts are sent without padding, one request for each length.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from workbench.errors import MissingExtra, RequestError
from workbench.models import Attachment, Batch, Certificate, Check, Head, Spec
from workbench.models.adapters import Adapter
from workbench.models.adapters.choose import library_of
from workbench.models.architectures import architecture_of, describe, locate
from workbench.models.loading import Source
from workbench.models.memory import Prediction
from workbench.tracing.edits import Ablation, Edit, listed
from workbench.tracing.job import wanted_positions
from workbench.tracing.model import Model
from workbench.tracing.plan import Plan, refuse_large_patterns
from workbench.tracing.remote.reading import Reader
from workbench.tracing.remote.request import Group, lengths, plain_plan, refuse
from workbench.tracing.statistics import Statistic, Statistics
from workbench.tracing.trace import Trace

ABLATED = ("zero", "mean", "resample")
_PROBE_TOKENS = 24
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


class _Elsewhere:
    """Stands where an attachment would: the shape of the model, and a refusal of everything that needs the model."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.device = spec, torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RequestError(
            f"This needs the model's {name!r} on this machine, but the model runs elsewhere (remote): there, trace() "
            "takes statistics, sites, logits, ablations and patches. Load the model here for the rest."
        )

    def detach(self) -> None:
        """There is nothing to give back."""


class RemoteModel(Model):
    """A model of nnsight on a server; `trace` runs there."""

    def __init__(self, wrapper: Any, remote: bool | str, tokenizer: Any | None = None) -> None:
        self.wrapper, self.remote = wrapper, remote
        check_key(remote)
        spec = describe(wrapper._module)
        self.attachment = cast(Attachment, _Elsewhere(spec))
        self.tokenizer = tokenizer or getattr(wrapper, "tokenizer", None)
        name = str(getattr(wrapper, "repo_id", None) or type(wrapper._module).__name__)
        # Weights that are not here have no checksum.
        self.source = Source(name, "remote", None, getattr(wrapper, "revision", None), "", None)
        self._told_of_length = False
        self._paths = list(_paths(wrapper))
        self.certificate = self._certified()
        self.certificate.require()

    @property
    def adapter(self) -> Adapter:
        return "nnsight"

    def predict_memory(self, prompts: Any, **asked: Any) -> Prediction:
        """What is kept here of a trace's results is not predicted; the server refuses what it cannot hold."""
        return Prediction(0, 0, "the server")

    def generate(self, prompts: Any, max_new_tokens: int = 50, **asked: Any) -> Any:
        raise RequestError(
            "generate() needs the model on this machine, but it runs elsewhere (remote); trace the finished text, or "
            "load the model here."
        )

    def trace(
        self,
        prompts: Any,
        *,
        statistics: Statistics = (),
        sites: Sequence[str] = (),
        edits: Edit | Sequence[Edit] = (),
        logits: Any = None,
        loss: bool = False,
        **asked: Any,
    ) -> Trace:
        """As `Model.trace`; one request for each length of prompts. `tokens_at_once` and `chunk` mean nothing there."""
        batch = self._checked(self.batch(prompts))
        plan = Plan.compile(self.spec, list(_flat(statistics)), sites, self._with_values(listed(edits), batch))
        refuse(plan)
        refuse_large_patterns(plan, self.spec, batch)
        plan = plan.laid_out(self.spec, batch)
        self._tell_of_length(int(batch.lengths.max()))
        trace = Trace(batch, self.spec, Prediction(0, 0, "the server"), {s.name: s for s in plan.statistics})
        trace.logit_positions = wanted_positions(batch, logits)
        for rows in lengths(batch):
            group = Group(batch, rows)
            found = self._send(group, plain_plan(plan, self._paths, group, trace.logit_positions, loss))
            Reader(plan, group, trace, found).read()
        return trace

    def head_outputs(self, prompts: Any, heads: Iterable[Head], *, mean: bool) -> dict[Head, Tensor]:
        """z of heads on reference prompts; the mean is taken on the server."""
        if not mean:
            return super().head_outputs(prompts, heads, mean=False)
        batch, chosen = self._checked(self.batch(prompts)), [self.spec.check(head) for head in heads]
        layers = sorted({head.layer for head in chosen})
        means = {layer: sorted({head.head for head in chosen if head.layer == layer}) for layer in layers}
        sums: dict[Head, Tensor] = {}
        for rows in lengths(batch):
            group = Group(batch, rows)
            empty = Plan.compile(self.spec, (), (), ())
            found = self._send(group, plain_plan(empty, self._paths, group, None, False, means))
            for layer, numbers in means.items():
                for number, z in zip(numbers, found["mean", "z", layer], strict=True):
                    part = z.double() * group.tokens * len(rows)
                    sums[Head(layer, number)] = sums.get(Head(layer, number), torch.zeros_like(part)) + part
        return {head: (sums[head] / int(batch.mask.sum())).float() for head in chosen}

    def _with_values(self, edits: Sequence[Edit], batch: Batch) -> list[Edit]:
        resolved: list[Edit] = []
        for edit in edits:
            if isinstance(edit, Ablation):
                if edit.how not in ABLATED:
                    raise RequestError(
                        f"ablate(how={edit.how!r}) needs the model on this machine; on a server there are "
                        f"{', '.join(ABLATED)}, and patch()."
                    )
                edit.check(self.spec)
                if edit.unresolved:
                    assert edit.reference is not None
                    edit = replace(edit, values=self._values(edit, edit.reference, batch))
            resolved.append(edit)
        return resolved

    def _send(self, group: Group, plan: dict[str, Any]) -> dict[Any, Any]:
        from nnsight import save

        check_key(self.remote)
        wrapper, collect, ids = self.wrapper, _server().collect, group.ids
        if not plan["layers"] and plan["logits"] is None and not plan["loss"]:
            return {}
        with torch.no_grad(), wrapper.trace(ids, remote=self.remote, use_cache=False):
            found = save(collect(wrapper, plan))
        return cast("dict[Any, Any]", found)

    def _certified(self) -> Certificate:
        """One short request: the server's z against z rebuilt here from the q, k and v that were read."""
        tokens = min(_PROBE_TOKENS, self.spec.max_positions or _PROBE_TOKENS)
        ids = torch.randint(0, self.spec.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
        found = self.trace(batch, sites=["pattern", "v", "z"])
        errors, sums = [], []
        for layer in self.spec.layers:
            pattern, v, z = (found.site(site, layer.index) for site in ("pattern", "v", "z"))
            values = v.double().repeat_interleave(layer.group, dim=2)
            rebuilt = torch.einsum("b h i j, b j h d -> b i h d", pattern.double(), values)
            errors.append(float((rebuilt - z).abs().max() / z.abs().max().clamp(min=1e-30)))
            over = (pattern.sum(-1) - 1).clamp(min=0) if layer.sinks else (pattern.sum(-1) - 1).abs()
            sums.append(float(over.max()))
        exact = cast(torch.dtype, next(self.wrapper._module.parameters()).dtype)
        tolerance = _TOLERANCE.get(exact, 5e-2)
        detail = f"z of {len(errors)} layers on the server, against z rebuilt here from q, k and v read there"
        return Certificate((
            Check("remote output", max(errors), tolerance, max(errors) <= tolerance, detail),
            Check("remote rows", max(sums), 1e-4, max(sums) <= 1e-4, "each row of the pattern sums to one"),
        ))  # fmt: skip


def _flat(statistics: Statistics) -> Iterator[Statistic]:
    for one in [statistics] if isinstance(statistics, Statistic) else statistics:
        yield from one if isinstance(one, tuple) else [one]


def _paths(wrapper: Any) -> Iterator[dict[str, Any]]:
    """Where each layer keeps what is read, as dotted paths from the model, and the name of its attention call."""
    module = wrapper._module
    row = architecture_of(module.config.model_type)
    for layer in locate(module):
        block = f"{row.blocks}.{layer.index}"
        envoy = _server().reach(wrapper, f"{block}.{row.attention}")
        calls = [name for name in envoy.source.names if name.startswith("attention_interface_")]
        if not calls:
            raise RequestError(
                f"Layer {layer.index} ({type(layer.attention).__name__}) does not call an attention function that "
                "nnsight can see into, so it cannot be traced remotely."
            )
        yield {
            "index": layer.index,
            "block": block,
            "attention": f"{block}.{row.attention}",
            "call": calls[-1],
            "projection": f"{block}.{row.attention}.{row.projection}",
            "attention_write": f"{block}.{row.attention_write}",
            "mlp_write": f"{block}.{row.mlp_write}",
            "transposed": layer.transposed,
        }


def check_key(remote: bool | str) -> None:
    """Refuse to go to NDIF without a key, before anything is sent."""
    if remote is not True and not (isinstance(remote, str) and remote.startswith("http")):
        return
    from nnsight import CONFIG

    if not CONFIG.API.APIKEY:
        raise RequestError(
            "remote=True runs on NDIF, which needs an API key, and none is set. Get one at https://login.ndif.us, then "
            "set the environment variable NDIF_API_KEY, or call nnsight.CONFIG.set_default_api_key('...'). "
            "Nothing was sent."
        )


@cache
def _server() -> ModuleType:
    """`on_server` under a name that no server has, so that nnsight ships its source and not its name."""
    place = Path(__file__).with_name("on_server.py")
    spec = importlib.util.spec_from_file_location("workbench_on_server", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop(spec.name, None)
    return module


def load_remote(x: Any, remote: bool | str = True, *, revision: str | None = None, **unused: Any) -> RemoteModel:
    """A model of nnsight (or a pair of it and a tokenizer, or a name on the hub), traced where it runs.

    `remote` is as nnsight has it: True for NDIF, the address of another server, "local" for a trace that is shipped
    and run on this machine, False for one that is only run.
    """
    try:
        from nnsight import TransformersModel
    except ImportError as error:
        raise MissingExtra(
            "nnsight is not installed; install it by pip install 'attention-workbench[nnsight]'."
        ) from error
    if unused:
        raise RequestError(f"{next(iter(unused))} is the server's own choice; leave it out where remote={remote!r}.")
    wrapper, tokenizer = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    if isinstance(wrapper, str):
        check_key(remote)
        wrapper = TransformersModel(wrapper, revision=revision, task="text-generation")
    elif revision is not None:
        raise RequestError(f"revision={revision!r} goes with a name on the hub; this model is made already.")
    if library_of(wrapper) != "nnsight" or not hasattr(wrapper, "_module"):
        raise RequestError(
            f"remote={remote!r} runs a model of nnsight, and a {type(wrapper).__name__} is none; make one: "
            "nnsight.TransformersModel('organisation/name')."
        )
    return RemoteModel(wrapper, remote, tokenizer)
