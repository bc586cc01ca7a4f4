"""Judge a network before and after: accuracy and its significance, response errors, batch norm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quincunx.data import ImageData, batches
from quincunx.modules import inference_mode_of

__all__ = ["mcnemar", "reestimate_batch_norm", "response_errors", "sample_batches"]

# test accuracy within this many standard deviations of guessing suggests an untrained network
_CHANCE_DEVIATIONS = 2.0


def sample_batches(
    data: ImageData, count: int, seed: int = 0, batch_size: int = 50
) -> list[tuple[Tensor, Tensor]]:
    """Return batches of ``count`` random training images, not augmented; fewer if there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor]] = []
    left = count
    for images, labels in batches(data.train, data, batch_size, generator=generator):
        found.append((images[:left], labels[:left]))
        left -= len(found[-1][1])
        if left < 1:
            break
    return found


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


def mcnemar(before: Tensor, after: Tensor) -> dict[str, float]:
    """McNemar's exact two-sided test of two networks on the same images, from their correct predictions.

    Returns:
        "lost" (right before, wrong after), "won", and "p" of a difference as large by chance.

    Example:
        >>> found = mcnemar(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        >>> found["lost"], found["won"], found["p"]
        (1, 0, 1.0)
    """
    from scipy.stats import binomtest

    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    p = float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0
    return {"lost": lost, "won": won, "p": p}


def doubts_about(before: JudgedStage, data: ImageData) -> list[str]:
    """Return doubts that the network is trained and gets the kind of images that it was trained on."""
    tested, classes = len(before.right), len(data.classes)
    if not data.labelled or classes < 2 or not tested:
        return []
    chance = 1 / classes
    guessed = tested * chance + _CHANCE_DEVIATIONS * (tested * chance * (1 - chance)) ** 0.5
    if int(before.right.sum()) > guessed:
        return []
    return [
        f"the network as it is has {100 * before.error:.2f}% of {tested:,} test images wrong, no better than "
        f"a guess among {classes} classes: are its weights the trained ones, the classes in the order of its "
        "training, and --mean and --std those of its training?"
    ]


def renormalise(model: nn.Module, images: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> bool:
    """Re-estimate batch norm, and restore the old statistics if that raises the loss on the given images."""

    def loss() -> float:
        with inference_mode_of(model):
            return sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in images)

    before, state = loss(), copy.deepcopy(model.state_dict())
    reestimate_batch_norm(model, inputs)
    if loss() <= before:
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
    """The network at one stage, with its correct predictions on the test images."""

    def __init__(self, name: str, model: nn.Module, judge: Callable[..., tuple[Tensor, ...]]) -> None:
        self.name = name
        self.losses, self.right, self.among = judge(model)

    @property
    def error(self) -> float:
        return int((~self.right).sum()) / len(self.right)

    def against(self, first: JudgedStage) -> dict[str, Any]:
        facts = {
            "name": self.name,
            "loss": float(self.losses.mean()),
            "error": self.error,
            "top5_error": float((~self.among).double().mean()),
        }
        return facts if self is first else {**facts, **mcnemar(first.right, self.right)}
