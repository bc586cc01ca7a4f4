"""Training through torch.compile: the answers, gradients and runs that Python's own steps give."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.optimizer import register_optimizer_step_pre_hook

import quincunx as qx
from helpers.commands import document, refused
from helpers.networks import METHODS, accelerated, batch
from helpers.training import TINY, assert_equal_states, log_of, network, run
from quincunx.cli.options import FineTuningOptions
from quincunx.train.checkpoint import read_checkpoint
from quincunx.train.compiled import NotCompiled, check_compiles
from quincunx.train.loop import Interrupted, RunFailed, _Run
from quincunx.train.processes import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")
COMPILED = replace(TINY, compile=True)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ---- networks


def package_network(name):
    torch.manual_seed(0)
    return qx.networks.build(name, 3, width=4)


MAKERS = {
    **{method: lambda method=method: accelerated(method) for method in METHODS},
    **{name: lambda name=name: package_network(name) for name in ("rrn8", "rsbn8", "sb-resnet18")},
}


def step(net, call, optimizer, images, labels, dtype):
    """A training step; the outputs and all gradients."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = call(images)
    F.cross_entropy(out.float(), labels).backward()
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    optimizer.step()
    return out.detach().float(), found


def check_steps(net, sizes, dtype, backend, dynamic=False, side=8):
    """Steps of both networks in turn, each from the same weights."""
    eager, other = net.train(), copy.deepcopy(net).train()
    call = torch.compile(other, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in (eager, other)]
    # bfloat16 maps: compilers keep between two operations what eager rounds
    near = 1e-4 if dtype == torch.float32 else 0.05
    for count in sizes:
        images, labels = batch(count, seed=count)
        images = F.interpolate(images, size=(side, side))
        if dynamic:
            torch._dynamo.mark_dynamic(images, 0)
        (out, found), (its, theirs) = (
            step(n, c, o, images, labels, dtype)
            for n, c, o in zip((eager, other), (eager, call), optimizers, strict=True)
        )
        torch.testing.assert_close(its, out, rtol=near, atol=near)
        # single gradients can be rounding alone, such as that of a bias before a norm
        assert float((theirs - found).norm()) <= 2 * near * float(found.norm())
        other.load_state_dict(eager.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MAKERS)
def test_one_graph_serves_every_batch_size(name, dtype):
    counter = CompileCounterWithBackend("aot_eager")
    # torch's own convolutions ask whether a batch has 16 images, so below and above are two graphs
    # the last stage of sb-resnet18 needs two rows
    side = 64 if name == "sb-resnet18" else 8
    check_steps(MAKERS[name](), (8, 5, 12), dtype, counter, dynamic=True, side=side)
    assert counter.frame_count == 1
    check_steps(MAKERS[name](), (24, 17, 31), dtype, counter, dynamic=True, side=side)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["perforate", "bottleneck"])
def test_generated_code_makes_the_same_steps(name):
    """Two methods whose layers have all operators between them: transposed, filled, fitted."""
    net = MAKERS[name]()
    check_steps(net, (8, 8, 8), torch.float32, "inductor")


def test_generated_code_makes_the_same_steps_in_mixed_precision_and_for_any_batch():
    net = MAKERS["espace"]()
    check_steps(net, (8, 5, 12), torch.bfloat16, "inductor", dynamic=True)


@pytest.mark.parametrize("kind", ["sgd", "fused", "adamw"])
def test_a_compiled_optimizer_is_noticed_by_the_kernels(kind):
    """Its step writes to weights from generated code, and packed weights must follow."""
    make = {
        "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        "fused": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True),
        "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01),
    }[kind]
    eager = MAKERS["bottleneck"]().train()
    other = copy.deepcopy(eager)
    ours, theirs = make(eager), make(other)
    compiled_step = torch.compile(theirs.step, backend="aot_eager")
    for _ in range(4):
        losses = []
        for net, optimizer, take in ((eager, ours, ours.step), (other, theirs, compiled_step)):
            images, labels = batch()
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            take()
            losses.append(float(loss.detach()))
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---- runs


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A compiled run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("compiled") / "run"
    torch.compiler.reset()
    result, model = run(folder, recipe=COMPILED)
    return folder, result, model


def test_a_compiled_run_has_the_curve_of_an_ordinary_one_and_says_what_it_is(straight, tmp_path):
    folder, result, _ = straight
    ordinary, _ = run(tmp_path / "ordinary")
    for ours, theirs in zip(result["history"], ordinary["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=2e-3)
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=2e-2)
    assert result["recipe"]["compile"] is True
    assert json.loads(read_checkpoint(folder / "checkpoint.pt")["identity"])["recipe"]["compile"] is True
    assert ordinary["recipe"]["compile"] is False


def test_a_compiled_run_goes_on_to_the_bit_and_is_no_ordinary_one(straight, tmp_path):
    folder, _, model = straight
    steps = []

    def stop(*_):
        steps.append(0)
        if len(steps) == 5:  # in the second epoch
            raise KeyboardInterrupt  # a real signal may be ignored, or end the process, where tests run

    handle = register_optimizer_step_pre_hook(stop)
    try:
        with pytest.raises(Interrupted, match="after 1 of 3 epochs"):
            run(tmp_path, recipe=COMPILED)
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="recipe: compile"):
        run(tmp_path, resume=True)
    _, again = run(tmp_path, recipe=COMPILED, resume=True)
    assert_equal_states(model.state_dict(), again.state_dict())
    assert log_of(folder) == log_of(tmp_path)


def test_maps_of_a_teacher_are_followed_through_compiled_code(tmp_path):
    """Hooks that come and go at each step, parts of a batch, and mixed precision."""
    recipe = replace(TINY, epochs=2, distill=0.5, distill_features=0.5, accumulate=2, precision="bfloat16")
    teacher = network("rrn8", seed=3)
    curves = [
        [
            entry["train_loss"]
            for entry in run(tmp_path / str(compile), recipe=changed, teacher=teacher)[0]["history"]
        ]
        for compile in (True, False)
        for changed in (replace(recipe, compile=compile),)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=0.02)


class Undecided(nn.Module):
    """Its forward asks for a value."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        y = self.head(x.flatten(1))
        return 2 * y if bool(y.sum() > 0) else y


def undecided():
    return Undecided()


def test_a_network_that_asks_for_values_is_refused_before_the_run(tmp_path):
    model = undecided()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        NotCompiled, match=r"^compile=True: the network cannot be compiled whole \(.*leave it"
    ):
        check_compiles(model, torch.zeros(2, 1, 8, 8))
    assert_equal_states(before, model.state_dict())


def test_trying_changes_no_network():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    check_compiles(model, torch.randn(2, 1, 8, 8))
    assert_equal_states(before, model.state_dict())


def test_without_a_compiler_nothing_begins(tmp_path):
    command = ("train", "--network", "rsbn8", "--width", "4", "--epochs", "1", "--out", "run", "--compile")
    # kernels that were compiled before would need no compiler
    without = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "quincunx", *command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **without},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: compile=True: no compiler works here for cpu, which needs g++ or what CXX")
    assert said.endswith("; leave it out to train without")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_compiler_that_fails_at_a_step_ends_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr("quincunx.train.loop.check_compiles", lambda *_: None)
    model = network()
    model.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(RunFailed, match=r"the compiler failed at a step .*checkpoint after epoch 0 is kept"):
        run(tmp_path, model=model, recipe=COMPILED)


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^compile=True: 2 processes exchange batch statistics"):
        run(tmp_path, recipe=COMPILED, ranks=Ranks(0, 2))
    assert not list(tmp_path.iterdir())


def test_a_compiled_network_is_not_recorded_as_a_graph(monkeypatch, tmp_path):
    monkeypatch.setattr("quincunx.train.loop._runs_apart", lambda device: True)
    monkeypatch.setattr(_Run, "_epochs", lambda self, progress: self.apart._why_not())
    assert run(tmp_path, recipe=COMPILED)[0] == "the network is compiled"


# ---- the command line


def test_the_command_trains_compiled_and_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    quick = ("--network", "rsbn8", "--width", "4", "--epochs", "1", "--batch-size", "479", "--threads", "1")
    result = document("train", *quick, "--compile", "--out", "first")
    assert result["recipe"]["compile"] is True
    assert refused("train", *quick, "--resume", "--out", "first").endswith("compile was True, now False")


def test_fine_tuning_is_compiled_where_it_is_asked_for():
    assert FineTuningOptions(finetune_epochs=1, compile=True).chosen().compile
    assert not FineTuningOptions(finetune_epochs=1).chosen().compile
    assert not FineTuningOptions(finetune_epochs=1, compile=False).chosen().compile
