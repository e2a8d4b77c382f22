"""`benchmarks/speed.py`: what its workers and starts time, and what a block is made of."""

import mmap
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from support.tiny import ODD, make_artifact  # noqa: E402
from support.twin import make_twins  # noqa: E402

from lowtide.errors import LowtideError  # noqa: E402
from lowtide.format.reader import open_artifact  # noqa: E402
from lowtide.kernels.native import Engine  # noqa: E402
from lowtide.runtime.budget import BudgetController, body_side_bits, body_weights, policy_params  # noqa: E402

# ---- what is timed ----


def test_llama_decodes_from_a_place_and_keeps_what_it_has(load, llama):
    engine = load("speed_worker").Llama()
    assert engine.open("model", 2, 64, flash=True) == {"version": "9.9", "isa": "avx2", "vocab": 130}
    import llama_cpp

    assert llama_cpp.log.pop() == ["open", True]
    ids = list(range(100, 160))
    assert engine.decode_at(ids, 20, 4)["tokens"] == 4
    assert llama_cpp.cells == ids[:24] and llama_cpp.log == [20, 1, 1, 1, 1]
    llama_cpp.log.clear()
    engine.decode_at(ids, 20, 4)  # again: nothing to prefill
    assert llama_cpp.cells == ids[:24] and llama_cpp.log == [1] * 4
    llama_cpp.log.clear()
    engine.decode_at(ids, 30, 2)
    assert llama_cpp.cells == ids[:32] and llama_cpp.log == [6, 1, 1]
    llama_cpp.log.clear()
    engine.decode_at(ids[:5] + [7] * 20, 10, 1)  # another text, the same first five tokens
    assert llama_cpp.cells == ids[:5] + [7] * 6 and llama_cpp.log == [5, 1]
    engine.prefill(ids[:3])
    assert llama_cpp.cells == ids[:3]
    llama_cpp.log.clear()
    engine.prefill([1] * 600)
    assert llama_cpp.cells == [1] * 600 and llama_cpp.log == [512, 88]
    llama_cpp.log.clear()
    engine.decode_at([1] * 600, 400, 1)
    assert llama_cpp.cells == [1] * 401 and llama_cpp.log == [1]


def test_lowtide_decodes_what_the_engine_would(load, tmp_path):
    path = make_artifact(tmp_path / "a.lowtide")
    engine = load("speed_worker").Lowtide()
    reply = engine.open(str(path), 1, 60, isa="portable", policy=None, cache_bits=16)
    assert reply["isa"] == "portable" and reply["vocab"] == 130
    ids = [(7 * i) % 130 for i in range(60)]
    artifact = open_artifact(path)
    plain = Engine(artifact, threads=1, isa="portable", max_context=60)
    for bits in (4.5, "dense"):
        target = None if bits == "dense" else bits
        params = policy_params(artifact, None, target)
        controller = BudgetController(params, target, body_weights(artifact), body_side_bits(artifact))
        for context in (30, 20, 40):  # forth and back and forth, the controller running on
            reply = engine.decode_at(ids, context, 5, bits)
            if bits == "dense" or context == 30:
                plain.prefill(ids[:context], 0)
            elif context == 40:
                plain.prefill(ids[25:40], 25)
            read = body = 0
            for place in range(context, context + 5):
                _, stats = plain.decode(ids[place], place, controller.params)
                controller.update(stats.body_bits)
                read, body = read + stats.bytes_read, body + stats.body_bits
            assert reply["tokens"] == 5 and reply["seconds"] > 0
            assert reply["bytes_read"] == read
            assert reply["bits_read_body"] == pytest.approx(body / 5 / body_weights(artifact))
    nothing = engine.decode_at(ids, 40, 5, "nothing", logits=False)
    assert nothing["bits_read_body"] == pytest.approx(body_side_bits(artifact) / body_weights(artifact))
    assert engine.decode_at(ids, 40, 5, 3.5)["bits_read_body"] > 0  # below the grid the controller holds the budget
    with pytest.raises(LowtideError, match="are read whatever the mask"):
        engine.decode_at(ids, 40, 5, 0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_llamas_bytes_are_all_but_an_unread_embedding(load, tmp_path, tied):
    measure, peers = load("speed_measure"), load("peers")
    _, source = make_twins(tmp_path / "t.lowtide", tied=tied)
    path = tmp_path / "t.gguf"
    peers.write_f16_gguf(source, path)
    hidden, vocab = source.config.hidden_size, source.config.vocab_size
    layers = sum(source.tensor(n).numel() * 2 for n in source.names() if ".layers." in n and "norm" not in n)
    norms = (2 * source.config.num_layers + 1) * hidden * 4
    embedding = 0 if tied else 2 * hidden
    assert measure.gguf_bytes_per_token(path) == layers + norms + 2 * vocab * hidden + embedding
    assert measure.cache_bytes(source.config, 100) == 100 * 2 * 2 * 2 * 12 * 2  # tokens, layers, k and v, heads, f16


def options(**more):
    defaults = {"threads": [1, 2], "contexts": [16, 512], "isas": ["avx2", "portable"], "rounds": 9, "tokens": 64}
    return Namespace(**defaults | {"prefill": 512, "prefill_rounds": 5, "starts": 5, "cold_starts": 3} | more)


def test_blocks_cover_everything_once(load):
    blocks = list(load("speed_measure").blocks_of(options(), "avx512", ["prose", "code"]))
    assert [(b.threads, b.isa) for b in blocks] == [(2, None), (1, None), (2, "avx2"), (2, "portable")]
    assert blocks[0].cases == [("prose", 16), ("prose", 512), ("code", 16)]
    assert all(b.cases == [("prose", 16)] and b.cold_starts == 0 and not b.kernel for b in blocks[1:])
    assert blocks[0].kernel and blocks[0].cold_starts == 3
    assert [b.rounds for b in blocks] == [9, 9, 9, 3] and blocks[3].tokens == 16
    on_a_laptop = load("speed_measure").blocks_of(options(), "avx2", ["prose"])
    assert [b.isa for b in on_a_laptop] == [None, None, "portable"]


def test_halving_takes_ratios_of_the_right_times(load, monkeypatch):
    measure = load("speed_measure")
    seen = {}

    class Worker:
        def __call__(self, do, bits, tokens, logits, **request):
            seen[bits] = (do, logits)
            ms = {4.0: 21.0, 2.0: 12.0, "nothing": 3.0}[bits]
            return {
                "seconds": ms / 1e3 * tokens,
                "tokens": tokens,
                "bits_read_body": 0.1 if bits == "nothing" else bits,
            }

    team = measure.Team(Worker(), {}, {}, "")
    subject = Namespace(name="m", texts={"prose": [1] * 99})
    block = measure.Block(2, None, [("prose", 16)], 2, 8, 16, 1, 1)
    found = measure.measure_halving(subject, team, block, Namespace(halve=[4.0, 2.0], pause=0))
    assert found["ms_per_token"] == pytest.approx([21, 12, 3]) and found["bits_read_body"] == [4, 2, 0.1]
    assert found["ratio_step"] == pytest.approx(21 / 12) and found["ratio_slices"] == pytest.approx(18 / 9)
    assert seen == dict.fromkeys((4.0, 2.0, "nothing"), ("decode_at", False))
    monkeypatch.setattr(Worker, "__call__", lambda *a, **k: (_ for _ in ()).throw(LowtideError("0.7 bits are read")))
    found = measure.measure_halving(subject, team, block, Namespace(halve=[4.0, 2.0], pause=0))
    table = load("speed_report").halving_table([{"model": "m", "run": "r", "halving": found}])
    assert "0.7 bits are read" in table


def test_odd_shapes_run_too(load, tmp_path):
    """The worker on an untied model whose sizes are multiples of nothing."""
    engine = load("speed_worker").Lowtide()
    path = make_artifact(tmp_path / "odd.lowtide", ODD)
    engine.open(str(path), 2, 40, isa=None, policy=None, cache_bits=8)
    assert engine.prefill(list(range(20)))["tokens"] == 20
    reply = engine.decode_at(list(range(40)), 25, 5, 5)
    assert np.isfinite(reply["seconds"]) and reply["bytes_read"] > 0
    assert engine.bandwidth()["bytes_per_second"] > 1e8


# ---- starts ----


def test_starts_take_turns_and_the_first_does_not_count(load):
    start, calls = load("speed_start"), []

    class Fake:
        def __init__(self, name):
            self.arguments, self.files, self.name = [name], [Path(name)], name

        def __call__(self, **environment):
            cache = environment.get("XDG_CACHE_HOME")
            calls.append(self.name + ("!" if cache and not any(Path(cache).iterdir()) else ""))
            return {"first_token_s": float(len(calls)), "peak_rss_bytes": 5}

    starters = {"a": Fake("lowtide"), "b": Fake("llama")}
    found = start.measure(starters, 2, 0)
    assert calls == ["llama", "lowtide", "lowtide", "llama", "llama", "lowtide"]
    assert found["a"]["all_first_token_s"] == [3, 6] and found["a"]["first_token_s"] == 4.5
    assert found["a"]["first_token_cold_s"] is None and found["a"]["first_token_first_s"] is None

    calls.clear()
    evicted = []
    found = start.measure(starters, 1, 1, lambda files: evicted.append(list(files)) or len(evicted) == 1)
    assert calls[4:] == [
        "lowtide",
        "lowtide!",
    ]  # cold, unverified; llama.cpp's file would not go
    assert found["a"]["first_token_cold_s"] == 5 and found["a"]["first_token_first_s"] == 6
    assert found["b"]["first_token_cold_s"] is None and found["b"]["first_token_first_s"] is None
    assert [files[0] for files in evicted] == [Path("lowtide"), Path("llama")]


@pytest.mark.skipif(sys.platform != "linux", reason="mincore and posix_fadvise")
def test_what_is_in_use_is_not_thrown_out(load, tmp_path):
    start = load("speed_start")
    path = tmp_path / "data"
    path.write_bytes(b"x" * (64 * mmap.PAGESIZE))
    with open(path, "rb") as file:
        assert file.read() and start.resident_share(file.fileno(), path.stat().st_size) == 1
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:: mmap.PAGESIZE]  # now the pages are in this process' tables
            assert not start.throw_out([path])
    if start.throw_out([path]):  # not on a file system in memory
        with open(path, "rb") as file:
            assert start.resident_share(file.fileno(), path.stat().st_size) <= start.LEFT


def test_a_start_is_a_whole_process(load, tmp_path, llama):
    start = load("speed_start")
    path = make_artifact(tmp_path / "a.lowtide")
    more = {"isa": "portable", "policy": None}
    figures = start.lowtide_starter(path, 5.0, 1, 60, 8, "the tide", more)()
    assert 0 < figures["first_token_s"] < figures["whole_s"]
    assert figures["peak_rss_bytes"] >= figures["rss_own_bytes"] + figures["rss_file_bytes"] - 2**20 > 2**23
    theirs = start.llama_starter(path / "x.gguf", True, 1, 60, 8, [5, 6], sys.executable)
    assert theirs.arguments[2:] == ["1", "60", "8", "1", "5", "6"]
    theirs.python = None  # the stand-in lies on PYTHONPATH, which goes only to this same interpreter
    assert theirs()["peak_rss_bytes"] > 2**23
    theirs.arguments[3] = "13"
    with pytest.raises(LowtideError, match="starting llama failed with code 1: ValueError: the context is full"):
        theirs()
    with pytest.raises(
        LowtideError, match="starting lowtide failed with code 2: lowtide: error: .*budgets from 4 to 6"
    ):
        start.lowtide_starter(path, 9.0, 1, 60, 8, "the tide", more)()
