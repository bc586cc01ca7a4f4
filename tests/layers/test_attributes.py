"""What a forward may read from a layer, on the modules that stand in its place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.layers.attributes import CONV_ATTRIBUTES, LINEAR_ATTRIBUTES, kernel_of_bottleneck

METHODS = {
    "low rank": qx.LowRank(3),
    "espace": qx.Espace(2, mask="uniform"),
    "cp": qx.CP(4, iterations=2),
    "qcnn": qx.QCNN(subspace=2, codewords=8),
    "binary": qx.BinaryConnect(),
    "bottleneck": qx.SpatialBottleneck(),
}
CONVS = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "uneven": lambda: nn.Conv2d(6, 8, (3, 5), (2, 1), (1, 2), (1, 2), groups=2, bias=False),
    "a word": lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2),
    "an even kernel": lambda: nn.Conv2d(6, 8, 4, padding="same"),
    "double": lambda: nn.Conv2d(6, 8, 3, padding="valid").double(),
}
# whose weight answers as they do
EXACT = ("low rank", "cp", "qcnn")


def replaced(method, layer, x):
    result = qx.accelerate(nn.Sequential(layer), METHODS[method], calibration=[x])
    new = result.model[0]
    assert "0" in result.replaced, result.skipped
    assert not {"weight", "in_channels"} & set(new.state_dict()) - set(dict(new.named_parameters()))
    return new


def same(old, new, names):
    for name in names:
        want, got = getattr(old, name), getattr(new, name)
        if isinstance(want, torch.Tensor):
            assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device), name
        elif name != "bias":  # a fit on data may add one
            assert (got, type(got)) == (want, type(want)), name


@pytest.mark.filterwarnings("ignore:accelerate:UserWarning", "ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("form", CONVS)
@pytest.mark.parametrize("method", METHODS)
def test_a_convolutions_attributes_stay(method, form):
    if method == "bottleneck" and form not in ("plain", "a word"):
        pytest.skip("it takes none that changes the size")
    layer = CONVS[form]()
    x = torch.randn(24, 6, 12, 13, dtype=layer.weight.dtype)
    new = replaced(method, layer, x)
    same(layer, new, CONV_ATTRIBUTES)
    if method in EXACT:
        settings = (new.stride, new.padding, new.dilation, new.groups)
        torch.testing.assert_close(F.conv2d(x, new.weight, new.bias, *settings), new(x), rtol=1e-3, atol=1e-4)
    new.weight.sum().backward()


@pytest.mark.parametrize("method", ["qcnn", "binary"])
def test_a_linear_layers_attributes_stay(method):
    layer = nn.Linear(6, 10)
    x = torch.randn(32, 6)
    result = qx.accelerate(nn.Sequential(nn.Identity(), layer), METHODS[method], calibration=[x])
    new = result.model[1]
    assert type(new) is not nn.Linear, result.skipped
    same(layer, new, LINEAR_ATTRIBUTES)
    if method == "qcnn":
        torch.testing.assert_close(F.linear(x, new.weight, new.bias), new(x), rtol=1e-3, atol=1e-4)


def test_packed_layers_have_them_too():
    conv, linear = nn.Conv2d(4, 6, (3, 1), groups=2, padding="same"), nn.Linear(6, 3)
    net = nn.Sequential(conv, nn.Flatten(2), linear)
    x = torch.randn(5, 4, 3, 2)
    trained = qx.accelerate(net, qx.BinaryConnect()).model.eval()
    packed = qx.BinaryConnect.pack(trained)
    same(conv, packed[0], CONV_ATTRIBUTES)
    same(linear, packed[2], LINEAR_ATTRIBUTES)
    y = F.conv2d(x, packed[0].weight, packed[0].bias, 1, packed[0].padding, 1, 2)
    torch.testing.assert_close(y, packed[0](x), rtol=1e-4, atol=1e-5)
    z = torch.randn(5, 6)
    torch.testing.assert_close(F.linear(z, packed[2].weight, packed[2].bias), packed[2](z))


def test_the_halves_of_a_pair_have_them():
    layers = [nn.Conv2d(3, 6, 3, padding="same"), nn.ReLU(), nn.Conv2d(6, 2, (3, 5), padding=(1, 2))]
    pair = qx.accelerate(nn.Sequential(*layers), qx.SpatialBottleneck(data=False)).model
    for old, new in ((layers[0], pair[0]), (layers[2], pair[2])):
        assert type(new) is not nn.Conv2d
        same(old, new, [name for name in CONV_ATTRIBUTES if name != "weight"])


def test_a_bottlenecks_weight_is_the_mean_of_what_it_computes():
    layer = qx.SpatialBottleneck2d(2, 4, (3, 5), sampling=qx.CHESSBOARD, mid_channels=4, groups=2)
    size = (20, 20)
    middle = torch.zeros(1, 2, *size)
    with torch.no_grad():
        # the answers to one pixel, at places of each class of the sampling
        answers = torch.zeros(4, 3, 5)
        for row, column in ((9, 9), (9, 10), (10, 9), (10, 10)):
            for c in (0, 1):
                x = middle.clone()
                x[0, c, row, column] = 1
                y = layer(x)[0] - layer.bias.view(-1, 1, 1)
                window = y[2 * c : 2 * c + 2, row - 1 : row + 2, column - 2 : column + 3]
                answers[2 * c : 2 * c + 2] += window.flip(1, 2) / 4
    torch.testing.assert_close(layer.weight[:, 0].detach(), answers, rtol=1e-4, atol=1e-5)
    assert kernel_of_bottleneck(layer.down.weight, layer.up.weight, 2, 0.5).shape == (4, 1, 3, 5)
