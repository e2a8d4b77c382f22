"""What each ingredient of the importance prediction network is worth: trained variants, sharing, cache.

Every variant is trained with the same steps on the calibration text and judged at equal bits: one shift of all
thresholds is solved for on the judged windows themselves, as the budget controller would settle. Products are those of
training (`lowtide.learn.graded`), the head is read as `channel-norm` reads it. `overlap` is the mean share of a token's
open slices that the token before had open, too; `hits` the share of masks taken from the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import common
import numpy as np
import torch
from dynamic_common import Row, Subject, budgets

from lowtide.compress.products import product_type
from lowtide.learn.cluster_fit import fit_clusters
from lowtide.learn.clusters import Clusters
from lowtide.learn.first_network import set_level
from lowtide.learn.graded import GradedModel, budget_tables
from lowtide.learn.head import head_kl
from lowtide.learn.ipn import At, Ipn
from lowtide.learn.ipn_loss import Prices
from lowtide.learn.ipn_train import CENTROIDS, FEATURES, IpnOptions, Learner
from lowtide.learn.sensitivity import fit_probes, sensitivities

NAME = "ablation"
COLUMNS = ("rule", "bits", "read", "KL", "overlap", "hits")
ALL = Ipn.PARTS
CHUNKS = (2, 4, 8)
OTHER_FEATURES = (2, 8, 16)
OTHER_CENTROIDS = (16, 256)
DRIFTS = (0.9, 0.8, 0.6)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this section."""
    parser.add_argument("--ablation-steps", type=int, default=60, help="end-to-end steps of every variant")
    parser.add_argument("--ablation-windows", type=int, default=8, help="windows of a step")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what cannot be; --quick shortens."""
    if options.ablation_steps < 0:
        parser.error(f"--ablation-steps {options.ablation_steps}: 0 or more")
    if options.quick:
        options.ablation_steps, options.ablation_windows = min(options.ablation_steps, 4), 2


def variants(steps: int, windows: int, seed: int) -> dict[str, IpnOptions]:
    """Name of every trained variant and how it is trained."""
    full = IpnOptions(steps=steps, windows=windows, seed=seed, features=FEATURES, centroids=CENTROIDS)
    base = replace(full, centroids=0)
    start = replace(base, parts=("offset",), steps=0)
    middles = replace(full, parts=("theta",), steps=0)
    return {
        "theta learned": replace(base, parts=("theta",)),
        "importance learned": replace(base, parts=("importance",)),
        "offset, start only": start,
        **{f"offset, start only, {n} features": replace(start, features=n) for n in OTHER_FEATURES},
        "offset learned": replace(base, parts=("offset",)),
        "centroids, nothing learned": middles,
        **{f"{n} centroids, nothing learned": replace(middles, centroids=n) for n in OTHER_CENTROIDS},
        "all but centroids": base,
        "all (ipn)": full,
        "all, l1 for hinge": replace(full, prices=Prices("l1", l1=3.0)),
        "all, consistency": replace(full, prices=Prices(consistency=3.0)),
    }


class Shared(At):
    """One mask for `chunk` consecutive tokens: levels of the root mean square of their scores. It looks ahead, as
    prefill may; decoding one token after another could do no better."""

    def __init__(self, ipn: Ipn, bits: float, shift: float = 0.0, chunk: int = 4) -> None:
        super().__init__(ipn, bits, shift)
        self.chunk = chunk

    def scores(self, name: str, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `At.scores`; the head's masks are each token's own."""
        score, theta = super().scores(name, a)
        if name == "head":
            return score, theta
        chunks = (2 * score).exp2().view(-1, self.chunk, score.shape[1])
        return (chunks.mean(1).log2() / 2).repeat_interleave(self.chunk, 0), theta


class Cached(At):
    """A token takes the last mask made, if its scores' direction is within `drift` (cosine) of that token's."""

    def __init__(self, ipn: Ipn, bits: float, shift: float = 0.0, drift: float = 0.8, window: int = 256) -> None:
        super().__init__(ipn, bits, shift)
        self.drift, self.window = drift, window
        self.hits = self.asked = 0

    def scores(self, name: str, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `At.scores`; the head's masks are each token's own."""
        fresh, theta = super().scores(name, a)
        if name == "head":
            return fresh, theta
        score = a.abs() * self.ipn.log_importance(name).exp2()
        unit = score / score.norm(dim=1, keepdim=True).clamp_min(1e-20)
        source = torch.arange(len(a))
        for start in range(0, len(a), self.window):
            last = start
            for token in range(start + 1, min(start + self.window, len(a))):
                if float(unit[token] @ unit[last]) >= self.drift:
                    source[token] = last
                    self.hits += 1
                else:
                    last = token
        self.asked += len(a)
        return fresh[source], theta


@dataclass
class Bench:
    """A model under its masks, and what it is judged against."""

    subject: Subject
    model: GradedModel

    def __post_init__(self) -> None:
        self.head = self.subject.dense.head_weight.to(product_type())
        self.theirs = [self.subject.dense.hidden(row[None]) for row in self.subject.ids]
        self._clusters: dict[int, dict[str, Clusters]] = {0: {}}

    def take_clusters(self, ipn: Ipn, count: int) -> None:
        """Model and network go by so many clusters, found on the calibration text."""
        if count not in self._clusters:
            subject, device = self.subject, self.model.device
            found = fit_clusters(subject.artifact, subject.dense, subject.calibration, count)
            self._clusters[count] = {n: Clusters.of(subject.artifact.groups[n], t, device) for n, t in found.items()}
        self.model.take_clusters(self._clusters[count])
        ipn.take_clusters(self._clusters[count])

    @torch.no_grad()
    def measure(self, ipn: Ipn, bits: float, make: Callable[..., At] = At) -> tuple[float, float, list[At]]:
        """(bits read, KL, the masks' objects, window by window) at the shift that reads `bits`."""
        low, high, shift = -4.0, 4.0, 0.0
        probe = self.subject.ids[:: max(1, len(self.subject.ids) // 4)]
        for _ in range(11):
            shift = (low + high) / 2
            reads = [float(self.model.hidden(row[None], make(ipn, bits, shift))[1].mean()) for row in probe]
            low, high = (shift, high) if np.mean(reads) > bits else (low, shift)
        read, kl, seen = [], [], []
        for row, theirs in zip(self.subject.ids, self.theirs, strict=True):
            at = make(ipn, bits, shift)
            hidden, got = self.model.hidden(row[None], at)
            read.append(float(got.mean()))
            kl.append(float(head_kl(self.model, hidden, theirs, self.head, at)))
            seen.append(at)
        return float(np.mean(read)), float(np.mean(kl)), seen

    @torch.no_grad()
    def overlap(self, ipn: Ipn, bits: float, shift: float) -> float:
        """Mean share of open slices that were open for the token before; thresholds moved by `shift`."""
        at = At(ipn, bits, shift, keep_margins=True)
        self.model.hidden(self.subject.ids[:1], at)
        both = total = 0.0
        for margins in at.margins.values():
            m = (margins > 0).float()
            both += float((m[:, :, 1:] * m[:, :, :-1]).sum())
            total += float(m[:, :, 1:].sum())
        return both / max(total, 1.0)


def rows(options: argparse.Namespace, subject: Subject) -> Iterator[Row]:
    """The ablation's rows."""
    artifact = subject.artifact
    grid, tables = budget_tables(artifact)
    importance = {
        n: torch.from_numpy(g.importance.astype(np.float32)) for n, g in artifact.groups.items() if n != "embed"
    }

    def network(o: IpnOptions) -> Ipn:
        assert o.features is not None
        return Ipn(importance, grid, tables, o.features, o.seed, o.parts, *o.bits)

    bench = Bench(subject, GradedModel(artifact, subject.dense))
    side = {n: g.side_bits for n, g in bench.model.groups.items()}
    seen = None
    wanted = variants(options.ablation_steps, options.ablation_windows, options.seed)
    if options.quick:
        others = ("features", *(f"{n} centroids, nothing learned" for n in OTHER_CENTROIDS))
        wanted = {name: o for name, o in wanted.items() if not name.endswith(others)}
    for name, o in [
        ("untrained (channel-norm)", IpnOptions(steps=0, parts=("theta",), features=FEATURES, centroids=0)),
        *wanted.items(),
    ]:

        def found(name: str = name, o: IpnOptions = o) -> list[Row]:
            nonlocal seen
            common.note(f"ablation: {name}")
            ipn = network(o)
            assert o.centroids is not None
            bench.take_clusters(ipn, o.centroids)
            for group, bits in side.items():
                bench.model.groups[group].side_bits = bits + ipn.side_bits(group)
            learner = Learner(bench.model, ipn, subject.calibration, o)
            if o.centroids:
                set_level(bench.model, ipn, subject.calibration)
            if ipn.features:
                seen = seen or sensitivities(bench.model, subject.calibration[: -learner.held], o.seed)
                fit_probes(ipn, seen, seed=o.seed)
            optimiser = learner.optimiser()
            tokens = sum(int(learner.step(n, optimiser)["tokens"]) for n in range(o.steps))
            out = [_row(bench, ipn, name, bits, tokens, o.seed) for bits in budgets(options.bits)]
            return out + (list(_reuse(bench, ipn, budgets(options.bits), tokens, o)) if name == "all (ipn)" else [])

        yield from subject.once(f"ablation {name} {o}", found)


def _row(bench: Bench, ipn: Ipn, name: str, bits: float, tokens: int, seed: int) -> Row:
    read, kl, seen = bench.measure(ipn, bits)
    found = _base(bench, name, bits, read, kl, tokens, seed)
    return found | {"overlap": bench.overlap(ipn, bits, seen[0].shift)}


def _reuse(bench: Bench, ipn: Ipn, wanted: list[float], tokens: int, o: IpnOptions) -> Iterator[Row]:
    """Masks shared by consecutive tokens, and taken from a cache, with the network that has all ingredients."""
    bits = wanted[len(wanted) // 2]
    window = bench.subject.ids.shape[1]
    for chunk in CHUNKS:
        if window % chunk:
            continue

        def share(ipn: Ipn, bits: float, shift: float, chunk: int = chunk) -> At:
            return Shared(ipn, bits, shift, chunk)

        read, kl, _ = bench.measure(ipn, bits, share)
        yield _base(bench, f"masks shared by {chunk} tokens", bits, read, kl, tokens, o.seed)
    for drift in DRIFTS:

        def cache(ipn: Ipn, bits: float, shift: float, drift: float = drift) -> At:
            return Cached(ipn, bits, shift, drift, window)

        read, kl, seen = bench.measure(ipn, bits, cache)
        hits = sum(at.hits for at in seen if isinstance(at, Cached)) / sum(
            at.asked for at in seen if isinstance(at, Cached)
        )
        row = _base(bench, f"mask cache, cosine {drift:g}", bits, read, kl, tokens, o.seed)
        yield row | {"hits": hits}


def _base(bench: Bench, name: str, bits: float, read: float, kl: float, tokens: int, seed: int) -> dict[str, Any]:
    return {
        "model": bench.subject.label,
        "rule": name,
        "bits": bits,
        "bits_read_body": read,
        "bits_read_total": None,
        "kl": kl,
        "ppl": None,
        "trained_tokens": tokens,
        "seed": seed,
    }


def table(found: list[Row]) -> str:
    """For people."""
    lines = [
        (
            r["rule"],
            f"{r['bits']:g}",
            f"{r['bits_read_body']:.3f}",
            f"{r['kl']:.4f}",
            f"{r['overlap']:.3f}" if "overlap" in r else "",
            f"{r['hits']:.3f}" if "hits" in r else "",
        )
        for r in found
    ]
    return common.markdown(COLUMNS, lines)
