"""Loss and score of a network on part of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.data import ImageData, Items, Part, Resident, batches
from quincunx.data.epoch import shares
from quincunx.data.grey import grey_hint
from quincunx.measure.tasks import BadTask, Task, classification
from quincunx.measure.tasks.classes import IGNORED
from quincunx.measure.tasks.structure import mapped
from quincunx.modules import inference_mode_of
from quincunx.train.processes import ALONE, Ranks

__all__ = [
    "Evaluation",
    "Scored",
    "check_channels",
    "check_finite",
    "check_scores",
    "device_of",
    "evaluate",
    "images_at_once",
    "label_with",
    "score_images",
    "score_shared",
]

_AT_ONCE = 256
# pixels of the images that a dense network computes at a time: 64 maps of them take half a gigabyte
_PIXELS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Evaluation:
    """Figures of a network on a part of a data set.

    Attributes:
        loss: mean loss of an image.
        score: the task's score, a mean over images; in classification the share of wrong predictions.
        images: their number.
        further: the task's further figures, by name.
    """

    loss: float
    score: float
    images: int
    further: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Return the score of a classification: the share of wrong predictions (top-1 error), in [0, 1]."""
        return self.score


@dataclass(frozen=True)
class Scored:
    """Figures of each image of a part, in its order.

    Attributes:
        losses: [N], float64.
        scores: [N], float64.
        sums: of each further figure the sum over the images, [...], float64.
    """

    losses: Tensor
    scores: Tensor
    sums: dict[str, Tensor]


def evaluate(
    model: nn.Module,
    split: Part,
    data: ImageData,
    *,
    batch_size: int | None = None,
    ranks: Ranks = ALONE,
    workers: int | None = None,
    held: Resident | None = None,
    task: Task | None = None,
    original: nn.Module | None = None,
) -> Evaluation:
    """Return the loss, the score and the further figures of a network on one part of a data set.

    Several processes each evaluate a share of the images, and all get the result for all of them.

    Args:
        model: the network.
        split: the part.
        data: its data set.
        batch_size: images at a time; by default 256, and fewer of large images in other tasks than
            classification.
        ranks: this process's place among several.
        workers: processes that read streamed images.
        held: the part's images if they are on the network's device already.
        task: by default classification.
        original: the network that a task such as agreement compares with.

    Raises:
        ValueError: the network's outputs do not match the data set's classes, or its inputs the images; what
            the task refuses; a score that is not finite.
    """
    task = task or classification()
    found = score_images(
        model,
        split,
        data,
        batch_size=batch_size,
        rank=ranks.rank,
        world=ranks.world,
        workers=workers,
        held=held,
        task=task,
        original=original,
    )
    names = list(found.sums)
    values = [float(found.losses.sum()), float(found.scores.sum())]
    values += [float(v) for name in names for v in found.sums[name].flatten()]
    loss, score, *rest = ranks.total(values)
    further = {}
    for name in names:
        count = found.sums[name].numel()
        total = torch.tensor(rest[:count], dtype=torch.float64).view(found.sums[name].shape)
        further[name], rest = task.further[name].total(total, len(split)), rest[count:]
    return Evaluation(loss / len(split), score / len(split), len(split), further)


def score_images(
    model: nn.Module,
    split: Part,
    data: ImageData,
    *,
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    held: Resident | None = None,
    task: Task | None = None,
    original: nn.Module | None = None,
) -> Scored:
    """Return loss and score of each image, in the part's order; arguments as for :func:`evaluate`.

    Raises:
        ValueError: as :func:`evaluate`.
    """
    task = task or classification()
    losses: list[Tensor] = []
    scores: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    at_once = images_at_once(split, task) if batch_size is None else batch_size
    if held is None:
        source = batches(split, data, at_once, rank=rank, world=world, workers=workers)
    else:
        source = held.batches(held.drawn(at_once, rank=rank, world=world).to(held.device))
    with inference_mode_of(model):
        for output, target, images in _answered(model, data, source, task, original):
            losses.append(task.losses(output, target, images).double())
            scores.append(task.scores(output, target, images))
            for name in task.further:
                total = task.figure(name, output, target).sum(0)
                sums[name] = sums[name] + total if name in sums else total
    if not losses:
        # a process without images adds nothing; the shape of its sums is that of no figure
        one = torch.zeros(0, dtype=torch.float64)
        return Scored(
            one, one, {name: _nothing(model, data, split, task, name, original) for name in task.further}
        )
    # fetched at the end: waiting for a GPU after each batch would leave it idle
    found = torch.cat(scores).cpu()
    wrong = int((~found.isfinite()).sum())
    if wrong:
        first = int((~found.isfinite()).nonzero()[0])
        raise BadTask(
            f"task {task.name!r}: the score of {wrong:,} of {len(found):,} images is not finite; the "
            "first is "
            f"number {first} of {data.name}, {float(found[first])}"
        )
    return Scored(torch.cat(losses).cpu(), found, {name: total.cpu() for name, total in sums.items()})


def _nothing(
    model: nn.Module, data: ImageData, split: Part, task: Task, name: str, original: nn.Module | None
) -> Tensor:
    """Return zeros of the shape of a further figure's sum."""
    source = batches(split, data, 1)
    with inference_mode_of(model):
        for output, target, _ in _answered(model, data, [next(source)], task, original):
            return torch.zeros_like(task.figure(name, output, target).sum(0)).cpu()
    raise AssertionError("a part without images is refused")


def images_at_once(split: Part, task: Task, most: int = _AT_ONCE) -> int:
    """Return how many images are computed at a time: of maps that stay large, so many pixels together."""
    height, width = split.size
    return most if task.classifies else max(1, min(most, _PIXELS_AT_ONCE // (height * width)))


def _answered(
    model: nn.Module,
    data: ImageData,
    source: Iterable[tuple[Tensor, Any]],
    task: Task,
    original: nn.Module | None,
) -> Iterator[tuple[Any, Any, int]]:
    """Yield (output, target, number of images) of each batch, on the model's device."""
    check_channels(model, data)
    if task.needs_original and original is None:
        raise ValueError(f"original=None: task {task.name!r} compares with the original network's outputs")
    device = device_of(model)
    for images, targets in source:
        if not len(images):
            # this process's share of a batch may be none
            continue
        images = images.to(device)
        output = model(images)
        if task.classifies:
            check_scores(output, data)
        if task.needs_original and original is not None:
            # no mode is on where a reader goes on, who may never come back
            with inference_mode_of(original):
                wanted = task.taught_by(original(images))
            yield output, wanted, len(images)
        else:
            if task.classifies and bool(_unlabelled(targets).any()):
                raise BadTask(
                    f"{data.name}: an image with the label {IGNORED}, no class, cannot be judged; "
                    "leave it out of the test part"
                )
            yield output, mapped(lambda tensor: tensor.to(device), targets), len(images)


def _unlabelled(targets: Any) -> Tensor:
    """Return whether each image has no class; labels on a GPU come from folders, where all have one."""
    if not isinstance(targets, Tensor) or targets.is_cuda:
        return torch.zeros(1, dtype=torch.bool)
    ignored = targets == IGNORED
    return ignored.flatten(1).all(1) if ignored.dim() > 1 else ignored


def score_shared(score: Callable[..., Scored], count: int, at_once: int, ranks: Ranks) -> Scored:
    """Return what ``score(rank=, world=)`` gives of every image, in order, on each of several processes.

    Args:
        score: :func:`score_images` with its other arguments.
        count: images of the part.
        at_once: images at a time, of all processes together.
        ranks: this process's place among several.

    Raises:
        ValueError: as :func:`score_images`, on all processes if on one.
    """
    parts = ranks.gathered(lambda: score(rank=ranks.rank, world=ranks.world))
    first = next(part for part in parts if len(part.losses))
    sums = {name: torch.zeros_like(value) for name, value in first.sums.items()}
    for part in parts:
        for name, value in part.sums.items():
            sums[name] += value
    losses, scores = (
        _in_order([getattr(part, name) for part in parts], count, at_once) for name in ("losses", "scores")
    )
    return Scored(losses, scores, sums)


def _in_order(parts: list[Tensor], count: int, at_once: int) -> Tensor:
    """Return the values of a part's images in its order, from those of each process's share."""
    found = torch.empty(count, dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        numbers = [whole[ours] for whole, ours in shares(count, at_once, rank, len(parts), None)]
        found[torch.cat(numbers)] = part
    return found


def label_with(
    model: nn.Module,
    data: ImageData,
    workers: int | None = None,
    task: Task | None = None,
    ranks: Ranks = ALONE,
) -> ImageData:
    """Label images with the network's own predictions; later disagreement counts as an error.

    Images that already have labels keep them; in other tasks than classification nothing changes. Several
    processes each label a share, and all get all labels.

    Raises:
        ValueError: as :func:`score_images`.
    """
    if data.classes or not (task or classification()).classifies:
        return data
    if isinstance(data.train, Items):
        raise ValueError(
            f"{data.name}: how many classes it has is not known: say it with --classes, or by an attribute "
            "classes of the data set; without labels, task agreement needs none"
        )

    def answered(split: Part) -> tuple[Tensor, int]:
        answers, outputs = [torch.zeros(0, dtype=torch.long)], 0
        source = batches(split, data, _AT_ONCE, rank=ranks.rank, world=ranks.world, workers=workers)
        with inference_mode_of(model):
            for scores, *_ in _answered(model, data, source, classification(), None):
                answers.append(scores.argmax(1).cpu())
                outputs = scores.shape[1]
        return torch.cat(answers), outputs

    parts: dict[str, Part] = {}
    outputs = 0
    for key, split in (("train", data.train), ("test", data.test)):
        found = ranks.gathered(partial(answered, split))
        labels = _in_order([answers for answers, _ in found], len(split), _AT_ONCE)
        outputs = max(count for _, count in found)
        parts[key] = replace(split, labels=labels)  # type: ignore[arg-type]
    return replace(data, classes=tuple(map(str, range(outputs))), **parts)  # type: ignore[arg-type]


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_channels(model: nn.Module, data: ImageData) -> None:
    taken = getattr(model, "quincunx_spec", {}).get("in_channels", data.in_channels)
    if taken != data.in_channels:
        raise ValueError(
            f"model: takes images of {taken} channels, but those of {data.name} have "
            f"{data.in_channels}{grey_hint(taken, data)}"
        )


def check_finite(model: nn.Module) -> None:
    """Check that all weights of a network are finite.

    Raises:
        ValueError: names the first tensor with other values, and their number.
    """
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            wrong = int((~value.isfinite()).sum())
            if wrong:
                raise ValueError(
                    f"model: {wrong:,} of the {value.numel():,} values of {name} are not finite (NaN or "
                    "infinite): its training diverged, or its file is damaged"
                )


def check_scores(scores: object, data: ImageData) -> None:
    known = f"{data.name} has {len(data.classes)} classes" if data.classes else "one a class is needed"
    if not isinstance(scores, Tensor):
        raise ValueError(
            f"model: gives a {type(scores).__name__}, expected a tensor of scores; {known}; for other "
            "outputs name a task, such as agreement, which needs no classes"
        )
    if scores.dim() != 2:
        raise ValueError(
            f"model: gives scores of shape {tuple(scores.shape)}, expected [images, classes]; {known}"
        )
    if data.classes and scores.shape[1] != len(data.classes):
        raise ValueError(f"model: its head has {scores.shape[1]} outputs, but {known}")
