"""Section `rivals` of dynamic.py: rules of other papers and every policy the artifact stores, at equal bytes.

Rivals (lowtide.eval.rivals) are tuned on the calibration text and run in torch, every token of every window masked;
their offset is set on the windows judged so that the mean bits are the budget within 1 %, which the stored policies'
controller does as it goes: those run in the engine. Bits count digits and side data: norms, factors, predictors.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import common
from dynamic_common import Row, Subject, budgets

import lowtide
from lowtide.eval.rivals import RIVALS, Calibration, Fitted, OutOfReach, RivalModel, Tuner, measure

NAME = "rivals"
COLUMNS = ("rule", "where", "bits", "read, body", "read, total", "KL", "perplexity", "trained tokens", "setting")
RIVAL, STORED = "torch", "engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this section."""
    parser.add_argument("--rules", default=";".join(RIVALS), help="rivals to measure, separated by semicolons")
    parser.add_argument("--no-policies", action="store_true", help="leave out the policies the artifact stores")
    parser.add_argument("--engine", default="native", choices=("native", "reference"), help="of the stored policies")
    parser.add_argument("--threads", type=int, help="of the native engine")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what this section does not know."""
    unknown = [rule for rule in options.rules.split(";") if rule and rule not in RIVALS]
    if unknown:
        parser.error(f"--rules: no {unknown[0]!r}; known are {'; '.join(RIVALS)}")


def rows(options: argparse.Namespace, subject: Subject) -> Iterator[Row]:
    """The stored policies first, then every rival at every budget."""
    if not options.no_policies:
        yield from _stored(options, subject)
    bench: list[Any] = []  # model and tuner, made when the first rival is not known yet
    for name in filter(None, options.rules.split(";")):

        def fit(name: str = name) -> list[Row]:
            if not bench:
                model = RivalModel(subject.artifact)
                calibration = Calibration(subject.artifact, model, subject.dense, subject.calibration, options.seed)
                bench.extend((calibration, Tuner(calibration)))
            return list(_rival(options, subject, bench[0], bench[1], name))

        key = f"{NAME}|{name}|{options.bits}|{options.seed}"
        yield from subject.once(key, fit)


def _rival(
    options: argparse.Namespace, subject: Subject, calibration: Calibration, tuner: Tuner, name: str
) -> Iterator[Row]:
    common.note(f"{name}: fitting")
    rival, began = RIVALS[name], time.monotonic()
    fitted: Fitted | None = None
    for bits in budgets(options.bits):
        try:
            fitted = fitted or rival.fit(calibration)
            plan, setting = tuner.tune(fitted, bits)
            head = calibration.params(bits)["head"]
            found = measure(calibration.model, plan, subject.ids, bits, head, subject.reference)
        except OutOfReach as error:
            common.note(f"{name}: left out, {error}")
            continue
        seconds, began = time.monotonic() - began, time.monotonic()
        common.note(f"{name}, {bits:g} bits: KL {found.kl:.4f}, {seconds:.0f} s")
        about = {"setting": _words(setting), "where": RIVAL, "source": rival.source, "seconds": round(seconds, 1)}
        yield _row(subject, options, name, bits, vars(found), fitted.trained_tokens) | about


def _words(setting: dict[str, Any]) -> str:
    """A setting for people; levels are in slices of 2 bits."""
    words = []
    for knob, value in setting.items():
        if knob == "top":
            words.append(f"0 or {2 * value} bits")
        elif knob == "fixed":
            words.append(f"0 or {2 * value.top} bits, unmasked {2 * value.rest} bits")
        else:
            words.append(f"{knob} {value:g}")
    return ", ".join(words)


def _stored(options: argparse.Namespace, subject: Subject) -> Iterator[Row]:
    """Every policy of the artifact, in the engine."""
    for policy in subject.artifact.manifest.policies:
        key = f"{NAME}|stored {policy}|{options.bits}|{options.engine}"

        def run(policy: str = policy) -> list[Row]:
            return list(_policy(options, subject, policy))

        yield from subject.once(key, run)


def _policy(options: argparse.Namespace, subject: Subject, policy: str) -> Iterator[Row]:
    common.note(f"stored policy {policy}")
    result = lowtide.evaluate(
        subject.artifact,
        subject.source,
        subject.ids.numpy().astype("int32"),
        windows=len(subject.ids),
        window=subject.ids.shape[1],
        bits=budgets(options.bits),
        policy=policy,
        engine=options.engine,
        threads=options.threads,
    )
    learned = subject.artifact.manifest.stats.get("learned") or {}
    trained = int(learned.get("trained_tokens", 0)) if policy.startswith("ipn") or learned.get("joint") else 0
    for point in result["points"]:
        yield _row(subject, options, policy, point["bits"], point, trained) | {"setting": "", "where": STORED}


def _row(
    subject: Subject, options: argparse.Namespace, rule: str, bits: float, figures: dict[str, Any], trained: int
) -> Row:
    measured = {name: figures[name] for name in ("bits_read_body", "bits_read_total", "kl", "ppl")}
    about = {"section": NAME, "model": subject.label, "rule": rule, "bits": bits}
    return about | measured | {"trained_tokens": trained, "seed": options.seed}


def table(found: list[Row]) -> str:
    """KL by rule and budget, best first at the middle budget, then all figures."""
    kl = {(r["rule"], r["where"], r["bits"]): r["kl"] for r in found}
    bits = sorted({r["bits"] for r in found})
    names = list(dict.fromkeys((r["rule"], r["where"]) for r in found))
    middle = bits[len(bits) // 2] if bits else 0.0
    names.sort(key=lambda name: kl.get((*name, middle), float("inf")))
    short = [
        (rule, where, *(f"{kl[rule, where, b]:.4f}" if (rule, where, b) in kl else None for b in bits))
        for rule, where in names
    ]
    first = common.markdown(("KL at bits read", "where", *(f"{b:g}" for b in bits)), short)
    lines = [
        (
            r["rule"],
            r["where"],
            f"{r['bits']:g}",
            f"{r['bits_read_body']:.3f}",
            f"{r['bits_read_total']:.3f}",
            f"{r['kl']:.4f}",
            f"{r['ppl']:.3f}",
            r["trained_tokens"],
            r["setting"],
        )
        for r in found
    ]
    return f"{first}\n\n{common.markdown(COLUMNS, lines)}"
