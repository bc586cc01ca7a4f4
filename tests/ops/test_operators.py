"""The public functions against the loops of oracle.py, their derivatives and their checks."""

import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

import quincunx as qx
from helpers.oracle import AWKWARD, LAYOUTS, Case, assert_close, cases, lay_out, magnitude, numpy
from helpers.oracle import fill_nearest as fill_oracle
from helpers.oracle import sampled_conv as conv_oracle
from helpers.oracle import sampled_conv_transpose as transpose_oracle
from quincunx.ops import backend, fill_nearest, native, sampled_conv2d, sampled_conv_transpose2d
from quincunx.sampling import CHESSBOARD, QUARTER, Cosets, Positions, Random, Uniform

OPS = torch.ops.quincunx
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
awkward = pytest.mark.parametrize("case", AWKWARD.values(), ids=AWKWARD.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check_conv(case, dtype=torch.float64):
    x, _, w, b, _ = case.values(dtype)
    got = sampled_conv2d(x, w, b, sampling=case.sampling, **case.geometry)
    arrays = numpy(x, w, b)
    want = conv_oracle(*arrays, case.mask, **case.geometry)
    scale = conv_oracle(*magnitude(*arrays), case.mask, **case.geometry)
    assert_close(got, want, scale, case.terms)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)


def check_transpose(case, dtype=torch.float64):
    _, y, w, _, b = case.values(dtype)
    got = OPS.conv_transpose(y, w, b, case.size, *case.operator_arguments)
    arrays = numpy(y, w, b)
    want = transpose_oracle(*arrays, case.mask, case.size, **case.geometry)
    scale = transpose_oracle(*magnitude(*arrays), case.mask, case.size, **case.geometry)
    assert_close(got, want, scale, case.terms)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    if case.stride == (1, 1):
        geometry = {k: v for k, v in case.geometry.items() if k != "stride"}
        public = sampled_conv_transpose2d(y, w, b, sampling=case.sampling, size=case.size, **geometry)
        assert torch.equal(public, got)


def check_fill(case, dtype=torch.float64):
    _, y, *_ = case.values(dtype)
    got = fill_nearest(y, sampling=case.sampling, size=case.grid)
    want = torch.from_numpy(fill_oracle(*numpy(y), case.mask))
    assert torch.equal(got.double(), want)  # values are copied, not computed
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- values


@settings(max_examples=60)
@given(case=cases())
def test_conv_is_its_formula(case):
    check_conv(case)


@settings(max_examples=60)
@given(case=cases())
def test_conv_transpose_is_its_formula(case):
    check_transpose(case)


@given(case=cases(strides=(1,)))
def test_fill_takes_the_nearest(case):
    check_fill(case)


@awkward
@dtypes
def test_awkward_cases(case, dtype):
    check_conv(case, dtype)
    check_transpose(case, dtype)
    check_fill(case, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
def test_inputs_in_any_layout_are_read_and_left_alone(layout, dtype):
    case = Case((7, 6), CHESSBOARD, padding=(1, 1, 1, 1), layout=layout, groups=2)
    x, y, w, b, _ = case.values(dtype)
    before = [t.clone() for t in (x, y, w, b)]
    check_conv(case, dtype)
    sampled_conv2d(x, w, b, sampling=case.sampling, **case.geometry)
    sampled_conv_transpose2d(y, w, sampling=case.sampling, size=case.size, padding=1, groups=2)
    fill_nearest(y, sampling=case.sampling, size=case.grid)
    assert all(torch.equal(old, new) for old, new in zip(before, (x, y, w, b), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS[1:4])
def test_gradients_that_arrive_in_any_layout(layout):
    x, y, w, b, _ = Case((7, 6), CHESSBOARD, padding=(1, 1, 1, 1)).values()
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    out = sampled_conv2d(x, w, b, sampling=CHESSBOARD, padding=1)
    want = torch.autograd.grad(out, (x, w, b), y, retain_graph=True)
    got = torch.autograd.grad(out, (x, w, b), lay_out(y, layout))
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)  # another order of a float64 sum


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "expanded"),
    [
        (0, (3, 3), 1, (0, 0, 0, 0)),
        (2, (3, 3), 1, (2, 2, 2, 2)),
        ((2, 1), (3, 3), 1, (2, 2, 1, 1)),
        ([0, 1, 2, 3], (3, 3), 1, (0, 1, 2, 3)),
        ("valid", (3, 3), 1, (0, 0, 0, 0)),
        ("same", (3, 5), 1, (1, 1, 2, 2)),
        ("same", (2, 4), 1, (0, 1, 1, 2)),
        ("same", (3, 2), (2, 3), (2, 2, 1, 2)),
    ],
)
def test_forms_of_padding(padding, kernel, dilation, expanded):
    dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
    case = Case((9, 10), CHESSBOARD, kernel, padding=expanded, dilation=dilations)
    x, y, w, b, _ = case.values()
    got = sampled_conv2d(x, w, b, sampling=CHESSBOARD, padding=padding, dilation=dilation)
    want = conv_oracle(*numpy(x, w, b), case.mask, padding=expanded, dilation=dilations)
    torch.testing.assert_close(got, torch.from_numpy(want), rtol=0, atol=1e-12)
    back = sampled_conv_transpose2d(
        y, w, sampling=CHESSBOARD, size=case.size, padding=padding, dilation=dilation
    )
    want = transpose_oracle(*numpy(y, w), None, case.mask, case.size, padding=expanded, dilation=dilations)
    torch.testing.assert_close(back, torch.from_numpy(want), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own remark
def test_same_padding_is_torchs():
    x, w = torch.randn(2, 3, 8, 9, dtype=torch.float64), torch.randn(4, 3, 2, 4, dtype=torch.float64)
    dense = torch.nn.functional.conv2d(x, w, padding="same")
    got = sampled_conv2d(x, w, sampling=CHESSBOARD, padding="same")
    want = dense[:, :, CHESSBOARD.mask(8, 9)].unsqueeze(3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_values_that_no_computed_position_reads_do_not_matter():
    x, w = torch.full((1, 2, 9, 9), torch.nan), torch.randn(3, 2, 3, 3)
    x[:, :, 3:6, 3:6] = 1.0
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[4, 4] = True
    y = sampled_conv2d(x, w, sampling=Positions(mask), padding=1)
    # 18 terms of size about 1 in float32
    torch.testing.assert_close(y.flatten(), w.sum((1, 2, 3)), rtol=0, atol=1e-5)


def test_no_uninitialised_memory_shows():
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()  # every fresh tensor is poisoned now
        for case in AWKWARD.values():
            x, y, w, b, c = case.values(torch.float32)
            x, y, w = (t.detach().requires_grad_() for t in (x, y, w))
            first = OPS.conv(x, w, b, *case.operator_arguments)
            second = OPS.conv_transpose(y, w, c, case.size, *case.operator_arguments)
            third = OPS.fill(y, case.sampling.spec, case.grid)
            grads = torch.autograd.grad(first.sum() + second.sum() + third.sum(), (x, y, w))
            for t in (first, second, third, *grads):
                assert t.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_empty_batch_trains():
    x = torch.randn(0, 3, 6, 6, requires_grad=True)
    w, b = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    y = sampled_conv2d(x, w, b, sampling=CHESSBOARD, padding=1)
    z = sampled_conv_transpose2d(y, w, sampling=CHESSBOARD, size=(6, 6), padding=1)
    (z.sum() + fill_nearest(y, sampling=CHESSBOARD, size=(6, 6)).sum()).backward()
    assert (y.shape, z.shape, x.grad.shape) == ((0, 4, 18, 1), (0, 3, 6, 6), (0, 3, 6, 6))
    assert not w.grad.any()
    assert not b.grad.any()


# ---------------------------------------------------------------- derivatives

GRADIENT_CASES = {
    "chessboard": Case((5, 4), CHESSBOARD, padding=(1, 1, 1, 1)),
    "grouped, dilated": Case(
        (6, 5), Cosets(3, [(0, 0), (2, 1)]), dilation=(2, 1), padding=(2, 1, 0, 2), groups=2
    ),
    "strided": Case((7, 6), QUARTER, stride=(2, 1), padding=(1, 1, 1, 1)),
    "random": Case((5, 4), Random(0.4, 2), (1, 3), padding=(0, 0, 1, 1)),
    "uniform, no bias": Case((5, 5), Uniform(0.3), (2, 2), bias=False),
}
gradient_cases = pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES.keys())


def leaves(*tensors):
    return tuple(None if t is None else t.detach().requires_grad_() for t in tensors)


@gradient_cases
def test_gradients(case):
    x, y, w, b, c = leaves(*case.values())

    def conv(x, w, b):
        return sampled_conv2d(x, w, b, sampling=case.sampling, **case.geometry)

    def transpose(y, w, c):
        return OPS.conv_transpose(y, w, c, case.size, *case.operator_arguments)

    def fill(y):
        return fill_nearest(y, sampling=case.sampling, size=case.grid)

    assert torch.autograd.gradcheck(conv, (x, w, b))
    assert torch.autograd.gradcheck(transpose, (y, w, c))
    assert torch.autograd.gradcheck(fill, (y,))


def test_public_transpose_gradient():
    _, y, w, _, b = leaves(*Case((5, 4), CHESSBOARD, padding=(1, 1, 1, 1)).values())

    def transpose(y, w, b):
        return sampled_conv_transpose2d(y, w, b, sampling=CHESSBOARD, size=(5, 4), padding=1)

    assert torch.autograd.gradcheck(transpose, (y, w, b))


def test_second_derivatives():
    case = Case((4, 5), CHESSBOARD, (2, 2), padding=(0, 1, 1, 0), depth=(1, 2), batch=1)
    x, y, w, b, c = leaves(*case.values())
    arguments = case.operator_arguments
    assert torch.autograd.gradgradcheck(lambda x, w, b: OPS.conv(x, w, b, *arguments), (x, w, b))
    assert torch.autograd.gradgradcheck(
        lambda y, w, c: OPS.conv_transpose(y, w, c, case.size, *arguments), (y, w, c)
    )
    z = torch.randn(case.batch, w.shape[1] * case.groups, *case.size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda y, w, z: OPS.conv_transpose(y, w, None, case.size, *arguments, z), (y, w, z)
    )
    assert torch.autograd.gradgradcheck(lambda x, y: OPS.conv_weight(x, y, case.kernel, *arguments), (x, y))
    assert torch.autograd.gradgradcheck(lambda y: OPS.fill(y, case.sampling.spec, case.grid), (y,))


def test_only_the_gradients_asked_for_are_made():
    x, _, w, b, _ = Case((5, 4), CHESSBOARD, padding=(1, 1, 1, 1)).values()
    for wanted in (x, w, b):
        leaf = wanted.detach().requires_grad_()
        inputs = [leaf if t is wanted else t for t in (x, w, b)]
        sampled_conv2d(*inputs, sampling=CHESSBOARD, padding=1).sum().backward()
        assert leaf.grad.shape == wanted.shape


# ---------------------------------------------------------------- registration


@pytest.mark.parametrize("name", ["conv", "conv_transpose", "conv_weight", "fill", "collect"])
@pytest.mark.parametrize("kind", ["chessboard", "grouped, dilated", "strided", "random", "positions"])
def test_registration(name, kind):
    mask = torch.eye(4, dtype=torch.bool)
    case = GRADIENT_CASES.get(kind) or Case((4, 4), Positions(mask), padding=(1, 1, 1, 1), depth=(1, 1))
    x, y, w, b, c = leaves(*case.values(torch.float32))
    arguments = case.operator_arguments
    z = torch.randn(2, 3, *case.grid, requires_grad=True)
    inputs = {
        "conv": (x, w, b, *arguments),
        "conv_transpose": (y, w, c, case.size, *arguments),
        "conv_weight": (x, y, case.kernel, *arguments),
        "fill": (y, case.sampling.spec, case.grid),
        "collect": (z, case.sampling.spec),
    }
    torch.library.opcheck(getattr(OPS, name).default, inputs[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["chessboard", "grouped, dilated", "strided", "random"])
def test_a_shortcut_is_added_where_the_result_is_written(kind, dtype):
    case = GRADIENT_CASES[kind]
    _, y, w, _, c = case.values(dtype)
    arguments = case.operator_arguments
    alone = OPS.conv_transpose(y, w, c, case.size, *arguments)
    shortcut = torch.randn(alone.shape, dtype=dtype)
    for added in (shortcut, shortcut.contiguous(memory_format=torch.channels_last)):
        inputs = [t.clone().requires_grad_() for t in (y, w, c, added)]
        z = OPS.conv_transpose(*inputs[:3], case.size, *arguments, inputs[3])
        # rounded once in bfloat16, where the sum of two results is rounded twice
        torch.testing.assert_close(
            z, alone + added, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2
        )
        grad = torch.randn_like(z)
        apart = OPS.conv_transpose(*inputs[:3], case.size, *arguments) + inputs[3]
        for mine, theirs in zip(
            torch.autograd.grad(z, inputs, grad), torch.autograd.grad(apart, inputs, grad), strict=True
        ):
            assert torch.equal(mine, theirs)
        if dtype != torch.bfloat16:
            torch.library.opcheck(OPS.conv_transpose.default, (*inputs[:3], case.size, *arguments, inputs[3]))


@pytest.mark.parametrize("kind", ["chessboard", "grouped, dilated", "strided", "random"])
def test_a_weight_in_float32_is_rounded_to_a_map_in_bfloat16(kind):
    case = GRADIENT_CASES[kind]
    x, y, w, _, _ = case.values(torch.bfloat16)
    wide, arguments = torch.randn(w.shape), case.operator_arguments
    for weight in (wide, wide.contiguous(memory_format=torch.channels_last)):
        for operator, value, where in ((OPS.conv, x, ()), (OPS.conv_transpose, y, (case.size,))):
            want = operator(value, weight.bfloat16(), None, *where, *arguments)
            assert torch.equal(operator(value, weight, None, *where, *arguments), want)
            inputs = (
                value.clone().requires_grad_(),
                weight.clone().requires_grad_(),
                None,
                *where,
                *arguments,
            )
            torch.library.opcheck(operator.default, inputs)
            operator(*inputs).float().square().sum().backward()
            assert [leaf.grad.dtype for leaf in inputs[:2]] == [torch.bfloat16, torch.float32]
            assert inputs[1].grad.stride() == weight.stride()
    # sums are float32, and rounded only where bfloat16 is asked for
    gradient = OPS.conv_weight(x, y, case.kernel, *arguments, False, True)
    exact = OPS.conv_weight(x.double(), y.double(), case.kernel, *arguments)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(OPS.conv_weight(x, y, case.kernel, *arguments), gradient.bfloat16())


@awkward
def test_fakes_tell_shape_dtype_and_strides(case):
    x, y, w, b, c = case.values(torch.bfloat16)
    arguments = case.operator_arguments
    z = torch.randn(case.batch, 3, *case.grid)
    calls = [
        (OPS.conv, (x, w, b, *arguments)),
        (OPS.conv_transpose, (y, w, c, case.size, *arguments)),
        (OPS.conv_weight, (x, y, case.kernel, *arguments)),
        (OPS.fill, (y, case.sampling.spec, case.grid)),
        (OPS.collect, (z, case.sampling.spec)),
    ]
    for operator, inputs in calls:
        torch.library.opcheck(operator.default, inputs, test_utils="test_faketensor")


# ---------------------------------------------------------------- bad input

X, Y, W, B = torch.zeros(1, 4, 6, 6), torch.zeros(1, 2, 18, 1), torch.zeros(2, 4, 3, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, r"sampling='chessboard'", {"sampling": "chessboard"}),
        (TypeError, r"sampling=None", {"sampling": None}),
        (TypeError, r"x: .*ndarray", {"x": X.numpy()}),
        (TypeError, r"x: .*int64", {"x": X.long()}),
        (ValueError, r"x: .*\(4, 6, 6\)", {"x": X[0]}),
        (ValueError, r"x: 3 channels", {"x": X[:, :3]}),
        (ValueError, r"weight: .*\(2, 4, 3\)", {"weight": W[..., 0]}),
        (TypeError, r"weight: .*float64.*x is .*float32", {"weight": W.double()}),
        (TypeError, r"bias: .*float64", {"bias": B.double()}),
        (ValueError, r"bias: expected shape \(2,\), got \(3,\)", {"bias": torch.zeros(3)}),
        (ValueError, r"2 channels .* groups=3", {"groups": 3}),
        (ValueError, r"groups=0", {"groups": 0}),
        (ValueError, r"stride=0", {"stride": 0}),
        (ValueError, r"stride=\(1, 2, 3\)", {"stride": (1, 2, 3)}),
        ((TypeError, ValueError), r"stride=1\.5", {"stride": 1.5}),
        ((TypeError, ValueError), r"dilation=None", {"dilation": None}),
        ((TypeError, ValueError), r"padding=None", {"padding": None}),
        ((TypeError, ValueError), r"padding=\(0, 0, 0, 0\.5\)", {"padding": (0, 0, 0, 0.5)}),
        (ValueError, r"dilation=0", {"dilation": 0}),
        (ValueError, r"padding=-1", {"padding": -1}),
        (ValueError, r"padding=\(0, 0, 0, -2\)", {"padding": (0, 0, 0, -2)}),
        (ValueError, r"padding=\(1, 2, 3\)", {"padding": (1, 2, 3)}),
        (ValueError, r"padding='full'", {"padding": "full"}),
        (ValueError, r"padding='same'.*stride=\(2, 2\)", {"padding": "same", "stride": 2}),
        (ValueError, r"kernel of \(3, 3\) does not fit .*\(2, 6\)", {"x": X[:, :, :2]}),
        (ValueError, r"grid 2 x 4: smaller than .*K=4", {"sampling": Cosets(4, [(0, 0)]), "x": X[:, :, :4]}),
        (ValueError, r"grid 4 x 4: .*5 x 5", {"sampling": Positions(torch.ones(5, 5, dtype=torch.bool))}),
    ],
)
def test_conv_refuses(error, match, change):
    arguments = {"x": X, "weight": W, "bias": B, "sampling": CHESSBOARD} | change
    with pytest.raises(error, match=match):
        sampled_conv2d(**arguments)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, r"sampling=3", {"sampling": 3}),
        (ValueError, r"y: expected .*m=18 .* 6 x 6 grid, got .*17", {"y": Y[:, :, 1:]}),
        (ValueError, r"y: expected .*m=18 .*got .*\(1, 2, 18, 2\)", {"y": Y.expand(1, 2, 18, 2)}),
        (ValueError, r"y: expected .*m=36 .* 6 x 12 grid", {"size": (6, 12)}),
        (ValueError, r"y: 1 channels", {"y": Y[:, :1]}),
        (ValueError, r"bias: expected shape \(4,\)", {"bias": B}),
        (ValueError, r"size=\(6,\)", {"size": (6,)}),
        ((TypeError, ValueError), r"size=None", {"size": None}),
        (ValueError, r"size=\(0, 6\)", {"size": (0, 6)}),
        (ValueError, r"2 channels .* groups=3", {"groups": 3}),
        (ValueError, r"padding='full'", {"padding": "full"}),
        (ValueError, r"grid 1 x 6: smaller than .*K=2", {"size": (1, 6)}),
        (TypeError, r"weight: .*float64", {"weight": W.double()}),
        (ValueError, r"shortcut: expected .*\(1, 4, 6, 6\), got \(1, 4, 6, 5\)", {"shortcut": X[..., :5]}),
        (TypeError, r"shortcut: .*float64", {"shortcut": X.double()}),
        (TypeError, r"shortcut: .*int", {"shortcut": 1}),
    ],
)
def test_conv_transpose_refuses(error, match, change):
    arguments = {"y": Y, "weight": W, "sampling": CHESSBOARD, "size": (6, 6), "padding": 1} | change
    with pytest.raises(error, match=match):
        sampled_conv_transpose2d(**arguments)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, r"sampling='2/4'", {"sampling": "2/4"}),
        (TypeError, r"y: .*int32", {"y": Y.int()}),
        (ValueError, r"y: expected .*m=18 .*got .*17", {"y": Y[:, :, 1:]}),
        (ValueError, r"size=\(6, 6, 6\)", {"size": (6, 6, 6)}),
        (ValueError, r"grid 1 x 36", {"size": (1, 36)}),
    ],
)
def test_fill_refuses(error, match, change):
    with pytest.raises(error, match=match):
        fill_nearest(**({"y": Y, "sampling": CHESSBOARD, "size": (6, 6)} | change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gives_parameters_their_own_gradients(dtype):
    x, w, bias = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    leaves = [t.requires_grad_() for t in (x, w, bias)]
    with torch.autocast("cpu", dtype=dtype):
        y = sampled_conv2d(x, w, bias, sampling=CHESSBOARD, padding=1)
        z = sampled_conv_transpose2d(y, w, None, sampling=CHESSBOARD, size=(6, 6), padding=1)
        assert (y.dtype, z.dtype) == (dtype, dtype)
        exact = sampled_conv2d(x.double(), w.double(), bias.double(), sampling=CHESSBOARD, padding=1)
        assert exact.dtype == torch.float64
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.1)
    z.sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 3
    # without autocast formats differ by mistake
    with pytest.raises(TypeError, match=r"weight: torch.float32 on cpu, but x is"):
        sampled_conv2d(x.to(dtype), w, None, sampling=CHESSBOARD, padding=1)


class Copies(TorchDispatchMode):
    """Counts copies of the shape of a weight from one format to another."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return function(*args, **kwargs or {})


@pytest.mark.skipif(backend().name != "native", reason="only the kernels pack")
@pytest.mark.parametrize("low", [False, True])
def test_a_weight_is_packed_once_in_each_direction_until_it_changes(low, monkeypatch):
    packed = []
    pack = native._pack

    def count(weight, groups, transposed, *rest):
        packed.append((tuple(weight.shape), transposed))
        return pack(weight, groups, transposed, *rest)

    monkeypatch.setattr(native, "_pack", count)
    w = torch.randn(5, 4, 3, 3, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = sampled_conv2d(x, w, sampling=CHESSBOARD, padding=1)
        y.float().square().sum().backward()

    step()
    assert sorted(packed) == [((5, 4, 3, 3), False), ((5, 4, 3, 3), True)]
    step()  # gradients are added up, the weight is the same
    assert len(packed) == 2
    optimizer.step()
    step()
    assert len(packed) == 4


def test_a_weight_changed_between_the_passes_is_an_error_under_autocast_too():
    w = torch.randn(5, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = sampled_conv2d(torch.randn(2, 4, 6, 6), w * 1, sampling=CHESSBOARD, padding=1)
        z = sampled_conv_transpose2d(y, w, sampling=CHESSBOARD, size=(6, 6), padding=1)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.float().sum().backward()


def test_autocast_copies_no_weight_and_no_gradient_of_one():
    w = torch.randn(5, 5, 3, 3, requires_grad=True)
    with Copies(w.shape) as copies:
        with torch.autocast("cpu", torch.bfloat16):
            y = sampled_conv2d(torch.randn(2, 5, 6, 6), w, sampling=CHESSBOARD, padding=1)
            z = sampled_conv_transpose2d(y, w, sampling=CHESSBOARD, size=(6, 6), padding=1)
        z.float().sum().backward()
    assert copies.count == 0
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((4, 1, 3, 3), 1), ((4, 1, 3, 3), 4), ((8, 4, 1, 1), 1), ((8, 4, 3, 3), 1)]
)
def test_a_gradient_lies_as_its_weight_does(shape, groups, low, last):
    # one of one channel or one tap is contiguous in both layouts, yet not with the same strides
    weight = torch.empty(shape, memory_format=torch.channels_last if last else torch.contiguous_format)
    weight.normal_(generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.randn(2, shape[1] * groups, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = sampled_conv2d(x, weight, sampling=CHESSBOARD, padding=shape[-1] // 2, groups=groups)
    y.float().sum().backward()
    assert weight.grad.stride() == weight.stride()
    assert weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:.torch.jit.script:DeprecationWarning"
)
@pytest.mark.parametrize(
    "layer",
    [
        qx.SampledConv2d(4, 4, 3, sampling=qx.CHESSBOARD, padding=1),
        qx.SpatialBottleneck2d(4, 4),
        qx.PerforatedConv2d(4, 4, 3, sampling=qx.QUARTER, padding=1, fill="fitted"),
        qx.CodebookConv2d(4, 4, 3, subspace=2, codewords=4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_derivatives_in_forward_mode_are_refused_and_not_zero(layer):
    x, v = torch.randn(2, 2, 4, 8, 8)
    refused = pytest.raises(NotImplementedError, match="no derivatives in forward mode")
    with refused:
        torch.func.jvp(layer, (x,), (v,))
    with refused:
        torch.func.jacfwd(lambda s: layer(x + s * v))(torch.zeros(()))
    with refused:
        torch.func.hessian(lambda s: layer(x + s * v).sum())(torch.zeros(()))
    # what works
    torch.testing.assert_close(torch.vmap(lambda one: layer(one[None])[0])(x), layer(x))
    _, found = torch.autograd.functional.jvp(layer, x, v)
    torch.testing.assert_close(found, layer(x + v) - layer(x), rtol=1e-3, atol=1e-4)
