"""Perturbed input: what edits leave alone, noise and flips against their definitions."""

from __future__ import annotations

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.twin import make_twins  # noqa: E402

from lowtide.arch import norm_specs  # noqa: E402
from lowtide.compress.dense import DenseModel  # noqa: E402
from lowtide.compress.masked import MaskedModel  # noqa: E402
from lowtide.errors import LowtideError  # noqa: E402
from lowtide.eval import perturb  # noqa: E402
from lowtide.format.reader import open_artifact  # noqa: E402
from lowtide.rules import get_rule  # noqa: E402

TEXT = "The end of the tide, is there;  and then\nanother 12 in the hand. " * 20
IDS = torch.tensor([1, 40, 77, 12, 99, 5, 63, 81, 20, 33, 54, 70, 91, 8, 17, 66, 45, 30, 101, 88])


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    path, source = make_twins(tmp_path_factory.mktemp("perturb") / "twin.lowtide")
    return open_artifact(path), source


@pytest.fixture(scope="module")
def dense(twins):
    return DenseModel(twins[1])


@pytest.fixture
def masked(twins):
    artifact = twins[0]
    norms = {name: artifact.tensor(name) for name, _ in norm_specs(artifact.config)}
    model = MaskedModel(artifact.config, artifact.groups, norms)
    params = {name: g.thresholds[0, 0] for name, g in artifact.groups.items() if name != "embed"}
    return model, get_rule("channel-norm"), params


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- text ----


def test_neighbours_are_those_of_a_keyboard():
    assert set(perturb.NEIGHBOURS["g"]) == set("ftyhbv")
    assert set(perturb.NEIGHBOURS["a"]) == set("qwsz")
    assert set(perturb.NEIGHBOURS["p"]) == set("ol")
    assert all(a in perturb.NEIGHBOURS[b] for a, around in perturb.NEIGHBOURS.items() for b in around)


def single_edits(word):
    """Kind -> all words that one edit makes."""
    near = perturb.NEIGHBOURS
    spots = range(len(word))
    return {
        "swap": {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in spots[:-1]},
        "drop": {word[:i] + word[i + 1 :] for i in spots},
        "insert": {word[:i] + key + word[i:] for i in spots for key in near[word[i]]},
        "replace": {word[:i] + key + word[i + 1 :] for i in spots for key in near[word[i]]},
    }


def test_typos_are_the_four_edits_in_equal_parts():
    words = perturb.typos("keyboard " * 20_000, 0.01, rng()).split()
    changed = [word for word in words if word != "keyboard"]
    assert len(changed) / 20_000 == pytest.approx(1 - 0.99**8, rel=0.05)
    kinds = single_edits("keyboard")
    found = {name: sum(word in made for word in changed) for name, made in kinds.items()}
    assert sum(found.values()) > 0.94 * len(changed)  # the rest has two edits or more
    # a swap at the end of the word is a replacement: 7 / 32 against 9 / 32
    for name, share in {"swap": 7 / 32, "drop": 8 / 32, "insert": 8 / 32, "replace": 9 / 32}.items():
        assert found[name] / len(changed) == pytest.approx(share, abs=0.04), name


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_typos_leave_words_spaces_and_other_characters(share):
    changed = perturb.typos(TEXT, share, rng())
    assert re.findall(r"\s+", changed) == re.findall(r"\s+", TEXT)
    for before, after in zip(TEXT.split(), changed.split(), strict=True):
        assert [c for c in after if not c.isalpha()] == [c for c in before if not c.isalpha()]
        assert any(c.isalpha() for c in after) == any(c.isalpha() for c in before)
    assert changed == perturb.typos(TEXT, share, rng()) != perturb.typos(TEXT, share, rng(1))
    assert perturb.typos(TEXT, 0.0, rng()) == TEXT
    assert sum(c.isupper() for c in perturb.typos("ABCDEF " * 50, 1.0, rng())) > 200


@pytest.mark.parametrize("reach", [1, 5])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_swapped_words_move_no_further_than_their_reach(share, reach):
    words = [f"w{i}" for i in range(200)]
    text = "".join(word + ("\n" if i % 7 == 0 else " ") for i, word in enumerate(words))
    changed = perturb.swap_words(text, share, rng(), reach)
    assert re.findall(r"\s+", changed) == re.findall(r"\s+", text)
    after = changed.split()
    assert sorted(after) == sorted(words)
    moves = [abs(int(word[1:]) - i) for i, word in enumerate(after)]
    assert sum(m > 0 for m in moves) == 200 * share
    assert max(moves) <= reach and (reach == 1 or max(moves) > 2)


def test_edits_leave_special_tokens_and_canonical_ids(twins):
    text = perturb.EditableText(twins[1])
    ids = [1, *text.edit([60, 61], lambda _: "then the end"), 2, 1, *text.edit([60], lambda _: "in hand")]
    assert text.edit(ids, str) == ids == text.canonical(ids, 99)
    upper = text.edit(ids, str.upper)
    assert [t for t in upper if t < 3] == [1, 2, 1]
    assert text.decode(upper) == "THEN THE ENDIN HAND"
    # "t", "h" apart are not what the tokenizer makes of "th"
    apart = [1, *(text.edit([60], lambda _, c=c: c)[0] for c in "th")]
    assert text.decode(apart) == "th" and len(text.canonical(apart, 99)) == 2
    for limit in (3, 5):
        cut = text.canonical(ids, limit)
        assert len(cut) <= limit and text.edit(cut, str) == cut


def test_ordinary_tokens_are_neither_special_nor_unknown(twins):
    ordinary = perturb.EditableText(twins[1]).ordinary()
    assert ordinary.shape == (130,) and not ordinary[:3].any() and ordinary[3:].all()


def test_a_source_without_tokenizer_is_refused(twins):
    from support.twin import TwinSource

    with pytest.raises(LowtideError, match="no tokenizer.json"):
        perturb.EditableText(TwinSource(twins[1].config, {}, {}))


# ---- embeddings ----


def test_noise_is_as_long_as_it_says(dense):
    noise = perturb.embedding_noise(dense, 500, 0.3, rng())
    typical = dense.embedding.norm(dim=-1).mean()
    assert float(noise.norm(dim=-1).square().mean().sqrt()) == pytest.approx(0.3 * float(typical), rel=0.05)
    assert noise.shape == (500, 48) and noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.01 * float(typical)
    assert torch.allclose(perturb.embedding_noise(dense, 500, 0.6, rng()), 2 * noise)


def test_dense_logits_are_the_models(dense):
    x = dense.embed(IDS[None])[0]
    assert torch.allclose(perturb.dense_logits(dense, x), dense.logits(IDS[None])[0], atol=1e-5)


def test_noise_that_makes_another_token_gives_its_logits(masked):
    model, rule, params = masked
    other = IDS.clone()
    other[7] = 50
    noise = torch.zeros(len(IDS), 48)
    noise[7] = model.embedding[50] - model.embedding[IDS[7]]
    logits, bits = perturb.masked_logits(model, IDS, rule, params, noise)
    want, want_bits = model.logits(other[None], rule, params)
    assert torch.allclose(logits, want[0], atol=1e-4) and bits == pytest.approx(want_bits, rel=1e-3)
    plain, _ = perturb.masked_logits(model, IDS, rule, params)
    assert torch.equal(plain, model.logits(IDS[None], rule, params)[0][0])
    assert not torch.allclose(plain[7:], logits[7:], atol=1e-2)


# ---- HotFlip ----


def loss_of(dense, ids):
    return float(perturb.next_token_loss(dense.logits(ids[None])[0], IDS))


def test_first_order_is_the_slope_towards_the_other_token(dense):
    allowed = torch.ones(130, dtype=torch.bool)
    allowed[:30] = False
    positions = torch.tensor([3, 9, 15])
    gain, tokens = perturb.first_order(dense, IDS, IDS, positions, allowed)

    def along(position, token, step):
        x = dense.embedding[IDS].clone()
        x[position] += step * (dense.embedding[token] - x[position])
        return float(perturb.next_token_loss(perturb.dense_logits(dense, x), IDS))

    for i, position in enumerate(positions.tolist()):
        slopes = {t: (along(position, t, 0.01) - along(position, t, -0.01)) / 0.02 for t in range(30, 130)}
        slopes.pop(int(IDS[position]), None)
        assert float(gain[i]) == pytest.approx(slopes[int(tokens[i])], rel=0.05, abs=1e-3)
        assert slopes[int(tokens[i])] > max(slopes.values()) - 2e-3


def test_hotflip_hurts_more_than_random_flips(dense):
    allowed = torch.ones(130, dtype=torch.bool)
    allowed[:3] = False
    flipped = perturb.hotflip(dense, IDS, [2, 4], allowed, seed=0)
    where = [set(torch.nonzero(ids != IDS)[:, 0].tolist()) for ids in flipped]
    assert [len(w) for w in where] == [2, 4] and where[0] < where[1]
    assert min(where[1]) > 0 and max(where[1]) < len(IDS) - 1
    generator = torch.Generator().manual_seed(0)
    random = []
    for _ in range(20):
        ids = IDS.clone()
        ids[torch.randperm(18, generator=generator)[:4] + 1] = torch.randint(3, 130, (4,), generator=generator)
        random.append(loss_of(dense, ids))
    assert loss_of(dense, flipped[1]) > max(random)
    assert loss_of(dense, flipped[1]) > loss_of(dense, flipped[0]) > loss_of(dense, IDS)


def test_hotflip_keeps_to_what_is_allowed_and_to_its_seed(dense):
    allowed = torch.zeros(130, dtype=torch.bool)
    allowed[[10, 11]] = True
    (ids,) = perturb.hotflip(dense, IDS, [6], allowed, seed=3)
    changed = ids != IDS
    assert int(changed.sum()) == 6 and set(ids[changed].tolist()) <= {10, 11}
    assert torch.equal(ids, perturb.hotflip(dense, IDS, [6], allowed, seed=3)[0])
    assert not torch.equal(changed, perturb.hotflip(dense, IDS, [6], allowed, seed=4)[0] != IDS)
    with pytest.raises(LowtideError, match="10 token flips: a window of 20 tokens has 9 positions"):
        perturb.hotflip(dense, IDS, [10], allowed, seed=0)
