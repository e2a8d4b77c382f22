"""The benchmarks on tiny models: their figures, their files, and the baselines they hold lowtide against."""

import importlib
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.tiny import ODD  # noqa: E402
from support.twin import make_twins  # noqa: E402

from lowtide.arch import group_specs  # noqa: E402
from lowtide.compress.dense import DenseModel  # noqa: E402
from lowtide.errors import LowtideError  # noqa: E402
from lowtide.eval import evaluate  # noqa: E402
from lowtide.format.reader import open_artifact  # noqa: E402
from lowtide.kernels.reference import ReferenceEngine  # noqa: E402

FOLDER = Path(__file__).parents[2] / "benchmarks"
TEXT = "the end of the tide is there and then another one in the hand " * 3


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Imports a benchmark by name; its results go to a temporary folder."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        sys.modules.pop(name, None)
        module = importlib.import_module(name)
        common = importlib.import_module("common")
        monkeypatch.setattr(common.save, "__defaults__", (tmp_path / "results",))
        return module

    yield load
    for name in ("common", "rounding", "peers", "quality", "agreement", "decode", "worker"):
        sys.modules.pop(name, None)


@pytest.fixture
def twins(tmp_path):
    path, source = make_twins(tmp_path / "twin.lowtide", folder=tmp_path / "model", policies=("channel-norm", "topk"))
    return path, tmp_path / "model", source


# ---- common ----


def test_tables_are_aligned(load):
    table = load("common").markdown(("a", "long name"), [("x", 1), ("yyyy", None)])
    assert table == "| a    | long name |\n|------|----------:|\n| x    |         1 |\n| yyyy |           |"


def test_results_say_where_they_come_from_without_folders(load, monkeypatch, tmp_path):
    common = load("common")
    monkeypatch.setattr(sys, "argv", ["benchmarks/quality.py", "/some/where/model.gguf", "--bits", "2,3"])
    path = common.save("trial", common.report({"model": "m"}, peer="1.2"), "| table |")
    result = json.loads(path.read_text())
    assert result["command"] == "python benchmarks/quality.py model.gguf --bits 2,3"
    assert result["machine"]["cpu"] and result["machine"]["cores"] >= 1
    assert result["versions"]["peer"] == "1.2" and result["versions"]["python"] == sys.version.split()[0]
    text = path.with_suffix(".md").read_text()
    assert "| table |" in text and result["command"] in text and result["machine"]["cpu"] in text


# ---- static rounding ----


@pytest.mark.parametrize("inputs", [64, 128, 100, 3])
def test_rounding_is_the_best_of_all_scales(load, inputs):
    static = load("rounding")
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (2, 3, 4, 5):
        coded = static.round_to_nearest(weight, bits)
        half = 2 ** (bits - 1)
        for r in range(5):
            for start in range(0, inputs, 64):
                w = weight[r, start : start + 64].numpy()
                scales = [np.float32(np.float16(abs(w).max() / half * f)) for f in static.FACTORS]
                grids = [np.clip(np.rint(w / s), -half, half - 1) * s for s in scales]
                best = min(((g - w) ** 2).sum() for g in grids)
                got = coded[r, start : start + 64].numpy()
                assert ((got - w) ** 2).sum() == pytest.approx(best, rel=1e-5)
                assert any(np.allclose(got, g) for g in grids)
        errors.append(float((coded - weight).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 4 * errors[3]


def test_rounded_sources_count_their_bits(load, twins):
    static = load("rounding")
    rounded = static.RoundedSource(twins[2], 3)
    body, total = rounded.bits_per_weight()
    config = rounded.config
    # hidden 48 and q 48 fit in one group; intermediate 80 takes two
    down = config.hidden_size * config.intermediate_size * config.num_layers
    specs = group_specs(config)
    others = sum(s.weights for s in specs if s.is_body) - down
    assert body == pytest.approx((others * (3 + 16 / 48) + down * (3 + 2 * 16 / 80)) / (others + down))
    head = config.vocab_size * config.hidden_size
    assert total == pytest.approx((body * (others + down) + head * (6 + 16 / 48)) / (others + down + head))
    same = rounded.tensor("model.norm.weight")
    assert torch.equal(same, twins[2].tensor("model.norm.weight"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(rounded.tensor(name), static.round_to_nearest(twins[2].tensor(name), 3))


# ---- quality ----


def run_quality(load, twins, tmp_path, *more):
    path, model, _ = twins
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--artifact", str(path), "--work", str(tmp_path / "work"), "--label", "tiny", "--engine", "reference"]
    return load("quality").main([str(model), "--text", str(text), "--windows", "2", "--window", "12", *options, *more])


def test_quality_of_a_tiny_model(load, twins, tmp_path, capsys):
    code = run_quality(
        load, twins, tmp_path, "--bits", "4.5,5.5,dense", "--other-bits", "5,99", "--static", "2,6", "--json"
    )
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "results" / "quality-tiny.json").read_text()) == result
    rows = {(r["method"], r["target"]): r for r in result["rows"]}
    assert list(rows) == [
        ("lowtide channel-norm", 4.5),
        ("lowtide channel-norm", 5.5),
        ("lowtide channel-norm", "dense"),
        ("lowtide topk", 5.0),
        ("round to nearest, 2 bits, group 64", None),
        ("round to nearest, 6 bits, group 64", None),
    ]
    want = evaluate(
        twins[0], twins[2], tmp_path / "text.txt", 2, 12, [4.5, 5.5, "dense"], engine="reference", progress=False
    )
    for point in want["points"]:
        got = rows["lowtide channel-norm", point["bits"]]
        assert {k: got[k] for k in point if k != "bits"} == {k: v for k, v in point.items() if k != "bits"}
        assert got["file_bytes"] == want["file_bytes"]
    assert result["dense_ppl"] == pytest.approx(want["dense_ppl"], rel=1e-5)
    coarse, fine = (rows[f"round to nearest, {b} bits, group 64", None] for b in (2, 6))
    assert coarse["kl"] > 10 * fine["kl"] > 0
    assert "lowtide topk" in (tmp_path / "results" / "quality-tiny.md").read_text()


def test_static_rows_hold_the_rounded_models_figures(load, twins, tmp_path, capsys):
    run_quality(load, twins, tmp_path, "--bits", "dense", "--other-bits", "5", "--static", "3", "--json")
    result = json.loads(capsys.readouterr().out)
    static = load("rounding")
    from lowtide.runtime.model import load_tokenizer

    ids = torch.tensor(load_tokenizer(open_artifact(twins[0])).encode(TEXT, special=False)[:24]).view(2, 12)
    dense = torch.log_softmax(DenseModel(twins[2]).logits(ids).double(), -1)
    ours = torch.log_softmax(DenseModel(static.RoundedSource(twins[2], 3)).logits(ids).double(), -1)
    kl = (dense.exp() * (dense - ours)).sum(-1).mean()
    assert result["rows"][-1]["kl"] == pytest.approx(float(kl), rel=1e-4)


def test_quality_samples_its_windows_once(load, twins, tmp_path, capsys):
    model, path = twins[1], twins[0]
    options = [
        str(model),
        "--sampled",
        "2",
        "--window",
        "12",
        "--artifact",
        str(path),
        "--engine",
        "reference",
        "--json",
    ]
    options += ["--work", str(tmp_path / "work"), "--bits", "5", "--other-bits", "99", "--static", ""]
    quality = load("quality")
    results = []
    for _ in range(2):
        assert quality.main(options) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["rows"] == results[1]["rows"] and len(results[0]["rows"]) == 1
    assert (results[0]["windows"], results[0]["window"]) == (2, 12)
    saved = np.load(next((tmp_path / "work").rglob("sampled-2x12.npy")))
    assert saved.shape == (2, 12) and (saved[:, 0] == 1).all()


def test_quality_refuses_an_artifact_of_another_model(load, twins, tmp_path, capsys):
    other, _ = make_twins(tmp_path / "other.lowtide", ODD)
    assert run_quality(load, (other, twins[1], None), tmp_path) == 2
    assert "another model than the artifact's" in capsys.readouterr().err


# ---- agreement ----


class Native(ReferenceEngine):
    """Stands in for the native engine; `flaw` spoils what one thread count computes."""

    flaw = None

    def __init__(self, artifact, *, threads=1, isa="x", max_context=None):
        super().__init__(artifact, max_context=max_context)
        self._flawed = self.flaw is not None and threads == 2

    def decode(self, token, pos, policy, want_logits=True):
        logits, stats = super().decode(token, pos, policy, want_logits)
        if self._flawed:
            logits = self.flaw(logits)
        return logits, stats


def run_agreement(load, twins, monkeypatch, flaw):
    agreement = load("agreement")
    monkeypatch.setattr(agreement, "Engine", type("Flawed", (Native,), {"flaw": staticmethod(flaw) if flaw else None}))
    monkeypatch.setattr(agreement, "available_isas", lambda: ["x", "y"])
    return agreement.main([str(twins[0]), "--bits", "4.5,dense", "-n", "5", "--json"])


def test_agreement_of_equal_engines(load, twins, monkeypatch, capsys):
    assert run_agreement(load, twins, monkeypatch, None) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] and len(result["rows"]) == 2 * 2 * 2
    for row in result["rows"]:
        assert row["same_tokens"] and row["same_as_first"] and row["same_bits_read"] and row["max_delta_logp"] == 0


def test_agreement_sees_small_and_large_flaws(load, twins, monkeypatch, capsys):
    assert run_agreement(load, twins, monkeypatch, lambda logits: logits + np.eye(1, len(logits), 3)[0] * 1e-3) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    for row in rows:
        flawed = row["threads"] == 2
        assert row["same_as_first"] is not flawed
        assert (5e-4 < row["max_delta_logp"] < 2e-3) if flawed else row["max_delta_logp"] == 0
    assert run_agreement(load, twins, monkeypatch, lambda logits: -logits) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["same_tokens"] for r in rows] == [r["threads"] == 1 for r in rows]
    assert {r["first_difference"] for r in rows if r["threads"] == 2} == {1}  # the first comes from prefill


# ---- decode ----


def test_interleave_takes_turns(load):
    decode, calls = load("decode"), []

    def engine(name, speed):
        def run():
            calls.append(name)
            return speed + calls.count(name)

        return run

    pauses = []
    speeds = decode.interleave({"a": engine("a", 10), "b": engine("b", 20)}, 4, 0.5, pauses.append)
    assert "".join(calls) == "ab" + "abba" * 2  # warm-up, then turns
    assert speeds == {"a": [12, 13, 14, 15], "b": [22, 23, 24, 25]}
    assert pauses == [0.5] * 8
    found = decode.summary(speeds)
    assert found["median"] == {"a": 13.5, "b": 23.5} and found["ratio_of_medians"] == 13.5 / 23.5


def test_workers_speak_lines_of_json(load, tmp_path, monkeypatch):
    """A stand-in for llama_cpp that counts: no model, but the real processes, protocol and loops."""
    (tmp_path / "llama_cpp.py").write_text(
        textwrap.dedent("""
        import ctypes
        __version__ = "9.9"
        llama_token = ctypes.c_int32
        seen = []
        class Llama:
            def __init__(self, path, **options):
                if "missing" in path: raise ValueError("no such\\nfile")
                print("chatter on stdout")
                self.ctx, self.scores, self.options = self, [[0.0, 1.0]] * 9, options
            def n_vocab(self): return self.options["n_ctx"]
            def reset(self): pass
            def eval(self, ids): self.scores = [[float(i), 0.5] for i in ids] + [[7.0, 7.0]]
        def llama_get_memory(context): return context
        def llama_memory_clear(memory, data): seen.clear()
        def llama_batch_get_one(tokens, n): return list(tokens[:n])
        def llama_decode(context, batch):
            seen.append(batch)
            return 1 if 13 in batch else 0
        def llama_get_logits_ith(context, i): return None
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peers = load("peers")
    with peers.Worker("llama") as worker:
        assert worker("open", path="model", threads=1, context=64) == {"version": "9.9", "vocab": 64}
        reply = worker("decode", ids=[5, 6, 7, 8, 9], prompt=2)
        assert reply["tokens"] == 3 and reply["seconds"] >= 0
        worker("logits", ids=[4, 2], out=str(tmp_path / "out.npy"))
        np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.float32([[4, 0.5], [2, 0.5]]))
        with pytest.raises(LowtideError, match="llama worker, decode: ValueError: llama_decode failed"):
            worker("decode", ids=[5, 13], prompt=1)
        with pytest.raises(LowtideError, match="open: ValueError: no such file"):
            worker("open", path="missing", threads=1, context=4)
    dead = peers.Worker("nonsense")
    with pytest.raises(LowtideError, match="worker ended with code 1"):
        dead("open")


def test_gguf_of_a_source(load, twins, tmp_path):
    gguf = pytest.importorskip("gguf")
    peers, source = load("peers"), twins[2]
    path = tmp_path / "twin.gguf"
    peers.write_f16_gguf(source, path)
    assert peers.is_f16_gguf(path) and not peers.is_f16_gguf(tmp_path)
    assert peers.gguf_bits(path, source) == (16, 16)
    tensors = {t.name: np.asarray(t.data) for t in gguf.GGUFReader(path).tensors}
    half = lambda name: source.tensor(name).numpy().astype(np.float16)  # noqa: E731
    np.testing.assert_array_equal(tensors["blk.0.ffn_down.weight"], half("model.layers.0.mlp.down_proj.weight"))
    np.testing.assert_array_equal(tensors["token_embd.weight"], half("model.embed_tokens.weight"))
    assert tensors["output_norm.weight"].dtype == np.float32 and "output.weight" not in tensors
    theirs, ours = tensors["blk.1.attn_k.weight"], half("model.layers.1.self_attn.k_proj.weight")
    for head in range(2):  # pairs (2i, 2i + 1) there, (i, i + 6) here
        for i in range(6):
            np.testing.assert_array_equal(theirs[head * 12 + 2 * i], ours[head * 12 + i])
            np.testing.assert_array_equal(theirs[head * 12 + 2 * i + 1], ours[head * 12 + i + 6])


def test_decode_needs_its_files(load, twins, tmp_path, capsys):
    assert load("decode").main([str(twins[0]), str(tmp_path / "none.gguf"), "--bits", "5"]) == 2
    assert "none.gguf: no such file" in capsys.readouterr().err
