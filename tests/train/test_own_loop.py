"""An accelerated network is an ordinary module: everything that a training loop of torch's does, it allows.

Kernels pack a weight once and again when it changes, so each way of changing weights is compared with the
reference operators, which pack nothing.
"""

import copy
import io
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import quincunx as qx
from helpers import ROOT
from helpers.networks import METHODS, accelerated, batch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=METHODS)
def made(request):
    return accelerated(request.param)


@pytest.fixture
def net(made):
    return copy.deepcopy(made).train()


def sgd(net, **settings):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, **settings)


def gradients(net, images, labels, call=None):
    net.zero_grad()
    F.cross_entropy((call or net)(images), labels).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_near(ours, theirs, tolerance=1e-4):
    assert ours
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(
            ours[name].double(), theirs[name].double(), rtol=tolerance, atol=tolerance, msg=name
        )


def train(net, optimizer, steps=3, after=lambda step: None):
    """The ordinary loop; the weights after it."""
    for step in range(steps):
        images, labels = batch(seed=step)
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        after(step)
    return {name: p.detach().clone() for name, p in net.named_parameters()}


OPTIMIZERS = {
    "sgd": sgd,
    "one at a time": lambda net: sgd(net, foreach=False),
    "fused": lambda net: sgd(net, fused=True),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01),
    "adamw fused": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, fused=True),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_changes_what_the_kernels_compute_with(net, name, monkeypatch):
    other, start = copy.deepcopy(net), {n: p.detach().clone() for n, p in net.named_parameters()}
    ours = train(net, OPTIMIZERS[name](net))
    monkeypatch.setenv("QUINCUNX_BACKEND", "reference")
    # Adam divides by the size of a gradient, which is rounding alone before a norm
    theirs = train(other, OPTIMIZERS[name](other))
    moved = [n for n in ours if not torch.equal(ours[n], start[n])]
    assert len(moved) == len(ours)
    sure = {n for n in ours if "bias" not in n} if "sgd" not in name else set(ours)
    assert_near({n: ours[n] for n in ours if n in sure}, {n: theirs[n] for n in ours if n in sure}, 2e-3)


SCHEDULES = {
    "steps": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=5, cycle_momentum=False),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ConstantLR(o, 1.0)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_set_the_rate_of_each_step(net, name):
    """Without momentum a step is the rate times the gradient, so that each step shows its rate."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = SCHEDULES[name](optimizer)
    [head] = [p for n, p in net.named_parameters() if n.endswith("4.weight")]
    rates, taken, before = [], [], head.detach().clone()

    def note(step):
        nonlocal before
        rates.append(optimizer.param_groups[0]["lr"])
        taken.append(float((before - head.detach()).norm() / head.grad.norm()))
        before = head.detach().clone()
        scheduler.step()

    train(net, optimizer, 4, note)
    assert len(set(rates)) > 1
    # small differences of weights, rounded to float32
    assert taken == pytest.approx(rates, rel=0.01)


def test_a_plateau_lowers_the_rate(net):
    optimizer = sgd(net)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    train(net, optimizer, 2, lambda _: scheduler.step(1.0))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["whole", "parts"])
def test_recomputed_activations_give_the_same_gradients(net, where, reentrant):
    images, labels = batch()
    want = gradients(net, images, labels)
    images.requires_grad_()

    def whole(x):
        return checkpoint(net, x, use_reentrant=reentrant)

    def parts(x):
        return checkpoint_sequential(net, 2, x, use_reentrant=reentrant)

    got = gradients(net, images, labels, {"whole": whole, "parts": parts}[where])
    assert list(got) == list(want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_a_batch_in_parts_adds_its_gradients(net):
    net.eval()  # batch statistics are those of a part
    images, labels = batch(6)
    want = gradients(net, images, labels)
    net.zero_grad()
    for part in (slice(0, 4), slice(4, 6)):
        (F.cross_entropy(net(images[part]), labels[part], reduction="sum") / 6).backward()
    assert_near({n: p.grad for n, p in net.named_parameters()}, want)


def test_clipped_gradients_have_the_norm_asked_for(net):
    images, labels = batch()
    want = gradients(net, images, labels)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    assert float(norm.detach()) == pytest.approx(
        float(torch.cat([g.flatten() for g in want.values()]).norm())
    )
    assert_near({n: p.grad for n, p in net.named_parameters()}, {n: g * 0.01 / norm for n, g in want.items()})


def test_a_scaled_loss_in_mixed_precision_takes_the_same_steps(net):
    other = copy.deepcopy(net)
    scaler, weights = torch.amp.GradScaler("cpu", init_scale=256.0), []
    for network, scaled in ((net, True), (other, False)):
        optimizer = sgd(network)
        for step in range(3):
            images, labels = batch(seed=step)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = network(images)
            loss = F.cross_entropy(out.float(), labels)
            if scaled:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1e6)
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
        weights.append({n: p.detach() for n, p in network.named_parameters()})
    # a power of two changes no bit
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert scaler.get_scale() == 256.0


def test_a_step_whose_gradients_are_not_finite_is_left_out(net):
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=256.0)
    before = copy.deepcopy(net.state_dict())
    scaler.scale(net(batch()[0]).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_layouts_of_images_and_weights_change_no_gradient(net):
    images, labels = batch()
    want = gradients(net, images, labels)
    last = torch.channels_last
    assert_near(gradients(net, images.to(memory_format=last), labels), want)
    net.to(memory_format=last)
    assert_near(gradients(net, images, labels), want)
    assert_near(gradients(net, images.to(memory_format=last), labels), want)
    # every other row and column of larger images: neither layout
    strided = torch.zeros(6, 3, 16, 16)
    strided[:, :, ::2, ::2] = images
    assert_near(gradients(net, strided[:, :, ::2, ::2], labels), want)


def test_frozen_weights_get_no_gradient_and_change_no_other(net):
    images, labels = batch()
    want = gradients(net, images, labels)
    frozen = list(want)[::2]
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)
    got = gradients(net, images, labels)
    assert not set(got) & set(frozen)
    assert set(got) | set(frozen) == set(want)
    assert_near(got, {name: want[name] for name in got}, 0)
    # the head alone, on features that need no gradient
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("4."))
    assert list(gradients(net, images, labels)) == ["4.weight", "4.bias"]


def test_averaged_weights_are_what_an_averaged_network_computes_with(net, monkeypatch):
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    mean = None
    optimizer = sgd(net)
    for step in range(4):
        weights = train(net, optimizer, 1)
        average.update_parameters(net)
        average(batch(seed=step)[0])  # its kernels have seen the weights before they change
        mean = weights if mean is None else {n: 0.5 * mean[n] + 0.5 * w for n, w in weights.items()}
    assert_near(dict(average.module.named_parameters()), mean, 1e-6)
    update_bn([batch(seed=9)[0]], average)
    twin = copy.deepcopy(net)
    twin.load_state_dict(average.module.state_dict())
    images = batch()[0]
    got = average.eval()(images)
    monkeypatch.setenv("QUINCUNX_BACKEND", "reference")
    torch.testing.assert_close(got, twin.eval()(images), rtol=1e-4, atol=1e-4)


def test_a_network_runs_with_weights_given_from_outside(net):
    images, labels = batch()
    want = gradients(net, images, labels)
    weights = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    net.zero_grad()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)  # they are not read

    def loss(given):
        return F.cross_entropy(torch.func.functional_call(net, given, (images,)), labels)

    found = torch.autograd.grad(loss(weights), list(weights.values()))
    assert_near(dict(zip(weights, found, strict=True)), want)
    # a step of an inner loop: weights that depend on weights
    moved = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), found, strict=True)}
    assert bool(loss(moved) < loss(weights))
    assert all(p.grad is None for p in net.parameters())


def test_training_goes_on_from_a_state_dict_to_the_bit(net):
    optimizer = sgd(net)
    train(net, optimizer, 2)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    want = train(net, optimizer, 2)
    # the same network goes back, whose weights the kernels have packed, and so does a new one
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    net.load_state_dict(kept["net"])
    optimizer.load_state_dict(kept["optimizer"])
    again = train(net, optimizer, 2)
    assert all(torch.equal(again[n], want[n]) for n in want)


def test_in_float64_gradients_are_those_of_float32_to_its_rounding(net):
    images, labels = batch()
    want = gradients(net, images, labels)
    assert_near(gradients(net.to(torch.float64), images.double(), labels), want)
    assert all(p.dtype == torch.float64 for p in net.parameters())


def test_a_copy_shares_nothing(net):
    other = copy.deepcopy(net)
    before = other.eval()(batch()[0])
    train(net, sgd(net))
    assert torch.equal(other(batch()[0]), before)


WORKER = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from helpers.networks import accelerated, batch

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
for method in sys.argv[2:]:
    net = DistributedDataParallel(accelerated(method).train())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        images, labels = batch(8, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(net(images[rank::2]), labels[rank::2]).backward()
        optimizer.step()
    torch.save({n: p.detach() for n, p in net.module.named_parameters()}, f"{sys.argv[1]}/{method}{rank}")
dist.destroy_process_group()
"""


def test_two_processes_that_share_a_batch_make_the_steps_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(script), str(tmp_path), *METHODS),
        ],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for method in METHODS:
        one = accelerated(method).train()
        optimizer = sgd(one)
        for step in range(3):
            images, labels = batch(8, seed=step)
            optimizer.zero_grad()
            # each part has its own batch statistics, as each process has
            for rank in range(2):
                (F.cross_entropy(one(images[rank::2]), labels[rank::2]) / 2).backward()
            optimizer.step()
        want = {n: p.detach() for n, p in one.named_parameters()}
        first, second = (torch.load(tmp_path / f"{method}{rank}") for rank in range(2))
        assert_near(first, want, 1e-3)
        assert all(torch.equal(first[n], second[n]) for n in first), method


@pytest.mark.parametrize("low", [False, True])
def test_networks_of_the_package_too(low):
    torch.manual_seed(0)
    net = qx.networks.build("rsbn8", 3, width=4).train()
    optimizer, losses = sgd(net), []
    images, labels = batch(12)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 12)
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            out = checkpoint(net, images, use_reentrant=False)
        loss = F.cross_entropy(out.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
