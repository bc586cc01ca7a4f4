"""Product quantisation: the fit against brute force, the method on networks, what is stored."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.methods.fitting.codebooks import _assign, _solve_words, quantise
from quincunx.methods.fitting.moments import moments
from quincunx.methods.qcnn import quantised
from quincunx.networks.artifact import load, save

# ---------------------------------------------------------------- the fit

LAYERS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "grouped, no bias": {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
    "strided": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
    "1 x 1": {"kernel_size": 1},
}
layers = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS.keys())


def conv(arguments=None, channels=(10, 36), seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(*channels, **(arguments or LAYERS["plain"])).double()


def images(count, channels=10, size=10, seed=0):
    """Maps whose positions and channels belong together, as those of real pictures do."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(channels, 4, 5, 5, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    source = torch.randn(count, 4, size + 4, size + 4, generator=generator, dtype=torch.float64)
    return F.relu(F.conv2d(source, mix) / 10 + 0.3)


def known(layer, x):
    with torch.no_grad():
        return moments(layer, [(x, layer(x))])


def error(layer, found, x):
    """The relative response error, from the responses themselves."""
    with torch.no_grad():
        want, got = layer(x), quantised(layer, found)(x)
    spread = want - want.mean((0, 2, 3), keepdim=True)
    return float((want - got).square().sum() / spread.square().sum())


@layers
def test_correction_never_raises_the_error_and_generalises(arguments):
    layer, x, held = conv(arguments), images(24), images(24, seed=7)
    plain, found = quantise(layer, 4, 12), quantise(layer, 4, 12, known(layer, x))
    assert all(b <= a * (1 + 1e-3) for a, b in itertools.pairwise(found.history))
    assert found.plain_error == found.history[0]
    # taps share codewords, so that a 1 x 1 kernel leaves least to win
    most = 0.98 if layer.kernel_size == (1, 1) else 0.9
    assert found.response_error == min(found.history) < most * found.plain_error
    assert error(layer, found, x) == pytest.approx(found.response_error, rel=1e-6)
    assert error(layer, found, held) < (most + 0.015) * error(layer, plain, held)
    assert found.weight_error > plain.weight_error  # it is the responses that count
    assert plain.response_error is None
    assert (plain.bias is None) == (layer.bias is None)


def test_few_samples_do_not_spoil_a_layer():
    layer, held = conv(), images(24, seed=7)
    found = quantise(layer, 4, 12, known(layer, images(1, size=6)))
    assert found.response_error < found.plain_error
    assert error(layer, found, held) < 0.9 * error(layer, quantise(layer, 4, 12), held)


@layers
@pytest.mark.parametrize("with_data", [False, True])
def test_a_weight_of_few_distinct_sub_vectors_is_recovered(arguments, with_data):
    """Each subspace (10 channels are 4 + 4 + 2, and 5 are 4 + 1) has words of its own."""
    layer, x = conv(arguments), images(8)
    g, depth = layer.groups, layer.in_channels // layer.groups
    with torch.no_grad():
        for group, first in itertools.product(range(g), range(0, depth, 4)):
            rows = slice(group * 36 // g, (group + 1) * 36 // g)
            part = layer.weight[rows, first : first + 4]
            words = torch.randn(5, part.shape[1], dtype=torch.float64)
            which = torch.randint(5, (part.shape[0], *part.shape[2:]))
            part.copy_(words[which].permute(0, 3, 1, 2))
    found = quantise(layer, 4, 7, known(layer, x) if with_data else None)
    torch.testing.assert_close(quantised(layer, found).decoded(), layer.weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(quantised(layer, found)(x), layer(x), rtol=0, atol=1e-9)
    assert found.weight_error < 1e-16


def test_codewords_solve_the_least_squares_problem():
    """Against all equations written out: each row of the unknown words in one system."""
    generator = torch.Generator().manual_seed(3)
    k, width, taps, outputs = 4, 3, 2, 6
    half = torch.randn(50, taps * width, generator=generator, dtype=torch.float64)
    answers = torch.randn(50, outputs, generator=generator, dtype=torch.float64)
    which = torch.randint(k, (taps, outputs), generator=generator)
    start = torch.randn(k, width, generator=generator, dtype=torch.float64)
    found = _solve_words(half.T @ half, half.T @ answers, start, which)
    system = torch.zeros(50, outputs, k, width, dtype=torch.float64)
    for t, o in itertools.product(range(taps), range(outputs)):
        system[:, o, which[t, o]] += half[:, t * width : (t + 1) * width]
    wanted = torch.linalg.lstsq(system.view(50 * outputs, -1), answers.reshape(-1, 1)).solution
    used = which.unique()
    torch.testing.assert_close(found[used], wanted.view(k, width)[used], rtol=1e-6, atol=1e-6)
    unused = [i for i in range(k) if i not in used.tolist()]
    assert torch.equal(found[unused], start[unused])


@pytest.mark.parametrize("taps", [1, 3])
def test_assignments_are_the_best_one_by_one(taps):
    generator = torch.Generator().manual_seed(4)
    k, width, outputs = 5, 2, 40
    half = torch.randn(40, taps * width, generator=generator, dtype=torch.float64) + 1
    answers = torch.randn(40, outputs, generator=generator, dtype=torch.float64)
    words = torch.randn(k, width, generator=generator, dtype=torch.float64)
    which = torch.randint(k, (taps, outputs), generator=generator)
    want = which.clone()
    for t, o in itertools.product(range(taps), range(outputs)):
        errors = []
        for candidate in range(k):
            want[t, o] = candidate
            errors.append(float((answers[:, o] - half @ words[want[:, o]].flatten()).square().sum()))
        want[t, o] = int(np.argmin(errors))
    assert torch.equal(_assign(half.T @ half, half.T @ answers, words, which), want)


def test_one_seed_one_result():
    layer = conv()
    first, second = quantise(layer, 4, 12, seed=3), quantise(layer, 4, 12, seed=3)
    assert torch.equal(first.codebooks, second.codebooks)
    assert torch.equal(first.assignments, second.assignments)
    assert not torch.equal(first.codebooks, quantise(layer, 4, 12, seed=4).codebooks)


# ---------------------------------------------------------------- the method


def network():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(10, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Conv2d(24, 32, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 40),
        nn.ReLU(),
        nn.Linear(40, 5),
    ).eval()


@pytest.mark.filterwarnings("error")
def test_a_network_is_quantised_from_the_input_up():
    net, method = network(), qx.QCNN(subspace=4, codewords=16)
    data = [images(16, seed=s).float() for s in range(4)]
    held = images(64, seed=9).float()
    corrected = qx.accelerate(net, method, calibration=data)
    plain = qx.accelerate(net, method, example_input=held[:1])
    kinds = {name: record["kind"] for name, record in corrected.replaced.items()}
    assert kinds == {"0": "QuantConv2d", "4": "QuantConv2d", "8": "QuantLinear"}
    assert "depthwise" in corrected.skipped["3"]
    assert "larger than the data, 5 sub-vectors" in corrected.skipped["10"]
    record = corrected.replaced["4"]
    assert (record["subspace"], record["codewords"]) == (4, 16)
    # 6 codebooks of 16 x 4 floats and 6 x 9 x 16 bytes, for 12 channels of each of 32 outputs
    assert record["bits"] == pytest.approx((6 * 16 * 4 * 32 + 6 * 9 * 16 * 8) / (32 * 12 * 9))
    assert record["response_error"] < record["plain_response_error"]
    assert record["macs_before"] == 100 * 32 * 12 * 9
    assert record["macs_after"] == 100 * 24 * 16 + 100 * 6 * 9 * 16
    assert plain.replaced["4"]["response_error"] is None
    with torch.no_grad():
        want = net(held)
        far = (plain.model(held) - want).square().sum()
        near = (corrected.model(held) - want).square().sum()
    assert near < 0.8 * far


def test_a_later_layer_is_corrected_on_what_the_earlier_ones_give():
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(10, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3)).eval()
    data = [images(32).float()]
    result = qx.accelerate(net, qx.QCNN(subspace=5, codewords=8), calibration=data)
    with torch.no_grad():
        want, got = net(data[0]), result.model(data[0])
    spread = want - want.mean((0, 2, 3), keepdim=True)
    measured = float((want - got).square().sum() / spread.square().sum())
    assert result.replaced["2"]["response_error"] == pytest.approx(measured, rel=1e-3)


def test_fused_it_is_the_same():
    result = qx.accelerate(network(), qx.QCNN(subspace=4, codewords=16), example_input=images(1).float())
    x = images(3).float()
    with torch.no_grad():
        torch.testing.assert_close(qx.fuse(result.model)(x), result.model(x), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_it_is_the_same_and_small(tmp_path):
    dense = qx.networks.build("rrn8", num_classes=10, width=32).eval()
    method = qx.QCNN(subspace=8, codewords=64)
    result = qx.accelerate(
        dense, method, where=lambda name, m: isinstance(m, nn.Conv2d) and m.in_channels > 3
    )
    assert len(result.replaced) >= 6
    sizes = []
    for name, model in (("dense", dense), ("quantised", result.model)):
        folder = save(model, tmp_path / name)
        sizes.append((folder / "weights.safetensors").stat().st_size)
    x = torch.randn(2, 3, 32, 32)
    again = load(tmp_path / "quantised")
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    weights = sum(dense.get_submodule(name).weight.numel() for name in result.replaced)
    bits = [r["bits"] * dense.get_submodule(n).weight.numel() for n, r in result.replaced.items()]
    assert sum(bits) / weights < 4
    # what is saved is what the records say, but for biases and the file's own head
    assert sizes[0] - sizes[1] == pytest.approx(4 * weights - sum(bits) / 8, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"subspace": 0}, "subspace=0"),
        ({"subspace": 2.0}, "subspace=2.0"),
        ({"codewords": 1}, "codewords=1"),
        ({"codewords": True}, "codewords=True"),
        ({"iterations": 0}, "iterations=0"),
        ({"positions": 0}, "positions=0"),
        ({"seed": -1}, "seed=-1"),
        ({"data": "yes"}, "data='yes'"),
        ({"linear": None}, "linear=None"),
    ],
)
def test_bad_settings(wrong, match):
    with pytest.raises(ValueError, match=match):
        qx.QCNN(**wrong)


@pytest.mark.parametrize(
    ("layer", "method", "match"),
    [
        (nn.Conv2d(3, 64, 3), qx.QCNN(4, 64), "subspace=4: expected 1 to 3"),
        (
            nn.Conv2d(8, 8, 1),
            qx.QCNN(4, 9),
            "codewords=9: the codebook is larger than the data, 8 sub-vectors",
        ),
        (nn.Conv2d(8, 8, 3, groups=8), qx.QCNN(1, 2), "depthwise"),
    ],
)
def test_a_layer_that_settings_do_not_fit_stays_and_says_why(layer, method, match):
    with pytest.warns(UserWarning, match="replaced nothing"):
        result = qx.accelerate(nn.Sequential(layer), method)
    assert match in result.skipped["0"]


def test_data_and_linear_layers_can_be_refused():
    data = [images(4).float()]
    result = qx.accelerate(network(), qx.QCNN(4, 16, data=False, linear=False), calibration=data)
    assert set(result.replaced) == {"0", "4"}
    assert result.replaced["0"]["response_error"] is None
    with pytest.raises(ValueError, match="calibration=None"):
        qx.accelerate(network(), qx.QCNN(4, 16, data=True))
