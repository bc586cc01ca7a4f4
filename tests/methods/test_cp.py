"""CP decompositions against kernels of known rank, and the four layers against the one they stand for."""

import importlib
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorly import tenalg
from tensorly.tenalg.core_tenalg.mttkrp import unfolding_dot_khatri_rao
from torch import nn

import quincunx as qx
from quincunx.layers.build import build_module
from quincunx.methods.cp import decompose, full_cp_rank, products

LAYERS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "strided": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
    "dilated": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": 2},
    "same": {"kernel_size": (4, 3), "padding": "same", "dilation": (2, 1)},
    "one row": {"kernel_size": (1, 5), "padding": (0, 2)},
}
layers = pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS.keys())


def kernel(shape, rank, seed=0):
    """A kernel of exactly that CP rank."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in shape]
    return torch.einsum("nr,cr,ir,jr->ncij", *factors)


def rebuilt(module, groups):
    """The kernel [O, C / g, dh, dw] that the four layers amount to."""
    rank = module.spec["rank"]
    inner = module.first.weight[:, :, 0, 0].unflatten(0, (groups, rank))
    vertical = module.spatial.vertical.weight[:, 0, :, 0].unflatten(0, (groups, rank))
    horizontal = module.spatial.horizontal.weight[:, 0, 0].unflatten(0, (groups, rank))
    outer = module.last.weight[:, :, 0, 0].unflatten(0, (groups, -1))
    return torch.einsum("gnr,grc,gri,grj->gncij", outer, inner, vertical, horizontal).flatten(0, 1)


def replaced(conv, rank, **settings):
    result = qx.accelerate(nn.Sequential(conv), qx.CP(rank=rank, **settings))
    return result.model[0], result.replaced["0"]


# ---------------------------------------------------------------- the decomposition


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (5, 7, 1, 4), (4, 4, 5, 3)])
def test_a_kernel_of_known_rank_is_rebuilt(shape):
    weight = kernel(shape, 3)
    found = decompose(weight, 3, iterations=500, tolerance=1e-14)
    again = torch.einsum("nr,cr,ir,jr->ncij", *found.factors)
    assert float((weight - again).norm() / weight.norm()) < 1e-5
    assert found.error == pytest.approx(float(((weight - again).norm() / weight.norm()) ** 2), abs=1e-12)
    assert min(found.errors) == found.error


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("mode", range(4))
def test_products_are_those_with_the_khatri_rao_product(mode, weighted):
    generator = np.random.default_rng(0)
    tensor = generator.standard_normal((5, 7, 2, 3))
    factors = [generator.standard_normal((size, 4)) for size in tensor.shape]
    weights = generator.standard_normal(4) if weighted else None
    expected = unfolding_dot_khatri_rao(tensor, (weights, factors), mode)
    np.testing.assert_allclose(products(tensor, (weights, factors), mode), expected, rtol=1e-12, atol=1e-12)


def test_tensorly_is_left_as_it_was():
    before = tenalg.current_backend().backend_name
    replaced(nn.Conv2d(4, 4, 3), 2, iterations=3)
    assert tenalg.current_backend().backend_name == before != "quincunx-chained"


def test_one_component_is_the_best_that_the_svd_gives():
    """Of rank 1 in the last two axes, the tensor is a matrix, whose best rank 1 is known."""
    matrix = torch.randn(6, 5, dtype=torch.float64)
    column, row = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = decompose(torch.einsum("nc,i,j->ncij", matrix, column, row), 1, tolerance=1e-14)
    values = torch.linalg.svdvals(matrix).square()
    assert found.error == pytest.approx(float(1 - values[0] / values.sum()), rel=1e-6)


def test_starts_are_seeded_and_the_best_is_kept():
    weight = torch.randn(8, 8, 3, 3, dtype=torch.float64)
    found, again = (decompose(weight, 4, restarts=4, iterations=30, seed=1) for _ in range(2))
    assert found.errors == again.errors
    assert len(set(found.errors)) > 1
    assert found.error == min(found.errors)
    assert all(torch.equal(a, b) for a, b in zip(found.factors, again.factors, strict=True))
    other = decompose(weight, 4, restarts=4, iterations=30, seed=2)
    assert other.errors[1:] != found.errors[1:]
    # a component's size is shared by its four vectors
    norms = torch.stack([factor.norm(dim=0) for factor in found.factors])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


def test_components_that_cancel_are_reported():
    """Of a + t b in each mode, the derivative at t = 0 is of rank 4, but is approached by rank 2."""
    a, b = ([F.normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in (6, 6, 3, 3)] for _ in range(2))
    weight = sum(
        torch.einsum("n,c,i,j->ncij", *[b[k] if k == mode else a[k] for k in range(4)]) for mode in range(4)
    )
    found = decompose(weight, 2, iterations=2000, tolerance=1e-14)
    assert found.largest > 3
    conv = nn.Conv2d(6, 6, 3)
    conv.weight.data.copy_(weight)
    _, record = replaced(conv, 2, iterations=2000, tolerance=1e-14)
    assert record["degenerate"]
    assert record["largest_component"] == pytest.approx(found.largest, rel=1e-2)
    assert not replaced(nn.Conv2d(6, 6, 3), 2)[1]["degenerate"]


def test_the_largest_component_is_measured_against_the_kernel():
    """Two components at right angles, three times and once as large."""
    weight = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    weight[0, 0, 0, 0], weight[1, 1, 1, 1] = 3, 1
    assert decompose(weight, 2, tolerance=1e-14).largest == pytest.approx(3 / 10**0.5, rel=1e-6)


def test_a_kernel_of_zeros_has_zeros():
    found = decompose(torch.zeros(3, 4, 3, 3), 2)
    assert found.error == 0
    assert all(not factor.any() for factor in found.factors)


def test_what_breaks_down_is_no_start(monkeypatch):
    calls = []

    def broken(tensor, rank, start, *_):
        calls.append(start)
        return None

    monkeypatch.setattr("quincunx.methods.cp._parafac", broken)
    assert decompose(torch.randn(3, 4, 3, 3), 2, restarts=2) is None
    assert calls == [0, 1]
    with pytest.warns(UserWarning, match="replaced nothing"):
        result = qx.accelerate(nn.Sequential(nn.Conv2d(4, 4, 3)), qx.CP(rank=2))
    assert result.skipped == {"0": "the CP decomposition of rank 2 diverged from all 3 starts"}


# ---------------------------------------------------------------- the layers


@layers
def test_four_layers_are_the_convolution_with_the_rebuilt_kernel(settings):
    conv = nn.Conv2d(8, 12, **settings).double()
    module, record = replaced(conv, 5, iterations=20)
    x = torch.randn(2, 8, 11, 10, dtype=torch.float64)
    dense = nn.Conv2d(8, 12, **settings).double()
    weight = rebuilt(module, conv.groups).detach()
    kernel_of = conv.weight.detach()
    dense.load_state_dict(conv.state_dict() | {"weight": weight})
    torch.testing.assert_close(module(x), dense(x), rtol=1e-9, atol=1e-9)
    error = float((kernel_of - weight).square().sum() / kernel_of.square().sum())
    assert record["weight_error"] == pytest.approx(error, rel=1e-6)
    assert 0 < record["weight_error"] < 1
    assert record["restart_spread"] >= 0


@layers
def test_an_exact_rank_is_exact_on_maps(settings):
    conv = nn.Conv2d(6, 8, **settings)
    with torch.no_grad():
        shape = (8 // conv.groups, *conv.weight.shape[1:])
        conv.weight.copy_(torch.cat([kernel(shape, 2, seed) for seed in range(conv.groups)]) / 10)
    module, record = replaced(conv, 2, iterations=1000, tolerance=1e-14)
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(module(x), conv(x), rtol=1e-4, atol=1e-4)
    assert record["weight_error"] < 1e-8


def test_gradients():
    module = qx.CPConv2d(3, 4, 3, rank=2, padding=1, stride=2).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(
            module, dict(zip(dict(module.named_parameters()), values[1:], strict=True)), values[0]
        ),
        (x, *module.parameters()),
    )


def test_the_response_error_is_that_of_the_responses():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    data = [torch.randn(4, 3, 9, 9) + 1 for _ in range(2)]
    result = qx.accelerate(net, qx.CP(rank=3, iterations=20), calibration=data)
    x = torch.cat(data)
    with torch.no_grad():
        want, got = net(x), result.model(x)
    spread = want - want.mean((0, 2, 3), keepdim=True)
    error = float((want - got).square().sum() / spread.square().sum())
    assert result.replaced["2"]["response_error"] == pytest.approx(error, rel=1e-3)
    assert qx.accelerate(net, qx.CP(rank=3, iterations=5)).replaced["2"]["response_error"] is None


def test_saved_loaded_and_fused(tmp_path):
    net = qx.networks.build("rrn8", width=4).eval()
    x = torch.randn(2, 3, 16, 16)
    result = qx.accelerate(net, qx.CP(rank=0.2, iterations=5, restarts=1), example_input=x)
    again = qx.load(qx.save(result.model, tmp_path / "a"))
    assert torch.equal(again(x), result.model(x))
    torch.testing.assert_close(qx.fuse(result.model)(x), result.model(x), rtol=1e-4, atol=1e-5)
    assert not result.skipped
    for record in result.replaced.values():
        assert record["kind"] == "CPConv2d"
        assert record["macs_after"] < record["macs_before"]


def test_macs_are_those_of_the_formula():
    conv = nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2), groups=2)
    result = qx.accelerate(
        nn.Sequential(conv), qx.CP(rank=3, iterations=2), example_input=torch.zeros(1, 8, 10, 10)
    )
    # H W = 100, H' W = H' W' = 50; R = 3 in each of two groups
    want = 2 * 3 * (4 * 100 + 3 * 50 + 5 * 50 + 6 * 50)
    assert result.replaced["0"]["macs_after"] == want


# ---------------------------------------------------------------- what is refused


def test_layers_that_stay_say_why():
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
    )
    skipped = qx.accelerate(net, qx.CP(rank=2, iterations=2)).skipped
    assert list(skipped) == ["1", "2"]
    assert "1 x 1" in skipped["1"]
    assert "depthwise" in skipped["2"]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"rank": 0}, ValueError, "rank=0"),
        ({"rank": -3}, ValueError, "rank=-3"),
        ({"rank": 1.5}, ValueError, "rank=1.5"),
        ({"rank": True}, TypeError, "rank=True"),
        ({"rank": "half"}, TypeError, "rank='half'"),
        ({"restarts": 0}, ValueError, "restarts=0"),
        ({"iterations": 0}, ValueError, "iterations=0"),
        ({"tolerance": 0}, ValueError, "tolerance=0"),
        ({"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_bad_settings_are_refused(settings, error, match):
    with pytest.raises(error, match=match):
        qx.CP(**settings)


def test_bad_layers_are_refused():
    with pytest.raises(ValueError, match="rank=0"):
        qx.CPConv2d(4, 4, 3, rank=0)
    with pytest.raises(ValueError, match="groups"):
        qx.CPConv2d(4, 6, 3, rank=2, groups=4)
    with pytest.raises(ValueError, match="cp: not the settings"):
        build_module({"kind": "cp", "in_channels": 4, "out_channels": 6, "kernel_size": 3, "rank": 0})


def test_ranks_of_a_share():
    assert full_cp_rank((12, 8, 3, 3)) == 72
    conv = nn.Conv2d(8, 12, 3)
    assert replaced(conv, 0.125, iterations=1)[1]["rank"] == 9
    assert replaced(nn.Conv2d(2, 2, 3), 500, iterations=1)[1]["rank"] == 12


def test_without_tensorly_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    with pytest.raises(ImportError, match=r"quincunx\[methods\]"):
        decompose(torch.randn(3, 3, 3, 3), 2)
    importlib.import_module("quincunx.methods.cp")


def test_a_relu_behind_keeps_its_place():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    result = qx.accelerate(net, qx.CP(rank=2, iterations=5))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(result.model(x), F.relu(result.model[0](x)))
