"""Tasks: losses and scores against sums written out, comparisons, and what is refused."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import quincunx as qx
from quincunx.measure.tasks import BadTask, Scale, compare_paired, relative_distance
from quincunx.measure.tasks.doing import digest_of
from quincunx.measure.tasks.ready import is_usual
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


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("values", [(0, 1), (-1, 0), (-1, 0, 1), (0, 2), (-1, 1), (0.25, 0.5, 4.0)], ids=str)
def test_images_that_got_worse_are_lost_whatever_the_scores(values, better):
    draws = torch.Generator().manual_seed(len(values))
    before, after = (
        torch.tensor(values).float()[torch.randint(len(values), (40,), generator=draws)] for _ in range(2)
    )
    found = compare_paired(before, after, better)
    change = after - before if better == "higher" else before - after
    assert (found["lost"], found["won"]) == (int((change < 0).sum()), int((change > 0).sum()))
    assert found["test"] == ("McNemar" if values == (0, 1) else "Wilcoxon")
    back = compare_paired(after, before, better)
    assert (back["lost"], back["won"]) == (found["won"], found["lost"])
    assert back["p"] == pytest.approx(found["p"])


def test_a_task_is_no_classification_by_the_name_of_its_score():
    def loss(output, target):
        return (output - target)[..., :2].square().flatten(1).sum(1)

    own = qx.Task("own", loss, loss, Scale("error", "points", "lower"))
    assert own.scale == qx.tasks.classification().scale
    assert qx.tasks.classification().classifies
    assert not own.classifies
    output = torch.zeros(2, 1, 4, 4, requires_grad=True)
    own.impact_function(output, torch.ones(2, 1, 4, 4)).backward()
    assert output.grad[..., :2].abs().min() > 0 == output.grad[..., 2:].abs().max()


def test_there_are_as_many_scores_as_images():
    for task in (
        qx.tasks.agreement(),
        qx.Task("own", lambda y, _: y.mean(1), lambda y, _: y.mean(1), Scale("S", "")),
    ):
        output = torch.ones(6, 2)
        for function in (task.losses, task.scores):
            assert len(function(output, output, 6)) == 6
            with pytest.raises(
                BadTask, match=r"gives shape \(6,\), expected one number for each image, \[3\]"
            ):
                function(output, output, 3)
        with pytest.raises(BadTask, match=r"its distance gives shape \(6,\)"):
            task.distances(output, output, images=3)
    for form in (np.asarray, list):
        library = qx.Task("own", lambda y, _: y.mean(1), lambda y, _, f=form: f(y.mean(1)), Scale("S", ""))
        assert library.scores(output, None).tolist() == [1] * 6
        with pytest.raises(BadTask, match=r"its score gives shape \(6,\)"):
            library.scores(output, None, 3)
    mean = qx.Task("mean", lambda y, _: y.mean(), lambda y, _: y.mean(1), Scale("S", ""))
    assert mean.losses(torch.ones(6, 2), None, 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (torch.tensor([0, 3]), "the labels are from 0 to 3, but there are 3 classes"),
        (torch.tensor([0.5, 1.0]), "numbers with a fraction"),
        (torch.tensor([-1, 1]), "the labels are from -1 to 1"),
        (torch.tensor([[0, 1]]), r"the labels have shape \(1, 2\)"),
        ("cat", "holds more than numbers"),
    ],
)
def test_labels_that_mean_no_class_are_refused(target, match):
    task, output = qx.tasks.classification(), torch.eye(3)[:2]
    for function in (task.losses, task.scores):
        with pytest.raises(BadTask, match=match):
            function(output, target)


def test_labels_in_any_form_are_scored_alike():
    task, output = qx.tasks.classification(), torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 5.0]])
    for target in (torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), torch.tensor([[0], [1]]), [0, 1],
                   torch.tensor([[1, 0, 0], [0, 1, 0]])):  # fmt: skip
        assert task.scores(output, target).tolist() == [0, 1]
        torch.testing.assert_close(
            task.losses(output, target), F.cross_entropy(output, torch.tensor([0, 1]), reduction="none")
        )
    # -100 is right or wrong nowhere
    excluded = torch.tensor([-100, 1])
    assert task.scores(output, excluded).tolist() == [0, 1]
    assert task.figure("top5_error", -torch.arange(6.0).repeat(2, 1), torch.tensor([-100, 5])).tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        (
            torch.full((1, 2, 2), 1 / 255),
            "masks of numbers with a fraction, expected class numbers from 0 to 2",
        ),
        (torch.full((1, 2, 2), 3), "masks with the class 3, but the network has 3 classes; expected 0 to 2"),
        (torch.full((1, 2, 2), -1), "masks with the class -1"),
    ],
)
def test_masks_that_are_no_classes_of_the_network(masks, match):
    task, output = qx.tasks.segmentation(), torch.randn(1, 3, 2, 2)
    for function in (task.losses, task.scores):
        with pytest.raises(BadTask, match=match):
            function(output, masks)
    floats = torch.tensor([[[0.0, 1.0], [255.0, 2.0]]])
    assert task.scores(output, floats[:, None]).equal(task.scores(output, floats))
    assert task.scores(output, floats).equal(task.scores(output, floats.long()))
    with pytest.raises(BadTask, match="the network gives a dict, expected scores of classes"):
        task.distances({"out": output}, {"out": output})


def test_several_labels_are_zeros_and_ones():
    task, output = qx.tasks.multilabel(), torch.randn(2, 3)
    for target in (torch.tensor([[0, 2, 5], [1, 1, 0]]), torch.tensor([[0, -1, 1], [0, 1, 0]])):
        for function in (task.losses, task.scores):
            with pytest.raises(BadTask, match="expected 1 for each class that an image has"):
                function(output, target)
    assert task.losses(output, torch.tensor([[0.1, 0.9, 0], [1, 0, 0.5]])).isfinite().all()
    # logits of another network are no labels
    assert task.distances(output, torch.full((2, 3), -4.0)).isfinite().all()


def test_complex_outputs_are_compared_by_their_distance():
    y = torch.randn(3, 2, 4, dtype=torch.complex64)
    torch.testing.assert_close(relative_distance(1.01 * y, y), torch.full((3,), 1e-4), rtol=1e-2, atol=0)


def test_a_figure_is_one():
    def loss(output, target):
        return output.mean(1)

    with pytest.raises(TypeError, match=r"further\['mae'\]=.*: expected a qx.tasks.Figure"):
        qx.Task("own", loss, loss, Scale("S", ""), further={"mae": loss})


def test_small_scores_and_losses_show_their_digits():
    scale = Scale("MSE", "", "lower")
    assert [scale.shown(v) for v in (0.25, 0.00004, 3.6e-7, 0.0)] == ["0.2500", "4e-05", "3.6e-07", "0.0000"]
    assert scale.amount(1.2e-8, 2) == "1.2e-08"
    assert scale.amount(-1.2e-8, 2) == "-1.2e-08"
    assert Scale("share").shown(0.0000123) == "0.0012%"
    assert Scale("share").amount(0.0, 2) == "0.00 points"


FACTOR = 1.0


def scaled(output, target):
    return FACTOR * helper(output, target)


def helper(output, target):
    return (output - target).abs()


def test_what_a_tasks_functions_do_tells_tasks_apart(monkeypatch):
    def made(factor, power=1):
        return lambda y, t: factor * (y - t) ** power

    def named(kinds):
        def loss(y, t):
            return y if "a" in {"a", "b"} and kinds else t

        return loss

    assert digest_of([made(2)]) == digest_of([made(2)])
    different = [
        made(2),
        made(3),
        made(2, 2),
        partial(scaled, 1),
        partial(scaled, 2),
        scaled,
        helper,
        named(1),
    ]
    assert len({digest_of([one]) for one in different}) == len(different)
    before = digest_of([scaled])
    monkeypatch.setitem(globals(), "FACTOR", 1000.0)
    assert digest_of([scaled]) != before
    monkeypatch.setitem(globals(), "FACTOR", 1.0)
    assert digest_of([scaled]) == before
    monkeypatch.setitem(globals(), "helper", lambda output, target: (output - target).square())
    assert digest_of([scaled]) != before
    task = qx.tasks.image_to_image()
    assert task.identity == qx.tasks.image_to_image().identity
    assert task.identity != replace(task, loss=made(2)).identity


def test_a_digest_is_the_same_in_another_process():
    program = (
        "from quincunx.measure.tasks.doing import digest_of\n"
        "print(digest_of([lambda y: y in {'a', 'b', 'c'}]))"
    )
    runs = {
        subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(runs) == 1


TABLE = ((1, 2), 3)


def reads_table(output, target):
    return TABLE[0][0] * (output - target)


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, output, target):
        return self.weight * (output - target)

    def method(self, output, target):
        return self.weight * (output - target)


def test_a_digest_sees_what_functions_are_made_with(monkeypatch):
    endless = []
    endless.append(endless)
    chain = Weighted(None)
    for _ in range(5000):
        chain = Weighted(chain)
    assert digest_of([chain]) == digest_of([chain])
    assert digest_of([lambda y, t: {object(): y}]) == digest_of([lambda y, t: {object(): y}])

    def closed(value):
        return lambda y, t: (value, y, t)

    values = [
        *(
            closed(one)
            for one in (torch.Tensor.abs, str.join, endless, {"a": 1}, {"a": 2}, ((1, 2), 3), (1, (2, 3)))
        ),
        *(closed(torch.ones(3) * k) for k in (1, 2)),
        *(closed(np.ones(3) * k) for k in (1, 2)),
        *(lru_cache(closed(k)) for k in (1, 2)),
        *(partial(scaled, **{name: 2}) for name in ("output", "target")),
        *(Weighted(k) for k in (1, 2)),
        *(Weighted(k).method for k in (1, 2)),
        closed(nn.Linear(2, 2)),
        reads_table,
    ]
    found = [digest_of([value]) for value in values]
    assert len(set(found)) == len(found)
    assert found[:-1] == [digest_of([value]) for value in values[:-1]]
    monkeypatch.setitem(globals(), "TABLE", ((5, 2), 3))
    assert digest_of([reads_table]) != found[-1]


def test_a_digest_of_functions_that_call_each_other_is_quick():
    names = {}
    source = "".join(f"def f{i}(x): return f{(i + 1) % 60}(x) + f{(i + 2) % 60}(x)\n" for i in range(60))
    exec(compile("__name__ = 'own'\n" + source, "own", "exec"), names)
    assert digest_of([names["f0"]]) != digest_of([names["f1"]])


def test_soft_labels_keep_their_precision():
    torch.manual_seed(0)
    task, soft = qx.tasks.classification(), torch.rand(8, 1000).softmax(1)
    for dtype in (torch.bfloat16, torch.float16):
        output = torch.randn(8, 1000).to(dtype)
        wanted = F.cross_entropy(output.float(), soft, reduction="none")
        torch.testing.assert_close(task.losses(output, soft), wanted, rtol=1e-6, atol=1e-6)


def test_classification_that_was_changed_is_told_from_the_usual_one():
    usual = qx.tasks.classification()
    assert is_usual(usual)
    for changed in (replace(usual, loss=helper), replace(usual, tempered=False), replace(usual, name="x")):
        assert changed.classifies
        assert not is_usual(changed)
        assert changed.identity != usual.identity


def test_a_mean_loss_of_impact_masks_is_asked_once_and_gets_the_target_as_it_is_understood():
    asked = []

    def loss(output, target):
        asked.append(target)
        return (output - target).mean()

    task = qx.Task("m", loss, loss, Scale("M", ""), understand=lambda output, target, index: target + 1)
    assert float(task.impact_loss(torch.zeros(3, 4), torch.zeros(3, 4))) == -3
    assert [float(target.mean()) for target in asked] == [1]


def test_a_loss_reads_outputs_that_begin_with_something_else():
    def loss(output, target):
        return (output[1] - target).square().mean(1)

    task = qx.Task("boxes", loss, loss, Scale("M", ""))
    output = torch.ones(7, 4), torch.ones(3, 4, requires_grad=True)
    assert len(task.losses(output, torch.zeros(3, 4), 3)) == 3
    assert float(task.impact_loss(output, torch.zeros(3, 4)).detach()) == 3
