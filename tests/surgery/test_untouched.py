"""Surgery says what is so: what would not run is put back, and the user's network is left as it was."""

import copy
import hashlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx

pytestmark = pytest.mark.filterwarnings("ignore:accelerate:UserWarning")
X = torch.randn(24, 3, 10, 10)
METHODS = {
    "low rank": qx.LowRank(2),
    "espace": qx.Espace(2),
    "bottleneck": qx.SpatialBottleneck(),
    "qcnn": qx.QCNN(subspace=2, codewords=8),
    "binary": qx.BinaryConnect(),
    "cp": qx.CP(3, iterations=2),
    "perforate": qx.Perforate(),
}
DATA = [(X[:12], torch.randint(4, (12,))), (X[12:], torch.randint(4, (12,)))]


class Body(nn.Module):
    """Two convolutions, a norm and a head, and a forward given as a function of (network, input)."""

    def __init__(self, forward=None):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.run = forward or (lambda n, x: n.two(F.relu(n.norm(n.one(x)))))

    def forward(self, x):
        return self.head(self.run(self, x).mean((2, 3)))


# ---------------------------------------------------------------- what would not run is put back


class Listed(Body):
    """It keeps a layer in a plain list too, and calls that."""

    def __init__(self):
        super().__init__(lambda n, x: n.two(F.relu(n.layers[0](x))))
        self.layers = [self.one]


class Twice(Body):
    """How often it calls a layer depends on the layer's class."""

    def __init__(self):
        super().__init__(lambda n, x: n.two(n.one(x) if type(n.one) is nn.Conv2d else n.one(n.one(x)[:, :3])))


class Strict(Body):
    """It calls nothing but what it knows."""

    def __init__(self):
        super().__init__(Strict.steps)

    def steps(self, x):
        if not isinstance(self.two, nn.Conv2d):
            raise LookupError("two: what is this?\nA line more")
        return self.two(F.relu(self.one(x)))


class Asks(Body):
    """It reads from a layer what no module of ours has."""

    def __init__(self):
        super().__init__(lambda n, x: n.two(F.relu(n.one(x))) * n.two.gain)
        self.two.gain = 0.5


@pytest.mark.parametrize("method", ["low rank", "espace", "qcnn"])
@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (Listed, "one", "calls what stands in its place 0 times, and the layer 1 times"),
        (Twice, "one", "calls what stands in its place 2 times, and the layer 1 times"),
        (Strict, "two", "with it replaced the network fails (LookupError: two: what is this?)"),
        (Asks, "two", "with it replaced the network fails (AttributeError: "),
    ],
)
def test_what_the_network_would_not_call_is_put_back(method, make, name, reason):
    model = make().eval()
    result = qx.accelerate(model, METHODS[method], calibration=DATA)
    other = "two" if name == "one" else "one"
    assert reason in result.skipped[name]
    assert "\n" not in result.skipped[name]
    assert set(result.replaced) - {"head"} == {other}
    assert type(result.model.get_submodule(name)) is nn.Conv2d
    assert set(result.model.quincunx_replaced) == set(result.replaced)
    assert result.model(X).shape == (24, 4)


def test_both_halves_of_a_pair_are_put_back_together():
    result = qx.accelerate(Strict().eval(), METHODS["bottleneck"], where=[("one", "two")], calibration=DATA)
    assert not result.replaced
    assert "network fails (LookupError" in result.skipped["one"] + result.skipped["two"]
    assert torch.equal(result.model.two.weight, result.model.two.weight)
    assert type(result.model.one) is type(result.model.two) is nn.Conv2d


def test_a_layer_whose_weight_is_used_in_another_way_stays():
    model = Body(lambda n, x: n.two(F.conv2d(x, n.one.weight, n.one.bias, padding=n.one.padding))).eval()
    result = qx.accelerate(model, METHODS["low rank"], calibration=DATA)
    assert result.skipped == {"one": "never called for this input"}
    # without an input it is not known, and the weight is the one that the halves amount to
    blind = qx.accelerate(model, qx.LowRank("full"))
    assert list(blind.replaced) == ["one", "two"]
    torch.testing.assert_close(blind.model(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_pair_is_not_made_over_a_hook_that_expects_the_whole_map():
    seen = []

    def between(net):
        net[1].register_forward_hook(lambda m, i, o: seen.append(o.shape))
        return net

    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    nested = nn.Sequential(nn.Sequential(copy.deepcopy(plain[0]), nn.ReLU()), copy.deepcopy(plain[2]))
    nested[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    for model in (between(plain), nested):
        result = qx.accelerate(model.eval(), qx.SpatialBottleneck(data=False), example_input=X)
        assert not any("pair" in made for made in result.replaced.values())
        seen.clear()
        result.model(X)
        assert seen == [(24, 4, 10, 10)]


# ---------------------------------------------------------------- the user's network


class Noting(Body):
    """A forward that counts, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.append(tuple(x.shape))
        self.total += 1
        return super().forward(x)


def fingerprint(model):
    """Everything that a module holds, as one text."""
    told = hashlib.sha256()
    for name, module in model.named_modules():
        for key, value in sorted(vars(module).items()):
            if key in ("_parameters", "_buffers"):
                for part, tensor in value.items():
                    if tensor is not None:
                        told.update(pickle.dumps((part, tensor.detach().numpy().tobytes(), tensor.stride())))
                        told.update(f"{id(tensor)} {tensor.requires_grad} {tensor._version}".encode())
                        grad = tensor.grad
                        told.update(b"" if grad is None else grad.numpy().tobytes())
            elif key == "_modules":
                told.update(repr({part: id(child) for part, child in value.items()}).encode())
            elif isinstance(value, dict):
                told.update(repr((name, key, [(k, id(v)) for k, v in value.items()])).encode())
            else:
                told.update(repr((name, key, value)).encode())
    return told.hexdigest()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_the_users_network_and_the_random_numbers_are_as_before(method, training):
    model = Noting().train(training)
    model.norm.eval()
    model.two.weight.requires_grad_(False)
    model.one.register_forward_hook(lambda *_: None)
    model(X).sum().backward()
    before, state = fingerprint(model), torch.get_rng_state()
    result = qx.accelerate(model, METHODS[method], calibration=DATA)
    assert result.replaced
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in result.model.children()][2:] == [False, training]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_trained_stays_so_by_parameter(method, frozen):
    model = Body().eval()
    for layer in (model.one, model.two):
        layer.get_parameter(frozen).requires_grad_(False)
    made = qx.accelerate(model, METHODS[method], calibration=DATA)
    assert {"one", "two"} <= set(made.replaced)
    for name, parameter in made.model.named_parameters():
        if name.startswith(("one", "two")):
            is_bias = name.endswith("bias")
            assert parameter.requires_grad == (is_bias != (frozen == "bias")), name


# ---------------------------------------------------------------- where tensors are made


@pytest.mark.parametrize("method", METHODS)
def test_in_inference_mode_what_is_made_can_be_trained(method):
    model = Body().eval()
    with torch.inference_mode():
        made = qx.accelerate(model, METHODS[method], calibration=DATA)
        assert torch.is_inference_mode_enabled()
    assert made.replaced
    net = made.model.train()
    net(X).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert not any(t.is_inference() for t in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize("make", [nn.LazyConv2d, nn.LazyBatchNorm2d, nn.LazyConvTranspose2d, nn.LazyLinear])
def test_lazy_layers_are_asked_to_run_first(make):
    sizes = () if make is nn.LazyBatchNorm2d else (4,) if make is nn.LazyLinear else (4, 3)
    model = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.Sequential(make(*sizes)))
    for call in (
        lambda: qx.accelerate(model, qx.LowRank(2)),
        lambda: qx.accelerate(model, qx.LowRank(2), calibration=[X]),
        lambda: qx.BinaryConnect.pack(model),
    ):
        with pytest.raises(
            TypeError, match=rf"^model: a {make.__name__} in it has no weights yet; run .*lazy"
        ):
            call()
    assert type(model[1][0]) is make
    model(X)
    assert "0" in qx.accelerate(model, qx.LowRank(2), calibration=[X]).replaced
