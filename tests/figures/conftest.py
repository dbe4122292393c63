"""Small tables whose every number is chosen by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest

LAYERS, HEADS = 4, 3


@pytest.fixture
def grid() -> np.ndarray[Any, Any]:
    """Scores `[layer, head]`; L2H1 leads with 0.8."""
    values = np.arange(LAYERS * HEADS, dtype=float).reshape(LAYERS, HEADS) / 100
    values[2, 1] = 0.8
    return values


@pytest.fixture
def scores(grid: np.ndarray[Any, Any]) -> pd.DataFrame:
    rows = [
        ("toy", "induction", layer, head, v, v - 0.01, v + 0.02, 10, 0.05, 0.001, 0.004)
        for (layer, head), v in np.ndenumerate(grid)
    ]
    columns = "model detector layer head value low high n null p q".split()
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture
def verification() -> pd.DataFrame:
    """Three ablations of one metric (beyond, inside, improving) and one of another metric."""
    columns = "detector k heads metric unit better effect low high control_low control_high draws p q n".split()
    rows = [
        ("induction", 2, "L2H1 L3H0", "loss", "nats", "lower", 1.0, 0.8, 1.2, -0.1, 0.2, 10, 0.001, 0.004, 8),
        ("sink", 1, "L0H1", "loss", "nats", "lower", 0.1, 0.0, 0.2, -0.1, 0.2, 10, 0.6, 0.6, 8),
        ("echo", 1, "L1H1", "loss", "nats", "lower", -0.5, -0.6, -0.4, -0.1, 0.2, 10, 0.9, 0.9, 8),
        ("induction", 2, "L2H1 L3H0", "recall", "", "higher", -0.4, -0.5, 0.1, -0.1, 0.1, 10, 0.02, 0.1, 8),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).assign(how="mean", baseline=1.0, control_effect=0.0)


@pytest.fixture
def draws() -> pd.DataFrame:
    rows = [("induction", 2, "loss", i, f"L0H{i}", 1.0, 0.01 * i) for i in range(10)]
    rows += [("sink", 1, "loss", i, f"L1H{i}", 1.0, -0.01 * i) for i in range(10)]
    return pd.DataFrame(rows, columns="detector k metric draw heads value effect".split())


@pytest.fixture
def curves() -> pd.DataFrame:
    rows = []
    for (layer, head), statistic in product([(2, 1), (0, 1)], ["first_1", "entropy"]):
        level = {"first_1": 0.5, "entropy": 3.0}[statistic] + layer / 10
        rows += [("sink", layer, head, statistic, position, level) for position in range(8)]
    return pd.DataFrame(rows, columns="detector layer head statistic position value".split())


@pytest.fixture
def contrast() -> pd.DataFrame:
    rows = []
    for layer, head in product(range(LAYERS), range(HEADS)):
        for domain, value in (("prose", 0.5), ("code", 0.5 if (layer, head) != (2, 1) else 0.1)):
            rows.append((layer, head, domain, value, value - 0.02, value + 0.03, 20))
    return pd.DataFrame(rows, columns="layer head domain value low high n".split())
