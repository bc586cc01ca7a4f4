"""A batch norm with what follows it, as a network calls it: what it shares with torch's own modules."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import quincunx as qx
from quincunx.layers import norms
from quincunx.layers.norms import normalise, normalise_apart, spread_onto
from quincunx.layers.paired import PairedDown2d, SampledMap
from quincunx.layers.sampled import SampledConvTranspose2d
from quincunx.train.processes import batch_norm_across

native = pytest.mark.skipif(qx.backend().name != "native", reason="no kernels here")
FUNCTIONS = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6}


def _map(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def _operators(run):
    """Return the names of our operators that a function calls."""

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(str(func))
            return func(*args, **(kwargs or {}))

    found = []
    with Names():
        run()
    return [name for name in found if name.startswith("quincunx.norm_act")]


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"affine": False}]
)
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("activation", list(FUNCTIONS))
@pytest.mark.parametrize("added", [False, True])
def test_it_is_torchs_norm_addition_and_activation(settings, tracked, activation, added):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(12, track_running_stats=tracked, **settings)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    other = copy.deepcopy(norm)
    for training in (True, True, False):
        norm.train(training)
        other.train(training)
        x, shortcut = _map(3, 12, 6, 4) * 2 + 1, _map(3, 12, 6, 4) if added else None
        inputs = [x.requires_grad_(), *norm.parameters(), *([shortcut.requires_grad_()] if added else [])]
        same = [t.detach().clone().requires_grad_() for t in (x, shortcut) if t is not None]
        y = normalise(x, norm, activation, shortcut)
        z = other(same[0])
        wanted = FUNCTIONS[activation](z + same[1] if added else z)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        grad = torch.randn_like(y)
        mine = torch.autograd.grad(y, inputs, grad)
        theirs = torch.autograd.grad(wanted, [same[0], *other.parameters(), *same[1:]], grad)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert norm.state_dict().keys() == other.state_dict().keys()
    for a, b in zip(norm.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@native
def test_a_training_step_calls_the_operator_and_keeps_one_map_each():
    norm, x, shortcut = nn.BatchNorm2d(16), _map(4, 16, 8, 8).requires_grad_(), _map(4, 16, 8, 8)
    assert _operators(lambda: normalise(x, norm, "relu")) == ["quincunx.norm_act.default"]
    assert _operators(lambda: normalise_apart(x, norm, "relu")) == ["quincunx.norm_act.default"]

    def kept(run):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.setdefault(t.data_ptr(), t), lambda t: t
        ):
            result = run()
        return sum(t.nbytes for t in found.values() if t.dim() == 4), result

    assert kept(lambda: normalise(x, norm, "relu"))[0] == x.nbytes
    assert kept(lambda: normalise_apart(x, norm, "relu"))[0] == x.nbytes
    assert kept(lambda: normalise(x, norm, "relu", shortcut))[0] == 2 * x.nbytes
    assert kept(lambda: normalise(x, norm, "none", shortcut))[0] == x.nbytes


def _additions(run):
    """Return how many additions of maps a function calls, and its result."""
    counted = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.add.Tensor and args[0].dim() == 4:
                counted.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        result = run()
    return len(counted), result


@native
@pytest.mark.parametrize("low", [False, True])
def test_a_shortcut_is_added_by_the_convolution_that_spreads_a_map(low):
    up = SampledConvTranspose2d(5, 12, 3, sampling=qx.CHESSBOARD, padding=1)
    dtype = torch.bfloat16 if low else torch.float32
    y, shortcut = _map(3, 5, 12, 1).to(dtype), _map(3, 12, 6, 4).to(dtype)

    def run(*more):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return spread_onto(shortcut, y, up, *more)

    count, joined = _additions(run)
    assert count == 0
    assert joined.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        wanted = up(y, (6, 4)) + shortcut
    torch.testing.assert_close(joined, wanted, rtol=1e-2, atol=2e-2 if low else 1e-5)
    # whatever sees the convolution's own result gets it
    seen = []
    hook = up.register_forward_hook(lambda _, inputs, out: seen.append(out))
    count, apart = _additions(run)
    hook.remove()
    assert count == 1
    assert torch.equal(apart, seen[0] + shortcut)
    up.eval()
    assert _additions(run)[0] == 1
    up.train()
    # a smaller map, one of another format
    assert run((6, 4)).shape == shortcut.shape
    shortcut = _map(1, 12, 6, 4).to(dtype)
    assert run((6, 4)).shape == wanted.shape
    shortcut = _map(3, 12, 6, 4).double()
    assert run().dtype == torch.float64


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_maps_and_autocast(dtype):
    norm, x = nn.BatchNorm2d(16), _map(4, 16, 32, 1).to(dtype)
    other = copy.deepcopy(norm)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = normalise(x, norm, "relu")
        wanted = F.relu(other(x))
    assert y.dtype == wanted.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norm.running_var, other.running_var, rtol=1e-4, atol=1e-5)


@native
def test_a_pairs_map_keeps_the_size_of_its_grid():
    y = PairedDown2d(3, 16, sampling=qx.CHESSBOARD)(_map(2, 3, 6, 4))
    norm = nn.BatchNorm2d(16)
    assert _operators(lambda: normalise(y, norm, "relu"))
    z = normalise(y, norm, "relu")
    assert type(z) is SampledMap
    assert z.grid_size == (6, 4)


def _hooked(norm, seen):
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().min().item()))


def _hooked_before(norm, seen):
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(-1.0))


def _hooked_back(norm, seen):
    norm.register_full_backward_hook(lambda module, inputs, outputs: seen.append(-1.0))


@pytest.mark.parametrize("hook", [_hooked, _hooked_before, _hooked_back])
def test_hooks_see_the_norms_own_result(hook):
    norm, seen = nn.BatchNorm2d(8), []
    hook(norm, seen)
    x = _map(2, 8, 4, 4).requires_grad_()
    normalise(x, norm, "relu").sum().backward()
    normalise_apart(x, norm, "relu")[0].sum().backward()
    assert len(seen) == 2
    assert min(seen) < 0  # before the ReLU


@native
def test_hooks_of_all_modules_are_called_and_counters_change_no_bit():
    norm, x, seen = nn.BatchNorm2d(8), _map(2, 8, 4, 4), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        normalise(x, norm, "relu")
    finally:
        handle.remove()
    assert seen == [1]
    wanted = normalise(x, norm, "relu")
    with FlopCounterMode(display=False):
        assert torch.equal(normalise(x, norm, "relu"), wanted)
        assert _operators(lambda: normalise(x, norm, "relu")) == ["quincunx.norm_act.default"]


def test_other_norms_and_forwards_stay_what_they_are():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    x, norm = _map(2, 8, 4, 4), Doubled(8)
    torch.testing.assert_close(normalise(x, norm), nn.BatchNorm2d(8)(x) * 2)
    plain = nn.BatchNorm2d(8)
    plain.forward = lambda x: x + 1
    assert torch.equal(normalise(x, plain), x + 1)
    synced = nn.SyncBatchNorm(8)
    assert not norms._is_plain(synced)
    network = nn.Sequential(nn.BatchNorm2d(8))
    assert norms._is_plain(network[0])
    with batch_norm_across(network):
        assert not norms._is_plain(network[0])


def test_maps_that_are_not_channels_last_keep_their_layout():
    x = torch.randn(2, 8, 4, 4)
    assert normalise(x, nn.BatchNorm2d(8), "relu").is_contiguous()
    assert not _operators(lambda: normalise(x, nn.BatchNorm2d(8), "relu"))
    assert not _operators(lambda: normalise(x.double(), nn.BatchNorm2d(8).double(), "relu"))


def test_what_torch_refuses_is_refused_and_so_are_unknown_activations():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        normalise(torch.ones(1, 4, 1, 1), nn.BatchNorm2d(4), "relu")
    with pytest.raises(ValueError, match="activation='elu'"):
        normalise(torch.ones(2, 4, 2, 2), nn.BatchNorm2d(4), "elu")
    with pytest.raises(RuntimeError):
        normalise(_map(2, 5, 2, 2), nn.BatchNorm2d(4), "relu")


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        y, x = normalise_apart(x, self.bn1, "relu")
        return normalise(y, self.bn2, "relu6", x)


def test_tracers_and_exporters_see_torchs_modules():
    graph = fx.symbolic_trace(Stem().train()).graph
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["bn1", "bn2"]
    assert F.relu in {n.target for n in graph.nodes}
    for mode in (True, False):
        program = torch.export.export(Stem().train(mode), (_map(2, 8, 4, 4),))
        assert "quincunx" not in str(program.graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own norm asks for sizes
        traced = torch.jit.trace(Stem().train(), _map(2, 8, 4, 4), check_trace=False)
    assert "quincunx::" not in str(traced.inlined_graph)


@native
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_compiled_step_is_one_graph_with_the_operator(momentum):
    torch.manual_seed(0)
    stem = Stem().train()
    stem.bn1.momentum = momentum
    other = copy.deepcopy(stem)
    torch._dynamo.reset()
    calls = []

    def counting(graph, inputs):
        calls.extend(str(n.target) for n in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(stem, fullgraph=True, backend=counting)
    for batch in (4, 4, 6):
        x = _map(batch, 8, 4, 4).requires_grad_()
        same = x.detach().clone().requires_grad_()
        found, wanted = compiled(x), other(same)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        found.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(x.grad, same.grad, rtol=1e-4, atol=1e-5)
    assert sum("norm_act" in call for call in calls) >= 2
    for a, b in zip(stem.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@native
def test_three_epochs_lose_what_torchs_modules_lose(monkeypatch):
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (64,))
    images = (torch.randn(64, 3, 16, 16) + labels.view(-1, 1, 1, 1)).contiguous(
        memory_format=torch.channels_last
    )

    def curve():
        torch.manual_seed(1)
        network = qx.networks.build("rsbn14", num_classes=4).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
        losses = []
        for _ in range(3):
            for part, wanted in zip(images.split(16), labels.split(16), strict=True):
                optimizer.zero_grad()
                loss = F.cross_entropy(network(part), wanted)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return torch.tensor(losses)

    ours = curve()
    monkeypatch.setattr(norms, "_is_plain", lambda *_: False)
    theirs = curve()
    assert not torch.equal(ours, theirs)  # the two are summed in another order
    torch.testing.assert_close(ours[:4], theirs[:4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)
    assert ours[-4:].mean() < 0.8 * ours[:4].mean()


def test_transforms_of_functions_take_the_composition():
    """They take apart what is called, and the operator cannot be."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 5, 5)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    apart = torch.func.vmap(lambda z: normalise(z, norm, "relu"))(x)
    torch.testing.assert_close(apart, torch.stack([F.relu(norm(z)) for z in x]))
    inner = x[0].to(memory_format=torch.channels_last)
    found = torch.func.grad(lambda z: normalise(z, norm, "relu", z).square().sum())(inner)
    own = inner.clone().requires_grad_()
    F.relu(norm(own) + own).square().sum().backward()
    torch.testing.assert_close(found, own.grad, rtol=1e-4, atol=1e-4)
