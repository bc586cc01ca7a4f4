"""Layers of one-bit weights against convolutions with weights of +1 and -1."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quincunx as qx
from quincunx.layers.binary import PackedConv2d, PackedLinear, binarised
from quincunx.layers.build import build_module
from quincunx.ops import reference
from quincunx.ops.bits import pack_signs, unpack_signs

LAYERS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 3},
    "depthwise": {"kernel_size": 3, "groups": 6, "padding": 2},
    "strided": {"kernel_size": (3, 5), "stride": (2, 3), "padding": (0, 2)},
    "dilated": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": 2},
    "same": {"kernel_size": (4, 3), "padding": "same", "dilation": (2, 1)},
    "1 x 1": {"kernel_size": 1},
}
layers = pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS.keys())
scales = pytest.mark.parametrize("scale", [False, True], ids=["", "scale"])


def filled(layer):
    """With a bias and a scale that matter."""
    with torch.no_grad():
        for value in (layer.bias, layer.scale):
            if value is not None:
                value.uniform_(0.1, 1)
    return layer


def signs(weight):
    """By numbers, not by the code under test."""
    return torch.tensor([1.0 if w >= 0 else -1.0 for w in weight.flatten().tolist()]).view(weight.shape)


def dense(layer, settings, x):
    weight = signs(layer.weight)
    if layer.scale is not None:
        weight = weight * layer.scale.view(-1, 1, 1, 1)
    settings = {k: v for k, v in settings.items() if k not in ("kernel_size", "bias")}
    return F.conv2d(x, weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype), **settings)


# ---------------------------------------------------------------- forward


@layers
@scales
def test_a_binary_convolution_is_one_with_weights_of_signs(settings, scale):
    layer = filled(qx.BinaryConv2d(6, 12, scale=scale, **settings))
    x = torch.randn(3, 6, 13, 11)
    want = dense(layer, settings, x)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-4)
    packed = layer.pack()
    for given_x in (x, x.contiguous(memory_format=torch.channels_last), x[:1], x[:0]):
        got = packed(given_x)
        torch.testing.assert_close(got, want[: len(given_x)], rtol=1e-5, atol=1e-4)
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert set(dict(packed.named_buffers())) <= {"bits", "scale", "bias"}
    assert not list(packed.parameters())


@given(
    channels=st.sampled_from([1, 3, 4, 31, 32, 33, 70]),
    outputs=st.sampled_from([1, 7, 16, 17, 65]),
    groups=st.sampled_from([1, 2]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    batch=st.sampled_from([1, 2, 5]),
    size=st.tuples(st.integers(10, 30), st.integers(10, 30)),
)
def test_the_kernel_is_the_reference(
    channels, outputs, groups, kernel, stride, padding, dilation, batch, size
):
    bits = torch.randint(0, 256, (outputs * groups, -(-channels * kernel[0] * kernel[1] // 8))).byte()
    x = torch.randn(batch, channels * groups, *size)
    top, left = padding
    scale, bias = torch.rand(outputs * groups), torch.randn(outputs * groups)
    rest = (bits, scale, bias, kernel, stride, (top, 0, left, 1), dilation, groups)
    got = torch.ops.quincunx.binary_conv(x, *rest)
    want = reference.binary_conv(x.double(), *rest)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    layer = qx.BinaryConv2d(32, 64, 3, padding=1).pack()
    x = torch.randn(2, 32, 28, 28)
    want, before = layer(x), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), want)
    finally:
        torch.set_num_threads(before)


def test_wide_maps_keep_tables_of_a_few_rows_only():
    """More positions than a ring of tables has places, in tall and in wide maps."""
    layer = qx.BinaryConv2d(5, 9, 3, padding=1, dilation=2)
    for size in ((700, 3), (3, 700), (60, 60)):
        x = torch.randn(1, 5, *size)
        torch.testing.assert_close(layer.pack()(x), layer.eval()(x), rtol=1e-5, atol=1e-4)


@scales
def test_a_binary_linear_layer_is_one_with_weights_of_signs(scale):
    layer = filled(qx.BinaryLinear(37, 11, scale=scale))
    for shape in ((5, 37), (2, 3, 37), (0, 37), (37,)):
        x = torch.randn(shape)
        weight = signs(layer.weight) * (layer.scale[:, None] if scale else 1)
        want = F.linear(x, weight, layer.bias)
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(layer.pack()(x), want, rtol=1e-5, atol=1e-4)


def test_other_dtypes_are_served_by_the_reference():
    layer = filled(qx.BinaryConv2d(6, 4, 3, scale=True)).double()
    x = torch.randn(1, 6, 8, 8, dtype=torch.float64)
    assert layer.pack()(x).dtype == torch.float64
    torch.testing.assert_close(layer.pack()(x), layer(x))


def test_not_a_number_reaches_what_reads_it():
    x = torch.zeros(1, 4, 5, 5)
    x[0, 2, 0, 0] = float("nan")
    got = qx.BinaryConv2d(4, 3, 3).pack()(x)
    assert got[:, :, 0, 0].isnan().all()
    assert not got[:, :, 1:, 1:].isnan().any()


# ---------------------------------------------------------------- training


def test_signs_and_the_gradient_straight_through():
    weight = torch.tensor([0.5, -0.1, 0.0, -0.0, -1.0, 1.0, 1.5], requires_grad=True)
    made = binarised(weight)
    assert made.tolist() == [1, -1, 1, 1, -1, 1, 1]
    made.backward(torch.arange(7.0))
    assert torch.equal(weight.grad, torch.arange(7.0))


@scales
def test_a_layers_gradient_is_that_of_the_signs(scale):
    layer = filled(qx.BinaryConv2d(4, 6, 3, stride=2, padding=1, scale=scale))
    x, x2 = (torch.randn(2, 4, 7, 7).requires_grad_() for _ in range(2))
    x2.data.copy_(x)
    weight = signs(layer.weight).requires_grad_()
    y = layer(x)
    y2 = F.conv2d(x2, weight, None, 2, 1) * (layer.scale.view(-1, 1, 1) if scale else 1)
    grad = torch.randn_like(y)
    y.backward(grad)
    y2.backward(grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)))


def test_stochastic_signs_have_the_probability_of_the_hard_sigmoid():
    values = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0])
    share = (binarised(values.expand(20000, -1), stochastic=True) + 1).mean(0) / 2
    want = ((values + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(share, want, rtol=0, atol=0.015)
    assert share[:2].tolist() == [0, 0]
    assert share[-2:].tolist() == [1, 1]


def test_stochastic_signs_are_drawn_in_training_only():
    layer = qx.BinaryConv2d(4, 6, 3, stochastic=True)
    x = torch.randn(1, 4, 6, 6)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.pack()(x), rtol=1e-5, atol=1e-4)


def test_weights_are_clipped_before_they_are_used_again():
    layer = qx.BinaryLinear(3, 2)
    optimiser = torch.optim.SGD(layer.parameters(), lr=100.0)
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    assert layer.weight.abs().max() > 1
    layer.eval()(torch.ones(1, 3))
    assert layer.weight.abs().max() > 1
    layer.train()(torch.ones(1, 3))
    assert layer.weight.abs().max() == 1


def test_a_network_learns_with_signs():
    """Parity of two inputs' signs, which no single layer can tell."""
    net = nn.Sequential(
        qx.BinaryLinear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), qx.BinaryLinear(32, 2), nn.BatchNorm1d(2)
    )
    x = torch.randn(256, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    net.eval()
    assert (net(x).argmax(1) == y).float().mean() > 0.9
    packed = qx.BinaryConnect.pack(net)
    torch.testing.assert_close(packed(x), net(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- bits


@given(count=st.integers(1, 40), outputs=st.integers(1, 5), seed=st.integers(0, 1000))
def test_bits_are_the_signs(count, outputs, seed):
    weight = torch.randn(outputs, count, generator=torch.Generator().manual_seed(seed)).round(decimals=0)
    bits = pack_signs(weight)
    assert bits.shape == (outputs, (count + 7) // 8)
    assert bits.dtype == torch.uint8
    assert torch.equal(unpack_signs(bits, (count,), torch.float32), signs(weight))
    as_number = [sum(int(b) << 8 * i for i, b in enumerate(row)) for row in bits.tolist()]
    assert as_number == [sum(1 << i for i, w in enumerate(row) if w >= 0) for row in weight.tolist()]


def test_weights_without_a_sign_are_refused():
    layer = qx.BinaryConv2d(2, 2, 1)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer.pack()


# ---------------------------------------------------------------- the method


def net():
    return qx.networks.build("rrn8", width=8).eval()


@pytest.mark.parametrize("scale", ["mean", "glorot", None])
def test_replaced_layers_are_signs_of_the_layers(scale):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    result = qx.accelerate(model, qx.BinaryConnect(scale=scale), example_input=torch.zeros(1, 3, 8, 8))
    assert list(result.replaced) == ["0", "2"]
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (expected[0], expected[2]):
            taps = layer.weight[0, 0].numel()
            factor = {
                None: 1.0,
                "mean": layer.weight.abs().flatten(1).mean(1).view(-1, *[1] * (layer.weight.dim() - 1)),
                "glorot": (1.5 / taps / sum(layer.weight.shape[:2])) ** 0.5,
            }[scale]
            layer.weight.copy_(signs(layer.weight) * factor)
    torch.testing.assert_close(result.model(x), expected(x), rtol=1e-4, atol=1e-3)
    assert result.model[0].weight.abs().max() == 1
    assert result.replaced["0"]["scale"] == scale
    assert result.replaced["0"]["weight_bytes_before"] == 4 * 3 * 8 * 9
    assert result.replaced["0"]["weight_bytes_packed"] == 8 * 4


def test_both_forms_are_saved_and_loaded(tmp_path):
    model, x = net(), torch.randn(2, 3, 16, 16)
    trained = qx.accelerate(model, qx.BinaryConnect(stochastic=True)).model
    packed = qx.BinaryConnect.pack(trained)
    want = trained(x)
    for name, own in (("trained", trained), ("packed", packed)):
        again = qx.load(qx.save(own, tmp_path / name))
        assert torch.equal(again(x), own(x))
        torch.testing.assert_close(again(x), want, rtol=1e-4, atol=1e-5)
    kinds = [
        {
            spec["kind"]
            for spec in json.loads((tmp_path / f / "spec.json").read_text())["model"]["replaced"].values()
        }
        for f in ("trained", "packed")
    ]
    assert kinds == [{"binary-conv", "binary-linear"}, {"packed-conv", "packed-linear"}]
    again = qx.load(tmp_path / "trained")
    assert again.get_submodule("stem").stochastic
    # training goes on from the real weights
    torch.testing.assert_close(again.get_submodule("stem").weight, trained.get_submodule("stem").weight)


def test_a_packed_network_takes_a_bit_a_weight_on_disk(tmp_path):
    model = qx.networks.build("rrn8", width=64).eval()
    packed = qx.BinaryConnect.pack(qx.accelerate(model, qx.BinaryConnect(scale=None)).model)
    sizes = [
        (qx.save(own, tmp_path / name) / "weights.safetensors").stat().st_size
        for name, own in (("float", model), ("packed", packed))
    ]
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    rest = sum(v.numel() * v.element_size() for v in model.state_dict().values()) - 4 * weights
    header = 8000
    assert weights // 8 < sizes[1] < weights // 8 + rest + header
    assert sizes[0] / sizes[1] > 25


def test_fuse_makes_the_form_for_inference():
    trained, x = qx.accelerate(net(), qx.BinaryConnect()).model, torch.randn(2, 3, 16, 16)
    fused = qx.fuse(trained)
    torch.testing.assert_close(fused(x), trained(x), rtol=1e-4, atol=1e-4)
    assert all(value.dim() == 1 for value in fused.parameters())
    assert any(value.dtype == torch.uint8 for value in fused.state_dict().values())
    assert isinstance(trained.get_submodule("stem"), qx.BinaryConv2d)


def test_packing_keeps_hooks_modes_sharing_and_the_rest():
    shared = qx.BinaryConv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.BatchNorm2d(4), shared)
    seen = []
    shared.register_forward_hook(lambda module, *_: seen.append(type(module)))
    packed = qx.BinaryConnect.pack(model)
    assert packed[0] is packed[2]
    assert packed[0].training
    assert not qx.BinaryConnect.pack(copy.deepcopy(model).eval())[0].training
    packed(torch.randn(1, 4, 5, 5))
    assert seen == [PackedConv2d, PackedConv2d]
    assert isinstance(qx.BinaryConnect.pack(qx.BinaryLinear(3, 2)), PackedLinear)


def test_macs_count_additions():
    layer = qx.BinaryConv2d(6, 8, 3, groups=2)
    x = torch.zeros(2, 6, 9, 9)
    assert qx.cost(layer.pack(), x).macs == qx.cost(layer, x).macs == 2 * 49 * 8 * 3 * 9


def test_the_operator_is_one_of_torch():
    bits = torch.randint(0, 256, (8, 7)).byte()
    arguments = (torch.randn(2, 6, 9, 9), bits, None, torch.randn(8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    torch.library.opcheck(torch.ops.quincunx.binary_conv.default, arguments)
    compiled = torch.export.export(
        nn.Sequential(qx.BinaryConv2d(6, 8, 3).pack(), nn.ReLU()), (torch.randn(2, 6, 9, 9),)
    )
    assert "binary_conv" in str(compiled.graph)


# ---------------------------------------------------------------- what is refused


def test_packed_layers_do_not_train():
    layer = qx.BinaryConv2d(4, 4, 3).pack()
    with pytest.raises(NotImplementedError, match="BinaryConv2d"):
        layer(torch.randn(1, 4, 5, 5, requires_grad=True)).sum().backward()


def test_layers_that_stay_say_why():
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    broken = nn.Conv2d(4, 4, 3)
    broken.weight.data[0] = float("inf")
    skipped = qx.accelerate(nn.Sequential(nn.Conv2d(4, 4, 3), circular, broken), qx.BinaryConnect()).skipped
    assert list(skipped) == ["1", "2"]
    assert "circular" in skipped["1"]
    assert "finite" in skipped["2"]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: qx.BinaryConnect(scale="max"), ValueError, "scale='max'"),
        (lambda: qx.BinaryConnect(stochastic=1), TypeError, "stochastic=1"),
        (lambda: qx.BinaryConv2d(4, 6, 3, groups=4), ValueError, "groups=4"),
        (lambda: qx.BinaryConv2d(0, 6, 3), ValueError, "in_channels=0"),
        (lambda: qx.BinaryConv2d(4, 6, 0), ValueError, "kernel_size=0"),
        (lambda: qx.BinaryConv2d(4, 6, 3, stochastic="yes"), TypeError, "stochastic='yes'"),
        (lambda: qx.BinaryConv2d(4, 6, 3, scale=2.0), TypeError, "scale=2.0"),
        (lambda: qx.BinaryLinear(4, 0), ValueError, "out_features=0"),
        (lambda: qx.BinaryLinear(4.0, 2), TypeError, "in_features=4.0"),
        (lambda: build_module({"kind": "packed-conv", "in_channels": 0}), ValueError, "packed-conv"),
        (lambda: qx.BinaryConv2d(4, 6, 3).pack()(torch.randn(1, 8, 5, 5)), ValueError, r"\(1, 8, 5, 5\)"),
        (lambda: qx.BinaryConv2d(4, 6, 3).pack()(torch.randn(1, 4, 2, 5)), ValueError, "2 x 5"),
        (lambda: qx.BinaryLinear(4, 6).pack()(torch.randn(1, 5)), ValueError, "5 features"),
    ],
)
def test_bad_settings_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.skipif(qx.backend().name != "native", reason="the native back end is not built")
@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("packed", lambda p: p[:-1], "packed weight must have"),
        ("packed", lambda p: p.float(), "must be Int"),
        ("index", lambda i: i + 1, "index must lie"),
        ("index", lambda i: i - 2, "index must lie"),
        ("index", lambda i: i[:-1], "index must have"),
        ("scale", lambda s: s[:-1], "scale must have"),
        ("x", lambda x: x.double(), "float32"),
        ("x", lambda x: x[:, :3], "must divide"),
        ("x", lambda x: x[:, :, :4], "index must lie"),
    ],
)
def test_the_kernel_checks_before_it_reads(name, change, match):
    native = torch.ops.quincunx_native
    given = {
        "x": torch.randn(1, 4, 5, 5),
        "packed": native.binary_pack(torch.zeros(6, 1, dtype=torch.uint8), 2, 1, 2),
        "scale": torch.ones(6),
        "bias": None,
        "index": torch.arange(25, dtype=torch.int32),
    }
    native.binary_gemm(*given.values(), (5, 5), 6, 1, 2)
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=match):
        native.binary_gemm(*given.values(), (5, 5), 6, 1, 2)


@pytest.mark.skipif(qx.backend().name != "native", reason="the native back end is not built")
def test_bits_of_another_size_are_not_packed():
    with pytest.raises(RuntimeError, match="bytes a row"):
        torch.ops.quincunx_native.binary_pack(torch.zeros(6, 2, dtype=torch.uint8), 2, 1, 2)
