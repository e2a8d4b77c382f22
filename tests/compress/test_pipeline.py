"""compress() end to end on small random models."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowtide.arch import norm_specs
from lowtide.compress import compress, pipeline, text
from lowtide.compress.dense import DenseModel
from lowtide.compress.masked import MaskedModel
from lowtide.errors import LowtideError
from lowtide.format import writer
from lowtide.format.reader import open_artifact
from lowtide.rules import get_rule


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch):
    """8 windows of at most 32 tokens."""
    monkeypatch.setattr(text, "SAMPLE_WINDOWS", 8)
    monkeypatch.setattr(text, "FILE_WINDOWS", 8)


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that does not tell when it was made."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix != ".md"}


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir() if p.name != "model" and p.suffix != ".txt")


@pytest.mark.parametrize("options", [{}, {"tied": False, "qkv_bias": True}], ids=["llama", "qwen2"])
def test_an_artifact_that_is_close_to_its_model(small_model, tmp_path, options):
    model = small_model(**options)
    stages = []
    figures = compress(model.folder, tmp_path / "out", progress=lambda *step: stages.append(step))
    artifact = open_artifact(tmp_path / "out")
    assert artifact.config == model.config
    assert artifact.manifest.model_id == model.source().fingerprint()
    assert artifact.manifest.slices == 3
    assert artifact.manifest.policies[0] == "channel-norm"
    assert artifact.manifest.budgets == figures["budgets"]
    assert leftovers(tmp_path / "out") == ["out"]
    norms = {name: artifact.tensor(name) for name, _ in norm_specs(artifact.config)}
    masked = MaskedModel(artifact.config, artifact.groups, norms)
    dense = DenseModel(model.source())
    ids = dense.sample(2, 32, seed=99)
    reference = torch.log_softmax(dense.logits(ids), -1)
    losses, reads = [], []
    for index in (-1, 8, 4):
        chosen = {n: g.thresholds[0, index] for n, g in artifact.groups.items() if n != "embed"}
        logits, bits = masked.logits(ids, get_rule("channel-norm"), chosen)
        losses.append(float((reference.exp() * (reference - torch.log_softmax(logits, -1))).sum(-1).mean()))
        reads.append(bits)
        assert bits == pytest.approx(figures["budgets"][index], rel=0.06)
    assert losses[0] < 0.01
    assert losses == sorted(losses)
    assert losses[2] < 0.3
    assert [s for s, done, total in stages if done == total] == ["sample", "forward", "quantise", "write", "entropy"]


def test_norms_and_tokenizer_files_are_taken_over(small_model, tmp_path):
    model = small_model()
    compress(model.folder, tmp_path / "out")
    artifact = open_artifact(tmp_path / "out")
    for name, _ in norm_specs(model.config):
        assert np.array_equal(artifact.tensor(name), model.tensors[name])
    assert artifact.file("tokenizer.json") == (model.folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("bits_max", [2, 4, 8])
def test_bits_max_bounds_the_slices(small_model, tmp_path, bits_max):
    compress(small_model(layers=1).folder, tmp_path / "out", bits_max=bits_max, policies=["channel-norm"])
    artifact = open_artifact(tmp_path / "out")
    assert artifact.manifest.slices == bits_max // 2
    assert artifact.groups["layers.0.o"].linears[0].weight.shape[0] == bits_max // 2


def test_same_seed_same_bytes_other_seed_other_bytes(small_model, tmp_path):
    model = small_model(layers=1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        compress(model.folder, tmp_path / name, seed=seed)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]


def test_calibration_from_a_file(small_model, tmp_path, monkeypatch):
    model = small_model(layers=1)
    file = tmp_path / "text.txt"
    file.write_text("the rain in the hen then an onion " * 40)
    monkeypatch.setattr(DenseModel, "sample", None)  # must not be asked
    figures = compress(model.folder, tmp_path / "out", calibration=file)
    assert figures["calibration"] == "text.txt"
    assert figures["calibration_tokens"] == 8 * 32
    assert open_artifact(tmp_path / "out").manifest.stats["calibration"] == "text.txt"


def test_windows_spread_over_the_file(small_model, tmp_path):
    source = small_model().source()
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i // 100) for i in range(2600)))  # one letter per 100 characters
    windows = text.windows_of_file(source, file)
    assert windows.shape == (8, 32)
    ids = text.encode_text(source, file.read_text())
    assert torch.equal(windows[0], ids[:32])
    assert len({int(w[0]) for w in windows}) == 8


def test_text_shorter_than_a_window(small_model, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("too short")
    with pytest.raises(LowtideError, match=r"short.txt: \d+ tokens are less than one window of 32"):
        compress(small_model().folder, tmp_path / "out", calibration=file)
    assert leftovers(tmp_path / "out") in ([], ["out.partial"])


@pytest.mark.parametrize("content, message", [(None, "cannot be read"), (b"\xff\xfe\x00", "not UTF-8 text")])
def test_calibration_that_cannot_be_read(small_model, tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LowtideError, match=f"text.txt: .*{message}"):
        compress(small_model().folder, tmp_path / "out", calibration=file)


def test_out_exists(small_model, tmp_path, monkeypatch):
    model = small_model(layers=1)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(pipeline, "open_source", None)  # refused before anything is read
    with pytest.raises(LowtideError, match="out: exists already; .*--force"):
        compress(model.folder, tmp_path / "out")


def test_force_replaces_an_artifact(small_model, tmp_path):
    model = small_model(layers=1)
    compress(model.folder, tmp_path / "out", seed=1, policies=["channel-norm"])
    before = digest(tmp_path / "out")
    compress(model.folder, tmp_path / "out", seed=2, policies=["channel-norm"], force=True)
    assert digest(tmp_path / "out") != before
    open_artifact(tmp_path / "out", verify="full")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits_max": 5}, "--bits-max 5: must be 2, 4, 6 or 8"),
        ({"bits_max": 10}, "--bits-max 10"),
        ({"policies": []}, "policies: give one or more"),
        ({"policies": ["channel-norm", "channel-norm:0,2,4,6"]}, "each once"),
        ({"policies": ["channel-norm", "ipn"]}, "policy ipn: is learned"),
        ({"policies": ["best-rule"]}, "unknown mask rule 'best-rule'"),
        ({"policies": ["channel-norm:0,8"]}, "levels must be"),
    ],
)
def test_options_are_checked_first(tmp_path, options, message):
    with pytest.raises(LowtideError, match=message):
        compress(tmp_path / "no-model", tmp_path / "out", **options)
    assert leftovers(tmp_path / "out") == []


class Stop(Exception):
    """An interruption."""


def interrupted(monkeypatch, model, out, after: int, **options):
    """compress() that breaks off after so many groups; returns how many were coded."""
    real, coded = pipeline.quantise_group, []

    def quantise(*args):
        if len(coded) == after:
            raise Stop
        coded.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantise_group", quantise)
        if after < 1000:
            with pytest.raises(Stop):
                compress(model.folder, out, **options)
        else:
            compress(model.folder, out, **options)
    return len(coded)


@pytest.mark.parametrize("after", [0, 1, 3, 7])
def test_an_interrupted_run_goes_on_and_ends_the_same(small_model, tmp_path, monkeypatch, after):
    model = small_model()
    compress(model.folder, tmp_path / "whole")
    interrupted(monkeypatch, model, tmp_path / "out", after)
    assert leftovers(tmp_path / "out") == ["out.partial", "whole"]
    rest = interrupted(monkeypatch, model, tmp_path / "out", 1000)
    # 4 groups of each of the two blocks, then the head; a block is begun anew, finished ones are not
    assert rest == 9 - (4 if after >= 4 else 0)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert leftovers(tmp_path / "out") == ["out", "whole"]


@pytest.mark.parametrize("change", [{"seed": 3}, {"bits_max": 4}])
def test_work_begun_with_other_options_is_thrown_away(small_model, tmp_path, monkeypatch, change):
    model = small_model()
    interrupted(monkeypatch, model, tmp_path / "out", 5)
    assert interrupted(monkeypatch, model, tmp_path / "out", 1000, **change) == 9


def test_work_begun_with_another_model_is_thrown_away(small_model, tmp_path, monkeypatch):
    interrupted(monkeypatch, small_model(), tmp_path / "out", 5)
    assert interrupted(monkeypatch, small_model("model2", seed=9), tmp_path / "out", 1000) == 9


def test_a_damaged_model_leaves_nothing_but_work(small_model, tmp_path):
    model = small_model()
    data = bytearray((model.folder / "model.safetensors").read_bytes())
    header = int.from_bytes(data[:8], "little")
    offsets = json.loads(data[8 : 8 + header])["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    start = 8 + header + offsets[0]
    data[start : start + 4] = np.float32(np.nan).tobytes()
    (model.folder / "model.safetensors").write_bytes(data)
    with pytest.raises(LowtideError, match="mlp.up_proj.weight holds NaN"):
        compress(model.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["groups", "artifact"])
def test_disk_full(small_model, tmp_path, monkeypatch, where):
    model = small_model(layers=1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "groups":
            patch.setattr("lowtide.compress.pack.np.savez", full)
        else:
            patch.setattr(writer.os, "write", full)
        with pytest.raises(LowtideError, match="No space left on device") as caught:
            compress(model.folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path / "out") == ["out.partial"]
    compress(model.folder, tmp_path / "out")  # and once there is room it goes on
    assert leftovers(tmp_path / "out") == ["out"]


def test_weights_beyond_float16_are_refused(small_model, tmp_path):
    from safetensors.numpy import save_file

    model = small_model(layers=1)
    model.tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e6  # an outlier, and so kept in float16
    save_file(model.tensors, model.folder / "model.safetensors")
    with pytest.raises(LowtideError, match="beyond float16's range"):
        compress(model.folder, tmp_path / "out")
