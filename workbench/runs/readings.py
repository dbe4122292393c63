"""Tokens that heads' circuits read and write most, kept with a run: the table `circuit_directions`.

Columns: layer, head, circuit (`ov` or `qk`), direction (from 0, the strongest), sign (1 or -1), share (of the circuit's
power), and `reads` and `writes`: tokens as lists in JSON. See `workbench.heads.readings` for what they mean.
"""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

TABLE = "circuit_directions"


def stored_directions(table: pd.DataFrame, layer: int, head: int) -> list[dict[str, Any]]:
    """The rows of one head, with their tokens as lists of text."""
    own = table[(table["layer"] == layer) & (table["head"] == head)]
    return [
        {**row, **{side: [str(text) for text in json.loads(str(row[side]))] for side in ("reads", "writes")}}
        for row in own.to_dict("records")
    ]
