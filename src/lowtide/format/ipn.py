"""An importance prediction network for an artifact that is there already: its tensors and its policy are added."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowtide.arch import norm_specs
from lowtide.errors import LowtideError
from lowtide.format.card import CARD_NAME
from lowtide.format.groups import IPN_FIELDS, GroupTensors, IpnTensors
from lowtide.format.layout import DTYPES
from lowtide.format.manifest import CONFIG_NAME, WEIGHTS_NAME, IpnInfo, Manifest, has_ipn
from lowtide.format.reader import open_artifact
from lowtide.format.writer import ArtifactWriter

F32 = NDArray[np.float32]


def attach(
    artifact_folder: str | Path,
    out_folder: str | Path,
    ipn_by_group: Mapping[str, IpnTensors],
    thresholds: Mapping[str, F32],
    info: IpnInfo,
    force: bool = False,
    stats: Mapping[str, object] | None = None,
) -> Manifest:
    """Write an artifact again with the policy `ipn` as its first, and so its default.

    Digits, scales and the other policies' thresholds keep their bytes; an IPN that is there is replaced. The streams of
    a coded artifact are copied, not coded again.

    Args:
        artifact_folder: the artifact.
        out_folder: the folder to make; the same folder, with `force`, replaces the artifact.
        ipn_by_group: the IPN of every group but `embed`.
        thresholds: the rule's f32 [B, S] for the same groups, B budgets of the artifact's grid.
        info: features of a probe, the trained range of bits_read_body, and how many centroids and key channels;
            whether q, k and v have factors.
        force: replace `out_folder` if it is there.
        stats: entries that the manifest's `stats` get, or that replace theirs.

    Returns:
        The new manifest.

    Raises:
        LowtideError: groups, shapes or values that do not fit the artifact, a damaged artifact, or no room.
    """
    folder = Path(os.path.realpath(artifact_folder))
    opened = open_artifact(folder)
    manifest = opened.manifest
    wanted = {name for name in opened.groups if name != "embed"}
    for what, given in (("IPN", set(ipn_by_group)), ("thresholds", set(thresholds))):
        if given != wanted:
            odd = sorted(given ^ wanted)[0]
            raise LowtideError(f"{folder}: {what} of group {odd}: {'missing' if odd in wanted else 'not in the model'}")
    kept = [i for i, policy in enumerate(manifest.policies) if not has_ipn([policy])]
    coded = manifest.coding == "entropy"
    with ArtifactWriter(out_folder, force=force) as writer:
        for name, group in opened.groups.items():
            if name != "embed":
                group = _with_ipn(group, ipn_by_group[name], thresholds[name], kept, str(folder))
            writer.add_group(group)
        for name, _ in norm_specs(manifest.config):
            writer.add_tensor(name, opened.tensor(name))
        for name in manifest.files:
            if name not in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
                writer.add_file(name, opened.file(name))
        return writer.finish(
            config=manifest.config,
            slices=manifest.slices,
            budgets=manifest.budgets,
            policies=["ipn", *(manifest.policies[i] for i in kept)],
            model_id=manifest.model_id,
            stats={**manifest.stats, **(stats or {})},
            zero=manifest.zero,
            coding=manifest.coding,
            ipn={
                "features": int(info["features"]),
                "low": float(info["low"]),
                "high": float(info["high"]),
                "centroids": int(info.get("centroids", 0)),
                "key_channels": int(info.get("key_channels", 0)),
                "factors": int(info.get("factors", 0)),
            },
            coded_from=folder / WEIGHTS_NAME if coded else None,
        )


def _with_ipn(group: GroupTensors, ipn: IpnTensors, thresholds: F32, kept: list[int], where: str) -> GroupTensors:
    """The group with the IPN in stored dtypes, and its thresholds before those of the policies kept."""
    table = np.asarray(thresholds, np.float32)
    if table.shape != group.thresholds.shape[1:]:
        expected = list(group.thresholds.shape[1:])
        raise LowtideError(f"{where}: IPN thresholds of group {group.name} must be {expected}, not {list(table.shape)}")
    stored = {
        field.removeprefix("ipn_"): np.ascontiguousarray(tensor, DTYPES[IPN_FIELDS[field]])
        for field, tensor in ipn.fields().items()
    }
    tables = np.concatenate([table[None], group.thresholds[kept]])
    return dataclasses.replace(group, ipn=IpnTensors(**stored), thresholds=tables)
