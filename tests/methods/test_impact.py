"""Masks by name, and impacts against what the loss really does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.methods.fitting.impact import highest, impacts, mask_of, self_loss
from quincunx.sampling import from_spec
from quincunx.surgery.calibration import Batch


def toy(inplace=False):
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh() if not inplace else nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ).double()


def batches(count=2, images=3, size=6, targets=True):
    return [
        Batch(
            i,
            torch.randn(images, 2, size, size, dtype=torch.float64),
            torch.randint(5, (images,)) if targets else None,
        )
        for i in range(count)
    ]


def by_brute_force(network, module, data, loss, step=1e-5):
    """Each value of a module's output is scaled a little, one at a time, and the loss taken anew."""
    sums = count = 0
    for batch in data:
        for x, target in zip(batch.input, batch.target, strict=True):
            with torch.no_grad():
                change = {}

                def scale(_, __, output, change=change):
                    change["shape"] = output.shape
                    return output * change["factor"] if "factor" in change else output

                handle = module.register_forward_hook(scale)
                before = loss(network(x[None]), target[None])
                found = torch.zeros(change["shape"][2:], dtype=torch.float64)
                for c in range(change["shape"][1]):
                    for r in range(found.shape[0]):
                        for q in range(found.shape[1]):
                            change["factor"] = torch.ones(change["shape"], dtype=torch.float64)
                            change["factor"][0, c, r, q] -= step
                            found[r, q] += (loss(network(x[None]), target[None]) - before).abs() / step
                handle.remove()
            sums, count = sums + found, count + 1
    return sums / count


def test_impact_is_the_change_of_the_loss_to_first_order():
    network, data = toy(), batches()
    got = impacts(network, {"a": network[0], "b": network[2]}, data)
    for name, module in (("a", network[0]), ("b", network[2])):
        want = by_brute_force(network, module, data, self_loss)
        torch.testing.assert_close(got[name], want, rtol=1e-3, atol=1e-4 * float(want.max()))


def test_impact_of_a_loss_of_ones_own():
    network, data = toy(), batches()

    def loss(output, target):
        return output.gather(1, target[:, None]).square().sum()

    got = impacts(network, {"a": network[0]}, data, loss)["a"]
    want = by_brute_force(network, network[0], data, loss)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.max()))


def test_without_targets_the_networks_own_predictions_stand_in():
    network, data = toy(), batches()
    own = [Batch(b.index, b.input, network(b.input).argmax(1)) for b in data]
    bare = [Batch(b.index, b.input) for b in data]
    got, want = (impacts(network, {"a": network[0]}, d)["a"] for d in (bare, own))
    assert torch.equal(got, want)
    assert not torch.equal(got, impacts(network, {"a": network[0]}, data)["a"])


def test_impact_is_a_mean_over_images_however_they_are_batched():
    network, data = toy(), batches()
    x, target = torch.cat([b.input for b in data]), torch.cat([b.target for b in data])
    singly = [Batch(i, x[i : i + 1], target[i : i + 1]) for i in range(len(x))]
    got, want = (impacts(network, {"a": network[0]}, d)["a"] for d in (singly, data))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_what_follows_in_place_does_not_disturb_and_nothing_is_left_behind():
    network, data = toy(inplace=True), batches()
    other = toy(inplace=True)
    other.load_state_dict(network.state_dict())
    other[1].inplace = False
    network[0].weight.requires_grad_(False)
    network.train()
    network[3].eval()
    got = impacts(network, {"a": network[0]}, data)["a"]
    assert torch.equal(got, impacts(other, {"a": other[0]}, data)["a"])
    assert [p.requires_grad for p in network.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in network.parameters())
    assert [m.training for m in network] == [True, True, True, False, True, True, True]
    assert not network[0]._forward_hooks
    with torch.no_grad():
        assert torch.equal(got, impacts(network, {"a": network[0]}, data)["a"])


def test_a_layer_that_the_loss_does_not_read_has_no_impact():
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = toy(), nn.Conv2d(2, 3, 3).double()

        def forward(self, x):
            self.side(x)
            return self.main(x)

    network = Side()
    found = impacts(network, {"side": network.side, "main": network.main[0]}, batches())
    assert not found["side"].any()
    # the last row and column lie beyond the strided convolution's last window
    assert torch.equal(found["main"] > 0, F.pad(torch.ones(5, 5), (0, 1, 0, 1)) > 0)


def test_impact_says_what_is_wrong():
    network, data = toy(), batches(3)
    data[1].input[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="batch 1 has loss nan"):
        impacts(network, {"a": network[0]}, data)
    with pytest.raises(ValueError, match="batch 0 never reaches layer 'z'"):
        impacts(network, {"z": nn.Conv2d(2, 3, 1)}, data)
    with pytest.raises(ValueError, match="no images"):
        impacts(network, {"a": network[0]}, [])
    mixed = [*batches(1), Batch(1, torch.randn(1, 2, 8, 8).double())]
    with pytest.raises(ValueError, match=r"'a': batch 1 has maps of \(8, 8\), earlier ones of \(6, 6\)"):
        impacts(network, {"a": network[0]}, mixed)
    for last, got in ((nn.Flatten(0), r"\(324,\)"), (nn.MaxPool2d(2, return_indices=True), "tuple")):
        with pytest.raises(TypeError, match=rf"logits .* got {got}; give a loss"):
            impacts(nn.Sequential(network[0], last), {"a": network[0]}, batches(1)[:1])


# ---------------------------------------------------------------- masks


def test_the_highest_are_computed_and_of_equals_the_first():
    impact = torch.tensor([[0.0, 5.0, 5.0], [5.0, 7.0, 1.0]])
    wanted = {1 / 6: "000010", 2 / 6: "010010", 3 / 6: "011010", 5 / 6: "011111", 1.0: "111111"}
    for rate, bits in wanted.items():
        mask = highest(impact, rate)
        assert "".join(str(int(b)) for b in mask.mask(2, 3).flatten()) == bits
        assert mask.count(2, 3) == qx.Random(rate).count(2, 3)
    assert highest(torch.zeros(3, 3), 1e-9).positions(3, 3).tolist() == [[0, 0]]
    equal = torch.zeros(40, 50)
    assert torch.equal(highest(equal, 0.3).mask(40, 50).flatten(), torch.arange(2000) < 600)
    with pytest.raises(ValueError, match="rate=0"):
        highest(impact, 0)


def test_masks_by_name():
    impact = torch.arange(64.0).view(8, 8)
    assert mask_of("uniform", 0.25, seed=3, place="x/1") == qx.Uniform(0.25)
    assert mask_of("uniform-eq8", 0.25, seed=3, place="x/1") == qx.Uniform(0.25, rule="eq8")
    assert mask_of("impact", 0.25, seed=3, place="x/1", impact=impact) == highest(impact, 0.25)
    draws = [mask_of("random", 0.25, seed=s, place=p) for s in (0, 1) for p in ("x/1", "x/2")]
    assert len({draw.seed for draw in draws}) == 4
    assert draws[0] == mask_of("random", 0.25, seed=0, place="x/1")
    for kind in ("impact", "best"):
        with pytest.raises(ValueError, match=f"mask='{kind}'"):
            mask_of(kind, 0.25, seed=0, place="x/1")


def test_loss_of_targets_is_cross_entropy_summed():
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 4, 2])
    maps = torch.randn(2, 5, 3, 4)
    assert self_loss(maps, None) == F.cross_entropy(maps, maps.argmax(1), reduction="sum")
    assert self_loss(logits, target) == F.cross_entropy(logits, target, reduction="sum")


def test_masks_by_eq_8_are_laid_where_the_formula_has_positions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d((4, 1)), nn.Conv2d(6, 6, 3, padding=1)
    ).eval()
    x = torch.randn(2, 3, 12, 16)
    found = qx.accelerate(net, qx.Espace(rank=4, rate=(0.25, 0.5), mask="uniform-eq8"), example_input=x)
    # the pooled map of 3 x 16 is lower than sqrt(12) = 3.5
    assert found.skipped["2"].startswith("grid 3 x 16: eq. 8 has no positions at rate=0.25")
    assert found.replaced["0"]["mask"] == "uniform-eq8"
    half = found.model[0]
    assert [from_spec(text) for text in half.spec["masks"]] == [
        qx.Uniform(r, rule="eq8") for r in (0.25, 0.5)
    ]
    torch.testing.assert_close(qx.fuse(found.model)(x), found.model(x))
    even = qx.accelerate(net, qx.Espace(rank=4, rate=(0.25, 0.5), mask="uniform"), example_input=x)
    assert not even.skipped
    assert even.replaced["0"]["mask"] == "uniform"
    expected = "mask='uniform-eq9': expected one of impact, residual, lattice, uniform, uniform-eq8"
    with pytest.raises(ValueError, match=expected):
        qx.Espace(mask="uniform-eq9")


def test_residual_impacts_are_of_what_neighbours_do_not_say():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    x, target = torch.randn(6, 3, 5, 7), torch.randint(5, (6,))
    found = impacts(net, {"c": net[0]}, [Batch(0, x, target)], residual=True)["c"]
    y = net[0](x).detach().requires_grad_()
    loss = nn.functional.cross_entropy(net[1:](y), target, reduction="sum")
    (slope,) = torch.autograd.grad(loss, y)
    want = torch.zeros(5, 7, dtype=torch.float64)
    for r in range(5):
        for c in range(7):
            near = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
            near = [(i, j) for i, j in near if 0 <= i < 5 and 0 <= j < 7]
            mean = torch.stack([y[:, :, i, j] for i, j in near]).mean(0)
            want[r, c] = (slope[:, :, r, c] * (y[:, :, r, c] - mean)).abs().sum() / 6
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)


def test_residual_masks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    masks = {}
    for mask in ("impact", "residual"):
        made = qx.accelerate(net, qx.Espace(4, rate=0.5, mask=mask), calibration=[torch.randn(8, 3, 8, 8)])
        assert made.replaced["0"]["mask"] == mask
        masks[mask] = made.model[0].masks
    assert masks["impact"] != masks["residual"]
    with pytest.raises(ValueError, match="residual masks are estimated on data"):
        qx.accelerate(net, qx.Espace(4, mask="residual"), example_input=torch.zeros(1, 3, 8, 8))
