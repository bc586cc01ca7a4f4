"""Programs that are checked once: as safe as if each call checked them, freed with their networks."""

import copy
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quincunx as qx
from quincunx.fusion.program import _CALLS, Program, StepCode
from quincunx.fusion.steps import Step
from quincunx.ops import native
from quincunx.ops.geometry import Geometry

RAW = torch.ops.quincunx_native
BF16 = torch.bfloat16
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(qx.backend().name != "native", reason="the native extension is not built"),
]


class Block(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.down = qx.SampledConv2d(channels, channels, 3, sampling=qx.CHESSBOARD, padding=1)
        self.up = qx.SampledConvTranspose2d(channels, channels, 3, sampling=qx.CHESSBOARD, padding=1)

    def forward(self, x):
        return self.up(torch.relu(self.down(x)), x.shape[2:]) + x


def made(dtype=None, channels=8, side=6):
    """A block as one native call, fused in a format, an input and its answer."""
    torch.manual_seed(0)
    model, x = Block(channels).eval(), torch.randn(2, channels, side, side)
    settings = {"calibration": torch.randn(16, channels, side, side), "max_drop": 100, "keep_ends": False}
    fused = qx.fuse(model, dtype, force=True, **(settings if dtype == torch.int8 else {}))
    with torch.no_grad():
        answer = fused(x)
    return fused, x, answer


def call_of(fused):
    [stages] = fused.program0._compiled.values()
    [stage] = stages
    return stage.run.__self__


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


FORMATS = pytest.mark.parametrize("dtype", [None, BF16, torch.int8], ids=str)


# ---------------------------------------------------------------- how long they live


@FORMATS
def test_a_program_lives_as_long_as_its_network(dtype):
    fused, x, answer = made(dtype)
    call = call_of(fused)
    number, seen = call.kept.number, weakref.ref(call.tensors[0])
    assert number in _CALLS
    other = copy.deepcopy(fused)
    assert torch.equal(other(x), answer)
    assert call_of(other).kept.number != number
    del fused, call
    gc.collect()
    assert number not in _CALLS
    with pytest.raises(RuntimeError, match=f"there is no program {number}"):
        RAW.run_kept([x], number, False)
    assert dtype == torch.int8 or seen() is None
    assert torch.equal(other(x), answer)


@FORMATS
def test_a_pickled_network_is_kept_anew(dtype):
    fused, x, answer = made(dtype)
    written = pickle.dumps(fused)
    del fused
    gc.collect()
    again = pickle.loads(written)
    assert again.program0._compiled == again.program0._single == {}
    assert torch.equal(again(x), answer)
    assert torch.equal(copy.copy(again)(x), answer)


def test_nothing_is_left_of_many_networks():
    gc.collect()
    before = len(_CALLS)
    for _ in range(5):
        fused, x, _ = made()
        fused(x[:1])
    assert len(_CALLS) > before
    del fused
    gc.collect()
    assert len(_CALLS) == before


def test_a_number_that_no_program_has():
    x = torch.randn(1, 8, 6, 6)
    for number in (0, -1, 2**62):
        with pytest.raises(RuntimeError, match="there is no program"):
            RAW.run_kept([x], number, False)
    native.import_module("quincunx._native").drop_program(2**62)
    with pytest.raises((TypeError, OverflowError)):
        native.import_module("quincunx._native").drop_program("one")


def test_threads_call_while_others_fuse_and_forget():
    fused, x, answer = made(BF16)
    wrong, stop = [], threading.Event()

    def call():
        while not stop.is_set():
            if not torch.equal(fused(x), answer):
                wrong.append("another answer")

    def fuse():
        for _ in range(10):
            _, again, found = made(BF16)
            if not (torch.equal(again, x) and torch.equal(found, answer)):
                wrong.append("another network")
        stop.set()

    # what is drawn belongs to the process, so one thread draws
    threads = [threading.Thread(target=run) for run in (call, call, fuse)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def _answer_in_child(fused, x, queue):
    torch.set_num_threads(1)
    queue.put((fused(x).tolist(), fused(x[:1]).tolist()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_another_process(method):
    fused, x, answer = made()
    one, context = fused(x[:1]), multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_answer_in_child, args=(fused, x, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    assert found == (answer.tolist(), one.tolist())


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_process_forks_while_threads_call():
    """Without care every hundredth child or so would wait for ever for a thread that it has not."""
    kept, x = native.keep(*small(), torch.float32), torch.randn(1, 2, 2, 2)
    stop = threading.Event()

    def call():
        while not stop.is_set():
            kept.run([x])

    threads = [threading.Thread(target=call) for _ in range(3)]
    [t.start() for t in threads]
    try:
        for _ in range(80):
            if (child := os.fork()) == 0:
                signal.alarm(20)
                kept.run([x])
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        [t.join() for t in threads]


# ---------------------------------------------------------------- what is checked


def small():
    """A 1 x 1 convolution of 2 channels on 2 x 2 positions."""
    tensors = [
        RAW.pack_weight(torch.eye(2).view(2, 2, 1), 1),
        ints(0, 1, 2, 3),
        ints(0),
        ints(4, 1),
        torch.ones(2),
    ]
    buffers = [0, 2, 2, 2, 0, 2, 2, 2, 2, 0]
    fields = dict.fromkeys(StepCode._fields, -1) | {"x": 0, "weight": 0, "bias": 4, "out": 1, "work": 0}
    fields |= {"tap_index": 1, "rows": 1, "taps": 2, "groups": 3, "num_taps": 1, "channel_groups": 1}
    return tensors, buffers, StepCode(**fields | {"residual_channels": 0, "activation": 0})


@pytest.mark.parametrize(
    ("number", "tensor", "message"),
    [
        (1, ints(0, 1, 2, 4), "index must lie in"),
        (1, ints(0, 1, 2), "groups exceed the sizes"),
        (1, ints(0, 1, -2, 3), "must lie in"),
        (2, ints(1), "taps must lie in"),
        (3, ints(4, -1), "groups must not be negative"),
        (3, ints(3, 1), "as many entries as groups say"),
        (0, torch.zeros(3), "packed weight must have"),
        (0, torch.zeros(16, dtype=torch.float64), "packed weight must be"),
        (4, torch.ones(3), "bias must have 2 values"),
        (1, torch.zeros(4), "must be Int"),
        (1, ints(0, 9, 1, 9, 2, 9, 3, 9)[::2], "must be contiguous and on the CPU"),
    ],
)
def test_a_bad_tensor_is_refused_before_anything_runs(number, tensor, message):
    tensors, buffers, code = small()
    kept = native.keep(tensors, buffers, code, torch.float32)
    x = torch.randn(3, 2, 2, 2)
    torch.testing.assert_close(kept.run([x])[0], x + 1)
    tensors[number] = tensor
    with pytest.raises(RuntimeError, match=message):
        native.keep(tensors, buffers, code, torch.float32)


def test_bad_records_are_refused():
    tensors, buffers, code = small()
    for bad, message in (
        ((tensors, buffers[:-1], code), "buffers must have"),
        ((tensors, buffers, code[:-1]), "code must have"),
        ((tensors, [1, *buffers[1:]], code), "a program needs an input"),
        ((tensors, buffers, code._replace(weight=7)), "code names a tensor 7"),
        ((tensors, buffers, code._replace(x=5)), "code names a buffer 5"),
        ((tensors, [], code), "a program needs an input"),
        ((tensors, buffers, []), "buffer 1 is an output that no step writes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.keep(*bad, torch.float32)


def test_a_table_that_is_written_to_later_is_not_read_again():
    tensors, buffers, code = small()
    kept = native.keep(tensors, buffers, code, torch.float32)
    x = torch.randn(1, 2, 2, 2)
    for tensor in tensors[1:4]:
        tensor.fill_(2**30)
    tensors[4].fill_(7)
    tensors[1].untyped_storage().resize_(0)
    torch.testing.assert_close(kept.run([x])[0], x + 1)


def test_a_weight_whose_memory_is_taken_away_is_refused():
    tensors, buffers, code = small()
    kept, x = native.keep(tensors, buffers, code, torch.float32), torch.randn(1, 2, 2, 2)
    size = tensors[0].untyped_storage().nbytes()
    tensors[0].untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match="a packed weight was moved"):
        kept.run([x])
    tensors[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="a packed weight was moved"):
        kept.run([x])
    assert size > 4


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 2, 2, 3),
        torch.randn(1, 3, 2, 2),
        torch.randn(2, 2, 2),
        torch.randn(1, 2, 2, 2).double(),
        torch.randn(1, 2, 2, 2).bfloat16(),
        torch.zeros(1, 2, 2, 2, dtype=torch.uint8),
    ],
    ids=lambda x: f"{list(x.shape)} {x.dtype}",
)
def test_a_wrong_input_is_refused(x):
    kept = native.keep(*small(), torch.float32)
    with pytest.raises(RuntimeError, match="input"):
        kept.run([x])
    with pytest.raises(RuntimeError, match="1 inputs, got 2"):
        kept.run([torch.randn(1, 2, 2, 2)] * 2)
    with pytest.raises((RuntimeError, NotImplementedError)):
        kept.run([torch.randn(1, 2, 2, 2, device="meta")])


def test_a_batch_beyond_all_memory_is_refused_before_it_is_copied():
    kept = native.keep(*small(), torch.float32)
    huge = torch.zeros(1, 1, 2, 2).expand(2**58, 2, 2, 2)
    with pytest.raises(RuntimeError, match="too large"):
        kept.run([huge])


# ---------------------------------------------------------------- what enters and leaves


def layouts(x):
    """A map in every order of memory."""
    wide = torch.zeros(x.shape[0], x.shape[1], x.shape[2], 2 * x.shape[3])
    wide[..., ::2] = x
    return [x.contiguous(), x.contiguous(memory_format=torch.channels_last), wide[..., ::2]]


@FORMATS
def test_every_memory_order_gives_the_same_bits(dtype):
    fused, _, _ = made(dtype)
    for shape in ((2, 8, 6, 6), (1, 8, 6, 6), (0, 8, 6, 6), (3, 8, 5, 34)):
        x = torch.randn(shape)
        with torch.inference_mode():
            found = [fused(one) for one in layouts(x)]
        assert all(torch.equal(one, found[0]) and one.dtype == torch.float32 for one in found), shape
        assert found[0].shape == x.shape
        assert found[1].is_contiguous(memory_format=torch.channels_last), shape


@pytest.mark.parametrize("channels", [1, 3, 8, 33])
def test_bfloat16_at_the_border_is_rounded_as_torch_rounds(channels):
    fused, x, answer = made(BF16, channels, 19)
    kept = call_of(fused).kept
    x[0, 0, 0, :6] = torch.tensor([0.0, -0.0, 1e-40, 3.4e38, float("inf"), 1 + 2**-8])
    with torch.inference_mode():
        [by_torch] = kept.run([x.to(BF16)])
        assert by_torch.dtype == BF16
        assert torch.equal(fused(x).nan_to_num(7), by_torch.float().nan_to_num(7))
    assert answer.dtype == torch.float32


def test_a_float32_program_serves_bfloat16_outside():
    kept = native.keep(*small(), torch.float32)
    x = torch.randn(2, 2, 2, 2).to(BF16)
    [found] = kept.run([x], crossing=True)
    assert found.dtype == BF16
    assert torch.equal(found, (x.float() + 1).to(BF16))


@FORMATS
def test_no_mode_of_torch_changes_an_answer(dtype):
    fused, x, answer = made(dtype)
    asked = x.clone().requires_grad_()
    for one in (fused(x), fused(asked)):
        assert torch.equal(one, answer)
        assert not one.requires_grad
    with torch.inference_mode():
        assert torch.equal(fused(x), answer)
    with torch.autocast("cpu", BF16):
        torch.testing.assert_close(fused(x).float(), answer, rtol=0.05, atol=0.05)
    assert torch.equal(fused(x), answer)
    assert torch.equal(torch.compile(fused, backend="eager")(x), answer)


def test_maps_in_another_order_than_the_call_has_them():
    torch.manual_seed(0)
    weights = [torch.randn(4, 4, 1, 1) for _ in range(2)]
    steps = [
        Step("dense", name, weight, None, Geometry((1, 1)), 1, out=f"{name}2")
        for name, weight in zip("ba", weights, strict=True)
    ]
    a, b = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 5, 5)
    program = Program(steps, ["a", "unread", "b"], ["a2", "b2"], native_only=True)
    for _ in range(2):
        found = program(a, torch.randn(1, 1, 2, 2), b)
        for one, x, weight in zip(found, (a, b), reversed(weights), strict=True):
            torch.testing.assert_close(one, nn.functional.conv2d(x, weight))
    assert len(program._single) == 1


@FORMATS
def test_multiply_adds_are_counted(dtype):
    fused, x, _ = made(dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fused(x)
    assert counter.get_total_flops() == 2 * qx.cost(Block().eval(), x).macs
