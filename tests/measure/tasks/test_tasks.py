"""Tasks: losses and scores against sums written out, comparisons, and what is refused."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import quincunx as qx
from quincunx.measure.tasks import BadTask, Scale, compare_paired, relative_distance
from quincunx.measure.tasks.scale import ERROR, scale_in
from quincunx.measure.tasks.structure import tensors_in

pytestmark = pytest.mark.usefixtures("one_thread")


def test_classification_is_cross_entropy_and_wrong_answers():
    torch.manual_seed(0)
    task, scores, labels = qx.tasks.classification(), torch.randn(6, 7), torch.arange(6)
    torch.testing.assert_close(task.losses(scores, labels), F.cross_entropy(scores, labels, reduction="none"))
    assert torch.equal(task.scores(scores, labels), (scores.argmax(1) != labels).double())
    five = (scores.topk(5).indices == labels[:, None]).any(1)
    assert torch.equal(task.further["top5_error"].of(scores, labels), (~five).double())
    other = torch.randn(6, 7)
    wanted = F.softmax(other / 3, 1)
    divergence = (wanted * (wanted.log() - F.log_softmax(scores / 3, 1))).sum(1)
    torch.testing.assert_close(task.distances(scores, other, 3.0), 9 * divergence)
    torch.testing.assert_close(task.distances(scores, scores), torch.zeros(6), atol=1e-6, rtol=0)


def test_auxiliary_classifiers_count_by_three_tenths():
    torch.manual_seed(0)
    main, aux, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
    losses = [F.cross_entropy(scores, labels, reduction="none") for scores in (main, aux)]
    task = qx.tasks.classification()
    torch.testing.assert_close(task.losses((main, aux), labels), losses[0] + 0.3 * losses[1])


def test_the_mean_iou_is_that_of_sets_of_pixels():
    torch.manual_seed(1)
    task, classes = qx.tasks.segmentation(), 4
    masks = torch.randint(0, classes, (3, 9, 11))
    masks[0, :4] = 255
    masks[1] = 2
    output = torch.randn(3, classes, 9, 11)
    output[1, 2] += 3
    given = output.argmax(1)
    shares, sums = [], [[0, 0] for _ in range(classes)]
    for mask, answer in zip(masks, given, strict=True):
        known, each = mask != 255, []
        for c in range(classes):
            a, b = (answer == c) & known, (mask == c) & known
            both, either = int((a & b).sum()), int((a | b).sum())
            sums[c][0] += both
            sums[c][1] += either
            if either:
                each.append(both / either)
        shares.append(sum(each) / len(each))
    assert task.scores(output, masks).tolist() == pytest.approx(shares)
    figure = task.further["mean_iou_of_all"]
    total = figure.total(figure.of(output, masks).sum(0), 3)
    assert total == pytest.approx(sum(a / b for a, b in sums) / classes)
    known = masks != 255
    right = ((given == masks) & known).flatten(1).sum(1) / known.flatten(1).sum(1)
    torch.testing.assert_close(task.further["pixel_accuracy"].of(output, masks), right.double())
    losses = F.cross_entropy(output, masks, reduction="none", ignore_index=255)
    mean = losses.flatten(1).sum(1) / known.flatten(1).sum(1)
    torch.testing.assert_close(task.losses(output, masks), mean)


def test_an_image_without_any_class_is_not_wrong():
    task, output = qx.tasks.segmentation(), torch.randn(1, 3, 4, 4, requires_grad=True)
    mask = torch.full((1, 4, 4), 255)
    assert task.scores(output, mask).item() == 1.0
    loss = task.losses(output, mask).sum()
    loss.backward()
    assert loss.item() == 0
    assert not output.grad.any()


def test_psnr_and_ssim_are_those_of_the_literature():
    torch.manual_seed(2)
    task = qx.tasks.image_to_image()
    clean = torch.rand(2, 3, 24, 24) * 0.6 + 0.2
    noisy = clean + 0.05 * torch.randn_like(clean)
    for image, wanted, score in zip(noisy, clean, task.scores(noisy, clean).tolist(), strict=True):
        error = float((image.double() - wanted.double()).square().mean())
        assert score == pytest.approx(10 * math.log10(1 / error), rel=1e-5)
    assert task.scores(clean, clean).tolist() == [100.0, 100.0]
    # what leaves [0, 1] is cut off, as an image file does
    assert task.scores(clean + 5, torch.ones_like(clean)).tolist() == [100.0, 100.0]
    pytest.importorskip("torchmetrics")
    assert task.further["ssim"].of(clean, clean).tolist() == pytest.approx([1, 1])
    similar = task.further["ssim"].of(noisy, clean)
    assert similar.shape == (2,)
    assert bool((similar < 0.99).all())


def test_multilabel_counts_sets():
    task = qx.tasks.multilabel()
    output = torch.tensor([[2.0, -1.0, 0.5], [-1.0, -1.0, -1.0], [1.0, 1.0, -2.0]])
    target = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 0]])
    assert task.scores(output, target).tolist() == pytest.approx([2 / 3, 1, 1])
    assert task.further["all_right"].of(output, target).tolist() == [0, 1, 1]
    losses = F.binary_cross_entropy_with_logits(output, target.float(), reduction="none").sum(1)
    torch.testing.assert_close(task.losses(output, target), losses)
    other = torch.randn(3, 3)
    p, q = other.sigmoid(), output.sigmoid()
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    torch.testing.assert_close(task.distances(output, other), divergence, rtol=1e-4, atol=1e-5)


@dataclass
class _Boxes:
    boxes: torch.Tensor
    classes: torch.Tensor


def test_outputs_of_any_structure_are_compared():
    torch.manual_seed(0)
    first = {
        "maps": [torch.randn(2, 3, 4, 4), None],
        "found": _Boxes(torch.randn(2, 5), torch.tensor([1, 2])),
    }
    names = [name for name, _ in tensors_in(first)]
    assert names == ["maps.0", "found.boxes", "found.classes"]
    assert relative_distance(first, first).tolist() == [0, 0]
    second = {
        "maps": [2 * first["maps"][0], None],
        "found": _Boxes(first["found"].boxes, torch.tensor([1, 0])),
    }
    # 4 times the squares of the original 1/4; the whole numbers of the second image differ
    expected = [0.25 / 3, (0.25 + 1) / 3]
    assert relative_distance(first, second).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "match"),
    [
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, "outputs of other structure: 'a', where"),
        (
            torch.ones(2, 3),
            torch.ones(2, 4),
            r"shapes \(2, 3\) and \(2, 4\) of the original cannot be compared",
        ),
        ([torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)], "output '1'"),
        ("text", "text", "a str, expected tensors"),
        ([], [], "nothing, where the original network gives nothing"),
    ],
)
def test_outputs_that_cannot_be_compared_are_named(ours, theirs, match):
    with pytest.raises(BadTask, match=match):
        relative_distance(ours, theirs)


SCALE = Scale("MAE", "", "lower")


def _mean_error(output, target):
    return (output - target).abs().flatten(1).mean(1)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda y, t: "much", "its loss gives a str, expected one number for each image, .2. or their mean"),
        (lambda y, t: y, r"its loss gives shape \(2, 3\)"),
        (lambda y, t: torch.zeros(3), r"its loss gives shape \(3,\)"),
        (
            lambda y, t: y - t[:, :2],
            r"its loss raises RuntimeError: .* \(outputs \[2, 3\], targets \[2, 3\]\)",
        ),
    ],
)
def test_a_loss_that_is_none_is_named(loss, match):
    task = qx.Task("mine", loss, _mean_error, SCALE)
    with pytest.raises(BadTask, match=f"task 'mine': {match}"):
        task.losses(torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_figure_that_fails_is_named():
    pytest.importorskip("torchmetrics")
    tiny = torch.zeros(1, 1, 4, 4)
    with pytest.raises(BadTask, match="task 'image-to-image': its figure 'ssim' raises "):
        qx.tasks.image_to_image().figure("ssim", tiny, tiny)


def test_a_mean_is_a_loss_of_every_image():
    task = qx.Task("mine", lambda y, t: F.mse_loss(y, t), _mean_error, SCALE)
    assert task.losses(torch.zeros(4, 3), torch.ones(4, 3)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"loss": None}, TypeError, "loss=None: expected a function"),
        ({"scale": "PSNR"}, TypeError, "scale='PSNR': expected a qx.tasks.Scale"),
        ({"name": ""}, TypeError, "name='': expected a text"),
        ({"against": "nothing"}, ValueError, "against='nothing': expected 'targets' or 'original'"),
    ],
)
def test_a_task_of_wrong_parts_is_refused(change, error, match):
    parts = {"name": "mine", "loss": _mean_error, "score": _mean_error, "scale": SCALE}
    with pytest.raises(error, match=match):
        qx.Task(**{**parts, **change})


@pytest.mark.parametrize("size", [(2, 4), (3, 8, 8)])
def test_masks_of_another_size_are_refused(size):
    with pytest.raises(BadTask, match=r"masks of .*, expected \(2, 8, 8\) as the network's maps have"):
        qx.tasks.segmentation().losses(torch.zeros(2, 5, 8, 8), torch.zeros(size))


def test_scales_count_losses_in_their_units():
    psnr = Scale("PSNR", "dB", "higher")
    assert psnr.lost(30.0, 29.75) == 0.25
    assert psnr.limit(30.0, 0.25) == 29.75
    assert psnr.reached(30.1, 30.0)
    assert not psnr.reached(29.9, 30.0)
    assert ERROR.lost(0.1, 0.12) == pytest.approx(2)
    assert ERROR.limit(0.1, 2.0) == pytest.approx(0.12)
    assert scale_in({"task": qx.tasks.image_to_image().to_dict()}) == psnr
    with pytest.raises(ValueError, match="better='larger'"):
        Scale("x", "", "larger")
    with pytest.raises(ValueError, match="expected a name and a score"):
        scale_in({"task": {"name": "x"}})


def test_right_and_wrong_get_mcnemar_and_scores_get_wilcoxon():
    before, after = torch.tensor([0.0, 1, 0, 0, 1, 0]), torch.tensor([1.0, 1, 0, 1, 0, 1])
    found = compare_paired(before, after, "lower")
    assert (found["lost"], found["won"], found["test"]) == (3, 1, "McNemar")
    assert found["p"] == pytest.approx(stats.binomtest(3, 4, 0.5).pvalue)
    higher = compare_paired(1 - before, 1 - after, "higher")
    assert (higher["lost"], higher["won"], higher["p"]) == (3, 1, found["p"])
    generator = torch.Generator().manual_seed(0)
    first = 30 + torch.randn(40, generator=generator)
    second = first - 0.1 + 0.2 * torch.randn(40, generator=generator)
    found = compare_paired(first, second)
    assert found["test"] == "Wilcoxon"
    assert found["p"] == pytest.approx(stats.wilcoxon((second - first).double().numpy()).pvalue)
    assert found["lost"] == int((second < first).sum())
    lower = compare_paired(first, second, "lower")
    assert (lower["lost"], lower["won"]) == (found["won"], found["lost"])
    assert compare_paired(first, first)["p"] == 1.0
    with pytest.raises(ValueError, match="not finite"):
        compare_paired(first, first * math.nan)


def test_impacts_have_a_gradient_without_targets():
    """A distance from oneself has none: there the outputs' own size counts."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8)
    for task in (qx.tasks.agreement(), qx.tasks.image_to_image()):
        loss = task.impact_loss({"out": net(x)}, None)
        [gradient] = torch.autograd.grad(loss, [net.weight])
        assert float(gradient.abs().sum()) > 0
    assert qx.tasks.classification().impact_function is None


def test_tasks_by_name():
    assert [qx.tasks.named(name).name for name in qx.tasks.READY] == list(qx.tasks.READY)
    with pytest.raises(ValueError, match="task='segmentatoin': expected segmentation, "):
        qx.tasks.named("segmentatoin")
    assert all(a != b for a, b in pairwise(qx.tasks.READY))
