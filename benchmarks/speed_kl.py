"""What each point of `speed.py` costs in quality: KL from a result of `quality.py`, or measured here, and the budgets
at which lowtide is as good as a peer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import common
import peers

from lowtide.errors import LowtideError
from lowtide.format.reader import Artifact

STEP = 0.05
"""Budgets that are searched for are multiples of this."""

Bits = float | str
"""A budget, or "dense"."""


class FromFile:
    """KL of a model's points, out of a result of `quality.py`.

    Raises:
        LowtideError: it is no such file.
    """

    def __init__(self, path: str, policy: str) -> None:
        self._path = path
        self._method = f"lowtide {policy}"
        try:
            rows = json.loads(Path(path).read_bytes())["rows"]
            self._kl = {(r["method"], r["target"]): float(r["kl"]) for r in rows}
        except (OSError, ValueError, KeyError, TypeError):
            raise LowtideError(f"{path}: is no result of benchmarks/quality.py; give its JSON file") from None

    def lowtide(self, bits: Bits) -> float | None:
        """KL at a budget; None if it was not measured."""
        return self._kl.get((self._method, bits))

    def llama(self, kind: str) -> float | None:
        """KL of a llama.cpp type; None if it was not measured."""
        return self._kl.get((f"llama.cpp {kind}", None))

    def match(self, limit: float) -> float | None:
        """The lowest of the file's budgets with KL at most `limit`."""
        good = [t for (m, t), kl in self._kl.items() if m == self._method and isinstance(t, float) and kl <= limit]
        return min(good, default=None)


class Measured:
    """KL measured here: `lowtide.evaluate` and llama.cpp's logits on the same windows against the same F16 model.

    Args:
        artifact, gguf: the model, compressed and as F16.
        options: kl_text, windows, window, work, threads, policy, cache_bits, head, llama_python of `speed.py`.
        path_of: file of a llama.cpp type, made if needed.
    """

    def __init__(
        self, artifact: Artifact, gguf: Path, options: argparse.Namespace, path_of: Callable[[str], Path]
    ) -> None:
        import quality

        self._quality: Any = quality
        self._artifact, self._options, self._path_of = artifact, options, path_of
        self._subject = quality.make_subject(
            argparse.Namespace(
                model=str(gguf),
                text=options.kl_text,
                sampled=None,
                windows=options.windows,
                window=min(options.window, artifact.config.max_position),
                work=options.work,
            )
        )
        self._known: dict[Bits, float] = {}

    def lowtide(self, bits: Bits) -> float:
        """KL at a budget."""
        if bits not in self._known:
            import lowtide
            from lowtide.runtime.budget import parse_head

            common.note(f"KL at {bits} bits")
            evaluate: Any = lowtide.evaluate
            result = evaluate(
                self._artifact,
                self._subject.source,
                self._subject.ids,
                windows=len(self._subject.ids),
                window=self._subject.ids.shape[1],
                bits=[bits],
                policy=self._options.policy,
                threads=self._options.threads[-1],
                cache_bits=self._options.cache_bits,
                head=parse_head(self._options.head),
            )
            self._known[bits] = result["points"][0]["kl"]
        return self._known[bits]

    def llama(self, kind: str) -> float:
        """KL of a llama.cpp type."""
        common.note(f"KL of {kind}")
        with peers.Worker("llama", self._options.llama_python) as worker:
            threads = self._options.threads[-1]
            logits = self._quality.llama_logits(worker, self._path_of(kind), self._subject, threads)
            return float(self._subject.compare(logits)[0])

    def match(self, limit: float) -> float | None:
        """The lowest budget, a multiple of STEP, with KL at most `limit`."""
        grid = self._artifact.manifest.budgets
        return lowest_budget(self.lowtide, limit, grid[0], grid[-1])


def lowest_budget(kl_at: Callable[[float], float], limit: float, low: float, high: float) -> float | None:
    """Bisects for the lowest multiple of STEP in [low, high] with kl_at(bits) <= limit; KL falls with bits.

    None if even the highest is worse.
    """
    first, last = -int(-low / STEP // 1), int(high / STEP + 1e-9)
    if last < first or kl_at(round(last * STEP, 2)) > limit:
        return None
    while first < last:
        middle = (first + last) // 2
        if kl_at(round(middle * STEP, 2)) <= limit:
            last = middle
        else:
            first = middle + 1
    return round(last * STEP, 2)


def quality_of(
    source: FromFile | Measured | None, bits: Iterable[Bits], kinds: Iterable[str], match: bool
) -> tuple[list[Bits], dict[str, float | None]]:
    """Budgets (those given, and with `match` the one that is as good as each peer) and KL of each setting by label."""
    budgets = list(dict.fromkeys(bits))
    kl: dict[str, float | None] = {}
    for kind in dict.fromkeys(k.partition("+")[0] for k in kinds):
        kl[kind] = limit = source.llama(kind) if source else None
        if source and match and limit is not None:
            found = source.match(limit)
            if found is None:
                common.note(f"no budget is as good as {kind} (KL {limit:.4f})")
            elif found not in budgets:
                budgets.append(found)
    budgets.sort(key=lambda b: float("inf") if isinstance(b, str) else b)
    return budgets, kl | {label(b): source.lowtide(b) if source else None for b in budgets}


def label(bits: Bits) -> str:
    """A budget as the name of a setting."""
    return bits if isinstance(bits, str) else f"{bits:g} bits"
