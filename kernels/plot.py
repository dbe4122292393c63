"""Draw the recorded costs: every case at both lengths, as multiples of cuDNN's forward pass.

Run by hand:  python kernels/plot.py
Reads kernels/results/statistics.csv (the last run of each length) and writes kernels/results/statistics.html.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

RESULTS = Path(__file__).parent / "results"
# Colour-blind-safe, dark for the longer prompt.
COLOURS = {32768: "#56B4E9", 131072: "#0072B2"}


def main() -> None:
    """One bar a case and length, rivals first."""
    rows = pd.read_csv(RESULTS / "statistics.csv").dropna(subset=["ratio_to_cudnn"])
    last = rows.groupby(["tokens", "case"], sort=False).tail(1)
    figure = go.Figure()
    for tokens, part in last.groupby("tokens"):
        figure.add_bar(
            y=part["case"], x=part["ratio_to_cudnn"], orientation="h", name=f"{tokens // 1024}k tokens",
            marker_color=COLOURS.get(int(tokens), "#999999"), text=[f"{x:.2f}" for x in part["ratio_to_cudnn"]],
        )  # fmt: skip
    facts = last.iloc[-1]
    shape = f"{facts['heads']} heads of {facts['dim']}, {facts['kv_heads']} KV heads, {facts['dtype']}, causal"
    figure.add_vline(x=1.0, line_dash="dot", line_color="#444444")
    figure.update_layout(
        title=f"Cost as a multiple of cuDNN's attention forward<br><sup>{facts['gpu']}, {shape}, medians</sup>",
        xaxis_title="time / time of cuDNN's forward", yaxis={"autorange": "reversed"}, barmode="group",
        template="plotly_white", width=1000, height=760, margin={"l": 290, "t": 80},
        legend={"orientation": "h", "x": 0.7, "y": 1.06},
    )  # fmt: skip
    figure.write_html(RESULTS / "statistics.html", include_plotlyjs=True)
    print(RESULTS / "statistics.html")


if __name__ == "__main__":
    main()
