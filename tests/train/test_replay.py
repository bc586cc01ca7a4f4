"""Training where the device computes while Python goes on: the same order, crops and steps as on the CPU.

On the CPU that way of training gives the ordinary loop's bits, so all of it but CUDA itself is tested there.
"""

import json
import math
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import quincunx as qx
from helpers import ROOT, processes
from helpers.training import DATA, TINY, assert_equal_states, log_of, network, pictures, run, stop_in
from quincunx.data import ImageData, Resident, Split, batches, can_reside, load_data, resident
from quincunx.train import loop as train
from quincunx.train import replay
from quincunx.train.checkpoint import read_checkpoint
from quincunx.train.evaluation import evaluate
from quincunx.train.loop import Diverged, Interrupted, fit
from quincunx.train.replay import (
    Replayed,
    counted_together,
    own_stream,
    why_not,
)

pytestmark = pytest.mark.usefixtures("one_thread")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


@pytest.fixture
def apart(monkeypatch):
    """The CPU is taken for a device that computes by itself."""
    monkeypatch.setattr(train, "_runs_apart", lambda device: True)


def both_ways(monkeypatch, folder, make=network, **options):
    """(result, network, log, checkpoint) of the ordinary loop, and of the other one."""
    found = []
    for name, far in (("in turn", False), ("apart", True)):
        monkeypatch.setattr(train, "_runs_apart", lambda device, far=far: far)
        result, model = run(folder / name, model=make(), **options)
        found.append((result, model, log_of(folder / name), read_checkpoint(folder / name / "checkpoint.pt")))
    return found


# ---- the images


def some_images(count, height, width, channels):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, height, width, channels), generator=generator, dtype=torch.uint8)
    split = Split(pixels, torch.arange(count))
    names = tuple(map(str, range(count)))
    return ImageData(
        "some", split, split, names, (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels], "none"
    )


@given(
    count=st.integers(1, 30),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    channels=st.sampled_from([1, 3]),
    batch=st.integers(1, 12),
    augment=st.sampled_from(["none", "cifar"]),
    world=st.integers(1, 3),
    many=st.integers(1, 4),
    drawn=st.booleans(),
)
def test_resident_images_are_those_of_the_ordinary_batches(
    count, size, channels, batch, augment, world, many, drawn
):
    data = some_images(count, *size, channels)
    device = torch.device("cpu")
    for rank in range(world):
        generators = [torch.Generator().manual_seed(7) if drawn else None for _ in range(2)]
        wanted = batches(
            data.train, data, batch, generator=generators[0], augment=augment, rank=rank, world=world
        )
        held = Resident(data.train, data, device)
        held.at_once = lambda _: many
        taken = held.drawn(batch, generator=generators[1], augment=augment, rank=rank, world=world)
        found = list(held.batches(taken.to(device)))
        wanted = list(wanted)
        assert len(found) == len(wanted)
        for (ours, labels), (images, numbers) in zip(found, wanted, strict=True):
            assert torch.equal(labels, numbers)
            assert torch.equal(ours, images)
            # the sign of zero too
            assert torch.equal(ours.signbit(), images.signbit())
            assert ours.is_contiguous(memory_format=torch.channels_last)
        if drawn:
            assert generators[0].get_state().equal(generators[1].get_state())


def test_images_are_made_within_a_bound_of_memory(monkeypatch):
    data = some_images(20, 8, 8, 3)
    held = Resident(data.train, data, torch.device("cpu"))
    monkeypatch.setattr(resident, "_AT_ONCE", 4 * 8 * 8 * 3 * 7)
    assert [held.at_once(size) for size in (1, 3, 4, 8)] == [7, 2, 1, 1]
    sizes = []
    some = held.some
    held.some = lambda taken, start, stop: sizes.append(stop - start) or some(taken, start, stop)
    assert len(list(held.batches(held.drawn(3)))) == 7
    assert sizes == [6, 6, 6, 2]


def test_photographs_stay_with_the_processor(tmp_path):
    assert can_reside(DATA.train, "none")
    assert can_reside(DATA.train, "cifar")
    assert not can_reside(DATA.train, "imagenet")


def test_images_that_are_there_already_are_judged_the_same():
    model = network()
    held = Resident(DATA.test, DATA, torch.device("cpu"))
    assert evaluate(model, DATA.test, DATA, batch_size=4, held=held) == evaluate(
        model, DATA.test, DATA, batch_size=4
    )


# ---- whole runs


CASES = {
    "plain": ({}, None),
    "unaugmented": ({"augment": "none"}, None),
    "no rest": ({"batch_size": 5}, None),
    "one batch": ({"batch_size": 20}, None),
    "no momentum": ({"momentum": 0.0}, None),
    "heavy ball": ({"nesterov": False, "weight_decay": 0.0}, None),
    "channels first": ({"channels_last": False}, None),
    "bfloat16": ({"precision": "bfloat16"}, None),
    "parts": ({"accumulate": 3}, "batches pass in parts"),
    "float16": ({"precision": "float16"}, "the scale of the losses may change"),
    "photographs": ({"augment": "imagenet"}, "the images come from the processor"),
    "large batch": ({"batch_size": 50}, "fewer images than a batch has"),
}


@pytest.mark.parametrize("name", ["rsbn8", "rrn8"])
@pytest.mark.parametrize(("changes", "why"), CASES.values(), ids=CASES.keys())
def test_a_run_has_the_ordinary_loops_bits(monkeypatch, tmp_path, name, changes, why):
    # several rounds of replays an epoch
    monkeypatch.setattr(resident, "_AT_ONCE", 4 * 8 * 8 * 8)
    ours, theirs = both_ways(monkeypatch, tmp_path, partial(network, name), recipe=replace(TINY, **changes))
    assert_equal_states(theirs[1].state_dict(), ours[1].state_dict())
    assert theirs[2] == ours[2]
    one, two = (found[3]["optimizer"] for found in (ours, theirs))
    assert one["param_groups"] == two["param_groups"]
    for key, state in one["state"].items():
        if state.get("momentum_buffer") is not None:
            assert torch.equal(state["momentum_buffer"], two["state"][key]["momentum_buffer"])
    assert ours[0].get("graph") is None
    facts = theirs[0]["graph"]
    assert facts["used"] == (why is None)
    assert facts["why_not"] == why or why in facts["why_not"]
    assert all(p.grad is None for p in theirs[1].parameters())
    assert theirs[1].norm.num_batches_tracked == ours[1].norm.num_batches_tracked > 0


def test_a_teacher_is_asked_at_each_step(monkeypatch, tmp_path):
    teacher = network(seed=3)
    ours, theirs = both_ways(
        monkeypatch, tmp_path, recipe=replace(TINY, distill=0.5, distill_features=0.1), teacher=teacher
    )
    assert_equal_states(theirs[1].state_dict(), ours[1].state_dict())
    assert theirs[0]["graph"] == {"used": False, "why_not": "a teacher is asked at each step"}


def test_streamed_photographs_are_trained_on(monkeypatch, tmp_path):
    for part, count in (("train", 5), ("test", 2)):
        for name in "abc":
            folder = tmp_path / "photographs" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 10), (40 * i, 50, 90)).save(folder / f"{i}.png")
    data = load_data(tmp_path / "photographs", stream=True, size=8)
    ours, theirs = both_ways(
        monkeypatch,
        tmp_path,
        partial(network, in_channels=3),
        data=data,
        workers=0,
        recipe=replace(TINY, augment=None),
    )
    assert_equal_states(theirs[1].state_dict(), ours[1].state_dict())
    assert theirs[2] == ours[2]
    assert "the images come from the processor" in theirs[0]["graph"]["why_not"]


def test_a_resumed_run_equals_an_uninterrupted_one(apart, tmp_path, monkeypatch):
    _, whole = run(tmp_path / "whole")
    epochs = []
    original = train._Run._epoch

    def stopping(self, number, *rest):
        epochs.append(number)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return original(self, number, *rest)

    monkeypatch.setattr(train._Run, "_epoch", stopping)
    with pytest.raises(Interrupted, match="after 1 of 3"):
        run(tmp_path / "parts")
    result, model = run(tmp_path / "parts", model=network(seed=8), resume=True)
    assert epochs == [0, 1, 1, 2]
    assert result["graph"]["used"]
    assert_equal_states(model.state_dict(), whole.state_dict())
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    again, _ = run(tmp_path / "parts", model=network(seed=9), resume=True)
    assert again["graph"] == {"used": False, "why_not": "no step was needed"}


def test_batches_of_a_test_are_of_one_size(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_TESTED_AT_ONCE", (3, 4))
    sizes = []
    original = train.evaluate

    def evaluating(*arguments, batch_size, **options):
        sizes.append(batch_size)
        return original(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(train, "evaluate", evaluating)
    run(tmp_path / "small", data=pictures(22), recipe=replace(TINY, epochs=1))
    assert set(sizes) == {4}  # 11 images as 4, 4 and 3
    monkeypatch.setattr(train, "_TESTED_AT_ONCE", (3, 10))
    sizes.clear()
    run(tmp_path / "whole", data=pictures(22), recipe=replace(TINY, epochs=1))
    assert set(sizes) == {6}
    monkeypatch.setattr(train, "_TESTED_PIXELS", 200)
    sizes.clear()
    run(tmp_path / "large", data=pictures(22), recipe=replace(TINY, epochs=1))
    assert set(sizes) == {3}


def test_what_draws_at_random_is_no_different(monkeypatch, tmp_path):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))
        net.quincunx_spec = {"kind": "factory", "factory": "test:make"}
        return net

    ours, theirs = both_ways(monkeypatch, tmp_path, make)
    assert theirs[0]["graph"]["used"]
    assert_equal_states(theirs[1].state_dict(), ours[1].state_dict())


def test_losses_that_are_not_finite_end_the_run_before_a_checkpoint(apart, tmp_path):
    with pytest.raises(
        Diverged, match=r"the loss is nan in epoch \d, by step [1-3], at learning rate 1e\+30"
    ):
        run(tmp_path, recipe=replace(TINY, lr=1e30, warmup=0.0))
    state = read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("parts", [1, 2])
def test_the_bar_hears_of_every_step(apart, tmp_path, monkeypatch, parts):
    monkeypatch.setattr(train, "_READ_EVERY", 2)
    told = []
    original = train._Run._epoch

    def telling(self, number, steps, advance):
        return original(self, number, steps, lambda state, done: told.append((done, state)))

    monkeypatch.setattr(train._Run, "_epoch", telling)
    run(tmp_path, recipe=replace(TINY, accumulate=parts))
    assert [done for done, _ in told] == [2, 1] * 3
    assert all("loss" in state for _, state in told)


def test_two_processes_add_their_shares(tmp_path):
    far = "from quincunx.train import loop\nloop._runs_apart = lambda device: True\n\nwith joined() as ranks:"
    plain = processes.WORKER
    logs = {}
    for name, text in (("in-turn", plain), ("apart", plain.replace("with joined() as ranks:", far))):
        code, output = processes.launch(tmp_path / name, ["plain"], 2, worker=text)
        assert code == 0, output
        logs[name] = processes.log_of(tmp_path / name / "plain")
    result = json.loads((tmp_path / "apart" / "plain" / "run.json").read_text())
    assert result["graph"] == {"used": False, "why_not": "several processes exchange at each step"}
    processes.assert_same_curve(logs["apart"], logs["in-turn"])


# ---- what is recorded


def test_only_code_that_repeats_itself_is_recorded():
    assert why_not(network()) is None

    class Own(nn.ReLU):
        def forward(self, x):
            return x

    model = network()
    model.stages[0][0] = nn.Sequential(model.stages[0][0], Own())
    assert (
        why_not(model) == "'stages.0.0.1' has a forward of its own, which may do something else at each step"
    )
    model = network()
    model.forward = model.forward
    assert why_not(model).startswith("the network has a forward of its own")
    assert "has hooks" in why_not(stop_in(network(), 99, KeyboardInterrupt()))
    model = network()
    model.stem.register_full_backward_hook(lambda *_: None)
    assert "'stem' has hooks" in why_not(model)
    model = network()
    model.stem.weight.register_hook(lambda gradient: gradient)
    assert "a weight has hooks" in why_not(model)


def test_a_step_that_cannot_be_recorded_is_made_as_any_other(monkeypatch, tmp_path):
    def failing(*_):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    original = Replayed.__init__

    def record(self, *arguments):
        original(self, *arguments)
        failing()

    monkeypatch.setattr(Replayed, "__init__", record)
    ours, theirs = both_ways(monkeypatch, tmp_path)
    assert_equal_states(theirs[1].state_dict(), ours[1].state_dict())
    assert theirs[2] == ours[2]
    assert theirs[0]["graph"]["used"] is False
    why = theirs[0]["graph"]["why_not"]
    assert why.startswith("a step cannot be recorded (")
    assert "not permitted when stream is capturing" in why


def test_replays_take_batches_and_rates_in_turn_and_warming_up_changes_nothing():
    rate, total = torch.zeros(1), torch.zeros(())
    seen = []

    def step(images, labels):
        seen.append((images.clone(), labels.clone(), float(rate)))
        total.add_(1)

    replayed = Replayed(step, rate, [total], (2, 1, 1, 3), 4)
    assert float(total) == 0
    assert len(seen) > 0
    for count in (4, 1, 3):
        seen.clear()
        images, labels = torch.rand(2 * count, 1, 1, 3), torch.randint(0, 9, (2 * count,))
        rates = torch.rand(count)
        before = float(total)
        version = total._version
        replayed.run(images, labels, rates)
        assert total._version > version + count
        assert float(total) == before + count
        for i, (some, numbers, at) in enumerate(seen):
            assert torch.equal(some, images[2 * i : 2 * i + 2])
            assert torch.equal(numbers, labels[2 * i : 2 * i + 2])
            assert at == float(rates[i])
    replayed.close()


def test_the_fused_optimiser_of_gpus_makes_the_same_network(apart, tmp_path, monkeypatch):
    """It tells torch of no change, and our kernels keep what they make of a weight until there is one."""
    _, wanted = run(tmp_path / "plain")
    plain, calls = train.sgd, []

    def fused(*lists, fused, lr, **rest):
        assert not fused
        calls.append(len(lists))
        for tensors in zip(*lists, strict=True):
            assert len({tensor.stride() for tensor in tensors}) == 1
        plain(*lists, fused=True, lr=torch.tensor([lr]), **rest)

    monkeypatch.setattr(train, "sgd", fused)
    _, found = run(tmp_path / "fused")
    assert len(calls) > 9
    for ours, theirs in zip(found.state_dict().values(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_warming_up_that_fails_changes_nothing():
    rate, total = torch.zeros(1), torch.ones(())

    def step(images, labels):
        total.add_(1)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Replayed(step, rate, [total], (2, 1, 1, 3), 4)
    assert float(total) == 1
    assert replay.ONE_AT_A_TIME.acquire(blocking=False)
    replay.ONE_AT_A_TIME.release()


def test_batch_norms_count_together_whatever_happens():
    model = nn.Sequential(
        nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm2d(2)
    ).train()
    model[2].momentum = None
    held = [norm.num_batches_tracked for norm in model]
    with counted_together(model):
        model(torch.randn(3, 2, 4, 4))
        assert model[0].num_batches_tracked is None
    assert [norm.num_batches_tracked for norm in model] == held
    assert [int(held[0]), held[1], int(held[2])] == [1, None, 1]
    with pytest.raises(KeyError), counted_together(model):
        raise KeyError
    assert model[0].num_batches_tracked is held[0]
    with counted_together(model.eval()):
        model(torch.randn(3, 2, 4, 4))
    assert int(held[0]) == 1


class FakeStream:
    def __init__(self, name, told):
        self.name, self.told = name, told

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self.told.append(f"{self.name} is waited for")


@pytest.fixture
def cuda(monkeypatch):
    """What is asked of CUDA, in order; ``now[0]`` is the present stream."""
    told = []
    default = FakeStream("default", told)
    now = [default]

    class Graph:
        replay = partial(told.append, "replay")
        reset = partial(told.append, "reset")

    @contextmanager
    def within(name, stream=None, **options):
        told.append(f"{name} {options}" if options else name)
        before, now[0] = now[0], stream or now[0]
        yield
        now[0] = before
        told.append(f"end of {name}")

    for name, value in {
        "CUDAGraph": Graph,
        "graph": lambda graph, **options: within("record", **options),
        "Stream": lambda: FakeStream("own", told),
        "stream": lambda stream: within(f"on {stream.name}", stream),
        "current_stream": lambda device=None: now[0],
        "default_stream": lambda device=None: default,
        "device": lambda device: within(f"on {device}"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return told, now


def test_a_run_has_a_stream_of_its_own_unless_it_was_given_one(cuda):
    told, now = cuda
    with own_stream(torch.device("cpu")):
        assert now[0].name == "default"
    assert told == []
    with own_stream(torch.device("cuda", 1)):
        assert now[0].name == "own"
        told.append("work")
    assert now[0].name == "default"
    assert told == [
        "on cuda:1", "own waits for default", "on own", "work", "end of on own", "default waits for own",
        "end of on cuda:1",
    ]  # fmt: skip
    told.clear()
    now[0] = FakeStream("given", told)
    with own_stream(torch.device("cuda", 1)):
        assert now[0].name == "given"
    assert told == ["on cuda:1", "end of on cuda:1"]


def test_a_graph_is_recorded_on_the_threads_stream_and_closed_when_it_is_done(cuda):
    told, now = cuda
    now[0] = FakeStream("own", told)
    again, close = replay._recorded(partial(told.append, "step"), torch.device("cuda", 0))
    again()
    again()
    close()
    assert told == [
        "record {'capture_error_mode': 'thread_local'}", "step", "end of record", "replay", "replay",
        "own is waited for", "reset",
    ]  # fmt: skip


def test_a_graph_that_cannot_be_recorded_is_kept_where_torch_may_ask_for_it(cuda, monkeypatch):
    kept = []
    monkeypatch.setattr(replay, "_FAILED", kept)

    def once():
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        replay._recorded(once, torch.device("cuda", 0))
    assert [type(graph) for graph in kept] == [torch.cuda.CUDAGraph]


def test_recording_is_one_at_a_time_and_leaves_the_first_step_first(monkeypatch):
    rate, total = torch.zeros(1), torch.zeros(())
    seen = []

    def step(images, labels):
        total.add_(1)

    def recorded(once, device):
        taken = []
        thread = threading.Thread(target=lambda: taken.append(replay.ONE_AT_A_TIME.acquire(blocking=False)))
        thread.start()
        thread.join()
        seen.append((taken, float(total)))
        # a record is no step
        return (lambda: (seen.append("replay"), once())), partial(seen.append, "closed")

    monkeypatch.setattr(replay, "_recorded", recorded)
    replayed = Replayed(step, rate, [total], (2, 1, 1, 3), 3)
    assert seen == [([False], 3)]
    assert float(total) == 0
    replayed.run(torch.zeros(4, 1, 1, 3), torch.zeros(4, dtype=torch.long), torch.ones(2))
    replayed.close()
    assert seen[1:] == ["replay", "replay", "closed"]
    assert float(total) == 2


# ---- several runs at once


def at_once(works):
    """Run functions in threads; what they give."""
    found, errors = [None] * len(works), []

    def call(i, work):
        try:
            found[i] = work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i, work)) for i, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


@pytest.mark.parametrize("far", [False, True])
def test_runs_in_threads_are_those_one_after_the_other(tmp_path, monkeypatch, far):
    monkeypatch.setattr(train, "_runs_apart", lambda device: far)
    jobs = [("rsbn8", 0), ("rrn8", 1), ("rsbn14", 2)]

    def trained(place, name, seed, model):
        result = fit(model, DATA, replace(TINY, epochs=4), tmp_path / place / f"{name}-{seed}", seed=seed)
        return result, model

    alone = [trained("alone", name, seed, network(name, seed)) for name, seed in jobs]
    # networks are made before, since what is drawn for one depends on the others
    models = [network(name, seed) for name, seed in jobs]
    together = at_once(
        [partial(trained, "together", *job, model) for job, model in zip(jobs, models, strict=True)]
    )
    for (ours, model), (theirs, other), (name, seed) in zip(together, alone, jobs, strict=True):
        assert_equal_states(model.state_dict(), other.state_dict())
        assert ours["cost"] == theirs["cost"]
        logs = [log_of(tmp_path / place / f"{name}-{seed}") for place in ("together", "alone")]
        assert logs[0] == logs[1]


# ---- the script that trains the paper's table


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The script as a module, and a function that runs it on a tiny set and gives its file."""
    path = ROOT / "benchmarks" / "table1_gpu.py"
    spec = spec_from_file_location("table1_gpu", path)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "table1_gpu", module)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.delenv("QUINCUNX_COMMIT", raising=False)
    spec.loader.exec_module(module)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 14), ("test", 4)):
        for number, name in enumerate("abc"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 80, (16, 16, 3), generator=generator) + 80 * number
                Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{i}.png")

    def go(*options):
        out = tmp_path / "table.json"
        sides = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
        given = ["table1_gpu.py", *sides, "--out", str(out), "--device", "cpu", "--batch-size", "8", *options]
        monkeypatch.setattr(sys, "argv", given)
        interval, cudnn = sys.getswitchinterval(), torch.backends.cudnn.benchmark
        try:
            module.main()
        finally:
            sys.setswitchinterval(interval)
            torch.backends.cudnn.benchmark = cudnn
        return json.loads(out.read_text())

    return module, go


def test_the_script_makes_the_whole_table(table, apart):
    _, go = table
    found = go(
        "--depths",
        "8,14",
        "--seeds",
        "0,1",
        "--epochs",
        "2",
        "--jobs",
        "3",
        "--alone",
        "1",
        "--commit",
        "abc",
    )
    assert found["failures"] == found["unfinished"] == found["not_started"] == []
    labels = {row["label"] for row in found["summary"]}
    assert {
        "rrn8",
        "rsbn8 2/4",
        "rsbn8 1/4",
        "rsbn8 3/4",
        "rsbn8 2/4, avgpool",
        "rsbn8 1/4, avgpool",
    } <= labels
    assert {
        label.replace("8", "14") for label in labels if " at " not in label and "14" not in label
    } <= labels
    assert any(label.startswith("rrn8 at ") for label in labels)
    assert all(len(row["errors"]) == 2 and row["seeds"] == [0, 1] for row in found["summary"])
    assert all(run["graph"]["used"] for run in found["runs"])
    assert all(len(run["history"]) == 2 for run in found["runs"])
    assert found["alone"]["images_per_second"] > 0
    assert found["recipe"]["milestones"] == [0.5, 0.75]
    assert found["environment"]["threads"] == 1
    small = next(row for row in found["summary"] if row["side"] < 16 and row["depth"] == 8)
    whole = next(row for row in found["summary"] if row["label"] == "rsbn8 2/4")
    assert small["macs"] == pytest.approx(whole["macs"], rel=0.15) or small["macs"] < whole["macs"]
    assert whole["small_images"] == small["label"]
    assert whole["over_dense"] == pytest.approx(
        whole["error"] - next(row["error"] for row in found["summary"] if row["label"] == "rrn8")
    )
    assert whole["over_small_images"] == pytest.approx(whole["error"] - small["error"])
    run = next(r for r in found["runs"] if r["label"] == "rsbn8 1/4" and r["seed"] == 1)
    assert run["recipe"]["lr"] == pytest.approx(0.1 * 8 / 64)


def test_the_script_stops_in_time_with_what_is_finished(table):
    module, go = table
    began = module.BEGAN
    found = go(
        "--depths", "8,14", "--seeds", "0,1", "--epochs", "2", "--jobs", "2", "--alone", "0",
        "--budget", str(module.time.perf_counter() - began + 4.5),
    )  # fmt: skip
    assert found["failures"] == []
    finished, rest = len(found["runs"]), len(found["unfinished"]) + len(found["not_started"])
    assert finished + rest == len(module.jobs_of([8, 14], [0, 1], 16, ""))
    assert all(math.isfinite(run["test_error"]) for run in found["runs"])


def test_a_run_that_fails_leaves_the_others(table, monkeypatch):
    module, go = table
    original = module.fit

    def failing(model, *arguments, **options):
        if options["seed"] == 1:
            raise RuntimeError("an illegal memory access")
        return original(model, *arguments, **options)

    monkeypatch.setattr(module, "fit", failing)
    found = go(
        "--depths", "8", "--only", "rrn8", "--seeds", "0,1,2", "--epochs", "1", "--jobs", "1", "--alone", "0"
    )
    assert [run["seed"] for run in found["runs"] if run["label"] == "rrn8"] == [0, 2]
    assert "illegal memory access" in found["failures"][0]["error"]


@pytest.fixture
def chart(table, monkeypatch):
    """A table of no images, a clock that is set by hand, and a function that starts the next run."""
    module, _ = table
    given = module.argparse.Namespace(
        epochs=60, least=20, depths=[20, 110], budget=0, device="cpu", seeds=[0], jobs=1
    )
    clock = [1000.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    made = module.Table(given, pictures(channels=3, size=8), [])
    made.deadline = math.inf

    def start(depth=20, epochs=60):
        job = module.Job(depth, f"rrn{depth}", (), 8, len(made.watches), True, 100 * depth / 20)
        made.left = [job]
        return made._chosen()

    return made, clock, start


def test_a_run_starts_only_if_it_can_end_in_time_beside_the_others(chart):
    made, clock, start = chart
    assert start().epochs == 60
    # a run is 6000 images, three of them fit into 90% of what is left
    made.active.clear()
    made.deadline, made.alone_rate, made.rate = clock[0] + 3 + 100, 100.0, 210.0
    assert [watch is not None for watch in (start(), start(), start(), start())] == [True, True, True, False]
    # one alone would not be fast enough
    made.active.clear()
    made.alone_rate = 60.0
    assert start() is None
    made.deadline = clock[0] + 2
    assert start() is None
    # what finds no time is named at the end
    assert made.next() is None
    assert [job.seed for job in made.skipped] == [len(made.watches)]
    assert made.left == []


def test_nothing_overtakes_more_important_runs_before_it_is_known_how_fast_all_are(chart):
    made, clock, _ = chart
    module = sys.modules["table1_gpu"]
    made.deadline, made.alone_rate, made.rate = clock[0] + 103, 1000.0, 60.0
    large, small = (
        module.Job(20, "rrn20", (), 8, seed, True, work) for seed, work in ((0, 100.0), (1, 10.0))
    )
    made.left = [large, small]
    assert made._chosen() is None
    made.seen = True
    assert made._chosen().job == small
    assert made.left == [large]


def test_deeper_networks_get_the_epochs_that_there_is_time_for(chart):
    made, clock, start = chart
    assert start(110).epochs == 60
    made.active.clear()
    made.deep.clear()
    made.deadline, made.alone_rate, made.rate = clock[0] + 3 + 200, 1000.0, 300.0
    # 54,000 images for two networks of 550 an epoch
    first, second = start(110), start(110)
    assert first.epochs == second.epochs == 49
    assert start(110) is None
    made.active.clear()
    made.deep.clear()
    made.deadline = clock[0] + 3 + 70
    assert start(110) is None, "fewer than 20 epochs"


def test_the_least_important_runs_are_given_up_if_not_all_can_end(chart):
    made, clock, start = chart
    made.started, made.rate = clock[0], 1000.0
    watches = [start(), start(), start()]
    made.deadline = clock[0] + 70
    history = []

    def epoch():
        clock[0] += 1
        history.append({})
        return [watch.reason(history) for watch in watches]

    while clock[0] < made.started + 46:
        assert epoch() == [None, None, None]
    # 300 images a second are seen: 14 epochs of three runs need 14 of the 24 seconds that are left
    assert made.rate == 300
    assert epoch() == [None, None, None]
    made.deadline = clock[0] + 10
    assert epoch() == [None, None, "given up for more important runs"]
    made.deadline = clock[0] + 6
    assert epoch() == [None, "given up for more important runs", "given up for more important runs"]
    made.deadline = clock[0] + 1.5
    assert epoch()[0] == "the time is up"


# ---- on a GPU


def on_gpu(folder, recipe=TINY, data=DATA, name="rsbn8", **options):
    model = network(name).cuda()
    result = fit(model, data, recipe, folder, **options)
    return result, model


@needs_gpu
@pytest.mark.parametrize("augment", ["none", "cifar"])
def test_the_same_images_in_the_same_order_on_a_gpu(augment):
    data = some_images(40, 9, 8, 3)
    device = torch.device("cuda")
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    held = Resident(data.train, data, device)
    taken = held.drawn(8, generator=generators[0], augment=augment).to(device)
    wanted = batches(data.train, data, 8, generator=generators[1], augment=augment)
    for (ours, labels), (images, numbers) in zip(held.batches(taken), wanted, strict=True):
        assert torch.equal(ours.cpu(), images)
        assert torch.equal(labels.cpu(), numbers)


@needs_gpu
@pytest.mark.parametrize("name", ["rrn8", "rsbn8"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_trains_as_the_cpu_does(tmp_path, name, precision):
    data = pictures(count=60)
    recipe = replace(TINY, epochs=4, precision=precision)
    on_cpu, _ = run(tmp_path / "cpu", model=network(name), data=data, recipe=recipe)
    result, model = on_gpu(tmp_path / "gpu", recipe, data, name)
    assert result["gpu"] == torch.cuda.get_device_name()
    assert result["graph"] == {"used": True, "why_not": None}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert [entry["lr"] for entry in result["history"]] == [entry["lr"] for entry in on_cpu["history"]]
    # rounding (tf32, bfloat16) leads small batches apart with time
    ours, theirs = ([entry["train_loss"] for entry in r["history"]] for r in (result, on_cpu))
    assert ours[0] == pytest.approx(theirs[0], rel=0.05)
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.3, abs=0.1)
    assert read_checkpoint(tmp_path / "gpu" / "checkpoint.pt")["model"]["stem.weight"].device.type == "cpu"
    assert qx.load(tmp_path / "gpu" / "model").stem.weight.device.type == "cpu"


@needs_gpu
@pytest.mark.parametrize("name", ["rrn8", "rsbn8"])
def test_replayed_steps_are_those_that_python_makes(tmp_path, monkeypatch, name):
    recorded, model = on_gpu(tmp_path / "graph", name=name)
    monkeypatch.setattr(train, "why_not", lambda model: "for comparison")
    plain, other = on_gpu(tmp_path / "plain", name=name)
    assert recorded["graph"]["used"]
    assert plain["graph"] == {"used": False, "why_not": "for comparison"}
    for ours, theirs in zip(recorded["history"], plain["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=2e-2)
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@needs_gpu
def test_runs_share_a_gpu(tmp_path):
    data, recipe = pictures(count=100), replace(TINY, epochs=6, precision="bfloat16")
    jobs = [("rrn8", 0), ("rsbn8", 0), ("rsbn8", 1), ("rrn14", 2)]
    models = {place: [network(name, seed).cuda() for name, seed in jobs] for place in ("alone", "together")}

    def trained(place, i):
        name, seed = jobs[i]
        return fit(models[place][i], data, recipe, tmp_path / place / f"{name}-{seed}", seed=seed)

    alone = [trained("alone", i) for i in range(len(jobs))]
    together = at_once([partial(trained, "together", i) for i in range(len(jobs))])
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["graph"]["used"]
        losses = [[entry["train_loss"] for entry in r["history"]] for r in (ours, theirs)]
        assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)
        assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.3, abs=0.1)


@needs_gpu
def test_dropout_draws_anew_at_each_replay(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))
    net.quincunx_spec = {"kind": "factory", "factory": "test:make"}
    result = fit(net.cuda(), DATA, replace(TINY, momentum=0.0), tmp_path)
    assert result["graph"]["used"]
    assert len({entry["train_loss"] for entry in result["history"]}) == 3


@needs_gpu
def test_a_run_on_a_gpu_is_resumed(tmp_path):
    recipe = replace(TINY, epochs=2)
    with pytest.raises(Interrupted):
        on_gpu(tmp_path / "run", replace(recipe), stop=_Stopping())
    result, _ = on_gpu(tmp_path / "run", recipe, resume=True)
    assert [entry["epoch"] for entry in result["history"]] == [1, 2]


class _Stopping(train.StopRule):
    """Interrupts a run after its first epoch."""

    def reason(self, history):
        if history:
            raise KeyboardInterrupt
        return None
