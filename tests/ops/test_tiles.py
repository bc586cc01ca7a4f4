"""bfloat16 and eight bits on tiles: emulated ones everywhere, AMX where it is there and permitted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quincunx as qx
from helpers.commands import check_under
from helpers.forked import forked
from quincunx.ops import native

pytestmark = pytest.mark.skipif(native.load() is not None, reason="the native back end is not built")

TESTS = Path(__file__).parents[1]
# one set of kernels a process
SETS = ["amx-emulated", *(["amx"] if native.load() is None and not native.tiles_refused() else [])]


def python(code, **environment):
    """Run code; a variable that is None is not set, though it is set for this process."""
    variables = {**os.environ, "QUINCUNX_BACKEND": "native", **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
    )


# a sampled, a transposed, a dense, a strided, a grouped and a 1 x 1 convolution; narrow, odd and wide maps;
# then such convolutions in eight bits
NETWORK = """
import torch, quincunx as qx
from quincunx.ops import int8, native
def outputs(threads=1):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    def normal(*sizes):
        return torch.randn(sizes, generator=generator).bfloat16()
    x, all_ = normal(3, 33, 19, 17), []
    w, v = normal(64, 33, 3, 3), normal(64, 64, 3, 3)
    y = qx.sampled_conv2d(x, w, sampling=qx.CHESSBOARD, padding=1)
    all_.append(y)
    all_.append(qx.sampled_conv_transpose2d(y, v, sampling=qx.CHESSBOARD, size=(19, 17), padding=1))
    def dense(x, weight, stride=1, padding=0, dilation=1):
        return native.conv(x, weight, None, "", [stride] * 2, [padding] * 4, [dilation] * 2, 1)
    all_.append(dense(all_[-1], normal(20, 64, 1, 1)))
    all_.append(dense(normal(2, 64, 40, 40), normal(64, 64, 3, 3), padding=1))
    all_.append(dense(normal(2, 32, 20, 20), normal(48, 32, 3, 3), stride=2, padding=2, dilation=2))
    x, w = normal(2, 6, 20, 20), normal(8, 3, 7, 7)
    all_.append(qx.sampled_conv2d(x, w, sampling=qx.QUARTER, padding=3, groups=2))
    def integers(low, high, *sizes):
        return torch.randint(low, high, sizes, generator=generator)
    def eight(channels, outputs, side, kernel, groups=1, **where):
        x = integers(0, 256, 2, channels, side, side)
        w = integers(-128, 128, outputs, channels // groups, kernel, kernel)
        padding, residual = [kernel // 2] * 4, integers(0, 256, 2, outputs, side, side)
        where = {"padding": padding, "groups": groups, **where}
        if "sampling" not in where:
            where |= {"residual": residual.byte(), "residual_grid": int8.Grid(0.1, 9), "activation": 1}
        small, grid = torch.full((outputs,), 1e-3 / channels), int8.Grid(0.05, 7)
        y = int8.convolve("conv", x.byte(), grid, w.char(), small, out=grid, back_end="native", **where)
        all_.append(y.bfloat16())
    eight(64, 64, 40, 3)
    eight(128, 96, 20, 1)
    eight(48, 20, 18, 3, sampling=qx.CHESSBOARD.spec)
    eight(24, 48, 17, 3, groups=2)
    eight(160, 64, 16, 3)
    return all_
"""


def printed(isa, pieces):
    """What each piece of code prints in a process of its own, with a size of the cache."""
    variables = {"QUINCUNX_BACKEND": "native", "QUINCUNX_ISA": isa}
    found = forked([(code, {**variables, "QUINCUNX_L2": str(l2)}) for code, l2 in pieces], "torch")
    assert [status for status, _, _ in found] == [0] * len(pieces), [e[-2000:] for _, _, e in found]
    return [said for _, said, _ in found]


@pytest.mark.parametrize("isa", SETS)
def test_fused_networks_equal_the_reference(isa):
    """The fused networks' own tests, on these kernels."""
    files = [TESTS / "fusion" / name for name in ("test_epilogues.py", "test_compact.py", "test_fuse.py")]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            "bfloat16 or dtype or equal",
            *files,
        ],
        env={**os.environ, "QUINCUNX_ISA": isa, "QUINCUNX_BACKEND": "native"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("isa", SETS)
def test_networks_in_eight_bits_have_the_bits_of_the_reference(isa):
    check_under(isa, "same_bits or batch_or_threads", TESTS / "fusion" / "test_fuse_int8.py")


@pytest.mark.parametrize("isa", SETS)
def test_results_do_not_depend_on_the_threads_nor_on_the_cache(isa):
    """The cache's size decides how much is copied at a time, and the threads where the work is cut."""
    digest = """
for o in outputs({}):
    print(int((o.view(torch.int16).long() * torch.arange(o.numel()).view(o.shape)).sum()))
"""
    cases = ((1, 1 << 20), (3, 1 << 20), (4, 1 << 18), (1, 1 << 22))
    found = set(printed(isa, [(NETWORK + digest.format(threads), cache) for threads, cache in cases]))
    assert len(found) == 1
    assert found != {""}


# narrow, odd and wide maps, groups, more outputs than share one pass
GRADIENTS = """
import torch, quincunx as qx
from quincunx.ops import native, reference
assert native.load() is None
torch.set_num_threads({threads})
generator = torch.Generator().manual_seed(0)
def normal(*sizes):
    return torch.randn(sizes, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)
def sums(x, y, kernel, sampling, stride, padding, dilation, groups):
    if sampling:
        return reference.conv_weight(x, y, kernel, sampling, stride, padding, dilation, groups)
    shape = y.shape[1], x.shape[1] // groups, *kernel
    return torch.nn.grad.conv2d_weight(x, shape, y, stride, padding[0], dilation, groups)
for inputs, outputs, side, kernel, stride, groups, sampling in [
    (33, 64, 23, 3, 1, 1, qx.CHESSBOARD.spec), (64, 20, 23, 1, 1, 1, ""), (3, 16, 40, 3, 1, 1, ""),
    (16, 16, 40, 3, 2, 1, ""), (24, 48, 19, 3, 1, 2, ""), (8, 8, 19, 3, 1, 8, qx.QUARTER.spec),
    (80, 560, 9, 3, 1, 1, ""),
]:
    where = [kernel] * 2, sampling, [stride] * 2, [kernel // 2] * 4, [1, 1], groups
    x, w = normal(3, inputs, side, side), normal(outputs, inputs // groups, kernel, kernel)
    y = native.conv(x, w, None, *where[1:])
    found = [native.conv_weight(x, y, *where, last, True) for last in (False, True, False)]
    # the same number of threads gives the same bits, in either layout
    assert all(torch.equal(f, found[0]) for f in found), where
    x, y = x.double(), y.double()
    error, size = (found[0] - sums(x, y, *where)).abs(), sums(x.abs(), y.abs(), *where)
    assert (error <= 2e-6 * (1 + size)).all(), where
"""


@pytest.mark.parametrize("isa", SETS)
def test_weight_gradients_are_the_sums_of_the_reference(isa):
    """The cache's size decides how many positions are taken at a time."""
    cases = ((1, 1 << 21), (1, 1 << 18), (3, 1 << 20))
    printed(isa, [(GRADIENTS.format(threads=threads), cache) for threads, cache in cases])


@pytest.mark.parametrize("isa", SETS)
def test_forked_and_spawned_processes_compute_the_same(isa, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(
        NETWORK
        + """
import multiprocessing
def work(kind, pipe):
    pipe.send([o.float().numpy() for o in outputs()])
if __name__ == "__main__":
    mine = outputs()
    for kind in ("fork", "spawn"):
        context = multiprocessing.get_context(kind)
        here, there = context.Pipe()
        process = context.Process(target=work, args=(kind, there))
        process.start()
        assert here.poll(120), kind
        theirs = here.recv()
        process.join()
        assert process.exitcode == 0, kind
        assert all((a.float() == torch.from_numpy(b)).all() for a, b in zip(mine, theirs, strict=True)), kind
        print(kind)
"""
    )
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "QUINCUNX_ISA": isa, "QUINCUNX_BACKEND": "native"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["fork", "spawn"]


def test_beside_torch_which_uses_tiles_too():
    """oneDNN configures the tiles for its own products; neither may find the other's configuration."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 64, 30, 30).bfloat16(), torch.randn(64, 64, 3, 3).bfloat16()

    def theirs():
        return torch.nn.functional.conv2d(x, weight, padding=1), x.flatten(1) @ x.flatten(1).T

    def ours():
        return qx.sampled_conv2d(x, weight, sampling=qx.CHESSBOARD, padding=1)

    first = (*theirs(), ours())
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, (*theirs(), ours()), strict=True))


def test_without_permission_vectors_serve_and_info_says_why():
    """A small stack for signals makes the system refuse: there would be no room to save tiles on it."""
    refuse = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)
ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None)
import quincunx as qx
from quincunx.ops import native
print(qx.backend().isa)
print(native.tiles_refused())
"""
    run = python(refuse, QUINCUNX_ISA=None)
    assert run.returncode == 0, run.stderr
    isa, reason = run.stdout.splitlines()
    assert isa != "amx"
    assert reason
    if not native.tiles_refused():
        assert "refused the permission" in reason
    forced = python(refuse, QUINCUNX_ISA="amx")
    assert forced.returncode != 0
    assert f"QUINCUNX_ISA=amx is not available here: {reason}; available: " in forced.stderr
