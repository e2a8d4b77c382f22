"""The importance prediction network: one function in two forms, budgets, losses, probes and what is stored."""

from __future__ import annotations

import math

import pytest
import torch

from lowtide.errors import LowtideError
from lowtide.learn.always import Always
from lowtide.learn.graded_group import GradedGroup
from lowtide.learn.ipn import LIMIT, At, Ipn
from lowtide.learn.ipn_export import SAMPLE, _stride, _trained_budgets, as_stored
from lowtide.learn.ipn_loss import Prices, loss_of, mean_open, unrest
from lowtide.learn.sensitivity import Sensitivities, cost, fit_probes
from lowtide.learn.slices import FloatSlices

GRID = [2.0, 3.0, 4.0, 6.0]
NAMES = {"qkv": 6, "o": 5, "gate_up": 6, "down": 8}


def make(features: int = 3, seed: int = 0, parts=Ipn.PARTS) -> Ipn:
    generator = torch.Generator().manual_seed(seed)
    importance = {f"layers.0.{n}": torch.rand(k, generator=generator) + 0.1 for n, k in NAMES.items()}
    importance["head"] = torch.rand(6, generator=generator) + 0.1
    importance["layers.0.down"][2] = 0  # an exact channel
    tables = {n: torch.tensor([[1.0, 2, 3], [0, 1, 2], [-1, 0, 1], [-40, -40, -40]]) for n in importance}
    return Ipn(importance, GRID, tables, features, seed, parts)


def shake(ipn: Ipn, size: float = 0.3) -> Ipn:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in ipn.table.values():
            p += size * torch.randn(p.shape, generator=generator)
    return ipn


def test_both_forms_are_one_function():
    ipn, name = shake(make()), "layers.0.qkv"
    generator = torch.Generator().manual_seed(1)
    x, weight, mean = (torch.randn(s, generator=generator) for s in ((5, 6), (7, 6), (6,)))
    shift = torch.randn(5, generator=generator)
    scores = ipn.scores(name, x, weight, mean, shift)
    assert scores.shape == (5, 7, 6)
    pooled = scores.exp2().pow(2).mean(1).sqrt()
    runtime = (x - mean).abs() * ipn.log_importance(name).exp2() * shift.exp2()[:, None]
    assert torch.allclose(pooled, runtime, rtol=1e-4)
    assert scores.requires_grad
    single = ipn.scores(name, x, weight, mean)
    assert torch.allclose(scores - single, shift[:, None, None].expand_as(scores), atol=1e-5)


def test_masks_count_thresholds_below_the_moved_score():
    ipn = shake(make(), 1.0)
    generator = torch.Generator().manual_seed(2)
    stream, a = torch.randn(9, 6, generator=generator), 6 * torch.randn(9, 5, generator=generator)
    at = At(ipn, 2.6, shift=0.1)
    at.see("layers.0.qkv", stream)
    scores, cuts = at.scores("layers.0.o", a)
    masks = (scores[None] > cuts[:, None, None]).float()
    probe, bias, mix = (
        ipn.get(n, w) for n, w in (("layers.0.qkv", "probe"), ("layers.0.qkv", "bias"), ("layers.0.o", "mix"))
    )
    offset = (torch.relu(stream @ probe.T + bias) @ mix[:-1] + mix[-1]).clamp(-LIMIT, LIMIT)
    gain = max(0.0, 1 + float(ipn.get("layers.0.o", "gain")) * (2.6 - 3))
    base = torch.lerp(ipn.tables["layers.0.o"][0], ipn.tables["layers.0.o"][1], 0.6)
    theta = base + ipn.get("layers.0.o", "delta") + ipn.get("layers.0.o", "slope") * (2.6 - 3)
    theta = torch.tensor([max(theta[: k + 1].tolist()) for k in range(3)]) + 0.1
    score = a.abs() * ipn.log_importance("layers.0.o").exp2()
    expected = torch.stack([score > (t - gain * offset).exp2()[:, None] for t in theta]).float()
    assert torch.equal(masks.detach(), expected)
    assert 0.05 < float(masks.detach().mean()) < 0.95


def test_exact_channels_are_never_read():
    ipn = make()
    at = At(ipn, 2.0)
    at.see("layers.0.gate_up", torch.ones(3, 6))
    scores, cuts = at.scores("layers.0.down", 100 * torch.ones(3, 8))
    assert (scores[:, 2] == -torch.inf).all() and (scores[:, 0] > cuts.max()).all()


def test_corrections_stop_at_the_trained_range():
    ipn = shake(make())
    name = "layers.0.o"
    for bits, edge in ((1.0, 2.0), (5.0, 4.0)):
        moved = ipn.theta(name, bits) - ipn._between(ipn.tables[name], bits)
        at_edge = ipn.theta(name, edge) - ipn._between(ipn.tables[name], edge)
        assert torch.allclose(moved, at_edge) and ipn.gain(name, bits) == ipn.gain(name, edge)
    inner = ipn.theta(name, 2.5) - ipn._between(ipn.tables[name], 2.5)
    assert not torch.allclose(inner, at_edge)


def test_nothing_that_learns_moves_the_heads_thresholds():
    ipn = shake(make())
    with torch.no_grad():
        ipn.level.copy_(torch.tensor([0.5, 0.2]))
    at = At(ipn, 2.5, shift=0.7, keep_margins=True, keep_density=True)
    score, theta = at.scores("head", torch.ones(2, 6))
    assert torch.equal(theta, torch.tensor([0.5, 1.5, 2.5])) and score.shape == (2, 6)
    assert not at.margins and not at.density  # which count towards the budget


@pytest.mark.parametrize(
    ("low", "high", "places"), [(2, 4, [0, 1, 2]), (2.5, 3.2, [0, 1, 2]), (3, 4, [1, 2]), (4, 6, [2])]
)
def test_thresholds_are_solved_for_where_the_runtime_interpolates(low, high, places):
    ipn = make()
    ipn.low, ipn.high = low, high
    assert _trained_budgets(ipn) == places


def test_parts_that_do_not_learn_are_not_there():
    only = make(parts=("theta",))
    assert {k.rpartition("/")[2] for k in only.table} == {"delta", "slope"} and only.features == 0
    assert only.side_bits("layers.0.qkv") == 0
    full = make()
    assert full.side_bits("layers.0.o") == 32 * 5
    assert full.side_bits("layers.0.qkv") == 32 * 5 + 8 * 3 * 6 + 64 * 3 and full.side_bits("head") == 0


def group_of(name: str, out: int, inputs: int) -> GradedGroup:
    nothing = Always(torch.zeros(out, inputs))
    scales = torch.ones(out), torch.ones(inputs)
    return GradedGroup(
        name, FloatSlices(torch.zeros(0), 0), *scales, nothing, torch.zeros(out), torch.zeros(inputs), 0, [out]
    )


class Model:
    """As much of a graded model as losses look at."""

    def __init__(self, ipn: Ipn) -> None:
        self.groups = {n: group_of(n, 4 + i, len(v)) for i, (n, v) in enumerate(ipn.start.items())}


def passes(ipn: Ipn, **options) -> At:
    at = At(ipn, 2.5, keep_margins=True, **options)
    generator = torch.Generator().manual_seed(4)
    at.see("layers.0.gate_up", torch.randn(8, 6, generator=generator))
    at.scores("layers.0.gate_up", torch.randn(8, 6, generator=generator))
    at.scores("layers.0.down", torch.randn(8, 8, generator=generator))
    return at


def test_the_hinge_prices_only_what_is_over():
    ipn = make()
    at, model, kl = passes(ipn), Model(ipn), torch.tensor(0.5)
    bits = torch.full((2, 4), 2.7)
    base = math.log(0.5)
    assert float(loss_of(Prices(), model, kl, bits, 2.5, at)) == pytest.approx(base + 4.0 * 0.2, abs=1e-4)
    assert float(loss_of(Prices(), model, kl, bits, 2.8, at)) == pytest.approx(base, rel=1e-5)
    l1 = loss_of(Prices("l1", l1=2.0), model, kl, bits, 2.8, at)
    assert float(l1) == pytest.approx(base + 2 * float(mean_open(model, at)), rel=1e-5)
    bad = ({"kind": "l2"}, {"pressure": 1.0}, {"l1": -1.0}, {"consistency": math.nan})
    for given, option in zip(bad, ("--sparsity-loss", "--pressure", "--l1", "--consistency"), strict=True):
        with pytest.raises(LowtideError, match=option):
            Prices(**given)


def test_the_l1_term_is_the_mean_of_soft_masks():
    ipn = make()
    at, model = passes(ipn), Model(ipn)
    total = weights = 0.0
    for name, margins in at.margins.items():
        out = model.groups[name].out
        soft = torch.sigmoid(margins / at.tau)
        total += out * float(soft.mean((0, 1, 2)).sum())
        weights += out * margins.shape[3]
    assert float(mean_open(model, at)) == pytest.approx(total / weights, rel=1e-5)


def test_equal_tokens_are_at_rest():
    ipn = make()
    at, model = passes(ipn), Model(ipn)
    moving = float(unrest(model, at, 4))
    at.margins = {n: m[:, :, :1].expand_as(m) for n, m in at.margins.items()}
    still = float(unrest(model, at, 4))
    assert still < moving and still < 0.1


def test_perturbed_copies_are_drawn_from_the_steps_generator():
    ipn = make()
    at, model = passes(ipn), Model(ipn)

    def drawn(seed: int) -> float:
        return float(unrest(model, at, 4, torch.Generator().manual_seed(seed)))

    torch.manual_seed(0)
    first = drawn(7)
    torch.manual_seed(1)
    assert drawn(7) == first != drawn(8)


@pytest.mark.parametrize("inputs", [576, 1536, 288, 41])
def test_thinned_margins_come_from_every_channel(inputs):
    count = 3 * 4096 * inputs
    stride = _stride(count, inputs)
    assert len({i % inputs for i in range(0, min(count, stride * inputs), stride)}) == inputs
    assert SAMPLE / 2 < count / stride < 2 * SAMPLE
    assert _stride(30, 5) == 1


def test_probes_find_what_makes_tokens_sensitive():
    generator = torch.Generator().manual_seed(5)
    stream = torch.randn(6000, 6, generator=generator)
    names = [f"layers.0.{n}" for n in ("qkv", "o", "gate_up", "down")]
    drive = 1.5 * stream[:, 1] - stream[:, 4].abs()
    noise = torch.randn(6000, generator=generator).pow(2)  # one sampled label: chi-squared
    say = {n: drive.exp() * noise for n in names}
    seen = Sensitivities({"layers.0.qkv": stream, "layers.0.gate_up": stream[torch.randperm(6000)]}, say)
    ipn = make(features=8)
    ratios = fit_probes(ipn, seen, steps=300)
    best = float(cost(say["layers.0.o"], drive / (2 * math.log(2))).exp())
    assert best < 0.35 and ratios["layers.0.o"] < best + 0.15
    assert 0.9 < ratios["layers.0.down"] < 1.001  # its stream was shuffled: nothing to find
    offset = ipn.offset("layers.0.o", ipn.feature_values("layers.0.qkv", stream))
    assert float(torch.corrcoef(torch.stack([offset.detach(), drive]))[0, 1]) > 0.9
    assert abs(float(offset.mean())) < 0.2


def test_no_offset_costs_nothing_and_a_constant_one_neither():
    say = torch.rand(100) + 0.1
    assert float(cost(say, torch.zeros(100))) == pytest.approx(0.0, abs=1e-6)
    assert float(cost(say, torch.full((100,), 1.7))) == pytest.approx(0.0, abs=1e-5)


def test_what_is_stored_is_what_the_network_becomes():
    ipn = shake(make())
    before = ipn.log_importance("layers.0.o").detach().clone()
    stored = as_stored(ipn)
    tensors = stored["layers.0.qkv"]
    probe = torch.from_numpy(tensors.probe).float() * torch.from_numpy(tensors.scale)[:, None]
    assert torch.allclose(probe, ipn.get("layers.0.qkv", "probe"), atol=1e-6) and abs(tensors.probe).max() == 127
    kept = torch.from_numpy(stored["layers.0.down"].importance).float()
    assert kept[2] == 0
    after = ipn.log_importance("layers.0.o").detach()
    assert torch.allclose(after, torch.from_numpy(stored["layers.0.o"].importance).float().log2(), atol=1e-5)
    assert torch.allclose(after, before, atol=2e-3) and not torch.equal(after, before)
    assert stored["head"].mix is None and stored["layers.0.o"].probe is None
