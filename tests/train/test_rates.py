"""A learning rate is found by short runs on training images alone."""

import copy
import json

import pytest
import torch
from torch import nn

import quincunx as qx
from helpers.training import pictures
from quincunx.data import ImageData, Items, Split, part_with
from quincunx.data.items import Pictures
from quincunx.train import rates
from quincunx.train.loop import Diverged, fit
from quincunx.train.rates import find_rate
from quincunx.train.recipes import Recipe, by_name

RECIPE = Recipe("tiny", batch_size=8, lr=0.05, augment="none", find_lr=True)


@pytest.fixture
def data():
    return pictures(count=60, channels=3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return qx.networks.build("rsbn8", 3, 3, width=4)


def test_rates_are_judged_on_images_set_aside(model, data, tmp_path, monkeypatch):
    seen = []

    def short(model, parts, recipe, folder, **settings):
        seen.append((parts, recipe))
        return {"test_loss": abs(recipe.lr - 0.014) if recipe.lr < 0.05 else float("nan")}

    monkeypatch.setattr(rates, "fit", short)
    before = copy.deepcopy(model.state_dict())
    found = find_rate(model, data, RECIPE, tmp_path / "rate.json", steps=3)
    assert found["lr"] == pytest.approx(0.015)
    assert found["rates"] == pytest.approx([0.005, 0.015, 0.05])
    assert found["losses"][2] is None
    assert (found["judged"], found["trained"], found["steps"]) == (12, 24, 6)
    parts, recipe = seen[0]
    assert (len(parts.train), len(parts.test), recipe.find_lr) == (24, 12, False)
    assert json.loads((tmp_path / "rate.json").read_text())["lr"] == found["lr"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    # a second call reads it, one for another recipe does not
    seen.clear()
    assert find_rate(model, data, RECIPE, tmp_path / "rate.json", steps=3) == found
    assert seen == []
    find_rate(model, data, Recipe("tiny", batch_size=8, lr=0.01), tmp_path / "rate.json", steps=3)
    assert len(seen) == 4
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    find_rate(model, data, Recipe("tiny", batch_size=8, lr=0.01), tmp_path / "rate.json", steps=3)
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("losses", "taken"),
    [
        # rate: 0.005, 0.015, 0.05, 0.15
        ((1.0, 0.9, 0.98, 1.4), 0.05),
        ((1.0, 0.9, 0.995, 1.4), 0.015),
        ((0.95, 1.0, 1.04, 1.05), 0.05),
        ((-1.0, -1.2, -1.1, -0.9), 0.05),
    ],
)
def test_of_rates_that_are_about_as_good_the_largest_is_taken(
    model, data, tmp_path, monkeypatch, losses, taken
):
    given = iter(losses)
    monkeypatch.setattr(rates, "fit", lambda *_, **__: {"test_loss": next(given)})
    found = find_rate(model, data, RECIPE, tmp_path / "rate.json", steps=3)
    assert found["lr"] == pytest.approx(taken)
    assert found["losses"] == list(losses)


@pytest.mark.parametrize(
    ("losses", "rates_tried", "taken"),
    [
        # twice the lowest loss: no larger rate
        ({0.005: 1.0, 0.015: 0.4, 0.05: 0.9}, (0.005, 0.015, 0.05), 0.015),
        ({0.005: 0.4, 0.015: 0.9, 0.0015: 0.39}, (0.0015, 0.005, 0.015), 0.005),
        # the smallest is the best: smaller ones
        ({0.005: 0.8, 0.015: None, 0.0015: 0.4, 4.5e-4: 0.7}, (4.5e-4, 0.0015, 0.005, 0.015), 0.0015),
        ({0.005: None, 0.0015: 1.0, 4.5e-4: 0.9, 1.35e-4: 0.5}, (1.35e-4, 4.5e-4, 0.0015, 0.005), 1.35e-4),
    ],
)
def test_rates_that_are_too_large_are_not_tried_and_smaller_ones_are(
    model, data, tmp_path, monkeypatch, losses, rates_tried, taken
):
    def short(model, parts, recipe, *_, **__):
        [loss] = [loss for rate, loss in losses.items() if rate == pytest.approx(recipe.lr)]
        if loss is None:
            raise Diverged("at once")
        return {"test_loss": loss}

    monkeypatch.setattr(rates, "fit", short)
    found = find_rate(model, data, RECIPE, tmp_path / "rate.json", steps=3)
    assert found["lr"] == pytest.approx(taken)
    assert found["rates"] == pytest.approx(list(rates_tried))
    assert found["losses"] == [losses[min(losses, key=lambda r: abs(r - rate))] for rate in found["rates"]]


def test_training_and_judging_images_are_apart_and_no_test_image_is_read(data):
    marked = ImageData(
        "marked",
        Split(torch.arange(50).view(50, 1, 1, 1).expand(50, 8, 8, 3).to(torch.uint8), torch.zeros(50).long()),
        Split(torch.full((9, 8, 8, 3), 255, dtype=torch.uint8), torch.zeros(9).long()),
        ("a", "b"), (0.5,) * 3, (0.5,) * 3, "none",
    )  # fmt: skip
    seen = []

    class Stop(Exception):
        pass

    def short(model, parts, *_, **__):
        seen.append(parts)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "fit", short)
        with pytest.raises(Stop):
            find_rate(qx.networks.build("rsbn8", 3, 3, width=4), marked, RECIPE, "never.json")
    train, test = ({int(v) for v in part.images[:, 0, 0, 0]} for part in (seen[0].train, seen[0].test))
    assert not train & test
    assert train | test == set(range(50))
    assert len(test) == 10


def test_a_rate_is_found_by_training_and_the_recipe_then_fits(model, data, tmp_path):
    with pytest.raises(ValueError, match="find_lr=True"):
        fit(model, data, RECIPE, tmp_path / "run")
    found = find_rate(model, data, RECIPE, tmp_path / "rate.json", steps=2)
    assert found["lr"] in found["rates"]
    assert all(loss is None or loss > 0 for loss in found["losses"])
    assert find_rate(model, data, RECIPE, tmp_path / "again.json", steps=2) == found


def test_where_every_rate_diverges_the_error_says_so(model, data, tmp_path, monkeypatch):
    def short(*_, **__):
        raise Diverged("at once")

    monkeypatch.setattr(rates, "fit", short)
    with pytest.raises(ValueError, match=r"lr=0\.05: training diverges at 0\.000135, .*, 0\.0015, 0\.005;"):
        find_rate(model, data, RECIPE, tmp_path / "rate.json")
    assert not (tmp_path / "rate.json").exists()
    one = ImageData(
        "one", part_with(data.train, torch.tensor([0])), data.test, data.classes, data.mean, data.std, "none"
    )
    with pytest.raises(ValueError, match="1 training images"):
        find_rate(model, one, RECIPE, tmp_path / "rate.json")


def test_items_with_targets_have_parts_too():
    source = Pictures(torch.arange(6).view(6, 1, 1, 1).expand(6, 4, 4, 1).to(torch.uint8))
    part = part_with(Items(source, (4, 4), 1), torch.tensor([4, 2]))
    inputs, _ = part.source.batch([0, 1], None)
    assert len(part) == 2
    assert (255 * inputs[:, 0, 0, 0]).round().tolist() == [4, 2]
    assert part.facts == {"some": 2}


def test_an_accelerated_network_is_fine_tuned_at_the_rate_found(data, tmp_path):
    from quincunx.acceleration.pipeline import accelerate_trained

    torch.manual_seed(0)
    original = qx.networks.build("rrn8", 3, 3, width=4).eval()
    recipe = by_name("recover")
    result = accelerate_trained(
        original, qx.LowRank(0.5), data, tmp_path, calibration=16, rounds=3, keep_slower=True,
        recipe=Recipe(**{**vars(recipe), "epochs": 1, "batch_size": 16, "augment": "none"}),
    )  # fmt: skip
    assert result["recipe"]["lr"] == result["rate"]["lr"] in result["rate"]["rates"]
    assert result["recipe"]["find_lr"] is False
    assert "of" not in result["rate"]
    assert isinstance(original, nn.Module)
