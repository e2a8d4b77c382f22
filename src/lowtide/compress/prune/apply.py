"""prune_model(): a rule, an allocation and updates applied to a whole model."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowtide.arch import GROUPS, group_specs
from lowtide.compress.dense import DenseModel
from lowtide.compress.prune import allocation as alloc
from lowtide.compress.prune import dsnot as dsnot_rule
from lowtide.compress.prune import get_pruner, importance, learned, sparsegpt, updates
from lowtide.compress.prune.base import LayerProblem, Pruned
from lowtide.compress.prune.masks import check_fits, check_sparsity, parse_structure
from lowtide.compress.prune.problems import ProblemStore, Progress, silent
from lowtide.compress.prune.sequential import Walk
from lowtide.compress.sources import Source
from lowtide.compress.sources.overlay import OverlaySource
from lowtide.errors import LowtideError

SEQUENTIAL = ("no", "block", "group")
SEARCH_WINDOWS, SEARCH_TOKENS = 4, 256
"""Of the calibration text, what the search measures its candidates on."""


@dataclass(frozen=True)
class PruneOptions:
    """How a model is pruned. Checked on construction (LowtideError).

    Attributes:
        rule: a key of `PRUNERS`.
        sparsity: share of the body's weights that go, in [0, 1); None: the knee of the score's distribution.
        structure: `unstructured`, `N:M`, `row`, `column` or `block:RxC`; N:M has its own sparsity.
        allocation: one of `allocation.ALLOCATIONS`.
        updates: True: the best values for the mask; False: those of the dense model; None: the rule's own way.
        dsnot: refine the rule's mask by DSnoT.
        sequential: `no`: all layers see the dense model's inputs; `block`: those that the pruned blocks before give, as
            SparseGPT's authors do it; `group`: those that all layers pruned before give.
        gradual: rule `importance`, unstructured: weights go in steps with updates in between, and one threshold shares
            the sparsity out among layers; the best there is and the slowest (see `learned`).
        network: file of the importance network that `gradual` goes by, or `start`, its default.
        strict: refuse, instead of warn about, a layer that loses every weight.
        seed: of random masks and of the search.
        generations, children: size of the search.
    """

    rule: str = "importance"
    sparsity: float | None = 0.5
    structure: str = "unstructured"
    allocation: str = "uniform"
    updates: bool | None = None
    dsnot: bool = False
    sequential: str = "no"
    gradual: bool = False
    network: str | None = None
    strict: bool = False
    seed: int = 0
    generations: int = 30
    children: int = 8

    def __post_init__(self) -> None:
        get_pruner(self.rule)
        parsed = parse_structure(self.structure)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.allocation not in alloc.ALLOCATIONS:
            raise LowtideError(f"--allocation {self.allocation}: known are {', '.join(alloc.ALLOCATIONS)}")
        if self.sequential not in SEQUENTIAL:
            raise LowtideError(f"--sequential {self.sequential}: known are {', '.join(SEQUENTIAL)}")
        if parsed.fixed_sparsity is not None and self.allocation != "uniform":
            raise LowtideError(f"--allocation {self.allocation}: {self.structure} gives every layer the same sparsity")
        if self.gradual and (self.rule, parsed.kind) != ("importance", "unstructured"):
            raise LowtideError("--gradual: is of the rule importance, unstructured; choose these or give --no-gradual")
        if self.network is not None and not self.gradual:
            raise LowtideError("--network: needs --gradual")
        if self.dsnot and parsed.kind not in ("unstructured", "n:m"):
            raise LowtideError(f"--structure {self.structure}: dsnot swaps single weights; give unstructured or N:M")


def prune_layer(problem: LayerProblem, sparsity: float, options: PruneOptions) -> Pruned:
    """One layer by the options' rule, refinement and updates."""
    structure = options.structure
    if options.rule == "importance" and (options.updates is False or options.dsnot):
        pruned = importance.mask_only(problem, sparsity, structure)
    elif options.rule == "sparsegpt" and options.updates and problem.target is not None:
        parsed = parse_structure(structure)
        pruned = sparsegpt.solve(problem.target, problem.hessian, sparsity, parsed, problem.name)
    else:
        pruned = get_pruner(options.rule)(problem, sparsity, structure)
    if options.dsnot:
        pruned = dsnot_rule.refine(problem, pruned.mask, structure)
    if options.updates is False:
        return Pruned(pruned.mask, problem.weight * pruned.mask)
    if options.updates and (options.rule != "importance" or options.dsnot):
        return Pruned(pruned.mask, updates.update(problem, pruned.mask, pruned.weight))
    return pruned


def prune_model(
    source: Source,
    ids: torch.Tensor,
    options: PruneOptions,
    *,
    store: ProblemStore | None = None,
    work: str | Path | None = None,
    progress: Progress = silent,
) -> tuple[OverlaySource, dict[str, Any]]:
    """Prune the linear layers of a model's body; embedding and output head stay.

    Args:
        source: the model.
        ids: i64 [windows, tokens], the calibration text.
        options: what to do.
        store: calibration made before, for the same model and text.
        work: folder for calibration and search, so that an interrupted run goes on; a temporary one by default.
        progress: stages `forward`, `calibrate`, `allocate`, `search` and `prune`.

    Returns:
        (the pruned model, report): the report holds the options, `density` reached, `layers` (name -> sparsity and
        relative output error), `warnings`, `seconds`, `calibration_tokens`, `zeros` and `weights`.

    Raises:
        LowtideError: a structure that does not divide a layer, damaged statistics, and with `strict` a layer that
            would lose every weight.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(work) if work else Path(temporary)
        model = DenseModel(source) if store is None else store.model
        sizes = layer_sizes(source, options.structure)
        kept = store or ProblemStore(folder / "problems", model, ids, options.seed, progress)
        job = _Job(model, ids, options, kept, sizes, folder, progress)
        weights = job.gradual() if options.gradual else job.prune(job.sparsities())
    overlay = OverlaySource(source, weights, f"{source.name}, pruned by {options.rule}")
    total = sum(out * inn for out, inn in sizes.values())
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    report = vars(options) | {
        "sparsity": options.sparsity if options.sparsity is not None else job.found,
        "density": 1 - zeros / total,
        "weights": total,
        "zeros": zeros,
        "calibration_tokens": ids.numel(),
        "layers": job.layers,
        "warnings": job.warnings,
        "seconds": round(time.monotonic() - began, 1),
    }
    return overlay, report


def layer_sizes(source: Source, structure: str) -> dict[str, tuple[int, int]]:
    """Layer name -> (out, in) of the body. LowtideError if the structure does not divide one."""
    parsed = parse_structure(structure)
    linears = [linear for spec in group_specs(source.config) if spec.is_body for linear in spec.linears]
    for linear in linears:
        check_fits(parsed, linear.out_features, linear.in_features, linear.name)
    return {linear.name: (linear.out_features, linear.in_features) for linear in linears}


@dataclass
class _Job:
    """One pruning under way."""

    model: DenseModel
    ids: torch.Tensor
    options: PruneOptions
    store: ProblemStore
    sizes: dict[str, tuple[int, int]]
    folder: Path
    progress: Progress
    found: float = 0.0
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def sparsities(self) -> Mapping[str, float]:
        """Each layer's sparsity."""
        options, fixed = self.options, parse_structure(self.options.structure).fixed_sparsity
        if fixed is not None:
            self.found = fixed
            return alloc.uniform(self.sizes, fixed)
        wanted = options.sparsity
        histogram = None
        if wanted is None or options.allocation in ("global", "searched"):
            histogram = alloc.histogram(self._problems("allocate"), importance.saliency)
        if wanted is None:
            assert histogram is not None
            wanted = histogram.knee()
        self.found = wanted
        if options.allocation == "uniform":
            return alloc.uniform(self.sizes, wanted)
        if options.allocation == "erk":
            return alloc.erk(self.sizes, wanted)
        assert histogram is not None
        start: Mapping[str, float] = histogram.sparsities(wanted)
        return start if options.allocation == "global" else self._search([start, alloc.uniform(self.sizes, wanted)])

    def _problems(self, stage: str) -> Iterator[LayerProblem]:
        for index in range(len(self.store)):
            yield from self.store.block(index)
            self.progress(stage, index + 1, len(self.store))

    def _search(self, starts: list[Mapping[str, float]]) -> Mapping[str, float]:
        """The best found from the better of the starts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        loss = _SearchLoss(self.model, self.ids, self.store, self.options, self.folder / "levels")
        search = alloc.Search(
            self.sizes,
            min(starts, key=loss),
            loss,
            generations=self.options.generations,
            children=self.options.children,
            seed=self.options.seed,
            state=self.folder / "search.json",
        )
        return search.run(self.progress)[0]

    def gradual(self) -> dict[str, torch.Tensor]:
        """Tensor name -> weights pruned step by step, f32 [out, in]."""
        options = self.options
        self.found = options.sparsity if options.sparsity is not None else self._knee()
        weights = learned.gradual_weights(
            self.store, self.ids, options.network, self.found, options.seed, self.progress
        )
        for index in range(len(self.store)):
            for problem in self.store.block(index):
                weight = weights[problem.name]
                self._account(problem, Pruned(weight != 0, weight))
        return {f"{name}.weight": weight for name, weight in weights.items()}

    def _knee(self) -> float:
        return alloc.histogram(self._problems("allocate"), importance.saliency).knee()

    def prune(self, sparsities: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """Tensor name -> pruned weights, f32 [out, in]."""
        mode = self.options.sequential
        walk = None if mode == "no" else Walk(self.model, self.ids, within=mode == "group")
        result: dict[str, torch.Tensor] = {}

        def prune(problems: list[LayerProblem]) -> list[torch.Tensor]:
            done = []
            for problem in problems:
                pruned = prune_layer(problem, sparsities[problem.name], self.options)
                self._account(problem, pruned)
                done.append(pruned.weight)
                result[problem.name + ".weight"] = pruned.weight
            return done

        with torch.no_grad():
            for index in range(len(self.store)):
                if walk is None:
                    prune(self.store.block(index))
                else:
                    walk.block(index, self.store.statistics(index), self.options.seed, prune)
                self.progress("prune", index + 1, len(self.store))
        return result

    def _account(self, problem: LayerProblem, pruned: Pruned) -> None:
        """The report's line of a layer, and what to say if nothing is left of it."""
        if not pruned.weight.any():
            text = f"{problem.name}: nothing would be left of it"
            if self.options.strict:
                raise LowtideError(f"{text} (--strict); give a lower --sparsity or another --allocation")
            self.warnings.append(text)
        error = pruned.weight - problem.weight
        power = float(((problem.weight @ problem.hessian) * problem.weight).sum())
        lost = float(((error @ problem.hessian) * error).sum())
        self.layers[problem.name] = {
            "sparsity": float((pruned.weight == 0).float().mean()),
            "error": lost / max(power, 1e-30),
        }


@dataclass
class _SearchLoss:
    """KL of the model pruned by given sparsities, in nats per token of some calibration windows.

    Layers pruned at a level are kept in `folder`, so every (layer, sparsity) is pruned once.
    """

    model: DenseModel
    ids: torch.Tensor
    store: ProblemStore
    options: PruneOptions
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.windows = self.ids[:SEARCH_WINDOWS, :SEARCH_TOKENS]
        self.dense = [torch.log_softmax(self.model.logits(row[None])[0], -1) for row in self.windows]

    def __call__(self, sparsities: Mapping[str, float]) -> float:
        """The KL."""
        weights: dict[str, torch.Tensor] = {}
        for index in range(len(self.store)):
            weights |= self._block(index, sparsities)
        model = DenseModel(OverlaySource(self.model.source, weights), cache_bytes=self.model.cache_bytes)
        total = 0.0
        for row, dense in zip(self.windows, self.dense, strict=True):
            ours = torch.log_softmax(model.logits(row[None])[0], -1)
            total += float((dense.exp() * (dense - ours)).sum(-1).mean())
        return total / len(self.windows)

    @torch.no_grad()
    def _block(self, index: int, sparsities: Mapping[str, float]) -> dict[str, torch.Tensor]:
        names = [f"model.layers.{index}.{member}" for members in GROUPS.values() for member in members]
        paths = {name: self.folder / f"{name}-{sparsities[name]:.6f}.npy" for name in names}
        if not all(path.exists() for path in paths.values()):
            for problem in self.store.block(index):
                path = paths[problem.name]
                if not path.exists():
                    _keep(path, prune_layer(problem, sparsities[problem.name], self.options).weight)
        return {f"{name}.weight": torch.from_numpy(np.load(path)) for name, path in paths.items()}


def _keep(path: Path, weight: torch.Tensor) -> None:
    """Write f32 [out, in]; a run that dies leaves no half file under the name."""
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        np.save(file, weight.numpy())
    os.replace(partial, path)
