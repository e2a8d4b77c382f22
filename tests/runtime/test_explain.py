"""What was read and why: the watched pass against the engines, single weights against brute force."""

import math

import numpy as np
import pytest
from support.tiny import ODD, make_artifact

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels import native
from lowtide.kernels.reference import ReferenceEngine
from lowtide.rules import get_rule
from lowtide.rules.ipn import LIMIT
from lowtide.runtime.budget import body_weights, policy_params
from lowtide.runtime.explain import DETAILED, TOP, confidence, detailed, explain, sig, token_texts
from lowtide.runtime.explain_data import KINDS, MATRICES
from lowtide.runtime.explain_trace import Columns, Tracer, strongest, top
from lowtide.runtime.model import load_tokenizer

TEXT = "the tide went out"
POLICIES = ("channel-norm", "topk", "statistical-topk", "channel-norm:0,4", "gate")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """An artifact with every kind of rule but ipn."""
    return make_artifact(tmp_path_factory.mktemp("explain") / "several.lowtide", policies=POLICIES)


@pytest.fixture(scope="module")
def with_ipn(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("explain") / "ipn.lowtide", policies=("ipn", "channel-norm"))


def trace(path, policy=None, bits=5.0, ids=None):
    """All readings of a text, in order, and the open artifact."""
    artifact = open_artifact(path)
    ids = load_tokenizer(artifact).encode(TEXT) if ids is None else ids
    readings = []
    tracer = Tracer(artifact)
    tracer.trace(ids, 0, policy_params(artifact, policy, bits), readings.append)
    return artifact, tracer, readings


@pytest.mark.parametrize("policy", [*POLICIES, "dense"])
def test_bits_are_those_that_the_native_engine_reads(several, policy):
    bits = None if policy == "dense" else 5.0
    found = explain(several, TEXT, bits, None if policy == "dense" else policy, generate=5)
    artifact = open_artifact(several)
    engine, params = native.Engine(artifact), policy_params(artifact, None if policy == "dense" else policy, bits)
    weights = np.asarray(found.kind_weights)
    assert weights.sum() * 2 == body_weights(artifact)
    for token, read in zip(found.tokens, found.bits, strict=True):
        logits, stats = engine.decode(token.id, token.index, params)
        assert token.bits == pytest.approx(stats.body_bits / body_weights(artifact), rel=1e-3)
        assert (np.asarray(read) * weights).sum() == pytest.approx(stats.body_bits, rel=1e-3)
        assert token.expects_p == pytest.approx(np.exp(logits - logits.max()).sum() ** -1, rel=1e-2)
    engine.close()
    assert found.policy == policy
    assert found.mean_bits == pytest.approx(np.mean([t.bits for t in found.tokens]), rel=1e-3)


@pytest.mark.parametrize("rule", ["ipn", "channel-norm"])
def test_inputs_are_measured_from_their_centroids_under_ipn(tmp_path, rule):
    """o and down from those of qkv and gate_up."""
    path = make_artifact(tmp_path / "a", ODD, policies=("ipn", "channel-norm"), centroids=5)
    artifact, tracer, readings = trace(path, rule)
    own, code, used = get_rule(rule), None, set()
    for reading in readings:
        group, stats = tracer.group(reading.group.name)
        if rule == "channel-norm":
            np.testing.assert_array_equal(reading.mean, group.mean.astype(np.float32))
            continue
        near = own.code(stats, reading.x)
        code = code if near is None else near
        used.update(code.tolist())
        mean = artifact.centroids()[group.name].mean[code].astype(np.float32)
        np.testing.assert_array_equal(reading.mean, mean)
        score = np.abs(reading.x - mean) * group.ipn.importance.astype(np.float32)
        np.testing.assert_array_equal(reading.score, score)
        np.testing.assert_array_equal(reading.only([1, 0]).mean, mean[[1, 0]])
    assert rule == "channel-norm" or len(used) > 1


@pytest.mark.parametrize("policy", ["ipn", "channel-norm"])
def test_bits_of_each_group_are_those_of_the_native_engine(with_ipn, policy):
    found = explain(with_ipn, TEXT, 4.5, policy)
    artifact = open_artifact(with_ipn)
    engine, params = native.Engine(artifact), policy_params(artifact, policy, 4.5)
    for token, read in zip(found.tokens, found.bits, strict=True):
        engine.decode(token.id, token.index, params)
        expected = engine.group_bits()[:-1].reshape(2, 4) / found.kind_weights
        assert np.asarray(read) == pytest.approx(expected, rel=1e-3)
    engine.close()


def test_long_texts_go_through_in_parts_and_describe_the_extremes(tmp_path):
    path = make_artifact(tmp_path / "a", max_position=256)
    text = "the tide is in and the sand is under it, " * 4
    found = explain(path, text, 5.0, token=70)
    assert len(found.tokens) > 2 * DETAILED
    assert len(found.details) == DETAILED
    assert {str(i) for i in (70, *found.hardest, *found.easiest)} <= set(found.details)
    artifact, engine = open_artifact(path), ReferenceEngine(open_artifact(path))
    ids = load_tokenizer(artifact).encode(text)
    _, stats = engine.decode_many(ids, 0, policy_params(artifact, None, 5.0), False)
    assert [t.bits for t in found.tokens] == pytest.approx(
        [s.body_bits / body_weights(artifact) for s in stats], rel=1e-3
    )
    assert all(layer["weights"] and all(layer["channels"]) for d in found.details.values() for layer in d["layers"])


def test_where_q_k_and_v_differ_the_page_shows_the_one_that_reads_most(tmp_path):
    path = make_artifact(tmp_path / "a", policies=("ipn",), factors=True)
    found, (_, _, readings) = explain(path, TEXT, 5.0), trace(path)
    reading = next(r for r in readings if r.index == 0)
    for t, detail in found.details.items():
        q, k, v = (own[int(t)] for own in reading.levels)
        assert (q <= k).all() and (k <= v).all() and q.sum() < v.sum()
        entry = detail["layers"][0]
        assert entry["levels"][0] == [np.count_nonzero(v == level) for level in range(4)]
        assert all(level == v[c] for c, level, _ in entry["channels"][0])


CENTROIDS = {"policies": ("ipn",), "centroids": 5, "factors": True}


@pytest.mark.parametrize("options", [{}, {"zero": True}, {"exact": 0, "outliers": 0.0}, {"base": ODD}, CENTROIDS])
def test_the_strongest_weights_are_those_of_brute_force(tmp_path, options):
    _, tracer, readings = trace(make_artifact(tmp_path / "a", **options))
    for reading in readings:
        group = reading.group
        a = reading.x - (reading.mean if "centroids" in options else group.mean.astype(np.float32))
        for m, linear in enumerate(group.linears):
            read = np.stack([group.dequantise(m, level) for level in range(group.slices + 1)])
            columns = Columns(group, linear, tracer.digits(group, linear))
            found = strongest(columns, columns.peaks(), reading, m, 3)
            for t, levels in enumerate(reading.levels[m]):
                at = read[levels, :, np.arange(group.in_features)].T + group.exact_part(m)
                product = at * a[t]
                best = np.sort(np.abs(product).ravel())[::-1][:3]
                assert [abs(f.product) for f in found[t]] == pytest.approx(best[best > 0], rel=1e-5)
                for f in found[t]:
                    assert product[f.row, f.channel] == pytest.approx(f.product, rel=1e-5)
                    stored = group.exact_part(m)[f.row, f.channel] != 0
                    assert f.bits == (16 if stored else 2 * levels[f.channel])


def test_details_are_what_the_rule_saw(several):
    found = explain(several, TEXT, 5.0)
    _, _, readings = trace(several)
    assert found.chosen == found.hardest[0] == int(np.argmax([t.bits for t in found.tokens]))
    for t, detail in found.details.items():
        for reading in readings:
            layer, kind = divmod(reading.index, 4)
            entry = detail["layers"][layer]
            score, levels = reading.score[int(t)], reading.levels[0][int(t)]
            assert [c for c, _, _ in entry["channels"][kind]] == np.argsort(-score, kind="stable")[:TOP].tolist()
            assert all(level == levels[c] and s == sig(score[c]) for c, level, s in entry["channels"][kind])
            assert entry["levels"][kind] == [np.count_nonzero(levels == v) for v in range(4)]
        assert {MATRICES[w[0]] for w in entry["weights"]} == set(MATRICES)
        parts = [r.score[int(t)] / r.score[int(t)].sum() for r in readings if r.index % 2 == 0]
        mean = np.mean(parts, axis=0)
        assert dict(detail["residual"]) == pytest.approx({c: mean[c] for c in np.argsort(-mean)[:TOP]}, rel=1e-2)


def test_rules_without_a_score_of_their_own_rank_channels_by_channel_norm(several):
    ranked = {
        policy: explain(several, TEXT, 6.0, policy).details["0"]["layers"][0] for policy in ("gate", "channel-norm")
    }
    first = KINDS.index("qkv")
    names = {policy: [c for c, _, _ in layer["channels"][first]] for policy, layer in ranked.items()}
    assert names["gate"] == names["channel-norm"]


def test_the_offset_is_the_sum_of_what_drove_it(with_ipn):
    artifact, tracer, readings = trace(with_ipn, "ipn")
    inside = 0
    for reading in readings:
        layer, kind = divmod(reading.index, 4)
        probe = artifact.groups[f"layers.{layer}.{'qkv' if kind < 2 else 'gate_up'}"].ipn
        mix = reading.group.ipn.mix
        x = readings[reading.index - kind % 2].x
        value = x @ probe.probe.T.astype(np.float32) * probe.scale + probe.bias
        rest = (np.maximum(value, 0) > 0) @ (mix[:-1] * probe.bias) + mix[-1]
        total = reading.drivers.sum(axis=1) + rest
        assert reading.offset == pytest.approx(np.clip(total, -LIMIT, LIMIT), abs=1e-4)
        inside += np.count_nonzero(np.abs(total) < LIMIT)
    assert inside > 20
    found = explain(with_ipn, TEXT, 5.0)
    gains = np.asarray(found.gains)
    for token in found.tokens:
        offsets = np.asarray([layer["offsets"] for layer in found.details[str(token.index)]["layers"]])
        assert token.offset == pytest.approx((gains * offsets).mean(), rel=0.02, abs=0.01)
        assert len(token.drivers) == TOP


def test_other_rules_have_no_offset(with_ipn):
    found = explain(with_ipn, TEXT, 5.0, "channel-norm")
    assert found.gains is None
    assert found.tokens[0].offset is None
    assert "offsets" not in found.details["0"]["layers"][0]


def test_generated_tokens_are_the_likeliest_and_are_masked_too(several):
    found = explain(several, TEXT, 5.0, generate=6)
    made = [t for t in found.tokens if t.generated]
    assert [t.index for t in made] == list(range(found.prompt_tokens, len(found.tokens)))
    assert 0 < len(made) <= 6
    for before, token in zip(found.tokens[found.prompt_tokens - 1 :], made, strict=False):
        assert before.expects == token.text


def test_generation_ends_where_the_model_ends(several, monkeypatch):
    class Ends(ReferenceEngine):
        def decode(self, token, pos, policy, want_logits=True):
            logits, stats = super().decode(token, pos, policy, want_logits)
            return np.eye(1, len(logits), 2 if pos > 14 else 40, dtype=np.float32)[0], stats

    monkeypatch.setattr(native, "Engine", Ends)
    found = explain(several, TEXT, 5.0, generate=12)
    assert len(found.tokens) == 16
    assert found.tokens[-1].expects == "</s>"


def test_confidence_of_known_distributions():
    flat = confidence(np.zeros(8, np.float32))
    assert flat["entropy"] == pytest.approx(math.log(8))
    assert (flat["margin"], flat["expects"]) == (0, 0)
    p = np.array([0.1, 0.6, 0.05, 0.25])
    known = confidence(np.log(p).astype(np.float32) + 50)
    assert known["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    assert known["margin"] == pytest.approx(0.35, rel=1e-5)
    assert (known["expects"], known["expects_p"]) == (1, pytest.approx(0.6, rel=1e-5))
    sure = confidence(np.eye(1, 9, 3, dtype=np.float32)[0] * 1000)
    assert (sure["entropy"], sure["margin"]) == (0, 1)


def test_top_takes_the_largest_and_of_equal_ones_the_first():
    values = np.array([[1, 5, 3, 5, 0], [2, 2, 2, 2, 2]], np.float32)
    assert top(values, 3).tolist() == [[1, 3, 2], [0, 1, 2]]
    assert top(values, 9).tolist() == [[1, 3, 2, 0, 4], [0, 1, 2, 3, 4]]


def test_the_tokens_described_in_a_long_text():
    assert detailed([3.0, 1.0, 2.0], 1) == [0, 1, 2]
    read = list(np.random.default_rng(0).permutation(500))
    chosen = read.index(250)
    found = detailed(read, chosen)
    order = np.argsort(read)
    assert len(found) == len(set(found)) == DETAILED
    assert set(found) == {chosen, *order[-31:], *order[:32]}


def test_names_of_special_tokens_and_of_pieces_of_characters(several):
    text = token_texts(open_artifact(several))
    assert (text(1), text(2), text(3)) == ("<s>", "</s>", "\n")


def test_pieces_of_characters_are_written_as_bytes(several, monkeypatch):
    from lowtide.runtime.tokenizer import Tokenizer

    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, token: "🐟".encode()[:2] if token == 7 else b"")
    text = token_texts(open_artifact(several))
    assert text(7) == r"\xF0\x9F"
    assert text(129) == "<129>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "--prompt: the text is empty"),
        ({"token": 17}, r"--token 17: the text has 15 tokens; give 0 to 14"),
        ({"token": -1}, r"--token -1"),
        ({"token": 20, "generate": 3}, r"--token 20: the text has 18 tokens"),
        ({"generate": -2}, r"--generate -2"),
        ({"generate": 60}, r"15 tokens and --generate 60, the context holds 64"),
        ({"prompt": "x" * 65}, r"--prompt has 65 tokens, the context holds 64; shorten it"),
        ({"bits": 99.0}, r"--bits 99"),
        ({"policy": "nope"}, r"unknown mask rule"),
    ],
)
def test_bad_input(several, arguments, message):
    tokens = len(load_tokenizer(open_artifact(several)).encode(TEXT))
    assert tokens == 15, "the messages above count on it"
    with pytest.raises(LowtideError, match=message):
        explain(several, **{"prompt": TEXT, "bits": 5.0} | arguments)
