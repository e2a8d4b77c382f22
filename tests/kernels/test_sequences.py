"""Several texts in one engine: each gets the bits that the numpy reference gives it alone."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
from support.tiny import ODD, Tiny, make_artifact

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels.native import SHORT_PROMPT, Engine, available_isas
from lowtide.kernels.reference import ReferenceEngine
from lowtide.kernels.sequences import Step
from lowtide.kernels.types import PolicyParams

SHAPES = {
    "default": Tiny(),
    "odd": ODD,
    "grouped-heads": Tiny(hidden=60, heads=10, kv_heads=2, head_dim=6, exact=1),
    "centroids": Tiny(centroids=5, factors=True),
    "odd-centroids": replace(ODD, centroids=64, key_channels=32),
}
VARIANTS = [(isa, threads) for isa in available_isas() for threads in (1, 2, 3)]
PROMPTS = (1, SHORT_PROMPT + 3, 4, SHORT_PROMPT + 1)
TOKENS = 5


@pytest.fixture(scope="module", params=sorted(SHAPES))
def artifact(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("sequences") / "a"
    return open_artifact(make_artifact(path, SHAPES[request.param], policies=("channel-norm", "ipn"), features=7))


def policies(artifact):
    """One for each text: rules that keep something between groups (ipn, gate) beside others."""
    rows = 4 * artifact.config.num_layers + 1
    gains = np.linspace(-0.7, 0.7, rows, dtype=np.float32)
    cuts = np.tile(np.array([0.15, 0.5, 1.1], np.float32), (rows, 1))
    return [
        PolicyParams("ipn", cuts, 0.0, gains),
        PolicyParams("channel-norm", cuts, -0.5, head_offset=1.5, head_margin=1.0),
        PolicyParams("gate", cuts, head_offset=1.0, head_margin=0.5),
        PolicyParams("ipn", 2 * cuts, 0.25, -gains),
    ]


def texts(artifact):
    rng = np.random.default_rng(5)
    return [rng.integers(0, artifact.config.vocab_size, n + TOKENS).astype(np.int32) for n in PROMPTS]


def alone(artifact, cache_bits):
    """What the reference makes of each text by itself: logits of the prompt and of each token, and what they read."""
    found = []
    for ids, count, policy in zip(texts(artifact), PROMPTS, policies(artifact), strict=True):
        engine = ReferenceEngine(artifact, cache_bits=cache_bits)
        logits = [engine.prefill(ids[:count], 0)]
        stats = []
        for pos in range(count, len(ids)):
            row, read = engine.decode(int(ids[pos]), pos, policy)
            logits.append(row)
            stats.append((read, engine.group_bits().tolist()))
        found.append((np.stack(logits), stats))
    return found


def together(engine, artifact):
    """The same in rounds. Text i begins in round i, so prompts are read while others are decoded."""
    logits, stats, sequences = [[] for _ in PROMPTS], [[] for _ in PROMPTS], []
    for number in range(TOKENS + len(PROMPTS)):
        if number < len(PROMPTS):
            sequences.append(engine.sequence())
            logits[number].append(sequences[-1].prefill(texts(artifact)[number][: PROMPTS[number]], 0))
        steps = []
        for i, sequence in enumerate(sequences):
            pos = PROMPTS[i] + len(stats[i])
            if pos < len(texts(artifact)[i]):
                steps.append((i, Step(sequence, int(texts(artifact)[i][pos]), pos, policies(artifact)[i])))
        results = engine.decode_round([step for _, step in steps])
        for (i, step), (row, read) in zip(steps, results, strict=True):
            logits[i].append(row)
            stats[i].append((read, step.sequence.group_bits().tolist()))
    return [(np.stack(rows), read) for rows, read in zip(logits, stats, strict=True)]


@pytest.mark.parametrize("cache_bits", [16, 8])
def test_rounds_give_each_text_what_the_reference_gives_it_alone(artifact, cache_bits):
    wanted = alone(artifact, cache_bits)
    engines = [Engine(artifact, threads=n, isa=isa, cache_bits=cache_bits) for isa, n in VARIANTS]
    for engine in [*engines, ReferenceEngine(artifact, cache_bits=cache_bits)]:
        for (rows, stats), (got, read) in zip(wanted, together(engine, artifact), strict=True):
            np.testing.assert_array_equal(got, rows, err_msg=f"{engine.isa} {engine.threads} threads")
            assert read == stats


def test_the_engines_own_text_is_one_among_others(tiny_artifact):
    artifact = open_artifact(tiny_artifact)
    chosen = policies(artifact)[1]
    first = Engine(artifact, threads=1)
    wanted = [first.decode(token, pos, chosen)[0] for pos, token in enumerate((5, 6, 7))]
    engine = Engine(artifact, threads=1)
    other = engine.sequence()
    for pos, token in enumerate((5, 6, 7)):
        other.decode(9 + pos, pos, chosen)
        np.testing.assert_array_equal(engine.decode(token, pos, chosen)[0], wanted[pos])


def test_rounds_without_logits_fill_the_cache_all_the_same(tiny_artifact):
    artifact = open_artifact(tiny_artifact)
    engine, chosen = Engine(artifact, threads=2), policies(artifact)[1]
    wanted = [engine.decode(5, 0, chosen)[1], engine.decode(6, 1, chosen)[0]]
    a, b = engine.sequence(), engine.sequence()
    results = engine.decode_round([Step(a, 5, 0, chosen, want_logits=False), Step(b, 5, 0, chosen)])
    assert results[0][0].shape == (0,)
    assert results[1][1] == wanted[0]
    assert results[0][1].body_bits == wanted[0].body_bits
    assert results[0][1].head_bits < wanted[0].head_bits
    np.testing.assert_array_equal(a.decode(6, 1, chosen)[0], wanted[1])


@pytest.mark.parametrize("make", [Engine, ReferenceEngine])
def test_a_sequence_comes_once_in_a_round(tiny_artifact, make):
    artifact = open_artifact(tiny_artifact)
    engine, chosen = make(artifact), policies(artifact)[1]
    a = engine.sequence()
    with pytest.raises(LowtideError, match="a round takes one token of each sequence"):
        engine.decode_round([Step(a, 1, 0, chosen), Step(a, 2, 1, chosen)])


def test_bad_steps_and_closed_sequences_are_told(tiny_artifact):
    artifact = open_artifact(tiny_artifact)
    engine, chosen = Engine(artifact, threads=1, max_context=8), policies(artifact)[1]
    a, b = engine.sequence(), engine.sequence()
    for token, pos, words in [(-1, 0, "tokens must be"), (1, 8, "outside the context of 8")]:
        with pytest.raises(LowtideError, match=words):
            engine.decode_round([Step(a, 1, 0, chosen), Step(b, token, pos, chosen)])
    a.close()
    a.close()
    with pytest.raises(LowtideError, match="the sequence is closed"):
        a.decode(1, 0, chosen)
    with pytest.raises(LowtideError, match="the sequence is closed"):
        a.group_bits()
    engine.close()
    for call in (engine.sequence, lambda: b.decode(1, 0, chosen), lambda: engine.decode(1, 0, chosen)):
        with pytest.raises(LowtideError, match="closed"):
            call()
    b.close()  # after its engine


def test_a_sequence_stays_with_its_engine(tiny_artifact):
    artifact = open_artifact(tiny_artifact)
    chosen = policies(artifact)[1]
    one, other = Engine(artifact, threads=1), Engine(artifact, threads=1)
    with pytest.raises(LowtideError, match="belongs to another engine"):
        one.decode_round([Step(other.sequence(), 1, 0, chosen)])


def test_an_engine_left_behind_is_freed_at_once(tiny_artifact):
    engine = Engine(open_artifact(tiny_artifact), threads=1)
    first, known = weakref.ref(engine), engine.sequence()
    del engine
    assert first() is not None  # a sequence keeps its engine
    known.decode(1, 0, policies(open_artifact(tiny_artifact))[1])
    del known
    assert first() is None
