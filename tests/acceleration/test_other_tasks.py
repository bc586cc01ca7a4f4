"""``qx.accelerate`` for networks that give maps and dictionaries: searches, impact masks, two ranks."""

import pytest
import torch
from torch import nn

import quincunx as qx
from helpers.acceleration import clock_of_macs
from quincunx.acceleration import scores as scores_module
from quincunx.acceleration.judge import loss_on
from quincunx.acceleration.scores import Scores
from quincunx.data import Items, degraded, load_data
from quincunx.data.items import Pictures
from quincunx.methods.registry import candidates_named
from quincunx.train.evaluation import evaluate, images_at_once, score_images
from quincunx.train.processes import Ranks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:calibration. .* images are few:UserWarning"),
]


class Maps(nn.Module):
    """A map and a vector, under names."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x):
        inner = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return {"map": self.conv3(inner), "mean": inner.mean((2, 3))}


def network(kind=Maps):
    torch.manual_seed(0)
    return kind().eval()


def images(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(count)]


def distance(first, second):
    parts = []
    for name in ("map", "mean"):
        gap = (first[name] - second[name]).flatten(1).square().sum(1)
        parts.append(gap / second[name].flatten(1).square().sum(1))
    return torch.stack(parts).mean(0)


def test_a_search_scores_candidates_by_the_tasks_distance(monkeypatch):
    clock_of_macs(monkeypatch)
    model, data = network(), images()
    options = {"calibration": data, "macs": "80%", "max_drop": 100.0, "task": qx.tasks.agreement()}
    found = qx.accelerate(model, "lowrank", **options)
    row = next(
        r for r in found.search["candidates"] if tuple(r["layers"]) == ("conv2",) and "0.25" in r["label"]
    )
    alone = qx.accelerate(model, qx.LowRank(rank=0.25), where=["conv2"], calibration=data).model
    with torch.no_grad():
        expected = torch.cat([distance(alone(x), model(x)) for x in data]).mean()
    assert row["loss"] == pytest.approx(float(expected), rel=1e-3)
    # what is lost of the score is the distance of the chosen network, in percent
    with torch.no_grad():
        lost = 100 * torch.cat([distance(found.model(x), model(x)) for x in data]).mean()
    assert found.search["drop"] == pytest.approx(float(lost), rel=1e-3)


def test_without_a_task_other_outputs_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"task 'classification': the network gives a dict, .* agreement"):
        qx.accelerate(network(), "lowrank", calibration=images(), macs="80%")
    with pytest.raises(TypeError, match="task='agreement': expected a qx\\.Task"):
        qx.accelerate(network(), "lowrank", calibration=images(), macs="80%", task="agreement")


def test_a_score_without_targets_is_refused(monkeypatch):
    clock_of_macs(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
    options = {"macs": "90%", "max_drop": 1.0, "task": qx.tasks.image_to_image()}
    with pytest.raises(ValueError, match="batch 0 has no target, which task 'image-to-image' scores"):
        qx.accelerate(model, "lowrank", calibration=images(), **options)
    pairs = [(x, x) for x in images()]
    assert "drop" in qx.accelerate(model, "lowrank", calibration=pairs, **options).search


def test_the_tasks_reading_serves_calibration_in_python(monkeypatch):
    clock_of_macs(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
    ready = qx.tasks.image_to_image()
    mine = qx.Task("mine", ready.loss, ready.score, ready.scale, read=lambda batch: batch["both"])
    data = [{"both": (x, 0.5 * x), "name": "a"} for x in images()]
    found = qx.accelerate(model, "lowrank", calibration=data, macs="90%", max_drop=50.0, task=mine)
    same = qx.accelerate(
        model, "lowrank", calibration=[b["both"] for b in data], macs="90%", max_drop=50.0, task=ready
    )
    assert found.search["drop"] == pytest.approx(same.search["drop"])


def test_impact_masks_follow_the_tasks_loss():
    """A loss of the left half alone makes positions of the left half matter."""

    def left(output, target):
        return (output["map"][..., :6] - target).abs().flatten(1).mean(1)

    task = qx.Task("left", left, left, qx.tasks.Scale("MAE", "", "lower"))
    data = [(x, torch.zeros(8, 2, 12, 6)) for x in images()]
    method = qx.Espace(rank=0.5, rate=0.25)
    found = qx.accelerate(network(), method, where=["conv3"], calibration=data, task=task)
    mask = found.model.conv3.horizontal.sampling.mask(12, 12)
    assert not mask[:, 8:].any()
    whole = qx.accelerate(network(), method, where=["conv3"], calibration=data, task=qx.tasks.agreement())
    assert whole.model.conv3.horizontal.sampling.mask(12, 12)[:, 8:].any()


def test_many_large_answers_are_computed_again_and_score_the_same(monkeypatch):
    clock_of_macs(monkeypatch)
    model, data = network(), images()

    def losses():
        made = Scores(
            model, data, candidates_named(["lowrank"]), None, None, lambda *_: None, task=qx.tasks.agreement()
        )
        made.fill(None, None)
        return made.kept, [row.loss for row in made.rows]

    kept, first = losses()
    assert len(kept) == 3
    monkeypatch.setattr(scores_module, "MOST_KEPT", 1)
    kept, second = losses()
    assert kept is None
    assert second == pytest.approx(first)


def test_shares_of_two_ranks_make_the_whole():
    data, task = degraded(load_data("digits"), noise=25), qx.tasks.image_to_image()
    torch.manual_seed(0)
    model = qx.networks.build("dncnn3", None, 1, width=4).eval()
    whole = evaluate(model, data.test, data, task=task)
    halves = [score_images(model, data.test, data, rank=rank, world=2, task=task) for rank in (0, 1)]
    assert sum(float(h.scores.sum()) for h in halves) / 360 == pytest.approx(whole.score)
    # noise of 25 levels, of which the black corners lose half when values are cut off
    assert 20.2 < whole.score < 22
    assert sum(float(h.sums[n]) for h in halves for n in h.sums) / 360 == pytest.approx(
        whole.further.get("ssim", 0.0)
    )
    # more processes than images: some have none
    few = [
        score_images(model, data.test, data, batch_size=360, rank=r, world=400, task=task) for r in (0, 399)
    ]
    assert [len(found.scores) for found in few] == [0, 1]
    assert isinstance(Ranks(0, 1), Ranks)


def test_large_images_are_computed_a_few_at_a_time():
    task = qx.tasks.image_to_image()
    pixels = torch.zeros(1, 1024, 1024, 3, dtype=torch.uint8).expand(30, -1, -1, -1)
    part = Items(Pictures(pixels, noise=25), (1024, 1024), 3)
    assert images_at_once(part, task) == 2
    assert images_at_once(degraded(load_data("digits"), noise=25).test, task) == 256


def test_the_loss_against_the_original_is_the_distance():
    model, other = network(), network()
    pairs = [(x, None) for x in images()]
    with torch.no_grad():
        other.conv2.weight.mul_(1.1)
        expected = sum(float(distance(other(x), model(x)).sum()) for x in images())
    assert loss_on(other, pairs, qx.tasks.agreement(), model) == pytest.approx(expected, rel=1e-5)
    assert loss_on(model, pairs, qx.tasks.agreement(), model) == 0
