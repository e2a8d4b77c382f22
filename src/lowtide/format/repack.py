"""The same artifact stored another way: coded or packed, or with fewer slices. No weights are lost but the slices left
out, and a coded artifact gives up its last slices even if they were never downloaded."""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lowtide.arch import norm_specs
from lowtide.errors import LowtideError
from lowtide.format import image, reader
from lowtide.format.card import CARD_NAME
from lowtide.format.groups import GroupTensors
from lowtide.format.manifest import CODINGS, CONFIG_NAME, WEIGHTS_NAME, Manifest
from lowtide.format.writer import ArtifactWriter, Report


def repack(
    artifact: str | Path,
    out: str | Path,
    *,
    coding: str | None = None,
    bits_max: int | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Manifest:
    """Write an artifact again.

    Args:
        artifact: its folder. Its `model.safetensors` may be cut short if it is coded and `bits_max` needs no more of it
            (`Manifest.prefixes` says how much each slice needs).
        out: the folder to make.
        coding: `entropy` or `packed`; by default as it is.
        bits_max: bits per weight to keep, 2, 4, 6 or 8; by default all.
        force: replace `out` if it is there.
        report: called with (done, total) while coding.

    Raises:
        LowtideError: bad options, a damaged artifact, or no room.
    """
    if coding is not None and coding not in CODINGS:
        raise LowtideError(f"--coding {coding}: must be one of {', '.join(CODINGS)}")
    if bits_max is not None and bits_max not in (2, 4, 6, 8):
        raise LowtideError(f"--bits-max {bits_max}: must be 2, 4, 6 or 8")
    folder = Path(os.path.realpath(artifact))
    manifest = reader.read_manifest(folder)
    slices = manifest.slices if bits_max is None else bits_max // 2
    if slices > manifest.slices:
        raise LowtideError(f"--bits-max {bits_max}: the artifact has {2 * manifest.slices} bits")
    with tempfile.TemporaryDirectory() as scratch, ArtifactWriter(out, force=force) as writer:
        opened = _open(folder, manifest, slices, Path(scratch))
        budgets, kept = _budgets(manifest, opened.groups, slices)
        for group in opened.groups.values():
            writer.add_group(cut(group, slices, kept))
        for name, _ in norm_specs(manifest.config):
            writer.add_tensor(name, opened.tensor(name))
        for name in manifest.files:
            if name not in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
                writer.add_file(name, opened.file(name))
        stats: dict[str, Any] = {k: v for k, v in manifest.stats.items() if k != "entropy"}
        return writer.finish(
            config=manifest.config,
            slices=slices,
            budgets=budgets,
            policies=manifest.policies,
            model_id=manifest.model_id,
            stats=stats,
            zero=manifest.zero,
            coding=coding or manifest.coding,
            report=report,
            ipn=manifest.ipn,
        )


def cut(group: GroupTensors, slices: int, budgets: list[int]) -> GroupTensors:
    """A group with its first slices and some of its budgets."""
    for linear in group.linears:
        linear.weight = linear.weight[:slices]
    thresholds = group.thresholds[:, budgets, :slices] if group.thresholds.size else group.thresholds[:, :, :slices]
    group.thresholds, group.shrink, group.slices = np.ascontiguousarray(thresholds), group.shrink[:slices], slices
    if group.ipn is not None and group.ipn.gain is not None:
        group.ipn = dataclasses.replace(group.ipn, gain=group.ipn.gain[budgets])
    return group


def _budgets(manifest: Manifest, groups: dict[str, GroupTensors], slices: int) -> tuple[list[float], list[int]]:
    """Budgets that the slices can still fill (and the full read as the last), and their places in the old grid."""
    if slices == manifest.slices:
        return manifest.budgets, list(range(len(manifest.budgets)))
    body = [g for name, g in groups.items() if name not in ("head", "embed")]
    weights = sum(g.weights() for g in body)
    side = sum(8 * g.side_bytes() for g in body) / weights
    full = side + sum(2 * slices * g.weights() * (1 - len(g.exact_channels) / g.in_features) for g in body) / weights
    kept = [i for i, budget in enumerate(manifest.budgets) if budget < full - 0.125]
    return [*(manifest.budgets[i] for i in kept), full], [*kept, len(manifest.budgets) - 1]


def _open(folder: Path, manifest: Manifest, slices: int, scratch: Path) -> reader.Artifact:
    """The artifact; of a file cut short, what its beginning holds."""
    weights = folder / WEIGHTS_NAME
    whole = manifest.files[WEIGHTS_NAME].bytes
    size = weights.stat().st_size if weights.is_file() else 0
    if manifest.coding == "packed" or size == whole:
        return reader.open_artifact(folder)
    prefix = manifest.prefixes[slices - 1]
    if size < prefix.bytes:
        raise LowtideError(
            f"{weights}: {size} bytes are too few for {2 * slices} bits per weight; get the first {prefix.bytes}"
        )
    with weights.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[: prefix.bytes]
    if hashlib.sha256(data).hexdigest() != prefix.sha256:
        raise LowtideError(f"{weights}: its beginning is damaged (its SHA-256 is not the manifest's); get it again")
    target = scratch / "image.safetensors"
    image.unpack(data, manifest, slices, target, str(weights))
    return reader.open_image(folder, manifest, target)
