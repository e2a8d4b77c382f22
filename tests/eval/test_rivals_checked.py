"""The check that mends the cache, against decoding token by token with a cache that is rewritten."""

import pytest

torch = pytest.importorskip("torch")

from support.rivals import BITS, make_calibration  # noqa: E402

from lowtide.arch import LAYER_NORMS  # noqa: E402
from lowtide.compress.dense import KVCache, decoder_block, rms_norm, rope_tables  # noqa: E402
from lowtide.eval.rivals import CheckedModel  # noqa: E402
from lowtide.eval.rivals.checked import visible  # noqa: E402
from lowtide.eval.rivals.graded import GradedPlan  # noqa: E402

N = 24


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_calibration(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def plan(shared):
    return GradedPlan(shared.params(4.0))


def caches(model):
    config = model.config
    shape = (1, config.num_kv_heads, N, config.head_dim)
    return [KVCache(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]


def step(model, token, position, kept, levels):
    """One token through all blocks; levels(name, x) decides. Returns the head's input f32 [D]."""
    rope = rope_tables(model.config, position, 1)
    x = model.embedding[token][None, None]
    for index, cache in enumerate(kept):

        def apply(name, x, index=index):
            full = f"layers.{index}.{name}"
            return model.read(full, x, levels(full, x))[0]

        norms = tuple(model.norms[f"model.layers.{index}.{n}"] for n in LAYER_NORMS)
        x = decoder_block(model.config, norms, x, apply, rope, cache)
    return rms_norm(x, model.norms["model.norm.weight"], model.config.rms_eps)[0, 0]


def by_hand(model, plan, ids, every):
    """Head inputs f32 [N, D] of decoding with a check after every `every` tokens."""
    masked, whole, out = caches(model), caches(model), []

    def full(name, x):
        return model.full_levels(name, x, 3)

    for position, token in enumerate(ids.tolist()):
        out.append(step(model, token, position, masked, lambda name, x: plan.levels(model, name, x, {})))
        step(model, token, position, whole, full)
        if (position + 1) % every == 0:
            for mine, theirs in zip(masked, whole, strict=True):
                mine.keys[:, :, : position + 1] = theirs.keys[:, :, : position + 1]
                mine.values[:, :, : position + 1] = theirs.values[:, :, : position + 1]
    return torch.stack(out)


@pytest.mark.parametrize("every", [1, 5, 8])
def test_later_tokens_see_what_the_check_wrote(shared, plan, every):
    wanted = by_hand(shared.model, plan, shared.ids[0], every)
    found, _ = CheckedModel(shared.model, every).states(shared.ids, plan)
    torch.testing.assert_close(found[0], wanted, rtol=1e-3, atol=1e-3)
    never, _ = shared.model.states(shared.ids, plan)
    torch.testing.assert_close(found[0, :every], never[0, :every], rtol=1e-3, atol=1e-3)
    assert (found[0, every:] - never[0, every:]).abs().max() > 0.01


def test_a_check_that_never_comes_changes_nothing_but_the_bits(shared, plan):
    model = CheckedModel(shared.model, N)
    found, bits = model.states(shared.ids, plan)
    never, plain = shared.model.states(shared.ids, plan)
    torch.testing.assert_close(found, never, rtol=1e-4, atol=1e-4)
    assert bits == pytest.approx(plain + model.batch_bits)


def test_bits_of_the_check(shared):
    bits = 0
    for name, group in shared.artifact.groups.items():
        if name in ("head", "embed") or name in ("layers.1.o", "layers.1.gate_up", "layers.1.down"):
            continue  # of the last layer keys and values are all that is needed
        rows = sum(linear.out_features for linear in group.linears)
        bits += 2 * 3 * rows * (group.in_features - len(group.exact_channels))
        bits += 8 * (group.mean.nbytes + group.col_scale.nbytes + group.shrink.nbytes + group.exact_channels.nbytes)
        bits += 8 * sum(linear.side_bytes() for linear in group.linears)
    model = CheckedModel(shared.model, 8)
    assert model.naive_bits == pytest.approx(bits / model.body_weights)
    assert model.batch_bits == pytest.approx(bits / model.body_weights / 8)
    assert CheckedModel(shared.model, 8, free=True).batch_bits == 0
    assert 3 < model.naive_bits < 8


def test_everything_read_makes_the_check_idle(shared):
    class Full(GradedPlan):
        def levels(self, model, name, x, block):
            return model.full_levels(name, x, 3)

    full = Full(shared.params(BITS))
    found, _ = CheckedModel(shared.model, 4).states(shared.ids, full)
    torch.testing.assert_close(found, shared.model.states(shared.ids, full)[0], rtol=1e-4, atol=1e-4)


def test_who_sees_what():
    seen = visible(5, 2).int()
    assert seen[:, :5].tolist() == [[0] * 5, [0] * 5, [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert seen[:, 5:].tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]
    ]  # fmt: skip
    assert (visible(7, 3).sum(1) == torch.arange(1, 8)).all()
