"""What runs on a server of NDIF, beside the model: plain torch, shipped as source.

Nothing but torch is used, as names of the workbench do not exist there. q, k and v are read
where each layer hands them to its attention function, and reduced row block by row block: what comes back is
O(heads x tokens), never a pattern (but for the patterns of short prompts, where they are asked for). The numbers are
those of `workbench.kernels.attention_statistics`, and their names are its fields'.
"""

from __future__ import annotations

from typing import Any

import torch

# Entries of the pattern of all heads that are held at a time.
ENTRIES = 1 << 22


def collect(model: Any, plan: Any) -> Any:
    """Run through the layers in the order of the forward pass; read and edit what the plan says.

    `model` is nnsight's, inside a trace. Gives what was read by (kind, name, layer).
    """
    found = {}
    for layer in plan["layers"]:
        index, sites = layer["index"], layer["sites"]
        block = reach(model, layer["block"])
        entry = None
        if layer["touched"]:
            entry = block.input
            if "resid_pre" in layer["patches"]:
                entry = patched(entry, layer["patches"]["resid_pre"])
                block.input = entry
            if "resid_pre" in sites:
                found["site", "resid_pre", index] = held(entry)
        if layer["attends"]:
            attend(model, layer, plan, found)
        if layer["touched"]:
            written(reach(model, layer["attention_write"]), "attn_out", layer, found, entry)
            written(reach(model, layer["mlp_write"]), "mlp_out", layer, found, entry)
            written(block, "resid_post", layer, found, entry)
    if plan["logits"] is not None or plan["loss"]:
        ends(model.output.logits, plan, found)
    return found


def reach(model: Any, path: Any) -> Any:
    """The module at a dotted path."""
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def held(value: Any) -> Any:
    """A copy that later changes do not reach, on the CPU."""
    return value.detach().to("cpu", torch.float32, copy=True)


def patched(old: Any, patches: Any) -> Any:
    """`old` `[prompt, token, (head,) width]` with values put in at heads and positions."""
    for patch in patches:
        value = patch["value"].to(old)
        if patch["strength"] < 1:
            part = old if patch["heads"] is None else old[:, :, patch["heads"]]
            value = part + patch["strength"] * (value - part)
        if patch["heads"] is not None:
            heads = torch.tensor(patch["heads"], device=old.device)
            value = torch.index_copy(old, 2, heads, value.expand(*old.shape[:2], len(heads), old.shape[-1]))
        if patch["positions"] is not None:
            chosen = patch["positions"].to(old.device).reshape(*old.shape[:2], *[1] * (old.ndim - 2))
            value = torch.where(chosen, value, old)
        old = value.expand(old.shape).contiguous()
    return old


def written(module: Any, site: Any, layer: Any, found: Any, entry: Any) -> Any:
    """Read and edit what a module adds to the stream, or the stream behind the block."""
    wanted = site in layer["sites"] or site in layer["patches"]
    middle = site == "attn_out" and ("resid_mid" in layer["sites"] or "resid_mid" in layer["patches"])
    if not wanted and not middle:
        return
    output = module.output
    whole = output[0] if isinstance(output, tuple) else output
    value = whole.reshape(entry.shape)
    if site in layer["patches"]:
        value = patched(value, layer["patches"][site])
    if middle and "resid_mid" in layer["patches"]:
        value = patched(value + entry, layer["patches"]["resid_mid"]) - entry
    if value is not whole:
        flat = value.reshape(whole.shape)
        module.output = (flat, *output[1:]) if isinstance(output, tuple) else flat
    if site in layer["sites"]:
        found["site", site, layer["index"]] = held(value)
    if middle and "resid_mid" in layer["sites"]:
        found["site", "resid_mid", layer["index"]] = held(value + entry)


def attend(model: Any, layer: Any, plan: Any, found: Any) -> Any:
    """Statistics, captures and edits of one layer's attention."""
    index, sites = layer["index"], layer["sites"]
    call = getattr(reach(model, layer["attention"]).source, layer["call"])
    args, kwargs = call.inputs
    q, k, v = args[1], args[2], args[3]
    options = {
        "scale": q.shape[-1] ** -0.5 if kwargs.get("scaling") is None else float(kwargs["scaling"]),
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
        "start": plan["start"].to(q.device),
        "end": plan["end"].to(q.device),
    }
    for site, value in (("q", q), ("k", k), ("v", v)):
        if site in sites:
            found["site", site, index] = held(value.transpose(1, 2))
    if plan["request"] is not None:
        for name, value in reduced(q, k, v, plan["request"], options).items():
            found["field", name, index] = value.cpu()
    if "pattern" in sites:
        found["site", "pattern", index] = held(torch.cat([p for _, p, _, _ in rows_of(q, k, options)], dim=2))
    if not layer["reads_z"]:
        return
    output = call.output
    z = output[0] if isinstance(output, tuple) else output
    if "value_norm" in plan["norms"]:
        norm = torch.linalg.vector_norm(v.float(), dim=-1)
        found["field", "value_norm", index] = norm.repeat_interleave(q.shape[1] // k.shape[1], dim=1).cpu()
    if "output_norm" in plan["norms"]:
        found["field", "output_norm", index] = torch.linalg.vector_norm(z.float(), dim=-1).transpose(1, 2).cpu()
    if "result_norm" in plan["norms"]:
        weight = reach(model, layer["projection"]).weight
        weight = weight if layer["transposed"] else weight.T
        found["field", "result_norm", index] = result_norms(z, weight).cpu()
    if "z" in layer["patches"]:
        z = patched(z, layer["patches"]["z"])
        call.output = (z, *output[1:]) if isinstance(output, tuple) else z
    if "z" in sites:
        found["site", "z", index] = held(z)
    if layer["means"]:
        found["mean", "z", index] = held(z[:, :, layer["means"]].float().mean((0, 1)))


def result_norms(z: Any, weight: Any) -> Any:
    """The Euclidean norm of what each head writes, head by head: [prompt, head, token]."""
    parts = weight.reshape(z.shape[2], z.shape[3], -1).float()
    norms = [torch.linalg.vector_norm(z[:, :, head].float() @ parts[head], dim=-1) for head in range(z.shape[2])]
    return torch.stack(norms, dim=1)


def ends(logits: Any, plan: Any, found: Any) -> Any:
    """Logits at the wanted positions, and the loss of each next token (nats)."""
    if plan["logits"] is not None:
        wanted = plan["logits"].to(logits.device)
        index = wanted[..., None].expand(-1, -1, logits.shape[-1])
        found["end", "logits", 0] = held(torch.gather(logits, 1, index))
    if plan["loss"]:
        following = plan["ids"].to(logits.device)[:, 1:]
        rows = [
            torch.nn.functional.cross_entropy(part.float(), ids, reduction="none")
            for part, ids in zip(logits[:, :-1], following, strict=True)
        ]
        found["end", "loss", 0] = held(torch.stack(rows))


def rows_of(q: Any, k: Any, options: Any) -> Any:
    """The pattern, block of rows by block of rows: (first row, pattern, logits, log-sum-exp), float32.

    Invisible entries are 0 in the pattern and -inf in the logits; rows that see nothing have a log-sum-exp of 0.
    """
    prompts, heads, queries, width = q.shape
    keys, groups = k.shape[2], k.shape[1]
    step = max(1, ENTRIES // max(1, prompts * heads * keys))
    columns = torch.arange(keys, device=q.device)
    inside = (columns >= options["start"][:, None]) & (columns < options["end"][:, None])
    k = k.float()
    for first in range(0, queries, step):
        part = q[:, :, first : first + step].float().reshape(prompts, groups, heads // groups, -1, width)
        logits = torch.einsum("bgrid,bgjd->bgrij", part, k).reshape(prompts, heads, -1, keys) * options["scale"]
        if options["softcap"] is not None:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        rows = torch.arange(first, first + logits.shape[2], device=q.device) + keys - queries
        seen = columns <= rows[:, None]
        if options["window"] is not None:
            seen = seen & (columns > rows[:, None] - options["window"])
        real = (rows >= options["start"][:, None]) & (rows < options["end"][:, None])
        visible = (seen & inside[:, None, :] & real[:, :, None])[:, None]
        logits = logits.masked_fill(~visible, float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        if options["sinks"] is not None:
            lse = torch.logaddexp(lse, options["sinks"].float()[None, :, None].expand_as(lse))
        lse = torch.where(visible.any(-1), lse, 0.0)
        yield first, torch.exp(logits - lse[..., None]), logits, lse


def reduced(q: Any, k: Any, v: Any, request: Any, options: Any) -> Any:
    """Every field of the request, over all rows."""
    parts: dict[str, Any] = {}
    sums: dict[str, Any] = {}
    for first, pattern, logits, lse in rows_of(q, k, options):
        where = torch.arange(first, first + pattern.shape[2], device=q.device)
        rows = where + k.shape[2] - q.shape[2]
        distance = (rows[:, None] - torch.arange(k.shape[2], device=q.device)).float()
        for found in (
            scalars(pattern, logits, lse, distance, request, options),
            masses(pattern, v, distance, where, request, options),
        ):
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        columns(sums, pattern, rows, where, request, options)
    return {name: torch.cat(value, dim=2) for name, value in parts.items()} | sums


def scalars(pattern: Any, logits: Any, lse: Any, distance: Any, request: Any, options: Any) -> Any:
    """One number a row."""
    found, visible = {}, logits > float("-inf")
    seen = visible.any(-1)
    if request["lse"]:
        found["lse"] = lse
    if request["max_logit"]:
        found["max_logit"] = torch.where(seen, logits.amax(-1), 0.0)
    if request["max_prob"]:
        found["max_prob"] = pattern.amax(-1)
    if request["argmax"]:
        found["argmax"] = torch.where(seen, pattern.argmax(-1), -1)
    if request["entropy"]:
        found["entropy"] = torch.special.entr(pattern).sum(-1)
    if request["distance"]:
        found["distance"] = (pattern * distance).sum(-1)
    if request["spread"]:
        share = pattern / pattern.sum(-1, keepdim=True).clamp(min=1e-30)
        mean = (share * distance).sum(-1, keepdim=True)
        found["spread"] = (share * (distance - mean) ** 2).sum(-1).sqrt()
    if request["mean_logit"]:
        found["mean_logit"] = logits.masked_fill(~visible, 0.0).sum(-1) / visible.sum(-1).clamp(min=1)
    if request["first_logit"]:
        first = visible.int().argmax(-1, keepdim=True).expand(*logits.shape[:3], 1)
        found["first_logit"] = torch.where(seen, logits.gather(-1, first)[..., 0], 0.0)
    if request["sink_mass"]:
        sinks = options["sinks"]
        mass = lse * 0.0 if sinks is None else torch.exp(sinks.float()[:, None] - lse)
        found["sink_mass"] = torch.where(seen, mass, 0.0)
    return found


def masses(pattern: Any, v: Any, distance: Any, where: Any, request: Any, options: Any) -> Any:
    """Several numbers a row: masses on spans, offsets and labelled keys, counts, the heaviest keys."""
    found, keys = {}, torch.arange(pattern.shape[-1], device=pattern.device)
    from_start = (keys - options["start"][:, None])[:, None, None, :]
    if request["first"]:
        found["first"] = torch.stack([(pattern * (from_start < size)).sum(-1) for size in request["first"]], -1)
    if request["recent"]:
        found["recent"] = torch.stack([(pattern * (distance < size)).sum(-1) for size in request["recent"]], -1)
    if request["offsets"]:
        found["offsets"] = torch.stack([(pattern * (distance == -one)).sum(-1) for one in request["offsets"]], -1)
    if request["above"]:
        found["above"] = torch.stack([(pattern > level).float().sum(-1) for level in request["above"]], -1)
    if request["top_k"]:
        size = min(request["top_k"], pattern.shape[-1])
        mass, top = pattern.masked_fill(~(pattern > 0), -1.0).topk(size, dim=-1)
        rest = request["top_k"] - size
        mass, top = torch.where(mass >= 0, mass, 0.0), torch.where(mass >= 0, top, -1)
        found["top_mass"] = torch.nn.functional.pad(mass, (0, rest))
        found["top_keys"] = torch.nn.functional.pad(top, (0, rest), value=-1)
    if request["key_features"] is not None:
        found["features"] = pattern @ request["key_features"].to(pattern)[:, None]
    if request["query_keys"] is not None:
        wanted = request["query_keys"].to(pattern.device)[:, where]
        there = (wanted >= 0) & (wanted < pattern.shape[-1])
        index = torch.where(there, wanted, 0)[:, None].expand(-1, pattern.shape[1], -1, -1)
        found["at_keys"] = torch.where(there[:, None], torch.gather(pattern, 3, index), 0.0)
    if request["value_norms"]:
        norm = torch.linalg.vector_norm(v.float(), dim=-1).repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)
        one = torch.einsum("bhij,bhj->bhi", pattern, norm)[..., None]
        found["value_features"] = one.expand(*one.shape[:3], request["value_norms"])
    return found


def columns(sums: Any, pattern: Any, rows: Any, where: Any, request: Any, options: Any) -> Any:
    """What is summed over rows, into `sums`."""
    end, keys = options["end"], pattern.shape[-1]
    if request["column_sum"]:
        add(sums, "column_sum", pattern.sum(2))
    if request["column_max"]:
        sums["column_max"] = torch.maximum(sums.get("column_max", pattern[:, :, 0] * 0.0), pattern.amax(2))
    if request["column_last"]:
        last = [(rows >= (end - size)[:, None])[:, None, :, None] for size in request["column_last"]]
        add(sums, "column_last", torch.stack([(pattern * one).sum(2) for one in last], dim=2))
    if request["query_weights"] is not None:
        weights = request["query_weights"].to(pattern)[:, :, where]
        add(sums, "column_weighted", torch.einsum("bhij,bmi->bhmj", pattern, weights))
    if request["column_above"]:
        hits = torch.stack([pattern > level for level in request["column_above"]], dim=2)
        now = torch.where(hits.any(3), hits.int().argmax(3) + where[0], -1)
        before = sums.get("column_above", torch.full_like(now, -1))
        sums["column_above"] = torch.where(before >= 0, before, now)
    back = (rows[:, None] - torch.arange(keys, device=rows.device)).clamp(min=0)
    if request["diagonal"]:
        add(sums, "diagonal", along(pattern, back))
    if request["diagonal_last"]:
        last = (rows >= (end - request["diagonal_last"])[:, None]) & (rows < end[:, None])
        add(sums, "diagonal_last", along(pattern * last[:, None, :, None], back))
    if request["block"]:
        blocks(sums, pattern, rows, request["block"], options["start"])


def add(sums: Any, name: Any, value: Any) -> Any:
    """Add to a sum, or begin it."""
    sums[name] = value if name not in sums else sums[name] + value


def along(pattern: Any, back: Any) -> Any:
    """Sums at each distance."""
    index = back.expand(pattern.shape).flatten(2)
    return torch.zeros_like(pattern[:, :, 0]).scatter_add(2, index, pattern.flatten(2))


def blocks(sums: Any, pattern: Any, rows: Any, size: Any, start: Any) -> Any:
    """Sums and maxima over blocks, counted from each prompt's first token."""
    count = -(-pattern.shape[-1] // size)
    shape = (*pattern.shape[:2], count, count)
    total = sums.setdefault("block_sum", pattern.new_zeros(shape))
    largest = sums.setdefault("block_max", pattern.new_zeros(shape))
    keys = torch.arange(pattern.shape[-1], device=pattern.device)
    for prompt, first in enumerate(start.tolist()):
        row = ((rows - first).clamp(min=0) // size).clamp(max=count - 1)
        column = ((keys - first).clamp(min=0) // size).clamp(max=count - 1)
        index = (row[:, None] * count + column).flatten().expand(pattern.shape[1], -1)
        entries = pattern[prompt].flatten(1)
        total[prompt] += torch.zeros_like(total[prompt]).flatten(1).scatter_add(1, index, entries).reshape(shape[1:])
        seen = largest[prompt].flatten(1).scatter_reduce(1, index, entries, "amax")
        largest[prompt] = seen.reshape(shape[1:])
