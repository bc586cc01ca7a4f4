"""Programs as bytes: what reads them equals what wrote them, and nothing damaged is run."""

import multiprocessing
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import quincunx as qx
from helpers.forked import forked
from helpers.programs import Net, called, conv, examples, in_eight_bits, sampled
from quincunx.fusion.program import BufferCode, Program, StepCode
from quincunx.fusion.serialise import NativePiece, load_program, pieces, program_bytes
from quincunx.ops import backend
from quincunx.ops.libraries import LoadedProgram

pytestmark = pytest.mark.skipif(backend().name != "native", reason="programs run in native kernels")
ROOT = Path(__file__).resolve().parents[2]
ISAS = torch.ops.quincunx_native.available_isas().split(",") if backend().name == "native" else []
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def fused(model, dtype=None):
    return qx.fuse(model, dtype, force=True) if dtype else qx.fuse(model)


def run_pieces(program, parts, arguments, run):
    """A program's results from its pieces, in torch's names."""
    values = dict(zip(program.inputs, arguments, strict=True))
    for piece in parts:
        maps = [values[name] for name in piece.inputs]
        found = run(piece, maps) if isinstance(piece, NativePiece) else [piece.function(*maps)]
        values.update(zip(piece.outputs, found, strict=True))
    return [values[name] for name in program.outputs]


def by_library(threads):
    def run(piece, maps):
        found = LoadedProgram(piece.data).run([m.contiguous().numpy() for m in maps], threads=threads)
        return [torch.from_numpy(y) for y in found]

    return run


def by_torch(piece, maps):
    return load_program(piece.data)(*maps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", examples())
def test_bytes_give_what_the_fused_network_gives(name, dtype):
    model, x = examples()[name]
    for program, arguments, results in called(fused(model, DTYPES[dtype]), x):
        parts = pieces(program, *(a.shape for a in arguments))
        assert all(piece.data[:8] == b"QUINCUNX" for piece in parts if isinstance(piece, NativePiece))
        # torch rounds between calls to bfloat16 where a piece keeps float32
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
        for run in (by_library(1), by_library(3), by_torch):
            for got, wanted in zip(run_pieces(program, parts, arguments, run), results, strict=True):
                assert got.shape == wanted.shape
                torch.testing.assert_close(got, wanted, **close)


@pytest.mark.parametrize("name", ["bottleneck", "strided", "two", "fitted"])
def test_one_piece_has_the_same_bits_as_torch_for_every_batch(name):
    model, x = examples()[name]
    for program, arguments, _ in called(fused(model), x):
        program.native_only = True
        data = program_bytes(program, *(a.shape for a in arguments))
        assert data == program_bytes(program, *((7, *a.shape[1:]) for a in arguments))
        for batch in (1, 2, 5):
            maps = [torch.randn(batch, *a.shape[1:]) for a in arguments]
            for got, wanted in zip(
                LoadedProgram(data).run([m.numpy() for m in maps]), program(*maps), strict=True
            ):
                assert torch.equal(torch.from_numpy(got), wanted)


def low(model, inputs, real=torch.float32, kept=False):
    """Programs of a network in eight bits, its steps in real numbers by our kernels, and calls of them."""
    fused = in_eight_bits(model, inputs, real, kept)
    for module in fused.modules():
        if isinstance(module, Program):
            module.native_only = True
    return called(fused, inputs)


@pytest.mark.parametrize("kept", [False, True], ids=["all", "half"])
@pytest.mark.parametrize("real", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", examples())
def test_bytes_of_eight_bits_have_the_bits_of_the_fused_network(name, real, kept):
    model, x = examples()[name]
    versions = set()
    for program, arguments, results in low(model, x, real, kept):
        parts = pieces(program, *(a.shape for a in arguments))
        versions |= {piece.data[8] for piece in parts if isinstance(piece, NativePiece)}
        # what torch computes between pieces is float32 here and bfloat16 in the network; of real maps it
        # normalises and takes means in another order
        whole = all(isinstance(piece, NativePiece) for piece in parts)
        same = (real == torch.float32 or whole) and not (kept and name in ("compact", "mean", "pooled"))
        for run in (by_library(1), by_library(3), by_torch):
            for got, wanted in zip(run_pieces(program, parts, arguments, run), results, strict=True):
                assert torch.equal(got, wanted) if same else torch.allclose(got, wanted, rtol=0, atol=0.05)
    assert 6 in versions or kept


def test_eight_bits_are_free_of_batch_and_a_quarter_of_the_bytes():
    model = qx.networks.build("rsbn8", 10, 3, width=32).eval()
    x = torch.rand(2, 3, 12, 12)
    [(program, _, _)] = low(model, (x,))
    [(wide, _, _)] = called(fused(model), (x,))
    data, plain = program_bytes(program, x.shape), program_bytes(wide, x.shape)
    assert data == program_bytes(program, (7, 3, 12, 12))
    # tables are the same
    assert len(data) < 0.3 * len(plain)
    loaded = LoadedProgram(data)
    for batch in (0, 1, 5):
        images = torch.rand(batch, 3, 12, 12)
        wanted = program(images)[0] if batch else torch.empty(0, *loaded.output_shapes[0])
        assert torch.equal(torch.from_numpy(loaded.run([images.numpy()])[0]), wanted)


def _gated(m, x):
    y = F.relu(m.first(x))
    return m.last(torch.sigmoid(m.one(y)) * y) + m.other(y)


@pytest.mark.parametrize("real", [torch.float32, torch.bfloat16], ids=str)
def test_integers_that_a_later_piece_reads_cross_as_real_numbers(real):
    """Torch's function stands between; bfloat16 would not give the integers back."""
    torch.manual_seed(1)
    model = Net(_gated, first=sampled(), one=conv(), last=conv(6, 3, 3), other=conv(6, 3))
    x = torch.rand(2, 6, 7, 9)
    [(program, arguments, results)] = low(model, (x,), real)
    parts = pieces(program, x.shape)
    assert [type(piece).__name__ for piece in parts] == ["NativePiece", "TorchPiece", "NativePiece"]
    assert [name.endswith(":crossing") for name in parts[2].inputs].count(True) == 1
    for run in (by_library(1), by_torch):
        [got] = run_pieces(program, parts, arguments, run)
        if real == torch.float32:
            assert torch.equal(got, results[0])
        torch.testing.assert_close(got, results[0], rtol=0, atol=0.02)


def test_a_result_that_is_an_argument_or_another_result_is_copied():
    model, x = examples()["bottleneck"]
    [(found, arguments, _)] = called(fused(model), x)
    program = Program(found.steps, found.inputs, [*found.outputs, *found.inputs, *found.outputs])
    data = program_bytes(program, *(a.shape for a in arguments))
    wanted = program(*arguments)
    for got, other in zip(LoadedProgram(data).run([a.numpy() for a in arguments]), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), other, rtol=1e-4, atol=1e-5)


def test_followers_that_the_kernels_lack_stay_functions_between_pieces():
    model, x = examples()["pointwise"]
    [(program, arguments, _)] = called(fused(model), x)
    parts = pieces(program, *(a.shape for a in arguments))
    kinds = [type(piece).__name__ for piece in parts]
    assert kinds[0] == kinds[-1] == "NativePiece"
    assert "TorchPiece" in kinds
    with pytest.raises(ValueError, match="not among the operations that the kernels have"):
        program_bytes(program, *(a.shape for a in arguments))
    with pytest.raises(ValueError, match="expected one"):
        pieces(program)


def small():
    model, x = examples()["compact"]
    [(program, arguments, results)] = called(fused(model), x)
    return program_bytes(program, *(a.shape for a in arguments)), arguments, results


@pytest.fixture(scope="module")
def programs():
    """Programs as bytes with what torch's network gives for an input, by number format."""
    model, x = examples()["fitted"]
    [(program, arguments, results)] = low(model, x)
    in_eight = program_bytes(program, *(a.shape for a in arguments))
    data, given, wanted = small()
    return {
        "float32": (data, given[0].numpy(), wanted[0].numpy()),
        "int8": (in_eight, arguments[0].numpy(), results[0].numpy()),
    }


def test_every_instruction_set_can_be_forced_and_reads_the_same_bytes(programs, tmp_path):
    """Each in a process of its own, as it is chosen once."""
    for name, (data, x, _) in programs.items():
        (tmp_path / name).write_bytes(data)
        np.save(tmp_path / f"{name}.npy", x)
    code = (
        "import numpy as np, quincunx as qx; from quincunx.ops.libraries import LoadedProgram\n"
        f"for name in {[*programs]}:\n"
        "    x = np.load(name + '.npy')\n"
        "    program = LoadedProgram(open(name, 'rb').read())\n"
        "    np.save(name + '-' + qx.backend().isa + '.npy', program.run([x], threads=2)[0])\n"
        "print(qx.backend().name, qx.backend().isa)"
    )
    done = forked([(code, {"QUINCUNX_ISA": isa}) for isa in ISAS], "torch", cwd=tmp_path)
    for isa, (status, said, errors) in zip(ISAS, done, strict=True):
        assert status == 0, errors
        assert said.split() == ["native", isa]
        found = {name: np.load(tmp_path / f"{name}-{isa}.npy") for name in programs}
        np.testing.assert_allclose(found["float32"], programs["float32"][2], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found["int8"], programs["int8"][2])


def test_bad_calls_are_refused_in_a_sentence():
    data, arguments, _ = small()
    program, x = LoadedProgram(data), arguments[0].numpy()
    assert program.input_shapes == [(6, 8, 10)]
    assert 0 < program.memory < 4 * len(data)
    for maps, message in (
        ([x[:, :, :-1]], "input 0: expected"),
        ([x.astype(np.float64)], "expected float32"),
        ([x, x], "the program has 1 inputs and 1 outputs, got 2 and 1"),
        ([], "the program has 1 inputs and 1 outputs, got 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            program.run(maps)
    with pytest.raises(ValueError, match=r"output 0 must have \d+ bytes"):
        program.run([x], [np.empty((1, 2), np.float32)])
    with pytest.raises(ValueError, match="threads must be 1 to 1024"):
        program.run([x], threads=5000)
    run = load_program(data)
    with pytest.raises(RuntimeError, match="input 0 must be"):
        run(arguments[0][:, :, :-1])
    assert run(arguments[0][:0])[0].shape[0] == 0
    assert program.run([x[:0]])[0].shape[0] == 0


def repaired(data):
    """With the checksum and the size that the bytes have now."""
    data = bytearray(data)
    data[40:48] = struct.pack("<Q", len(data))
    data[60:64] = struct.pack("<I", zlib.crc32(bytes(data[64:]), zlib.crc32(bytes(data[:60]))))
    return bytes(data)


def of_version(data, version):
    """The bytes as an earlier version has them: its steps lack fields, and what follows keeps its place."""
    outputs, maps, steps, tensors = struct.unpack_from("<4I", data, 20)
    at = 64 + 8 * outputs + 8 * len(BufferCode._fields) * maps
    size = 8 * len(StepCode._fields)
    code = [data[at + i * size : at + (i + 1) * size] for i in range(steps)]
    end = at + steps * size
    grids = (16 * maps + 8 * steps) * (1 - version % 2)
    rest = end + grids + 48 * tensors
    lacking = 8 * ((7 - version - version % 2) // 2)
    shorter = b"".join(step[: size - lacking] for step in code)
    head = data[:8] + struct.pack("<I", version) + data[12:at]
    return repaired(head + shorter + data[end:rest] + bytes(lacking * steps) + data[rest:])


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_files_of_earlier_versions_answer_as_ever(version):
    model, x = examples()["bottleneck"]
    [(program, arguments, _)] = low(model, x) if version % 2 == 0 else called(fused(model), x)
    data = program_bytes(program, *(a.shape for a in arguments))
    assert data[8] == 6 - version % 2
    maps = [a.numpy() for a in arguments]
    older = LoadedProgram(of_version(data, version)).run(maps)
    for got, wanted in zip(older, LoadedProgram(data).run(maps), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"", "no program of quincunx"),
        (lambda d: d[:63], "no program of quincunx"),
        (lambda d: b"QUINCUNY" + d[8:], "no program of quincunx"),
        (
            lambda d: d[:8] + struct.pack("<I", 7) + d[12:],
            "has version 7; this library reads versions 1 to 6",
        ),
        (lambda d: d[:-1], "is incomplete"),
        (lambda d: d[:-1] + b"?", "its checksum is wrong"),
        (lambda d: repaired(d[:12] + struct.pack("<I", 7) + d[16:]), "type or a field that is unknown"),
        (lambda d: repaired(d[:32] + struct.pack("<I", 2**32 - 1) + d[36:]), "end behind its"),
        (lambda d: repaired(d[:200]), "end behind its"),
        (lambda d: repaired(d[:16] + struct.pack("<I", 0) + d[20:]), "needs an input and an output"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_bytes_are_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        LoadedProgram(change(small()[0]))


def eight():
    model, x = examples()["compact"]
    [(program, arguments, results)] = low(model, x)
    return program_bytes(program, *(a.shape for a in arguments)), arguments, results


class Parts:
    """Where the records of a file in eight bits begin."""

    def __init__(self, data):
        self.inputs, self.outputs, self.maps, self.steps, self.tensors = struct.unpack_from("<5I", data, 16)
        self.buffers = 64 + 8 * self.outputs
        self.code = self.buffers + 8 * len(BufferCode._fields) * self.maps
        self.grids = self.code + 8 * len(StepCode._fields) * self.steps
        self.multipliers = self.grids + 16 * self.maps
        self.entries = self.multipliers + 8 * self.steps

    def grid(self, data, kind):
        """The first grid of a type, and its place."""
        places = [self.grids + 16 * number for number in range(self.maps)]
        return next(at for at in places if struct.unpack_from("<i", data, at)[0] == kind)

    def weight(self, data):
        """The entry of the first weight in int8."""
        places = [self.entries + 48 * number for number in range(self.tensors)]
        return next(at for at in places if struct.unpack_from("<I", data, at)[0] == 3)

    def weighted(self, data):
        """The multiplier of the first step that has one."""
        places = [self.multipliers + 8 * number for number in range(self.steps)]
        return next(at for at in places if struct.unpack_from("<q", data, at)[0] >= 0)


def put(data, at, form, *values):
    changed = bytearray(data)
    struct.pack_into(form, changed, at, *values)
    return repaired(changed)


SPOILT = {
    "a type": (lambda d, p: put(d, p.grids, "<i", 3), "type must be 0 to 2, got 3"),
    "a type of its own": (lambda d, p: put(d, p.grids, "<i", 2), "input or output and not of real numbers"),
    "another real type": (lambda d, p: put(d, 12, "<I", 1), "reads a map that is not uint8|step 0"),
    "a zero point": (lambda d, p: put(d, p.grid(d, 2) + 4, "<i", 256), "zero point must be 0 to 255"),
    "no scale": (lambda d, p: put(d, p.grid(d, 2) + 8, "<f", 0.0), "scale must be positive and finite"),
    "NaN": (lambda d, p: put(d, p.grid(d, 2) + 8, "<f", float("nan")), "scale must be positive and finite"),
    "a field": (lambda d, p: put(d, p.grids + 12, "<I", 1), "a grid has a field that is unknown"),
    "no multiplier": (
        lambda d, p: put(d, p.weighted(d), "<q", -1),
        "a convolution, and nothing else, has multipliers",
    ),
    "a table for it": (lambda d, p: put(d, p.weighted(d), "<q", 10**9), "code names a tensor 1000000000"),
    "weights of another kind": (lambda d, p: put(d, p.weight(d), "<I", 2), "weight|does not lie inside"),
    "an unknown kind": (lambda d, p: put(d, p.weight(d), "<I", 4), "has the unknown kind 4"),
    "of real numbers": (lambda d, p: put(d, 8, "<I", 5), "damaged"),
    "too few grids": (lambda d, p: repaired(d[: p.grids + 8]), "its grids end behind"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_bytes_of_eight_bits_are_refused_in_a_sentence(name):
    data, _, _ = eight()
    change, message = SPOILT[name]
    with pytest.raises(ValueError, match=message):
        LoadedProgram(change(data, Parts(data)))


@pytest.mark.parametrize("make", [lambda: small(), lambda: eight()], ids=["real", "eight bits"])
def test_mutated_bytes_are_refused_or_run(make):
    """The short form of ``make fuzz``, which also watches memory: with and without a right checksum."""
    data, arguments, _ = make()
    generator = np.random.default_rng(3)
    sentences = []
    front = 64 + 8 * 200
    for turn in range(600):
        changed = bytearray(data)
        at = int(generator.integers(64, front))
        changed[at] ^= 1 << int(generator.integers(8))
        with pytest.raises(ValueError, match="checksum"):
            LoadedProgram(bytes(changed))
        try:
            program = LoadedProgram(repaired(changed))
            if program.input_shapes == [(6, 8, 10)] and turn % 4 == 0:
                program.run([arguments[0].numpy()])
        except ValueError as error:
            sentences.append(str(error))
    assert len(sentences) > 100
    assert all(len(sentence) > 10 and "\n" not in sentence for sentence in sentences)


def test_threads_share_a_program():
    data, arguments, results = small()
    program, run, failures = LoadedProgram(data), load_program(data), []

    def work(number):
        for _ in range(50):
            first = program.run([arguments[0].numpy()], threads=1 + number % 3)[0]
            second = run(arguments[0])[0]
            if not (
                np.allclose(first, results[0], atol=1e-5) and torch.allclose(second, results[0], atol=1e-5)
            ):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _in_child(program, x, y, pipe):
    pipe.send(all(np.array_equal(program.run([x], threads=3)[0], y) for _ in range(3)))


def test_a_forked_worker_has_threads_of_its_own():
    data, arguments, _ = small()
    program, x = LoadedProgram(data), arguments[0].numpy()
    y = program.run([x], threads=3)[0]
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    worker = context.Process(target=_in_child, args=(program, x, y, theirs))
    worker.start()
    assert mine.poll(60)
    assert mine.recv() is True
    worker.join()
    assert worker.exitcode == 0
    np.testing.assert_array_equal(program.run([x], threads=3)[0], y)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity of threads here")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_threads_do_not_all_inherit_one_processor():
    """An engine ties its threads to a processor each, and such a thread may run the first program."""
    code = """
import os, sys
sys.path.insert(0, "tests")
import quincunx as qx
from helpers.programs import called, examples
from quincunx.fusion.serialise import pieces
from quincunx.ops.libraries import LoadedProgram
model, x = examples()["bottleneck"]
program, arguments, _ = called(qx.fuse(model), x)[0]
[piece] = pieces(program, *(a.shape for a in arguments))
loaded = LoadedProgram(piece.data)
allowed, before = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
one = {min(allowed)}
os.sched_setaffinity(0, one)
loaded.run([a.contiguous().numpy() for a in arguments], threads=2)
made = {int(task) for task in set(os.listdir("/proc/self/task")) - before}
assert [os.sched_getaffinity(task) for task in made] == [allowed], made
assert os.sched_getaffinity(0) == one
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
