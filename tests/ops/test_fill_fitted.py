"""Fitted fills: the formula by loops, laws, derivatives, both back ends, compilers and counters."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import quincunx as qx
from quincunx.ops import backend, fill_fitted, fill_nearest, fill_zero, native, reference
from quincunx.ops.plan import fill_plan, nearest_index
from quincunx.sampling import CHESSBOARD, QUARTER, THREE_QUARTERS, Cosets, Positions, Random, Uniform

OPS = torch.ops.quincunx
SPIRAL = Positions(torch.tensor([[(3 * r + 5 * c) % 7 < 3 for c in range(6)] for r in range(7)]))
CASES = [
    (CHESSBOARD, (7, 6), 1),
    (CHESSBOARD, (5, 8), 2),
    (QUARTER, (6, 7), 1),
    (QUARTER, (4, 4), 2),
    (THREE_QUARTERS, (5, 5), 1),
    (Cosets(3, [(1, 2)]), (7, 6), 1),
    (Cosets(6, [(0, 0)]), (7, 8), 1),
    (Random(0.4, seed=3), (6, 5), 4),
    (Uniform(0.25), (8, 8), 3),
    (SPIRAL, (7, 6), 5),
    (Random(0.1, seed=0), (5, 5), 9),
]
cases = pytest.mark.parametrize(("sampling", "size", "reach"), CASES, ids=str)


def values(sampling, size, reach, channels=3, dtype=torch.float64, batch=2):
    plan = fill_plan(sampling.spec, *size, reach)
    generator = torch.Generator().manual_seed(5)
    shapes = (
        (batch, channels, len(plan.computed), 1),
        (plan.count, plan.taps, channels),
        (plan.count, channels),
    )
    y, weight, bias = (torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes)
    return plan, y, weight, bias


def taps_of(sampling, size, reach):
    """For each skipped position, in order: its row of coefficients and the computed ones that it reads."""
    mask = sampling.mask(*size)
    computed = [(r, c) for r, c in np.ndindex(*size) if mask[r, c]]
    skipped = [(r, c) for r, c in np.ndindex(*size) if not mask[r, c]]

    def nearest(r, c):
        return min(range(len(computed)), key=lambda k: (math.dist((r, c), computed[k]), k))

    if not isinstance(sampling, Cosets):
        for number, at in enumerate(skipped):
            order = sorted(range(len(computed)), key=lambda k: (math.dist(at, computed[k]), k))
            yield at, number, order[:reach]
        return
    period = sampling.period
    classes = [
        (b, a) for b in range(period) for a in range(period) if (a, b) not in sampling.offsets
    ]  # rows, columns
    for r, c in skipped:
        kind = classes.index((r % period, c % period))
        radius, found = reach, []
        while not found:
            around = [(i, j) for i in range(-radius, radius + 1) for j in range(-radius, radius + 1)]
            found = [(i, j) for i, j in around if ((c + j) % period, (r + i) % period) in sampling.offsets]
            radius += 1
        found.sort(key=lambda d: (d[0] ** 2 + d[1] ** 2, d))
        hit = [nearest(min(max(r + i, 0), size[0] - 1), min(max(c + j, 0), size[1] - 1)) for i, j in found]
        yield (r, c), kind, [nearest(r, c), *hit[1:]]


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_is_its_formula(sampling, size, reach, dtype):
    plan, y, weight, bias = values(sampling, size, reach, dtype=dtype)
    got = fill_fitted(y, weight, bias, sampling=sampling, size=size, reach=reach)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    want = torch.full((2, 3, *size), float("nan"), dtype=torch.float64)
    want[:, :, sampling.mask(*size)] = y.double().squeeze(3)
    for (r, c), kind, taps in taps_of(sampling, size, reach):
        want[:, :, r, c] = bias[kind].double()
        for t, k in enumerate(taps):
            want[:, :, r, c] += weight[kind, t].double() * y[:, :, k, 0].double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=8 * eps)
    assert plan.reads == sum(len(taps) for _, _, taps in taps_of(sampling, size, reach))


@cases
def test_computed_positions_keep_their_values_and_nearest_is_the_first_tap(sampling, size, reach):
    plan, y, weight, _ = values(sampling, size, reach, dtype=torch.float32)
    filled = fill_fitted(y, weight, sampling=sampling, size=size, reach=reach)
    assert torch.equal(filled[:, :, sampling.mask(*size)], y.squeeze(3))
    copy = torch.zeros_like(weight)
    copy[:, 0] = 1
    got = fill_fitted(y, copy, sampling=sampling, size=size, reach=reach)
    assert torch.equal(got, fill_nearest(y, sampling=sampling, size=size))
    assert torch.equal(plan.index[plan.skipped, 0].long(), nearest_index(sampling.spec, *size)[plan.skipped])


@cases
def test_coefficients_that_sum_to_one_fill_a_constant_map(sampling, size, reach):
    plan, y, weight, _ = values(sampling, size, reach)
    weight = weight.where(plan.distance[:, :, None].isfinite(), 0)
    weight = weight / weight.sum(1, keepdim=True)
    got = fill_fitted(torch.full_like(y, 3.5), weight, sampling=sampling, size=size, reach=reach)
    torch.testing.assert_close(got, torch.full_like(got, 3.5))


def test_a_sampling_of_every_position_needs_no_coefficients():
    every = Cosets(2, [(0, 0), (0, 1), (1, 0), (1, 1)])
    _, y, weight, bias = values(every, (4, 6), 1, dtype=torch.float32)
    got = fill_fitted(y, weight, bias, sampling=every, size=(4, 6), reach=1)
    assert torch.equal(got.flatten(2), y.squeeze(3))


@cases
def test_zero_fill(sampling, size, reach):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        _, y, _, _ = values(sampling, size, reach, dtype=dtype)
        want = torch.zeros(2, 3, *size, dtype=dtype)
        want[:, :, sampling.mask(*size)] = y.squeeze(3)
        y.requires_grad_()
        got = fill_zero(y, sampling=sampling, size=size)
        assert torch.equal(got, want)
        got.square().sum().backward()
        assert torch.equal(y.grad, 2 * y)


@cases
def test_derivatives(sampling, size, reach):
    _, y, weight, bias = (t.requires_grad_() if isinstance(t, torch.Tensor) else t
                          for t in values(sampling, size, reach, channels=2))  # fmt: skip

    def fill(*arguments):
        return fill_fitted(*arguments, sampling=sampling, size=size, reach=reach)

    assert torch.autograd.gradcheck(fill, (y, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(fill, (y, weight, bias), fast_mode=True)


@pytest.mark.parametrize(("sampling", "size", "reach"), [CASES[1], CASES[7]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_operators_keep_torchs_rules(sampling, size, reach, dtype):
    _, y, weight, bias = values(sampling, size, reach, dtype=dtype)
    z = torch.randn(2, 3, *size, dtype=dtype)
    y, weight, bias, z = (t.requires_grad_() for t in (y, weight, bias, z))
    torch.library.opcheck(OPS.fill_fitted.default, (y, weight, bias, sampling.spec, size, reach))
    torch.library.opcheck(OPS.collect_fitted.default, (z, weight, sampling.spec, reach))
    torch.library.opcheck(OPS.fill_fitted_weight.default, (y, z, sampling.spec, reach, weight.shape))


@pytest.mark.skipif(backend().name != "native", reason="the native back end is not built")
@cases
@pytest.mark.parametrize("channels", [1, 17, 64, 130])
def test_the_kernel_is_the_reference(sampling, size, reach, channels):
    for dtype, eps in ((torch.float32, 2**-21), (torch.bfloat16, 2**-7)):
        _, y, weight, bias = values(sampling, size, reach, channels, dtype)
        residual = torch.randn(2, channels, *size).to(dtype)
        for added, b in ((None, bias), (residual, None)):
            where = (sampling.spec, size, reach)
            want = reference.fill_fitted(y, weight, b, *where)
            got = native.filled_by(y, weight, b, *where, added, 1 if added is not None else 0)
            if added is not None:
                wide = reference.fill_fitted(y.float(), weight.float(), None, *where)
                want = torch.relu(wide + added.float()).to(dtype)
            torch.testing.assert_close(got, want, rtol=eps, atol=8 * eps)


@pytest.mark.skipif(backend().name != "native", reason="the native back end is not built")
@cases
@pytest.mark.parametrize("channels", [1, 17, 64])
def test_the_adjoint_is_the_references(sampling, size, reach, channels):
    for dtype, eps in ((torch.float32, 2**-19), (torch.bfloat16, 2**-7)):
        _, _, weight, _ = values(sampling, size, reach, channels, dtype)
        planar = torch.randn(2, channels, *size).to(dtype)
        for z in (planar, planar.contiguous(memory_format=torch.channels_last)):
            want = reference.collect_fitted(z, weight, sampling.spec, reach)
            got = native.collect_fitted(z, weight, sampling.spec, reach)
            assert got.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(got, want, rtol=eps, atol=8 * eps)


# the last ones are summed in several shares, some with fewer positions than classes
@pytest.mark.skipif(backend().name != "native", reason="the native back end is not built")
@pytest.mark.parametrize(
    ("sampling", "size", "reach"), [*CASES, (CHESSBOARD, (41, 30), 1), (QUARTER, (29, 44), 2)], ids=str
)
@pytest.mark.parametrize("channels", [1, 17, 64])
def test_the_weights_derivative_is_the_references(sampling, size, reach, channels):
    for dtype, eps in ((torch.float32, 2**-19), (torch.bfloat16, 2**-7)):
        _, y, weight, _ = values(sampling, size, reach, channels, dtype, batch=5)
        planar = torch.randn(5, channels, *size).to(dtype)
        for z in (planar, planar.contiguous(memory_format=torch.channels_last)):
            where = (sampling.spec, reach, weight.shape)
            want = reference.fill_fitted_weight(y.double(), z.double(), *where)
            got = native.fill_fitted_weight(y, z, *where)
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, rtol=eps, atol=64 * 2**-19)


@pytest.mark.skipif(backend().name != "native", reason="the native back end is not built")
def test_the_weights_derivative_is_the_same_on_any_number_of_threads():
    sampling, size, reach = CHESSBOARD, (41, 30), 1
    _, y, weight, _ = values(sampling, size, reach, 33, torch.float32, batch=9)
    z, before, found = torch.randn(9, 33, *size), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native.fill_fitted_weight(y, z, sampling.spec, reach, weight.shape))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.skipif(backend().name != "native", reason="the native back end is not built")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 1)}, "same batch size and channels"),
        ({"x": torch.zeros(1, 2, 4, 1)}, "same batch size and channels"),
        ({"num_taps": -1}, "num_taps must be a count"),
        ({"num_taps": 3}, "index must have 6 x 3 entries"),
        ({"index": torch.full((6, 2), 4)}, "index"),
        ({"index": torch.full((6, 2), -2)}, "index"),
        ({"order": torch.tensor([0, 6])}, "order"),
        ({"order": torch.tensor([-1, 2])}, "order"),
        ({"starts": torch.tensor([0, 2, 1, 2])}, "starts must ascend from 0 to the 2 entries"),
        ({"starts": torch.tensor([0, 1])}, "starts must ascend"),
        ({"starts": torch.tensor([1, 2])}, "starts must ascend"),
        ({"starts": torch.tensor([], dtype=torch.int)}, "starts must ascend"),
        ({"z": torch.zeros(1, 3, 0, 3)}, "index must have 0 x 2"),
    ],
)
def test_wrong_tables_of_the_weights_derivative(changed, message):
    given = {"x": torch.zeros(1, 3, 4, 1), "z": torch.zeros(1, 3, 2, 3), "index": torch.zeros(6, 2)}
    given |= {"order": torch.tensor([1, 4]), "starts": torch.tensor([0, 1, 2]), "num_taps": 2} | changed
    for name in ("index", "order", "starts"):
        given[name] = given[name].int()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.quincunx_native.fill_grad(*given.values())


@pytest.mark.skipif(backend().name != "native", reason="the native back end is not built")
def test_training_calls_the_kernels(monkeypatch):
    """No derivative of a fill is left to the reference."""
    sampling, size, reach = CASES[1]
    _, y, weight, bias = values(*CASES[1], dtype=torch.float32)
    calls = []
    for name in ("collect_fitted", "fill_fitted_weight"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    for value in (y, weight, bias):
        value.requires_grad_()
    fill_fitted(y, weight, bias, sampling=sampling, size=size, reach=reach).square().sum().backward()
    # a bias is the coefficient of a map of ones
    assert sorted(calls) == ["collect_fitted", "fill_fitted_weight", "fill_fitted_weight"]


@pytest.mark.filterwarnings("ignore")  # torch's remarks on tracing
def test_compiled_and_traced():
    layer = qx.PerforatedConv2d(3, 4, 3, sampling=CHESSBOARD, padding=1, fill="fitted")
    x = torch.randn(2, 3, 8, 8)
    want = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), want)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), want)
    traced = torch.jit.trace(layer, x)
    larger = torch.randn(1, 3, 10, 6)
    torch.testing.assert_close(traced(larger), layer(larger))


def test_multiply_adds_are_counted():
    _, y, weight, bias = values(CHESSBOARD, (6, 6), 1, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        fill_fitted(y, weight, bias, sampling=CHESSBOARD, size=(6, 6), reach=1)
    assert counter.get_total_flops() == 2 * 2 * 3 * 18 * 4


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight": torch.zeros(2, 3, 3)}, ValueError, r"weight: expected \[2, 4, 3\]"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected \[2, 3\]"),
        ({"reach": -1}, ValueError, "reach=-1"),
        ({"sampling": "2/4"}, TypeError, "sampling='2/4'"),
        ({"size": (4, 4)}, ValueError, "m=8"),
    ],
)
def test_wrong_arguments(changed, error, message):
    given = {"y": torch.zeros(1, 3, 18, 1), "weight": torch.zeros(2, 4, 3), "bias": torch.zeros(2, 3)}
    given |= {"sampling": CHESSBOARD, "size": (6, 6), "reach": 1} | changed
    y, weight, bias = (given.pop(name) for name in ("y", "weight", "bias"))
    with pytest.raises(error, match=message):
        fill_fitted(y, weight, bias, **given)
