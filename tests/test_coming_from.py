"""The snippets of `COMING_FROM.md`: every column is run, and all columns of a snippet give the same numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench
from workbench.models.adapters.nnsight import wrapper_around
from workbench.models.adapters.transformer_lens import bridge_around
from workbench.models.testing import TINY, VOCAB_SIZE

pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
pytest.importorskip("nnsight", reason="nnsight is not installed")

PAGE = Path(workbench.__file__).parent / "models" / "adapters" / "COMING_FROM.md"
COLUMNS = ("TransformerLens", "nnsight", "Workbench")


def snippets() -> dict[str, dict[str, str]]:
    """Title -> column -> code."""
    found = {}
    for part in re.split(r"^## (?=\d+\. )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title, _, rest = part.partition("\n")
        table = rest.partition("</table>")[0]
        names = re.findall(r"<th>(.*?)</th>", table)
        codes = re.findall(r"```python\n(.*?)```", table, flags=re.DOTALL)
        found[title] = dict(zip(names, codes, strict=True))
    return found


@pytest.fixture(scope="module")
def names() -> dict[str, dict[str, Any]]:
    """What each column's snippets find: the same weights, each library with a model of its own."""
    generator = torch.Generator().manual_seed(4)
    tokens, other = (torch.randint(3, VOCAB_SIZE, (2, 12), generator=generator) for _ in range(2))
    shared = {
        "torch": torch, "tokens": tokens, "other": other, "repeated": torch.cat([tokens, tokens], 1),
        "heads": 6, "layers": 3,
    }  # fmt: skip
    bridge, lm = bridge_around(TINY["llama"](), None), wrapper_around(TINY["llama"](), None)
    lm._module.set_attn_implementation("eager")
    return {
        "TransformerLens": shared | {"bridge": bridge},
        "nnsight": shared | {"lm": lm},
        "Workbench": shared | {"model": workbench.load(TINY["llama"]())},
        "attached bridge": shared | {"model": workbench.load(bridge_around(TINY["llama"](), None))},
        "attached nnsight": shared | {"model": workbench.load(wrapper_around(TINY["llama"](), None))},
    }


def test_there_are_ten() -> None:
    found = snippets()
    assert len(found) == 10
    assert all(tuple(columns) == COLUMNS for columns in found.values())


@pytest.mark.parametrize("title", snippets())
def test_all_columns_find_the_same(title: str, names, tmp_path: Path) -> None:
    found = {}
    for column, given in names.items():
        # From a file of its own: nnsight reads the source of what it traces.
        file = tmp_path / f"{column.replace(' ', '_')}.py"
        file.write_text(snippets()[title].get(column, snippets()[title]["Workbench"]), encoding="utf-8")
        namespace = dict(given)
        with torch.no_grad():
            exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), namespace)
        found[column] = namespace["found"].double()
    truth = found["Workbench"]
    assert truth.abs().max() > 1e-3
    for column, value in found.items():
        assert value.shape == truth.shape, column
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-4 * max(1.0, float(truth.abs().max())), msg=column)
