"""Graded linear layers on a GPU. Needs torch, and Triton (which comes with torch's CUDA builds) for the fast backend.

For example:

    from lowtide.integrations.triton import GradedGroup

    group = GradedGroup(artifact.groups["layers.0.qkv"], "cuda")
    q, k, v = group(x, thresholds)
"""

from __future__ import annotations

from lowtide.integrations.triton.graded import BACKENDS, GradedGroup, Tuning

__all__ = ["BACKENDS", "GradedGroup", "Tuning"]
