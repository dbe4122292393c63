"""What attention statistics cost on a GPU, against attention itself and against other ways to get them.

Every case and every rival run in one process on the same tensors (batch 1, causal, random data), timed by device
events; the ratios to cuDNN's forward are what matters. The correctness tests run first, and red ones end it.

Run by hand:  python kernels/bench_statistics.py --tokens 32768 131072
Prints one line a case (median with 20 % and 80 % quantiles) and appends rows to kernels/results/statistics.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import triton
from record import append, facts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from triton.testing import do_bench, do_bench_cudagraph
from verify import require_green

from workbench.kernels import StatisticsRequest, attention_statistics

RESULTS = Path(__file__).parent / "results" / "statistics.csv"
OFFSETS = tuple(-i for i in range(8))
SPANS, SPAN = 16, 64
# Float32 scores of one head's full matrix fit up to here.
EAGER_TOKENS = 8192


def inputs(tokens: int, heads: int, kv_heads: int, dim: int, queries: int | None = None) -> list[torch.Tensor]:
    """q, k, v: random, bfloat16."""
    shapes = ((heads, queries or tokens), (kv_heads, tokens), (kv_heads, tokens))
    return [torch.randn(1, h, n, dim, device="cuda", dtype=torch.bfloat16) for h, n in shapes]


def spans(tokens: int) -> torch.Tensor:
    """Sixteen labelled spans of 64 tokens, spread over the prompt, as functions of the key."""
    labels = torch.zeros(1, tokens, SPANS, dtype=torch.bool, device="cuda")
    for index in range(SPANS):
        first = (index * tokens) // (SPANS + 1)
        labels[:, first : first + SPAN, index] = True
    return labels


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The cases of the table, each a call."""
    labels = spans(k.shape[2])
    lse = attention_statistics(q, k, v, StatisticsRequest(lse=True), implementation="triton").lse

    def case(known: bool = False, labelled: bool = False, **wanted: object) -> Callable[[], object]:
        request = StatisticsRequest(**wanted)  # type: ignore[arg-type]
        options = {"lse": lse} if known else {}
        options |= {"key_features": labels} if labelled else {}
        return lambda: attention_statistics(q, k, v, request, implementation="triton", **options)

    sums = {"lse": True, "entropy": True, "max_prob": True}
    return {
        "output": case(output=True, lse=True),
        "output, entropy, max": case(output=True, **sums),
        "output, entropy, max, 16 spans, 8 offsets": case(labelled=True, output=True, offsets=OFFSETS, **sums),
        "the same with argmax": case(labelled=True, output=True, argmax=True, offsets=OFFSETS, **sums),
        "lse": case(lse=True),
        "lse, entropy, max, 16 spans, 8 offsets": case(labelled=True, offsets=OFFSETS, **sums),
        "columns given lse: sum, max, last 64": case(known=True, column_sum=True, column_max=True, column_last=(64,)),
        "column sum from nothing": case(column_sum=True),
        "lse, entropy, max, argmax, columns": case(
            argmax=True, column_sum=True, column_max=True, column_last=(64,), **sums
        ),
        "64 x 64 blocks given lse: sum, max": case(known=True, block=64),
        "diagonal sums given lse": case(known=True, diagonal=True),
        "top 4 keys given lse": case(known=True, top_k=4),
    }


def rivals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Attention itself by other hands, and the one package that has column sums."""
    found: dict[str, Callable[[], object]] = {}

    def backend(kind: SDPBackend) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel(kind):
                return sdpa(q, k, v, is_causal=True, enable_gqa=True)

        return run

    found["sdpa cuDNN"] = backend(SDPBackend.CUDNN_ATTENTION)
    found["sdpa flash"] = backend(SDPBackend.FLASH_ATTENTION)
    with suppress(ImportError):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention)
        # Compiled, or it would make the whole mask first.
        mask = torch.compile(create_block_mask)(
            lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device="cuda"
        )
        found["FlexAttention"] = lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)
    with suppress(ImportError):
        from flash_colreduce import flash_colreduce

        repeated = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        found["flash-colreduce, column sum"] = lambda: flash_colreduce(q, repeated, reduction="sum", is_causal=True)
    if k.shape[2] <= EAGER_TOKENS:
        found["eager, full matrix"] = lambda: eager(q, k, v)
    return found


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Output, entropy, maximum and column sum read off the full matrix."""
    group = q.shape[1] // k.shape[1]
    logits = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device="cuda").triu(1)
    a = torch.softmax(logits.masked_fill_(hidden, float("-inf")), -1)
    return [a.to(v.dtype) @ v.repeat_interleave(group, 1), torch.special.entr(a).sum(-1), a.amax(-1), a.sum(-2)]


def ceilings() -> tuple[float, float]:
    """Measured: bfloat16 matrix product (TFLOP/s) and device copy (TB/s, read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9
    source = torch.empty(2**30, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    return product, 2 * 4 * 2**30 / do_bench(lambda: target.copy_(source), return_mode="median") / 1e9


def measure(run: Callable[[], object], repeat_ms: int) -> dict[str, float]:
    """Quantiles (ms), and the most memory taken beyond what was there (MiB)."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    low, median, high = do_bench(run, warmup=50, rep=repeat_ms, quantiles=[0.2, 0.5, 0.8])
    return {"q20_ms": low, "median_ms": median, "q80_ms": high, "peak_mib": peak}


def bench(tokens: int, arguments: argparse.Namespace, known: dict[str, object]) -> list[dict[str, object]]:
    """All rivals and cases at one length."""
    q, k, v = inputs(tokens, arguments.heads, arguments.kv_heads, arguments.dim)
    flops = 4 * arguments.heads * arguments.dim * tokens * (tokens + 1) / 2
    rows, plain = [], None
    heads = f"{arguments.heads} heads of {arguments.dim}, {arguments.kv_heads} KV heads"
    print(f"\n{tokens} tokens, {heads}, bfloat16, causal")
    for name, run in {**rivals(q, k, v), **ours(q, k, v)}.items():
        try:
            found = measure(run, arguments.repeat_ms)
        except (torch.OutOfMemoryError, triton.runtime.errors.OutOfResources, RuntimeError) as error:
            print(f"  {name:<44} failed: {str(error).splitlines()[0][:80]}", flush=True)
            continue
        plain = found["median_ms"] if plain is None else plain
        rate = flops / found["median_ms"] / 1e9
        print(
            f"  {name:<44} {found['median_ms']:9.3f} ms [{found['q20_ms']:.3f}, {found['q80_ms']:.3f}] "
            f"{found['median_ms'] / plain:6.2f} x cuDNN  {rate:6.0f} TFLOP/s  peak {found['peak_mib']:8.1f} MiB",
            flush=True,
        )
        rows.append(
            known
            | {"tokens": tokens, "heads": arguments.heads, "kv_heads": arguments.kv_heads, "dim": arguments.dim}
            | {"dtype": "bfloat16", "case": name, **{key: round(value, 4) for key, value in found.items()}}
            | {"ratio_to_cudnn": round(found["median_ms"] / plain, 4), "tflops_of_attention": round(rate, 1)}
            | {"share_of_matmul": round(rate / float(str(known["matmul_tflops"])), 3)}
        )
    return rows


def decode(tokens: int, arguments: argparse.Namespace, known: dict[str, object]) -> list[dict[str, object]]:
    """Few new queries against a long cache: bound by reading keys and values, for short ones by launches.

    Timed twice: as a captured graph, as decoding engines run it, and launch by launch. Every query sees all keys, in
    both.
    """
    rows = []
    wanted = StatisticsRequest(output=True, lse=True, entropy=True, max_prob=True, argmax=True)
    for queries in (1, 16, 64):
        q, k, v = inputs(tokens, arguments.heads, arguments.kv_heads, arguments.dim, queries=queries)
        cases = {
            "flash": lambda q=q, k=k, v=v: _flash(q, k, v),
            "output, entropy, max, argmax": lambda q=q, k=k, v=v: attention_statistics(
                q, k, v, wanted, causal=False, implementation="triton"
            ),
        }
        for mode, timed in (("graph", do_bench_cudagraph), ("launches", do_bench)):
            plain = None
            for name, run in cases.items():
                low, median, high = timed(run, rep=arguments.repeat_ms, quantiles=[0.2, 0.5, 0.8])
                plain = median if plain is None else plain
                speed = 2 * k.numel() * k.element_size() / median / 1e9
                case = f"decode, {queries} queries, {mode}: {name}"
                print(
                    f"  {tokens:>8} keys, {case:<58} {median:8.4f} ms [{low:.4f}, {high:.4f}] "
                    f"{median / plain:6.2f} x flash  {speed:5.2f} TB/s",
                    flush=True,
                )
                rows.append(
                    known
                    | {"tokens": tokens, "heads": arguments.heads, "kv_heads": arguments.kv_heads}
                    | {"dim": arguments.dim, "dtype": "bfloat16", "case": case, "q20_ms": round(low, 4)}
                    | {"median_ms": round(median, 4), "q80_ms": round(high, 4)}
                    | {"ratio_to_flash": round(median / plain, 4)}
                    | {"share_of_copy": round(speed / float(str(known["copy_tbps"])), 3)}
                )
    return rows


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v, enable_gqa=True)


def main() -> None:
    """Verify, measure, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--decode-tokens", type=int, nargs="*", default=[16384, 131072, 1048576])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeat-ms", type=int, default=500)
    parser.add_argument("--verified", action="store_true", help="the tests have just passed on this machine")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA device: the CPU's costs are measured by bench_capture.py.")
    if not arguments.verified:
        require_green()
    product, copy = ceilings()
    known = facts() | {"triton": triton.__version__, "matmul_tflops": round(product, 1), "copy_tbps": round(copy, 2)}
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    rows = []
    for tokens in arguments.tokens:
        rows += bench(tokens, arguments, known)
        torch.cuda.empty_cache()
    for tokens in arguments.decode_tokens:
        rows += decode(tokens, arguments, known)
    append(RESULTS, rows)


if __name__ == "__main__":
    main()
