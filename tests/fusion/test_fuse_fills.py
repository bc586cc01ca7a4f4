"""Fused networks whose skipped positions are filled with zeros or fitted combinations give their answers."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quincunx as qx
from helpers.programs import examples
from quincunx.fusion.program import StepCode
from quincunx.fusion.steps import Step
from quincunx.ops import backend
from quincunx.sampling import CHESSBOARD, QUARTER, Positions, Uniform

MASK = Positions(torch.tensor([[(3 * r + 5 * c) % 7 < 3 for c in range(8)] for r in range(8)]))


def perforated(sampling, fill, channels=8, inside=8, **more):
    size = (8, 8) if fill == "fitted" and isinstance(sampling, Uniform) else None
    layer = qx.PerforatedConv2d(
        inside, channels, 3, sampling=sampling, padding=1, fill=fill, fill_size=size, **more
    )
    if layer.filling is not None:
        with torch.no_grad():
            for parameter in layer.filling.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def norm(channels=8):
    layer = nn.BatchNorm2d(channels)
    for tensor in (layer.weight.data, layer.running_var):
        tensor.uniform_(0.5, 2)
    for tensor in (layer.bias.data, layer.running_mean):
        tensor.normal_()
    return layer


class Block(nn.Module):
    """Norm, activation, a shortcut, and a pre-activation behind: all that a step takes along."""

    def __init__(self, sampling, fill, stride=1):
        super().__init__()
        self.first, self.norm1 = perforated(sampling, fill, bias=False), norm()
        self.second, self.norm2 = perforated(sampling, fill), norm()
        self.norm3, self.last = norm(), perforated(CHESSBOARD, "nearest")

    def forward(self, x):
        y = torch.relu(self.norm1(self.first(x)))
        y = torch.nn.functional.relu6(self.norm2(self.second(y)) + x)
        return y + self.last(torch.relu(self.norm3(y)))


@pytest.mark.parametrize("fill", ["zero", "fitted"])
@pytest.mark.parametrize("sampling", [CHESSBOARD, QUARTER, MASK, Uniform(0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks(sampling, fill, dtype):
    torch.manual_seed(0)
    network = nn.Sequential(Block(sampling, fill), nn.Conv2d(8, 8, 1), Block(sampling, fill)).eval()
    x = torch.randn(3, 8, 8, 8)
    with torch.no_grad():
        want = network(x)
        network, x = network.to(dtype), x.to(dtype)
        got = qx.fuse(network, check=x)(x)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm1 = perforated(CHESSBOARD, "fitted", bias=False), norm()
        self.second, self.norm2 = perforated(CHESSBOARD, "fitted", bias=False), norm()

    def forward(self, x):
        y = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(y)) + x)


def test_one_step_takes_norm_activation_and_shortcut_along():
    fused = qx.fuse(nn.Sequential(Residual(), nn.Conv2d(8, 4, 1)).eval(), check=torch.randn(2, 8, 8, 8))
    steps = fused.program0.steps
    assert [step.kind for step in steps] == ["fitted", "fitted", "dense"]
    assert [step.activation for step in steps] == [1, 1, 0]
    assert steps[1].shortcut is not None


@pytest.mark.skipif(backend().name != "native", reason="the native back end was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fitted", "widened", "silu"])
def test_a_network_with_fitted_fills_is_one_native_call(name, dtype):
    """Also shortcuts of every second position and of fewer channels, other activations, second outputs."""
    model, (x,) = examples()[name]
    with torch.no_grad():
        want = model(x)
        fused = qx.fuse(model, dtype, force=True)
        program = fused.program0
        program.native_only = True
        got = fused(x)
        stages = program._stages_for([x.to(dtype)])
    assert any(step.filling is not None for step in program.steps)
    assert all(isinstance(step, Step) for step in program.steps)
    [stage] = stages
    last = StepCode(*stage.run.__self__.code[-len(StepCode._fields) :])
    assert last.work == 0  # ends with a convolution
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.skipif(backend().name != "native", reason="the native back end was not built")
def test_multiply_adds_of_fills_are_counted_in_the_call():
    model, (x,) = examples()["widened"]
    fused = qx.fuse(model)
    fused.program0.native_only = True
    counts = []
    for network in (model, fused):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_a_compact_map_is_read_through_its_fill():
    torch.manual_seed(1)
    network = nn.Sequential(
        perforated(CHESSBOARD, "nearest"), nn.ReLU(), perforated(CHESSBOARD, "fitted"), nn.ReLU()
    ).eval()
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(qx.fuse(network)(x), network(x), rtol=1e-5, atol=1e-5)


def test_espace_with_fitted_fills():
    torch.manual_seed(2)
    layer = qx.EspaceConv2d(8, 8, 3, rank=4, masks=(CHESSBOARD, MASK), padding=1, fill="fitted")
    network = nn.Sequential(layer, norm(), nn.ReLU()).eval()
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(qx.fuse(network)(x), network(x), rtol=1e-5, atol=1e-5)


def test_a_tap_that_a_class_has_not_counts_nothing():
    layer = qx.PerforatedConv2d(8, 8, 3, sampling=QUARTER, padding=1, fill="fitted", fill_reach=1)
    with torch.no_grad():
        layer.filling.weight.normal_()
    network = nn.Sequential(layer, norm()).eval()
    x = torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(qx.fuse(network)(x), network(x), rtol=1e-5, atol=1e-5)
