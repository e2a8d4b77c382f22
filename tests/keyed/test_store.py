"""Maps from features to weights: what is stored comes back, strangers seldom do, and bad input is one clear line."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from lowtide import keyed
from lowtide.errors import LowtideError
from lowtide.fingerprint import CodeOptions
from lowtide.keyed.bundle import open_bundle

FEATURES = [f"feature {i}" for i in range(2000)]
WEIGHTS = np.random.default_rng(0).standard_normal(2000).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("keyed") / "weights.ltk"
    keyed.build(FEATURES, WEIGHTS, path)
    return path


def test_weights_come_back_rounded_to_the_table(path):
    store = keyed.open(path)
    found = store.get_many(FEATURES)
    assert np.square(found - WEIGHTS).mean() < 0.0101  # 16 values of a Gaussian: 0.0095 at best
    assert len(np.unique(found)) == 16
    assert len(store) == 2000
    assert store.get("feature 7") == found[7]
    assert store.get(b"feature 7") == found[7]


def test_few_different_weights_are_exact(tmp_path):
    keyed.build(["a", "b", "\u00e9", ""], [1, -2, 3.25, 1], tmp_path / "x")
    assert keyed.open(tmp_path / "x").get_many(["a", "b", "\u00e9", "", b"\xc3\xa9"]).tolist() == [1, -2, 3.25, 1, 3.25]


def test_strangers_have_weight_zero_but_as_rarely_as_promised(path):
    store = keyed.open(path)
    strangers = [f"stranger {i}" for i in range(30000)]
    rate = store.info()["false_positive_rate"]
    seen = store.has_many(strangers)
    assert abs(seen.sum() - 30000 * rate) < 5 * np.sqrt(30000 * rate)
    energy = np.square(store.get_many(strangers)).mean() / np.square(store.get_many(FEATURES)).mean()
    assert energy < 0.0015
    assert (store.get_many(strangers)[~seen] == 0).all()


def test_features_are_not_in_the_file(path):
    assert b"feature" not in path.read_bytes()
    assert path.stat().st_size < 2.5 * len(FEATURES)


def test_longer_fingerprints_make_fewer_false_positives(tmp_path):
    rates = []
    for bits in (2, 10):
        keyed.build(FEATURES, WEIGHTS, tmp_path / f"{bits}", code=CodeOptions(bits=bits))
        rates.append(keyed.open(tmp_path / f"{bits}").has_many([f"x{i}" for i in range(5000)]).mean())
    assert rates[0] == pytest.approx(0.25, abs=0.03)
    assert rates[1] < 0.004


def test_zero_weights_are_left_out(tmp_path):
    info = keyed.build(["a", "b"], [0.0, 2.0], tmp_path / "x")
    assert info["keys"] == 1
    assert keyed.open(tmp_path / "x").get_many(["a", "b"]).tolist() == [0, 2]


def test_equal_input_gives_equal_bytes(path, tmp_path):
    keyed.build(FEATURES, WEIGHTS, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    keyed.build(FEATURES, WEIGHTS, tmp_path / "other", code=CodeOptions(error=0.001, seed=1))
    assert (tmp_path / "other").read_bytes() != path.read_bytes()


def test_the_file_is_mapped_and_not_copied(path):
    words = keyed.open(path)._store.bits.words
    assert not words.flags.owndata
    assert words.flags.aligned
    assert not words.flags.writeable


@pytest.mark.parametrize(
    ("features", "weights", "message"),
    [
        ([], [], "empty"),
        (["a", "b"], [1], "2 features, but weights of shape"),
        (["a", "b", "a"], [1, 2, 3], "'a' is given twice"),
        (["\u00e9", b"\xc3\xa9"], [1, 2], "given twice"),
        (["a", "b"], [1, float("nan")], "'b': its weight is nan"),
        (["a"], [float("inf")], "not a finite number"),
        (["a"], [0], "all weights are zero"),
        (["a", b"\xff"], [1, 2], "not UTF-8"),
        (["\ud800"], [1], "not UTF-8"),
        (["a", 3], [1, 2], "must be text, not int"),
    ],
)
def test_bad_maps_are_refused_and_leave_no_file(tmp_path, features, weights, message):
    with pytest.raises(LowtideError, match=message) as caught:
        keyed.build(features, weights, tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("feature", [b"\xff", b"\xc3", "\udcff", 7, None])
def test_bad_questions_are_refused(path, feature):
    with pytest.raises(LowtideError):
        keyed.open(path).get(feature)


def test_one_text_is_not_taken_for_a_list(path):
    with pytest.raises(LowtideError, match="list of texts"):
        keyed.open(path).get_many("feature 7")


def test_files_are_not_replaced_by_accident(tmp_path):
    keyed.build(["a"], [1], tmp_path / "x")
    with pytest.raises(LowtideError, match="--force"):
        keyed.build(["a"], [2], tmp_path / "x")
    keyed.build(["a"], [2], tmp_path / "x", force=True)
    assert keyed.open(tmp_path / "x").get("a") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(LowtideError, match="cannot be written"):
        keyed.build(["a"], [2], tmp_path / "no" / "x")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_files_cut_short_are_refused(path, tmp_path, share):
    data = path.read_bytes()
    (tmp_path / "x").write_bytes(data[: int(share * len(data))])
    with pytest.raises(LowtideError, match="x: "):
        keyed.open(tmp_path / "x")


def test_any_flipped_bit_is_found(path, tmp_path):
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    for place in [*range(0, 160), *rng.integers(0, len(data), 60).tolist(), len(data) - 1]:
        broken = bytearray(data)
        broken[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "x").write_bytes(broken)
        with pytest.raises(LowtideError):
            keyed.open(tmp_path / "x")


def resigned(data, meta):
    """The same stores under other JSON, its hash right."""
    _, _, count, length = struct.unpack("<8sHHI", data[:16])
    start = 16 + 8 * count
    end = start + length + -(start + length) % 8
    head = data[:12] + struct.pack("<I", len(meta)) + data[16:start] + meta
    head += bytes(-len(head) % 8)
    return head + hashlib.sha256(head).digest() + data[end + 32 :]


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"[]",
        b"{}",
        b'{"kind":"map"}',
        b'{"kind":"map","stores":[]}',
        b'{"kind":"map","stores":["a","b"]}',
        b'{"kind":"map","stores":[1]}',
        b'{"kind":3,"stores":["weights"]}',
        b'{"kind":"ngram","stores":["weights"]}',
        b'{"kind":"map","kind":"map","stores":["weights"]}',
        b"\xff",
    ],
)
def test_descriptions_that_cannot_be_are_refused(path, tmp_path, meta):
    (tmp_path / "x").write_bytes(resigned(path.read_bytes(), meta))
    with pytest.raises(LowtideError):
        keyed.open(tmp_path / "x")
    (tmp_path / "x").write_bytes(resigned(path.read_bytes(), b'{"kind":"map","stores":["weights"]}'))
    assert len(keyed.open(tmp_path / "x")) == 2000


def test_other_kinds_and_newer_versions_are_named(path, tmp_path):
    with pytest.raises(LowtideError, match="holds a map, not a ngram"):
        open_bundle(path, "ngram")
    data = path.read_bytes()
    (tmp_path / "x").write_bytes(data[:8] + b"\7\0" + data[10:])
    with pytest.raises(LowtideError, match="get a newer one"):
        keyed.open(tmp_path / "x")
    with pytest.raises(LowtideError, match="cannot be read"):
        keyed.open(tmp_path / "absent")


def test_texts_of_one_hash_are_told_apart_by_another_seed(monkeypatch):
    from lowtide.keyed import store

    real = store.hash_texts
    monkeypatch.setattr(store, "hash_texts", lambda t, seed: real(t, seed) & np.uint64(0 if seed == 4 else -1 % 2**64))
    seed, hashes = store.distinct_hashes([b"a", b"b"], 4)
    assert seed == 5
    assert len(set(hashes.tolist())) == 2
