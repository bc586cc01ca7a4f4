"""Judge a network before and after: accuracy and its significance, response errors, batch norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quincunx.data import Drawn, ImageData, draw
from quincunx.measure.tasks import Task, classification, compare_paired, mcnemar
from quincunx.modules import inference_mode_of
from quincunx.train.evaluation import Scored, images_at_once

__all__ = [
    "inputs_of",
    "loss_on",
    "mcnemar",
    "reestimate_batch_norm",
    "response_errors",
    "sample_batches",
    "score_on",
]

# test accuracy within this many standard deviations of guessing suggests an untrained network
_CHANCE_DEVIATIONS = 2.0
# a loss of fewer images than this is no evidence
_FEW = 5


def sample_batches(
    data: ImageData,
    count: int,
    seed: int = 0,
    batch_size: int = 50,
    task: Task | None = None,
    workers: int | None = None,
) -> Drawn:
    """Return batches of ``count`` random training images and targets, not augmented, or of all there are.

    They are read anew in each pass, so their number is not limited by memory; see
    :class:`quincunx.data.drawn.Drawn`.
    """
    most = images_at_once(data.train, task or classification(), batch_size)
    return draw(data, count, seed, most, workers=workers)


def inputs_of(images: Iterable[tuple[Tensor, Any]]) -> Iterator[Tensor]:
    """Yield the images of batches without their targets."""
    return (x for x, _ in images)


def loss_on(
    model: nn.Module, images: Sequence[tuple[Tensor, Any]], task: Task, original: nn.Module | None
) -> float:
    """Return a network's summed loss on batches; against the original's outputs, its distance from them."""
    total = 0.0
    with inference_mode_of(model):
        for x, target in images:
            if task.needs_original and original is not None:
                with inference_mode_of(original):
                    target = task.taught_by(original(x))
            total += float(task.losses(model(x), target, len(x)).sum())
    return total


def score_on(
    model: nn.Module, images: Sequence[tuple[Tensor, Any]], task: Task, original: nn.Module | None
) -> float:
    """Return a network's mean score on batches; arguments as for :func:`loss_on`."""
    total, count = 0.0, 0
    with inference_mode_of(model):
        for x, target in images:
            if task.needs_original and original is not None:
                with inference_mode_of(original):
                    target = task.taught_by(original(x))
            total += float(task.scores(model(x), target, len(x)).sum())
            count += len(x)
    return total / count


def reestimate_batch_norm(model: nn.Module, inputs: Iterable[Tensor]) -> int:
    """Set each batch norm's mean and variance to those of some inputs; weights do not change.

    A replaced layer gives its successors different maps, whose statistics the network does not
    know. All batches have equal weight (momentum 1 / number of batches).

    Returns:
        The number of batch norms.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> reestimate_batch_norm(norm, [torch.full((4, 3, 2, 2), 5.0)]), norm.running_mean[0].item()
        (1, 5.0)
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    kept = [(norm, norm.momentum) for norm in norms]
    with inference_mode_of(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        try:
            for batch in inputs:
                model(batch)
        finally:
            for norm, momentum in kept:
                norm.momentum = momentum
    return len(norms)


def doubts_about(before: JudgedStage, data: ImageData) -> list[str]:
    """Return doubts that the network is trained and gets the kind of images that it was trained on."""
    tested, classes = len(before.scores), len(data.classes)
    if not before.task.classifies or not data.labelled or classes < 2 or not tested:
        return []
    chance = 1 / classes
    guessed = tested * chance + _CHANCE_DEVIATIONS * (tested * chance * (1 - chance)) ** 0.5
    if tested * (1 - before.score) > guessed:
        return []
    return [
        f"the network as it is has {100 * before.score:.2f}% of {tested:,} test images wrong, no better than "
        f"a guess among {classes} classes: are its weights the trained ones, the classes in the order of its "
        "training, and --mean and --std those of its training?"
    ]


def doubts_about_drop(before: JudgedStage, calibration: int, max_drop: float | None) -> list[str]:
    r"""Return doubts that images can show a loss as small as the one that is allowed.

    Two networks that are equally good, with a share e of N images wrong, differ by chance by up to about
    :math:`2 \sqrt{e / N}`: at the most as many images change sides as are wrong.

    Args:
        before: the original network on the test images.
        calibration: number of calibration images.
        max_drop: points of accuracy.
    """
    tested = len(before.scores)
    if max_drop is None or not before.task.classifies or not tested:
        return []
    doubts: list[str] = []
    shown = max_drop / 100 * calibration
    if 0 < shown < _FEW:
        enough = round(100 * _FEW / max_drop)
        doubts.append(
            f"max_drop={max_drop:g} points are {shown:.1f} of the {calibration:,} calibration images, which "
            f"the search looks at: too few to be sure; --calibration {enough} has {_FEW}"
        )
    chance = 100 * 2 * (before.score / tested) ** 0.5
    if 0 < max_drop < chance:
        needed = _rounded_up(before.score * (200 / max_drop) ** 2)
        doubts.append(
            f"max_drop={max_drop:g}: on {tested:,} test images, {100 * before.score:.1f}% of them wrong, "
            f"two equally good networks differ by up to {chance:.1f} points by chance; so small a loss shows "
            f"on {needed:,} images or more"
        )
    return doubts


def _rounded_up(count: float) -> int:
    """Return a number with one digit that is not zero, not below."""
    unit = 10 ** max(0, len(str(int(count))) - 1)
    return int(-(-count // unit) * unit)


def renormalise(
    model: nn.Module,
    images: Sequence[tuple[Tensor, Any]],
    inputs: Iterable[Tensor],
    task: Task | None = None,
    original: nn.Module | None = None,
) -> bool:
    """Re-estimate batch norm, and restore the old statistics if that raises the loss on the given images."""
    task = task or classification()
    before, state = loss_on(model, images, task, original), copy.deepcopy(model.state_dict())
    reestimate_batch_norm(model, inputs)
    if loss_on(model, images, task, original) <= before:
        return True
    model.load_state_dict(state)
    return False


def response_errors(
    model: nn.Module, fast: nn.Module, names: Sequence[str], inputs: Iterable[Tensor]
) -> dict[str, float]:
    r"""Return E|y - y'|^2 / E|y - mean y|^2 of layers, each with its input in the original network.

    Means are per channel over all images and positions; sums are float64.
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in names}

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_layer: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
            flat = [t.transpose(0, 1).flatten(1).double() for t in (y, y - fast.get_submodule(name)(*given))]
            row = (flat[0].sum(1), flat[0].square().sum(1), flat[1].square().sum(1))
            sums[name].append(torch.stack([*row, torch.full_like(row[0], flat[0].shape[1])]))

        return note

    handles = [model.get_submodule(name).register_forward_hook(compare(name)) for name in names]
    try:
        with inference_mode_of(model), inference_mode_of(fast):
            for batch in inputs:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, rows in sums.items():
        total, square, error, count = torch.stack(rows).sum(0)
        found[name] = float(error.sum() / (square - total.square() / count).sum())
    return found


class JudgedStage:
    """The network at one stage, with loss and score of each test image."""

    def __init__(
        self, name: str, model: nn.Module, judge: Callable[..., Scored], task: Task | None = None
    ) -> None:
        self.name, self.task = name, task or classification()
        found = judge(model)
        self.losses, self.scores, self.sums = found.losses, found.scores, found.sums

    @property
    def score(self) -> float:
        return float(self.scores.sum()) / len(self.scores)

    @property
    def cost(self) -> float:
        """Return a number that is lower for a better score."""
        return self.task.scale.cost(self.score)

    def against(self, first: JudgedStage) -> dict[str, Any]:
        scale, tested = self.task.scale, len(self.scores)
        further = {name: figure.total(self.sums[name], tested) for name, figure in self.task.further.items()}
        facts = {
            "name": self.name,
            "loss": float(self.losses.mean()),
            scale.key: self.score,
            **(further if self.task.classifies else {"further": further}),
        }
        if self is first:
            return facts
        compared = compare_paired(first.scores, self.scores, scale.better)
        if self.task.classifies:
            # it is McNemar's, as in every such file
            del compared["test"]
        return {**facts, **compared}
