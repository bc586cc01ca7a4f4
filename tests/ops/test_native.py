"""The native kernels against the reference, for each dtype and instruction set; refusals; threads.

Tolerances, componentwise, with s the same sum over absolute values and n its number of products:
float32 (n + 2) eps s, the a-priori bound of a sum in any order; bfloat16 2 eps s with eps = 2^-7, since
it sums in float32 and rounds once; the weight gradient of bfloat16 likewise.
"""

import copy
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quincunx as qx
from helpers.forked import forked
from helpers.oracle import Case, assert_close, cases, lay_out
from quincunx.ops import backend, native, reference, sampled_conv2d, sampled_conv_transpose2d
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import forward_plan
from quincunx.sampling import CHESSBOARD, QUARTER, Random

if backend().name != "native":  # a machine without a compiler; elsewhere a test sees to it that it is built
    pytest.skip(f"no native back end: {backend().reason}", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16)
RAW = torch.ops.quincunx_native

# wide enough for every register tile and for several blocks of channels, rows and outputs
WIDE = {
    "3 -> 16": Case((9, 11), CHESSBOARD, padding=(1, 1, 1, 1), depth=(3, 16)),
    "17 -> 33": Case((8, 7), QUARTER, padding=(1, 1, 1, 1), depth=(17, 33)),
    "64 -> 64": Case((14, 14), CHESSBOARD, padding=(1, 1, 1, 1), depth=(64, 64), batch=1),
    "70 -> 130": Case((6, 9), Random(0.4, 2), padding=(1, 1, 1, 1), depth=(70, 130)),
    "500 -> 72": Case((5, 5), CHESSBOARD, padding=(1, 1, 1, 1), depth=(500, 72), batch=3),
    "48 -> 20, grouped": Case((6, 6), CHESSBOARD, padding=(1, 1, 1, 1), groups=3, depth=(48, 20)),
    "depthwise": Case((9, 8), CHESSBOARD, padding=(1, 1, 1, 1), groups=161, depth=(1, 1)),
    "depthwise, 7 x 7": Case(
        (15, 9), Random(0.3, 1), (7, 7), dilation=(2, 1), padding=(6, 6, 3, 3), groups=40, depth=(1, 1)
    ),
    "depthwise, strided": Case(
        (9, 12), QUARTER, (5, 3), stride=(2, 2), padding=(2, 2, 1, 1), groups=64, depth=(1, 1)
    ),
    "depthwise, multiplied": Case((6, 7), CHESSBOARD, padding=(1, 1, 1, 1), groups=24, depth=(1, 3)),
    "801 -> 8, one tap": Case((4, 6), CHESSBOARD, (1, 1), depth=(801, 8)),
    "vertical, strided": Case(
        (13, 6), Random(0.5, 0), (5, 1), stride=(2, 1), padding=(2, 2, 0, 0), depth=(24, 40)
    ),
}


def bound(got, want, scale, terms):
    assert_close(got.double() if got.dtype == torch.float64 else got, want.numpy(), scale.numpy(), terms)


def check(case, dtype):
    """The operators and the weight gradient of one case, with every fresh tensor poisoned by NaN."""
    x, y, w, b, c = case.values(dtype)
    z = torch.randn(case.batch, y.shape[1], *case.grid).to(dtype)
    where = case.operator_arguments
    wide = [None if t is None else t.double() for t in (x, y, w, b, c)]
    positive = [None if t is None else t.abs() for t in wide]
    size, kernel = case.size, case.kernel
    torch.use_deterministic_algorithms(True)
    try:
        first = native.conv(x, w, b, *where)
        second = native.conv_transpose(y, w, c, size, *where)
        third = native.conv_weight(x, y, kernel, *where)
        fourth = native.collect(z, case.sampling.spec)
    finally:
        torch.use_deterministic_algorithms(False)
    for got, name, arguments, rest, terms in (
        (first, "conv", (0, 2, 3), (), case.terms),
        (second, "conv_transpose", (1, 2, 4), (size,), case.terms),
        (third, "conv_weight", (0, 1), (kernel,), case.batch * y.shape[2] + 1),
    ):
        run = getattr(reference, name)
        want, scale = (run(*(t[i] for i in arguments), *rest, *where) for t in (wide, positive))
        assert got.dtype == dtype
        bound(got, want, scale, terms)
    want, scale = (reference.collect(t, case.sampling.spec) for t in (z.double(), z.double().abs()))
    assert fourth.dtype == dtype
    assert fourth.is_contiguous(memory_format=torch.channels_last)
    bound(fourth, want, scale, case.grid[0] * case.grid[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE.keys())
def test_equals_reference_at_every_width(case, dtype):
    check(case, dtype)


@settings(max_examples=50)
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_equals_reference(case, dtype):
    check(case, dtype)


@settings(max_examples=25)
@given(
    depth=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_reference_at_any_channel_count(depth, size, batch, seed, dtype):
    check(Case(size, Random(0.5, seed), padding=(1, 1, 1, 1), depth=depth, batch=batch, seed=seed), dtype)


@settings(max_examples=25)
@given(
    groups=st.integers(1, 150),
    multiplier=st.integers(1, 4),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 3), (7, 7)]),
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_reference_depthwise(groups, multiplier, kernel, size, batch, seed, dtype):
    (top, left), depth = (k // 2 for k in kernel), (1, multiplier)
    where = {
        "padding": (top, top, left, left),
        "groups": groups,
        "depth": depth,
        "batch": batch,
        "seed": seed,
    }
    check(Case(size, Random(0.5, seed), kernel, **where), dtype)


# a set that differs from another one in eight bits alone has the other's kernels of floats, and the reverse
_SAME_FLOATS, _SAME_INTEGERS = ("avx512vnni", "avxvnni"), ("avx512bf16",)


@pytest.mark.skipif("QUINCUNX_ISA" in os.environ, reason="already inside such a process")
def test_every_instruction_set_equals_reference():
    """The tests of these names by the kernels of each set, which a process chooses once."""
    patterns = {"equals_reference": _SAME_FLOATS, "give_the_bits": _SAME_INTEGERS}
    isas, pieces = RAW.available_isas().split(","), []
    for isa in isas:
        wanted = " or ".join(pattern for pattern, same in patterns.items() if isa not in same)
        files = [__file__, str(Path(__file__).with_name("test_int8.py"))]
        words = ["-x", "-p", "no:cacheprovider", *files, "-k", wanted]
        code = f"import sys, pytest; sys.exit(pytest.main({words}))"
        pieces.append((code, {"QUINCUNX_ISA": isa, "QUINCUNX_BACKEND": "native"}))
    # the second is imported where torch is asked for deterministic algorithms
    found = forked(pieces, "torch", "torch._inductor.config", "pytest")
    for isa, (status, said, errors) in zip(isas, found, strict=True):
        assert status == 0, f"{isa}: {said[-3000:]}{errors[-1000:]}"
        assert " passed" in said, f"{isa}: {said[-1000:]}"


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


SHOW = "import quincunx as qx; b = qx.backend(); print(b.name, b.isa)"
USE = (
    "import torch, quincunx as qx; x = torch.randn(1, 2, 4, 4, dtype=torch.{dtype});"
    "qx.sampled_conv2d(x, torch.randn(2, 2, 1, 1, dtype=torch.{dtype}), sampling=qx.QUARTER)"
)


@pytest.mark.parametrize(
    ("code", "environment", "message"),
    [
        (SHOW, {"QUINCUNX_ISA": "sse9"}, "sse9"),
        (SHOW, {"QUINCUNX_BACKEND": "cutlass"}, "QUINCUNX_BACKEND='cutlass'"),
        (USE.format(dtype="float32"), {"QUINCUNX_BACKEND": "cuda"}, "QUINCUNX_BACKEND='cuda'"),
        (USE.format(dtype="float64"), {"QUINCUNX_BACKEND": "native"}, "not torch.float64"),
        (
            "import sys; sys.modules['quincunx._native'] = None; " + SHOW,
            {"QUINCUNX_BACKEND": "native"},
            "QUINCUNX_BACKEND=native: the extension cannot be used",
        ),
    ],
)
def test_a_forced_back_end_that_is_not_there_is_an_error(code, environment, message):
    run = _python(code, **environment)
    assert run.returncode != 0
    assert message in run.stderr


def test_the_reference_can_be_forced():
    assert _python(SHOW, QUINCUNX_BACKEND="reference").stdout.split() == ["reference", "None"]


def test_without_the_extension_one_warning_says_so(monkeypatch):
    # forced, as the kernels of an instruction set are for whole runs of tests, it would be an error
    monkeypatch.delenv("QUINCUNX_ISA", raising=False)
    code = "import sys; sys.modules['quincunx._native'] = None; " + USE.format(dtype="float32")
    run = _python(f"{code}; {USE.format(dtype='float32').split('; ', 1)[1]}")
    assert run.returncode == 0
    assert run.stderr.count("quincunx computes with the slow reference") == 1
    assert "compiler" in run.stderr


# ---------------------------------------------------------------- refusals


def tables(channels=4, outputs=5, side=6):
    x = torch.randn(2, channels, side, side).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 9)
    plan = forward_plan(CHESSBOARD.spec, Geometry((3, 3), padding=(1, 1, 1, 1)), side, side)
    return {
        "x": x,
        "packed": RAW.pack_weight(weight, 1),
        "bias": torch.randn(outputs),
        "residual": None,
        "scale2": None,
        "shift2": None,
        "index": plan.index,
        "rows": plan.rows,
        "taps": plan.taps,
        "groups": plan.groups,
        "out_size": plan.out_size,
        "out_channels": outputs,
        "num_taps": 9,
        "channel_groups": 1,
        "activation": 0,
    }


def changed(tensor, at, value):
    copy = tensor.clone()
    copy.view(-1)[at] = value
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"index": changed(t["index"], 5, 36)}, "index"),
        (lambda t: {"index": changed(t["index"], 5, -2)}, "index"),
        (lambda t: {"index": changed(t["index"], -1, 2**31 - 1)}, "index"),
        (lambda t: {"index": t["index"][:-1]}, "index"),
        (lambda t: {"index": t["index"].long()}, "index"),
        (lambda t: {"rows": changed(t["rows"], 0, 18)}, "rows"),
        (lambda t: {"rows": changed(t["rows"], 0, -1)}, "rows"),
        (lambda t: {"rows": changed(t["rows"], 0, int(t["rows"][1]))}, "once, but names"),
        (lambda t: {"rows": torch.zeros_like(t["rows"])}, "once, but names 0 twice"),
        (lambda t: {"rows": t["rows"][::2]}, "contiguous"),
        (lambda t: {"taps": changed(t["taps"], 0, 9)}, "taps"),
        (lambda t: {"taps": changed(t["taps"], 0, -1)}, "taps"),
        (lambda t: {"groups": changed(t["groups"], 0, 17)}, "groups|index|rows"),
        (lambda t: {"groups": changed(t["groups"], 0, -18)}, "groups|index|rows"),
        (lambda t: {"x": t["x"].double()}, "float32"),
        (lambda t: {"x": t["x"].bfloat16()}, "packed|weight|Float|BFloat16"),
        (lambda t: {"x": t["x"][0]}, "4 dimensions|dim"),
        (lambda t: {"packed": t["packed"][:-1]}, "packed"),
        (lambda t: {"packed": t["packed"].double()}, "packed"),
        (lambda t: {"bias": torch.randn(4)}, "bias"),
        (lambda t: {"bias": torch.randn(5, dtype=torch.complex64)}, "bias must be Float"),
        (lambda t: {"bias": torch.ones(5, dtype=torch.int64)}, "bias must be Float"),
        (lambda t: {"bias": torch.randn(10)[::2]}, "contiguous"),
        (lambda t: {"bias": torch.randn(1).expand(5)}, "contiguous"),
        (lambda t: {"scale2": torch.randn(5)}, "go together"),
        (lambda t: {"out_size": (2**32, 2**32)}, "output is too large"),
        (lambda t: {"out_size": (2**62, 4)}, "output is too large"),
        (lambda t: {"out_size": (-1, -18)}, "out_size"),
        (lambda t: {"out_channels": 2**62}, "too large"),
        (lambda t: {"num_taps": 2**33}, "num_taps|taps"),
        (lambda t: {"channel_groups": 2**62}, "channel_groups"),
        (lambda t: {"residual": torch.randn(2, 5, 17, 1)}, "residual"),
        (lambda t: {"out_channels": 6}, "bias must have 6"),
        (lambda t: {"num_taps": 8}, "taps|packed"),
        (lambda t: {"channel_groups": 3}, "groups|channels"),
        (lambda t: {"channel_groups": 0}, "groups"),
        (lambda t: {"activation": 10}, "activation"),
        (lambda t: {"activation": 3}, "slope"),
    ],
)
def test_bad_tables_are_refused(change, message):
    good = tables()
    RAW.gather_gemm(*good.values())
    with pytest.raises(RuntimeError, match=message):
        RAW.gather_gemm(*{**good, **change(good)}.values())


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_sizes_whose_products_wrap_around_are_refused():
    """Expanded tensors have such sizes without such memory."""
    one = torch.zeros(1)
    for sizes in ((2**31, 2**31, 1), (2**33, 2**29, 1), (1, 1, 2**40), (3, 2**30, 2**30)):
        with pytest.raises(RuntimeError, match=r"too large|overflow"):
            RAW.pack_weight(one.expand(sizes), 1)
    with pytest.raises(RuntimeError, match=r"too large|overflow"):
        RAW.pack_weight(one.expand(2**32, 2**29, 1, 1), 2**32)
    with pytest.raises(RuntimeError, match="cannot allocate memory for Float"):
        RAW.pack_weight(one.expand(2**25, 2**25, 1), 1)
    # a map of no values, of which no size may be believed either
    none = torch.zeros(0, 1, 1, 1)
    for sizes in ((2**62, 1, 0, 5), (0, 1, 2**33, 2**33), (0, 2**40, 1, 1)):
        map_ = torch.zeros(1, 1, 0, 5).expand(sizes) if sizes[2] == 0 else none.expand(sizes)
        with pytest.raises(RuntimeError, match="x is too large"):
            RAW.window_max(map_, ints(), ints(0), (0, 0))
    with pytest.raises(RuntimeError, match="too large"):
        RAW.binary_gemm(one.expand(1, 1, 2**20, 2**20), ints(), None, None, ints(), (0, 0), 4, 1, 1)
    with pytest.raises(RuntimeError, match="too large"):
        RAW.binary_gemm(torch.zeros(1, 1, 2, 2), ints(), None, None, ints(), (2**31 - 1, 1), 4, 2**34, 1)
    with pytest.raises(RuntimeError, match="too large"):
        RAW.binary_pack(torch.zeros(1, 1, dtype=torch.uint8).expand(2**30, 2**30), 2**33, 1, 1)


@pytest.mark.parametrize("rows", [(0, 1, 2, 2), (0, 1, 2, -1), (-1, -1, -1, -1), (3, 3, 3, 3), (0, 1, 2, 4)])
def test_a_table_look_up_writes_every_position_once(rows):
    x, books = torch.randn(1, 2, 2, 2), torch.randn(1, 3, 2)
    chosen = torch.zeros(1, 1, 4, dtype=torch.uint8)

    def call(rows):
        return RAW.lookup_conv(x, books, chosen, None, ints(0, 1, 2, 3), ints(0), ints(*rows), (2, 2), 1)

    for good in ((0, 1, 2, 3), (3, 2, 1, 0), (3, -1, 2, 1, -1, 0)):
        assert call(good).isfinite().all()
    with pytest.raises(RuntimeError, match="rows must"):
        call(rows)


class Small:
    """A program of 1 x 1 convolutions on maps of 2 channels and 2 x 2 positions."""

    def __init__(self, kinds):
        self.tensors = [
            RAW.pack_weight(torch.eye(2).view(2, 2, 1), 1), ints(0, 1, 2, 3), ints(0), ints(4, 1),
            torch.ones(2), torch.zeros(2), ints(3, 2, 1, 0),
        ]  # fmt: skip
        # kind and place of each buffer
        self.buffers = [number for kind, at in kinds for number in (kind, 2, 2, 2, at)]
        self.code = []

    def step(self, x, out, residual=-1, residual_rows=-1, out2=-1, activation=0, slope=-1):
        self.code += [x, 0, -1, residual, residual_rows, 2, 4, 5, 1, 1, 2, 3, out, out2, 1, 1]
        self.code += [activation, slope, 0, -1, 1]
        return self

    def run(self, x):
        return RAW.run_program([x], self.tensors, self.buffers, self.code)


IN, ARENA, OUT = 0, 1, 2


def test_a_program_reads_what_was_written_and_writes_every_output():
    x = torch.randn(3, 2, 2, 2)
    good = Small([(IN, 0), (ARENA, 0), (ARENA, 32), (OUT, 0)]).step(0, 1).step(1, 2).step(2, 3, residual=1)
    torch.testing.assert_close(good.run(x)[0], 2 * x)
    # in the residual's own place, as a residual block does it
    place = Small([(IN, 0), (ARENA, 0), (ARENA, 32), (ARENA, 0), (OUT, 0)])
    place.step(0, 1).step(1, 2).step(2, 3, residual=1).step(3, 4)
    torch.testing.assert_close(place.run(x)[0], 2 * x)
    for bad, message in (
        (
            Small([(IN, 0), (ARENA, 0), (OUT, 0)]).step(1, 2),
            "step 0 reads buffer 1, which nothing has written",
        ),
        (Small([(IN, 0), (OUT, 0), (OUT, 0)]).step(0, 1), "buffer 2 is an output that no step writes"),
        (Small([(IN, 0), (OUT, 0)]), "buffer 1 is an output that no step writes"),
        (Small([(IN, 0), (OUT, 0)]).step(0, 1).step(1, 0), "step 1 writes to buffer 0, an input"),
        (Small([(IN, 0), (OUT, 0)]).step(0, 1).step(1, 1), "step 1 writes to buffer 1, where it reads"),
        (
            Small([(IN, 0), (ARENA, 0), (ARENA, 0), (OUT, 0)]).step(0, 1).step(0, 2).step(1, 3),
            "step 2 reads buffer 1, which nothing has written",
        ),
        (
            Small([(IN, 0), (ARENA, 0), (ARENA, 0), (OUT, 0)]).step(0, 1).step(1, 2).step(2, 3),
            "step 1 writes to buffer 2, where it reads",
        ),
        (
            Small([(IN, 0), (ARENA, 0), (OUT, 0)]).step(0, 2).step(0, 2, residual=2, residual_rows=6),
            "where it reads other rows of its residual",
        ),
        (Small([(IN, 0), (OUT, 0)]).step(0, 1, out2=1), "out and out2 must not overlap"),
        (Small([(IN, 0), (OUT, 0)]).step(0, 1, activation=3), "activation 3, and no other, has a slope"),
        (
            Small([(IN, 0), (OUT, 0)]).step(0, 1, activation=7, slope=4),
            "activation 3, and no other, has a slope",
        ),
        (Small([(IN, 0), (OUT, 0)]).step(0, 1, activation=3, slope=1), "slope"),
        (Small([(IN, 0), (OUT, 0)]).step(0, 1, activation=10), "activation must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            bad.run(x)


def test_a_tensor_elsewhere_is_refused():
    good = tables()
    with pytest.raises((RuntimeError, NotImplementedError)):
        RAW.gather_gemm(*{**good, "index": good["index"].to("meta")}.values())
    with pytest.raises((RuntimeError, NotImplementedError)):
        RAW.gather_gemm(*{**good, "x": good["x"].to("meta")}.values())


def test_a_map_too_large_for_the_tables_is_refused():
    """2^31 positions cannot be named by 32 bits; the map has no channel beyond one shared byte pair."""
    huge = torch.zeros(1, dtype=torch.bfloat16).expand(1, 1, 2**16, 2**15 + 1)
    good = {**tables(1, 1), "packed": RAW.pack_weight(torch.randn(1, 1, 9).bfloat16(), 1)}
    with pytest.raises(RuntimeError, match="too large"):
        RAW.gather_gemm(*{**good, "x": huge}.values())


def test_a_tap_outside_reads_nothing():
    """Not even a NaN next to the map."""
    x = torch.full((1, 3, 4, 4), torch.nan)
    x[:, :, 1:3, 1:3] = 1.0
    w = torch.ones(2, 3, 3, 3)
    inner = x[:, :, 1:3, 1:3]
    assert sampled_conv2d(inner, w, sampling=CHESSBOARD, padding=1).isfinite().all()


# ---------------------------------------------------------------- packed weights


def test_a_second_call_packs_nothing(monkeypatch):
    calls = []
    original = native._pack
    monkeypatch.setattr(native, "_pack", lambda *a: calls.append(a) or original(*a))
    x, w = torch.randn(1, 4, 6, 6), torch.nn.Parameter(torch.randn(4, 4, 3, 3))
    for _ in range(3):
        sampled_conv2d(x, w, sampling=CHESSBOARD, padding=1)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "update",
    [
        lambda w: w.add_(1),
        lambda w: torch.nn.init.ones_(w),
        lambda w: w.copy_(torch.ones_like(w)),
        lambda w: setattr(w, "data", torch.ones_like(w)),
    ],
    ids=["in place", "init", "copy", "data"],
)
def test_a_changed_weight_is_packed_again(update):
    x, w = torch.randn(1, 4, 6, 6), torch.nn.Parameter(torch.randn(4, 4, 3, 3))
    sampled_conv2d(x, w, sampling=CHESSBOARD, padding=1)
    with torch.no_grad():
        update(w)
    got = sampled_conv2d(x, w, sampling=CHESSBOARD, padding=1)
    assert torch.equal(got, sampled_conv2d(x, w.detach().clone(), sampling=CHESSBOARD, padding=1))


@pytest.mark.filterwarnings("ignore:a convolution's weight was made in inference mode")
def test_inference_mode():
    with torch.inference_mode():
        x, w = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
        first = sampled_conv2d(x, w, sampling=CHESSBOARD, padding=1)
        w.mul_(2)
        torch.testing.assert_close(sampled_conv2d(x, w, sampling=CHESSBOARD, padding=1), 2 * first)


# ---------------------------------------------------------------- threads and processes


def _block(x, w1, w2):
    y = sampled_conv2d(x, w1, sampling=CHESSBOARD, padding=1)
    return sampled_conv_transpose2d(y.relu(), w2, sampling=CHESSBOARD, size=x.shape[2:], padding=1)


def _values():
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(s, generator=generator) for s in ((2, 24, 16, 16), (40, 24, 3, 3), (40, 24, 3, 3))
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    values = _values()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = _block(*values)
        torch.set_num_threads(threads)
        assert torch.equal(_block(*values), want)
    finally:
        torch.set_num_threads(before)


def test_gradients_repeat_to_the_bit():
    values = [v.requires_grad_() for v in _values()]
    first, second = (torch.autograd.grad(_block(*values).square().sum(), values) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_eight_threads_at_once():
    x, w1, w2 = _values()
    images = [x + i for i in range(8)]
    want = [_block(image, w1, w2) for image in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            got = list(pool.map(lambda image: _block(image, w1, w2), images))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _in_child(queue):
    torch.set_num_threads(1)
    queue.put(_block(*_values()).sum().item())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_process_computes_the_same(method):
    want = _block(*_values()).sum().item()  # the parent has used its threads already
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=120) == pytest.approx(want, rel=1e-5)
    finally:
        child.join(10)


def test_any_layout_is_read():
    case = Case((7, 6), CHESSBOARD, padding=(1, 1, 1, 1), depth=(5, 6))
    x, _, w, b, _ = case.values(torch.float32)
    want = sampled_conv2d(x, w, b, sampling=CHESSBOARD, padding=1)
    for layout in ("channels_last", "sliced", "transposed"):
        got = sampled_conv2d(lay_out(x, layout), lay_out(w, layout), b, sampling=CHESSBOARD, padding=1)
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.5, fused=True),
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, foreach=True),
        lambda parameters: torch.optim.Adam(parameters, lr=0.5),
    ],
)
def test_weights_that_an_optimiser_changed_are_packed_again(make):
    layer = qx.SampledConv2d(3, 4, 3, sampling=qx.CHESSBOARD, padding=1)
    x, optimizer = torch.randn(2, 3, 8, 8), make(layer.parameters())
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
        fresh = copy.deepcopy(layer)
        torch.testing.assert_close(layer(x), fresh(x))


def test_a_weight_made_in_inference_mode_is_right_and_said_once(recwarn):
    native._say_packed_each_time.cache_clear()
    with torch.inference_mode():
        layer, x = qx.SampledConv2d(3, 4, 3, sampling=qx.CHESSBOARD), torch.randn(1, 3, 8, 8)
        first, second = layer(x), layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * first)
    assert torch.equal(first, second)
    [said] = [str(one.message) for one in recwarn]
    assert "made in inference mode" in said
    assert "packed again at every call" in said
