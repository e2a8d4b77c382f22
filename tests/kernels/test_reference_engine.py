"""The reference engine against the dense model, against itself, and its bookkeeping by hand."""

from dataclasses import replace

import numpy as np
import pytest
from support.tiny import DEFAULT, ODD, make_artifact
from support.twin import make_twins

from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.reader import open_artifact
from lowtide.kernels import reference_ops as ops
from lowtide.kernels.native import SHORT_PROMPT
from lowtide.kernels.reference import ReferenceEngine
from lowtide.kernels.types import PolicyParams
from lowtide.rules import get_rule

f32 = np.float32


def policy_of(artifact, rule="channel-norm", cuts=(0.05, 0.3, 1.2), offset=0.0):
    rows = len([name for name in artifact.groups if name != "embed"])
    return PolicyParams(rule, np.tile(f32(cuts[: artifact.manifest.slices]), (rows, 1)), offset)


@pytest.fixture(params=["tied llama", "untied qwen2", "odd sizes"])
def twins(request, tmp_path):
    base, options = {
        "tied llama": (DEFAULT, {}),
        "untied qwen2": (DEFAULT, {"tied": False, "qkv_bias": True, "slices": 2}),
        "odd sizes": (ODD, {"slices": 4}),
    }[request.param]
    path, source = make_twins(tmp_path / "twin.lowtide", base, **options)
    return open_artifact(path), source


def log_probabilities(logits):
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


TOKENS = np.array([1, 50, 7, 99, 23, 23, 64, 12, 5, 88, 31, 2, 77, 3, 90, 41], np.int32)


def unrounded(group, index, x):
    """`ops.dense_linear` without the rounding of its inputs."""
    weight = group.dequantise(index, group.slices) + group.exact_part(index)
    return (x - group.mean.astype(f32)) @ weight.T + group.linears[index].bias.astype(f32)


def test_prefill_equals_the_dense_model(twins, monkeypatch):
    torch = pytest.importorskip("torch")
    from lowtide.compress.dense import DenseModel

    artifact, source = twins
    logits = DenseModel(source).logits(torch.from_numpy(TOKENS.astype(np.int64))[None])[0].numpy()
    want = log_probabilities(logits)
    engine = ReferenceEngine(artifact)
    rounded = np.abs(log_probabilities(engine.prefill(TOKENS, 0, all_logits=True)) - want).max()
    with monkeypatch.context() as patched:
        patched.setattr(ops, "dense_linear", unrounded)
        unrounded_ = np.abs(log_probabilities(engine.prefill(TOKENS, 0, all_logits=True)) - want).max()
    assert unrounded_ < 5e-3  # float16 KV cache
    assert unrounded_ < rounded < 0.25


def test_prefill_in_pieces(twins):
    engine = ReferenceEngine(twins[0])
    twice = np.concatenate([TOKENS, TOKENS])
    got = engine.prefill(twice, 0, all_logits=True)
    np.testing.assert_array_equal(engine.prefill(twice, 0), got[-1])
    engine.prefill(twice[:13], 0)
    np.testing.assert_array_equal(engine.prefill(twice[13:], 13), got[-1])


def test_short_prompts_are_decoded(twins):
    engine = ReferenceEngine(twins[0])
    want = [engine.decode(int(t), i, policy_of(twins[0], "dense"))[0] for i, t in enumerate(TOKENS[:SHORT_PROMPT])]
    np.testing.assert_array_equal(engine.prefill(TOKENS[:SHORT_PROMPT], 0, all_logits=True), want)
    np.testing.assert_array_equal(engine.prefill(TOKENS[:SHORT_PROMPT], 0), want[-1])
    longer = engine.prefill(TOKENS[: SHORT_PROMPT + 1], 0, all_logits=True)
    assert np.abs(longer[0] - want[0]).max() > 0


def head_bits(artifact, **head):
    """Logits of a text, and what its last token read of the head."""
    engine, chosen = ReferenceEngine(artifact), replace(policy_of(artifact), **head)
    logits = [engine.decode(int(t), i, chosen)[0] for i, t in enumerate(TOKENS)]
    return np.stack(logits), engine.group_bits()[-1]


def test_a_head_read_twice_agrees_where_it_was_read_again(twins):
    """Tiles with a leading candidate have the logits of a fine reading, the others those of a coarse one."""
    artifact, _ = twins
    fine, fine_bits = head_bits(artifact)
    coarse, coarse_bits = head_bits(artifact, head_offset=1.0, head_margin=-1.0)
    both, both_bits = head_bits(artifact, head_offset=1.0, head_margin=0.3)
    assert coarse_bits < fine_bits
    again = np.zeros(both.shape, bool)
    for first, width in codec.tiles(both.shape[1]):
        part = slice(first, first + width)
        again[:, part] = (coarse[:, part].max(1) >= coarse.max(1) - np.float32(0.3))[:, None]
    assert again.any() and not again.all()
    np.testing.assert_array_equal(both, np.where(again, fine, coarse))
    rows = again[-1].sum()
    side = 8 * artifact.groups["head"].side_bytes()
    assert both_bits == coarse_bits + (fine_bits - side) * rows // both.shape[1]


def test_a_wide_margin_reads_the_whole_head_again(twins):
    artifact, _ = twins
    fine, fine_bits = head_bits(artifact)
    both, both_bits = head_bits(artifact, head_offset=1.0, head_margin=1e6)
    np.testing.assert_array_equal(both, fine)
    assert both_bits > fine_bits


def test_a_full_read_decodes_close_to_the_dense_prefill(twins):
    artifact, _ = twins
    engine = ReferenceEngine(artifact)
    want = log_probabilities(engine.prefill(TOKENS, 0, all_logits=True))
    got = [engine.decode(int(t), i, policy_of(artifact, "dense"))[0] for i, t in enumerate(TOKENS)]
    difference = np.abs(log_probabilities(got) - want)
    assert 0 < difference.max() < 0.2
    masked = [engine.decode(int(t), i, policy_of(artifact))[0] for i, t in enumerate(TOKENS)]
    assert np.abs(log_probabilities(masked) - want).mean() > 3 * difference.mean()


@pytest.mark.parametrize("rule", ["channel-norm", "topk", "gate"])
def test_decode_many_equals_single_steps(twins, rule):
    artifact, _ = twins
    policy = policy_of(artifact, rule, (30.2, 20, 8, 1) if rule == "topk" else (0.05, 0.3, 0.7, 1.2))
    many, many_stats = ReferenceEngine(artifact).decode_many(TOKENS, 0, policy)
    engine = ReferenceEngine(artifact)
    for i, token in enumerate(TOKENS):
        logits, stats = engine.decode(int(token), i, policy)
        np.testing.assert_array_equal(logits, many[i])
        assert stats == many_stats[i]


def test_stats_of_a_full_read(twins):
    artifact, _ = twins
    c, groups = artifact.config, artifact.groups
    engine = ReferenceEngine(artifact)
    _, stats = engine.decode(5, 0, policy_of(artifact, "dense"))

    def full(g):
        return (
            2 * g.slices * (g.in_features - len(g.exact_channels)) * sum(m.out_features for m in g.linears)
            + 8 * g.side_bytes()
        )

    assert stats.body_bits == sum(full(g) for name, g in groups.items() if name.startswith("layers."))
    row = 2 * groups["head"].slices * c.hidden_size + 16 * c.hidden_size + 16
    assert stats.head_bits == full(groups["head"]) + row
    cache = 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim
    assert stats.bytes_read == -(-(stats.body_bits + stats.head_bits) // 8) + cache
    _, later = engine.decode(5, 1, policy_of(artifact, "dense"))
    assert later.bytes_read == stats.bytes_read + cache
    logits, without = engine.decode(5, 0, policy_of(artifact, "dense"), want_logits=False)
    assert logits.shape == (0,) and without.head_bits == row and without.body_bits == stats.body_bits


def test_an_offset_reads_less_and_nothing_read_leaves_side_data(twins):
    artifact, _ = twins
    engine = ReferenceEngine(artifact)
    read = [engine.decode(5, 0, policy_of(artifact, offset=o))[1].body_bits for o in (-1, 0, 1)]
    assert read[0] > read[1] > read[2]
    _, stats = engine.decode(5, 0, policy_of(artifact, cuts=(np.inf,) * 4))
    assert stats.body_bits == 8 * sum(
        g.side_bytes() for name, g in artifact.groups.items() if name.startswith("layers.")
    )


def test_each_group_follows_its_own_row_of_the_policy(twins):
    artifact, _ = twins
    engine = ReferenceEngine(artifact)
    silent = policy_of(artifact, cuts=(np.inf,) * 4)
    _, base = engine.decode(5, 0, silent)
    for row, (name, group) in enumerate((n, g) for n, g in artifact.groups.items() if n != "embed"):
        cuts = silent.thresholds.copy()
        cuts[row, 0] = 0
        _, stats = engine.decode(5, 0, PolicyParams("channel-norm", cuts))
        read = 2 * (group.in_features - len(group.exact_channels)) * sum(m.out_features for m in group.linears)
        grown = (stats.body_bits - base.body_bits, stats.head_bits - base.head_bits)
        assert grown == ((0, read) if name == "head" else (read, 0)), name


def test_positions_may_be_rewritten(twins):
    artifact, _ = twins
    engine, policy = ReferenceEngine(artifact), policy_of(artifact)
    first = [engine.decode(int(t), i, policy)[0] for i, t in enumerate(TOKENS[:6])]
    engine.decode(3, 2, policy)
    again = [engine.decode(int(t), i, policy)[0] for i, t in enumerate(TOKENS[:6])]
    np.testing.assert_array_equal(first, again)
    other = [engine.decode(int(t), i, policy)[0] for i, t in enumerate([*TOKENS[:5], 3])]
    assert np.abs(other[-1] - first[-1]).max() > 1e-3


def test_keys_and_values_are_rounded_to_float16(twins):
    artifact, _ = twins
    engine = ReferenceEngine(artifact)
    engine.prefill(TOKENS, 0)
    assert engine._keys[0].data.dtype == engine._values[0].data.dtype == np.float16
    assert engine._keys[0].data.shape == (len(TOKENS), artifact.config.num_kv_heads, artifact.config.head_dim)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, p: e.decode(10**6, 0, p), "token 1000000"),
        (lambda e, p: e.decode(-1, 0, p), "token -1"),
        (lambda e, p: e.decode(1, 64, p), "the context holds 64"),
        (lambda e, p: e.decode(1, 3, p), "only 0 positions"),
        (lambda e, p: e.prefill([], 0), "no tokens"),
        (lambda e, p: e.prefill([1] * 65, 0), "the context holds 64"),
        (lambda e, p: e.decode(1, 0, PolicyParams("magic", p.thresholds)), "unknown mask rule 'magic'"),
        (lambda e, p: e.decode(1, 0, PolicyParams("channel-norm", p.thresholds[:1])), "thresholds for 1 groups"),
    ],
)
def test_wrong_calls_are_refused(tiny_artifact, call, message):
    artifact = open_artifact(tiny_artifact)
    with pytest.raises(LowtideError, match=message):
        call(ReferenceEngine(artifact), policy_of(artifact))


def test_context_is_bounded(tiny_artifact):
    artifact = open_artifact(tiny_artifact)
    with pytest.raises(LowtideError, match="max_context 65: must be 1 to 64"):
        ReferenceEngine(artifact, max_context=65)
    with pytest.raises(LowtideError, match="the context holds 4"):
        ReferenceEngine(artifact, max_context=4).prefill([1] * 5, 0)


GROUPS = ("qkv", "o", "gate_up", "down")


@pytest.mark.parametrize("probe, served, other", [("qkv", "o", "down"), ("gate_up", "down", "o")])
@pytest.mark.parametrize("bias, offset", [(1, 2.0), (3, 4.0)])
def test_a_probe_serves_its_own_group_and_the_next(tmp_path, monkeypatch, probe, served, other, bias, offset):
    """A probe that says nothing but its bias, and a mix that makes twice that of it, held within 4."""
    artifact = open_artifact(make_artifact(tmp_path / "a", policies=("ipn",), layers=1, features=2, exact=0))
    for name in GROUPS:
        ipn = artifact.groups[f"layers.0.{name}"].ipn
        ipn.mix = f32([2, 100, 0]) if name in (served, other) else f32([0, 0, 0])
        if ipn.probe is not None:  # the second feature is below zero: 0
            ipn.scale, ipn.bias = f32([0, 0]), f32([bias if name == probe else 0, -5])
    seen, original = {}, ops.graded_linear

    def watched(group, linear, planes, x, levels, *middle):
        seen[group.name] = x, levels
        return original(group, linear, planes, x, levels, *middle)

    monkeypatch.setattr(ops, "graded_linear", watched)
    thresholds = np.tile(f32([0.4, 0.8, 1.6]), (5, 1))
    engine = ReferenceEngine(artifact)
    _, stats = engine.decode(3, 0, PolicyParams("ipn", thresholds, 0.25, np.full(5, 0.5, f32)))
    for name in GROUPS:
        group = artifact.groups[f"layers.0.{name}"]
        x, levels = seen[group.name]
        score = np.abs(x - group.mean.astype(f32)) * group.ipn.importance.astype(f32)
        cuts = thresholds[0] * 2 ** (0.25 - 0.5 * offset * (name == served))
        np.testing.assert_array_equal(levels, (score[..., None] > cuts).sum(-1))
        rows = sum(linear.out_features for linear in group.linears)
        bits = 2 * rows * levels.sum() + 8 * group.side_bytes(ipn=True)
        assert engine.group_bits()[GROUPS.index(name)] == bits
    assert engine.group_bits()[:4].sum() == stats.body_bits
    embedding = ops.embedding_bits(artifact.groups["head"])
    assert engine.group_bits()[4] == stats.head_bits - embedding


@pytest.mark.parametrize("base, centroids", [(DEFAULT, 5), (ODD, 64)])
def test_a_full_read_from_centroids_is_the_dense_product(tmp_path, base, centroids):
    """What is left of an input and what its centroid's product says are together what the mean's say."""
    artifact = open_artifact(make_artifact(tmp_path / "a", base, policies=("ipn",), centroids=centroids))
    engine, rule = ReferenceEngine(artifact), get_rule("ipn")
    rng, used = np.random.default_rng(0), set()
    code = None
    for name, group in artifact.groups.items():
        if name == "embed":
            continue
        x = rng.normal(0, 1, (40, group.in_features)).astype(f32)
        near = rule.code(engine.group(name)[1], x)
        code = code if near is None else near
        used.update(code.tolist())
        middle = engine.middle(name, rule, code)
        assert not middle.mean[:, group.exact_channels].any()
        levels = rule.levels(middle.stats, x, f32([-1] * group.slices))
        for i, (linear, bias) in enumerate(zip(group.linears, middle.bias, strict=True)):
            args = (group, linear, engine.digits(group, linear), x, levels)
            got, plain = ops.graded_linear(*args, middle.mean, bias), ops.graded_linear(*args)
            wanted = unrounded(group, i, x)
            error = np.abs(got - wanted)
            assert error.max() < 0.1 and error.mean() < 1.5 * np.abs(plain - wanted).mean() + 1e-3
    assert len(used) > min(centroids, 20) / 2


def test_full_reads_from_centroids_are_close_to_the_dense_model(tmp_path):
    artifact = open_artifact(make_artifact(tmp_path / "a", policies=("ipn",), centroids=5))
    dense, all_read = policy_of(artifact, "dense"), policy_of(artifact, "ipn", (-1, -1, -1))
    (want, read), (got, more) = (ReferenceEngine(artifact).decode_many(TOKENS, 0, p) for p in (dense, all_read))
    difference = np.abs(log_probabilities(got) - log_probabilities(want))
    assert 0 < difference.max() < 0.3
    body = [g for name, g in artifact.groups.items() if name != "head"]
    side = 8 * sum(g.side_bytes(ipn=True) - g.side_bytes() for g in body)
    assert [m.body_bits - r.body_bits for m, r in zip(more, read, strict=True)] == [side] * len(TOKENS)


@pytest.mark.parametrize("centroids", [0, 64])
def test_tokens_known_beforehand_move_by_themselves(tmp_path, centroids):
    artifact = open_artifact(make_artifact(tmp_path / "a", ODD, policies=("ipn",), centroids=centroids))
    policy = replace(policy_of(artifact, "ipn"), gains=f32([0.8, 0.6, 0.4, 0.2, 0]))
    many, stats = ReferenceEngine(artifact).decode_many(TOKENS, 0, policy)
    engine = ReferenceEngine(artifact)
    for i, token in enumerate(TOKENS):
        logits, read = engine.decode(int(token), i, policy)
        np.testing.assert_array_equal(logits, many[i])
        assert read == stats[i]
    assert len({s.body_bits for s in stats}) > 4
