"""Learning from a teacher's maps, against sums written out; images without labels."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.training import DATA, TINY, network, run
from quincunx.train.evaluation import evaluate, label_with
from quincunx.train.loss import Loss, shared_maps
from quincunx.train.recipes import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = torch.zeros(1, 1, 8, 8)


def maps_of(model, images, names):
    found = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, i, out, n=n: found.update({n: out}))
        for n in names
    ]
    scores = model(images)
    for handle in handles:
        handle.remove()
    return scores, found


def all_images():
    return (DATA.train.images.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3


def test_the_loss_adds_the_relative_distance_of_each_resolutions_last_map(tmp_path):
    model, teacher = network(), network(seed=3)
    names = shared_maps(teacher, model, ONE)
    assert len(names) == 3  # 8 x 8, 4 x 4, 2 x 2
    again = network()
    again.load_state_dict(model.state_dict())
    recipe = replace(TINY, epochs=1, batch_size=20, augment="none", distill=0.5, distill_features=0.3)
    result, trained = run(tmp_path, model=model, recipe=recipe, teacher=teacher)

    scores, ours = maps_of(again.train(), all_images(), names)
    with torch.no_grad():
        wanted, theirs = maps_of(teacher.eval(), all_images(), names)
    far = [((ours[n] - theirs[n]) ** 2).flatten(1).sum(1) / (theirs[n] ** 2).flatten(1).sum(1) for n in names]
    soft = F.softmax(wanted / 4, 1)
    divergence = (soft * (soft.log() - F.log_softmax(scores / 4, 1))).sum(1).mean()
    plain = F.cross_entropy(scores, DATA.train.labels)
    loss = 0.5 * plain + 0.5 * 16 * divergence + 0.3 * torch.stack(far).mean()
    assert result["history"][0]["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    # one step of plain SGD from the same gradient
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in again.parameters())
    assert not any(m._forward_hooks for net in (trained, teacher) for m in net.modules())


def test_maps_alone_can_be_followed_and_parts_of_a_batch_give_the_same_loss(tmp_path):
    class Plain(nn.Sequential):
        """Without batch norm, so that parts of a batch are independent."""

    def made(seed):
        torch.manual_seed(seed)
        net = Plain(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 3))
        net.quincunx_spec = {"kind": "factory", "factory": "test:made"}
        return net

    losses = []
    for parts in (1, 4):
        recipe = replace(
            TINY, epochs=1, batch_size=20, augment="none", distill_features=2.0, accumulate=parts
        )
        result, _ = run(tmp_path / str(parts), model=made(0), recipe=recipe, teacher=made(1))
        losses.append(result["history"][0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain = replace(TINY, epochs=1, batch_size=20, augment="none")
    result, _ = run(tmp_path / "plain", model=made(0), recipe=plain)
    assert losses[0] > result["history"][0]["train_loss"]


def test_a_teacher_that_shares_no_map_is_refused():
    one = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    other = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten())
    with pytest.raises(ValueError, match="no map of one name and shape"):
        Loss(Recipe(distill_features=1.0), one, other, ONE)
    with pytest.raises(ValueError, match="distill_features=1 needs a teacher"):
        Loss(Recipe(distill_features=1.0), one, None, ONE)
    with pytest.raises(ValueError, match=r"distill_features=-1\.0: expected at least 0"):
        Recipe(distill_features=-1.0)


# ---- without labels


def unlabelled(data=DATA):
    parts = {
        key: replace(part, labels=torch.zeros_like(part.labels))
        for key, part in (("train", data.train), ("test", data.test))
    }
    return replace(data, classes=(), labelled=False, **parts)


def test_a_networks_own_answers_take_the_place_of_labels():
    model = network().eval()
    data = label_with(model, unlabelled())
    assert data.classes == ("0", "1", "2")
    assert torch.equal(data.train.labels, model(all_images()).argmax(1))
    assert evaluate(model, data.test, data).error == 0
    assert data.describe()["labelled"] is False
    assert "labelled" not in DATA.describe()


def test_without_labels_the_teacher_alone_is_learned_from(tmp_path):
    teacher = network(seed=3).eval()
    data = label_with(teacher, unlabelled())
    with pytest.raises(ValueError, match=r"distill=0\.5: the images of pictures have no labels"):
        run(tmp_path / "half", data=data, recipe=replace(TINY, distill=0.5), teacher=teacher)
    with pytest.raises(ValueError, match="have no labels"):
        run(tmp_path / "none", data=data)
    result, _ = run(tmp_path / "all", data=data, recipe=replace(TINY, distill=1.0), teacher=teacher)
    assert result["data"]["labelled"] is False
