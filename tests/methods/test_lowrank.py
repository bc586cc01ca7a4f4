"""The low-rank fit against loops, autograd and brute force, and the ranks that a budget allows."""

import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.methods.fitting.moments import Accumulator, completed, moments, of_noise
from quincunx.methods.fitting.rank_budget import RankOption, select_ranks
from quincunx.methods.fitting.separable import (
    fit_separable,
    full_rank,
    kernel_energies,
    samples_needed,
    separable,
)
from quincunx.methods.fitting.settings import rank_of

LAYERS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "strided": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
    "dilated": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": 2},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    "one row": {"kernel_size": (1, 5), "padding": (0, 2)},
}
layers = pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS.keys())


def conv(settings=None, channels=(8, 12), dtype=torch.float64):
    return nn.Conv2d(*channels, **(settings or LAYERS["plain"]), dtype=dtype)


def images(count, channels=8, size=11, seed=0):
    """Maps whose positions and channels belong together, as those of real pictures do."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(channels, 3, 5, 5, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    source = torch.randn(count, 3, size + 4, size + 4, generator=generator, dtype=torch.float64)
    return F.relu(F.conv2d(source, mix) + 1)


def responses(layer, x):
    with torch.no_grad():
        return [(x, layer(x))]


def product(found, groups):
    """The weight [O, C / g, dh, dw] that the two halves amount to."""
    vertical = found.vertical[..., 0].unflatten(0, (groups, found.rank))
    horizontal = found.horizontal[:, :, 0].unflatten(0, (groups, -1))
    return torch.einsum("gkci,gnkj->gncij", vertical, horizontal).flatten(0, 1)


def error(layer, found, x):
    """The relative response error, from the responses themselves."""
    with torch.no_grad():
        want, got = layer(x), separable(layer, found)(x)
    spread = want - want.mean((0, 2, 3), keepdim=True)
    return float((want - got).square().sum() / spread.square().sum())


# ---------------------------------------------------------------- moments


@layers
def test_moments_are_those_of_patches_found_one_by_one(settings):
    layer, x = conv(settings, (4, 6)), images(2, 4, 6)
    y = layer(x).detach()
    found = moments(layer, [(x[:1], y[:1]), (x[1:], y[1:])])
    g, (kh, kw) = layer.groups, layer.kernel_size
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (top, bottom), (left, right)))
    read, answered = [[] for _ in range(g)], [[] for _ in range(g)]
    for n, r, c in itertools.product(range(2), range(y.shape[2]), range(y.shape[3])):
        rows = [r * layer.stride[0] + i * layer.dilation[0] for i in range(kh)]
        cols = [c * layer.stride[1] + j * layer.dilation[1] for j in range(kw)]
        for group in range(g):
            channels = range(group * 4 // g, (group + 1) * 4 // g)
            read[group].append([padded[n, ch, i, j] for ch in channels for i in rows for j in cols])
            answered[group].append(y[n, group * 6 // g : (group + 1) * 6 // g, r, c].numpy())
    for group in range(g):
        p, a = np.array(read[group]), np.array(answered[group])
        p_centred, a_centred = p - p.mean(0), a - a.mean(0)
        for got, want in (
            (found.gram, p_centred.T @ p_centred / len(p)),
            (found.cross, p_centred.T @ a_centred / len(p)),
            (found.power, (a_centred**2).sum() / len(p)),
            (found.mean_patch, p.mean(0)),
            (found.mean_response, a.mean(0)),
        ):
            np.testing.assert_allclose(got[group].numpy(), want, rtol=0, atol=1e-12 * np.abs(p).max() ** 2)
    assert (found.samples, found.images) == (2 * y.shape[2] * y.shape[3], 2)


def test_moments_in_blocks_and_stripes_are_the_same(monkeypatch):
    layer, x = conv(), images(6)
    whole = moments(layer, responses(layer, x))
    monkeypatch.setattr("quincunx.methods.fitting.moments._BLOCK", 1)
    monkeypatch.setattr("quincunx.methods.fitting.moments._STRIPE", 7)
    parts = moments(layer, responses(layer, x))
    for name in ("gram", "cross", "power"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_of_large_maps_positions_are_drawn_by_the_seed():
    layer, x = conv(), images(4)
    some = moments(layer, responses(layer, x), positions=30)
    assert some.samples == 120
    again = moments(layer, responses(layer, x), positions=30)
    assert torch.equal(some.gram, again.gram)
    assert not torch.equal(some.gram, moments(layer, responses(layer, x), positions=30, seed=1).gram)
    all_of_them = moments(layer, responses(layer, x), positions=121)
    assert torch.equal(all_of_them.gram, moments(layer, responses(layer, x)).gram)


def test_no_moments_of_nothing():
    with pytest.raises(ValueError, match="no batch"):
        Accumulator(conv()).finish()


# ---------------------------------------------------------------- the fit


@layers
@pytest.mark.parametrize("with_data", [False, True])
def test_full_rank_is_the_layer_itself(settings, with_data):
    layer, x = conv(settings), images(3)
    data = moments(layer, responses(layer, x)) if with_data else None
    found = fit_separable(layer, full_rank(layer), data)
    torch.testing.assert_close(separable(layer, found)(x), layer(x), rtol=0, atol=1e-13)
    assert found.energy == pytest.approx(1, abs=1e-14)
    assert (found.bias is None) == (layer.bias is None)


@layers
def test_without_data_it_is_the_nearest_weight(settings):
    """Eckart and Young: what is left are the smaller singular values."""
    layer, rank = conv(settings), 2
    found = fit_separable(layer, rank)
    whole, left = layer.weight.detach(), 0.0
    for weight in whole.chunk(layer.groups):
        n, c, kh, kw = weight.shape
        matrix = weight.permute(1, 2, 0, 3).reshape(c * kh, n * kw)
        left += float(torch.linalg.svdvals(matrix)[rank:].square().sum())
    assert float((product(found, layer.groups) - whole).square().sum()) == pytest.approx(left, rel=1e-10)
    assert found.energy == pytest.approx(1 - left / float(whole.square().sum()), rel=1e-10)
    assert found.response_error is None
    assert torch.equal(found.bias, layer.bias) if layer.bias is not None else found.bias is None


@layers
def test_a_layer_of_low_rank_is_recovered_to_machine_precision(settings):
    """The responses are those of a layer of rank 3; the layer that is given is that one and noise."""
    layer, x, rank = conv(settings), images(16), 3
    target = separable(layer, fit_separable(layer, rank))
    with torch.no_grad():
        exact = product(fit_separable(layer, rank), layer.groups)
        layer.weight.copy_(exact + 0.05 * torch.randn_like(exact))
        y = target(x)
    found = fit_separable(layer, rank, moments(layer, [(x, y)]), iterations=300, tolerance=0)
    assert found.history[1] > 1e-8  # it did not begin there
    assert found.response_error < 1e-14
    torch.testing.assert_close(separable(layer, found)(x), y, rtol=0, atol=1e-6 * float(y.abs().max()))


@layers
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_error_falls_monotonically(settings, rank):
    layer, x = conv(settings), images(12)
    found = fit_separable(layer, rank, moments(layer, responses(layer, x)), iterations=30, tolerance=0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found.history))
    assert found.history[-1] < found.history[0]
    assert found.history[-1] == pytest.approx(error(layer, found, x), rel=1e-9)


@layers
def test_one_iteration_gives_the_best_second_half_for_the_first_of_the_start(settings):
    layer, x = conv(settings), images(12)
    start = fit_separable(layer, 2)
    found = fit_separable(layer, 2, moments(layer, responses(layer, x)), iterations=1)
    first = separable(layer, start).vertical
    second = separable(layer, found).horizontal
    with torch.no_grad():
        between, want = first(x), layer(x)
        left = 0.0
        padding = second._reversed_padding_repeated_twice
        for part, answer in zip(
            F.pad(between, padding).chunk(layer.groups, 1), want.chunk(layer.groups, 1), strict=True
        ):
            columns = [
                part[:, :, :, j * second.dilation[1] :][:, :, :, :: second.stride[1]][..., : want.shape[3]]
                for j in range(second.kernel_size[1])
            ]
            rows = torch.cat([*columns, torch.ones_like(columns[0][:, :1])], 1).transpose(0, 1).flatten(1).T
            answers = answer.transpose(0, 1).flatten(1).T
            left += float((answers - rows @ torch.linalg.lstsq(rows, answers).solution).square().sum())
        spread = float((want - want.mean((0, 2, 3), keepdim=True)).square().sum())
    assert found.response_error == pytest.approx(left / spread, rel=1e-6)


@layers
def test_the_end_is_stationary(settings):
    """At the solution neither half, nor the bias, can be moved for a smaller error."""
    layer, x = conv(settings), images(12)
    found = fit_separable(layer, 2, moments(layer, responses(layer, x)), iterations=2000, tolerance=0)
    module = separable(layer, found)
    for parameter in module.parameters():
        parameter.requires_grad_()
    loss = (module(x) - layer(x).detach()).square().mean()
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    start = separable(layer, fit_separable(layer, 2))
    first = (start(x) - layer(x).detach()).square().mean()
    at_start = torch.autograd.grad(first, list(start.parameters()))
    assert all(float(g.norm()) < 1e-4 * float(max(s.norm() for s in at_start)) for g in gradients), [
        float(g.norm()) for g in gradients
    ]


@layers
def test_data_beats_the_weights_on_images_held_out(settings):
    layer, x, unseen = conv(settings), images(64), images(32, seed=2)
    data = moments(layer, responses(layer, x))
    for rank in (1, 2, 4):
        plain, fitted = fit_separable(layer, rank), fit_separable(layer, rank, data)
        assert error(layer, fitted, unseen) < 0.9 * error(layer, plain, unseen)


def test_channels_that_never_speak_keep_their_weights():
    layer, x = conv(), images(8)
    x[:, 3:] = 0
    data = moments(layer, responses(layer, x))
    found = fit_separable(layer, 4, data)
    assert found.vertical.isfinite().all()
    # nothing in the data says more about them than the start does
    moved = (separable(layer, found)(images(2)) - layer(images(2))).abs().max()
    assert moved < 10 * layer(images(2)).abs().max()


def test_a_layer_that_always_answers_the_same():
    layer, x = conv(), images(4)
    nn.init.zeros_(layer.weight)
    found = fit_separable(layer, 2, moments(layer, responses(layer, x)))
    assert found.response_error == 0
    torch.testing.assert_close(separable(layer, found)(x), layer(x), rtol=0, atol=1e-12)


def test_one_pass_serves_all_ranks():
    layer, x = conv(), images(12)
    data = moments(layer, responses(layer, x))
    errors = [fit_separable(layer, rank, data).response_error for rank in range(1, full_rank(layer) + 1)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors[:12]))
    assert errors[-1] < 1e-20


def test_samples_of_a_full_fit():
    layer = conv(LAYERS["plain"], (8, 12))
    # 37 unknowns for each output; at low rank the 72 directions of a patch count
    assert samples_needed(layer, 12) == 8 * 37
    assert samples_needed(layer, 2) == 2 * 72
    assert samples_needed(layer, full_rank(layer)) == 0


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@layers
def test_a_fit_to_few_samples_is_better_than_the_weights_and_than_an_unregularised_one(settings, count):
    """On images that it has not seen; where nothing was refused, the layer would have stayed as it was."""
    layer, rank = conv(settings), 3
    x, unseen = images(count, size=7), images(64, size=7, seed=5)
    noisy = x + 0.3 * torch.randn_like(x)
    data = moments(layer, responses(layer, noisy))
    if data.samples >= samples_needed(layer, rank):
        pytest.skip("enough samples")
    kept = fit_separable(layer, rank, data)
    assert kept.response_error == pytest.approx(error(layer, kept, noisy), rel=1e-9)
    free = fit_separable(layer, rank, dataclasses.replace(data, samples=10**9))
    held_out = unseen + 0.3 * torch.randn_like(unseen)
    plain = error(layer, fit_separable(layer, rank), held_out)
    assert error(layer, kept, held_out) < plain
    assert error(layer, kept, held_out) < error(layer, free, held_out)


def test_what_is_missing_is_noise_answered_by_the_weights():
    """Moments completed by noise are those of the samples and of so many of noise, in expectation."""
    layer = conv(LAYERS["grouped"])
    data = moments(layer, responses(layer, images(2, size=5)))
    weight = layer.weight.detach().reshape(2, 6, -1).transpose(1, 2)
    whole = completed(data, 3 * data.samples, of_noise(weight))
    power = data.gram.diagonal(dim1=1, dim2=2).mean(1)
    torch.testing.assert_close(
        whole.gram - data.gram, 2 * power[:, None, None] * torch.eye(36).double().expand(2, 36, 36)
    )
    torch.testing.assert_close(whole.cross - data.cross, 2 * power[:, None, None] * weight)
    # the weights themselves answer all of it
    assert whole.error(weight) == pytest.approx(0, abs=1e-12)
    assert completed(data, data.samples, of_noise(weight)) is data


@pytest.mark.parametrize("rank", [0, 25, 2.0, True, "full"])
def test_rank_outside_the_layer(rank):
    with pytest.raises(ValueError, match=r"rank=.*1 to 24"):
        fit_separable(conv(), rank)


# ---------------------------------------------------------------- ranks


@layers
def test_energies_are_those_of_the_partial_responses(settings):
    layer, x = conv(settings), images(4)
    g, kw, o = layer.groups, layer.kernel_size[1], layer.out_channels
    column = nn.Conv2d(
        8, g, (layer.kernel_size[0], 1), (layer.stride[0], 1), dilation=(layer.dilation[0], 1), groups=g
    ).double()
    padding = layer._reversed_padding_repeated_twice
    x = F.pad(x, padding) if padding[2] else x
    data = moments(column, [(x, column(x).detach())])
    got = kernel_energies(layer, data.gram)
    # the partial responses themselves: every column of every kernel as a convolution of its own
    weight = layer.weight.detach().view(g, o // g, 8 // g, -1, kw).permute(0, 1, 4, 2, 3)
    parts = F.conv2d(x, weight.reshape(o * kw, 8 // g, -1, 1), None, column.stride, 0, column.dilation, g)
    values = parts.transpose(0, 1).flatten(1).unflatten(0, (g, -1))
    values = values - values.mean(2, keepdim=True)
    covariance = values @ values.transpose(1, 2) / values.shape[2]
    want = torch.linalg.eigvalsh(covariance).flip(1)[:, : len(got)].sum(0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want[0]))


def best_ranks(layers, budget, multiple):
    """Every choice there is; the largest product of kept energies."""
    allowed = budget * sum(layer.dense for layer in layers.values())
    options = [
        sorted({*range(multiple, len(layer.energies), multiple), len(layer.energies)})
        for layer in layers.values()
    ]
    choices = [
        choice
        for choice in itertools.product(*options)
        if sum(k * layer.macs for k, layer in zip(choice, layers.values(), strict=True)) <= allowed
    ]
    return max(
        math.prod(layer.kept(k) for k, layer in zip(choice, layers.values(), strict=True))
        for choice in choices
    )


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.8])
@pytest.mark.parametrize("multiple", [1, 2])
def test_greedy_ranks_are_the_best_where_a_rank_costs_the_same_everywhere(budget, multiple):
    generator = torch.Generator().manual_seed(5)
    layers = {
        name: RankOption(tuple(sorted(torch.rand(6, generator=generator).tolist(), reverse=True)), 10, 60)
        for name in "abc"
    }
    ranks = select_ranks(layers, budget, multiple=multiple)
    assert sum(10 * k for k in ranks.values()) <= budget * 180
    kept = math.prod(layers[name].kept(k) for name, k in ranks.items())
    assert kept == pytest.approx(best_ranks(layers, budget, multiple))


def test_greedy_ranks_obey_the_budget_and_come_near_the_best_elsewhere():
    generator = torch.Generator().manual_seed(6)
    for _ in range(20):
        layers = {
            name: RankOption(
                tuple(sorted(torch.rand(5, generator=generator).pow(3).tolist(), reverse=True)),
                int(torch.randint(5, 20, (), generator=generator)),
                50,
            )
            for name in "abc"
        }
        ranks = select_ranks(layers, 0.6, multiple=1)
        spent = sum(layers[name].macs * k for name, k in ranks.items())
        assert spent <= 0.6 * 150
        # nothing that would still fit is left on the table
        room = 0.6 * 150 - spent
        assert all(layers[name].macs > room or k == 5 for name, k in ranks.items())
        kept = math.prod(layers[name].kept(k) for name, k in ranks.items())
        assert kept > 0.85 * best_ranks(layers, 0.6, 1)


def test_ranks_are_multiples_or_full():
    layers = {name: RankOption(tuple(range(size, 0, -1)), 1, 40) for name, size in (("a", 40), ("b", 10))}
    assert select_ranks(layers, 1) == {"a": 40, "b": 10}
    for budget in (50, True, "half"):
        with pytest.raises(ValueError, match="expected a share of the layers' MACs, above 0 and at most 1"):
            qx.LowRank(budget=budget)
    assert select_ranks(layers, 42 / 80) == {"a": 32, "b": 10}
    with pytest.raises(ValueError, match=r"budget=0\.1: .* already cost 0\.325"):
        select_ranks(layers, 0.1)
    with pytest.raises(ValueError, match="budget=0"):
        select_ranks(layers, 0)
    with pytest.raises(ValueError, match="multiple=0"):
        select_ranks(layers, 1, multiple=0)


# ---------------------------------------------------------------- the method


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 5, padding=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 10, 3),
    ).double()


@pytest.mark.parametrize("settings", [{"rank": 3}, {"rank": 0.4}, {"budget": 0.6, "multiple": 1}])
def test_each_layer_is_fitted_to_what_the_approximated_network_gives_it(settings):
    model, data = network(), [images(8, 3, 16, seed) for seed in (3, 4)]
    result = qx.accelerate(model, qx.LowRank(**settings), calibration=data)
    with torch.no_grad():
        for i in (0, 2, 4):
            pairs = [(result.model[:i](x), model[: i + 1](x)) for x in data]
            want = fit_separable(model[i], result.replaced[str(i)]["rank"], moments(model[i], pairs))
            for got, wanted in zip(
                result.model[i].parameters(), (want.vertical, want.horizontal, want.bias), strict=True
            ):
                torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
            assert result.replaced[str(i)]["response_error"] == pytest.approx(want.response_error, rel=1e-6)


@pytest.mark.parametrize("with_data", [False, True])
def test_a_budget_is_kept_and_counted(with_data):
    model, data = network(), [images(8, 3, 16)]
    method = qx.LowRank(budget=0.5, multiple=1, data=with_data)
    result = qx.accelerate(model, method, calibration=data)
    before = sum(record["macs_before"] for record in result.replaced.values())
    after = sum(record["macs_after"] for record in result.replaced.values())
    assert 0.45 * before < after <= 0.5 * before
    assert qx.cost(model, data[0][:1]).macs == before
    assert qx.cost(result.model, data[0][:1]).macs == after
    assert all((r["response_error"] is None) != with_data for r in result.replaced.values())


def test_a_budget_goes_where_the_data_needs_it():
    """The second layer reads one channel eight times over, which only the data shows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
    ).double()
    with torch.no_grad():
        model[1].weight[1:] = model[1].weight[:1]
    method, data = qx.LowRank(budget=0.5, multiple=1), [images(8, 3, 12)]
    by_data = qx.accelerate(model, method, calibration=data).replaced
    by_weights = qx.accelerate(model, method, example_input=data[0]).replaced
    assert by_data["2"]["rank"] < by_weights["2"]["rank"]
    assert by_data["0"]["rank"] > by_weights["0"]["rank"]


def test_ranks_as_a_person_gives_them():
    for given, wanted in ((1, 1), (71, 24), (0.25, 6), (1.0, 24), (0.001, 1), ("full", 24)):
        assert rank_of(qx.LowRank(given).rank, 24, "conv") == wanted
    assert rank_of(qx.LowRank().rank, 24, "conv") == 6


@pytest.mark.parametrize("method", [qx.LowRank, qx.Espace, qx.CP])
def test_layers_can_have_ranks_of_their_own(method):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    data = [images(20, 4, 8).float()]
    own = method({"0": 3, "[1-8]": 0.4})
    hash(own)
    result = qx.accelerate(model, own, calibration=data)
    both = method(3), method(0.4)
    alone = [qx.accelerate(model, one, calibration=data).replaced for one in both]
    assert result.replaced["0"]["rank"] == alone[0]["0"]["rank"] == 3
    assert [result.replaced[x]["rank"] for x in "12"] == [alone[1][x]["rank"] for x in "12"]
    some = qx.accelerate(model, method({"1": 2}), calibration=data)
    assert (list(some.replaced), set(some.skipped.values())) == (["1"], {"no rank was given for it"})
    with pytest.raises(ValueError, match="rank='conv2': no layer that gets one has such a name; there are 1"):
        qx.accelerate(model, method({"1": 2, "conv2": 3}), calibration=data)
    with pytest.warns(UserWarning, match="replaced nothing: 0: no rank was given for it"):
        qx.accelerate(model, method({"conv2": 3}), calibration=data)


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (ValueError, "rank=0", {"rank": 0}),
        (ValueError, r"rank=1\.5", {"rank": 1.5}),
        (ValueError, r"rank=nan", {"rank": math.nan}),
        (TypeError, "rank='half'", {"rank": "half"}),
        (TypeError, "rank=True", {"rank": True}),
        (ValueError, "rank=0", {"rank": {"0": 4, "*": 0}}),
        (ValueError, "budget=0", {"budget": 0}),
        (ValueError, "multiple=0", {"multiple": 0}),
        (ValueError, r"iterations=2\.5", {"iterations": 2.5}),
        (ValueError, "positions=0", {"positions": 0}),
        (ValueError, "seed=-1", {"seed": -1}),
        (ValueError, "data='yes'", {"data": "yes"}),
    ],
)
@pytest.mark.parametrize("method", [qx.LowRank, qx.Espace])
def test_bad_settings(method, error, match, settings):
    with pytest.raises(error, match=match):
        method(**settings)


def test_data_that_is_not_there():
    with pytest.raises(ValueError, match="calibration=None"):
        qx.accelerate(network(), qx.LowRank(data=True))


@pytest.mark.parametrize("method", [qx.LowRank(8), qx.Espace(8, mask="uniform")])
def test_too_few_images_are_one_line_and_a_network(method):
    model, x = network(), images(1, 3, 8)
    with pytest.warns(UserWarning, match="few") as told:
        result = qx.accelerate(model, method, calibration=[x])
    (line,) = {str(one.message) for one in told}
    needed = {n: r["images_needed"] for n, r in result.replaced.items() if "images_needed" in r}
    assert needed
    assert "1 images are few" in line
    assert f"needs {max(needed.values())} images" in line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = qx.accelerate(model, method, calibration=[images(max(needed.values()), 3, 8)])
    assert not any("images_needed" in record for record in enough.replaced.values())
