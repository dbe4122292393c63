"""Figures: a table or a labelled array in, a plotly figure out; pure functions, no files, no global state.

Each figure carries its caption (what was measured, on what) in `layout.meta["caption"]`; read it with
`caption_of`. Every function takes `dark=` for the dark variant of the one theme.
"""

from __future__ import annotations

from workbench.figures.ablation import ablation_chart as ablation_chart
from workbench.figures.atlas import agreement_matrix as agreement_matrix
from workbench.figures.atlas import head_scatter as head_scatter
from workbench.figures.atlas import rank_maps as rank_maps
from workbench.figures.circuits import circuit_graph as circuit_graph
from workbench.figures.circuits import score_map as score_map
from workbench.figures.contrast import domain_scatter as domain_scatter
from workbench.figures.curves import position_curves as position_curves
from workbench.figures.differences import depth_scatter as depth_scatter
from workbench.figures.differences import difference_map as difference_map
from workbench.figures.differences import pair_scatter as pair_scatter
from workbench.figures.differences import told_apart as told_apart
from workbench.figures.dose import dose_curve as dose_curve
from workbench.figures.dose import has_doses as has_doses
from workbench.figures.faithfulness import contribution_bars as contribution_bars
from workbench.figures.faithfulness import faithfulness_curve as faithfulness_curve
from workbench.figures.faithfulness import roc_curve as roc_curve
from workbench.figures.maps import head_map as head_map
from workbench.figures.maps import head_maps as head_maps
from workbench.figures.patching import has_map as has_map
from workbench.figures.patching import patch_maps as patch_maps
from workbench.figures.pattern import pattern_map as pattern_map
from workbench.figures.scatter import metric_scatter as metric_scatter
from workbench.figures.studies import dose_lines as dose_lines
from workbench.figures.studies import point_chart as point_chart
from workbench.figures.text import caption_of as caption_of
from workbench.figures.theme import DARK as DARK
from workbench.figures.theme import LIGHT as LIGHT
from workbench.figures.theme import Palette as Palette
from workbench.figures.theme import palette as palette
from workbench.figures.theme import template as template
from workbench.figures.verdict import Verdict as Verdict
from workbench.figures.verdict import verdict as verdict
