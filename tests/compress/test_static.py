"""compress() made to be small: targets are met, pruned weights stay zero, interrupted runs go on, errors are clear."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny import make_artifact

from lowtide.compress import compress, pipeline, search, text
from lowtide.compress.dense import DenseModel
from lowtide.compress.held_out import held_out_kl
from lowtide.compress.prune.apply import PruneOptions
from lowtide.compress.search import Target, Trial, next_step
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.format.repack import repack
from lowtide.runtime.model import load


@pytest.fixture(autouse=True)
def small_job(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "SAMPLE_WINDOWS", 12)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.iterdir())


def test_a_size_asked_for_is_a_size_kept(small_model, tmp_path):
    model = small_model(hidden=64, intermediate=160)
    free = compress(model.folder, tmp_path / "free", step=0.02, policies=["channel-norm"])
    wanted = free["file_bytes"] * 0.97 / 1e6
    found = compress(model.folder, tmp_path / "out", size_mb=wanted, policies=["channel-norm"])
    assert 0.95 * wanted * 1e6 < found["file_bytes"] <= wanted * 1e6 * 1.002
    assert found["file_bytes"] == folder_bytes(tmp_path / "out")
    assert found["step"] > free["step"] and len(found["trials"]) <= search.ROUNDS


def test_a_kl_asked_for_is_a_kl_kept(small_model, tmp_path):
    model = small_model()
    found = compress(model.folder, tmp_path / "out", kl=0.01, policies=["channel-norm"])
    assert 0.008 <= found["held_out_kl"] <= 0.01
    opened = open_artifact(tmp_path / "out")
    dense = DenseModel(model.source())
    job = pipeline._Job(model.source(), 4, 0, lambda *_: None, Target(kl=0.01), None)
    job.prepare(tmp_path / "again", None)
    assert held_out_kl(dense, opened.groups.__getitem__, job.held_out) == pytest.approx(found["held_out_kl"], rel=1e-3)


@pytest.mark.parametrize("variant", [{"tied": False, "qkv_bias": True}, {"tied": True}])
def test_the_engine_reads_what_was_coded(small_model, tmp_path, variant):
    """The native engine against torch with the reconstructed weights: int8 inputs are all that differs."""
    import torch

    from lowtide.compress.dense import decoder_block, rms_norm, rope_tables
    from lowtide.compress.held_out import coded_block, full_read

    model = small_model(**variant)
    compress(model.folder, tmp_path / "out", step=0.01, policies=["channel-norm"])
    opened = open_artifact(tmp_path / "out")
    assert opened.manifest.zero and opened.manifest.slices == 4
    ids = torch.arange(1, 25)[None]
    dense, rope = DenseModel(model.source()), rope_tables(opened.config, 0, 24)
    x = torch.nn.functional.embedding(ids, full_read(opened.groups["head" if opened.config.tied else "embed"])[0])
    for index in range(opened.config.num_layers):
        block = coded_block(dense, index, opened.groups.__getitem__)
        x = decoder_block(opened.config, (block.input_norm, block.post_norm), x, block.apply, rope)
    weight, bias = full_read(opened.groups["head"])
    expected = rms_norm(x, dense.final_norm, opened.config.rms_eps) @ weight.T + bias
    with load(tmp_path / "out", threads=1) as run:
        found = run.engine.prefill(ids[0].tolist(), 0, all_logits=True)
    error = np.sqrt(np.square(found - expected[0].numpy()).mean())
    assert error < 0.04 * float(expected.std())


def test_what_is_pruned_stays_zero_and_makes_the_file_smaller(small_model, tmp_path):
    model = small_model(hidden=64, intermediate=160)
    whole = compress(model.folder, tmp_path / "whole", step=0.01, policies=["channel-norm"])
    options = PruneOptions(rule="magnitude", sparsity=0.6)
    pruned = compress(model.folder, tmp_path / "pruned", step=0.01, prune=options, policies=["channel-norm"])
    assert pruned["entropy"]["coded_bits"] < 0.95 * whole["entropy"]["coded_bits"]
    assert pruned["pruned"]["sparsity"] == 0.6
    body = [g for n, g in open_artifact(tmp_path / "pruned").groups.items() if n != "head"]
    zeros = weights = 0
    for group in body:
        for i in range(len(group.linears)):
            read = group.dequantise(i, 4) + group.exact_part(i)
            zeros, weights = zeros + int((read == 0).sum()), weights + read.size
    assert zeros / weights >= 0.6
    gentle = compress(model.folder, tmp_path / "gentle", prune=options, policies=["channel-norm"])
    assert gentle["step"] < search.first_step(gentle["weights"])


class Stop(Exception):
    """An interruption."""


def test_an_interrupted_search_goes_on_and_ends_the_same(small_model, tmp_path, monkeypatch):
    model = small_model()
    options = {"kl": 0.02, "policies": ["channel-norm"]}
    compress(model.folder, tmp_path / "whole", **options)
    real, calls = pipeline.code_steps, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 14:
            raise Stop
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "code_steps", stopping)
        with pytest.raises(Stop):
            compress(model.folder, tmp_path / "out", **options)
    compress(model.folder, tmp_path / "out", **options)
    for name in ("model.safetensors", "lowtide.json"):
        a, b = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "out"))
        assert hashlib.sha256(a).digest() == hashlib.sha256(b).digest()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size_mb": 1.0, "kl": 0.1}, "--size-mb, --kl and --step: give one of them"),
        ({"size_mb": 0.0}, "--size-mb: must be a number above 0"),
        ({"feedback": "high"}, "--feedback high: must be one of low, even"),
        ({"step": 1e-4, "feedback": "low"}, "--feedback: is for codes to be read dynamically"),
        ({"kl": float("nan")}, "--kl: must be a number above 0"),
        ({"step": -1.0}, "--step: must be"),
        ({"coding": "zip"}, "--coding zip: must be one of packed, entropy"),
    ],
)
def test_options_are_checked_first(tmp_path, options, message):
    with pytest.raises(LowtideError, match=message):
        compress(tmp_path / "no-model", tmp_path / "out", **options)


def test_as_much_calibration_text_as_asked_for(small_model, tmp_path):
    model, file = small_model(), tmp_path / "text.txt"
    file.write_text(" ".join(["tide"] * 200))
    found = compress(model.folder, tmp_path / "a", calibration=file, calibration_tokens=70, policies=["channel-norm"])
    assert found["calibration_tokens"] == 96  # whole windows of 32
    with pytest.raises(LowtideError, match=r"--calibration-tokens 99999: .*text.txt holds \d+ tokens"):
        compress(model.folder, tmp_path / "b", calibration=file, calibration_tokens=99999)
    with pytest.raises(LowtideError, match="--calibration-tokens: needs --calibration"):
        compress(model.folder, tmp_path / "c", calibration_tokens=10)


def test_a_size_that_cannot_be_reached_says_what_was(small_model, tmp_path):
    with pytest.raises(LowtideError, match=rf"the target is not reached in {search.ROUNDS} walks \(step .* MB, KL"):
        compress(small_model(layers=1).folder, tmp_path / "out", size_mb=0.001, policies=["channel-norm"])
    assert not (tmp_path / "out").exists()


def test_tokenizer_files_lose_their_spaces_and_nothing_else(small_model, tmp_path):
    model = small_model(layers=1)
    source = model.folder / "tokenizer.json"
    source.write_text(json.dumps(json.loads(source.read_text()), indent=4))
    compress(model.folder, tmp_path / "out", policies=["channel-norm"])
    stored = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert json.loads(stored) == json.loads(source.read_bytes()) and len(stored) < source.stat().st_size


def test_sizes_of_coarse_codes_are_reached_with_their_own_slope():
    """Sizes that fall by an eighth of what theory says: the third guess is there."""
    weights = 80_000
    trials = [Trial(0.01, 50e3, 0.1)]
    for _ in range(2):
        step = next_step(Target(size=45e3), trials, weights)
        trials.append(Trial(step, 50e3 - weights / 64 * np.log2(step / 0.01), 0.1))
    assert Target(size=45e3).fits(trials[-1].size, 0.1)


def test_next_step_follows_theory_then_what_was_measured():
    first = Trial(1e-4, 50e6, 0.1)
    assert next_step(Target(kl=0.025 / 0.98), [first], 10**8) == pytest.approx(5e-5, rel=0.01)
    assert next_step(Target(size=50e6 / 0.995), [first], 10**8) == pytest.approx(1e-4, rel=1e-6)
    bigger = next_step(Target(size=62.5e6 / 0.995), [first], 10**8)
    assert bigger == pytest.approx(5e-5, rel=1e-3)  # 10^8 weights, one bit each
    second = Trial(5e-5, 60e6, 0.03)
    assert next_step(Target(size=62.5e6 / 0.995), [first, second], 10**8) == pytest.approx(2**-1.25 * 1e-4, rel=1e-3)


@pytest.mark.parametrize("coding", ["packed", "entropy"])
def test_fewer_bits_of_an_artifact(tmp_path, coding):
    source = make_artifact(tmp_path / "a", coding="entropy", slices=3)
    manifest = repack(source, tmp_path / "b", coding=coding, bits_max=4)
    assert (manifest.slices, manifest.coding) == (2, coding)
    whole, cut = open_artifact(source), open_artifact(tmp_path / "b", verify="full")
    for name, group in cut.groups.items():
        np.testing.assert_array_equal(group.linears[0].weight, whole.groups[name].linears[0].weight[:2])
    back = repack(tmp_path / "b", tmp_path / "c", coding="entropy")
    again = repack(tmp_path / "c", tmp_path / "d")
    assert back.files["model.safetensors"] == again.files["model.safetensors"]
    with load(tmp_path / "b", threads=1) as model:
        assert np.isfinite(model.engine.prefill([1, 2, 3], 0)).all()


def test_a_partial_download_is_an_artifact_of_fewer_bits(tmp_path):
    source = make_artifact(tmp_path / "a", coding="entropy", slices=3)
    whole = open_artifact(source)
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    cut = whole.manifest.prefixes[1].bytes
    assert cut < 0.8 * len(data)
    weights.write_bytes(data[: cut + 5])
    repack(source, tmp_path / "b", bits_max=4)
    found = open_artifact(tmp_path / "b").groups["layers.1.down"].linears[0].weight
    np.testing.assert_array_equal(found, whole.groups["layers.1.down"].linears[0].weight[:2])
    weights.write_bytes(data[: cut - 1])
    with pytest.raises(LowtideError, match=rf"too few for 4 bits per weight; get the first {cut}"):
        repack(source, tmp_path / "c", bits_max=4)
    weights.write_bytes(b"\0" + data[1:cut])
    with pytest.raises(LowtideError, match="its beginning is damaged"):
        repack(source, tmp_path / "c", bits_max=4)
    with pytest.raises(LowtideError, match="--bits-max 8: the artifact has 6 bits"):
        repack(source, tmp_path / "c", bits_max=8)
