"""Look-ups in product-quantised weights against decoding loops; the layers; what the kernel refuses."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quincunx as qx
from helpers.oracle import assert_close, grid_size, sampled_conv
from quincunx.layers.build import build_module
from quincunx.ops import backend, lookup_conv2d
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import shift_plan

native = pytest.mark.skipif(backend().name != "native", reason=f"no native back end: {backend().reason}")

# ---------------------------------------------------------------- look-up


@dataclass(frozen=True)
class Case:
    size: tuple = (7, 6)
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1, 1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1
    depth: tuple = (6, 5)
    subspace: int = 4
    codewords: int = 7
    batch: int = 2
    bias: bool = True
    wide: bool = False
    seed: int = 0

    def values(self, dtype):
        """x, codebooks, assignments, bias."""
        generator = torch.Generator().manual_seed(self.seed)
        c, o = self.depth[0] * self.groups, self.depth[1]
        many, taps = self.groups * math.ceil(self.depth[0] / self.subspace), math.prod(self.kernel)
        x = torch.randn(self.batch, c, *self.size, generator=generator, dtype=torch.float64)
        books = torch.randn(many, self.codewords, self.subspace, generator=generator, dtype=torch.float64)
        which = torch.randint(self.codewords, (many, taps, o), generator=generator)
        bias = torch.randn(o * self.groups, generator=generator, dtype=torch.float64)
        kind = torch.int16 if self.wide or self.codewords > 256 else torch.uint8
        return x.to(dtype), books.to(dtype), which.to(kind), bias.to(dtype) if self.bias else None

    @property
    def geometry(self):
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }


def decode(books, which, depth, kernel, groups):
    """The weight, codeword by codeword."""
    books, which = books.double().numpy(), which.numpy()
    subspaces, width = len(books) // groups, books.shape[2]
    outputs = which.shape[2]
    w = np.zeros((groups * outputs, depth, *kernel))
    for g, m, o in itertools.product(range(groups), range(subspaces), range(outputs)):
        for i, j in itertools.product(range(kernel[0]), range(kernel[1])):
            word = books[g * subspaces + m, which[g * subspaces + m, i * kernel[1] + j, o]]
            for c in range(m * width, min(depth, (m + 1) * width)):
                w[g * outputs + o, c, i, j] = word[c - m * width]
    return w


def check(case, dtype):
    x, books, which, bias = case.values(dtype)
    w = decode(books, which, case.depth[0], case.kernel, case.groups)
    got = lookup_conv2d(x, books, which, bias, kernel_size=case.kernel, **case.geometry)
    grid = grid_size(case.size, case.kernel, case.stride, case.padding, case.dilation)
    every = np.ones(grid, dtype=bool)
    b = None if bias is None else bias.double().numpy()
    arguments = (every, case.stride, case.padding, case.dilation, case.groups)
    want = sampled_conv(x.double().numpy(), w, b, *arguments)
    scale = sampled_conv(np.abs(x.double().numpy()), np.abs(w), None if b is None else np.abs(b), *arguments)
    assert got.shape == (case.batch, case.depth[1] * case.groups, *grid)
    assert got.is_contiguous(memory_format=torch.channels_last)
    terms = case.depth[0] * math.prod(case.kernel) + 1
    assert_close(got.flatten(2).unsqueeze(3), want, scale, terms)


CASES = {
    "plain": Case(),
    "odd channels, last subspace short": Case(depth=(7, 3)),
    "one channel": Case(depth=(1, 4), subspace=1),
    "one subspace": Case(depth=(5, 9), subspace=5),
    "1 x 1": Case(kernel=(1, 1), padding=(0, 0, 0, 0), depth=(20, 17)),
    "1 x 1, strided": Case(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 2)),
    "5 x 5": Case((9, 8), (5, 5), padding=(2, 2, 2, 2)),
    "strided": Case((9, 11), stride=(2, 3), padding=(1, 0, 2, 1)),
    "stride beyond the kernel": Case((9, 9), (2, 2), stride=(3, 4), padding=(0, 0, 0, 0)),
    "dilated": Case((9, 10), dilation=(2, 3), padding=(2, 2, 3, 3)),
    "dilated and strided": Case((10, 9), dilation=(3, 2), stride=(2, 2), padding=(3, 2, 1, 3)),
    "padding larger than the kernel": Case((4, 3), (1, 2), padding=(3, 2, 1, 4)),
    "kernel larger than the map": Case((2, 3), (5, 5), padding=(3, 2, 2, 3)),
    "grouped": Case(groups=3, depth=(5, 4)),
    "no picture": Case(batch=0),
    "one picture, no bias": Case(batch=1, bias=False),
    "one position": Case((3, 3), padding=(0, 0, 0, 0), depth=(9, 40)),
    "four positions": Case((1, 4), (1, 1), padding=(0, 0, 0, 0), depth=(9, 40)),
    "more than a byte names": Case(codewords=300, depth=(8, 40)),
    "int16 for few": Case(wide=True),
    "many outputs, several chunks": Case((25, 24), codewords=250, depth=(2, 33), subspace=2, batch=1),
    "a long row": Case((1, 700), (1, 3), codewords=250, depth=(2, 9), subspace=2, batch=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_look_up_is_decoding_and_convolving(case, dtype):
    check(case, dtype)


@st.composite
def cases(draw):
    few = st.integers(1, 3)
    kernel = draw(st.tuples(few, few))
    stride, dilation = draw(st.tuples(few, few)), draw(st.tuples(few, few))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - sum(padding[2 * i : 2 * i + 2])) for i in (0, 1)]
    depth = draw(st.integers(1, 6))
    return Case(
        size=tuple(n + draw(st.integers(0, 8)) for n in least),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=draw(st.integers(1, 2)),
        depth=(depth, draw(st.integers(1, 9))),
        subspace=draw(st.integers(1, depth)),
        codewords=draw(st.integers(2, 9)),
        batch=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 99)),
    )


@given(cases())
@settings(max_examples=60)
def test_look_up_anywhere(case):
    check(case, torch.float32)


def test_every_tap_is_a_shift_and_every_output_is_written_once():
    plan = shift_plan(Geometry((3, 2), (2, 1), (1, 0, 1, 1), (1, 2)), 6, 5)
    rows = plan.rows[plan.rows >= 0]
    assert sorted(rows.tolist()) == list(range(plan.out_size[0] * plan.out_size[1]))
    assert int(plan.offsets.min()) >= 0
    assert int(plan.offsets.max()) + len(plan.rows) <= len(plan.slots)


@native
def test_bits_do_not_depend_on_threads():
    case = Case((20, 21), depth=(24, 130), codewords=64, batch=3)
    values, before = case.values(torch.float32), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(lookup_conv2d(*values, kernel_size=3, padding=1))
            results.append(lookup_conv2d(values[0][:1], *values[1:], kernel_size=3, padding=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[4])
    assert torch.equal(results[1], results[3])
    assert torch.equal(results[1], results[5])


@native
def test_the_kernel_serves_float32_and_refuses_what_would_leave_its_tables():
    x, books, which, _ = Case().values(torch.float32)
    plan = shift_plan(Geometry((3, 3), (1, 1), (1, 1, 1, 1)), 7, 6)
    run = torch.ops.quincunx_native.lookup_conv

    def call(which=which, slots=plan.slots, offsets=plan.offsets, rows=plan.rows, books=books, groups=1):
        return run(x, books, which, None, slots, offsets, rows, plan.out_size, groups)

    served = lookup_conv2d(x, books, which, kernel_size=3, padding=1)
    assert torch.equal(call(), served)
    too_high = which.clone()
    too_high[1, 2, 3] = 7
    for wrong, match in (
        ({"which": too_high}, r"assignments must lie in \[0, 7\), got 7"),
        ({"which": -which.to(torch.int16)}, "assignments must lie in"),
        ({"which": which.long()}, "uint8 or int16"),
        ({"slots": plan.slots + 1}, "slots must lie in"),
        ({"offsets": plan.offsets - 1}, "offsets must lie in"),
        ({"offsets": plan.offsets[1:]}, "offsets must have 9"),
        ({"rows": plan.rows + 1}, "rows must lie in"),
        ({"books": books[:1], "which": which[:1]}, "do not make 6 channels"),
        ({"groups": 4}, "does not fit"),
    ):
        with pytest.raises(RuntimeError, match=match):
            call(**wrong)


def test_bfloat16_is_rounded_once():
    x, books, which, bias = (
        v.bfloat16() if v.is_floating_point() else v for v in Case().values(torch.float32)
    )
    got = lookup_conv2d(x, books, which, bias, kernel_size=3, padding=1)
    want = lookup_conv2d(x.double(), books.double(), which, bias.double(), kernel_size=3, padding=1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    "case", [Case((4, 5), depth=(5, 2), groups=2, stride=(2, 1), subspace=2, codewords=3)]
)
def test_gradients(case):
    x, books, which, bias = case.values(torch.float64)

    def run(x, books, bias):
        return lookup_conv2d(x, books, which, bias, kernel_size=case.kernel, **case.geometry)

    inputs = [t.requires_grad_() for t in (x, books, bias)]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration(dtype):
    x, books, which, bias = Case((5, 4), depth=(3, 2), subspace=2).values(dtype)
    where = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    leaves = (x.requires_grad_(), books.requires_grad_(), which, bias.requires_grad_())
    torch.library.opcheck(torch.ops.quincunx.lookup, (*leaves, *where))


# ---------------------------------------------------------------- modules


def test_a_linear_layer_is_its_decoded_weight():
    layer = qx.QuantLinear(10, 23, subspace=4, codewords=9)
    books = layer.codebooks.detach()
    want = torch.from_numpy(decode(books, layer.assignments, 10, (1, 1), 1)).flatten(1)
    torch.testing.assert_close(layer.decoded().double(), want)
    for shape in ((10,), (3, 10), (2, 5, 10), (0, 10), (40, 10)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), F.linear(x, want.float(), layer.bias), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expected 10 features"):
        layer(torch.randn(2, 9))


def test_codebooks_are_trained_and_assignments_are_not():
    layer = qx.QuantConv2d(6, 8, 3, subspace=3, codewords=8, padding=1)
    assert {name for name, _ in layer.named_parameters()} == {"codebooks", "bias"}
    before, x = layer.assignments.clone(), torch.randn(4, 6, 5, 5)
    other = build_module(layer.spec)
    other.assignments.copy_(before)
    target = other(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        losses.append(F.mse_loss(layer(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(layer.assignments, before)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: qx.QuantConv2d(
            6, 8, (3, 2), subspace=2, codewords=5, stride=(2, 1), groups=2, padding=(1, 0)
        ),
        lambda: qx.QuantConv2d(6, 40, 3, subspace=4, codewords=300, dilation=2, padding="same", bias=False),
        lambda: qx.QuantLinear(6, 12, subspace=4, codewords=5),
    ],
)
def test_a_module_is_built_again_from_its_spec(layer):
    first = layer()
    second = build_module(first.spec)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 6) if isinstance(first, qx.QuantLinear) else torch.randn(2, 6, 9, 8)
    assert torch.equal(first(x), second(x))
    assert repr(first) == repr(second)


def test_it_exports():
    model = nn.Sequential(qx.QuantConv2d(3, 8, 3, subspace=3, codewords=8), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


def test_macs_are_tables_and_look_ups():
    layer = qx.QuantConv2d(8, 12, 3, subspace=4, codewords=16, stride=2)
    found = qx.cost(layer, torch.zeros(1, 8, 9, 9))
    assert found.macs == 9 * 9 * 8 * 16 + 4 * 4 * 12 * 9 * 2


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"codewords": 1}, "codewords=1"),
        ({"codewords": 2.0}, "codewords=2.0"),
        ({"codewords": 40000}, "codewords=40000"),
        ({"codewords": 109}, "codewords=109: the codebook is larger than the data, 108 sub-vectors"),
        ({"subspace": 0}, "subspace=0"),
        ({"subspace": 9}, "subspace=9: expected 1 to 8"),
        ({"groups": 3}, "groups=3: do not divide 8 inputs and 12 outputs"),
        ({"groups": 0}, "groups=0"),
    ],
)
def test_bad_settings_of_a_module(wrong, match):
    with pytest.raises(ValueError, match=match):
        qx.QuantConv2d(8, 12, 3, **{"subspace": 4, "codewords": 16, **wrong})


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"assignments": torch.zeros(2, 9, 5)}, TypeError, "uint8 or int16"),
        ({"assignments": torch.zeros(2, 8, 5, dtype=torch.uint8)}, ValueError, r"\(2, 9\)"),
        ({"codebooks": torch.zeros(2, 7)}, ValueError, "codebooks"),
        ({"codebooks": torch.zeros(2, 7, 2)}, ValueError, "6 channels in 1 groups have 3 subspaces"),
        ({"codebooks": torch.zeros(2, 7, 4, dtype=torch.float64)}, TypeError, "float64"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\)"),
        ({"groups": 4}, ValueError, "groups=4"),
        ({"kernel_size": (9, 1)}, ValueError, "kernel_size"),
        ({"x": torch.zeros(6, 7, 6)}, ValueError, "4 dimensions"),
    ],
)
def test_bad_arguments(wrong, error, match):
    x, books, which, bias = Case().values(torch.float32)
    if "kernel_size" in wrong:
        wrong = {**wrong, "padding": 0}
    arguments = {"x": x, "codebooks": books, "assignments": which, "bias": bias, "kernel_size": 3, **wrong}
    with pytest.raises(error, match=match):
        lookup_conv2d(**arguments)
