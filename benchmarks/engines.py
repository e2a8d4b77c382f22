#!/usr/bin/env python3
"""Which CPU engine is the one to beat: OpenVINO's int4 and int8 against llama.cpp's types, lowtide beside them.

    python benchmarks/engines.py smollm2.lowtide smollm2-f16.gguf --text wiki.test.txt --calibration wiki.valid.txt \\
        --openvino-python ~/openvino/bin/python --llama-python ~/llama/bin/python

All engines start from the same F16 GGUF and take turns, each in a process of its own. KL is to the F16 model on the
same windows. OpenVINO's int4 is NNCF's with AWQ and scale estimation on the calibration text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
import decode
import numpy as np
import peers
import quality
import speed_worker
from speed_measure import Timed, deviation

import lowtide
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.runtime.budget import parse_bits, parse_head
from lowtide.runtime.model import load_tokenizer

Row = dict[str, Any]
COLUMNS = ("threads", "engine", "setting", "KL", "perplexity", "decode tok/s", "prefill tok/s", "weights, MB")
OPENVINO = Path(__file__).with_name("openvino_worker.py")
CALIBRATION = (32, 256)
"""Windows and tokens that NNCF sees."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("artifact")
    add("gguf", help="F16 GGUF of the same model")
    add("--text", required=True, help="held-out text")
    add("--calibration", help="text that OpenVINO's int4 is tuned on; without it, it rounds to nearest")
    add("--openvino", default="int4-64,int4-32,int8", help="forms: int8, or int4-G with groups of G inputs")
    add("--llama", default="Q4_K_M,Q4_0", help="types of llama.cpp")
    add("--bits", default="3.15", help="lowtide's budgets")
    add("--head", default="once", help="as for `lowtide generate`")
    add("--cache-bits", type=int, default=16, help="of lowtide's keys and values; OpenVINO's are 8 by its own default")
    add("--windows", type=int, default=2)
    add("--window", type=int, default=512)
    add("--threads", default="1,2")
    add("--context", type=int, default=64, help="tokens in the cache")
    add("--tokens", type=int, default=64)
    add("--rounds", type=int, default=9)
    add("--prefill", type=int, default=512)
    add("--prefill-rounds", type=int, default=3)
    add("--pause", type=float, default=0.2, help="seconds of rest between runs")
    add("--openvino-python", required=True, help="interpreter that has openvino-genai and nncf")
    add("--llama-python", help="interpreter that has llama-cpp-python; this one by default")
    add("--work", type=Path, default=Path("build/benchmarks"), help="where made files are kept")
    add("--label", help="name of the results file; the artifact's by default")
    add("--quick", action="store_true", help="3 rounds of 16 tokens")
    add("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.tokens, options.prefill_rounds = 3, 16, 1
    return options


def files_of(options: argparse.Namespace, artifact: Any) -> dict[str, Path]:
    """Every peer's file by its setting, made where it is not there yet."""
    found: dict[str, Path] = {}
    options.work.mkdir(parents=True, exist_ok=True)
    with peers.Worker("llama", options.llama_python) as worker:
        for kind in filter(None, options.llama.split(",")):
            wanted = {"gguf": options.gguf, "type": kind, "work": options.work, "threads": 2}
            found[kind] = decode.quantised(argparse.Namespace(**wanted), worker)
    calibration: list[list[int]] = []
    if options.calibration:
        text = Path(options.calibration).read_text(encoding="utf-8")
        ids = load_tokenizer(artifact).encode(text[: 16 * CALIBRATION[0] * CALIBRATION[1]], special=False)
        if len(ids) < CALIBRATION[0] * CALIBRATION[1]:
            raise LowtideError(f"{options.calibration}: has {len(ids)} tokens; give a longer text")
        calibration = [ids[i * CALIBRATION[1] :][: CALIBRATION[1]] for i in range(CALIBRATION[0])]
    for kind in filter(None, options.openvino.split(",")):
        tuned = "-tuned" if calibration and kind != "int8" else ""
        path = options.work / f"{Path(options.gguf).stem}.{kind}{tuned}.xml"
        if not path.exists():
            common.note(f"making {path.name}")
            with peers.Worker("openvino", options.openvino_python, OPENVINO) as worker:
                worker("convert", gguf=options.gguf, path=str(path), mode=kind, calibration=calibration)
        found[kind + tuned] = path
    return found


def logits_of(worker: peers.Worker, subject: quality.Subject) -> Iterator[Any]:
    """An open worker's logits of every window."""
    out = subject.work / "engine.npy"
    try:
        for window in subject.ids:
            worker("logits", ids=window.tolist(), out=str(out))
            yield np.load(out)
    finally:
        out.unlink(missing_ok=True)


def qualities(options: argparse.Namespace, artifact: Any, files: dict[str, Path]) -> dict[str, tuple[float, float]]:
    """(KL, perplexity) of every setting."""
    subject = quality.make_subject(argparse.Namespace(**vars(options), model=options.gguf, sampled=None))
    found = {}
    for name, path in files.items():
        common.note(f"KL of {name}")
        if path.suffix == ".xml":
            with peers.Worker("openvino", options.openvino_python, OPENVINO) as worker:
                worker("open", path=str(path), threads=2, context=options.window)
                found[name] = subject.compare(logits_of(worker, subject))
        else:
            with peers.Worker("llama", options.llama_python) as worker:
                found[name] = subject.compare(quality.llama_logits(worker, path, subject, 2))
    budgets = [float(b) for b in options.bits.split(",")]
    result = lowtide.evaluate(
        artifact,
        subject.source,
        subject.ids,
        windows=len(subject.ids),
        window=subject.ids.shape[1],
        bits=budgets,
        head=parse_head(options.head),
        cache_bits=options.cache_bits,
    )
    return found | {f"{p['bits']:g} bits": (p["kl"], p["ppl"]) for p in result["points"]}


def measure(options: argparse.Namespace, threads: int, ids: list[int], files: dict[str, Path]) -> list[Row]:
    """Decode and prefill at one thread count, everyone in turn."""
    context = max(options.prefill, options.context + options.tokens)
    engines: dict[str, tuple[str, peers.Worker, dict[str, Any]]] = {}
    versions = {}
    with ExitStack() as stack:
        ours = stack.enter_context(peers.Worker("lowtide", script=Path(speed_worker.__file__)))
        settings = {"isa": None, "policy": None, "cache_bits": options.cache_bits, "head": options.head}
        versions["lowtide"] = ours("open", path=options.artifact, threads=threads, context=context, **settings)
        for bits in (float(b) for b in options.bits.split(",")):
            engines[f"{bits:g} bits"] = ("lowtide", ours, {"bits": bits})
        for name, path in files.items():
            kind, python, script = "openvino", options.openvino_python, OPENVINO
            if path.suffix == ".gguf":
                kind, python, script = "llama", options.llama_python, Path(speed_worker.__file__)
            worker = stack.enter_context(peers.Worker(kind, python, script))
            versions[kind] = worker("open", path=str(path), threads=threads, context=context)
            engines[name] = ("llama.cpp" if kind == "llama" else "OpenVINO", worker, {})
        common.note(f"{threads} threads: prefill, decode")
        first = {n: Timed(w, "prefill", {"ids": ids[: options.prefill]}) for n, (_, w, _) in engines.items()}
        request = {"ids": ids, "context": options.context, "tokens": options.tokens}
        each = {n: Timed(w, "decode_at", request | more) for n, (_, w, more) in engines.items()}
        prefill = decode.interleave(first, options.prefill_rounds, options.pause)
        speeds = decode.interleave(each, options.rounds, options.pause)
    return [
        {
            "threads": threads,
            "engine": engines[name][0],
            "setting": name,
            "decode_tps": statistics.median(values),
            "decode_tps_sd": deviation(values),
            "prefill_tps": statistics.median(prefill[name]),
            "all_decode_tps": values,
            "version": versions[{"llama.cpp": "llama", "OpenVINO": "openvino"}.get(engines[name][0], "lowtide")],
        }
        for name, values in speeds.items()
    ]


def table(rows: list[Row]) -> str:
    """The figures for people."""
    return common.markdown(
        COLUMNS,
        (
            (
                r["threads"],
                r["engine"],
                r["setting"],
                f"{r['kl']:.4f}",
                f"{r['ppl']:.3f}",
                f"{r['decode_tps']:.1f} ± {r['decode_tps_sd']:.1f}",
                f"{r['prefill_tps']:.1f}",
                f"{r['file_bytes'] / 1e6:.1f}",
            )
            for r in rows
        ),
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = arguments(argv)
    try:
        artifact = open_artifact(options.artifact)
        parse_head(options.head)
        if None in map(parse_bits, options.bits.split(",")):
            raise LowtideError(f"--bits {options.bits}: numbers alone; a full read is not compared here")
        if not peers.is_f16_gguf(options.gguf):
            raise LowtideError(f"{options.gguf}: must be an F16 GGUF; every engine makes its own form of it")
        files = files_of(options, artifact)
        quality_of = qualities(options, artifact, files)
        length = max(options.prefill, options.context + options.tokens)
        ids = load_tokenizer(artifact).encode(decode.TEXT, special=False)
        ids = (ids * (length // len(ids) + 1))[:length]
        own = sum(p.stat().st_size for p in Path(options.artifact).rglob("*.safetensors"))
        rows = []
        for threads in (int(n) for n in options.threads.split(",")):
            for row in measure(options, threads, ids, files):
                kl, ppl = quality_of[row["setting"]]
                path = files.get(row["setting"])
                size = (
                    own
                    if path is None
                    else path.with_suffix(".bin" if path.suffix == ".xml" else ".gguf").stat().st_size
                )
                rows.append(row | {"kl": kl, "ppl": ppl, "file_bytes": size})
    except (LowtideError, OSError, UnicodeDecodeError) as error:
        print(f"engines: error: {error}", file=sys.stderr)
        return 2
    label = options.label or Path(options.artifact).stem
    names = ("windows", "window", "context", "tokens", "rounds", "prefill", "head", "cache_bits")
    settings = {n: getattr(options, n) for n in names}
    result = common.report({"model": label, "settings": settings, "rows": rows})
    path = common.save(f"engines-{label}" + ("-quick" if options.quick else ""), result, table(rows))
    print(json.dumps(result, indent=2) if options.json else f"{table(rows)}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
