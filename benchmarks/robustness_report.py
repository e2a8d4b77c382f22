"""Figures, paired tests and the verdict of benchmarks/robustness.py from the records of its windows.

A record is one candidate on one window under one perturbation: `artifact`, `rule`, `target` (the budget), `window`,
`perturbation` ("none" for clean input), `strength`, `seed`, `bits`, `kl`, `kl_self`, `nll` (nats, sum over `targets`),
`targets`, `words`, `characters`, `tokens`. `nll_soft` and `kl_self_soft` are those of the dense model softened by
`temperature`; on clean input the dense model's record has the losses at all temperatures (`curve`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import common
import numpy as np
import torch
from numpy.typing import NDArray

Record = dict[str, Any]
Windows = NDArray[np.float64]

ALIGNED = ("embedding noise", "HotFlip")
"""Perturbations that leave every token at its position."""
MIN_WINDOWS = 6
"""With fewer, not even a difference of one sign in all windows is significant at 5 % (2 / 2^5)."""
RESAMPLES = 10_000
COLUMNS = (
    "candidate",
    "perturbation",
    "strength",
    "read, body",
    "KL to dense",
    "spread",
    "x clean",
    "perplexity",
    "ratio, token",
    "ratio, word",
    "ratio, character",
    "KL to itself",
    "spread",
)
TESTS = {
    "loses": "loses more",
    "loses_soft": "than softened",
    "moves": "moves more",
    "moves_soft": "than softened",
    "drifts": "KL grows",
}
"""The paired tests and the columns they stand in."""


def compare(seen: Any, logp: torch.Tensor, dense: torch.Tensor, own: torch.Tensor | None) -> dict[str, Any]:
    """Figures of a window's log-probabilities f32 [N, V].

    seen: its robustness.Input. dense: the dense model's on the same input. own: the same model's on clean input, None
    where positions do not align.
    """
    return {
        "kl": kl(dense, logp),
        "kl_self": None if own is None else kl(own, logp),
        "nll": nll(seen, logp),
        "targets": len(seen.targets) - 1,
        "words": seen.words,
        "characters": seen.characters,
        "tokens": len(seen.ids),
    }


def nll(seen: Any, logp: torch.Tensor) -> float:
    """Negative log-likelihood of a window's following tokens, summed, nats."""
    return -float(logp[:-1].gather(1, seen.targets[1:, None]).double().sum())


def softened(logp: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities f32 [N, V] at a temperature."""
    return torch.log_softmax(logp / temperature, -1)


def kl(reference: torch.Tensor, ours: torch.Tensor) -> float:
    """Mean KL(reference || ours) in nats per token of log-probabilities f32 [N, V]."""
    mean = float((reference.exp() * (reference - ours)).sum(-1).double().mean())
    return max(mean, 0.0)  # of a model with itself float32 leaves some -1e-9


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each candidate, perturbation, strength and seed: means over windows weighted by tokens."""
    out = []
    for candidate, mine in grouped(records, candidate_of).items():
        clean = {r["window"]: r for r in mine if r["perturbation"] == "none"}
        for (kind, strength, seed), cell in grouped(
            mine, lambda r: (r["perturbation"], r["strength"], r["seed"])
        ).items():
            before = [clean[r["window"]] for r in cell]
            artifact, rule, target = candidate
            row = {"artifact": artifact, "rule": rule, "bits": target}
            row |= {"bits_read_body": mean(cell, "bits"), "perturbation": kind, "strength": strength, "seed": seed}
            row |= {"kl": mean(cell, "kl"), "kl_clean": mean(before, "kl"), "kl_self": mean(cell, "kl_self")}
            row |= {"ppl": perplexity(cell, "targets"), "ppl_clean": perplexity(before, "targets")}
            aligned = kind in ALIGNED or kind == "none"
            row["ppl_ratio"] = row["ppl"] / row["ppl_clean"] if aligned else None
            for unit, name in (("words", "ppl_ratio_word"), ("characters", "ppl_ratio_char")):
                row[name] = None if aligned else perplexity(cell, unit) / perplexity(before, unit)
            out.append(row)
    return out


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """The records by key, in the order of their first."""
    out: dict[Any, list[Record]] = {}
    for record in records:
        out.setdefault(key(record), []).append(record)
    return out


def candidate_of(record: Record) -> tuple[str, str, Any]:
    """(artifact, rule, budget); the dense model has neither artifact nor budget."""
    return record["artifact"], record["rule"], record["target"]


def mean(cell: Sequence[Record], field: str) -> float | None:
    """Mean over all tokens of the windows; None where it is not measured."""
    if any(r[field] is None for r in cell):
        return None
    return sum(r[field] * r["tokens"] for r in cell) / sum(r["tokens"] for r in cell)


def perplexity(cell: Sequence[Record], unit: str) -> float:
    """exp of the loss per token ("targets"), word or character."""
    return float(np.exp(min(sum(r["nll"] for r in cell) / sum(r[unit] for r in cell), 700.0)))


def loss(record: Record, clean: Record) -> float:
    """Nats per token of the window's clean text; words say how much of it the perturbed one covers."""
    if record["perturbation"] in ALIGNED or record["perturbation"] == "none":
        return record["nll"] / record["targets"]
    return record["nll"] / max(record["words"], 1) * clean["words"] / clean["targets"]


def softening(mine: Sequence[Record], dense: Sequence[Record]) -> int:
    """Index of the temperature at which the dense model's clean loss is nearest to a candidate's, from its best on."""
    curve = np.sum([r["curve"] for r in dense], axis=0)
    best = int(curve.argmin())
    return best + int(np.abs(curve[best:] - sum(r["nll"] for r in mine)).argmin())


def verdicts(records: Sequence[Record], temperatures: Sequence[float]) -> list[dict[str, Any]]:
    """Every candidate against the dense model, for each perturbation and for "all" of them (kinds weigh the same).

    Each has "artifact", "rule", "bits", "perturbation", "windows", "seeds", "temperature", "kl_clean", "verdict", and
    of differences paired by window (seeds and strengths averaged before) {"mean", "low", "high", "p"}, 95 % intervals:

    loses: rise of the loss over the candidate's own on clean input less the dense model's rise, nats per token of
        clean text. loses_soft: less the softened dense model's.
    moves: KL(clean || perturbed) of the candidate with itself less the dense model's; moves_soft: the softened one's.
    drifts: rise of its KL to the dense model over that on clean input.

    "behind" is its mean loss on perturbed input less the dense model's.
    """
    by_candidate = grouped(records, candidate_of)
    dense = by_candidate.pop(next(key for key in by_candidate if key[2] is None))
    seeds = len({r["seed"] for r in dense if r["perturbation"] != "none"})
    out = []
    for (artifact, rule, target), mine in by_candidate.items():
        kinds = [k for k in dict.fromkeys(r["perturbation"] for r in mine) if k != "none"]
        soft = list(temperatures).index(mine[0]["temperature"])
        found = {kind: differences(mine, dense, kind, soft) for kind in kinds}
        if len(kinds) > 1:
            names = dict.fromkeys(name for f in found.values() for name in f)
            found["all"] = {n: np.mean([f[n] for f in found.values() if n in f], axis=0) for n in names}
        for kind, series in found.items():
            verdict: dict[str, Any] = {"artifact": artifact, "rule": rule, "bits": target, "perturbation": kind}
            verdict |= {"windows": len(series["loses"]), "seeds": seeds, "temperature": temperatures[soft]}
            verdict |= {name: paired(series[name]) if name in series else None for name in TESTS}
            verdict["behind"] = float(series["behind"].mean())
            verdict["kl_clean"] = mean([r for r in mine if r["perturbation"] == "none"], "kl")
            out.append(verdict | {"verdict": judge(verdict)})
    return out


def differences(mine: Sequence[Record], dense: Sequence[Record], kind: str, soft: int) -> dict[str, Windows]:
    """What `verdicts` tests under one perturbation, one number for each window; soft: index of the temperature."""
    found: list[dict[str, float]] = []
    theirs = grouped(dense, lambda r: r["window"])
    for window, ours in grouped(mine, lambda r: r["window"]).items():
        clean, plain = (next(r for r in part if r["perturbation"] == "none") for part in (ours, theirs[window]))
        cell, reference = ([r for r in part if r["perturbation"] == kind] for part in (ours, theirs[window]))
        lost, lost_dense = (statistics.fmean(loss(r, plain) for r in part) for part in (cell, reference))
        lost_soft = statistics.fmean(loss(r | {"nll": r["nll_soft"]}, plain) for r in cell)
        clean_soft = plain["curve"][soft] / plain["targets"]
        rise = lost - loss(clean, plain)
        one = {
            "behind": lost - lost_dense,
            "loses": rise - (lost_dense - loss(plain, plain)),
            "loses_soft": rise - (lost_soft - clean_soft),
            "drifts": statistics.fmean(r["kl"] for r in cell) - clean["kl"],
        }
        if kind in ALIGNED:
            moved = statistics.fmean(r["kl_self"] for r in cell)
            one["moves"] = moved - statistics.fmean(r["kl_self"] for r in reference)
            one["moves_soft"] = moved - statistics.fmean(r["kl_self_soft"] for r in cell)
        found.append(one)
    return {name: np.array([one[name] for one in found]) for name in found[0]}


def paired(difference: Windows) -> dict[str, float]:
    """Mean of paired differences [windows], its 95 % interval and two-sided p by a bootstrap over windows."""
    draws = np.random.default_rng(0).integers(0, len(difference), (RESAMPLES, len(difference)))
    means = difference[draws].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    p = min(2 * min(float((means <= 0).mean()), float((means >= 0).mean())), 1.0)
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high), "p": p}


def judge(verdict: dict[str, Any]) -> str:
    """The verdict on a candidate, one of VERDICTS' keys.

    Loss and movement are judged apart: worse if the interval of the difference to the dense model is wholly above 0;
    better if it is wholly below 0 and that to the softened dense model is, too; if the latter is not, less sure. Worse
    in one and better in the other is mixed; otherwise worse, better, less sure decide, in this order.
    """
    if verdict["windows"] < MIN_WINDOWS:
        return "too few windows"
    found = {_side(verdict[name], verdict[f"{name}_soft"]) for name in ("loses", "moves") if verdict[name]}
    if {"less robust", "more robust"} <= found:
        return "mixed"
    return next((word for word in ("less robust", "more robust", "less sure") if word in found), "equal")


def _side(plain: dict[str, float], soft: dict[str, float]) -> str:
    if plain["low"] > 0:
        return "less robust"
    if plain["high"] < 0:
        return "more robust" if soft["high"] < 0 else "less sure"
    return "equal"


VERDICTS = {
    "more robust": "more robust than the dense model",
    "less robust": "less robust than the dense model",
    "equal": "as robust as the dense model, as far as so few windows show",
    "mixed": "more robust than the dense model in one respect, less in the other",
    "less sure": "no more robust than a dense model that is as unsure: what it gains, softening the dense model gains",
    "too few windows": f"no verdict, that takes {MIN_WINDOWS} windows",
}


def sentence(verdict: dict[str, Any]) -> str:
    """The verdict on a candidate in words."""
    text = f"{name_of(verdict)}: {VERDICTS[verdict['verdict']]}. "
    text += f"Perturbation costs it {_versus(verdict['loses'])} nats per token than the dense model, and "
    text += f"{_versus(verdict['loses_soft'])} than the dense model softened to the same clean loss "
    text += f"(temperature {verdict['temperature']:g})"
    if verdict["moves"]:
        text += f"; its own output moves {_versus(verdict['moves'])} nats than the dense model's"
        text += f", {_versus(verdict['moves_soft'])} than the softened one's"
    drifts = verdict["drifts"]
    text += f". Its KL to the dense model, {verdict['kl_clean']:.4f} on clean input, "
    text += f"{'grows' if drifts['mean'] >= 0 else 'shrinks'} by {abs(drifts['mean']):.4f} ({_interval(drifts)}). "
    place = "behind" if verdict["behind"] >= 0 else "ahead of"
    text += f"On perturbed input its loss is {abs(verdict['behind']):.4f} nats per token {place} the dense model's"
    return text + f" ({verdict['windows']} windows, seeds: {verdict['seeds']})."


def _versus(test: dict[str, float]) -> str:
    return f"{abs(test['mean']):.4f} ({_interval(test)}) {'more' if test['mean'] >= 0 else 'less'}"


def _interval(test: dict[str, float] | None) -> str:
    return "" if test is None else f"{test['low']:+.4f} to {test['high']:+.4f}"


def name_of(row: dict[str, Any]) -> str:
    """A candidate's name for people."""
    if row["bits"] is None:
        return "dense model"
    budget = "full read" if row["bits"] == "dense" else f"{row['bits']:g} bits"
    return f"{row['artifact']} {row['rule']}, {budget}"


def page(result: dict[str, Any]) -> str:
    """The verdict, its tests, and the means over seeds with their standard deviation, for people."""
    tests = []
    for v in result["verdicts"]:
        cells = [name_of(v), v["perturbation"]]
        for name in TESTS:
            cells += [None if v[name] is None else f"{v[name]['mean']:+.4f}", _interval(v[name])]
        tests.append([*cells, v["verdict"]])
    columns = ["candidate", "perturbation", *(c for name in TESTS.values() for c in (name, "95 %")), "verdict"]
    key = lambda r: (name_of(r), r["perturbation"], r["strength"])  # noqa: E731
    lines = [_line(k, cell) for k, cell in grouped(result["rows"], key).items()]
    parts = ["\n".join(f"- {text}" for text in result["verdict"]), common.markdown(columns, tests)]
    return "\n\n".join([*parts, common.markdown(COLUMNS, lines)])


def _line(key: tuple[str, str, float], cell: Sequence[dict[str, Any]]) -> list[Any]:
    def average(field: str, digits: int) -> str | None:
        values = [r[field] for r in cell]
        return None if None in values else f"{statistics.fmean(values):.{digits}f}"

    def spread(field: str) -> str | None:
        values = [r[field] for r in cell]
        return None if len(values) < 2 or None in values else f"{statistics.stdev(values):.4f}"

    clean = cell[0]["kl_clean"]
    growth = f"{statistics.fmean(r['kl'] for r in cell) / clean:.2f}" if clean > 1e-6 else None
    ratios = [average(f, 3) for f in ("ppl_ratio", "ppl_ratio_word", "ppl_ratio_char")]
    return [
        key[0],
        key[1],
        f"{key[2]:g}",
        average("bits_read_body", 3),
        average("kl", 4),
        spread("kl"),
        growth,
        average("ppl", 3),
        *ratios,
        average("kl_self", 4),
        spread("kl_self"),
    ]
