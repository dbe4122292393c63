"""What statistics of every head cost in the forward pass of a whole model on a GPU.

A Llama-shaped model with random weights (16 layers, width 2048, 32 heads of 64, 8 KV heads), bfloat16, one long
prompt: the plain forward pass with stock attention (flash and cuDNN, the faster counts), and `Model.trace` with row
and column statistics of all heads.

Run by hand:  python kernels/bench_model.py --tokens 131072
Prints medians, ratios and peak memory; appends rows to kernels/results/model.csv.
"""

from __future__ import annotations

import argparse
import statistics as quantiles
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import append, facts
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM
from verify import require_green

import workbench
from workbench import statistics as s

RESULTS = Path(__file__).parent / "results" / "model.csv"


def build(tokens: int) -> LlamaForCausalLM:
    """The model, on the GPU, with random weights."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=tokens, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def measure(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds (quartiles) and peak memory beyond the weights (MiB); the first run warms up."""
    run()
    seconds = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    low, median, high = quantiles.quantiles(seconds, n=4, method="inclusive")
    return {"q25_s": low, "median_s": median, "q75_s": high, "peak_mib": peak}


def main() -> None:
    """Plain passes, then traces, in one process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--verified", action="store_true", help="the tests have just passed on this machine")
    arguments = parser.parse_args()
    if not arguments.verified:
        require_green()
    rows = []
    for tokens in arguments.tokens:
        hf = build(tokens)
        ids = torch.randint(0, 32000, (1, tokens), device="cuda")

        def plain(backend: SDPBackend, hf: LlamaForCausalLM = hf, ids: torch.Tensor = ids) -> Callable[[], object]:
            def run() -> None:
                with torch.no_grad(), sdpa_kernel(backend):
                    hf(ids, use_cache=False, logits_to_keep=1)

            return run

        found = {
            "plain, cuDNN": measure(plain(SDPBackend.CUDNN_ATTENTION), arguments.repeats),
            "plain, flash": measure(plain(SDPBackend.FLASH_ATTENTION), arguments.repeats),
        }
        fastest = min(case["median_s"] for case in found.values())
        least = min(case["peak_mib"] for case in found.values())
        model = workbench.load(hf)
        batch = workbench.Batch.from_ids(ids.tolist())
        rows_only = [s.lse(), s.entropy(), s.max_prob(), s.first(4), s.offset(-1)]
        wanted = {
            "trace, row statistics": rows_only,
            "trace, row and column statistics": [
                *rows_only,
                s.argmax(),
                s.column_sum(),
                s.column_max(),
                s.output_norm(),
            ],
        }
        for name, chosen in wanted.items():
            found[name] = measure(
                lambda chosen=chosen, model=model, batch=batch: model.trace(batch, statistics=chosen), arguments.repeats
            )
        print(f"{tokens} tokens, 16 layers, 32 heads, {torch.cuda.get_device_name()}, torch {torch.__version__}")
        for name, case in found.items():
            ratio, memory = case["median_s"] / fastest, case["peak_mib"] / least
            print(
                f"  {name:<34} {case['median_s']:8.3f} s [{case['q25_s']:.3f}, {case['q75_s']:.3f}]  "
                f"{ratio:5.2f} x plain  peak {case['peak_mib']:8.0f} MiB, {memory:.2f} x plain",
                flush=True,
            )
            rows.append(
                facts()
                | {"tokens": tokens, "case": name}
                | {key: round(value, 4) for key, value in case.items()}
                | {"ratio_to_plain": round(ratio, 3), "memory_ratio": round(memory, 3)}
            )
        del model, hf
        torch.cuda.empty_cache()
    append(RESULTS, rows)


if __name__ == "__main__":
    main()
