"""Error feedback of the graded code: coordinate descent against its definition, and the walk that applies it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lowtide.arch import norm_specs
from lowtide.compress import compress, feedback, recoding, text
from lowtide.compress.dense import DenseModel
from lowtide.compress.feedback import Coded, Seen, recode
from lowtide.compress.masked import MaskedModel
from lowtide.compress.recoding import code_values, coded_of
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.rules import get_rule

VALUES = torch.tensor([[(q // 4) - 1.5, (q % 4 - 1.5) / 4] for q in range(16)])
"""Two slices without shrink."""


@pytest.fixture
def bare(monkeypatch):
    """Nothing but the sum of squares."""
    for name in ("SHRINK", "OWN", "FLOOR"):
        monkeypatch.setattr(feedback, name, 0.0)


def problem(out: int = 5, inputs: int = 24, tokens: int = 400, seed: int = 0) -> tuple[Coded, Seen, torch.Tensor]:
    """Correlated inputs, masks by magnitude, weights rounded to the nearest code; one digit held."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=draw) + 1.5 * torch.randn(tokens, 1, generator=draw)
    weight = torch.randn(out, inputs, generator=draw) * 0.7
    rows, cols = torch.rand(out, generator=draw) + 0.5, torch.rand(inputs, generator=draw) + 0.5
    units = weight / rows[:, None] / cols
    digits = ((units + 2) * 4).floor().clamp(0, 15).to(torch.uint8)
    held = torch.zeros(out, inputs, dtype=torch.bool)
    held[1, 2] = True
    coded = Coded(digits, VALUES, rows, cols, held)
    opened = torch.stack([x.abs() > 0.3, x.abs() > 1.2])
    wanted = x + 0.1 * torch.randn(x.shape, generator=draw)
    seen = Seen(x, wanted, opened, torch.zeros(tokens, out), torch.rand(tokens, generator=draw) + 0.5)
    seen.error = error_of(coded, seen, weight)
    return coded, seen, weight * ~held


def error_of(coded: Coded, seen: Seen, weight: torch.Tensor) -> torch.Tensor:
    """What the dense layer gives less what ours does, from the definition."""
    y = seen.wanted @ weight.T
    for plane, mask in zip(coded.planes(), seen.open, strict=True):
        y = y - (seen.inputs * mask) @ plane.T
    return y


def cost(seen: Seen) -> torch.Tensor:
    """Weighted sum of squares of every row."""
    return (seen.error.square() * seen.weight[:, None]).sum(0)


def test_no_single_code_could_be_better(bare):
    coded, seen, target = problem()
    recode(coded, seen, target, sweeps=30)
    start = seen.error + sum((seen.inputs * m) @ p.T for p, m in zip(coded.planes(), seen.open, strict=True))
    best = cost(seen)
    for j in range(coded.digits.shape[1]):
        kept = coded.digits[:, j].clone()
        for code in range(16):
            coded.digits[:, j] = code
            y = start - sum((seen.inputs * m) @ p.T for p, m in zip(coded.planes(), seen.open, strict=True))
            tried = (y.square() * seen.weight[:, None]).sum(0)
            assert (tried[~coded.held[:, j]] >= best[~coded.held[:, j]] * (1 - 1e-4)).all(), (j, code)
        coded.digits[:, j] = kept


@pytest.mark.parametrize("coupled, turn", [(2048, 32), (2048, 7), (10, 4)])
def test_errors_shrink_and_are_kept_account_of(bare, monkeypatch, coupled, turn):
    monkeypatch.setattr(feedback, "COUPLED", coupled)
    monkeypatch.setattr(feedback, "TURN", turn)
    coded, seen, target = problem()
    full = target.clone()
    before, first = cost(seen).sum(), coded.digits.clone()
    old = seen.error.clone()
    planes = coded.planes()
    recode(coded, seen, target)
    moved = sum((seen.inputs * m) @ (a - b).T for a, b, m in zip(coded.planes(), planes, seen.open, strict=True))
    torch.testing.assert_close(seen.error, old - moved, atol=1e-4, rtol=1e-4)
    assert cost(seen).sum() < 0.8 * before
    assert (coded.digits != first).any()
    assert torch.equal(coded.digits[coded.held], first[coded.held])
    assert torch.equal(target, full)


def test_with_nothing_learned_from_text_channels_are_right_by_themselves(monkeypatch):
    """All correlations taken for chance and no reading: the prior alone asks for the nearest full code."""
    monkeypatch.setattr(feedback, "SHRINK", 1e9)
    monkeypatch.setattr(feedback, "MAX_SHRINK", 1.0)
    coded, seen, target = problem()
    seen.open[:] = False
    nearest = coded.digits.clone()
    coded.digits[~coded.held] = 7
    recode(coded, seen, target)
    units = target / coded.rows[:, None] / coded.cols
    inside = (units.abs() < 1.8) & ~coded.held
    assert torch.equal(coded.digits[inside], nearest[inside])


def test_correlations_taken_for_chance_leave_each_channel_to_itself(bare, monkeypatch):
    monkeypatch.setattr(feedback, "SHRINK", 1e9)
    monkeypatch.setattr(feedback, "MAX_SHRINK", 1.0)
    coded, seen, target = problem()
    recode(coded, seen, target, sweeps=1)
    for j in range(coded.digits.shape[1]):
        features = torch.stack([seen.inputs[:, j] * mask[:, j] for mask in seen.open], 1)
        weighted = features * seen.weight[:, None]
        own, asked = weighted.T @ features / len(features), weighted.T @ seen.wanted[:, j] / len(features)
        u = VALUES[:, None, :] * (coded.rows * coded.cols[j])[None, :, None]  # every code of every row
        cost = torch.einsum("cok,kl,col->co", u, own, u) - 2 * (u @ asked) * target[:, j]
        free = ~coded.held[:, j]
        chosen = cost.gather(0, coded.digits[:, j].long()[None])[0]
        torch.testing.assert_close(chosen[free], cost.min(0).values[free], atol=1e-5, rtol=1e-4)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(text, "SAMPLE_WINDOWS", 10)


def kl(folder: Path, dense: DenseModel, ids: torch.Tensor, row: int) -> float:
    """Of the torch model at a row of the thresholds' grid."""
    artifact = open_artifact(folder)
    norms = {name: artifact.tensor(name) for name, _ in norm_specs(artifact.config)}
    chosen = {n: g.thresholds[0, row] for n, g in artifact.groups.items() if n != "embed"}
    logits, _ = MaskedModel(artifact.config, artifact.groups, norms).logits(ids, get_rule("channel-norm"), chosen)
    reference = torch.log_softmax(dense.logits(ids), -1)
    return float((reference.exp() * (reference - torch.log_softmax(logits, -1))).sum(-1).mean())


@pytest.mark.parametrize("options", [{}, {"tied": False, "qkv_bias": True}], ids=["llama", "qwen2"])
def test_feedback_brings_a_model_closer(small_model, tmp_path, short, options):
    model = small_model(**options)
    for name, wanted in (("plain", None), ("fed", "low")):
        compress(model.folder, tmp_path / name, feedback=wanted, policies=["channel-norm"])
    dense = DenseModel(model.source())
    ids = dense.sample(8, 32, seed=99)
    losses = {name: [kl(tmp_path / name, dense, ids, row) for row in (3, 5, 7)] for name in ("plain", "fed")}
    assert sum(np.log(losses["fed"])) < sum(np.log(losses["plain"])) - 0.1
    stats = open_artifact(tmp_path / "fed").manifest.stats
    assert (stats["feedback"], stats["feedback_tokens"]) == ("low", 10 * 32)
    assert "feedback" not in open_artifact(tmp_path / "plain").manifest.stats


def test_even_feedback_spares_the_full_read(small_model, tmp_path, short):
    model = small_model()
    for aim in (None, "low", "even"):
        compress(model.folder, tmp_path / str(aim), feedback=aim, policies=["channel-norm"])
    dense = DenseModel(model.source())
    ids = dense.sample(8, 32, seed=99)
    full = {aim: kl(tmp_path / str(aim), dense, ids, -1) for aim in (None, "low", "even")}
    assert full["even"] < 0.8 * full["low"]
    assert kl(tmp_path / "even", dense, ids, 5) < kl(tmp_path / "None", dense, ids, 5)


def test_a_text_too_short_for_its_budgets(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "SAMPLE_WINDOWS", 4)
    with pytest.raises(LowtideError, match="--feedback: needs 5 windows of 32 tokens or more"):
        compress(small_model(layers=1).folder, tmp_path / "out", feedback="low", policies=["channel-norm"])


@pytest.mark.parametrize("bits_max", [2, 8])
def test_other_numbers_of_slices(small_model, tmp_path, short, bits_max):
    model = small_model(layers=1)
    compress(model.folder, tmp_path / "out", bits_max=bits_max, policies=["channel-norm"], feedback="low")
    artifact = open_artifact(tmp_path / "out", verify="full")
    assert artifact.manifest.slices == bits_max // 2


def test_an_interrupted_walk_goes_on(small_model, tmp_path, short, monkeypatch):
    model = small_model()
    compress(model.folder, tmp_path / "a", policies=["channel-norm"], feedback="low")
    block = recoding.Recoding._block

    def interrupted(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        block(self, index, *rest)

    monkeypatch.setattr(recoding.Recoding, "_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(model.folder, tmp_path / "b", policies=["channel-norm"], feedback="low")
    visited = []

    def counted(self, index, *rest):
        visited.append(index)
        block(self, index, *rest)

    monkeypatch.setattr(recoding.Recoding, "_block", counted)
    compress(model.folder, tmp_path / "b", policies=["channel-norm"], feedback="low")
    assert visited == [1]
    a, b = (hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).digest() for n in "ab")
    assert a == b


def test_another_aim_begins_again(small_model, tmp_path, short, monkeypatch):
    model = small_model()
    save = recoding.WorkFolder.save_group

    def interrupted(self, group, curve):
        save(self, group, curve)
        if self.path.name == "feedback" and group.name == "layers.1.qkv":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recoding.WorkFolder, "save_group", interrupted)
        compress(model.folder, tmp_path / "b", policies=["channel-norm"], feedback="low")
    for name in "ab":
        compress(model.folder, tmp_path / name, policies=["channel-norm"], feedback="even")
    a, b = (hashlib.sha256((tmp_path / n / "model.safetensors").read_bytes()).digest() for n in "ab")
    assert a == b


def test_values_and_embedding_are_those_of_the_format(small_model, tmp_path, short):
    compress(small_model().folder, tmp_path / "out", policies=["channel-norm"], feedback=None)
    artifact = open_artifact(tmp_path / "out")
    group = artifact.groups["layers.0.gate_up"]
    coded = coded_of(group)
    summed = torch.stack(coded.planes()).cumsum(0)
    for level in range(1, group.slices + 1):
        stored = np.concatenate([group.dequantise(i, level) for i in range(2)])
        free = ~coded.held
        np.testing.assert_allclose(summed[level - 1][free], stored[free.numpy()], rtol=1e-4, atol=1e-6)
    assert code_values(group).shape == (64, 3)
    norms = {name: artifact.tensor(name) for name, _ in norm_specs(artifact.config)}
    masked = MaskedModel(artifact.config, artifact.groups, norms)
    found = torch.from_numpy(artifact.groups["head"].lookup())
    torch.testing.assert_close(found, masked.embedding, atol=1e-6, rtol=1e-5)
