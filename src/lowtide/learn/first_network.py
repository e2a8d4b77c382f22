"""The network that training begins with: that of an artifact, or an untrained one with clusters of its own and probes
fitted to sensitivities."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from lowtide.arch import ModelConfig
from lowtide.errors import LowtideError
from lowtide.format.reader import Artifact, open_artifact
from lowtide.learn import ipn_progress as progress
from lowtide.learn.cluster_fit import Stored, fit_clusters, key_channels, tokens_for
from lowtide.learn.clusters import Clusters, stored_clusters
from lowtide.learn.graded import GradedModel, budget_tables
from lowtide.learn.ipn import Ipn
from lowtide.learn.ipn_export import shift_for
from lowtide.learn.ipn_train import CENTROIDS, FEATURES, IpnOptions, Learner, Report, held_out
from lowtide.learn.parallel import Parallel
from lowtide.learn.sensitivity import fit_probes, probe_tokens, sensitivities
from lowtide.learn.shards import is_sharded

CLUSTERS = "clusters.npz"
"""In the work folder: a run that goes on must not find others."""
MOST_KEY_BITS = 0.1
"""Of each weight, that clusters' keys may cost where the number of clusters is not given."""
LEVEL_TOKENS = 2048
"""That the first thresholds are set on, in whole windows."""


def settled(options: IpnOptions, first: Artifact) -> IpnOptions:
    """The numbers of features and centroids settled, and whether q, k and v go apart: as in the network that training
    begins with, or, where other numbers are asked for or not all parts learn, as in a fresh one."""
    has = first.manifest.ipn
    features, centroids, apart = FEATURES, affordable(first.config), False
    if has is not None and set(options.parts) == set(Ipn.PARTS):
        if options.features in (None, has["features"]) and options.centroids in (None, has["centroids"]):
            features, centroids, apart = has["features"], has["centroids"], bool(has["factors"])
    return dataclasses.replace(
        options,
        features=features if options.features is None else options.features,
        centroids=centroids if options.centroids is None else options.centroids,
        apart=apart if options.apart is None else options.apart,
    )


def affordable(config: ModelConfig) -> int:
    """CENTROIDS, or as many as a small model has bits for: their keys are read whatever the mask is."""
    width, channels = config.hidden_size, key_channels(config.hidden_size)
    rows = config.q_size + 2 * config.kv_size + 2 * config.intermediate_size
    weights = width * rows + config.q_size * width + config.intermediate_size * width
    count = CENTROIDS if channels else 0
    while count > 1 and 2 * (count * (8 * channels + 64) + 32 * channels) > MOST_KEY_BITS * weights:
        count //= 2
    return count if count > 1 else 0


def goes_on(artifact: Artifact, options: IpnOptions) -> bool:
    """Whether training begins with the network that the artifact has: if it is of the size asked for."""
    has = artifact.manifest.ipn
    if has is None or set(options.parts) != set(Ipn.PARTS):
        return False
    return has["features"] == options.features and has["centroids"] == options.centroids


def network_of(network: str | Path, artifact: Artifact, options: IpnOptions) -> Artifact:
    """The artifact that `network` names, whose network must fit.

    Raises:
        LowtideError: it is of another model, calibration or size, or not all parts learn.
    """
    found = open_artifact(network)
    if found.manifest.model_id != artifact.manifest.model_id:
        raise LowtideError(f"{network}: its network is of another model than the artifact")
    alike = found.manifest.slices == artifact.manifest.slices and found.manifest.budgets == artifact.manifest.budgets
    if not alike or any(
        not np.array_equal(getattr(group, what), getattr(artifact.groups[name], what))
        for name, group in found.groups.items()
        for what in ("exact_channels", "mean")  # from which centroids are counted
    ):
        raise LowtideError(f"{network}: its network is for other budgets, exact channels or means; calibrate alike")
    if set(options.parts) != set(Ipn.PARTS):
        raise LowtideError(f"--parts {','.join(options.parts)}: all of them learn where --network is given")
    if not goes_on(found, options):
        has = found.manifest.ipn
        what = "has no importance prediction network"
        if has is not None:
            what = f"its network has {has['features']} features and {has['centroids']} centroids"
        wanted = f"{options.features} features and {options.centroids} centroids"
        raise LowtideError(f"{network}: {what}; wanted is one with {wanted}")
    return found


def network(artifact: Artifact, first: Artifact, options: IpnOptions, device: torch.device) -> Ipn:
    """One for the artifact's groups, with the thresholds of `first`; importances, probes and clusters come later."""
    importance = {
        name: torch.from_numpy(group.importance.astype(np.float32)).to(device)
        for name, group in artifact.groups.items()
        if name != "embed"
    }
    grid, tables = budget_tables(first, "ipn" if goes_on(first, options) else "channel-norm")
    moved = {name: table.to(device) for name, table in tables.items()}
    assert options.features is not None
    return Ipn(
        importance, grid, moved, options.features, options.seed, options.parts, *options.bits, bool(options.apart)
    )


def clusters_for(
    team: Parallel,
    artifact: Artifact,
    first: Artifact,
    model: GradedModel,
    ids: torch.Tensor,
    options: IpnOptions,
    work: Path,
    report: Report,
) -> dict[str, Clusters]:
    """Clusters of every group: those of `first`, or found on the windows i64 [B, N] that are not held out, and kept in
    `work`."""
    if not options.centroids:
        return {}
    if goes_on(first, options):
        stored = {name: stored_clusters(group) for name, group in first.groups.items()}
    else:
        kept = work / CLUSTERS
        if team.main and not kept.exists():
            count = min(max(1, tokens_for(model.dense, options.centroids) // ids.shape[1]), len(ids) - held_out(ids))
            told = functools.partial(report, "cluster")
            found = fit_clusters(artifact, model.dense, ids[:count], options.centroids, options.seed, told)
            _keep(kept, found)
        team.wait()
        stored = _kept(kept)
    try:
        return {name: Clusters.of(artifact.groups[name], own, model.device) for name, own in stored.items() if own}
    except LowtideError as error:
        raise LowtideError(f"{error}: give --centroids 0") from None


def _keep(path: Path, found: dict[str, Stored]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    flat: dict[str, Any] = {f"{name} {field}": value for name, own in found.items() for field, value in own.items()}
    np.savez(temporary, **flat)
    os.replace(temporary, path)


def _kept(path: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                name, _, field = key.partition(" ")
                found.setdefault(name, {})[field] = arrays[key]
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise LowtideError(f"{path}: cannot be read ({error}); give --restart") from None
    return found


@torch.no_grad()
def set_level(model: GradedModel, ipn: Ipn, ids: torch.Tensor) -> None:
    """Bring an untrained network with clusters to its budgets: inputs are nearer to zero than those that thresholds
    were made for. The body's all move together; the head reads as much as it did without clusters."""
    some = ids[: max(1, LEVEL_TOKENS // ids.shape[1])]
    shifts = [shift_for(model, ipn, some, bits, 0.0)[0] for bits in (ipn.low, ipn.high)]
    ipn.level[0], ipn.level[1] = sum(shifts) / 2, (shifts[1] - shifts[0]) / 2
    _level_head(model, ipn, model.dense.hidden(some).flatten(0, 1))


def _level_head(model: GradedModel, ipn: Ipn, x: torch.Tensor) -> None:
    """x: f32 [T, D], what the head reads."""
    head, table = model.groups["head"], ipn.tables["head"].clone()
    known = head.clusters
    assert known is not None and known.keys is not None
    weight = ipn.log_importance("head").exp2() * ipn.open["head"]

    def scores(middle: torch.Tensor) -> torch.Tensor:
        return ((x - middle).abs() * weight).flatten().sort().values

    before, now = scores(head.mean), scores(known.mean[known.keys.code(x)])
    keys = ipn.side_bits("head") / (2.0 * head.out * head.inputs) * len(before)  # in channels read less
    for row in table:
        open_ = row < 39.9  # what is never read stays so
        wanted = sum(len(before) - int(torch.searchsorted(before, cut)) for cut in row[open_].exp2()) - keys
        low, high = -16.0, 16.0
        for _ in range(40):
            middle = (low + high) / 2
            read = sum(len(now) - int(torch.searchsorted(now, cut)) for cut in (row[open_] + middle).exp2())
            low, high = (middle, high) if read > wanted else (low, middle)
        row[open_] += (low + high) / 2
    ipn.tables["head"] = table


def start(learner: Learner, work: Path, report: Report) -> float | None:
    """Fit the probes to sensitivities, unless a checkpoint is going to replace them; mean ratio of held-out cost."""
    if (work / progress.NAME).exists():
        return None
    ratio = _fit(learner, report) if learner.parallel.main else None
    with torch.no_grad():
        for p in learner.parameters().values():
            if not is_sharded(p):
                p.copy_(learner.parallel.first(p))
    return ratio


def _fit(learner: Learner, report: Report) -> float:
    train = learner.ids[: len(learner.ids) - learner.held]
    count = max(1, probe_tokens(learner.model.dense) // train.shape[1])
    seen = sensitivities(
        learner.model, train[:count], learner.options.seed, lambda done, total: report("probe", done, total)
    )
    ratios = fit_probes(learner.ipn, seen, seed=learner.options.seed)
    return sum(ratios.values()) / len(ratios)
