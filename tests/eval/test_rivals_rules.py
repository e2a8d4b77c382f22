"""Every rival against its slow literal definition: masks weight by weight, fitting, bytes of side data."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from support.rivals import BITS, all_rows, inputs, literal, make_calibration, side_without_rule  # noqa: E402

from lowtide.arch import GROUPS  # noqa: E402
from lowtide.compress.dense import decoder_block, rope_tables  # noqa: E402
from lowtide.eval.rivals import RIVALS, OutOfReach, allocation, low_rank_predictor, self_supervised  # noqa: E402
from lowtide.eval.rivals.low_rank_predictor import reduced_rank  # noqa: E402
from lowtide.eval.rivals.neurons import Fixed  # noqa: E402
from lowtide.eval.rivals.predictors import Predictor  # noqa: E402
from lowtide.eval.rivals.r_sparse import decompose, to_int8  # noqa: E402
from lowtide.eval.rivals.self_supervised import top_mask, train  # noqa: E402

NAMES = [f"layers.{layer}.{group}" for layer in range(2) for group in GROUPS]
OFFSET = 0.25


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    return make_calibration(tmp_path_factory.mktemp("rules"))


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    monkeypatch.setattr(self_supervised, "STEPS", 30)


def plan_of(calibration, name, **setting):
    plan = RIVALS[name].fit(calibration).plan(BITS, **setting)
    plan.offset = OFFSET
    return plan


def check(calibration, plan, name, x, levels, block=None, extra=None):
    """The plan's product against the literal one with these levels of weights [n, out, in]."""
    y, bits = plan.product(calibration.model, name, x, {} if block is None else block)
    wanted, wanted_bits = literal(calibration.artifact, name, x, levels)
    torch.testing.assert_close(y, wanted if extra is None else wanted + extra, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bits.double(), wanted_bits.double())
    assert 0 < float(bits.sum()) < 2.0 * 3 * len(x) * calibration.model.weights(name)  # neither nothing nor all


def centred(calibration, name, x):
    return (x - torch.from_numpy(calibration.artifact.groups[name].mean.astype(np.float32))).abs()


def seen(calibration):
    """Inputs of the dense model by group, in one piece."""
    found = {}
    for index, _, captured in calibration.blocks():
        found |= {f"layers.{index}.{group}": x for group, x in captured.items()}
    return found


def readable(calibration, name, values):
    keep = np.ones(values.shape[-1], bool)
    keep[calibration.artifact.groups[name].exact_channels] = False
    return values[..., torch.from_numpy(keep)]


# ---- levels ----


@pytest.mark.parametrize("name", NAMES)
def test_graded(calibration, name):
    group, x = calibration.artifact.groups[name], inputs(calibration.artifact, name)
    score = centred(calibration, name, x) * torch.from_numpy(group.importance.astype(np.float32))
    cuts = calibration.params(BITS)[name] * 2.0**OFFSET
    levels = torch.stack([(score > float(t)).int() for t in cuts]).sum(0)
    check(calibration, plan_of(calibration, "graded"), name, x, all_rows(calibration.artifact, name, levels))


@pytest.mark.parametrize("name", NAMES)
def test_static_precision(calibration, name):
    group, x = calibration.artifact.groups[name], inputs(calibration.artifact, name)
    energy = centred(calibration, name, seen(calibration)[name]).double().square().mean(0).sqrt()
    score = energy * torch.from_numpy(group.importance.astype(np.float64))
    levels = sum((score > float(t) * 2.0**OFFSET).int() for t in calibration.params(BITS)[name])
    plan = plan_of(calibration, "static precision")
    check(calibration, plan, name, x, all_rows(calibration.artifact, name, levels.expand(x.shape)))


@pytest.mark.parametrize(("rule", "setting"), [("statistical-topk", {}), ("statistical-topk, binary", {"top": 3})])
def test_statistical_topk(calibration, rule, setting):
    plan = plan_of(calibration, rule, **setting)
    for name in NAMES:
        group, x = calibration.artifact.groups[name], inputs(calibration.artifact, name)
        importance = torch.from_numpy(group.importance.astype(np.float32))
        score = (centred(calibration, name, x) * importance).double()
        z = (score - score.mean(-1, keepdim=True)) / score.std(-1, correction=0, keepdim=True)
        levels = sum((z > float(t) + OFFSET).int() for t in plan.z[name])
        check(calibration, plan, name, x, all_rows(calibration.artifact, name, levels))
        if setting:
            assert set(levels.unique().tolist()) == {0, 3}


@pytest.mark.parametrize("binary", [False, True])
def test_statistical_topk_reads_what_our_thresholds_read(calibration, binary):
    plan = RIVALS["statistical-topk" + ", binary" * binary].fit(calibration).plan(BITS, top=3 if binary else None)
    for name, x in ((name, seen(calibration)[name]) for name in NAMES):
        group = calibration.artifact.groups[name]
        score = centred(calibration, name, x) * torch.from_numpy(group.importance.astype(np.float32))
        wanted = sum(float((score > float(t)).float().sum()) for t in calibration.params(BITS)[name])
        levels = readable(calibration, name, plan.levels(calibration.model, name, x, {}))
        assert float(levels.sum()) == pytest.approx(wanted, rel=0.03)


# ---- TEAL and WINA ----


@pytest.mark.parametrize("rule", ["teal", "wina"])
@pytest.mark.parametrize("name", NAMES)
def test_magnitudes_matrix_by_matrix(calibration, rule, name):
    plan, x = plan_of(calibration, rule, top=3), inputs(calibration.artifact, name)
    _, layer, group = name.split(".")
    block, levels = calibration.dense.block(int(layer)), []
    for place, rows in enumerate(calibration.model.parts[name]):
        score = centred(calibration, name, x)
        if rule == "wina":
            score = score * torch.linalg.vector_norm(block.weights[group][rows], dim=0).half()
        read = score > plan.cuts[name, f"{group}.{place}"] * 2.0**OFFSET
        levels.append(np.repeat(3 * read.numpy().astype(int)[:, None], rows.stop - rows.start, 1))
    check(calibration, plan, name, x, np.concatenate(levels, 1))


def test_the_greedy_path_is_the_one_that_tries_everything(calibration, monkeypatch):
    monkeypatch.setattr(allocation, "STEPS", 8)
    fitted = RIVALS["teal"].fit(calibration)
    dense, layer = calibration.dense, 1
    ids = calibration.ids[:1, : allocation.TOKENS]
    x, block = dense.block_inputs(ids)[layer], dense.block(layer)
    matrices = [(g, m) for g in GROUPS for m in allocation.MEMBERS[g]]
    size = {
        m: r.stop - r.start for g in GROUPS for m, r in zip(allocation.MEMBERS[g], rows_of(calibration, g), strict=True)
    }
    size = {m: size[m] * block.weights[g].shape[1] for g, m in matrices}

    def run(density):
        def apply(group, x):
            parts = []
            name = f"layers.{layer}.{group}"
            mean = calibration.model.groups[name].stats.mean
            for matrix, rows in zip(allocation.MEMBERS[group], rows_of(calibration, group), strict=True):
                read = (x - mean).abs() > fitted.tables[name, matrix].at(density[matrix])
                read[..., calibration.artifact.groups[name].exact_channels.tolist()] = True
                read |= density[matrix] == 1.0
                parts.append(torch.where(read, x, mean) @ block.weights[group][rows].T)
            return torch.cat(parts, -1)

        rope = rope_tables(dense.config, 0, x.shape[1])
        return decoder_block(dense.config, (block.input_norm, block.post_norm), x, apply, rope)

    target = run({m: 1.0 for _, m in matrices})
    density = {m: 1.0 for _, m in matrices}
    step, first = sum(size.values()) / 8, x.shape[1] // 4
    for reached, expected in fitted.paths.steps[layer][1:5]:
        trials = {m: density | {m: max(0.0, density[m] - step / size[m])} for m in density if density[m] > 0}
        best = min(trials, key=lambda m: float((run(trials[m]) - target)[:, first:].norm()))
        density = trials[best]
        assert density == pytest.approx(expected)
        assert reached == pytest.approx(sum(density[m] * size[m] for m in size) / sum(size.values()))
    assert fitted.paths.steps[layer][-1][0] == 0.0


def rows_of(calibration, group):
    return calibration.model.parts[f"layers.1.{group}"]


def test_densities_lie_between_the_steps_of_the_path():
    paths = allocation.Paths([[(1.0, {"a": 1.0, "b": 1.0}), (0.5, {"a": 0.0, "b": 1.0}), (0.0, {"a": 0.0, "b": 0.0})]])
    assert paths.at(0, 0.75) == {"a": 0.5, "b": 1.0} and paths.at(0, 0.25) == {"a": 0.0, "b": 0.5}


# ---- neurons ----


def neurons_literal(calibration, layer, keep, fixed, gate_masked):
    """Levels of gate_up's and of down's weights for the neurons kept, bool [n, neurons]."""
    name = f"layers.{layer}.gate_up"
    width = calibration.artifact.groups[name].in_features
    exact = calibration.artifact.groups[f"layers.{layer}.down"].exact_channels
    keep = keep.numpy().copy()
    keep[:, exact] = True
    gate = keep * fixed.top if gate_masked else np.full(keep.shape, fixed.rest)
    rows = np.concatenate([gate, keep * fixed.top], 1).astype(int)
    up_levels = np.repeat(rows[:, :, None], width, 2)
    hidden = sum(linear.out_features for linear in calibration.artifact.groups[f"layers.{layer}.down"].linears)
    down_levels = np.repeat((keep * fixed.top).astype(int)[:, None], hidden, 1)
    return keep, up_levels, down_levels


def check_neurons(calibration, plan, keep_of, fixed, gate_masked):
    """gate_up and down of a plan with the mask keep_of(layer, x, silu(gate)) against the literal MLP."""
    model, artifact = calibration.model, calibration.artifact
    for layer in range(2):
        up_name, down_name = f"layers.{layer}.gate_up", f"layers.{layer}.down"
        x, block = inputs(artifact, up_name), {}
        y, bits = plan.product(model, up_name, x, block)
        width = y.shape[-1] // 2
        full = np.full((len(x), 2 * width, x.shape[-1]), fixed.rest)
        gate = F.silu(literal(artifact, up_name, x, full)[0][:, :width])
        keep, up_levels, down_levels = neurons_literal(
            calibration, layer, keep_of(f"layers.{layer}", x, gate), fixed, gate_masked
        )
        wanted, wanted_bits = literal(artifact, up_name, x, up_levels)
        torch.testing.assert_close(bits.double(), wanted_bits.double())
        kept = torch.from_numpy(keep)
        both = torch.cat([kept if gate_masked else torch.ones_like(kept), kept], -1)
        torch.testing.assert_close(y[both], wanted[both], rtol=1e-3, atol=1e-3)
        h = F.silu(y[:, :width]) * y[:, width:]
        mean = torch.from_numpy(artifact.groups[down_name].mean.astype(np.float32))
        out, out_bits = plan.product(model, down_name, h, block)
        wanted, wanted_bits = literal(artifact, down_name, torch.where(kept, h, mean), down_levels)
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(out_bits.double(), wanted_bits.double())
        assert 0 < kept.float().mean() < 1


FIXED = Fixed(rest=2, top=3)


def test_cats(calibration):
    plan = plan_of(calibration, "cats", fixed=FIXED)
    check_neurons(
        calibration, plan, lambda layer, x, gate: gate.abs() > plan.cuts[layer] * 2.0**OFFSET, FIXED, gate_masked=False
    )
    for name in ("layers.0.qkv", "layers.1.o"):
        x = inputs(calibration.artifact, name)
        check(calibration, plan, name, x, all_rows(calibration.artifact, name, torch.full(x.shape, 2)))


def test_cats_gives_every_layer_the_same_share(calibration):
    plan = RIVALS["cats"].fit(calibration).plan(BITS, fixed=FIXED)
    data = seen(calibration)
    shares = []
    for layer in ("layers.0", "layers.1"):
        gate = readable(calibration, f"{layer}.down", data[f"{layer}.gate"].abs())
        shares.append(float((gate > plan.cuts[layer]).float().mean()))
    assert shares[0] == pytest.approx(shares[1], abs=0.01) and 0.05 < shares[0] < 0.95


def test_chess(calibration):
    plan, data = plan_of(calibration, "chess", fixed=FIXED), seen(calibration)

    def keep(layer, x, gate):
        up = data[f"{layer}.up"].double().abs().mean(0).half()
        return gate.abs() > plan.cuts[f"{layer}.down"] * 2.0**OFFSET / up.float()

    check_neurons(calibration, plan, keep, FIXED, gate_masked=False)
    for name in ("layers.0.qkv", "layers.1.qkv", "layers.0.o", "layers.1.o"):
        x = inputs(calibration.artifact, name)
        read = 3 * (centred(calibration, name, x) > plan.cuts[name] * 2.0**OFFSET).int()
        levels = all_rows(calibration.artifact, name, read)
        if name.endswith("qkv"):
            levels[:, calibration.model.parts[name][0].stop :] = 2  # key and value
        check(calibration, plan, name, x, levels)


@pytest.mark.parametrize("rule", ["low-rank predictor", "self-supervised predictor"])
def test_predicted_neurons(calibration, rule):
    setting = {"fixed": FIXED, "rank": 3} | ({"mass": 0.8} if rule.startswith("self") else {})
    plan = plan_of(calibration, rule, **setting)

    def keep(layer, x, gate):
        p = plan.predictors[layer]
        assert p.down.shape[0] == p.up.shape[1] == 3
        scores = torch.einsum("nr,ri,ti->tn", p.up.double(), p.down.double(), x.double()) + p.bias
        return scores > plan.cuts[layer] + OFFSET

    check_neurons(calibration, plan, keep, FIXED, gate_masked=True)


def test_the_regression_is_the_best_of_its_rank(monkeypatch):
    monkeypatch.setattr(low_rank_predictor, "RIDGE", 1e-9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 1
    y = x @ torch.randn(7, 9, generator=generator) + torch.randn(200, 9, generator=generator)
    full = reduced_rank(x, y)
    a = torch.cat([x, torch.ones(200, 1)], 1)
    best = torch.linalg.lstsq(a, y).solution
    torch.testing.assert_close(full(x), a @ best, rtol=1e-3, atol=1e-3)
    fitted = (a @ best) - y.mean(0)
    for rank in (1, 3):
        ours = x @ full.down[:rank].T @ full.up[:, :rank].T
        error = float((ours - ours.mean(0) - fitted).square().sum())
        s = torch.linalg.svdvals(fitted)
        assert error == pytest.approx(float(s[rank:].square().sum()), rel=1e-3)


def test_the_oracle_mask_is_the_shortest_that_holds_the_mass():
    response = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) ** 3
    for row, mask in zip(response, top_mask(response, 0.8), strict=True):
        shortest = min(
            (
                subset
                for n in range(9)
                for subset in itertools.combinations(range(8), n)
                if sum(float(row[i]) for i in subset) >= 0.8 * float(row.sum())
            ),
            key=lambda subset: (len(subset), -sum(float(row[i]) for i in subset)),
        )
        assert set(shortest) == set(mask.nonzero()[:, 0].tolist())


def test_training_learns_a_mask_that_can_be_learned(monkeypatch):
    monkeypatch.setattr(self_supervised, "STEPS", 200)
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    target = x @ torch.randn(6, 2, generator=torch.Generator().manual_seed(1)) @ torch.randn(2, 10) > 0
    learned = train(x, target, 2, seed=0)
    assert float(((learned(x) > 0) == target).float().mean()) > 0.9
    assert torch.equal(train(x, target, 2, seed=0).up, learned.up)
    assert not torch.equal(train(x, target, 2, seed=1).up, learned.up)


# ---- R-Sparse ----


@pytest.mark.parametrize("name", NAMES)
def test_r_sparse(calibration, name):
    plan, x = plan_of(calibration, "r-sparse", top=3, part=0.1), inputs(calibration.artifact, name)
    read = centred(calibration, name, x) > plan.cuts[name] * 2.0**OFFSET
    u, v = plan.factors[name]
    a = torch.where(read, 0.0, x - torch.from_numpy(calibration.artifact.groups[name].mean.astype(np.float32)))
    extra = torch.einsum("or,ri,ti->to", u.double(), v.double(), a.double()).float()
    assert float(extra.abs().max()) > 0
    check(calibration, plan, name, x, all_rows(calibration.artifact, name, 3 * read.int()), extra=extra)


def test_factors_are_the_best_for_the_inputs_energy():
    generator = torch.Generator().manual_seed(0)
    weight, energy = torch.randn(6, 9, generator=generator), torch.rand(9, generator=generator) + 0.1
    u, v = decompose(weight, energy)
    torch.testing.assert_close(u @ v, weight, rtol=1e-4, atol=1e-4)
    error = ((weight - u[:, :2] @ v[:2]) * energy).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight * energy)[2:].square().sum())


def test_int8_is_within_half_a_step():
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for dim in (0, 1):
        step = values.abs().amax(dim, keepdim=True) / 127
        assert bool(((to_int8(values, dim) - values).abs() <= 0.52 * step).all())
        assert len((to_int8(values, dim) / to_int8(values, dim).abs().amax(dim, keepdim=True)).unique()) > 20


# ---- bytes ----


def test_side_data_is_counted_to_the_byte(calibration):
    model, artifact = calibration.model, calibration.artifact
    rank, part = 3, 0.1
    settings = {
        "teal": {"top": 3}, "wina": {"top": 3}, "cats": {"fixed": FIXED}, "chess": {"fixed": FIXED},
        "statistical-topk, binary": {"top": 3}, "r-sparse": {"top": 3, "part": part},
        "low-rank predictor": {"fixed": FIXED, "rank": rank},
        "self-supervised predictor": {"fixed": FIXED, "rank": rank, "mass": 0.8},
    }  # fmt: skip
    plans = {name: plan_of(calibration, name, **settings.get(name, {})) for name in RIVALS}
    for name in NAMES:
        group = artifact.groups[name]
        kind, inputs, out = name.split(".")[-1], group.in_features, sum(m.out_features for m in group.linears)
        members, down = len(group.linears), kind == "down"
        u = plans["r-sparse"].factors[name][0].shape[1]
        predictor = 8 * rank * (inputs + out // 2) + 16 * (rank + 2 * (out // 2)) if kind == "gate_up" else 0
        extra = {
            "graded": 16 * inputs + 32 * 3,
            "statistical-topk": 16 * inputs + 32 * 3,
            "statistical-topk, binary": 16 * inputs + 32 * 3,
            "teal": 32 * members,
            "wina": 32 * members + 16 * inputs * members,
            "cats": 32 * down,
            "chess": 32 * down + 16 * inputs * down + 32 * (kind in ("qkv", "o")),
            "r-sparse": 32 + 8 * u * (inputs + out) + 32 * u,
            "low-rank predictor": 32 * down + predictor,
            "self-supervised predictor": 32 * down + predictor,
            "static precision": 2 * inputs,
        }
        for rule, plan in plans.items():
            assert plan.side_bits(model, name) == side_without_rule(artifact, name) + extra[rule], (rule, name)


def test_predictors_bits_are_those_of_its_arrays():
    p = Predictor(torch.zeros(3, 5), torch.zeros(7, 3), torch.zeros(7))
    assert p.bits() == 8 * (15 + 21) + 16 * (3 + 7 + 7)


@pytest.mark.parametrize(("rule", "setting"), [("teal", {"top": 1}), ("cats", {"fixed": Fixed(3, 3)})])
def test_settings_that_cannot_read_the_budget_are_out_of_reach(calibration, rule, setting):
    low = 2.0 if rule == "cats" else 12.0
    calibration._params.setdefault(low, calibration.params(BITS))
    with pytest.raises(OutOfReach):
        RIVALS[rule].fit(calibration).plan(low, **setting)
