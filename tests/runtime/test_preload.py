"""Preloading: which arrays a budget may read, and that no other page is touched."""

import mmap
import sys

import numpy as np
import pytest
from support.tiny import make_artifact

import lowtide
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels.native import Engine
from lowtide.kernels.types import PolicyParams
from lowtide.runtime.budget import policy_params
from lowtide.runtime.memory import give_back_unused, pages_of, peak_rss_bytes, read_pages, rss_bytes
from lowtide.runtime.preload import preload, readable, readable_slices

PAGE = 4096
AROUND = 16 * PAGE  # Linux maps up to this much around a page that it reads, if it is in memory anyway


def policy(artifact, *rows, rule="channel-norm"):
    """The rows of thresholds in turn for the groups, head last."""
    count = 4 * artifact.config.num_layers + 1
    return PolicyParams(rule, np.array([rows[i % len(rows)] for i in range(count)], np.float32))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("preload") / "a"
    return open_artifact(make_artifact(path, tied=False, policies=("channel-norm", "ipn")))


@pytest.mark.parametrize(
    ("rule", "row", "slices"),
    [
        ("channel-norm", [0.1, 0.2, 0.3], 3),
        ("channel-norm", [0.1, 0.2, np.inf], 2),
        ("channel-norm", [np.inf, np.inf, np.inf], 0),
        ("statistical-topk", [-0.5, 0.2, np.inf], 2),
        ("topk", [12, 3, 0], 2),
        ("topk", [0, 0, 0], 0),
        ("dense", [0, 0, 0], 3),
    ],
)
def test_slices_that_a_policy_may_read(rule, row, slices):
    assert readable_slices(PolicyParams(rule, np.array([row], np.float32)), 0, 3) == slices


def test_what_a_policy_may_read_is_listed_and_nothing_else(artifact):
    """Each group by its own row; every slice for prompts and for looking up embeddings."""
    chosen = policy(artifact, [0.1, 0.2, np.inf], [0.1, np.inf, np.inf])
    listed = {a.ctypes.data for a in readable(artifact, chosen, prompts=False) if a.nbytes}
    for row, (name, group) in enumerate(artifact.groups.items()):
        slices = 3 if name == "embed" else 2 - row % 2
        for linear in group.linears:
            assert [linear.weight[s].ctypes.data in listed for s in range(3)] == [s < slices for s in range(3)]
            assert linear.row_scale.ctypes.data in listed and linear.outlier_value.ctypes.data in listed
        assert group.importance.ctypes.data in listed
        assert group.thresholds.ctypes.data not in listed or not group.thresholds.size
        assert group.ipn is None or group.ipn.importance.ctypes.data not in listed
    whole = readable(artifact, chosen)
    for group in artifact.groups.values():
        for linear in group.linears:
            assert all(any(a is w or a.ctypes.data == w.ctypes.data for a in whole) for w in linear.weight)


def test_a_tied_head_is_looked_up(tiny_artifact):
    artifact = open_artifact(tiny_artifact)
    chosen = policy(artifact, [np.inf] * 3)
    listed = {a.ctypes.data for a in readable(artifact, chosen, prompts=False)}
    assert all(w.ctypes.data in listed for w in artifact.groups["head"].linears[0].weight)
    assert artifact.groups["layers.0.o"].linears[0].weight.ctypes.data not in listed


def test_the_rule_ipn_reads_its_own_tensors(artifact):
    listed = {a.ctypes.data for a in readable(artifact, policy_params(artifact, "ipn", 5.0))}
    group = artifact.groups["layers.1.gate_up"]
    assert group.ipn.probe.ctypes.data in listed and group.ipn.importance.ctypes.data in listed
    assert group.importance.ctypes.data not in listed


def test_the_rule_ipn_reads_centroids_in_place_of_means(tmp_path):
    made = open_artifact(make_artifact(tmp_path / "a", policies=("channel-norm", "ipn"), centroids=5))
    tables = made.centroids()
    for prompts in (False, True):
        listed = {a.ctypes.data for a in readable(made, policy_params(made, "ipn", 5.0), prompts)}
        for name, group in made.groups.items():
            for table in (tables[name].mean, *tables[name].bias):
                assert table.ctypes.data in listed
            own = [group.mean, *(linear.bias for linear in group.linears)]
            assert all((a.ctypes.data in listed) == prompts for a in own)
            assert group.ipn.keys is None or {group.ipn.keys.ctypes.data, group.ipn.channels.ctypes.data} <= listed
            assert not {group.ipn.centroids.ctypes.data, group.ipn.step.ctypes.data} & listed
    listed = {a.ctypes.data for a in readable(made, policy_params(made, "channel-norm", 5.0), False)}
    head = made.groups["head"]
    assert head.mean.ctypes.data in listed and head.linears[0].bias.ctypes.data in listed
    assert not {tables["head"].mean.ctypes.data, head.ipn.keys.ctypes.data} & listed


def test_pages_are_counted_once():
    memory = np.zeros(16 * PAGE, np.uint8)
    base = -memory.ctypes.data % PAGE
    at = memory.ctypes.data + base
    part = [memory[base + a : base + b] for a, b in ((10, 20), (PAGE - 1, PAGE + 1), (5 * PAGE, 6 * PAGE), (30, 40))]
    assert pages_of([*part, memory[:0]]) == [(at, 2 * PAGE), (at + 5 * PAGE, PAGE)]
    assert read_pages(part) == 3 * PAGE
    assert pages_of([]) == []


def test_without_the_call_of_linux_pages_are_read_by_hand(artifact, monkeypatch):
    arrays = readable(artifact, policy_params(artifact, None, 5.0))
    wanted = read_pages(arrays)
    monkeypatch.setattr("lowtide.runtime.memory._libc", lambda: None)
    assert read_pages(arrays) == wanted
    give_back_unused()


def present(array):
    """Whether each page of an array is mapped in this process (Linux' pagemap, bit 63)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        first, last = array.ctypes.data // PAGE, (array.ctypes.data + array.nbytes - 1) // PAGE
        pagemap.seek(8 * first)
        entries = np.frombuffer(pagemap.read(8 * (last - first + 1)), np.uint64)
    return (entries >> np.uint64(63)).astype(bool)


def mapping(array):
    """The memory-mapped file that an artifact's array is a view of."""
    while not isinstance(array, memoryview):
        array = array.base
    return array.obj


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/pagemap")
def test_slices_never_read_are_never_touched(tmp_path):
    """Neither by preloading nor by decoding. The file lies in small pages, as a slow writer leaves it."""
    path = make_artifact(tmp_path / "a", vocab=4096, hidden=256, layers=1, tied=False, outliers=0.0, exact=0)
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with open(weights, "wb", buffering=0) as file:
        for start in range(0, len(content), PAGE):
            file.write(content[start : start + PAGE])
    artifact = open_artifact(path)
    head = artifact.groups["head"].linears[0].weight
    mapping(head).madvise(mmap.MADV_DONTNEED)  # it was hashed
    assert head[0].nbytes == 4 * AROUND
    assert not any(present(head[s])[16:-16].any() for s in range(3))
    chosen = policy(artifact, [0.1, np.inf, np.inf])
    preload(artifact, chosen, prompts=False)
    engine = Engine(artifact, threads=2)
    for pos, token in enumerate((1, 2, 3, 4000)):
        engine.decode(token, pos, chosen)
    assert present(head[0]).all()
    assert not present(head[1])[17:-17].any() and not present(head[2])[17:-17].any()
    preload(artifact, chosen)  # prompts read every slice
    assert all(present(head[s]).all() for s in range(3))


def test_models_preload_for_a_budget(tiny_artifact):
    with lowtide.load(tiny_artifact, threads=1) as model:
        text = "".join(model.generate("the", 8, 5.0))
        size = model.preload(5.0)
        assert 0 < size <= sum(f.stat().st_size for f in tiny_artifact.iterdir()) + 2 * PAGE
        assert "".join(model.generate("the", 8, 5.0)) == text
        with pytest.raises(LowtideError, match="--bits 99"):
            model.preload(99.0)


def test_bench_tells_the_memory_and_what_was_preloaded(tiny_artifact):
    plain = lowtide.bench(tiny_artifact, (5.0,), 4, 4, threads=1, repetitions=1)
    assert plain["preload_bytes"] == 0
    assert 0 < plain["rss_bytes"] <= plain["peak_rss_bytes"]
    assert lowtide.bench(tiny_artifact, (5.0, None), 4, 4, threads=1, repetitions=1, preload=True)["preload_bytes"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_resident_memory_is_what_is_there_now():
    before = rss_bytes()
    block = bytearray(b"x") * (64 << 20)
    assert rss_bytes() >= before + (60 << 20)
    del block
    assert rss_bytes() < before + (30 << 20) < peak_rss_bytes()
