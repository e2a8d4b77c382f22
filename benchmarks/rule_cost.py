#!/usr/bin/env python3
"""What deciding costs: the share of decode time that goes into scores, masks and the importance network's probes.

    python benchmarks/rule_cost.py smollm2.lowtide --policy channel-norm,ipn --bits 2.5,3,3.5 --isa avx512,avx2

The engine decides and multiplies in turns, some hundred times a token and for about a microsecond each: too short to
put a clock around, and without its masks a token would read something else, so there is nothing to compare it with
either. So it is watched while it decodes: Linux's `perf` interrupts the process some thousand times a second and notes
the function it is in. The functions of the engine are separate symbols, hence shares of the decode as it is, caches
cold or warm as they are. One thread; every case decodes the same text under its own budget controller; cases take turns
and shares are medians over the rounds, with the lowest and the highest beside them.

scores, masks: thresholds, scores, comparing, lists of what is read, which rows of the head lead, and the coefficients:
the inputs in 8 bits, which a product without masks would need as well, but which the compiler merges with the rest.
copies: libc's copying and filling, all of it, because those lists use it. network: probes, waterlines and keys of the
rule `ipn`. Their sum is the share. addresses, on top: the lists turned into addresses of weights, asking memory for the
first of them ahead, and the loop over tiles.
Microseconds are the thread's processor time, so other programs on the machine stretch them less than a clock's. Needs
`perf` and a library with its symbols (CMake's own build has them; a wheel's may be stripped).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

from lowtide.errors import LowtideError
from lowtide.kernels.library import library
from lowtide.runtime.budget import BudgetController
from lowtide.runtime.model import Model, load

TEXT = Path(__file__).parents[1] / "examples" / "harbour.txt"
LISTS = "list_channels|append|append_half|finish_list|make_classes|range_of|emit|emit_rests?|to_bytes|largest"
MASKS = f"select|choose|thresholds_of|scores|leading|refine|largest_of|{LISTS}"
PARTS = {
    "masks": re.compile(rf"lowtide.*::({MASKS})\b"),
    "copies": re.compile(r"\W*_*mem(move|cpy|set)"),
    "network": re.compile(r"lowtide.*::(probe\w*|waterline|locate|code|fits)\b"),
    "addresses": re.compile(r"lowtide.*::(offsets|ask|Engine::product|Engine::guess|Passes::next)\b"),
}
SHARE = ("masks", "copies", "network")
COLUMNS = ("rule", "isa", "bits", "read", "scores, masks", "copies", "network", "share", "rounds", "addresses", "token")
NEED = "install it (package linux-perf or linux-tools), and allow it: kernel.perf_event_paranoid must be 2 or less"


@dataclass
class Case:
    """One rule at one budget on one instruction set, and what was seen of it, one entry for each round."""

    policy: str
    bits: float
    model: Model
    controller: BudgetController
    parts: list[dict[str, float]] = field(default_factory=list)
    token_us: list[float] = field(default_factory=list)
    samples: int = 0

    def row(self) -> dict[str, Any]:
        """Medians over the rounds: shares of 1, microseconds of a token."""
        whole = [sum(parts[name] for name in SHARE) for parts in self.parts]
        share, token = statistics.median(whole), statistics.median(self.token_us)
        about = {"policy": self.policy, "isa": self.model.engine.isa, "bits": self.bits}
        about |= {"bits_read_body": self.controller.mean_bits}
        about |= {name: statistics.median(parts[name] for parts in self.parts) for name in PARTS}
        about |= {"share": share, "share_low": min(whole), "share_high": max(whole)}
        return about | {"token_us": token, "rule_us": share * token, "rounds": len(whole), "samples": self.samples}


def shares(listing: str) -> tuple[dict[str, float], int]:
    """Shares of the parts in a listing of `perf report`, one line `period;samples;symbol` for each function.

    Returns:
        part -> share of all periods, and the number of samples.

    Raises:
        LowtideError: nothing was sampled, or nothing in the function that makes masks.
    """
    total, samples, found = 0, 0, dict.fromkeys(PARTS, 0)
    for line in listing.splitlines():
        fields = [part.strip() for part in line.split(";", 2)]
        if len(fields) != 3 or not (fields[0].isdigit() and fields[1].isdigit()):
            continue
        period, symbol = int(fields[0]), fields[2].removeprefix("[.]").strip()
        total, samples = total + period, samples + int(fields[1])
        for name, pattern in PARTS.items():
            if pattern.match(symbol):
                found[name] += period
    if not total:
        raise LowtideError(f"perf saw nothing of this process: {NEED}")
    if not found["masks"]:
        raise LowtideError(
            "perf names no function of the engine: the native library is stripped; build it with cmake and name it in "
            "LOWTIDE_LIBRARY"
        )
    return {name: period / total for name, period in found.items()}, samples


@contextmanager
def watched(event: str, frequency: int, file: Path) -> Iterator[None]:
    """perf samples this process, inside of the `with` alone.

    Raises:
        LowtideError: perf is missing or refuses.
    """
    program = shutil.which("perf")
    if program is None:
        raise LowtideError(f"perf: not found; {NEED}")
    orders, ours = os.pipe()
    theirs, answers = os.pipe()
    options = ["record", "-q", "-e", event, "-F", str(frequency), "-p", str(os.getpid()), "-o", str(file), "-D", "-1"]
    perf = subprocess.Popen(
        [program, *options, f"--control=fd:{orders},{answers}"],
        pass_fds=(orders, answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(orders)
    os.close(answers)

    def order(word: str) -> None:
        try:
            os.write(ours, f"{word}\n".encode())
            answer = os.read(theirs, 16)
        except BrokenPipeError:
            answer = b""
        if not answer.startswith(b"ack"):
            said = (perf.communicate()[1] or "").strip().splitlines()
            raise LowtideError(f"perf: {said[-1] if said else 'ended at once'}; {NEED}")

    try:
        order("enable")
        yield
        order("disable")
        perf.send_signal(signal.SIGINT)
        perf.communicate(timeout=60)
    finally:
        if perf.poll() is None:
            perf.kill()
            perf.communicate()
        os.close(ours)
        os.close(theirs)


def listing(file: Path) -> str:
    """What perf found, by function."""
    columns = ["-F", "period,sample,sym", "-t", ";", "--stdio", "--no-children", "-q"]
    done = subprocess.run(["perf", "report", "-i", str(file), *columns], capture_output=True, text=True)
    if done.returncode:
        raise LowtideError(f"perf report: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}")
    return done.stdout


def decode(case: Case, ids: list[int], seconds: float) -> float:
    """The text once or more, until that much processor time has gone; microseconds of a token."""
    began, tokens = time.thread_time(), 0
    while not tokens or time.thread_time() - began < seconds:
        for place, token in enumerate(ids):
            _, read = case.model.engine.decode(token, place, case.controller.params)
            case.controller.update(read.body_bits)
        tokens += len(ids)
    return (time.thread_time() - began) / tokens * 1e6


def measure(cases: list[Case], ids: list[int], options: argparse.Namespace) -> None:
    """All rounds; cases take turns, every second round backwards."""
    for case in cases:
        decode(case, ids, 0.0)  # once, to warm up: the controller finds its offset
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "perf.data"
        for turn in range(options.rounds):
            for case in cases if turn % 2 == 0 else cases[::-1]:
                with watched(options.event, options.frequency, file):
                    case.token_us.append(decode(case, ids, options.seconds))
                parts, samples = shares(listing(file))
                case.parts.append(parts)
                case.samples += samples
            common.note(f"round {turn + 1} of {options.rounds}")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--policy", default="channel-norm", help="stored mask rules, separated by semicolons or commas")
    parser.add_argument("--bits", default="2.5,3,3.5", help="budgets in bits read per body weight")
    parser.add_argument("--isa", help="instruction sets; by default what LOWTIDE_ISA names, else the best")
    parser.add_argument("--text", type=Path, default=TEXT, help="text that is decoded, UTF-8")
    parser.add_argument("--tokens", type=int, default=128, help="of it, from its beginning")
    parser.add_argument("--seconds", type=float, default=1.0, help="processor time of a case in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--frequency", type=int, default=4000, help="samples per second")
    parser.add_argument("--event", default="cycles:u", help="perf's event; cpu-clock:u where there are no counters")
    parser.add_argument("--label", help="name of the results file; the artifact's by default")
    parser.add_argument("--quick", action="store_true", help="one round, a tenth of the time")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.seconds, options.tokens = 1, options.seconds / 10, min(options.tokens, 32)
    if options.rounds < 1 or options.tokens < 1:
        parser.error("--rounds and --tokens must be 1 or more")
    return options


def make_cases(options: argparse.Namespace) -> tuple[list[Case], list[int]]:
    """Every case, and the text's tokens."""
    cases = []
    for isa in options.isa.split(",") if options.isa else [None]:
        model = load(options.artifact, threads=1, isa=isa)
        for policy in re.split(r"[;,](?![0-9])", options.policy):
            for bits in (float(part) for part in options.bits.split(",")):
                cases.append(Case(policy, bits, model, model.controller(bits, policy)))
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LowtideError(f"{options.text}: {getattr(error, 'strerror', None) or 'is not UTF-8'}") from None
    ids = cases[0].model.tokenizer.encode(text)[: options.tokens]
    room = cases[0].model.engine.max_context
    if not len(ids) == options.tokens <= room:
        short = f"{options.text} has {len(ids)}, the context holds {room}"
        raise LowtideError(f"--tokens {options.tokens}: {short}; ask for less")
    return cases, ids


def table(rows: list[dict[str, Any]]) -> str:
    """For people: per cent of the time of a token."""
    lines = []
    for row in rows:
        spread = f"{100 * row['share_low']:.1f} to {100 * row['share_high']:.1f}"
        shown = [f"{100 * row[name]:.1f} %" for name in (*SHARE, "share")]
        more = [spread, f"{100 * row['addresses']:.1f} %", f"{row['rule_us']:.0f} of {row['token_us']:.0f} us"]
        about = [row["policy"], row["isa"], f"{row['bits']:g}", f"{row['bits_read_body']:.3f}"]
        lines.append([*about, *shown, *more])
    return common.markdown(COLUMNS, lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        cases, ids = make_cases(options)
        if b".symtab" not in Path(library()._name).read_bytes():
            common.note("the library has no symbols, so these shares are far too low; name CMake's in LOWTIDE_LIBRARY")
        measure(cases, ids, options)
    except LowtideError as error:
        print(f"rule_cost: error: {error}", file=sys.stderr)
        return 2
    rows = [case.row() for case in cases]
    about = {"model": options.label or options.artifact.name, "tokens": len(ids), "threads": 1, "event": options.event}
    name = f"rule-cost-{about['model']}" + ("-quick" if options.quick else "")
    path = common.save(name, common.report(about | {"rows": rows}), table(rows))
    print(json.dumps(rows, indent=2) if options.json else f"{table(rows)}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
