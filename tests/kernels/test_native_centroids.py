"""Centroids in the native engine: whose they are, and which of them a token's keys find."""

import dataclasses

import numpy as np
import pytest
from support import tiny
from support.native import SHAPES, VARIANTS, policy, random_tokens
from support.tiny import make_artifact

from lowtide.format.reader import open_artifact
from lowtide.kernels.native import Engine
from lowtide.kernels.reference import ReferenceEngine
from lowtide.rules import GroupStats, get_rule


@pytest.mark.parametrize("shape", ["five-centroids", "odd-centroids"])
def test_centroids_are_for_the_rule_ipn_alone(tmp_path, shape):
    """Tokens have several, which change what is read; other rules and prompts are as without."""
    options = {"policies": ("channel-norm", "ipn")}
    with_, without = (
        open_artifact(make_artifact(tmp_path / name, dataclasses.replace(SHAPES[shape], **more), **options))
        for name, more in (("a", {}), ("b", {"centroids": 0}))
    )
    tokens = random_tokens(with_)
    for rule in ("channel-norm", "topk", "dense"):
        pair = [Engine(a, threads=1) for a in (with_, without)]
        for i, token in enumerate(tokens):
            (a, read), (b, expected) = (e.decode(int(token), i, policy(with_, rule)) for e in pair)
            np.testing.assert_array_equal(a, b)
            assert read == expected
    np.testing.assert_array_equal(*(Engine(a, threads=1).prefill(tokens, 0) for a in (with_, without)))
    pair = [Engine(a, threads=1) for a in (with_, without)]
    (a, read), (b, expected) = (e.decode(int(tokens[0]), 0, policy(with_, "ipn")) for e in pair)
    assert not np.array_equal(a, b) and read != expected


def assert_codes(artifact, x, code):
    """Engines find these centroids of `layers.0.qkv` for its inputs [n, in]: with nothing else read, o, which goes by
    them, leaves what its weights make of the centroid."""
    nothing = dataclasses.replace(policy(artifact, "ipn"), log2_offset=100.0, gains=None)
    o = artifact.groups["layers.0.o"]
    served = ReferenceEngine(artifact).middle("layers.0.o", get_rule("ipn"), code)
    wanted = [o.exact_part(0) @ -mean + bias for mean, bias in zip(served.mean, served.bias[0], strict=True)]
    for isa, threads in VARIANTS:
        engine = Engine(artifact, threads=threads, isa=isa)
        for row, expected in zip(x, wanted, strict=True):
            engine.group_product(0, row, nothing)
            got, _ = engine.group_product(1, np.zeros(o.in_features, np.float32), nothing)
            np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=1e-5)


def test_of_keys_that_fit_as_well_the_first_wins(tmp_path, monkeypatch):
    """Within sixteen, within a block of 64 and in another."""
    real = tiny._add_centroids

    def repeated(made, shapes, *rest):
        real(made, shapes, *rest)
        if made.keys is not None:
            again = np.arange(made.keys.shape[1]) % 7
            made.keys, made.key_scale, made.key_bias = made.keys[:, again], made.key_scale[again], made.key_bias[again]

    monkeypatch.setattr(tiny, "_add_centroids", repeated)
    artifact = open_artifact(make_artifact(tmp_path / "a", SHAPES["many-centroids"], policies=("ipn",)))
    inputs, rule = artifact.groups["layers.0.qkv"].in_features, get_rule("ipn")
    x = np.random.default_rng(0).normal(0, 1, (20, inputs)).astype(np.float32)
    code = rule.code(GroupStats.of(artifact.groups["layers.0.qkv"]), x)
    assert code.max() < 7 and len(np.unique(code)) > 2
    assert_codes(artifact, x, code)


@pytest.mark.parametrize("shape", ["odd-centroids", "many-centroids"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_keys_of_inputs_out_of_bounds_are_those_of_the_specification(tmp_path, wrong, shape):
    artifact = open_artifact(make_artifact(tmp_path / "a", SHAPES[shape], policies=("ipn",)))
    group, rule = artifact.groups["layers.0.qkv"], get_rule("ipn")
    x = np.linspace(-3, 3, group.in_features, dtype=np.float32)
    if np.isinf(wrong):  # some keys fit infinitely well, some infinitely badly, and those that are 0 there not at all
        keys = group.ipn.keys
        channel = int(np.argmax((keys[:, 0] < 0) & (keys > 0).any(1)))
        x[group.ipn.channels[channel]] = wrong
    else:
        x[group.ipn.channels[::5]] = wrong
    with np.errstate(all="ignore"):
        code = rule.code(GroupStats.of(group), x[None])
    assert (code[0] == 0) == np.isnan(wrong)
    assert_codes(artifact, x[None], code)
