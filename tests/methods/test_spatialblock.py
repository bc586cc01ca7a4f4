"""ConvNeXt's block and others like it, in each form that libraries write, at sampled positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.deployment.lowering import TorchNode, lower
from quincunx.surgery.blocks import find_blocks

ALL = qx.Cosets(2, [(0, 0), (0, 1), (1, 0), (1, 1)])


class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return torch.permute(x, self.dims)


class Sequence(nn.Module):
    """As torchvision has it."""

    ends = ("block.0", "block.5")

    def __init__(self, c=8):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(c, c, 7, padding=3, groups=c),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(c, eps=1e-6),
            nn.Linear(c, 4 * c),
            nn.GELU(),
            nn.Linear(4 * c, c),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((c, 1, 1), 0.5))

    def forward(self, x):
        return self.layer_scale * self.block(x) + x


class ChannelsLast(nn.Module):
    """As timm has it with linear layers."""

    ends = ("conv_dw", "fc2")

    def __init__(self, c=8):
        super().__init__()
        self.conv_dw = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.drop, self.gamma = nn.Dropout(0.1), nn.Parameter(torch.full((c,), 0.5))

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)
        y = self.drop(self.fc2(F.gelu(self.fc1(self.norm(y)))))
        return y.permute(0, 3, 1, 2).mul(self.gamma.reshape(1, -1, 1, 1)) + x


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ChannelsFirst(nn.Module):
    """As timm has it with 1 x 1 convolutions."""

    ends = ("conv_dw", "fc2")

    def __init__(self, c=8):
        super().__init__()
        self.conv_dw = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.norm, self.fc1, self.fc2 = LayerNorm2d(c), nn.Conv2d(c, 4 * c, 1), nn.Conv2d(4 * c, c, 1)
        self.act, self.gamma = nn.GELU(), nn.Parameter(torch.full((c, 1, 1), 0.5))

    def forward(self, x):
        return self.fc2(self.act(self.fc1(self.norm(self.conv_dw(x))))) * self.gamma + x


FORMS = {"torchvision": Sequence, "channels last": ChannelsLast, "channels first": ChannelsFirst}


def network(form):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), FORMS[form]()).eval()


@pytest.mark.parametrize("form", FORMS)
def test_with_every_position_a_block_is_torchs(form):
    model, x = network(form), torch.randn(2, 3, 17, 20)
    result = qx.accelerate(model, qx.SpatialBlock(ALL), example_input=x)
    assert tuple(result.replaced) == tuple(f"1.{name}" for name in FORMS[form].ends)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(qx.fuse(result.model, check=x)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", [qx.QUARTER, qx.Cosets(3, [(0, 0), (1, 2)])], ids=str)
@pytest.mark.parametrize("fill", ["fitted", "nearest"])
@pytest.mark.parametrize("form", FORMS)
def test_computed_positions_are_the_networks_and_all_layers_multiply_less(form, fill, sampling, tmp_path):
    model, x = network(form), torch.randn(4, 3, 24, 24)
    result = qx.accelerate(model, qx.SpatialBlock(sampling, fill=fill), example_input=x)
    made, mask = result.model, sampling.mask(12, 12)
    with torch.no_grad():
        torch.testing.assert_close(made(x)[:, :, mask], model(x)[:, :, mask], rtol=1e-4, atol=1e-5)
    computed, fills = sampling.count(12, 12), sum(r["macs_after"] for r in result.replaced.values())
    fills -= computed * (8 * 49 + 8 * 32)
    assert qx.cost(made, x[:1]).macs == 12 * 12 * 8 * 27 + computed * (8 * 49 + 2 * 8 * 32) + fills
    assert (fills == 0) == (fill == "nearest")
    fused = qx.fuse(made, check=x)
    other = torch.randn(3, 3, 18, 30)
    torch.testing.assert_close(fused(other), made(other), rtol=1e-4, atol=1e-5)
    saved = qx.save(made, tmp_path / "model", factory="mine:network")
    with torch.no_grad():
        assert torch.equal(qx.load(saved, factory=lambda: network(form))(x), made(x))


@pytest.mark.parametrize("form", FORMS)
def test_the_fit_beats_the_mean_of_neighbours(form):
    model = network(form)
    # stripes: the neighbours in the row say more than those above and below
    images = [F.avg_pool2d(torch.randn(8, 3, 40, 40), (1, 31), 1, (0, 15)) * 5 for _ in range(5)]
    errors = {}
    for data in (images[:4], None):
        made = qx.accelerate(model, qx.SpatialBlock(), calibration=data, example_input=images[0]).model
        with torch.no_grad():
            errors[data is None] = float((made(images[4]) - model(images[4])).square().mean())
    assert errors[False] < 0.8 * errors[True]


@pytest.mark.filterwarnings("ignore:accelerate. the target:UserWarning")
def test_a_search_tries_blocks():
    model, images = network("torchvision"), [torch.randn(8, 3, 24, 24)]
    result = qx.accelerate(model, calibration=images, speedup=1.01, method="spatialblock")
    rows = result.search["candidates"]
    assert {tuple(row["layers"]) for row in rows} == {("1.block.0", "1.block.5")}
    assert {row["label"].split(", ")[1] for row in rows} == {"density 0.25", "density 0.5", "density 0.75"}
    assert all(row["macs_saved"] > 0 and row["loss"] > 0 for row in rows)


@pytest.mark.filterwarnings("ignore:accelerate. the target:UserWarning")
@pytest.mark.parametrize("blocks", [True, False])
def test_linear_layers_that_end_no_block_are_no_business_of_a_search(blocks):
    body = network("torchvision") if blocks else nn.Conv2d(3, 8, 3, padding=1)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.manual_seed(0)
    model = nn.Sequential(body, nn.Conv2d(8, 8, 3, padding=1), pool, nn.Linear(8, 5)).eval()
    images = [torch.randn(8, 3, 16, 16)]
    result = qx.accelerate(model, ["spatialblock", "perforate", "lowrank"], calibration=images, macs="90%")
    rows = result.search["candidates"]
    assert rows
    assert all("Linear" not in f"{model.get_submodule(name)}" for r in rows for name in r["layers"][:1])
    assert not any("3" in row["layers"] for row in rows)
    assert "3" not in result.skipped
    assert any("spatialblock" in row["label"] for row in rows) == blocks


class Blend(nn.Module):
    """What is between the ends reads neighbours, or has several readers."""

    def __init__(self, how):
        super().__init__()
        self.dw, self.pw = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)
        self.linear, self.how = nn.Linear(6, 6), how

    def forward(self, x):
        return self.how(self, self.dw(x))


NONE = {
    "pooling": lambda n, y: n.pw(F.max_pool2d(y, 3, 1, 1)),
    "two readers": lambda n, y: n.pw(y) + y,
    "a linear layer over columns": lambda n, y: n.linear(y),
    "a norm over columns": lambda n, y: n.pw(F.layer_norm(y, (6,))),
    "another permutation": lambda n, y: n.linear(y.permute(0, 1, 3, 2)),
    "softmax": lambda n, y: n.pw(F.softmax(y, 1)),
}


@pytest.mark.parametrize("case", NONE)
def test_what_is_no_block(case):
    assert find_blocks(Blend(NONE[case])) == ({}, {})


class Hidden(nn.Module):
    """torch.fx cannot trace it: it counts up to the height."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x[:, :, : len(range(x.shape[2]))])


def spoilt(model):
    """Coefficients of fills, too, are no longer what they start with."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.filterwarnings("ignore:accelerate. 1. Hidden:UserWarning")
@pytest.mark.parametrize("node", [None, TorchNode], ids=["plain", "plugin"])
@pytest.mark.parametrize("sampling", [qx.CHESSBOARD, qx.Cosets(3, [(0, 0), (1, 2)])], ids=str)
@pytest.mark.parametrize("fill", ["fitted", "nearest"])
@pytest.mark.parametrize("form", FORMS)
def test_exporters_get_operators_that_they_have(form, fill, sampling, node):
    x, seen = torch.randn(2, 3, 21, 26), network(form)
    method = qx.SpatialBlock(sampling, fill=fill)
    for model in (seen, nn.Sequential(seen[0], Hidden(seen[1]))):
        made = spoilt(qx.accelerate(model.eval(), method, example_input=x).model)
        lowered = lower(qx.fuse(made), (x,), node)
        kinds = {type(module).__name__ for module in lowered.modules()}
        assert not kinds & {"PairedFill2d", "PairedDown2d", "Program"}
        for given in (x, torch.randn(5, 3, 21, 26)):
            with torch.no_grad():
                torch.testing.assert_close(lowered(given), made(given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "suffix", "plugin"),
    [("torchvision", "onnx", False), ("channels last", "onnx", True), ("channels first", "xml", True)],
)
def test_blocks_in_files(form, suffix, plugin, tmp_path):
    x = torch.randn(1, 3, 16, 18)
    made = spoilt(qx.accelerate(network(form), qx.SpatialBlock(), example_input=x).model)
    report = qx.export(made, tmp_path / f"net.{suffix}", x, plugin=plugin, rounds=0)
    assert max(report.difference.values()) < 1e-5


def test_refusals():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match="replaced nothing"):
        skipped = qx.accelerate(model, qx.SpatialBlock(), example_input=torch.randn(1, 3, 3, 3)).skipped
    assert set(skipped) == {"0", "2"}
    assert skipped["0"].startswith("no end of a block: a depthwise convolution")
    with pytest.raises(TypeError, match=r"expected cosets such as qx\.CHESSBOARD"):
        qx.SpatialBlock(qx.Random(0.5))
    with pytest.raises(ValueError, match="fill='zero': expected 'fitted' or 'nearest'"):
        qx.SpatialBlock(fill="zero")
    small = network("torchvision")
    with pytest.warns(UserWarning, match="replaced nothing"):
        result = qx.accelerate(
            small, qx.SpatialBlock(qx.Cosets(9, [(0, 0)])), example_input=torch.randn(1, 3, 16, 16)
        )
    assert "grid 8 x 8: smaller than the sampling's period K=9" in result.skipped["1.block.0"]
