"""Section `hierarchy` of dynamic.py: nested masks, masks shared by neighbouring layers, a check that mends the cache.

Every configuration (lowtide.eval.rivals.hierarchy) starts from the scores of a stored policy, `ipn` and `channel-norm`
if there. Shares of coarse parts to close are tuned on calibration text, the offset is set on the windows judged, as for
the rivals. `scores` and `decisions` are what a token's masks took, in thousands: importances times inputs, comparisons.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from typing import Any

import common
from dynamic_common import Row, Subject, budgets

from lowtide.eval.rivals import (
    HIERARCHIES,
    Calibration,
    CheckedModel,
    Figures,
    HierarchyPlan,
    OutOfReach,
    RivalModel,
    Tuner,
    measure,
    settle,
)
from lowtide.eval.rivals.measure import WORST

NAME = "hierarchy"
SCORES = ("ipn", "channel-norm")
FLAT = "channel (flat)"
CHECKS = "16,32,64"
QUICK = (FLAT, "layer > channel", "neuron > channel")
FREE = "check every token, bits not counted"
COLUMNS = ("rule", "bits", "read", "KL", "to flat", "perplexity", "scores", "decisions", "closed", "naive", "setting")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this section."""
    parser.add_argument("--hierarchies", default=";".join(HIERARCHIES), help="configurations, separated by semicolons")
    parser.add_argument("--scores", default=",".join(SCORES), help="stored policies they start from, if stored")
    parser.add_argument("--checks", default=CHECKS, help="tokens between two checks of the cache; empty for none")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what this section does not know; --quick leaves most of it out."""
    for option, known in (("hierarchies", HIERARCHIES), ("scores", SCORES)):
        wanted = getattr(options, option).split(";" if option == "hierarchies" else ",")
        unknown = [name for name in wanted if name and name not in known]
        if unknown:
            parser.error(f"--{option}: no {unknown[0]!r}; known are {'; '.join(known)}")
    parts = [part for part in options.checks.split(",") if part]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        parser.error(f"--checks {options.checks}: numbers of tokens, separated by commas")
    if options.quick and options.checks == CHECKS:
        options.checks = "32"
    if options.quick and options.hierarchies == ";".join(HIERARCHIES):
        options.hierarchies = ";".join(QUICK)


def rows(options: argparse.Namespace, subject: Subject) -> Iterator[Row]:
    """All configurations, then the checks, for every policy."""
    bench: list[Any] = []
    stored, has = subject.artifact.manifest.policies, subject.artifact.manifest.ipn
    if has is not None and (has["centroids"] or has["factors"]) and options.scores == ",".join(SCORES):
        stored = [policy for policy in stored if policy != "ipn"]  # nested masks know one mean and one mask only
    checks = [int(part) for part in options.checks.split(",") if part]
    for policy in (p for p in options.scores.split(",") if p in stored):
        names = [*filter(None, options.hierarchies.split(";")), *(f"check every {n} tokens" for n in checks)]
        for name in [*names, *([FREE] if checks else [])]:
            for bits in budgets(options.bits):

                def run(policy: str = policy, name: str = name, bits: float = bits) -> list[Row]:
                    if not bench:
                        model = RivalModel(subject.artifact)
                        made = Calibration(subject.artifact, model, subject.dense, subject.calibration, options.seed)
                        bench.extend((made, Tuner(made)))
                    return _measured(options, subject, bench[0], bench[1], policy, name, bits)

                yield from subject.once(f"{NAME}|{policy}|{name}|{bits:g}|{options.seed}", run)


def _measured(
    options: argparse.Namespace,
    subject: Subject,
    calibration: Calibration,
    tuner: Tuner,
    policy: str,
    name: str,
    bits: float,
) -> list[Row]:
    began = time.monotonic()
    try:
        if name in HIERARCHIES:
            fitted = HIERARCHIES[name].fit(calibration, policy)
            plan, setting = tuner.tune(fitted, bits) if fitted.tried else (fitted.plan(bits), {})
            assert isinstance(plan, HierarchyPlan)
            found, extra = _judged(subject, calibration, plan, bits), {"setting": _words(setting)}
        else:
            found, plan, extra = _checked(subject, calibration, policy, name, bits)
    except OutOfReach as error:
        common.note(f"{policy}, {name}: left out, {error}")
        return []
    seconds = time.monotonic() - began
    common.note(f"{policy}, {name}, {bits:g} bits: KL {found.kl:.4f}, {seconds:.0f} s")
    learned = subject.artifact.manifest.stats.get("learned") or {}
    trained = int(learned.get("trained_tokens", 0)) if policy == "ipn" or learned.get("joint") else 0
    about = {"section": NAME, "model": subject.label, "rule": name, "scores_of": policy, "bits": bits}
    row = about | vars(found) | {"trained_tokens": trained, "seed": options.seed} | _cost(calibration.model, plan)
    return [row | extra | {"seconds": round(seconds, 1)}]


def _judged(subject: Subject, calibration: Calibration, plan: HierarchyPlan, bits: float) -> Figures:
    settle(calibration.model, plan, subject.ids[:2], bits, WORST)  # saves passes over all windows
    plan.costs.clear()
    return measure(calibration.model, plan, subject.ids, bits, calibration.params(bits)["head"], subject.reference)


def _checked(
    subject: Subject, calibration: Calibration, policy: str, name: str, bits: float
) -> tuple[Figures, HierarchyPlan, dict[str, Any]]:
    """The flat rule with what the check leaves of the budget."""
    every = 1 if name == FREE else int(name.split()[2])
    model = CheckedModel(calibration.model, every, free=name == FREE)
    checked = copy.copy(calibration)
    checked.model = model
    plan = HIERARCHIES[FLAT].fit(checked, policy).plan(bits - model.batch_bits)
    found = _judged(subject, checked, plan, bits)
    naive = found.bits_read_body - model.batch_bits + model.naive_bits
    return found, plan, {"setting": f"check {model.batch_bits:.3f} bits", "bits_naive_body": naive}


def _cost(model: RivalModel, plan: HierarchyPlan) -> dict[str, float]:
    """Of one token: scores and comparisons; share of the groups left out."""
    cost = plan.costs[plan.offset]
    per = 1 / max(cost.tokens, 1)
    closed = cost.closed * per / len(model.body)
    return {"scores_computed": cost.scores * per, "decisions": cost.decisions * per, "closed": closed}


def _words(setting: dict[str, Any]) -> str:
    return ", ".join(f"{knob} {value:g}" for knob, value in setting.items())


def table(found: list[Row]) -> str:
    """For each policy KL by rule and budget, then all figures."""
    parts = []
    for policy in dict.fromkeys(r["scores_of"] for r in found):
        mine = [r for r in found if r["scores_of"] == policy]
        bits = sorted({r["bits"] for r in mine})
        kl = {(r["rule"], r["bits"]): r["kl"] for r in mine}
        names = dict.fromkeys(r["rule"] for r in mine)
        short = [(n, *(f"{kl[n, b]:.4f}" if (n, b) in kl else None for b in bits)) for n in names]
        parts.append(f"Scores of `{policy}`:\n")
        parts.append(common.markdown(("KL at bits read", *(f"{b:g}" for b in bits)), short) + "\n")
        lines = [_line(r, kl.get((FLAT, r["bits"]))) for r in mine]
        parts.append(common.markdown(COLUMNS, lines) + "\n")
    return "\n".join(parts).rstrip()


def _line(row: Row, flat: float | None) -> tuple[Any, ...]:
    return (
        row["rule"],
        f"{row['bits']:g}",
        f"{row['bits_read_body']:.3f}",
        f"{row['kl']:.4f}",
        None if flat is None else f"{row['kl'] / flat:.3f}",
        f"{row['ppl']:.3f}",
        f"{row['scores_computed'] / 1000:.2f}",
        f"{row['decisions'] / 1000:.2f}",
        f"{row['closed']:.3f}",
        f"{row['bits_naive_body']:.2f}" if "bits_naive_body" in row else None,
        row["setting"],
    )
