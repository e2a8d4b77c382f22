"""Tensors as fingerprint stores: what is kept is exact, what is not is counted, and damaged files are refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.fingerprint import (
    CodeOptions,
    TensorOptions,
    decode_tensor,
    describe,
    encode_tensor,
    open_tensor,
    pack,
    sizes,
    unpack,
)
from lowtide.fingerprint.file import MAGIC

ID, NAME = "ab" * 32, "model.layers.0.mlp.up_proj.weight"


def pruned(density=0.2, shape=(60, 100), seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return w, np.where(np.abs(w) >= np.quantile(np.abs(w), 1 - density), w, 0).astype(np.float32)


def encode(weights, name=NAME, target=None, **options):
    return encode_tensor(weights, model_id=ID, name=name, options=TensorOptions(**options), target=target)


def decode(store, name=NAME):
    return decode_tensor(store, model_id=ID, name=name)


@pytest.fixture(scope="module")
def packed():
    return pack(encode(pruned()[1])[0])


def test_kept_weights_come_back_quantised_and_false_ones_are_counted():
    _, w = pruned()
    store, report = encode(w, table_size=512, code=CodeOptions(error=0.05))
    decoded = decode(unpack(pack(store), "x"))
    kept = w != 0
    assert np.abs(decoded - w)[kept].max() < 0.1
    false = (decoded != 0) & ~kept
    assert report.false_positives == false.sum() > 0
    assert report.false_energy == pytest.approx(
        np.square(decoded[false]).sum() / np.square(decoded[kept]).sum(), rel=1e-4
    )
    assert report.stored == kept.sum()
    assert report.file_bytes == len(pack(store))


def test_false_energy_is_as_asked_on_average():
    _, w = pruned(0.3, (200, 150))
    assert 0.025 < encode(w, code=CodeOptions(error=0.05))[1].false_energy < 0.06


def test_larger_weights_have_longer_fingerprints_and_fewer_impostors():
    _, w = pruned(0.3, (200, 150))
    store, _ = encode(w, table_size=8, code=CodeOptions(error=0.5))
    size = np.abs(store.table[:, 0])
    small, large = size.argmin(), size.argmax()
    assert store.code.fingerprint_bits[large] >= store.code.fingerprint_bits[small] + 1
    flat, _ = encode(w, table_size=8, code=CodeOptions(bits=int(store.code.fingerprint_bits.max())))
    assert sizes(store).payload < sizes(flat).payload


def test_all_corrections_make_it_exact():
    _, w = pruned()
    store, report = encode(w, code=CodeOptions(error=2.0), corrections=1)
    decoded = decode(unpack(pack(store), "x"))
    assert report.false_positives == 0
    assert report.corrected > 100
    assert ((decoded != 0) == (w != 0)).all()


def test_some_corrections_take_the_worst():
    _, w = pruned()
    none, half = (encode(w, code=CodeOptions(error=2.0), corrections=share) for share in (0, 0.5))
    assert half[1].false_energy <= 0.5 * none[1].false_energy
    assert half[1].corrected < 0.5 * none[1].false_positives


def test_refitting_the_table_lowers_the_error_and_moves_no_false_positive():
    dense, w = pruned()
    plain, fitted = (decode(encode(w, code=CodeOptions(error=0.5), refit=r, target=dense)[0]) for r in (False, True))
    assert ((plain != 0) == (fitted != 0)).all()
    assert np.square(fitted - dense).sum() < 0.97 * np.square(plain - dense).sum()


def test_of_several_seeds_the_luckiest_is_kept():
    _, w = pruned()
    each = [encode(w, code=CodeOptions(error=0.5, seed=s))[1].false_energy for s in range(3)]
    report = encode(w, code=CodeOptions(error=0.5), seeds=3)[1]
    assert report.false_energy == min(each)
    assert report.seed == int(np.argmin(each))


def test_equal_input_gives_equal_bytes_and_resaving_too(packed):
    assert pack(encode(pruned()[1])[0]) == packed
    assert pack(unpack(packed, "x")) == packed


def test_the_file_is_as_small_as_reported(packed):
    figures = describe(unpack(packed, "x"))
    assert figures["bytes"] == len(packed) == sum(figures["bytes_of"].values())
    assert figures["bits_per_key"] == pytest.approx(8 * len(packed) / 1200)


def test_extremes():
    for w in (np.array([[1.5]], np.float32), np.eye(40, dtype=np.float32), np.ones((3, 5), np.float32)):
        store, report = encode(w, code=CodeOptions(error=1e-4))
        assert np.array_equal(decode(unpack(pack(store), "x")), w)
        assert report.false_positives == 0


def test_a_store_is_mapped_from_its_file_and_only_by_its_own_model(tmp_path, packed):
    (tmp_path / "w.ltf").write_bytes(packed)
    store = open_tensor(tmp_path / "w.ltf", model_id=ID, name=NAME)
    assert not store.bits.words.flags.writeable
    assert not store.bits.words.flags.owndata
    with pytest.raises(LowtideError, match="built for another model"):
        open_tensor(tmp_path / "w.ltf", model_id="cd" * 32, name=NAME)
    with pytest.raises(LowtideError, match="holds model.layers.0.mlp.up_proj.weight, not lm_head"):
        open_tensor(tmp_path / "w.ltf", model_id=ID, name="lm_head.weight")
    (tmp_path / "empty").touch()
    for path in (tmp_path / "absent", tmp_path, tmp_path / "empty"):
        with pytest.raises(LowtideError, match=str(path)):
            open_tensor(path, model_id=ID, name=NAME)


def test_any_flipped_bit_is_found(packed):
    rng = np.random.default_rng(0)
    for place in [*range(0, 120), *rng.integers(0, len(packed), 60).tolist()]:
        broken = bytearray(packed)
        broken[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(LowtideError):
            unpack(bytes(broken), "w.ltf")


@pytest.mark.parametrize("keep", [0, 7, 40, 60, 100, 0.5, -33, -1])
def test_a_file_cut_short_is_refused(packed, keep):
    cut = packed[: int(keep * len(packed))] if isinstance(keep, float) else packed[:keep]
    with pytest.raises(LowtideError, match="w.ltf"):
        unpack(cut, "w.ltf")


def test_a_longer_file_is_refused(packed):
    with pytest.raises(LowtideError):
        unpack(packed + b"\0", "w.ltf")


def resigned(body):
    """An attacker's file: changed, with a matching hash."""
    return bytes(body[:-32]) + hashlib.sha256(bytes(body[:-32])).digest()


def test_no_byte_changed_by_an_attacker_breaks_the_reader(packed):
    """With the hash recomputed: refused, or a store that answers like any other."""
    head = len(packed) - 32 - sizes(unpack(packed, "x")).payload
    refused = 0
    for place in range(8, head):
        for value in (0, 1, 255, packed[place] ^ 128):
            broken = bytearray(packed)
            broken[place] = value
            try:
                store = unpack(resigned(broken), "w.ltf")
            except LowtideError as error:
                refused += 1
                assert "\n" not in str(error)
                continue
            found = store.symbols_of(np.arange(min(store.universe, 50)))
            assert found.max() < len(store.table)
    assert refused > head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": 2}, "kind"),
        ({"count": 0}, "number of keys"),
        ({"count": 6001}, "number of keys"),
        ({"universe": 5}, "number of keys"),
    ],
)
def test_headers_that_cannot_be_are_named(packed, change, message):
    store = replace(unpack(packed, "x"), **change)
    with pytest.raises(LowtideError, match=message):
        unpack(pack(store), "w.ltf")


def test_a_newer_version_asks_for_a_newer_lowtide(packed):
    with pytest.raises(LowtideError, match="get a newer one"):
        unpack(packed[:8] + b"\2" + packed[9:], "w.ltf")
    assert packed[:8] == MAGIC


def test_tables_that_are_not_finite_are_refused(packed):
    store = unpack(packed, "x")
    table = store.table.copy()
    table[3] = np.inf
    with pytest.raises(LowtideError, match="not finite"):
        unpack(pack(replace(store, table=table)), "w.ltf")


@pytest.mark.parametrize("shape", [[60, 101], [6000.0], "6000", [0, 6000], [-60, -100], [True, 6000], None, [1] * 9])
def test_shapes_that_do_not_fit_are_refused(packed, shape):
    store = replace(unpack(packed, "x"), meta={"model_id": ID, "tensor": NAME, "shape": shape})
    with pytest.raises(LowtideError, match="shape"):
        decode(store)


def test_stores_of_something_else_are_refused(packed):
    with pytest.raises(LowtideError, match="does not hold a tensor"):
        decode(replace(unpack(packed, "x"), meta={}))


@pytest.mark.parametrize("keys", [[-1], [6000], [0.5], [[1]]])
def test_positions_out_of_range_are_refused(packed, keys):
    with pytest.raises(LowtideError):
        unpack(packed, "x").symbols_of(np.array(keys))


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (np.zeros((3, 3)), {}, "all weights are zero"),
        (np.array([1, np.nan]), {}, "not finite"),
        (np.ones(3), {"target": np.ones(4)}, "target has 4"),
        (np.ones(3), {"corrections": 1.5}, "corrections"),
        (np.ones(3), {"seeds": 0}, "seeds"),
        (np.ones(3), {"table_size": 0}, "table size"),
    ],
)
def test_bad_tensors_and_options_are_refused(weights, options, message):
    with pytest.raises(LowtideError, match=message):
        encode(weights, **options)
