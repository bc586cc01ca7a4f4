"""Product quantisation: look-ups against decoding loops, the fit against brute force, what is stored."""

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
from oracle import assert_close, grid_size, sampled_conv
from quincunx.artifact import load, save
from quincunx.methods import build_module
from quincunx.methods.moments import moments
from quincunx.methods.product import _assign, _solve_words, quantise
from quincunx.methods.qcnn import quantised
from quincunx.ops import backend, lookup_conv2d
from quincunx.plan import Geometry, shift_plan

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
    x = torch.randn(2, 6) if isinstance(first, nn.Linear | qx.QuantLinear) else torch.randn(2, 6, 9, 8)
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


# ---------------------------------------------------------------- the fit

LAYERS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "grouped, no bias": {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
    "strided": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
    "1 x 1": {"kernel_size": 1},
}
layers = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS.keys())


def conv(arguments=None, channels=(10, 36), seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(*channels, **(arguments or LAYERS["plain"])).double()


def images(count, channels=10, size=10, seed=0):
    """Maps whose positions and channels belong together, as those of real pictures do."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(channels, 4, 5, 5, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    source = torch.randn(count, 4, size + 4, size + 4, generator=generator, dtype=torch.float64)
    return F.relu(F.conv2d(source, mix) / 10 + 0.3)


def known(layer, x):
    with torch.no_grad():
        return moments(layer, [(x, layer(x))])


def error(layer, found, x):
    """The relative response error, from the responses themselves."""
    with torch.no_grad():
        want, got = layer(x), quantised(layer, found)(x)
    spread = want - want.mean((0, 2, 3), keepdim=True)
    return float((want - got).square().sum() / spread.square().sum())


@layers
def test_correction_never_raises_the_error_and_generalises(arguments):
    layer, x, held = conv(arguments), images(24), images(24, seed=7)
    plain, found = quantise(layer, 4, 12), quantise(layer, 4, 12, known(layer, x))
    assert all(b <= a * (1 + 1e-3) for a, b in itertools.pairwise(found.history))
    assert found.plain_error == found.history[0]
    # taps share codewords, so that a 1 x 1 kernel leaves least to win
    most = 0.98 if layer.kernel_size == (1, 1) else 0.9
    assert found.response_error == min(found.history) < most * found.plain_error
    assert error(layer, found, x) == pytest.approx(found.response_error, rel=1e-6)
    assert error(layer, found, held) < (most + 0.015) * error(layer, plain, held)
    assert found.weight_error > plain.weight_error  # it is the responses that count
    assert plain.response_error is None
    assert (plain.bias is None) == (layer.bias is None)


def test_few_samples_do_not_spoil_a_layer():
    layer, held = conv(), images(24, seed=7)
    found = quantise(layer, 4, 12, known(layer, images(1, size=6)))
    assert found.response_error < found.plain_error
    assert error(layer, found, held) < 0.9 * error(layer, quantise(layer, 4, 12), held)


@layers
@pytest.mark.parametrize("with_data", [False, True])
def test_a_weight_of_few_distinct_sub_vectors_is_recovered(arguments, with_data):
    """Each subspace (10 channels are 4 + 4 + 2, and 5 are 4 + 1) has words of its own."""
    layer, x = conv(arguments), images(8)
    g, depth = layer.groups, layer.in_channels // layer.groups
    with torch.no_grad():
        for group, first in itertools.product(range(g), range(0, depth, 4)):
            rows = slice(group * 36 // g, (group + 1) * 36 // g)
            part = layer.weight[rows, first : first + 4]
            words = torch.randn(5, part.shape[1], dtype=torch.float64)
            which = torch.randint(5, (part.shape[0], *part.shape[2:]))
            part.copy_(words[which].permute(0, 3, 1, 2))
    found = quantise(layer, 4, 7, known(layer, x) if with_data else None)
    torch.testing.assert_close(quantised(layer, found).decoded(), layer.weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(quantised(layer, found)(x), layer(x), rtol=0, atol=1e-9)
    assert found.weight_error < 1e-16


def test_codewords_solve_the_least_squares_problem():
    """Against all equations written out: each row of the unknown words in one system."""
    generator = torch.Generator().manual_seed(3)
    k, width, taps, outputs = 4, 3, 2, 6
    half = torch.randn(50, taps * width, generator=generator, dtype=torch.float64)
    answers = torch.randn(50, outputs, generator=generator, dtype=torch.float64)
    which = torch.randint(k, (taps, outputs), generator=generator)
    start = torch.randn(k, width, generator=generator, dtype=torch.float64)
    found = _solve_words(half.T @ half, half.T @ answers, start, which)
    system = torch.zeros(50, outputs, k, width, dtype=torch.float64)
    for t, o in itertools.product(range(taps), range(outputs)):
        system[:, o, which[t, o]] += half[:, t * width : (t + 1) * width]
    wanted = torch.linalg.lstsq(system.view(50 * outputs, -1), answers.reshape(-1, 1)).solution
    used = which.unique()
    torch.testing.assert_close(found[used], wanted.view(k, width)[used], rtol=1e-6, atol=1e-6)
    unused = [i for i in range(k) if i not in used.tolist()]
    assert torch.equal(found[unused], start[unused])


@pytest.mark.parametrize("taps", [1, 3])
def test_assignments_are_the_best_one_by_one(taps):
    generator = torch.Generator().manual_seed(4)
    k, width, outputs = 5, 2, 40
    half = torch.randn(40, taps * width, generator=generator, dtype=torch.float64) + 1
    answers = torch.randn(40, outputs, generator=generator, dtype=torch.float64)
    words = torch.randn(k, width, generator=generator, dtype=torch.float64)
    which = torch.randint(k, (taps, outputs), generator=generator)
    want = which.clone()
    for t, o in itertools.product(range(taps), range(outputs)):
        errors = []
        for candidate in range(k):
            want[t, o] = candidate
            errors.append(float((answers[:, o] - half @ words[want[:, o]].flatten()).square().sum()))
        want[t, o] = int(np.argmin(errors))
    assert torch.equal(_assign(half.T @ half, half.T @ answers, words, which), want)


def test_one_seed_one_result():
    layer = conv()
    first, second = quantise(layer, 4, 12, seed=3), quantise(layer, 4, 12, seed=3)
    assert torch.equal(first.codebooks, second.codebooks)
    assert torch.equal(first.assignments, second.assignments)
    assert not torch.equal(first.codebooks, quantise(layer, 4, 12, seed=4).codebooks)


# ---------------------------------------------------------------- the method


def network():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(10, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Conv2d(24, 32, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 40),
        nn.ReLU(),
        nn.Linear(40, 5),
    ).eval()


@pytest.mark.filterwarnings("error")
def test_a_network_is_quantised_from_the_input_up():
    net, method = network(), qx.QCNN(subspace=4, codewords=16)
    data = [images(16, seed=s).float() for s in range(4)]
    held = images(64, seed=9).float()
    corrected = qx.accelerate(net, method, calibration=data)
    plain = qx.accelerate(net, method, example_input=held[:1])
    kinds = {name: record["kind"] for name, record in corrected.replaced.items()}
    assert kinds == {"0": "QuantConv2d", "4": "QuantConv2d", "8": "QuantLinear"}
    assert "depthwise" in corrected.skipped["3"]
    assert "larger than the data, 5 sub-vectors" in corrected.skipped["10"]
    record = corrected.replaced["4"]
    assert (record["subspace"], record["codewords"]) == (4, 16)
    # 6 codebooks of 16 x 4 floats and 6 x 9 x 16 bytes, for 12 channels of each of 32 outputs
    assert record["bits"] == pytest.approx((6 * 16 * 4 * 32 + 6 * 9 * 16 * 8) / (32 * 12 * 9))
    assert record["response_error"] < record["plain_response_error"]
    assert record["macs_before"] == 100 * 32 * 12 * 9
    assert record["macs_after"] == 100 * 24 * 16 + 100 * 6 * 9 * 16
    assert plain.replaced["4"]["response_error"] is None
    with torch.no_grad():
        want = net(held)
        far = (plain.model(held) - want).square().sum()
        near = (corrected.model(held) - want).square().sum()
    assert near < 0.8 * far


def test_a_later_layer_is_corrected_on_what_the_earlier_ones_give():
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(10, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3)).eval()
    data = [images(32).float()]
    result = qx.accelerate(net, qx.QCNN(subspace=5, codewords=8), calibration=data)
    with torch.no_grad():
        want, got = net(data[0]), result.model(data[0])
    spread = want - want.mean((0, 2, 3), keepdim=True)
    measured = float((want - got).square().sum() / spread.square().sum())
    assert result.replaced["2"]["response_error"] == pytest.approx(measured, rel=1e-3)


def test_fused_it_is_the_same():
    result = qx.accelerate(network(), qx.QCNN(subspace=4, codewords=16), example_input=images(1).float())
    x = images(3).float()
    with torch.no_grad():
        torch.testing.assert_close(qx.fuse(result.model)(x), result.model(x), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_it_is_the_same_and_small(tmp_path):
    dense = qx.networks.build("rrn8", num_classes=10, width=32).eval()
    method = qx.QCNN(subspace=8, codewords=64)
    result = qx.accelerate(
        dense, method, where=lambda name, m: isinstance(m, nn.Conv2d) and m.in_channels > 3
    )
    assert len(result.replaced) >= 6
    sizes = []
    for name, model in (("dense", dense), ("quantised", result.model)):
        folder = save(model, tmp_path / name)
        sizes.append((folder / "weights.safetensors").stat().st_size)
    x = torch.randn(2, 3, 32, 32)
    again = load(tmp_path / "quantised")
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    weights = sum(dense.get_submodule(name).weight.numel() for name in result.replaced)
    bits = [r["bits"] * dense.get_submodule(n).weight.numel() for n, r in result.replaced.items()]
    assert sum(bits) / weights < 4
    # what is saved is what the records say, but for biases and the file's own head
    assert sizes[0] - sizes[1] == pytest.approx(4 * weights - sum(bits) / 8, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"subspace": 0}, "subspace=0"),
        ({"subspace": 2.0}, "subspace=2.0"),
        ({"codewords": 1}, "codewords=1"),
        ({"codewords": True}, "codewords=True"),
        ({"iterations": 0}, "iterations=0"),
        ({"positions": 0}, "positions=0"),
        ({"seed": -1}, "seed=-1"),
        ({"data": "yes"}, "data='yes'"),
        ({"linear": None}, "linear=None"),
    ],
)
def test_bad_settings(wrong, match):
    with pytest.raises(ValueError, match=match):
        qx.QCNN(**wrong)


@pytest.mark.parametrize(
    ("layer", "method", "match"),
    [
        (nn.Conv2d(3, 64, 3), qx.QCNN(4, 64), "subspace=4: expected 1 to 3"),
        (
            nn.Conv2d(8, 8, 1),
            qx.QCNN(4, 9),
            "codewords=9: the codebook is larger than the data, 8 sub-vectors",
        ),
        (nn.Conv2d(8, 8, 3, padding_mode="reflect"), qx.QCNN(4, 9), "padding_mode='reflect'"),
        (nn.Conv2d(8, 8, 3, groups=8), qx.QCNN(1, 2), "depthwise"),
    ],
)
def test_a_layer_that_settings_do_not_fit_stays_and_says_why(layer, method, match):
    with pytest.warns(UserWarning, match="replaced nothing"):
        result = qx.accelerate(nn.Sequential(layer), method)
    assert match in result.skipped["0"]


def test_data_and_linear_layers_can_be_refused():
    data = [images(4).float()]
    result = qx.accelerate(network(), qx.QCNN(4, 16, data=False, linear=False), calibration=data)
    assert set(result.replaced) == {"0", "4"}
    assert result.replaced["0"]["response_error"] is None
    with pytest.raises(ValueError, match="calibration=None"):
        qx.accelerate(network(), qx.QCNN(4, 16, data=True))
