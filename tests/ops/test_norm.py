"""Batch norm with an addition and an activation as one operator: against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import quincunx as qx
from quincunx.ops import native, norm, reference

OPS = torch.ops.quincunx
ACTIVATIONS = {0: lambda z: z, 1: F.relu, 2: F.relu6}
SHAPES = [
    (4, 3, 5, 7),
    (2, 16, 9, 4),
    (3, 20, 40, 1),
    (2, 64, 6, 6),
    (5, 100, 3, 1),
    (2, 130, 4, 3),
    (1, 1, 3, 1),
]


def _map(shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def _inputs(shape, dtype, *, affine=True, added=True, mean=0.0):
    torch.manual_seed(1)
    x = (_map(shape) * 3 + mean).to(dtype).requires_grad_()
    weight, bias = (torch.randn(shape[1]).requires_grad_() if affine else None for _ in range(2))
    return x, weight, bias, _map(shape, dtype).requires_grad_() if added else None


def _in_float64(inputs, activation):
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    x, weight, bias, residual = wide
    z = F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5)
    return wide, ACTIVATIONS[activation](z if residual is None else z + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize(("affine", "added"), [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_torchs(shape, affine, added, activation, dtype):
    inputs = _inputs(shape, dtype, affine=affine, added=added)
    wide, wanted = _in_float64(inputs, activation)
    y, mean, variance = OPS.norm_act(*inputs, 1e-5, activation)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
    found = torch.var_mean(wide[0], (0, 2, 3), correction=0)
    torch.testing.assert_close((variance.double(), mean.double()), found, rtol=1e-5, atol=1e-5)
    # rounding decides what a clipped value's gradient is
    grad = _map(shape, dtype)
    for bound in (0, 6)[:activation]:
        grad = torch.where((wanted - bound).abs() < 0.03, 0, grad).to(dtype)
    mine = torch.autograd.grad(y, [t for t in inputs if t is not None], grad)
    theirs = torch.autograd.grad(wanted, [t for t in wide if t is not None], grad.double())
    for a, b in zip(mine, theirs, strict=True):
        scale = float(b.abs().max()) + 1e-3
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["norm_act", "norm_act_backward"])
@pytest.mark.skipif(qx.backend().name != "native", reason="no kernels here")
def test_the_kernels_are_the_reference(name, monkeypatch):
    x, weight, bias, residual = (
        None if t is None else t.detach() for t in _inputs((3, 20, 7, 5), torch.float32)
    )
    y, mean, variance = reference.norm_act(x, weight, bias, residual, 1e-5, 1)
    given = (x, weight, bias, residual, 1e-5, 1)
    if name == "norm_act_backward":
        given = (_map(x.shape), x, y, mean, variance, weight, bias, _map(x.shape), 1e-5, 1)
    for a, b in zip(getattr(native, name)(*given), getattr(reference, name)(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_gradients_of_any_order_are_right(activation, added):
    torch.manual_seed(0)
    x, other = (torch.randn(3, 2, 3, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(2, dtype=torch.float64).requires_grad_() for _ in range(2))
    inputs = (x, weight, bias, other) if added else (x, weight, bias)

    def run(x, weight, bias, other=None):
        return OPS.norm_act(x, weight, bias, other, 1e-3, activation)[0]

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_the_input_that_is_returned_adds_its_gradient():
    x, weight, bias, _ = _inputs((3, 20, 7, 5), torch.float32)
    same, y, mean, _ = norm.norm_act_and_input(x, weight, bias, 1e-5, 1)
    assert not mean.requires_grad
    assert torch.equal(same, x)
    a, b = _map(x.shape), _map(x.shape)
    together = torch.autograd.grad([y, same], [x, weight, bias], [a, b], retain_graph=True)
    apart = torch.autograd.grad(OPS.norm_act(x, weight, bias, None, 1e-5, 1)[0], [x, weight, bias], a)
    torch.testing.assert_close(together[0], apart[0] + b)
    assert all(torch.equal(*pair) for pair in zip(together[1:], apart[1:], strict=True))
    torch.testing.assert_close(torch.autograd.grad(same, x, b)[0], b)
    wide = [
        t.detach()[:, :2].double().requires_grad_()
        if t.dim() == 4
        else t.detach()[:2].double().requires_grad_()
        for t in (x, weight, bias)
    ]
    run = lambda *given: norm.norm_act_and_input(*given, 1e-3, 1)[:2]  # noqa: E731
    small = (wide[0].detach()[:2, :, :2, :2].requires_grad_(), *wide[1:])
    assert torch.autograd.gradcheck(run, small)
    assert torch.autograd.gradgradcheck(run, small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_checks_of_an_operator_pass(dtype):
    inputs = _inputs((3, 8, 5, 4), dtype)
    torch.library.opcheck(OPS.norm_act, (*inputs, 1e-5, 1))
    torch.library.opcheck(OPS.norm_act, (inputs[0], None, None, None, 1e-5, 2))
    y, mean, variance = (t.detach() for t in OPS.norm_act(*inputs, 1e-5, 1))
    x, weight, bias = (t.detach() for t in inputs[:3])
    opposite = (_map(x.shape, dtype), x, y, mean, variance, weight, bias, None, 1e-5, 1)
    torch.library.opcheck(OPS.norm_act_backward, opposite)


def test_the_reference_decomposes_it_into_torchs_operators():
    inputs = tuple(t.detach() for t in _inputs((3, 8, 5, 4), torch.float32))
    table = {OPS.norm_act.default: reference.norm_act}
    graph = make_fx(lambda *given: OPS.norm_act(*given, 1e-5, 1), decomposition_table=table)(*inputs)
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert calls
    assert not any("quincunx" in call for call in calls)
    torch.testing.assert_close(graph(*inputs), OPS.norm_act(*inputs, 1e-5, 1), rtol=1e-4, atol=1e-5)


def test_a_map_far_from_zero_keeps_its_variance():
    inputs = _inputs((4, 20, 30, 30), torch.float32, mean=1e4)
    _, wanted = _in_float64(inputs, 1)
    y, *_ = OPS.norm_act(*inputs, 1e-5, 1)
    # the input itself is rounded to 1e-3 there; statistics by squares would be off by more than 1
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-3)


def test_infinities_and_nans_come_out_as_from_torch():
    x, weight, bias, residual = (t.detach() for t in _inputs((2, 20, 4, 3), torch.float32))
    residual[0, 3, 1, 1], residual[1, 4, 2, 0], residual[0, 5, 0, 0] = (
        float("nan"),
        float("inf"),
        -float("inf"),
    )
    for activation, act in ACTIVATIONS.items():
        wanted = act(F.batch_norm(x, None, None, weight, bias, True) + residual)
        torch.testing.assert_close(
            OPS.norm_act(x, weight, bias, residual, 1e-5, activation)[0], wanted, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype):
    inputs = _inputs((8, 24, 32, 16), dtype)
    grad, found = _map(inputs[0].shape, dtype), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, mean, variance = OPS.norm_act(*inputs, 1e-5, 1)
            found.append((y, mean, variance, *torch.autograd.grad(y, inputs, grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (0, 3, 2, 2)])
def test_one_value_a_channel_is_refused(shape):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        OPS.norm_act(torch.ones(shape), None, None, None, 1e-5, 1)


def test_other_activations_are_refused():
    with pytest.raises(ValueError, match="activation=3"):
        OPS.norm_act(torch.randn(2, 3, 4, 4), None, None, None, 1e-5, 3)


@pytest.mark.skipif(qx.backend().name != "native", reason="no kernels here")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(2, 8, 4, 3)}, "residual must have the shape of x"),
        ({"residual": torch.ones(2, 8, 4, 4).bfloat16()}, "residual must be Float"),
        ({"weight": torch.ones(7)}, "weight must be 8"),
        ({"bias": torch.ones(9)}, "bias must be 8"),
        ({"x": torch.ones(2, 8, 4, 4).half()}, "float32 or bfloat16"),
    ],
)
def test_the_kernel_refuses_what_does_not_fit(change, message):
    ones = torch.ones(8)
    given = {"x": torch.randn(2, 8, 4, 4), "weight": ones, "bias": ones, "residual": None} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.quincunx_native.norm_act(*given.values(), 1e-5, 1)
