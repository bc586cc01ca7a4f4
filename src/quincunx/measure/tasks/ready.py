"""Ready tasks: classes, several classes at once, masks, images, and agreement with the original network."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quincunx.measure.tasks.classes import IGNORED, class_labels
from quincunx.measure.tasks.scale import ERROR, Scale
from quincunx.measure.tasks.task import BadTask, Figure, Task, relative_distance

__all__ = [
    "READY",
    "agreement",
    "classification",
    "image_to_image",
    "is_usual",
    "multilabel",
    "named",
    "segmentation",
]

# the weight of an auxiliary classifier's loss in training (Szegedy et al. 2015, section 5)
_AUXILIARY = 0.3
# images that are equal have no finite ratio: a mean squared error below this counts as this, 100 dB
_LEAST_ERROR = 1e-10
# pixels of masks that have no class
IGNORED_PIXEL = 255


def _scores_of(output: Any) -> tuple[Tensor, ...]:
    """Return scores of classes, those of auxiliary classifiers behind the main ones."""
    found = output if isinstance(output, tuple) else (output,)
    for scores in found:
        if not isinstance(scores, Tensor) or scores.dim() < 2:
            got = (
                f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            )
            raise BadTask(
                f"the network gives {got}, expected scores [images, classes, ...]; another task, such as "
                "agreement, takes other outputs"
            )
    if len({scores.shape for scores in found}) > 1:
        shapes = ", ".join(str(tuple(scores.shape)) for scores in found)
        raise BadTask(
            f"the network gives tensors of {shapes}, expected scores of classes and of auxiliary "
            "classifiers, all of one shape; another task, such as agreement, takes other outputs"
        )
    return found


def _per_image(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.flatten(1).sum(1)


def _labels(scores: Tensor, target: Any) -> Tensor:
    """Return the classes that a target means, in any form that :func:`class_labels` takes.

    Raises:
        BadTask: it means none.
    """
    wanted = (scores.shape[0], *scores.shape[2:])
    ready = isinstance(target, Tensor) and target.dtype == torch.int64 and tuple(target.shape) == wanted
    if ready and target.is_cuda:
        # to look at the numbers would wait for the device
        return target  # type: ignore[no-any-return]
    try:
        # probabilities in the type in which losses are computed
        return class_labels(scores.float(), target, None)
    except (TypeError, ValueError) as error:
        raise BadTask(str(error)) from error


def _cross_entropy(output: Any, target: Any) -> Tensor:
    main, *auxiliary = _scores_of(output)
    target = _labels(main, target)

    def of(scores: Tensor) -> Tensor:
        return _per_image(F.cross_entropy(scores.float(), target, reduction="none", ignore_index=IGNORED))

    found = of(main)
    for scores in auxiliary:
        found = found + _AUXILIARY * of(scores)
    return found


def _wrong(output: Any, target: Any) -> Tensor:
    """Return the share of wrong predictions of each image, over the positions with a label."""
    scores = _scores_of(output)[0]
    target = _labels(scores, target)
    if target.is_floating_point():
        # of probabilities the most likely class
        target = target.argmax(1)
    return _share(scores.argmax(1) != target, target != IGNORED)


def _among_five(output: Any, target: Any) -> Tensor:
    scores = _scores_of(output)[0]
    target = _labels(scores, target)
    if target.is_floating_point():
        target = target.argmax(1)
    first = scores.topk(min(5, scores.shape[1]), 1).indices
    return _share(~(first == target[:, None]).any(1), target != IGNORED)


def _share(missed: Tensor, known: Tensor) -> Tensor:
    """Return of each image the share of the positions with a label that are missed."""
    if missed.dim() == 1:
        return (missed & known).double()
    return (missed & known).double().flatten(1).sum(1) / known.double().flatten(1).sum(1).clamp_min(1)


def _divergence(output: Any, original: Any, *, temperature: float = 1.0) -> Tensor:
    wanted = F.log_softmax(_scores_of(original)[0].float() / temperature, 1)
    main, *auxiliary = _scores_of(output)

    def of(scores: Tensor) -> Tensor:
        ours = F.log_softmax(scores.float() / temperature, 1)
        return F.kl_div(ours, wanted, reduction="none", log_target=True).flatten(1).sum(1)

    found = of(main)
    for scores in auxiliary:
        found = found + _AUXILIARY * of(scores)
    return temperature**2 * found


def classification() -> Task:
    r"""Return the task of images with one class each; outputs are scores [N, classes].

    The loss is the cross-entropy, the score the share of wrong predictions (top-1 error; the top-5 error
    beside it), the distance T^2 KL(softmax(y' / T) || softmax(y / T)). Where a network returns a tuple, as
    GoogLeNet in training, the further outputs are auxiliary classifiers, whose losses count 0.3 each.

    Source: the distance at a temperature is Hinton et al.'s, arXiv:1503.02531.

    Example:
        >>> classification().scores(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])).tolist()
        [0.0, 1.0]
    """
    return Task(
        "classification",
        _cross_entropy,
        _wrong,
        ERROR,
        distance=_divergence,
        tempered=True,
        further={"top5_error": Figure(_among_five, Scale("top-5 error", "points", "lower"))},
        understand=class_labels,
        classifies=True,
    )


def is_usual(task: Task) -> bool:
    """Return whether a task is :func:`classification` and nothing else, of which result files say nothing.

    Example:
        >>> is_usual(classification()), is_usual(segmentation())
        (True, False)
    """
    return task.classifies and task.identity == classification().identity


def _check_maps(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 4:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise BadTask(f"the network gives {got}, expected scores of classes [N, classes, H, W]")
    return output


def _check_masks(output: Any, target: Tensor) -> Tensor:
    """Return the target of masks, int64 with -100 at pixels without a class."""
    scores = _check_maps(output)
    wanted = (scores.shape[0], *scores.shape[2:])
    if isinstance(target, Tensor) and target.shape[1:2] == (1,) and target.dim() == 4:
        target = target[:, 0]
    if not isinstance(target, Tensor) or tuple(target.shape) != wanted:
        got = str(tuple(target.shape)) if isinstance(target, Tensor) else type(target).__name__
        raise BadTask(f"masks of {got}, expected {wanted} as the network's maps have")
    found = target.long()
    found = torch.where(found == IGNORED_PIXEL, IGNORED, found)
    if found.is_cuda and not target.is_floating_point():
        # to look at the numbers would wait for the device
        return found
    classes = scores.shape[1]
    if target.is_floating_point() and not bool((target == target.round()).all()):
        raise BadTask(f"masks of numbers with a fraction, expected class numbers from 0 to {classes - 1}")
    strange = found[(found != IGNORED) & ((found < 0) | (found >= classes))]
    if strange.numel():
        raise BadTask(
            f"masks with the class {int(strange[0])}, but the network has {classes} classes; expected 0 to "
            f"{classes - 1}, and {IGNORED_PIXEL} or {IGNORED} for pixels without a class"
        )
    return found


def _mask_loss(output: Any, target: Tensor) -> Tensor:
    wanted = _check_masks(output, target)
    losses = F.cross_entropy(output.float(), wanted, reduction="none", ignore_index=IGNORED)
    return losses.flatten(1).sum(1) / (wanted != IGNORED).flatten(1).sum(1).clamp_min(1)


def _overlaps(output: Any, target: Tensor) -> Tensor:
    """Return (pixels of both, pixels of either) for each image and class, [N, classes, 2]."""
    wanted, classes = _check_masks(output, target), output.shape[1]
    known = wanted != IGNORED
    # pixels without a class go to a place of their own
    truth = torch.where(known, wanted, classes).flatten(1)
    given = torch.where(known, output.argmax(1), classes).flatten(1)
    both = torch.where(truth == given, truth, classes)

    def counted(places: Tensor) -> Tensor:
        empty = torch.zeros(len(places), classes + 1, dtype=torch.float64, device=places.device)
        return empty.scatter_add_(1, places, torch.ones_like(places, dtype=torch.float64))[:, :classes]

    common = counted(both)
    return torch.stack([common, counted(truth) + counted(given) - common], 2)


def _mean_overlap(counts: Tensor) -> Tensor:
    """Return the mean of intersection over union over the classes that occur, of counts [..., classes, 2]."""
    there = counts[..., 1] > 0
    shares = torch.where(there, counts[..., 0] / counts[..., 1].clamp_min(1), 0.0)
    # an image whose pixels all have no class has nothing wrong
    return torch.where(there.any(-1), shares.sum(-1) / there.sum(-1).clamp_min(1), 1.0)


def _right_pixels(output: Any, target: Tensor) -> Tensor:
    wanted = _check_masks(output, target)
    known = (wanted != IGNORED).flatten(1)
    right = (output.argmax(1) == wanted).flatten(1) & known
    return torch.where(known.any(1), right.sum(1) / known.sum(1).clamp_min(1), 1.0).double()


def _mean_divergence(output: Any, original: Any, *, temperature: float = 1.0) -> Tensor:
    positions = int(_check_maps(output).shape[2:].numel())
    return _divergence(output, original, temperature=temperature) / positions


def segmentation() -> Task:
    r"""Return the task of masks: outputs are scores [N, classes, H, W], targets class numbers [N, H, W].

    The loss is the mean cross-entropy over an image's pixels. The score is the mean IoU of each image,

    .. math:: \frac{1}{|C|} \sum_{c \in C} |A_c \cap B_c| / |A_c \cup B_c|,

    over the classes C that occur in its mask or in the prediction; beside it stand the mean IoU of the pixels
    of all images together and the pixel accuracy. The distance is the mean Kullback-Leibler divergence of a
    pixel. Pixels of value 255 or -100 count nowhere.

    Example:
        >>> mask = torch.tensor([[[0, 1], [1, 255]]])
        >>> output = torch.stack([mask == 0, mask > 0], 1).float()
        >>> segmentation().scores(output, mask).tolist()
        [1.0]
    """
    return Task(
        "segmentation",
        _mask_loss,
        lambda output, target: _mean_overlap(_overlaps(output, target)),
        Scale("mean IoU", "points", "higher"),
        distance=_mean_divergence,
        tempered=True,
        further={
            "pixel_accuracy": Figure(_right_pixels, Scale("pixel accuracy")),
            "mean_iou_of_all": Figure(
                _overlaps,
                Scale("mean IoU of all images together"),
                total=lambda total, images: float(_mean_overlap(total)),
            ),
        },
    )


def _several(output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise BadTask(f"the network gives {got}, expected scores [N, classes]")
    if not isinstance(target, Tensor) or target.shape != output.shape:
        got = str(tuple(target.shape)) if isinstance(target, Tensor) else type(target).__name__
        raise BadTask(f"targets of {got}, expected zeros and ones {tuple(output.shape)}")
    return output.float(), target.float()


def _with_labels(output: Any, target: Any) -> tuple[Tensor, Tensor]:
    scores, wanted = _several(output, target)
    if not wanted.is_cuda and not bool(((wanted >= 0) & (wanted <= 1)).all()):
        raise BadTask(
            f"targets from {float(wanted.min()):g} to {float(wanted.max()):g}, expected 1 for each class "
            "that an image has, and 0 for the others"
        )
    return scores, wanted


def _binary_losses(output: Any, target: Tensor) -> Tensor:
    scores, wanted = _with_labels(output, target)
    return F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").sum(1)


def _overlap_of_labels(output: Any, target: Tensor) -> Tensor:
    scores, wanted = _with_labels(output, target)
    given, truth = scores > 0, wanted > 0.5
    both, either = (given & truth).sum(1), (given | truth).sum(1)
    return torch.where(either > 0, both / either.clamp_min(1), 1.0).double()


def _all_right(output: Any, target: Tensor) -> Tensor:
    scores, wanted = _with_labels(output, target)
    return ((scores > 0) == (wanted > 0.5)).all(1).double()


def _binary_divergence(output: Any, original: Any) -> Tensor:
    scores, theirs = _several(output, original)
    wanted = theirs.sigmoid()
    losses = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
    least = F.binary_cross_entropy_with_logits(theirs, wanted, reduction="none")
    return (losses - least).sum(1)


def multilabel() -> Task:
    r"""Return the task of several classes at once: outputs and targets [N, classes], a logit and 0 or 1.

    The loss is the binary cross-entropy summed over classes; the score of an image is the Jaccard index
    ``|A and B| / |A or B|`` of the classes with a positive logit and those of the target (1 if both are
    empty), with the share of images whose classes are all right beside it; the distance is the
    Kullback-Leibler divergence of the classes' probabilities.

    Example:
        >>> multilabel().scores(torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[1, 0, 0]])).tolist()
        [0.5]
    """
    return Task(
        "multilabel",
        _binary_losses,
        _overlap_of_labels,
        Scale("Jaccard index"),
        distance=_binary_divergence,
        further={"all_right": Figure(_all_right, Scale("all classes right"))},
    )


def _two_images(output: Any, target: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(output, Tensor) or output.dim() != 4:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise BadTask(f"the network gives {got}, expected images [N, C, H, W]")
    if not isinstance(target, Tensor) or target.shape != output.shape:
        got = str(tuple(target.shape)) if isinstance(target, Tensor) else type(target).__name__
        raise BadTask(f"targets of {got}, expected images {tuple(output.shape)} as the network's are")
    return output.float(), target.float()


def _squared_error(output: Any, target: Any) -> Tensor:
    ours, wanted = _two_images(output, target)
    return (ours - wanted).square().flatten(1).mean(1)


def _signal_to_noise(output: Any, target: Any) -> Tensor:
    ours, wanted = _two_images(output, target)
    error = (ours.clamp(0, 1) - wanted).double().square().flatten(1).mean(1)
    return -10 * error.clamp_min(_LEAST_ERROR).log10()


def _similarity(output: Any, target: Any) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    ours, wanted = _two_images(output, target)
    found = structural_similarity_index_measure(
        ours.clamp(0, 1), wanted, reduction="none", data_range=1.0, gaussian_kernel=True
    )
    return torch.as_tensor(found).reshape(-1).double()


def image_to_image(ssim: bool | None = None) -> Task:
    r"""Return the task of images from images: outputs and targets [N, C, H, W] with values in [0, 1].

    The loss and the distance are the mean squared error; the score is

    .. math:: \mathrm{PSNR} = -10 \log_{10} \operatorname{mean} (y - t)^2,

    of the output cut off at 0 and 1, at most 100 dB; the mean structural similarity (Wang et al. 2004) beside
    it is torchmetrics' (the extra ``tasks``).

    Args:
        ssim: whether to report the structural similarity; None for where torchmetrics is installed.

    Raises:
        ModuleNotFoundError: ``ssim=True``, and torchmetrics is not installed.

    Example:
        >>> image = torch.rand(1, 3, 16, 16) * 0.5
        >>> [round(value, 3) for value in image_to_image().scores(image + 0.1, image).tolist()]
        [20.0]
    """
    from importlib.util import find_spec

    there = find_spec("torchmetrics") is not None
    if ssim and not there:
        raise ModuleNotFoundError("ssim=True: needs torchmetrics; pip install 'quincunx[tasks]'")
    further = {"ssim": Figure(_similarity, Scale("SSIM", ""))} if (there if ssim is None else ssim) else {}
    return Task(
        "image-to-image",
        _squared_error,
        _signal_to_noise,
        Scale("PSNR", "dB", "higher"),
        distance=_squared_error,
        further=further,
    )


def agreement(distance: Callable[[Any, Any], Tensor] = relative_distance) -> Task:
    """Return the task of giving the original network's outputs, of any structure; no labels are needed.

    Loss, score and distance are one: the squared distance to the original's output relative to its own
    squares (:func:`quincunx.measure.tasks.relative_distance`), in percent; lower is better. The original
    itself has 0%.

    Args:
        distance: another one: (output, original's output) -> [N].

    Example:
        >>> agreement().scores((torch.ones(1, 2), None), (torch.full((1, 2), 2.0), None)).tolist()
        [0.25]
    """
    return Task(
        "agreement",
        distance,
        distance,
        Scale("distance to the original network's outputs", "points", "lower"),
        distance=distance,
        against="original",
    )


READY: Mapping[str, Callable[[], Task]] = {
    "classification": classification,
    "multilabel": multilabel,
    "segmentation": segmentation,
    "image-to-image": image_to_image,
    "agreement": agreement,
}


def named(name: str) -> Task:
    """Return a ready task by name.

    Raises:
        ValueError: there is none; the nearest name is listed first.

    Example:
        >>> named("segmentation").scale.name
        'mean IoU'
    """
    if name not in READY:
        nearest = difflib.get_close_matches(name, READY, n=1, cutoff=0.0)
        listed = [*nearest, *(n for n in READY if n not in nearest)]
        raise ValueError(f"task={name!r}: expected {', '.join(listed)}, or package.module:function")
    return READY[name]()
