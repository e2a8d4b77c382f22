"""The graded linear layer on torch devices: both backends against the numpy specification and exact arithmetic.

Without a GPU the Triton kernels run in Triton's interpreter, on the CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'lowtide[compress]'")

from lowtide.errors import LowtideError  # noqa: E402
from lowtide.format import codec  # noqa: E402
from lowtide.format.groups import GroupTensors, LinearTensors  # noqa: E402
from lowtide.integrations.triton import GradedGroup, Tuning, graded  # noqa: E402
from lowtide.kernels import reference_ops as ops  # noqa: E402
from lowtide.rules import GroupStats, get_rule  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton looks at this when it is imported, and later imports cannot change what it then decided.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "Triton was imported before this file could choose its interpreter: set TRITON_INTERPRET=1 for all tests"
    )
    os.environ.setdefault("TRITON_INTERPRET", "1")


def backends():
    try:
        import triton  # noqa: F401
    except ImportError:
        skip = pytest.mark.skip(reason="needs Triton (pip install triton); it comes with torch's CUDA builds")
        return ["torch", pytest.param("triton", marks=skip)]
    return ["torch", "triton"]


BACKENDS = backends()
both = pytest.mark.parametrize("backend", BACKENDS)
only_triton = pytest.mark.parametrize("backend", BACKENDS[1:])

#: Small blocks, so that small groups meet every loop and every edge.
SMALL = Tuning(chunk=16, block_bytes=32, block_entries=4, splits=3, block_rows=16, block_outliers=2)

SHAPES = {
    "several-members": {"outs": (5, 3, 70), "inputs": 41, "exact": (2, 11)},
    "one-weight": {"outs": (1,), "inputs": 1, "exact": (), "outliers": 0},
    "both-tile-widths": {"outs": (321, 64), "inputs": 19, "exact": (0, 18), "outliers": 40},
    "all-exact-but-one": {"outs": (33,), "inputs": 4, "exact": (0, 1, 3), "outliers": 2},
    "full-blocks": {"outs": (128, 128), "inputs": 64, "exact": (), "outliers": 1},
}
shapes = pytest.mark.parametrize("shape", sorted(SHAPES))


def random_group(outs, inputs, exact=(), slices=3, outliers=6, seed=0):
    rng = np.random.default_rng(seed)
    free = np.setdiff1d(np.arange(inputs), exact)
    half = np.float16

    def linear(name, out):
        cells = rng.choice(out * len(free), min(outliers, out * len(free)), replace=False)
        values = rng.uniform(1, 3, len(cells)).astype(half)
        ptr, row, gap, value = codec.pack_outliers(cells // len(free), free[cells % len(free)], values, out)
        return LinearTensors(
            name=name,
            weight=codec.pack_digits(rng.integers(0, 4**slices, (out, inputs), dtype=np.uint8), slices),
            row_scale=rng.uniform(0.5, 2, out).astype(half),
            bias=rng.normal(0, 1, out).astype(half),
            exact=rng.normal(0, 1, (len(exact), out)).astype(half),
            outlier_ptr=ptr,
            outlier_row=row,
            outlier_gap=gap,
            outlier_value=value,
            out_features=out,
        )

    keep = np.isin(np.arange(inputs), free)
    return GroupTensors(
        name="layers.0.qkv",
        in_features=inputs,
        slices=slices,
        mean=(rng.normal(0, 0.2, inputs) * keep).astype(half),
        col_scale=rng.uniform(0.5, 2, inputs).astype(half),
        importance=(rng.uniform(0.5, 2, inputs) * keep).astype(half),
        shrink=rng.uniform(0.8, 1.1, slices).astype(np.float32),
        exact_channels=np.array(exact, np.int32),
        thresholds=np.zeros((1, 1, slices), np.float32),
        linears=[linear(f"model.layers.0.member{i}", out) for i, out in enumerate(outs)],
    )


def random_input(group, seed=1):
    return np.random.default_rng(seed).normal(0, 1, group.in_features).astype(np.float32)


def random_levels(group, seed=2):
    levels = np.random.default_rng(seed).integers(0, group.slices + 1, group.in_features).astype(np.int32)
    levels[group.exact_channels] = 0
    return levels


def on_device(array):
    return torch.from_numpy(np.array(array)).to(DEVICE)


def exact_product(group, index, x, levels):
    """y f64 [out] of a member without any rounding of inputs, and the sum of the terms' magnitudes f64 [out]."""
    a = x.astype(np.float64) - group.mean.astype(np.float64)
    weights = np.stack([group.dequantise(index, level) for level in range(group.slices + 1)]).astype(np.float64)
    chosen = weights[levels, :, np.arange(group.in_features)].T
    terms = (chosen + group.exact_part(index)) * a
    bias = group.linears[index].bias.astype(np.float64)
    return terms.sum(1) + bias, np.abs(terms).sum(1) + np.abs(bias)


def reference_bound(group, index, x, levels):
    """f64 [out]: how far rounding coefficients to int8 can take the reference from the exact product.

    Each coefficient is off by at most half, and meets 2 * digit - 3 times its class scale times the row's.
    """
    linear = group.linears[index]
    digits = codec.digit_planes(linear.weight, linear.out_features, group.in_features).astype(np.float64)
    a = (x - group.mean.astype(np.float32))[None]
    _, scale = ops.coefficients(a, levels[None], group.col_scale.astype(np.float32), group.shrink)
    bound = np.zeros(linear.out_features)
    for j, level in enumerate(levels):
        for s in range(level):
            bound += scale[level - s - 1, 0] * 0.5 * np.abs(2 * digits[s, :, j] - 3)
    return bound * linear.row_scale.astype(np.float64)


def check(group, outputs, x, levels):
    """Every member within float32 rounding of the exact product, and within its own rounding of the reference."""
    assert [len(y) for y in outputs] == [linear.out_features for linear in group.linears]
    for i, (linear, y) in enumerate(zip(group.linears, outputs, strict=True)):
        assert y.dtype == torch.float32
        got = y.cpu().numpy().astype(np.float64)
        want, size = exact_product(group, i, x, levels)
        np.testing.assert_array_less(np.abs(got - want), 2e-6 * size + 1e-6)
        planes = ops.channel_planes(codec.digit_planes(linear.weight, linear.out_features, group.in_features))
        reference = ops.graded_linear(group, linear, planes, x[None], levels[None])[0]
        np.testing.assert_array_less(np.abs(got - reference), reference_bound(group, i, x, levels) + 4e-6 * size + 1e-6)


# ---- the product ----


@both
@shapes
@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_product_for_given_levels(backend, shape, slices):
    group = random_group(**SHAPES[shape], slices=slices)
    layer = GradedGroup(group, DEVICE, backend=backend, tuning=SMALL)
    x = random_input(group)
    for levels in (random_levels(group), np.zeros(group.in_features, np.int32)):
        check(group, layer.apply(on_device(x), on_device(levels)), x, levels)


@both
@shapes
@pytest.mark.parametrize("slices", [1, 3, 4])
def test_product_with_levels_from_thresholds(backend, shape, slices):
    """Levels are the rule's own, so the rest can be held against them."""
    group = random_group(**SHAPES[shape], slices=slices, seed=5)
    layer = GradedGroup(group, DEVICE, backend=backend, tuning=SMALL)
    x = random_input(group, 6)
    thresholds = np.array([0.2, 0.6, 1.3, np.inf], np.float32)[:slices]
    levels = get_rule("channel-norm").levels(GroupStats.of(group), x, thresholds)
    check(group, layer(on_device(x), on_device(thresholds)), x, levels)


@both
@pytest.mark.parametrize(("threshold", "level"), [(-1.0, 3), (np.inf, 0)])
def test_thresholds_at_their_ends(backend, threshold, level):
    """Below every score all slices are read (but none of exact channels, whatever the threshold); infinite: none."""
    group = random_group((70,), 37, (4, 9))
    x, levels = random_input(group), np.full(37, level, np.int32)
    levels[[4, 9]] = 0
    layer = GradedGroup(group, DEVICE, backend=backend, tuning=SMALL)
    thresholds = on_device(np.full(3, threshold, np.float32))
    assert layer.levels(on_device(x), thresholds).tolist() == levels.tolist()
    check(group, layer(on_device(x), thresholds), x, levels)


@both
def test_a_score_at_a_threshold_is_not_above_it(backend):
    group = random_group((8,), 6, outliers=0)
    x = random_input(group)
    score = np.abs(x - group.mean.astype(np.float32)) * group.importance.astype(np.float32)
    thresholds = np.sort(score)[[1, 3, 4]]
    layer = GradedGroup(group, DEVICE, backend=backend)
    levels = (score[:, None] > thresholds).sum(1).astype(np.int32)
    assert sorted(levels) == [0, 0, 1, 1, 2, 3]
    check(group, layer(on_device(x), on_device(thresholds)), x, levels)


@both
def test_the_check_notices_one_wrong_level(backend):
    """What the tests above rest on: one channel at a neighbouring level is outside the tolerance."""
    group = random_group((70,), 37, (4, 9))
    x, levels = random_input(group), random_levels(group)
    wrong = levels.copy()
    channel = int(np.argmax(levels == 2))
    wrong[channel] = 3
    outputs = GradedGroup(group, DEVICE, backend=backend).apply(on_device(x), on_device(wrong))
    with pytest.raises(AssertionError):
        check(group, outputs, x, levels)


@only_triton
@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(),
        Tuning(chunk=1, block_bytes=16, block_entries=1, splits=1, block_rows=1, block_outliers=1),
        Tuning(chunk=128, block_bytes=256, block_entries=32, splits=500, block_rows=128, block_outliers=32),
    ],
    ids=["default", "smallest", "larger-than-the-group"],
)
def test_tuning_changes_speed_alone(backend, tuning):
    group = random_group((65, 20), 40, (7,), outliers=30)
    x, levels = random_input(group), random_levels(group)
    layer = GradedGroup(group, DEVICE, backend=backend, tuning=tuning)
    check(group, layer.apply(on_device(x), on_device(levels)), x, levels)


@both
def test_a_group_is_used_again_and_outputs_are_not(backend):
    """Scratch memory holds the last call's longer list; outputs of earlier calls stay as they were."""
    group = random_group((70,), 37, (4, 9))
    layer = GradedGroup(group, DEVICE, backend=backend, tuning=SMALL)
    cases = [(random_input(group, seed), random_levels(group, seed)) for seed in (3, 4)]
    cases[1][1][::2] = 0
    outputs = [layer.apply(on_device(x), on_device(levels)) for x, levels in cases]
    for (x, levels), y in zip(cases, outputs, strict=True):
        check(group, y, x, levels)


# ---- what is read ----


@pytest.mark.skipif(DEVICE != "cpu", reason="watches the loads of Triton's interpreter")
@only_triton
def test_only_the_digits_of_read_slices_are_loaded(backend, monkeypatch):
    """Every address of the packed weights that the kernels load, once for every entry and never for another."""
    group = random_group((70, 12), 37, (4, 9), slices=4)
    layer = GradedGroup(group, DEVICE, backend=backend, tuning=SMALL)
    x, levels = random_input(group), random_levels(group, seed=1)
    assert all(levels[i : i + SMALL.chunk].sum() % SMALL.block_entries for i in range(0, 37, SMALL.chunk))
    from triton.runtime.interpreter import interpreter_builder

    loaded, load = [], interpreter_builder.create_masked_load

    def watched(pointers, mask, *rest):
        if pointers.data.ndim == 2 and pointers.dtype.element_ty.name == "uint8":
            loaded.append(pointers.data[mask.data.astype(bool)])
        return load(pointers, mask, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", watched)
    check(group, layer.apply(on_device(x), on_device(levels)), x, levels)
    assert len(loaded) > 1
    addresses = np.concatenate(loaded).astype(np.int64)
    width = layer._weight.shape[2]
    start = layer._weight.data_ptr()
    runs = [s * 37 + j for j, level in enumerate(levels) for s in range(level)]
    want = start + (np.array(sorted(runs))[:, None] * width + np.arange(width)).ravel()
    np.testing.assert_array_equal(np.sort(addresses), want)


@both
def test_bytes_read_counts_runs_and_side_tensors(backend):
    group = random_group((70, 12), 37, (4, 9))
    layer = GradedGroup(group, DEVICE, backend=backend)
    levels = on_device(random_levels(group))
    idle = layer.bytes_read(torch.zeros_like(levels))
    assert layer.bytes_read(levels) - idle == int(levels.sum()) * (128 + 64) // 4
    rows, outliers = 82, 12
    assert idle == 37 * 7 + 3 * 4 + 2 * 4 + rows * (2 + 2 + 2 * 2 + 4) + (rows + 1) * 4 + outliers * 6


# ---- a real GPU, as far as one can go without it ----


@only_triton
def test_kernels_compile_for_a_gpu(backend, tmp_path):
    """The interpreter accepts what the compiler refuses; the compiler needs no GPU. Launches are the real ones."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(tmp_path)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == 2 * ["choose_entries", "sum_digits", "finish_rows"]


# ---- refusals ----


def test_backends_are_chosen_by_what_is_there(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(graded.importlib.util, "find_spec", lambda name: None)
    assert graded.choose_backend("auto", gpu) == "torch"
    with pytest.raises(LowtideError, match="pip install triton"):
        graded.choose_backend("triton", gpu)
    monkeypatch.setattr(graded.importlib.util, "find_spec", lambda name: object())
    assert graded.choose_backend("auto", gpu) == "triton"
    assert graded.choose_backend("auto", cpu) == "torch"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(LowtideError, match="needs a GPU"):
        graded.choose_backend("triton", cpu)
    with pytest.raises(LowtideError, match="'cuda' is not known"):
        graded.choose_backend("cuda", gpu)


@both
def test_wrong_tensors_are_refused(backend):
    group = random_group((5,), 8, slices=2)
    layer = GradedGroup(group, DEVICE, backend=backend)
    x, thresholds = on_device(random_input(group)), on_device(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"x must be .*\[8\]"):
        layer(x[:7], thresholds)
    with pytest.raises(ValueError, match="x must be a contiguous"):
        layer(x.repeat(2)[::2], thresholds)
    with pytest.raises(ValueError, match="thresholds must be"):
        layer(x, thresholds.double())
    with pytest.raises(ValueError, match="levels must be"):
        layer.apply(x, torch.zeros(8, dtype=torch.int64, device=DEVICE))


@pytest.mark.parametrize("wrong", [{"chunk": 48}, {"block_bytes": 0}, {"splits": 0}])
def test_tuning_takes_powers_of_two(wrong):
    with pytest.raises(ValueError, match="must be"):
        Tuning(**wrong)
