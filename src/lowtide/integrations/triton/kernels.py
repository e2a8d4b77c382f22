"""Triton kernels of the graded linear layer for one token. `graded.GradedGroup` allocates and calls them.

Three kernels run one after the other, and nothing goes back to the processor in between, so a CUDA graph can hold them:

1. `choose_entries` scores the channels and lists the entries (channel, slice) that are read. Each block of CHUNK
   channels has its own region of the list and its own count, so blocks need not know of each other.
2. `sum_digits` walks through the listed entries; only their bytes are loaded. Programs share the bytes of a channel
   and the regions of the list among them, and write partial sums.
3. `finish_rows` adds the partial sums, in order, and everything that is not digits.

No atomics: the same input and tuning give the same bits on the same machine.

Legend: `width` bytes of a channel of a slice, all members of the group side by side; rows: outputs of all members.
Annotations are not postponed here, because Triton reads them; it looks up every name in them as code.
"""

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit
def choose_entries(
    x: tl.tensor,
    mean: tl.tensor,
    col_scale: tl.tensor,
    importance: tl.tensor,
    readable: tl.tensor,
    shrink: tl.tensor,
    thresholds: tl.tensor,
    levels: tl.tensor,
    entry: tl.tensor,
    coef: tl.tensor,
    count: tl.tensor,
    inputs: tl.tensor,
    GIVEN: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Lists the entries that CHUNK channels read.

    Reads x f32 [in]; mean, col_scale, importance f16 [in]; readable u8 [in] (0 for exact channels); shrink f32 [S];
    thresholds f32 [S], or with GIVEN levels i32 [in] instead. Writes for chunk p: count i32 [p], and from
    p * CHUNK * SLICES on entry i32 (slice * in + channel) and coef f32 (a * c * gamma_L * 4^-slice).
    """
    chunk = tl.program_id(0)
    j = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = j < inputs
    a = tl.load(x + j, mask=inside, other=0.0) - tl.load(mean + j, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        level = tl.load(levels + j, mask=inside, other=0)
    else:
        score = tl.abs(a) * tl.load(importance + j, mask=inside, other=0.0).to(tl.float32)
        level = tl.zeros([CHUNK], tl.int32)
        for s in tl.static_range(SLICES):
            level += (score > tl.load(thresholds + s)).to(tl.int32)
    level = tl.where(tl.load(readable + j, mask=inside, other=0) != 0, level, 0)
    gamma = tl.load(shrink + level - 1, mask=level > 0, other=0.0)
    value = a * tl.load(col_scale + j, mask=inside, other=0.0).to(tl.float32) * gamma
    place = chunk * CHUNK * SLICES + tl.cumsum(level, 0) - level
    for s in tl.static_range(SLICES):
        tl.store(entry + place + s, s * inputs + j, mask=s < level)
        tl.store(coef + place + s, value, mask=s < level)
        value *= 0.25
    tl.store(count + chunk, tl.sum(level, 0))


@triton.jit
def sum_digits(
    weight: tl.tensor,
    entry: tl.tensor,
    coef: tl.tensor,
    count: tl.tensor,
    partial: tl.tensor,
    width: tl.tensor,
    inputs: tl.tensor,
    chunks: tl.tensor,
    splits: tl.tensor,
    SLICES: tl.constexpr,
    ZERO: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
) -> None:
    """partial f32 [splits, 4, width] = sum of coef * (digit - centre) over the entries of every splits-th chunk.

    Reads weight u8 [S * in, width] in the rows that `entry` names and no others. Byte b holds the digits of four rows,
    which end up in partial[:, 0..3, b].
    """
    split = tl.program_id(1)
    b = tl.program_id(0) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    inside = b < width
    sum0 = tl.zeros([BLOCK_ENTRIES, BLOCK_BYTES], tl.float32)
    sum1 = tl.zeros([BLOCK_ENTRIES, BLOCK_BYTES], tl.float32)
    sum2 = tl.zeros([BLOCK_ENTRIES, BLOCK_BYTES], tl.float32)
    sum3 = tl.zeros([BLOCK_ENTRIES, BLOCK_BYTES], tl.float32)
    coefs = tl.zeros([BLOCK_ENTRIES], tl.float32)
    for chunk in range(split, chunks, splits):
        entries = tl.load(count + chunk)
        region = chunk * CHUNK * SLICES
        for first in range(0, entries, BLOCK_ENTRIES):
            e = first + tl.arange(0, BLOCK_ENTRIES)
            live = e < entries
            u = tl.load(coef + region + e, mask=live, other=0.0)
            place = tl.load(entry + region + e, mask=live, other=0)
            run = place.to(tl.int64) * width
            byte = tl.load(weight + run[:, None] + b[None, :], mask=live[:, None] & inside[None, :], other=0)
            digits = byte.to(tl.int32)
            # Digits are masked where they stand and not shifted down: the sums are scaled once, at the end.
            sum0 += u[:, None] * (digits & 3).to(tl.float32)
            sum1 += u[:, None] * (digits & 12).to(tl.float32)
            sum2 += u[:, None] * (digits & 48).to(tl.float32)
            sum3 += u[:, None] * (digits & 192).to(tl.float32)
            if ZERO:  # the digit of each slice that means zero: 2 and 1 in turn
                coefs += u * (2 - (place // inputs) % 2).to(tl.float32)
            else:
                coefs += u * 1.5
    middle = tl.sum(coefs, 0)
    out = partial + split * 4 * width + b
    tl.store(out, tl.sum(sum0, 0) - middle, mask=inside)
    tl.store(out + width, tl.sum(sum1, 0) * 0.25 - middle, mask=inside)
    tl.store(out + 2 * width, tl.sum(sum2, 0) * 0.0625 - middle, mask=inside)
    tl.store(out + 3 * width, tl.sum(sum3, 0) * 0.015625 - middle, mask=inside)


@triton.jit
def finish_rows(
    partial: tl.tensor,
    place: tl.tensor,
    row_scale: tl.tensor,
    bias: tl.tensor,
    x: tl.tensor,
    mean: tl.tensor,
    exact_channels: tl.tensor,
    exact: tl.tensor,
    outlier_ptr: tl.tensor,
    outlier_col: tl.tensor,
    outlier_value: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    plane: tl.tensor,
    splits: tl.tensor,
    exacts: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTLIERS: tl.constexpr,
) -> None:
    """y f32 [rows] from the partial sums.

    Reads partial f32 [splits, plane] at place i32 [rows]; row_scale, bias f16 [rows]; exact f16 [exacts, rows] with
    exact_channels i32; outliers by row: outlier_ptr i32 [rows + 1], outlier_col i32, outlier_value f16; x, mean [in].
    """
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = r < rows
    from_ = tl.load(place + r, mask=inside, other=0)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for split in range(0, splits):
        total += tl.load(partial + split * plane + from_, mask=inside, other=0.0)
    total *= tl.load(row_scale + r, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + r, mask=inside, other=0.0).to(tl.float32)
    begin = tl.load(outlier_ptr + r, mask=inside, other=0)
    end = tl.load(outlier_ptr + r + 1, mask=inside, other=0)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_OUTLIERS], tl.float32)
    for first in range(0, tl.max(end - begin, 0), BLOCK_OUTLIERS):
        o = begin[:, None] + first + tl.arange(0, BLOCK_OUTLIERS)[None, :]
        live = o < end[:, None]
        col = tl.load(outlier_col + o, mask=live, other=0)
        a = tl.load(x + col, mask=live, other=0.0) - tl.load(mean + col, mask=live, other=0.0).to(tl.float32)
        sums += tl.load(outlier_value + o, mask=live, other=0.0).to(tl.float32) * a
    total += tl.sum(sums, 1)
    for e in range(0, exacts):
        column = tl.load(exact + e * rows + r, mask=inside, other=0.0).to(tl.float32)
        total += column * tl.load(x + tl.load(exact_channels + e))
    tl.store(y + r, total, mask=inside)
