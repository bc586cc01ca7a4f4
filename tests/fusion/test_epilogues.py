"""Activations in a step's epilogue: as torch has them, in every instruction set's tiles and in networks."""

from functools import partial
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.fusion import program, steps
from quincunx.fusion.epilogues import Activation, apply
from quincunx.fusion.fuse import fuse
from quincunx.fusion.nodes import slope_of
from quincunx.fusion.program import Program
from quincunx.fusion.steps import Shortcut, Step
from quincunx.layers.sampled import PerforatedConv2d
from quincunx.ops import backend
from quincunx.ops.geometry import Geometry

needs_kernels = pytest.mark.skipif(backend().name != "native", reason="the kernels' epilogues")
KINDS = list(Activation)
ULP = 2.0**-23


def in_double(kind, x, slope):
    """The formulas in float64."""
    slope = None if slope is None else slope.double()
    if kind == Activation.GELU:
        return 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    return apply(kind, x.double(), slope)


def one_by_one(kind, x, slope=None):
    """The kernels' activation of each value by itself: one input channel for each output channel."""
    channels = x.shape[1]
    step = Step("dense", "x", torch.ones(channels, 1, 1, 1, dtype=x.dtype), None, Geometry((1, 1)), channels)
    step = Step(**{**vars(step), "activation": kind, "slope": slope, "out": "y"})
    with torch.no_grad():
        return Program([step], ["x"], ["y"], native_only=True)(x)[0]


def slope_for(kind, channels):
    return torch.linspace(-0.5, 1.5, channels) if kind == Activation.LEAKY else None


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 1e19, -1e19]


@needs_kernels
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_every_size_of_value(kind):
    """Within 4 units in the last place of the formula in float64; of GELU, whose formula cancels, to 2.5e-7
    of the argument (torch's own, with vectors: 2.8e-7)."""
    exponents = torch.logspace(-30, 30, 4001)
    lines = torch.linspace(-120, 120, 48001), torch.linspace(-6, 6, 20001)
    values = torch.cat([*lines, exponents, -exponents])
    x = values[: values.numel() // 7 * 7].view(1, 7, -1, 1)
    slope = slope_for(kind, 7)
    found, wanted = one_by_one(kind, x, slope).double(), in_double(kind, x, slope)
    finite = wanted.isfinite() & (wanted.abs() < 3.4e38)
    allowed = 4 * ULP * wanted.abs() + 1e-37
    if kind in (Activation.GELU, Activation.GELU_TANH):
        allowed = torch.maximum(allowed, 2.5e-7 * x.double().abs())
    # below e^-87 an exponential has no bits left, and neither has torch's
    if kind in (Activation.SIGMOID, Activation.SILU):
        allowed = torch.where(x < -87, allowed + 1e-35, allowed)
    off = (found - wanted).abs()
    worst = (off - allowed)[finite].max()
    assert worst <= 0, f"{float(x[finite][(off - allowed)[finite].argmax()])}"


@needs_kernels
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("channels", [1, 16, 33])
def test_nan_and_infinities_come_out_as_torch_has_them(kind, channels):
    x = torch.tensor(SPECIAL).view(1, 1, -1, 1).repeat(1, channels, 1, 1)
    slope = slope_for(kind, channels)
    found, wanted = one_by_one(kind, x, slope), apply(kind, x, slope)
    if kind == Activation.GELU:
        # in vectors torch makes a NaN of infinity, one by one it does not
        wanted = torch.stack([F.gelu(v[None])[0] for v in x[0, 0].flatten()]).view(1, 1, -1, 1).expand_as(x)
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-6, atol=1e-37)


@needs_kernels
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    kind=st.sampled_from(KINDS),
    kinds=st.sampled_from(["dense", "filled", "sampled"]),
    inputs=st.sampled_from([1, 3, 8, 40, 401]),
    outputs=st.sampled_from([1, 5, 16, 32, 33, 64, 65, 100]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(0, 3),
    kernel=st.sampled_from([1, 3]),
    bias=st.booleans(),
    shortcut=st.sampled_from(["none", "all", "padded"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_kernels_do_what_the_reference_says(
    kind, kinds, inputs, outputs, size, batch, kernel, bias, shortcut, dtype, seed
):
    torch.manual_seed(seed)
    padded = outputs // 2 if shortcut == "padded" else 0
    if kinds != "dense" or min(size) < 2:
        shortcut, kinds = "none", kinds if min(size) > 1 else "dense"
    weight = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
    step = Step(
        kinds,
        "x",
        (2 * weight).to(dtype),
        torch.randn(outputs) if bias else None,
        Geometry((kernel, kernel), padding=(kernel // 2,) * 4),
        1,
        "" if kinds == "dense" else qx.CHESSBOARD.spec,
        shortcut=None if shortcut == "none" else Shortcut("z", padded=padded),
        activation=kind,
        slope=slope_for(kind, outputs),
        out="y",
    )
    x = torch.randn(batch, inputs, *size).to(dtype)
    others = [] if shortcut == "none" else [torch.randn(batch, outputs - padded, *size).to(dtype)]
    names = ["x", "z"][: 1 + len(others)]
    made = Program([step], names, ["y"], native_only=True)
    with torch.no_grad():
        (found,) = made(x, *others)
        (wanted,) = reference(made, x, *others)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(found, wanted, **close)


def reference(made, *arguments):
    """The step in torch's operators."""
    values = dict(zip(made.inputs, arguments, strict=True))
    for step in made.steps:
        steps.reference(step, values, {})
    return [values[name] for name in made.outputs]


# ---------------------------------------------------------------- in networks


class Net(nn.Module):
    def __init__(self, act, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 6, 3, padding=1)
        self.norm, self.act, self.last = nn.BatchNorm2d(6), act, nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.last(self.act(self.norm(self.conv(x))))


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


MODULES = {
    "leaky": lambda: nn.LeakyReLU(0.2),
    "leaky in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "prelu": lambda: nn.PReLU(init=0.3),
    "prelu of channels": lambda: seeded_prelu(6),
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "sigmoid": nn.Sigmoid,
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
}
FUNCTIONS = {
    "leaky": F.leaky_relu,
    "leaky by position": lambda x: F.leaky_relu(x, 0.3),
    "leaky by name": lambda x: F.leaky_relu(input=x, negative_slope=-0.2),
    "leaky in place": lambda x: F.leaky_relu(x, 0.3, True),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "sigmoid": torch.sigmoid,
    "sigmoid's method": lambda x: x.sigmoid(),
    "sigmoid in place": torch.sigmoid_,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
}
CASES = {f"module {n}": m for n, m in MODULES.items()}
CASES |= {f"function {n}": partial(Called, f) for n, f in FUNCTIONS.items()}


def seeded_prelu(channels):
    made = nn.PReLU(channels)
    nn.init.normal_(made.weight)
    return made


def calls(fused):
    return [str(n.target) for n in fused.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_activations_ride_on_convolutions(name, by_torch, monkeypatch):
    monkeypatch.setattr(program, "speed_ratio", lambda *_, **__: 2.0)
    monkeypatch.setattr(program, "_prefers_torch", lambda *_: by_torch)
    model = Net(CASES[name]()).eval()
    nn.init.normal_(model.norm.bias)
    fused, x = fuse(model), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls(fused) == ["program0"]
    assert len(fused.program0.steps) == 2


def test_on_compact_maps():
    for make in CASES.values():
        conv = PerforatedConv2d(3, 6, 3, sampling=qx.Uniform(0.4), padding=1)
        model = Net(make(), conv).eval()
        fused, x = fuse(model), torch.randn(2, 3, 9, 9)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
        assert len(fused.program0.steps) == 2


def hooked(act):
    act.register_forward_hook(lambda _, __, out: out * 2)
    return act


class Squared(nn.SiLU):
    def forward(self, x):
        return super().forward(x) ** 2


OTHERS = {
    "hooked": lambda: hooked(nn.SiLU()),
    "of a subclass": Squared,
    "into another tensor": lambda: Called(lambda x: torch.sigmoid(x, out=torch.empty(0))),
    "another kind": nn.ELU,
    "clipped elsewhere": lambda: nn.Hardtanh(-1, 6),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay_in_torch(name):
    model = Net(OTHERS[name]()).eval()
    x = torch.randn(2, 3, 9, 9)
    try:
        fused = fuse(model)
    except TypeError as error:
        assert str(error).startswith("model: ")  # noqa: PT017
        return
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls(fused)[0] == "program0"
    assert len(fused.program0.steps) == 1


def test_a_name_is_no_activation():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x, sigmoid):
            return self.conv(x) + sigmoid

    model, x = Named().eval(), torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(fuse(model)(x, x), model(x, x), rtol=1e-4, atol=1e-5)


def test_a_prelu_that_does_not_fit_is_left_to_torch():
    model = Net(nn.PReLU(4)).eval()
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 5, 5))
    with pytest.raises(RuntimeError):
        fuse(model)(torch.randn(1, 3, 5, 5))
    graph = torch.fx.symbolic_trace(model).graph
    (node,) = (n for n in graph.nodes if n.target == "act")
    assert slope_of(model, node, torch.zeros(6), 6) is None


class Squeezed(nn.Module):
    """A block of EfficientNet: depthwise, squeeze-and-excitation, pointwise."""

    def __init__(self):
        super().__init__()
        self.wide, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.one, self.two = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        y = F.silu(self.depth(F.silu(self.wide(x))))
        gate = torch.sigmoid(self.two(F.silu(self.one(y.mean((2, 3), keepdim=True)))))
        return x + self.last(y * gate)


def test_squeeze_and_excitation_is_three_programs():
    """Wide and depthwise; both layers of the gate; pointwise. The mean and the product are torch's."""
    model = Squeezed().eval()
    fused, x = fuse(model), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls(fused) == ["program0", "program1", "program2"]
    assert [len(m.steps) for m in fused.modules() if isinstance(m, Program)] == [2, 2, 1]
    others = [n for n in fused.graph.nodes if n.op in ("call_function", "call_method")]
    names = [getattr(n.target, "__name__", n.target) for n in others]
    assert sorted(set(names) - {"getitem", "match_layout"}) == ["mean", "mul"]


def test_the_numbers_are_those_of_the_kernels():
    text = (Path(__file__).parents[2] / "csrc" / "kernel_api.h").read_text(encoding="utf-8")
    inside = text.split("enum Activation : int32_t {")[1].split("}")[0]
    names = [name.strip().removeprefix("k").upper() for name in inside.split(",")][:-1]
    assert names == [kind.name.replace("_", "") for kind in Activation]


def test_a_shape_key_knows_the_activation():
    """Times of steps that differ in the activation alone are not mistaken for each other."""
    keys = set()
    for kind in KINDS:
        step = Step("dense", "x", torch.zeros(1, 1, 1, 1), None, Geometry((1, 1)), 1, activation=kind)
        keys.add(str(program.shape_key(step, {"x": program.Map(1, (2, 2))}, 1)))
    assert len(keys) == len(KINDS)
