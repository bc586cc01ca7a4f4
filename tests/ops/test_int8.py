"""Arithmetic in eight bits: grids, the reference against sums written out, kernels against the reference."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import oracle
from quincunx.ops import int8, native, native_int8
from quincunx.ops.geometry import Geometry
from quincunx.ops.int8 import (
    Grid,
    accumulate,
    convolve,
    dequantise,
    end,
    fill,
    finish,
    grid_of_range,
    quantise,
    quantise_weight,
)
from quincunx.ops.plan import fill_plan, position_index
from quincunx.sampling import CHESSBOARD, QUARTER, Random


def integers(low, high, *shape, seed=0, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def rounded(value):
    """To the nearest integer, ties to even, of an exact fraction."""
    whole, rest = divmod(value, 1)
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)
    return int(whole) + bool(up)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_quantise_rounds_ties_to_even_and_saturates(dtype):
    low, high = (0, 255) if dtype == torch.uint8 else (-128, 127)
    grid = Grid(0.25, low + 100, dtype)
    x = torch.arange(-1000, 1000) / 16
    expected = [min(high, max(low, rounded(Fraction(float(v)) * 4) + low + 100)) for v in x]
    assert quantise(x, grid).tolist() == expected
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
    assert quantise(special, grid).tolist() == [low, high, low, high, low]
    whole = torch.arange(low, high + 1).to(dtype)
    assert torch.equal(grid.encode(grid.decode(whole)), whole)


@pytest.mark.parametrize(
    ("low", "high", "value"), [(0, 0, 0.0), (3, 3, 3.0), (-2, -2, -2.0), (-1, 3, 0.0), (0, 1e-30, 0.0)]
)
def test_a_grid_of_a_range_holds_zero_and_constant_maps(low, high, value):
    grid = grid_of_range(low, high)
    held = dequantise(quantise(torch.tensor([value, 0.0]), grid), grid)
    assert held[0].item() == pytest.approx(value, rel=1e-6)
    assert held[1] == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grid(0.0),
        lambda: Grid(float("nan")),
        lambda: Grid(-1.0),
        lambda: Grid(1.0, 256),
        lambda: Grid(1.0, 128, torch.int8),
        lambda: Grid(1.0, 0, torch.int16),
        lambda: grid_of_range(0, float("inf")),
        lambda: grid_of_range(2, 1),
        lambda: quantise_weight(torch.tensor([[float("nan")]])),
        lambda: int8.check_products((1 << 16) + 1),
        lambda: int8.activate(11, torch.zeros(1, 1, 1, 1)),
        lambda: int8.activate(1, torch.zeros(1, 1, 1, 1), torch.ones(1)),
    ],
)
def test_bad_arguments_are_named(make):
    with pytest.raises(ValueError, match=r"^(scale|zero|dtype|low|weight|activation)[=:]"):
        make()


def test_weights_by_output_channel():
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    weight[3] *= 1e-36
    q, scale = quantise_weight(weight)
    assert q.dtype == torch.int8
    assert q[[0, 1, 4]].abs().amax((1, 2, 3)).tolist() == [127] * 3
    assert scale[2] == 1
    assert (q[2] == 0).all()
    off = (q.float() * scale.view(-1, 1, 1, 1) - weight).abs()
    assert (off <= scale.view(-1, 1, 1, 1) * 0.50001).all()
    turned, other = quantise_weight(weight.transpose(0, 1), 1)
    assert torch.equal(turned.transpose(0, 1), q)
    assert torch.equal(other, scale)


@pytest.mark.parametrize("zero", [0, 7, 255])
@pytest.mark.parametrize("groups", [1, 3])
def test_sums_are_those_of_the_formula(zero, groups):
    """What lies outside the map is a real 0, whatever the zero point is."""
    x, w = (
        integers(0, 255, 2, 6, 5, 7, seed=1),
        integers(-128, 127, 9, 6 // groups, 3, 3, seed=2, dtype=torch.int8),
    )
    where = ((2, 1), (1, 1, 2, 0), (1, 2), groups)
    mask = CHESSBOARD.mask(*oracle.grid_size((5, 7), (3, 3), *where[:2], where[2]))
    real, factors = x.numpy().astype(np.float64) - zero, w.numpy().astype(np.float64)
    expected = oracle.sampled_conv(real, factors, None, mask.numpy(), *where)
    assert np.array_equal(accumulate("conv", x, zero, w, CHESSBOARD.spec, *where).numpy(), expected)
    dense = accumulate("conv", x, zero, w, "", *where)
    whole = oracle.sampled_conv(real, factors, None, np.ones(dense.shape[2:], bool), *where)
    assert np.array_equal(dense.flatten(2).numpy(), whole[..., 0])
    back = ((1, 1), (1, 1, 1, 1), (1, 1), groups)
    m = int(CHESSBOARD.mask(5, 7).sum())
    y, v = integers(0, 255, 2, 6, m, 1, seed=3), integers(-128, 127, 6, 4, 3, 3, seed=4, dtype=torch.int8)
    found = accumulate("transposed", y, zero, v, CHESSBOARD.spec, *back, size=(5, 7))
    real, factors = y.numpy().astype(np.float64) - zero, v.numpy().astype(np.float64)
    expected = oracle.sampled_conv_transpose(
        real, factors, None, CHESSBOARD.mask(5, 7).numpy(), (5, 7), *back
    )
    assert np.array_equal(found.numpy(), expected)


def test_the_largest_sums_fit():
    channels = int8.MOST_PRODUCTS
    x, w = (
        torch.full((1, channels, 1, 1), 255, dtype=torch.uint8),
        torch.full((1, channels, 1, 1), -128).to(torch.int8),
    )
    where = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    assert accumulate("conv", x, 0, w, "", *where).item() == -255 * 128 * channels
    with pytest.raises(ValueError, match="products"):
        accumulate("conv", x, 0, w.expand(1, channels, 1, 2), "", *where)


def test_the_end_of_a_step_is_rounded_operation_by_operation():
    sums = torch.tensor([[[[16777217]], [[-5]]]], dtype=torch.int32)
    multiplier, bias = torch.tensor([0.3, 0.1]), torch.tensor([-5033164.5, 0.25])
    residual = torch.full((1, 1, 1, 1), 2.0)
    products = np.float32(16777216) * np.float32(0.3), np.float32(-5) * np.float32(0.1)
    expected = [
        max(np.float32(0), np.float32(np.float32(products[0] + np.float32(-5033164.5)) + np.float32(2))),
        max(np.float32(0), np.float32(products[1] + np.float32(0.25))),
    ]
    assert finish(sums, multiplier, bias, residual, activation=1).flatten().tolist() == expected


# ---------------------------------------------------------------- kernels

needs_native = pytest.mark.skipif(native.load() is not None, reason="the extension is not built")

SAMPLINGS = ["", CHESSBOARD.spec, QUARTER.spec, Random(0.4, seed=3).spec]


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return {
        "kind": draw(st.sampled_from(["conv", "conv", "transposed"])),
        "groups": groups,
        "channels": groups * draw(st.sampled_from([1, 3, 4, 7, 16, 33])),
        "outputs": groups * draw(st.sampled_from([1, 5, 16, 31, 64, 70])),
        "batch": draw(st.sampled_from([1, 2, 9])),
        "size": (draw(st.integers(6, 9)), draw(st.integers(6, 11))),
        "kernel": draw(st.sampled_from([(1, 1), (3, 3), (2, 5)])),
        "stride": draw(st.sampled_from([(1, 1), (2, 1), (2, 2)])),
        "dilation": draw(st.sampled_from([(1, 1), (2, 1)])),
        "sampling": draw(st.sampled_from(SAMPLINGS)),
        "source": draw(st.sampled_from(["", "", CHESSBOARD.spec])),
        "type": draw(st.sampled_from([torch.uint8, torch.int8])),
        "out": draw(st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.bfloat16])),
        "residual": draw(st.sampled_from([None, torch.uint8, torch.int8, torch.float32, torch.bfloat16])),
        "bias": draw(st.booleans()),
        "zero": draw(st.sampled_from([0, 3, 128, 255])),
        # sums that saturate at both ends, and ones that do not
        "spread": draw(st.sampled_from([20.0, 300.0])),
        "activation": draw(st.sampled_from([0, 1, 1, 2, 3, 4, 5])),
        "seed": draw(st.integers(0, 1000)),
    }


def arguments(case):
    """Of ``convolve``, for a drawn case."""
    kind, groups, channels, outputs = (case[n] for n in ("kind", "groups", "channels", "outputs"))
    kernel, stride, dilation, size = (case[n] for n in ("kernel", "stride", "dilation", "size"))
    padding = tuple(min(1, k - 1) * d for k, d in zip(kernel, dilation, strict=True) for _ in (0, 1))
    sampling, source = case["sampling"], case["source"]
    grid_type = case["type"]
    low = 0 if grid_type == torch.uint8 else -128
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if kind == "transposed":
        sampling = sampling or CHESSBOARD.spec
        grid = Geometry.make(kernel, stride, padding, dilation).grid(*size)
        x_size, given["size"] = (position_index(sampling, *grid).shape[0], 1), size
        weight = integers(
            -128, 127, channels, outputs // groups, *kernel, seed=case["seed"], dtype=torch.int8
        )
        out_size = size
    else:
        x_size = size
        if source:
            x_size, given["source"], given["size"] = (position_index(source, *size).shape[0], 1), source, size
        weight = integers(
            -128, 127, outputs, channels // groups, *kernel, seed=case["seed"], dtype=torch.int8
        )
        out_size = Geometry.make(kernel, stride, padding, dilation).grid(*size)
        if sampling:
            out_size = (position_index(sampling, *out_size).shape[0], 1)
    given["sampling"] = sampling
    x = integers(low, low + 255, case["batch"], channels, *x_size, seed=case["seed"] + 1, dtype=grid_type)
    generator = torch.Generator().manual_seed(case["seed"])
    products = channels // groups * kernel[0] * kernel[1]
    multiplier = (torch.rand(outputs, generator=generator) + 0.5) * case["spread"] / (6000 * products**0.5)
    if case["bias"]:
        given["bias"] = torch.randn(outputs, generator=generator)
    if case["residual"] is not None and min(out_size) > 0:
        shape = (case["batch"], max(1, outputs - case["seed"] % 3), *out_size)
        if case["residual"].is_floating_point:
            given["residual"] = torch.randn(shape, generator=generator).to(case["residual"])
        else:
            start = 0 if case["residual"] == torch.uint8 else -128
            given["residual"] = integers(start, start + 255, *shape, seed=7, dtype=case["residual"])
            given["residual_grid"] = Grid(0.0371, start + 90, case["residual"])
    given["activation"] = case["activation"]
    if case["activation"] == 3:
        given["slope"] = torch.randn(outputs, generator=generator)
    given["out"] = case["out"]
    if case["out"] in (torch.uint8, torch.int8):
        start = 0 if case["out"] == torch.uint8 else -128
        given["out"] = Grid(0.0523, start + case["zero"], case["out"])
    return (kind, x, Grid(0.02, low + case["zero"], grid_type), weight, multiplier), given


@needs_native
@settings(max_examples=150, deadline=None)
@given(cases())
def test_kernels_give_the_bits_of_the_reference(case):
    placed, named = arguments(case)
    expected = convolve(*placed, **named)
    found = convolve(*placed, **named, back_end="native")
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


# ---------------------------------------------------------------- fills


def filled_natively(q, grid, weight, bias, spec, size, reach, added=None, added_grid=None, act=0, out=None):
    """A fill with its epilogue as a program of one step; see ``fusion/int8.py``."""
    plan, channels = fill_plan(spec, *size, reach), q.shape[1]
    scaled = weight * torch.tensor(grid.scale, dtype=torch.float32)
    tensors, numbers = [plan.index, plan.kinds], []
    for optional in (scaled if plan.taps else None, bias):
        numbers.append(len(tensors) if optional is not None else -1)
        if optional is not None:
            tensors.append(optional.contiguous())
    inputs, grids = [q], [grid]
    buffers = [0, channels, *q.shape[2:], 0]
    if added is not None:
        inputs.append(added)
        grids.append(added_grid or added.dtype)
        buffers += [0, added.shape[1], *added.shape[2:], 0]
    buffers += [2, channels, *size, 0]
    code = [0, *numbers, 1 if added is not None else -1, -1, 0 if added is None else added.shape[1]]
    code += [-1, -1, 0, 1, -1, -1, len(inputs), -1, max(1, plan.taps), 1, act, -1, 2, -1, 0]
    maps = [m.contiguous(memory_format=torch.channels_last) for m in inputs]
    (found,) = native_int8.run(maps, tensors, buffers, code, [*grids, out], [-1])
    return found


@st.composite
def fills(draw):
    return {
        "sampling": draw(st.sampled_from(SAMPLINGS[1:])),
        "size": (draw(st.integers(2, 9)), draw(st.integers(2, 11))),
        "reach": draw(st.sampled_from([0, 1, 1, 2, 4])),
        "channels": draw(st.sampled_from([1, 3, 16, 17, 64, 70, 129])),
        "batch": draw(st.sampled_from([1, 2, 9])),
        "zero": draw(st.sampled_from([0, 3, 128, 255])),
        "bias": draw(st.booleans()),
        "spread": draw(st.sampled_from([0.3, 8.0])),
        "residual": draw(st.sampled_from([None, torch.uint8, torch.float32, torch.bfloat16])),
        "activation": draw(st.sampled_from([0, 1, 2, 5])),
        "out": draw(st.sampled_from([torch.uint8, torch.uint8, torch.float32, torch.bfloat16])),
        "seed": draw(st.integers(0, 1000)),
    }


def fill_arguments(case):
    size, spec, channels = case["size"], case["sampling"], case["channels"]
    plan = fill_plan(spec, *size, case["reach"])
    generator = torch.Generator().manual_seed(case["seed"])
    q = integers(0, 255, case["batch"], channels, len(plan.computed), 1, seed=case["seed"])
    weight = torch.randn(plan.count, plan.taps, channels, generator=generator) * case["spread"]
    bias = torch.randn(plan.count, channels, generator=generator) if case["bias"] and plan.taps else None
    added = added_grid = None
    if case["residual"] is not None:
        shape = (case["batch"], max(1, channels - case["seed"] % 3), *size)
        if case["residual"] == torch.uint8:
            added, added_grid = integers(0, 255, *shape, seed=7), Grid(0.0371, 90)
        else:
            added = torch.randn(shape, generator=generator).to(case["residual"])
    out = Grid(0.0523, case["zero"]) if case["out"] == torch.uint8 else case["out"]
    return (q, Grid(0.02, case["zero"]), weight, bias, spec, size, case["reach"]), added, added_grid, out


@needs_native
@settings(max_examples=120, deadline=None)
@given(fills())
def test_kernels_of_fills_give_the_bits_of_the_reference(case):
    placed, added, added_grid, out = fill_arguments(case)
    real = added if added is None or added_grid is None else dequantise(added, added_grid)
    expected = end(fill(*placed), None if real is None else real.float(), case["activation"])
    expected = quantise(expected, out) if isinstance(out, Grid) else expected.to(out)
    found = filled_natively(*placed, added, added_grid, case["activation"], out)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reach", [0, 1, 4])
@pytest.mark.parametrize("spec", SAMPLINGS[1:])
def test_fills_are_those_of_the_formula(spec, reach):
    size, channels, grid = (5, 7), 3, Grid(0.05, 9)
    plan = fill_plan(spec, *size, reach)
    q = integers(0, 255, 2, channels, len(plan.computed), 1)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(plan.count, plan.taps, channels, generator=generator)
    bias = torch.randn(plan.count, channels, generator=generator) if plan.taps else None
    start = torch.zeros(max(1, plan.count), channels) if bias is None else bias
    real = 0.05 * (q.double() - 9)
    expected = torch.zeros(2, channels, 35, dtype=torch.float64)
    for p in range(35):
        kind = int(plan.kinds[p])
        taps = [(t, int(plan.index[p, t])) for t in range(plan.taps)]
        if kind < 0:
            expected[:, :, p] = real[:, :, int(plan.index[p, 0]), 0]
            continue
        read = [weight[kind, t].double() * real[:, :, at, 0] for t, at in taps if at >= 0]
        expected[:, :, p] = sum(read, start[kind].double().expand(2, channels))
    found = fill(q, grid, weight, bias, spec, size, reach)
    torch.testing.assert_close(found.flatten(2).double(), expected, rtol=1e-5, atol=1e-5)
    # a map that nothing is added to gives its own integers back where it was computed
    assert torch.equal(quantise(found, grid).flatten(2)[:, :, plan.computed, None], q)


@pytest.fixture
def captured(monkeypatch):
    """The arguments of the native call of one convolution, by name."""
    found = {}
    names = ("inputs", "tensors", "buffers", "code", "types", "zeros", "scales", "multipliers")
    raw = torch.ops.quincunx_native.run_int8_program

    class Watching:
        def run_int8_program(self, *given):
            found.update(zip(names, given, strict=True))
            return raw(*given)

        def __getattr__(self, name):
            return getattr(torch.ops.quincunx_native, name)

    class Operators:
        quincunx_native = Watching()

    class Torch:
        ops = Operators()

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(native_int8, "torch", Torch())
    x, w = integers(0, 255, 1, 5, 4, 4), integers(-128, 127, 6, 5, 3, 3, dtype=torch.int8)
    multiplier, residual = torch.full((6,), 1e-4), integers(0, 255, 1, 6, 4, 4)
    settings = {"padding": (1, 1, 1, 1), "residual": residual, "residual_grid": Grid(0.1, 3)}
    convolve("conv", x, Grid(0.1), w, multiplier, None, **settings, out=Grid(0.1), back_end="native")
    return found


def _changed(values, at, value):
    return [*values[:at], value, *values[at + 1 :]]


SPOILT = {
    "a zero point": (
        lambda a: {"zeros": _changed(a["zeros"], 0, 256)},
        "zero point must be 0 to 255, got 256",
    ),
    "no scale": (lambda a: {"scales": a["scales"] * 0}, "scale must be positive and finite, got 0"),
    "NaN": (lambda a: {"scales": a["scales"] * float("nan")}, "scale must be positive and finite, got nan"),
    "doubles": (lambda a: {"scales": a["scales"].double()}, "scales must be Float"),
    "a type": (lambda a: {"types": _changed(a["types"], 0, 3)}, "type must be 0 to 2, got 3"),
    "another type": (lambda a: {"types": _changed(a["types"], 0, 0)}, "step 0 reads a map that is not uint8"),
    "too few": (lambda a: {"zeros": a["zeros"][1:]}, "must have 3 entries"),
    "packed": (lambda a: {"tensors": [a["tensors"][0][1:], *a["tensors"][1:]]}, "packed weight must have"),
    "no multiplier": (lambda a: {"multipliers": [-1]}, "a convolution, and nothing else, has multipliers"),
    "a tensor": (lambda a: {"multipliers": [99]}, "code names a tensor 99"),
    "its length": (lambda a: {"multipliers": [2]}, "multiplier must have 6 values"),
    "a table": (
        lambda a: {"tensors": _changed(a["tensors"], 2, a["tensors"][2] + 16)},
        r"index must lie in \[-1, 16\)",
    ),
    "a fill": (lambda a: {"code": _changed(a["code"], 18, 2)}, "step 0"),
    "an unknown work": (lambda a: {"code": _changed(a["code"], 18, 9)}, "work must be 0 to"),
    "an overwritten residual": (
        lambda a: {"code": _changed(a["code"], 12, 1)},
        "writes to buffer 1, an input",
    ),
    "a residual": (
        lambda a: {"inputs": [a["inputs"][0], a["inputs"][1][:, :5]]},
        r"input 1 must be \[1, 6, 4, 4\]",
    ),
    "real numbers": (
        lambda a: {"inputs": [a["inputs"][0].float(), a["inputs"][1]]},
        r"input 0 must be a map \[N, C, H, W\] of Byte",
    ),
    "floats": (
        lambda a: {"types": _changed(a["types"], 0, 0), "inputs": [a["inputs"][0].float(), a["inputs"][1]]},
        "step 0 reads a map that is not uint8",
    ),
}


@needs_native
@pytest.mark.parametrize("name", SPOILT)
def test_a_program_that_does_not_fit_is_refused(name, captured):
    change, message = SPOILT[name]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.quincunx_native.run_int8_program(*{**captured, **change(captured)}.values())


@needs_native
def test_sums_that_do_not_fit_are_refused_by_the_kernels_too():
    channels = int8.MOST_PRODUCTS + 4
    x, w = torch.zeros(1, channels, 1, 1, dtype=torch.uint8), torch.zeros(1, channels, 1, 1, dtype=torch.int8)
    packed, table = native_int8.pack(w, 1, False), torch.zeros(1, dtype=torch.int32)
    tensors = [packed, torch.ones(1), table, torch.tensor([[1, 1]], dtype=torch.int32)]
    code = [0, 0, -1, -1, -1, 0, -1, -1, 2, 2, 2, 3, 1, -1, 1, 1, 0, -1, 0, -1, 0]
    buffers = [0, channels, 1, 1, 0, 2, 1, 1, 1, 0]
    with pytest.raises(RuntimeError, match="sums of more than 65536 products do not fit 32 bits"):
        native_int8.run([x], tensors, buffers, code, [Grid(1.0), torch.float32], [1])
