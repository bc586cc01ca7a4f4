"""The GPU kernels. They know pointers, rows and channels; nothing of samplings.

A map is read as rows of channels, [batch rows, channels] with the channels next to each other. What a class,
a tap and a table are, :mod:`quincunx.ops.triton.layouts` says. Sums are float32 always.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = [
    "collect_rows",
    "depthwise",
    "finish",
    "gather_gemm",
    "gather_rows",
    "max_rows",
    "reduce_weight",
    "weight_grad",
]

# what @triton.jit takes as integers known when a kernel is compiled
constexpr: Any = tl.constexpr
_CLASS: Any = tl.constexpr(10)
# a tap and its shift in one integer, so that a step of a sum loads one
_BITS: Any = tl.constexpr(12)
_TAP: Any = tl.constexpr(4095)


@triton.jit
def _class_of(classes, tile, batch, count, BM: constexpr):
    """The class that a tile belongs to, and the number of its first tile."""
    which, first, begin = 0, 0, 0
    for i in range(count):
        tiles = tl.cdiv(batch * tl.load(classes + i * _CLASS), BM)
        inside = (tile >= begin) & (tile < begin + tiles)
        which = tl.where(inside, i, which)
        first = tl.where(inside, begin, first)
        begin += tiles
    return which, first


@triton.jit
def _activated(value, ACT: constexpr):
    # written so that what is not a number stays so, as in torch
    if ACT > 0:
        value = tl.where(value < 0, 0.0, value)
    if ACT == 2:
        value = tl.where(value > 6, 6.0, value)
    return value


@triton.jit
def _ended(
    acc, bias, residual, res_table, scale2, shift2, out, out2,
    image, row, ok, channels, ok_n, out_rows, out_channels, res_rows, res_channels,
    ACT: constexpr, ACT2: constexpr, WIDE: constexpr,
):  # fmt: skip
    """Bias, shortcut, activation and the second output of a tile, and its stores."""
    if bias is not None:
        acc += tl.load(bias + channels, mask=ok_n, other=0.0).to(tl.float32)[None, :]
    full = image * out_rows + row
    if WIDE:
        full = image.to(tl.int64) * out_rows + row
    if residual is not None:
        there = full
        if res_table is not None:
            inner = tl.load(res_table + row, mask=ok, other=0)
            there = image * res_rows + inner
            if WIDE:
                there = image.to(tl.int64) * res_rows + inner
        has = ok[:, None] & (channels < res_channels)[None, :] & ok_n[None, :]
        acc += tl.load(residual + there[:, None] * res_channels + channels[None, :], mask=has, other=0.0).to(
            tl.float32
        )
    acc = _activated(acc, ACT)
    stored = ok[:, None] & ok_n[None, :]
    place = full[:, None] * out_channels + channels[None, :]
    if out is not None:
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=stored)
    if out2 is not None:
        scale = tl.load(scale2 + channels, mask=ok_n, other=0.0).to(tl.float32)
        shift = tl.load(shift2 + channels, mask=ok_n, other=0.0).to(tl.float32)
        second = _activated(acc * scale[None, :] + shift[None, :], ACT2)
        tl.store(out2 + place, second.to(out2.dtype.element_ty), mask=stored)


# a new batch or size of a map is no reason to compile again; channels are, since loads depend on them
_SIZES = ["batch", "class_count", "tiles_n", "in_rows", "out_rows", "res_rows"]


@triton.jit(do_not_specialize=_SIZES)
def gather_gemm(
    x, w, bias, residual, res_table, scale2, shift2, out, out2, workspace,
    classes, taps, index, rows,
    batch, class_count, tiles_n, in_rows, out_rows,
    x_channels, out_channels, res_rows, res_channels,
    C: constexpr, O: constexpr, TAPS: constexpr, TRANSPOSED: constexpr, AFFINE: constexpr,
    ACT: constexpr, ACT2: constexpr, WIDE: constexpr, PRECISION: constexpr, SPLIT: constexpr,
    BM: constexpr, BN: constexpr, BK: constexpr,
):  # fmt: skip
    """A tile of BM rows and BN output channels of one channel group; one part of SPLIT of its sum."""
    tile = tl.program_id(0) // tiles_n
    group = tl.program_id(1)
    which, first = _class_of(classes, tile, batch, class_count, BM)
    about = classes + which * _CLASS
    points = tl.load(about)
    tap_begin = tl.load(about + 8)
    tap_count = tl.load(about + 9)

    number = (tile - first) * BM + tl.arange(0, BM)
    ok = number < batch * points
    image = number // points
    point = number - image * points
    first_row = image * in_rows
    if WIDE:
        first_row = image.to(tl.int64) * in_rows
    if AFFINE:
        columns = tl.load(about + 1)
        a = point // columns
        b = point - a * columns
        row = a * tl.load(about + 2) + b * tl.load(about + 3) + tl.load(about + 4)
        reach = tl.load(index + tl.load(about + 7) + point, mask=ok, other=0)
        first_row += a * tl.load(about + 5) + b * tl.load(about + 6)
    else:
        row = tl.load(rows + tl.load(about + 1) + point, mask=ok, other=0)
        table = index + tl.load(about + 2) + point

    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    ok_n = n < O
    k = tl.arange(0, BK)
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    # the weight's order in memory is known, so that places in a tile differ by constants
    if TRANSPOSED:
        weights = w + group * C * TAPS * O + k[:, None] * (TAPS * O) + n[None, :]
    else:
        weights = w + group * O * TAPS * C + n[None, :] * (TAPS * C) + k[:, None]
    values = x + group * C + k[None, :]

    begin = 0
    end = tap_count * BLOCKS
    if SPLIT > 1:
        share = tl.cdiv(end, SPLIT)
        begin = tl.program_id(2) * share
        end = tl.minimum(begin + share, end)

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if AFFINE:
        values += first_row[:, None] * x_channels
    for step in range(begin, end):
        t = step // BLOCKS
        block = (step - t * BLOCKS) * BK
        both = tl.load(taps + tap_begin + t)
        tap = (both & _TAP).to(tl.int32)
        if AFFINE:
            # which taps fall inside is known beforehand, and a tap is the same shift for all rows
            inside = ((reach >> t) & 1) != 0
            place = values + ((both >> _BITS).to(tl.int32) * x_channels + block)
        else:
            source = tl.load(table + t * points, mask=ok, other=-1)
            inside = source >= 0
            place = values + (first_row + source)[:, None] * x_channels + block
        if TRANSPOSED:
            theirs = weights + (block * TAPS + tap) * O
        else:
            theirs = weights + (tap * C + block)
        if C % BK == 0:
            left = tl.load(place, mask=inside[:, None], other=0.0)
            if O % BN == 0:
                right = tl.load(theirs)
            else:
                right = tl.load(theirs, mask=ok_n[None, :], other=0.0)
        else:
            some = block + k < C
            left = tl.load(place, mask=inside[:, None] & some[None, :], other=0.0)
            right = tl.load(theirs, mask=ok_n[None, :] & some[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    channels = group * O + n
    if SPLIT > 1:
        full = image * out_rows + row
        if WIDE:
            full = image.to(tl.int64) * out_rows + row
        part = tl.program_id(2).to(tl.int64) * batch * out_rows * out_channels
        place = full[:, None] * out_channels + channels[None, :]
        tl.store(workspace + part + place, acc, mask=ok[:, None] & ok_n[None, :])
    else:
        _ended(
            acc, bias, residual, res_table, scale2, shift2, out, out2,
            image, row, ok, channels, ok_n, out_rows, out_channels, res_rows, res_channels,
            ACT, ACT2, WIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "out_rows", "res_rows"])
def finish(
    workspace, bias, residual, res_table, scale2, shift2, out, out2,
    batch, out_rows, out_channels, res_rows, res_channels,
    ACT: constexpr, ACT2: constexpr, WIDE: constexpr, SPLIT: constexpr, BM: constexpr, BN: constexpr,
):  # fmt: skip
    """Adds the parts of a split sum, in their order, and ends it as ``gather_gemm`` does."""
    number = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = number < batch * out_rows
    image = number // out_rows
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    ok_n = channels < out_channels
    full = number
    if WIDE:
        full = number.to(tl.int64)
    place = full[:, None] * out_channels + channels[None, :]
    part = batch.to(tl.int64) * out_rows * out_channels
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(SPLIT):
        acc += tl.load(workspace + i * part + place, mask=ok[:, None] & ok_n[None, :], other=0.0)
    _ended(
        acc, bias, residual, res_table, scale2, shift2, out, out2,
        image, number - image * out_rows, ok, channels, ok_n, out_rows, out_channels, res_rows, res_channels,
        ACT, ACT2, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=[name for name in _SIZES if name != "tiles_n"])
def depthwise(
    x, w, bias, residual, res_table, scale2, shift2, out, out2,
    classes, taps, index, rows,
    batch, class_count, in_rows, out_rows,
    all_channels, res_rows, res_channels,
    TAPS: constexpr, AFFINE: constexpr, ACT: constexpr, ACT2: constexpr, WIDE: constexpr, BM: constexpr,
    BN: constexpr,
):  # fmt: skip
    """A tile of BM rows and BN channels of a convolution in which each channel has its own kernel."""
    tile = tl.program_id(0)
    which, first = _class_of(classes, tile, batch, class_count, BM)
    about = classes + which * _CLASS
    points = tl.load(about)
    tap_begin = tl.load(about + 8)
    tap_count = tl.load(about + 9)
    number = (tile - first) * BM + tl.arange(0, BM)
    ok = number < batch * points
    image = number // points
    point = number - image * points
    first_row = image * in_rows
    if WIDE:
        first_row = image.to(tl.int64) * in_rows
    if AFFINE:
        columns = tl.load(about + 1)
        a = point // columns
        b = point - a * columns
        row = a * tl.load(about + 2) + b * tl.load(about + 3) + tl.load(about + 4)
        reach = tl.load(index + tl.load(about + 7) + point, mask=ok, other=0)
        first_row += a * tl.load(about + 5) + b * tl.load(about + 6)
    else:
        row = tl.load(rows + tl.load(about + 1) + point, mask=ok, other=0)
        table = index + tl.load(about + 2) + point
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    ok_n = channels < all_channels
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for t in range(tap_count):
        both = tl.load(taps + tap_begin + t)
        tap = (both & _TAP).to(tl.int32)
        if AFFINE:
            inside = ((reach >> t) & 1) != 0
            full = first_row + (both >> _BITS).to(tl.int32)
        else:
            source = tl.load(table + t * points, mask=ok, other=-1)
            inside = source >= 0
            full = first_row + source
        value = tl.load(
            x + full[:, None] * all_channels + channels[None, :],
            mask=inside[:, None] & ok_n[None, :],
            other=0.0,
        )
        weight = tl.load(w + channels * TAPS + tap, mask=ok_n, other=0.0)
        acc += value.to(tl.float32) * weight.to(tl.float32)[None, :]
    _ended(
        acc, bias, residual, res_table, scale2, shift2, out, out2,
        image, row, ok, channels, ok_n, out_rows, all_channels, res_rows, res_channels,
        ACT, ACT2, WIDE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["batch", "points", "in_rows", "tiles_c", "blocks", "block_parts", "image_parts"]
)
def weight_grad(
    x, y, found, table, batch, points, in_rows, x_channels, y_channels, tiles_c,
    blocks, block_parts, image_parts,
    C: constexpr, O: constexpr, TAPS: constexpr, GROUPS: constexpr,
    PRECISION: constexpr, BP: constexpr, BO: constexpr, BC: constexpr,
):  # fmt: skip
    """One tile of dT/dw [O, taps, C] for one tap, over a part of the positions' blocks and of the images."""
    tile = tl.program_id(0)
    tile_c = tile % tiles_c
    rest = tile // tiles_c
    tap = rest % TAPS
    group = tl.program_id(1)
    part = tl.program_id(2)
    o = (rest // TAPS) * BO + tl.arange(0, BO)
    c = tile_c * BC + tl.arange(0, BC)
    ok_o = o < O
    ok_c = c < C
    share = tl.cdiv(blocks, block_parts)
    first_block = (part % block_parts) * share
    last_block = tl.minimum(first_block + share, blocks)
    images = tl.cdiv(batch, image_parts)
    first = (part // block_parts) * images
    last = tl.minimum(first + images, batch)

    y_first = y + first.to(tl.int64) * points * y_channels + (group * O + o)[None, :]
    x_first = x + first.to(tl.int64) * in_rows * x_channels + (group * C + c)[None, :]
    acc = tl.zeros((BO, BC), dtype=tl.float32)
    for block in range(first_block, last_block):
        point = block * BP + tl.arange(0, BP)
        ok = point < points
        source = tl.load(table + tap * points + point, mask=ok, other=-1)
        # what lies outside is zero on one side of the product already
        left_ok, right_ok = ok[:, None], (source >= 0)[:, None]
        if O % BO != 0:
            left_ok = left_ok & ok_o[None, :]
        if C % BC != 0:
            right_ok = right_ok & ok_c[None, :]
        # the same positions of image after image, so that a step finds no rows anew
        lefts = y_first + point[:, None] * y_channels
        rights = x_first + source[:, None] * x_channels
        for _ in range(first, last):
            left = tl.load(lefts, mask=left_ok, other=0.0)
            right = tl.load(rights, mask=right_ok, other=0.0)
            acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
            lefts += points * y_channels
            rights += in_rows * x_channels
    size = GROUPS * O * TAPS * C
    place = ((group * O + o)[:, None] * TAPS + tap) * C + c[None, :]
    kept = acc.to(found.dtype.element_ty)
    tl.store(found + part.to(tl.int64) * size + place, kept, mask=ok_o[:, None] & ok_c[None, :])


@triton.jit(do_not_specialize=["size", "count"])
def reduce_weight(workspace, out, size, count, BLOCK: constexpr):
    """Adds the parts of a gradient, in their order."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = number < size
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(count):
        acc += tl.load(workspace + i * size.to(tl.int64) + number, mask=ok, other=0.0)
    tl.store(out + number, acc.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["total", "in_rows", "out_rows"])
def gather_rows(
    x, out, index, total, in_rows, out_rows, channels,
    WIDE: constexpr, BM: constexpr, BN: constexpr,
):  # fmt: skip
    """out[n, p] = x[n, index[p]]: a map filled from its computed positions."""
    number = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = number < total
    image = number // out_rows
    source = tl.load(index + number - image * out_rows, mask=ok, other=0)
    channel = tl.program_id(1) * BN + tl.arange(0, BN)
    both = ok[:, None] & (channel < channels)[None, :]
    here, there = number, image * in_rows + source
    if WIDE:
        here, there = number.to(tl.int64), image.to(tl.int64) * in_rows + source
    value = tl.load(x + there[:, None] * channels + channel[None, :], mask=both, other=0.0)
    tl.store(out + here[:, None] * channels + channel[None, :], value, mask=both)


@triton.jit(do_not_specialize=["in_rows", "out_rows"])
def collect_rows(
    x, out, index, starts, in_rows, out_rows, channels,
    MAX: constexpr, MEAN: constexpr, WIDE: constexpr, BN: constexpr,
):  # fmt: skip
    """Of the rows behind each window their sum, mean or greatest value, in the order of the table."""
    number = tl.program_id(0)
    image = number // out_rows
    window = number - image * out_rows
    channel = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = channel < channels
    begin = tl.load(starts + window)
    end = tl.load(starts + window + 1)
    at = image * in_rows
    here = number
    if WIDE:
        at = image.to(tl.int64) * in_rows
        here = number.to(tl.int64)
    if MAX:
        acc = tl.full((BN,), float("-inf"), tl.float32)
    else:
        acc = tl.zeros((BN,), dtype=tl.float32)
    for i in range(begin, end):
        value = tl.load(x + (at + tl.load(index + i)) * channels + channel, mask=ok, other=0.0).to(tl.float32)
        if MAX:
            # what is not a number wins, as in torch
            acc = tl.where((value > acc) | (value != value), value, acc)
        else:
            acc += value
    if MEAN:
        acc = acc / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(out + here * channels + channel, acc.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["total", "height", "width", "out_height", "out_width"])
def max_rows(
    x, out, total, height, width, out_height, out_width, channels,
    KH: constexpr, KW: constexpr, SH: constexpr, SW: constexpr, TOP: constexpr, LEFT: constexpr,
    DH: constexpr, DW: constexpr, BM: constexpr, BN: constexpr,
):  # fmt: skip
    """The greatest value of each window of a dense map."""
    number = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = number < total
    column = number % out_width
    rest = number // out_width
    row = rest % out_height
    image = (rest // out_height).to(tl.int64)
    channel = tl.program_id(1) * BN + tl.arange(0, BN)
    ok_c = (channel < channels)[None, :]
    acc = tl.full((BM, BN), float("-inf"), tl.float32)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            r = row * SH - TOP + i * DH
            c = column * SW - LEFT + j * DW
            inside = ok & (r >= 0) & (r < height) & (c >= 0) & (c < width)
            place = ((image * height + r) * width + c)[:, None] * channels + channel[None, :]
            value = tl.load(x + place, mask=inside[:, None] & ok_c, other=float("-inf")).to(tl.float32)
            # what is not a number wins, as in torch
            acc = tl.where((value > acc) | (value != value), value, acc)
    here = number.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + here, acc.to(out.dtype.element_ty), mask=ok[:, None] & ok_c)
