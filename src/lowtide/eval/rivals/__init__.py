"""Rivals of our rules: dynamic sparsity as other papers do it, on our artifact, on our calibration text, bytes counted.

`RIVALS` lists them by name, `HIERARCHIES` the nested and shared masks under our own scores. All read the same code of
the same weights, so rules are compared and not codes; all take an unread channel for its mean; the head is read by the
artifact's own `channel-norm` at the same budget for all.
What a paper leaves open, and the level that a binary rule reads, is chosen by KL on calibration text.
"""

from __future__ import annotations

from lowtide.eval.rivals.base import Fitted, LevelPlan, OutOfReach, Plan, Rival
from lowtide.eval.rivals.calibration import Calibration
from lowtide.eval.rivals.cats import Cats
from lowtide.eval.rivals.checked import CheckedModel
from lowtide.eval.rivals.chess import Chess
from lowtide.eval.rivals.graded import Graded
from lowtide.eval.rivals.hierarchy import HIERARCHIES, Hierarchical
from lowtide.eval.rivals.low_rank_predictor import LowRankPredictor
from lowtide.eval.rivals.measure import Figures, Tuner, measure, settle
from lowtide.eval.rivals.model import RivalModel
from lowtide.eval.rivals.nested import HierarchyPlan
from lowtide.eval.rivals.r_sparse import RSparse
from lowtide.eval.rivals.self_supervised import SelfSupervisedPredictor
from lowtide.eval.rivals.static_precision import StaticPrecision
from lowtide.eval.rivals.statistical_topk import BinaryStatisticalTopK, StatisticalTopK
from lowtide.eval.rivals.teal import Teal
from lowtide.eval.rivals.wina import Wina

RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Graded(),
        StatisticalTopK(),
        BinaryStatisticalTopK(),
        Teal(),
        Wina(),
        Cats(),
        Chess(),
        RSparse(),
        LowRankPredictor(),
        SelfSupervisedPredictor(),
        StaticPrecision(),
    )
}

__all__ = [
    "HIERARCHIES",
    "RIVALS",
    "Calibration",
    "CheckedModel",
    "Figures",
    "Fitted",
    "Hierarchical",
    "HierarchyPlan",
    "LevelPlan",
    "OutOfReach",
    "Plan",
    "Rival",
    "RivalModel",
    "Tuner",
    "measure",
    "settle",
]
