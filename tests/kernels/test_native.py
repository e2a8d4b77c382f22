"""The native engine against the numpy specification: odd shapes, every instruction set, several thread counts."""

import dataclasses

import numpy as np
import pytest
from support.native import SHAPES, VARIANTS, policy, random_tokens
from support.tiny import Tiny, make_artifact

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels import reference_ops as ops
from lowtide.kernels.native import SHORT_PROMPT, Engine, available_isas
from lowtide.kernels.reference import ReferenceEngine
from lowtide.kernels.types import PolicyParams
from lowtide.rules import GroupStats, get_rule

FEATURES = {"odd": 5, "one-slice": 1, "four-slices": 64, "wide-tiles": 19}  # 16 elsewhere


@pytest.fixture(scope="module", params=sorted(SHAPES))
def artifact(request, tmp_path_factory):
    return open_artifact(
        make_artifact(
            tmp_path_factory.mktemp("native") / "a",
            SHAPES[request.param],
            policies=("channel-norm", "ipn"),
            features=FEATURES.get(request.param, 16),
        )
    )


# A last bit that differs turns the rounding of a coefficient the other way, and some layers later everything differs:
# so the engines agree on every bit, or they do not agree.
assert_close = np.testing.assert_array_equal


@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize("rule", ["channel-norm", "channel-abs", "topk", "statistical-topk", "dense", "ipn"])
def test_group_product_is_the_specification(artifact, rule, tail):
    """With inputs that are normal, and with some that are many times the rest and need several entries."""
    engines = [Engine(artifact, threads=threads, isa=isa) for isa, threads in VARIANTS]
    chosen = policy(artifact, rule, 0.25)
    body = [g for name, g in artifact.groups.items() if name != "embed"]
    features, code, reference = None, None, ReferenceEngine(artifact)
    for index, group in enumerate(body):
        draw = np.random.default_rng(index)
        x = draw.normal(0, 1.5, group.in_features).astype(np.float32)
        x *= np.exp(tail * draw.normal(0, 1, group.in_features)).astype(np.float32)
        stats = GroupStats.of(group)
        mask_rule = get_rule(rule)
        found = mask_rule.features(stats, x[None])
        features = features if found is None else found
        params = mask_rule.shift(chosen.thresholds[index], chosen.log2_offset)
        if rule == "ipn":
            params = mask_rule.waterline(stats, params, features, chosen.gains[index])
        near = mask_rule.code(stats, x[None])
        code = code if near is None else near
        middle = reference.middle(group.name, mask_rule, code)
        levels = mask_rule.member_levels(middle.stats, x[None], params, len(group.linears))
        if rule == "ipn" and group.ipn.factor is not None:  # what engines and references share is what is meant
            for own, factor in zip(levels, group.ipn.factor, strict=True):
                np.testing.assert_array_equal(own, mask_rule.levels(middle.stats, x[None], params * factor))
            assert len({int(own.sum()) for own in levels}) > 1
        first, first_bits = engines[0].group_product(index, x, chosen)
        assert first_bits == ops.group_bits(group, levels, rule == "ipn")[0]
        for linear, own, bias, y in zip(group.linears, levels, middle.bias, first, strict=True):
            planes = ops.channel_planes(ops_planes(group, linear))
            wanted = ops.graded_linear(group, linear, planes, x[None], own, middle.mean, bias)[0]
            np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())
        for engine in engines[1:]:
            outs, bits = engine.group_product(index, x, chosen)
            assert bits == first_bits
            for y, again in zip(first, outs, strict=True):
                np.testing.assert_array_equal(y, again, err_msg=f"{group.name} {engine.isa} {engine.threads} threads")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e38, 1e-38])
def test_inputs_out_of_bounds_are_those_of_the_specification(artifact, wrong):
    group = artifact.groups["layers.0.qkv"]
    x = np.linspace(-3, 3, group.in_features, dtype=np.float32)
    x[::3] = wrong
    levels = np.full((1, group.in_features), group.slices, np.int32)
    levels[:, group.exact_channels] = 0
    with np.errstate(all="ignore"):
        wanted = [
            ops.graded_linear(group, linear, ops.channel_planes(ops_planes(group, linear)), x[None], levels)[0]
            for linear in group.linears
        ]
    for isa, threads in VARIANTS:
        got, _ = Engine(artifact, threads=threads, isa=isa).group_product(0, x, policy(artifact, "dense"))
        for y, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(y, want, rtol=2e-6, equal_nan=True)


def test_gains_move_what_tokens_read(artifact):
    """Each token its own way: with gains, other bits than without, some more and some less."""
    tokens, chosen = random_tokens(artifact, 12), policy(artifact, "ipn")
    read = []
    for gains in (chosen.gains, None):
        engine = Engine(artifact, threads=1)
        still = dataclasses.replace(chosen, gains=gains)
        read.append([])
        for i, token in enumerate(tokens):
            engine.decode(int(token), i, still)
            read[-1].append(engine.group_bits())
    change = (np.stack(read[0]) - np.stack(read[1]))[:, :-1]
    assert (change > 0).any() and (change < 0).any() and len(np.unique(change[:, 0])) > 1


def test_bits_of_the_groups_are_those_of_the_last_token(artifact):
    engine, chosen = Engine(artifact, threads=1), policy(artifact, "channel-norm")
    assert engine.group_bits().tolist() == [0] * (4 * artifact.config.num_layers + 1)
    _, stats = engine.decode(1, 0, chosen, want_logits=False)
    assert engine.group_bits()[-1] == 0 and engine.group_bits().sum() == stats.body_bits
    _, stats = engine.decode(2, 1, chosen)
    embedding = ops.embedding_bits(artifact.groups["head" if artifact.config.tied else "embed"])
    assert engine.group_bits().sum() == stats.body_bits + stats.head_bits - embedding


def ops_planes(group, linear):
    from lowtide.format.codec import digit_planes

    return digit_planes(linear.weight, linear.out_features, group.in_features)


def test_nothing_read_leaves_bias_outliers_and_exact_channels(artifact):
    engine = Engine(artifact, threads=1)
    nothing = dataclasses.replace(policy(artifact, "channel-norm"), log2_offset=100.0)
    group = artifact.groups["layers.0.gate_up"]
    x = np.random.default_rng(0).normal(0, 1, group.in_features).astype(np.float32)
    outs, bits = engine.group_product(2, x, nothing)
    assert bits == 8 * group.side_bytes()
    for i, linear in enumerate(group.linears):
        wanted = group.exact_part(i) @ (x - group.mean.astype(np.float32)) + linear.bias.astype(np.float32)
        np.testing.assert_allclose(outs[i], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [(0, 0), (1, 0), (0.7, 0.4), (2, 1e6)])
@pytest.mark.parametrize("rule", ["channel-norm", "gate", "topk", "dense", "ipn"])
def test_decode_is_the_reference(artifact, rule, head):
    """Logits and bits of a text, the head read once or twice."""
    tokens = random_tokens(artifact, 21 if head == (0, 0) else 5)
    chosen = dataclasses.replace(policy(artifact, rule), head_offset=head[0], head_margin=head[1])
    reference = ReferenceEngine(artifact)
    wanted, stats = reference.decode_many(tokens, 0, chosen)
    results = []
    for isa, threads in VARIANTS:
        engine = Engine(artifact, threads=threads, isa=isa)
        results.append([engine.decode(int(t), i, chosen) for i, t in enumerate(tokens)])
        np.testing.assert_array_equal(engine.group_bits(), reference.group_bits())
        assert engine.group_bits()[:-1].sum() == results[-1][-1][1].body_bits
    logits = np.stack([row for row, _ in results[0]])
    assert_close(logits, wanted)
    assert [s for _, s in results[0]] == stats
    for other in results[1:]:
        for (a, sa), (b, sb) in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
            assert sa == sb


def test_prefill_is_the_reference(artifact):
    tokens = random_tokens(artifact)
    wanted = ReferenceEngine(artifact).prefill(tokens, 0, all_logits=True)
    for isa, threads in VARIANTS:
        engine = Engine(artifact, threads=threads, isa=isa)
        got = engine.prefill(tokens, 0, all_logits=True)
        assert_close(got, wanted)
        np.testing.assert_array_equal(engine.prefill(tokens, 0), got[-1])


def test_prefill_in_pieces_and_over_chunk_borders(tmp_path):
    artifact = open_artifact(make_artifact(tmp_path / "a", Tiny(max_position=256)))
    tokens = random_tokens(artifact, 230)
    engine = Engine(artifact, threads=2)
    whole = engine.prefill(tokens, 0, all_logits=True)
    assert_close(whole, ReferenceEngine(artifact).prefill(tokens, 0, True))
    engine.prefill(tokens[:101], 0)
    np.testing.assert_array_equal(engine.prefill(tokens[101:], 101), whole[-1])


def test_a_cache_of_eight_bits_is_the_reference(artifact):
    tokens, chosen = random_tokens(artifact), policy(artifact, "channel-norm")
    wanted, stats = ReferenceEngine(artifact, cache_bits=8).decode_many(tokens, 0, chosen)
    for isa, threads in VARIANTS:
        engine = Engine(artifact, threads=threads, isa=isa, cache_bits=8)
        got = [engine.decode(int(t), i, chosen) for i, t in enumerate(tokens)]
        np.testing.assert_array_equal([row for row, _ in got], wanted, err_msg=f"{isa} {threads}")
        assert [read for _, read in got] == stats
    with pytest.raises(LowtideError, match="--cache-bits 4: must be 16 or 8"):
        Engine(artifact, cache_bits=4)


def test_a_short_prompt_is_decoded_with_every_slice(artifact):
    tokens, engine = random_tokens(artifact, SHORT_PROMPT), Engine(artifact)
    wanted = [engine.decode(int(t), i, policy(artifact, "dense"))[0] for i, t in enumerate(tokens)]
    np.testing.assert_array_equal(engine.prefill(tokens, 0, all_logits=True), wanted)
    np.testing.assert_array_equal(engine.prefill(tokens, 0), wanted[-1])


def test_decode_goes_on_after_prefill(artifact):
    tokens, dense = random_tokens(artifact), policy(artifact, "dense")
    engine, reference = Engine(artifact), ReferenceEngine(artifact)
    engine.prefill(tokens[:-1], 0)
    reference.prefill(tokens[:-1], 0)
    got, _ = engine.decode(int(tokens[-1]), len(tokens) - 1, dense)
    wanted, _ = reference.decode(int(tokens[-1]), len(tokens) - 1, dense)
    np.testing.assert_allclose(got, wanted, atol=0.03 * np.abs(wanted).max())


def test_positions_can_be_rewritten(tiny_artifact):
    artifact = open_artifact(tiny_artifact)
    tokens, chosen = random_tokens(artifact, 6), policy(artifact, "channel-norm")
    engine = Engine(artifact)
    first = [engine.decode(int(t), i, chosen)[0] for i, t in enumerate(tokens)]
    for other in (5, 7, 9):
        engine.decode(other, 3, chosen)
    again = [engine.decode(int(tokens[i]), i, chosen)[0] for i in range(3, 6)]
    np.testing.assert_array_equal(again, first[3:])


def test_bad_calls_are_told_in_one_line(tiny_artifact, monkeypatch):
    artifact = open_artifact(tiny_artifact)
    engine = Engine(artifact, max_context=8)
    chosen = policy(artifact, "dense")
    for call, words in [
        (lambda: engine.decode(artifact.config.vocab_size, 0, chosen), "tokens must be"),
        (lambda: engine.decode(-1, 0, chosen), "tokens must be"),
        (lambda: engine.decode(0, 8, chosen), "outside the context of 8"),
        (lambda: engine.prefill([], 0), "tokens must be"),
        (lambda: engine.prefill([1] * 9, 0), "outside the context of 8"),
        (lambda: engine.decode(0, 0, dataclasses.replace(chosen, rule="best")), "unknown mask rule 'best'"),
        (lambda: engine.decode(0, 0, dataclasses.replace(chosen, thresholds=chosen.thresholds[1:])), "must have shape"),
        (lambda: Engine(artifact, threads=0), "--threads 0"),
        (lambda: Engine(artifact, max_context=10**6), "max_context 1000000"),
        (lambda: Engine(artifact, isa="sse9"), "isa=sse9: not available"),
    ]:
        with pytest.raises(LowtideError, match=words):
            call()
    monkeypatch.setenv("LOWTIDE_ISA", "altivec")
    with pytest.raises(LowtideError, match="LOWTIDE_ISA=altivec: not available on this machine; it has"):
        Engine(artifact)
    engine.close()
    engine.close()
    with pytest.raises(LowtideError, match="closed"):
        engine.decode(0, 0, chosen)


def test_the_rule_ipn_wants_a_network_and_its_gains(tiny_artifact, tmp_path):
    plain = open_artifact(tiny_artifact)
    rows = 4 * plain.config.num_layers + 1
    chosen = PolicyParams("ipn", np.zeros((rows, 3), np.float32))
    for engine in (Engine(plain, threads=1), ReferenceEngine(plain)):
        with pytest.raises(LowtideError, match="rule ipn: the artifact has no importance prediction network"):
            engine.decode(1, 0, chosen)
    artifact = open_artifact(make_artifact(tmp_path / "a", policies=("ipn",)))
    with pytest.raises(LowtideError, match=rf"gains must have shape \({rows},\), not \(2,\)"):
        Engine(artifact, threads=1).decode(1, 0, dataclasses.replace(chosen, gains=np.zeros(2, np.float32)))


def test_environment_forces_an_instruction_set(tiny_artifact, monkeypatch):
    artifact = open_artifact(tiny_artifact)
    for isa in available_isas():
        monkeypatch.setenv("LOWTIDE_ISA", isa)
        assert Engine(artifact).isa == isa


def test_read_bandwidth_is_measured(tiny_artifact):
    assert Engine(open_artifact(tiny_artifact), threads=1).read_bandwidth(1 << 24, 2) > 1e8


def test_a_sequence_keeps_nothing_of_the_policies_before(artifact):
    """What the call of one token left in the native structures does not reach the next one's."""
    gains, fewer = policy(artifact, "ipn", 0.3), policy(artifact, "channel-norm")
    fewer = dataclasses.replace(fewer, thresholds=fewer.thresholds[:, :1], head_offset=1.0, head_margin=0.5)
    policies = [gains, dataclasses.replace(gains, gains=None), fewer, policy(artifact, "channel-norm"), gains]
    used, token = Engine(artifact, threads=1, max_context=8), 5
    for chosen in policies:
        fresh = Engine(artifact, threads=1, max_context=8)
        logits, stats = used.decode(token, 0, chosen)
        wanted, expected = fresh.decode(token, 0, chosen)
        assert np.array_equal(logits, wanted) and stats == expected
        fresh.close()
    used.close()


def test_a_moved_policy_is_the_same_but_for_its_offset(artifact):
    chosen = dataclasses.replace(policy(artifact, "ipn"), bits=3.0, head_offset=2.5, head_margin=4.0)
    assert chosen.moved(0.75) == dataclasses.replace(chosen, log2_offset=0.75)
