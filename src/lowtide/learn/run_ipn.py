"""`lowtide learn ipn` and `lowtide learn joint`: from an artifact or a model to an artifact with a learned rule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowtide.compress import compress, products
from lowtide.compress.dense import DenseModel
from lowtide.compress.pack import WorkFolder
from lowtide.compress.same_model import check_same_model
from lowtide.compress.sources import open_source
from lowtide.errors import LowtideError
from lowtide.format import centroids
from lowtide.format.groups import IpnTensors
from lowtide.format.ipn import attach
from lowtide.format.manifest import IpnInfo
from lowtide.format.reader import Artifact, open_artifact
from lowtide.learn import first_network, training_text
from lowtide.learn import ipn_progress as progress
from lowtide.learn.agreed import agree
from lowtide.learn.apart import find_factors
from lowtide.learn.devices import device_for, name_of
from lowtide.learn.graded import GradedModel, budget_tables
from lowtide.learn.ipn_export import TOKENS, as_stored, gains, take_stored, thresholds, write_weights
from lowtide.learn.ipn_train import DIVERGED, IpnOptions, Learner, Report, held_out
from lowtide.learn.parallel import Parallel, join

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""How torch and CUDA's libraries say so where the error's type does not."""
TRAINER = 4
"""Raised when a run must not go on from a checkpoint of an older version of the training."""


def learn_ipn(
    artifact: str | Path,
    model: str | Path,
    out: str | Path,
    options: IpnOptions,
    text: str | Path | None = None,
    tokens: int = 65_536,
    resume: bool = True,
    force: bool = False,
    report: Report = lambda *_: None,
    network: str | Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Train an importance prediction network for an artifact; the model's weights stay as they are.

    Args:
        artifact: made by `lowtide compress` without a target size, thresholds of `channel-norm` in it. A network that
            is in it and has as many features and centroids is where training begins.
        model: what it was made from.
        out: the artifact to write, the same weights with the policy `ipn` as default. Checkpoints in `OUT.partial`.
        options: how to train; `weight_rate` must be 0.
        text: UTF-8 file; by default the model writes its own. `options.own_text` says how much it writes beside a file.
        tokens: of it, at most.
        resume, force, report: as everywhere.
        network: another artifact of the same model, whose network is where training begins, e.g. one without feedback.
        device: what it runs on, see `lowtide.learn.devices`.

    Returns:
        Figures: held-out `before` and `after` at a few budgets, steps, best_step, trained_tokens, probe_ratio, ...
        With several processes ({} but in the first, which alone writes and reports) see `lowtide.learn.parallel`.

    Raises:
        LowtideError: bad input, a text too short, out of memory, `out` exists, windows that processes cannot share.
    """
    training_text.check_part(options, text)
    team = join(options.windows, weights=False)
    target, opened = Path(out).absolute(), open_artifact(artifact)
    found = device_for(device, team.world)
    _check_out(target, force)
    dense = DenseModel(open_source(model), device=found)
    return _learn(team, opened, Path(artifact), dense, target, options, text, tokens, resume, force, report, network)


def rate_for(hidden: int) -> float:
    """Weights' rate for a width: Adam moves all weights of a row the same way, so what a step does to an output grows
    with the row. 0.003 trained well at 288 channels, 0.0006 at 576; 0.002 there doubled the KL of higher budgets."""
    return max(1e-4, 0.003 * min(1.0, (288 / hidden) ** 2))


def learn_joint(
    model: str | Path,
    out: str | Path,
    options: IpnOptions,
    artifact: str | Path | None = None,
    text: str | Path | None = None,
    tokens: int = 262_144,
    calibration: str | Path | None = None,
    resume: bool = True,
    force: bool = False,
    report: Report = lambda *_: None,
    network: str | Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Train the model's weights and its importance prediction network together, and write an ordinary artifact.

    Args:
        model: as for `lowtide compress`.
        out: the artifact to write; `OUT.start` holds the untrained one meanwhile, `OUT.partial` checkpoints.
        options: how to train; `weight_rate` above 0, or None.
        artifact: an artifact of the model to begin with, its network too as in `learn_ipn`; by default the model is
            compressed first, on `calibration` or `text`.
        text, tokens, resume, force, report, network, device: see `learn_ipn`. Compressing needs no device.
    """
    if options.weight_rate is None:
        options = dataclasses.replace(options, weight_rate=rate_for(open_source(model).config.hidden_size))
    training_text.check_part(options, text)
    if not options.weight_rate:
        raise LowtideError("--weight-rate 0: leaves the model alone; `lowtide learn ipn` does that")
    team = join(options.windows)
    if team.mesh is not None and options.rank:
        raise LowtideError(f"--rank {options.rank}: not with --use_fsdp, which shares out full weights")
    found = device_for(device, team.world)
    target = Path(out).absolute()
    _check_out(target, force)
    if network is not None:
        open_artifact(network)  # what is missing shall be missed before hours of compression
    start = target.with_name(target.name + ".start")
    if artifact is None:
        if team.main:
            given = calibration or text
            source = open_source(model)
            about = [source.fingerprint(), options.seed, None if given is None else str(Path(given).absolute())]
            folder = WorkFolder(start, {"start": about if resume else time.time()})
            if not (folder.path / "artifact" / "lowtide.json").exists():
                compress(source, folder.path / "artifact", calibration=given, seed=options.seed, progress=report)
        team.wait()
        artifact = start / "artifact"
    opened, dense = open_artifact(artifact), DenseModel(open_source(model), device=found)
    done = _learn(team, opened, Path(artifact), dense, target, options, text, tokens, resume, force, report, network)
    if team.main:
        shutil.rmtree(start, ignore_errors=True)
    return done


def _learn(
    team: Parallel,
    artifact: Artifact,
    folder: Path,
    dense: DenseModel,
    out: Path,
    options: IpnOptions,
    text: str | Path | None,
    tokens: int,
    resume: bool,
    force: bool,
    report: Report,
    network: str | Path | None,
) -> dict[str, Any]:
    began = time.monotonic()
    report = report if team.main else lambda *_: None
    _check_out(out, force)
    joint = bool(options.weight_rate)
    check_same_model(artifact, dense.source)
    options = first_network.settled(options, artifact if network is None else open_artifact(network))
    first = artifact if network is None else first_network.network_of(network, artifact, options)
    goes_on = first_network.goes_on(first, options)
    _check(options, tokens, budget_tables(first, "ipn" if goes_on else "channel-norm")[0])
    try:
        products.choose(dense.device)
        work = out.with_name(out.name + ".partial")
        of = training_text.wanted(dense, None if text is None else Path(text), tokens, options)
        key = _key(options, folder, network, of.key())
        if team.main:
            if not resume:
                shutil.rmtree(work, ignore_errors=True)
            WorkFolder(work, {"run": key})
        team.wait()
        multiplied = agree(team, work, dense.device)
        ids = training_text.windows(team, dense, of, options, work, report)
        graded = _model(team, artifact, dense, joint, options)
        ipn = first_network.network(artifact, first, options, dense.device)
        clusters = first_network.clusters_for(team, artifact, first, graded, ids, options, work, report)
        graded.take_clusters(clusters)
        ipn.take_clusters(clusters)
        if goes_on:
            take_stored(ipn, first)
        for name, group in graded.groups.items():
            group.side_bits += ipn.side_bits(name)
        learner = Learner(graded, ipn, ids, options, team)
        if clusters and not goes_on:
            first_network.set_level(graded, ipn, ids[: len(ids) - held_out(ids)])
            ipn.tables["head"] = team.first(ipn.tables["head"])
        ratio = None if goes_on else first_network.start(learner, work, report)
        known = goes_on and first.manifest.ipn is not None and first.manifest.ipn["factors"]
        if not known and not (work / progress.NAME).exists():
            find_factors(learner, lambda done, total: report("apart", done, total))
        run = _train(learner, work, key, report)
        figures = {}
        if team.main or team.mesh is not None:
            figures = _finish(learner, run, artifact, folder, out, work, force, report)
        team.wait()
    except (MemoryError, RuntimeError) as error:
        raise _out_of_memory(error, dense.device) from None
    finally:
        products.choose(products.CPU)
    if not team.main:
        return {}
    shutil.rmtree(work, ignore_errors=True)
    figures |= {"probe_ratio": ratio, "device": name_of(dense.device), "products": multiplied}
    return figures | {"seconds": round(time.monotonic() - began, 1)}


def _check_products(artifact: Artifact, stored: dict[str, IpnTensors]) -> None:
    """LowtideError if an engine could not make the centroids' tables of these weights."""
    try:
        for name, tensors in stored.items():
            centroids.make(dataclasses.replace(artifact.groups[name], ipn=tensors))
    except LowtideError as error:
        raise LowtideError(f"{error}: lower --weight-rate, or give --centroids 0") from None


def _check(options: IpnOptions, tokens: int, grid: list[float]) -> None:
    """LowtideError for what cannot be trained; grid: the budgets that the artifact stores."""
    if "offset" not in options.parts:
        raise LowtideError(
            f"--parts {','.join(options.parts)}: offset must be among them; an artifact stores its probes"
        )
    if options.apart and "theta" not in options.parts:
        raise LowtideError(f"--apart: factors are of thresholds; --parts {','.join(options.parts)} leaves theta out")
    if tokens < 1:
        raise LowtideError(f"--tokens {tokens}: must be 1 or more")
    low, high = options.bits
    if not grid[0] <= low < high <= grid[-1]:
        raise LowtideError(f"--bits {low:g},{high:g}: the artifact stores budgets from {grid[0]:g} to {grid[-1]:.2f}")


def _key(options: IpnOptions, folder: Path, network: str | Path | None, text: bytes) -> str:
    """What a checkpoint must have been made with: the trainer, its options, artifacts and text."""
    parts = [(folder / "lowtide.json").read_bytes(), text]
    parts += [] if network is None else [(Path(network) / "lowtide.json").read_bytes()]
    return json.dumps([TRAINER, asdict(options), *(hashlib.sha256(part).hexdigest() for part in parts)])


def _out_of_memory(error: MemoryError | RuntimeError, device: torch.device) -> Exception:
    """What to say of an error that is one for want of memory; any other itself."""
    said = str(error)
    if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and not any(m in said for m in NO_MEMORY):
        return error
    reason = re.split(r"\. |\n", said)[0] or "no more to be had"
    knobs = "fewer --windows help most, then fewer --tokens" + (", or --device cpu" if device.type != "cpu" else "")
    return LowtideError(f"out of memory ({reason}): {knobs}")


def _check_out(out: Path, force: bool) -> None:
    if (out.exists() or out.is_symlink()) and not force:
        raise LowtideError(f"{out}: exists already; choose another folder or give --force")


def _model(team: Parallel, artifact: Artifact, dense: DenseModel, joint: bool, options: IpnOptions) -> GradedModel:
    if team.mesh is None:
        return GradedModel(artifact, dense, joint, options.rank, options.seed)
    from lowtide.learn.sharded import ShardedModel

    return ShardedModel(artifact, dense, team.mesh, team.free)


def _train(learner: Learner, work: Path, key: str, report: Report) -> progress.Run:
    """All steps; the best ones' parameters are in place afterwards."""
    o, parameters = learner.options, learner.parameters()
    optimiser = learner.optimiser()
    run = progress.load(work, parameters, optimiser, key, learner.parallel)
    if run is None:
        run = progress.Run()
        run.follow(parameters, o.average)
        checked = learner.check()
        if not math.isfinite(checked["value"]):
            raise LowtideError("the held-out KL is not finite: the model, its artifact or its text is damaged")
        run.first, run.history = checked["value"], [{"step": 0, "tokens": 0} | checked]
        run.keep(parameters, checked["value"])
    while run.step < o.steps:
        figures = learner.step(run.step, optimiser)
        run.step += 1
        run.tokens += int(figures["tokens"])
        run.follow(parameters, o.average)
        report("train", run.step, o.steps)
        finite = math.isfinite(figures["kl"])
        if finite and run.step % o.check_every and run.step < o.steps:
            continue
        with run.averaged(parameters):
            checked = learner.check() if finite else {"value": None, "points": []}
            run.history.append({"step": run.step, "tokens": run.tokens} | checked)
            if checked["value"] is None or not checked["value"] < run.first + DIVERGED:
                run.history[-1]["diverged"] = True
                break
            if checked["value"] < run.best:
                run.keep(parameters, checked["value"])
        progress.save(work, run, parameters, optimiser, key, learner.parallel)
    run.restore(parameters)
    learner.model.refresh()
    return run


def _finish(
    learner: Learner,
    run: progress.Run,
    artifact: Artifact,
    folder: Path,
    out: Path,
    work: Path,
    force: bool,
    report: Report,
) -> dict[str, Any]:
    """The artifact, and what is told of it. Where weights are sharded all processes come here; the first one writes."""
    o, graded, ipn, main = learner.options, learner.model, learner.ipn, learner.parallel.main
    stored = as_stored(ipn)
    text = learner.ids[-max(1, TOKENS // learner.ids.shape[1]) :]
    tables, reads = thresholds(graded, ipn, text, lambda done, total: report("thresholds", done, total))
    for name, tensors in stored.items():
        if tensors.mix is not None:
            tensors.gain = gains(ipn, name)
    before = artifact.manifest.stats.get("learned")
    joint = bool(o.weight_rate) or (isinstance(before, dict) and bool(before.get("joint")))
    learned = {"trained_tokens": run.tokens, "steps": run.best_step, "joint": joint, "seed": o.seed}
    base = folder
    if o.weight_rate:
        base = work / "weights"
        write_weights(artifact, graded, base, {}, main)
    if not main:
        return {}
    keys = ipn.keys.get("head")
    centroids, channels = (0, 0) if keys is None else keys.weight.shape
    if ipn.clusters and o.weight_rate:  # with weights as they are the products were made already
        _check_products(open_artifact(base), stored)
    info: IpnInfo = {
        "features": ipn.features,
        "low": o.bits[0],
        "high": o.bits[1],
        "centroids": centroids,
        "key_channels": channels,
        "factors": int(any(tensors.factor is not None for tensors in stored.values())),
    }
    attach(base, out, stored, tables, info, force, {"learned": learned})
    return {
        "out": str(out),
        "before": run.history[0]["points"],
        "after": next(h for h in run.history if h["step"] == run.best_step)["points"],
        "steps": run.step,
        "best_step": run.best_step,
        "trained_tokens": run.tokens,
        "diverged": bool(run.history[-1].get("diverged")),
        "history": run.history,
        "budget_error": max(abs(read / bits - 1) for bits, read in reads.items()),
    }
