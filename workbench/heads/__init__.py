"""Detectors of heads, and the causal test of what they claim."""

from workbench.heads.ablation_map import AblationMap as AblationMap
from workbench.heads.ablation_map import ablation_maps as ablation_maps
from workbench.heads.detection import HeadScores as HeadScores
from workbench.heads.detection import detect as detect
from workbench.heads.detector import Detector as Detector
from workbench.heads.detector import Kind as Kind
from workbench.heads.detectors import CORE as CORE
from workbench.heads.detectors import DETECTORS as DETECTORS
from workbench.heads.gating import Gates as Gates
from workbench.heads.gating import GateSettings as GateSettings
from workbench.heads.gating import fit_gates as fit_gates
from workbench.heads.kinds import KINDS as KINDS
from workbench.heads.probes import Probe as Probe
from workbench.heads.probes import ProbeSettings as ProbeSettings
from workbench.heads.probes import build_probe as build_probe
from workbench.heads.settings import Settings as Settings
from workbench.heads.verification import Ablator as Ablator
from workbench.heads.verification import Claim as Claim
from workbench.heads.verification import Verification as Verification
from workbench.heads.verification import involved as involved
from workbench.heads.verification import matched_heads as matched_heads
from workbench.heads.verification import verify as verify
from workbench.heads.verification import verify_claim as verify_claim
from workbench.heads.verification import verify_sets as verify_sets
