"""Loss and error of a network on part of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.data import ImageData, Part, Resident, batches
from quincunx.modules import inference_mode_of
from quincunx.train.processes import ALONE, Ranks

__all__ = [
    "Evaluation",
    "check_channels",
    "check_finite",
    "check_scores",
    "device_of",
    "evaluate",
    "label_with",
    "score_images",
]

_AT_ONCE = 256


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and share of wrong predictions (top-1 error, in [0, 1]) over ``images`` images."""

    loss: float
    error: float
    images: int


def evaluate(
    model: nn.Module,
    split: Part,
    data: ImageData,
    *,
    batch_size: int = _AT_ONCE,
    ranks: Ranks = ALONE,
    workers: int | None = None,
    held: Resident | None = None,
) -> Evaluation:
    """Return the loss and top-1 error of a network on one part of a data set.

    Several processes each evaluate a share of the images, and all get the result for all of them. ``held``
    are the part's images if they are on the network's device already.

    Raises:
        ValueError: the network's outputs do not match the data set's classes, or its inputs the images.
    """
    losses, right, _ = score_images(
        model,
        split,
        data,
        batch_size=batch_size,
        rank=ranks.rank,
        world=ranks.world,
        workers=workers,
        held=held,
    )
    loss, errors = ranks.total([float(losses.sum()), float((~right).sum())])
    return Evaluation(loss / len(split), errors / len(split), len(split))


def score_images(
    model: nn.Module,
    split: Part,
    data: ImageData,
    *,
    batch_size: int = _AT_ONCE,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    held: Resident | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each image, in the part's order: cross-entropy (float64), whether the top-1 prediction was
    right, and whether the right class was among the top 5. ``held`` as for :func:`evaluate`.

    Raises:
        ValueError: the network's outputs do not match the data set's classes, or its inputs the images.
    """
    losses: list[Tensor] = []
    right: list[Tensor] = []
    among: list[Tensor] = []
    if held is None:
        source = batches(split, data, batch_size, rank=rank, world=world, workers=workers)
    else:
        source = held.batches(held.drawn(batch_size, rank=rank, world=world).to(held.device))
    with inference_mode_of(model):
        for scores, answers in _scored(model, data, source):
            losses.append(F.cross_entropy(scores.float(), answers, reduction="none").double())
            right.append(scores.argmax(1) == answers)
            first = scores.topk(min(5, scores.shape[1])).indices
            among.append((first == answers[:, None]).any(1))
    return _fetched(losses, torch.float64), _fetched(right, torch.bool), _fetched(among, torch.bool)


def _fetched(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Fetch all parts at the end: waiting for a GPU after each batch would leave it idle."""
    return torch.cat(parts).cpu() if parts else torch.zeros(0, dtype=dtype)


def _scored(
    model: nn.Module, data: ImageData, source: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (scores, labels) of each batch, on the model's device."""
    check_channels(model, data)
    device = device_of(model)
    for images, labels in source:
        scores = model(images.to(device))
        check_scores(scores, data)
        yield scores, labels.to(device)


def label_with(model: nn.Module, data: ImageData, workers: int | None = None) -> ImageData:
    """Label images with the network's own predictions; later disagreement counts as an error.

    Images that already have labels keep them.

    Raises:
        ValueError: as :func:`score_images`.
    """
    if data.classes:
        return data
    parts: dict[str, Part] = {}
    outputs = 0
    with inference_mode_of(model):
        for key, split in (("train", data.train), ("test", data.test)):
            answers = []
            for scores, _ in _scored(model, data, batches(split, data, _AT_ONCE, workers=workers)):
                answers.append(scores.argmax(1).cpu())
                outputs = scores.shape[1]
            parts[key] = replace(split, labels=torch.cat(answers))
    return replace(data, classes=tuple(map(str, range(outputs))), **parts)  # type: ignore[arg-type]


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_channels(model: nn.Module, data: ImageData) -> None:
    taken = getattr(model, "quincunx_spec", {}).get("in_channels", data.in_channels)
    if taken != data.in_channels:
        raise ValueError(
            f"model: takes images of {taken} channels, but those of {data.name} have {data.in_channels}"
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
        raise ValueError(f"model: gives a {type(scores).__name__}, expected a tensor of scores; {known}")
    if scores.dim() != 2:
        raise ValueError(
            f"model: gives scores of shape {tuple(scores.shape)}, expected [images, classes]; {known}"
        )
    if data.classes and scores.shape[1] != len(data.classes):
        raise ValueError(f"model: its head has {scores.shape[1]} outputs, but {known}")
