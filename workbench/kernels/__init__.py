"""Attention statistics on bare tensors; this package knows no model."""

from workbench.kernels.blocks import workspace_bytes as workspace_bytes
from workbench.kernels.dispatch import attention_output as attention_output
from workbench.kernels.dispatch import attention_statistics as attention_statistics
from workbench.kernels.geometry import Geometry as Geometry
from workbench.kernels.maps import attention_tile as attention_tile
from workbench.kernels.pyramid import pooled as pooled
from workbench.kernels.reference import attention_pattern as attention_pattern
from workbench.kernels.removal import removal_effects as removal_effects
from workbench.kernels.request import AttentionStatistics as AttentionStatistics
from workbench.kernels.request import StatisticsRequest as StatisticsRequest
