"""The native entropy coder: every instruction set against the specification, and what it does with damaged streams."""

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.format import codec
from lowtide.format.entropy import Tables, classes, contexts
from lowtide.kernels import entropy, reference_entropy
from lowtide.kernels.native import available_isas

DAMAGED = "w: the coded weights are damaged; get the file again"
SHAPES = [(1, 1), (5, 3), (16, 2), (63, 9), (64, 1), (300, 7), (520, 5)]


def laplace(slices, out, inputs, seed=0, zeros=0.0):
    rng = np.random.default_rng(seed)
    spread = np.exp(0.5 * rng.normal(size=(out, 1)) + 0.5 * rng.normal(size=inputs))
    w = rng.laplace(size=(out, inputs)) * spread * 4.0**slices / 24
    w[rng.random(w.shape) < zeros] = 0
    return np.clip(np.rint(w) + 4**slices // 2, 0, 4**slices - 1).astype(np.uint8)


def coded(q, slices):
    rows, columns = classes(q, slices)
    tables = Tables.fit(entropy.histogram(q, rows, columns, slices), slices)
    return entropy.encode(q, rows, columns, tables), rows, columns, tables


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_streams_are_the_specification_and_decode(shape, slices):
    q = laplace(slices, *shape)
    streams, rows, columns, tables = coded(q, slices)
    assert streams == reference_entropy.encode(q, rows, columns, tables)
    np.testing.assert_array_equal(reference_entropy.decode_q(streams, rows, columns, tables, *shape), q)
    for isa in available_isas():
        packed = np.full(codec.packed_shape(*shape, slices), 255, np.uint8)
        entropy.decode(streams, rows, columns, tables, *shape, 1, packed, isa=isa)
        np.testing.assert_array_equal(packed, codec.pack_digits(q, slices))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", available_isas())
def test_many_chunks_on_many_threads(threads, isa):
    q = laplace(2, 3000, 1100, zeros=0.6)
    streams, rows, columns, tables = coded(q, 2)
    assert int.from_bytes(streams[0][4:8], "little") == len(reference_entropy.chunks(*q.shape)) == 4
    assert streams == entropy.encode(q, rows, columns, tables, threads=threads)
    np.testing.assert_array_equal(entropy.decode_q(streams, rows, columns, tables, *q.shape, threads, isa=isa), q)


@pytest.mark.parametrize(("out", "inputs"), [(1, 1), (7, 10**6), (1 << 20, 3), ((1 << 20) + 1, 3), (1000, 1049)])
def test_chunks_are_whole_channels_and_evenly_shared(out, inputs):
    spans = reference_entropy.chunks(out, inputs)
    assert entropy._library().lt_entropy_chunk_channels(out, inputs) == spans[0][1]
    assert spans[0][0] == 0 and spans[-1][1] == inputs
    assert all(b - a == 1 or (b - a) * out <= 1 << 20 for a, b in spans)


@pytest.mark.parametrize("isa", available_isas())
def test_a_prefix_of_the_slices_decodes_alone(isa):
    q = laplace(4, 70, 30)
    streams, rows, columns, tables = coded(q, 4)
    for levels in range(1, 5):
        found = entropy.decode_q(streams[:levels], rows, columns, tables, *q.shape, isa=isa)
        np.testing.assert_array_equal(found, q >> 2 * (4 - levels) << 2 * (4 - levels))
        spec = reference_entropy.decode_q(streams[:levels], rows, columns, tables, *q.shape)
        np.testing.assert_array_equal(found, spec)


def test_histogram_counts_each_context():
    q = laplace(3, 50, 40)
    rows, columns = classes(q, 3)
    counts = np.zeros((48, 64), np.int64)
    np.add.at(counts, (contexts(rows, columns).ravel(), q.ravel()), 1)
    np.testing.assert_array_equal(entropy.histogram(q, rows, columns, 3), counts)


def test_coded_size_is_within_a_percent_of_the_entropy():
    q = laplace(3, 600, 500)
    streams, rows, columns, tables = coded(q, 3)
    ideal = tables.entropy_bits(entropy.histogram(q, rows, columns, 3))
    assert ideal <= 8 * sum(map(len, streams)) <= 1.002 * ideal


def test_weights_that_are_nearly_all_alike_cost_nearly_nothing():
    q = np.full((900, 800), 32, np.uint8)
    q[:, 0] = np.arange(900) % 64
    q[:, 1] = np.arange(900) // 64
    streams, *_ = coded(q, 3)
    assert sum(map(len, streams)) < 4 + 3 * (4 + 4 + 64) + 900 * 2


@pytest.mark.parametrize("isa", available_isas())
def test_copied_rows_are_stored_once(isa):
    q = laplace(3, 700, 40)
    rng = np.random.default_rng(8)
    alone = sum(map(len, coded(q, 3)[0]))
    q = np.concatenate([q, q[rng.integers(0, 600, 900)]])[rng.permutation(1600)]
    streams, rows, columns, tables = coded(q, 3)
    assert sum(map(len, streams)) < alone + 1600 // 8 + 900 * 10 // 8 + 100
    assert streams == reference_entropy.encode(q, rows, columns, tables)
    np.testing.assert_array_equal(entropy.decode_q(streams, rows, columns, tables, *q.shape, isa=isa), q)
    np.testing.assert_array_equal(entropy.decode_q(streams[:2], rows, columns, tables, *q.shape, isa=isa), q >> 2 << 2)
    assert fails_or_decodes(streams, rows, columns, tables, q.shape) == q.tobytes()
    for at in range(4 + 1600 // 8 + 900 * 10 // 8):
        bad = streams[0][:at] + bytes([streams[0][at] ^ 0x55]) + streams[0][at + 1 :]
        try:
            entropy.decode_q([bad, *streams[1:]], rows, columns, tables, *q.shape, where="w", isa=isa)
        except LowtideError as error:
            assert str(error) == DAMAGED


def test_zero_frequencies_are_refused_by_name():
    q = laplace(2, 20, 20)
    _, rows, columns, _ = coded(q, 2)
    tables = Tables.fit(10**6 * entropy.histogram(np.full_like(q, 8), rows, columns, 2), 2)
    for module in (entropy, reference_entropy):
        with pytest.raises(LowtideError, match="fit the tables to all matrices"):
            module.encode(q, rows, columns, tables)


def fails_or_decodes(streams, rows, columns, tables, shape):
    """Whether native and specification agree on damaged streams: an error in both, or the same integers."""
    results = []
    for isa in [None, *available_isas()]:
        try:
            if isa is None:
                results.append(reference_entropy.decode_q(streams, rows, columns, tables, *shape, where="w").tobytes())
            else:
                results.append(entropy.decode_q(streams, rows, columns, tables, *shape, where="w", isa=isa).tobytes())
        except LowtideError as error:
            results.append(str(error))
    assert len(set(results)) == 1, results
    return results[0]


def replaced(streams, index, data):
    return [bytes(data) if s == index else stream for s, stream in enumerate(streams)]


def test_streams_of_the_wrong_length_are_found():
    q = laplace(2, 40, 12)
    streams, rows, columns, tables = coded(q, 2)
    for index, stream in enumerate(streams):
        lengths = [*range(0, 16), len(stream) - 2, len(stream) - 1]
        wrong = [stream[:n] for n in lengths] + [stream + b"\0", stream + b"\0\0"]
        at_chunks = 0 if index else 4  # where the number of chunks is; the only chunk's length follows
        for at in range(at_chunks + 8):
            wrong.append(stream[:at] + bytes([stream[at] ^ 1]) + stream[at + 1 :])
        # A length that fits, and a word too few or too many.
        for n in (70, len(stream) - 10, len(stream) + 2):
            body = (stream + b"\0\0")[at_chunks + 8 : n]
            wrong.append(stream[: at_chunks + 4] + len(body).to_bytes(4, "little") + body)
        for data in wrong:
            found = fails_or_decodes(replaced(streams, index, data), rows, columns, tables, q.shape)
            assert found == DAMAGED


def test_damaged_words_do_no_harm_and_are_mostly_found():
    """A flip can turn one valid stream into another, where two digits have equal frequencies: that is for SHA-256."""
    q = laplace(2, 40, 12)
    streams, rows, columns, tables = coded(q, 2)
    rng = np.random.default_rng(3)
    missed = 0
    for trial in range(80):
        data = bytearray(streams[trial % 2])
        at = int(rng.integers(12, len(data) - 8))
        if trial // 2 % 2:
            data[at] ^= 1 << rng.integers(8)
        else:
            data[at : at + 8] = rng.bytes(8)
        bad = replaced(streams, trial % 2, data)
        missed += fails_or_decodes(bad, rows, columns, tables, q.shape) != DAMAGED
    assert missed < 20


def test_wrong_classes_and_tables_do_no_harm():
    q = laplace(3, 130, 20)
    streams, rows, columns, tables = coded(q, 3)
    rng = np.random.default_rng(4)
    for _ in range(10):
        other = rng.integers(0, 256, len(rows)).astype(np.uint8)
        assert fails_or_decodes(streams, other, columns, tables, q.shape) == DAMAGED
    sparse = coded(laplace(3, 130, 20, 9, 0.9), 3)[3]
    assert fails_or_decodes(streams, rows, columns, sparse, q.shape) == DAMAGED
    assert fails_or_decodes(streams, rows[:100], columns, tables, (100, 20)) == DAMAGED


def test_class_bytes_round_trip_and_are_checked():
    rng = np.random.default_rng(6)
    vectors = [np.clip(np.rint(rng.normal(34 + 5 * (n % 3), 1.5, 5000)), 0, 255).astype(np.uint8) for n in range(12)]
    lengths, kinds = [5000] * 12, [n % 3 for n in range(12)]
    data = entropy.encode_classes(vectors, kinds)
    assert 8 * len(data) < 2.75 * 12 * 5000  # the entropy of such normals is 2.65 bits
    for found, wanted in zip(entropy.decode_classes(data, lengths, kinds, "m"), vectors, strict=True):
        np.testing.assert_array_equal(found, wanted)
    for bad in (b"", data[:10], data[:-1], data + b"\0", data[:40] + bytes([data[40] ^ 8]) + data[41:]):
        with pytest.raises(LowtideError, match="^m: "):
            entropy.decode_classes(bad, lengths, kinds, "m")
    with pytest.raises(LowtideError, match="^m: "):
        entropy.decode_classes(data, [5000] * 11, kinds[:11], "m")
    assert entropy.encode_classes([], []) == b"" and entropy.decode_classes(b"", [], [], "m") == []


def test_wrong_arguments_are_named(monkeypatch):
    q = laplace(2, 20, 10)
    streams, rows, columns, tables = coded(q, 2)
    packed = np.empty(codec.packed_shape(20, 10, 2), np.uint8)
    with pytest.raises(ValueError, match=r"row_class must be uint8 \[20\]"):
        entropy.decode(streams, rows[:-1], columns, tables, 20, 10, 1, packed)
    with pytest.raises(ValueError, match="packed_out"):
        entropy.decode(streams, rows, columns, tables, 20, 10, 1, packed[:1])
    with pytest.raises(ValueError, match="streams must be 1 to 2"):
        entropy.decode([], rows, columns, tables, 20, 10, 1, packed)
    with pytest.raises(ValueError, match="does not fit"):
        entropy.histogram(np.full((2, 2), 16, np.uint8), rows[:2], columns[:2], 2)
    monkeypatch.setenv("LOWTIDE_ISA", "abacus")
    with pytest.raises(LowtideError, match="LOWTIDE_ISA=abacus: not available"):
        entropy.decode(streams, rows, columns, tables, 20, 10, 1, packed)
