"""Choose the positions to compute: masks by name, and the impact of each position on the loss."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.measure.tasks.classes import IGNORED, class_labels
from quincunx.methods.fitting.lattices import lattice_of
from quincunx.modules import evaluation, first_line
from quincunx.sampling import Positions, Random, Sampling, Uniform
from quincunx.surgery.calibration import Batch, Context

__all__ = [
    "ESTIMATED",
    "MASKS",
    "Loss",
    "highest",
    "impacts",
    "mask_of",
    "self_loss",
    "without_gradient",
]

MASKS = ("impact", "residual", "lattice", "uniform", "uniform-eq8", "random")
# those that are estimated on data
ESTIMATED = ("impact", "residual")

# (output of the network, target or None) -> the sum of the images' losses
Loss = Callable[[Any, Any], Tensor]


def self_loss(output: Any, target: Any, index: int = 0) -> Tensor:
    """Return the cross-entropy, summed over images, with the targets or the network's own predictions.

    Args:
        output: logits [N, classes, ...].
        target: as :func:`class_labels` reads it, or None.
        index: the number of the batch, for messages.

    Raises:
        TypeError: the network's output is not a tensor of logits.
        ValueError: targets that :func:`class_labels` refuses, or logits of one class.
    """
    if not isinstance(output, Tensor) or output.dim() < 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"loss=None: expected logits [N, classes, ...] from the network, got {got}; give a loss"
        )
    if output.shape[1] == 1:
        raise ValueError(
            f"loss=None: the network gives {tuple(output.shape)}, one class, of which the cross-entropy is "
            "always 0; give a loss"
        )
    wanted = output.detach().argmax(1) if target is None else class_labels(output, target, index)
    return F.cross_entropy(output, wanted, ignore_index=IGNORED, reduction="sum")


def impacts(
    network: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Batch],
    loss: Loss | None = None,
    *,
    residual: bool = False,
) -> dict[str, Tensor]:
    r"""Return the impact of each position of the outputs of some modules, from one pass with gradients.

    .. math:: I_p = E \sum_c \left| \frac{\partial L}{\partial O_{c,p}}\, O_{c,p} \right|

    is, to first order, the change in the loss of an image if a position's values become zero. With
    ``residual`` the last factor is O_{c,p} - \bar O_{c,p}, where \bar O is the mean of the neighbours above,
    below, left and right: the change if the position is filled from them.

    Args:
        network: run in evaluation mode; its parameters get no gradients.
        modules: parts of it that return maps [N, C, H, W], each called once in a forward.
        data: batches, with targets or without.
        loss: of (output, target), summed over the images; by default :func:`self_loss`.
        residual: of what neighbours do not say of a position, instead of its values.

    Returns:
        The impacts by name, float64 [H, W]; zeros for a module that the loss does not depend on.

    Raises:
        TypeError: a loss that is not a number.
        ValueError: a loss that is not finite, that fails, or that has no gradient to any module; labels that
            cannot be used; a module that was not called, no batches, or maps whose size changes from batch
            to batch; the message names layer and batch.

    Source: Lin et al., ESPACE (AAAI 2017), eqs. 9 to 11.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> impacts(net, {"conv": net[0]}, [Batch(0, torch.randn(2, 3, 6, 6))])["conv"].shape
        torch.Size([4, 4])
    """
    sums, images, index = _impact_sums(network, modules, data, loss, residual)
    return _mean_impacts(sums, images, index)


def impacts_in(
    context: Context, modules: Mapping[str, nn.Module], loss: Loss | None = None, *, residual: bool = False
) -> dict[str, Tensor]:
    """Return :func:`impacts` in a context's network, over which several processes may sum.

    Args:
        context: the network as changed so far, the data, and the loss where none is given.
        modules: as of :func:`impacts`.
        loss: as of :func:`impacts`; one of the method's own is not sent to other processes.
        residual: as of :func:`impacts`.
    """
    if loss is not None:
        return impacts(context.network, modules, context.data, loss, residual=residual)
    # another process has its own copies of the modules, in the same places
    paths = {module: path for path, module in context.network.named_modules()}
    places = {name: paths[module] for name, module in modules.items()}
    found = context.total(partial(_context_sums, places, residual))
    counts = found.pop("counts")
    return _mean_impacts(found, int(counts[0]), int(counts[1]) - 1)


def _context_sums(places: dict[str, str], residual: bool, context: Context) -> dict[str, Tensor]:
    modules = {name: context.network.get_submodule(path) for name, path in places.items()}
    sums, images, index = _impact_sums(context.network, modules, context.data, context.loss, residual)
    return {**sums, "counts": torch.tensor([images, index + 1 - context.data.start], dtype=torch.float64)}


def _impact_sums(
    network: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Batch],
    loss: Loss | None,
    residual: bool,
) -> tuple[dict[str, Tensor], int, int]:
    """Return the summed impacts, the number of images, and the last batch's number, -1 without one."""
    sums: dict[str, Tensor] = {}
    images = 0
    index = -1
    with _gradients(network, modules) as outputs:
        for batch in data:
            index = batch.index
            gradients = _gradients_of(network, modules, batch, loss, outputs)
            if gradients is None:
                continue
            for name, output in outputs.items():
                gradient = gradients.get(name)
                if gradient is None:
                    gradient = torch.zeros_like(output)
                changed = output.detach() - (_neighbours(output.detach()) if residual else 0)
                found = (gradient * changed).double().abs().sum((0, 1))
                if not bool(found.isfinite().all()):
                    raise ValueError(
                        f"calibration: layer {name!r}: batch {batch.index} gives a value that is not finite"
                    )
                if name in sums and sums[name].shape != found.shape:
                    raise ValueError(
                        f"calibration: layer {name!r}: batch {batch.index} has maps of {tuple(found.shape)}, "
                        f"earlier ones of {tuple(sums[name].shape)}; impact masks need one input size"
                    )
                sums[name] = sums[name] + found if name in sums else found
            images += batch.input.shape[0]
    return sums, images, index


def _mean_impacts(sums: Mapping[str, Tensor], images: int, index: int) -> dict[str, Tensor]:
    if index < 0:
        raise ValueError("calibration: holds no images")
    if not images:
        raise ValueError(
            f"calibration: all labels, from batch 0 to batch {index}, are {IGNORED}, which leaves an image "
            "out: there is nothing to estimate impacts on"
        )
    return {name: total / images for name, total in sums.items()}


def _neighbours(x: Tensor) -> Tensor:
    """At each position the mean of the neighbours above, below, left and right that are inside; 0 of none."""
    cross = x.new_tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]])[None, None]
    flat = x.reshape(-1, 1, *x.shape[2:])
    count = F.conv2d(torch.ones_like(flat[:1]), cross, padding=1)
    return (F.conv2d(flat, cross, padding=1) / count.clamp_min(1)).view(x.shape)


def without_gradient(
    network: nn.Module, modules: Mapping[str, nn.Module], batch: Batch, loss: Loss | None = None
) -> set[str]:
    """Return the names of the modules to which a loss has no gradient, for example under
    ``torch.no_grad()``, after ``detach()``, or if the loss does not depend on them.

    Raises:
        TypeError, ValueError: as :func:`impacts`.
    """
    with _gradients(network, modules) as outputs:
        found = _gradients_of(network, modules, batch, loss, outputs)
        return set() if found is None else set(modules) - set(found)


@contextmanager
def _gradients(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Give gradients to the outputs of some modules, collected at each forward, and to nothing else."""
    with ExitStack() as stack:
        stack.enter_context(evaluation(network))
        stack.enter_context(torch.enable_grad())
        for parameter in network.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        outputs: dict[str, Tensor] = {}
        for name, module in modules.items():

            def see(_: nn.Module, __: Any, output: Tensor, name: str = name) -> Tensor:
                outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
                # return a copy: later operations may write in place
                return outputs[name].clone()

            stack.callback(module.register_forward_hook(see, prepend=True).remove)
        yield outputs


def _gradients_of(
    network: nn.Module,
    modules: Mapping[str, nn.Module],
    batch: Batch,
    loss: Loss | None,
    outputs: dict[str, Tensor],
) -> dict[str, Tensor] | None:
    """Return the gradients of a batch's loss that exist; None if all labels are excluded.

    Raises:
        TypeError, ValueError: as :func:`impacts`.
    """
    outputs.clear()
    total = _loss_of(batch.ask(network), batch, loss)
    if missing := set(modules) - set(outputs):
        raise ValueError(f"calibration: batch {batch.index} never reaches layer {min(missing)!r}")
    if total is None:
        return None
    if not bool(total.isfinite()):
        raise ValueError(f"calibration: batch {batch.index} has loss {float(total.detach())}")
    reached = [name for name, output in outputs.items() if output.requires_grad]
    if not total.requires_grad or not reached:
        return {}
    found = torch.autograd.grad(total, [outputs[name] for name in reached], allow_unused=True)
    return {name: one for name, one in zip(reached, found, strict=True) if one is not None}


def _loss_of(output: Any, batch: Batch, loss: Loss | None) -> Tensor | None:
    """Return the loss of a batch; None if all its labels are excluded."""
    if loss is None:
        total = self_loss(output, batch.target, batch.index)
        if batch.target is not None:
            labels = class_labels(output, batch.target, batch.index)
            if not labels.is_floating_point() and bool((labels == IGNORED).all()):
                return None
        return total
    try:
        total = loss(output, batch.target)
    except Exception as error:
        raise ValueError(
            f"loss: of batch {batch.index} of the calibration data it raises {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(total, Tensor) or total.numel() != 1:
        got = f"shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
        raise TypeError(f"loss: of batch {batch.index} it gives a {got}; expected one number, a tensor")
    return total.reshape(())


def highest(impact: Tensor, rate: float) -> Positions:
    """Return the max(1, round(rate H W)) positions of the highest impact; ties in row-major order.

    Args:
        impact: [H, W].
        rate: in (0, 1].

    Example:
        >>> highest(torch.tensor([[1.0, 3.0], [3.0, 0.0]]), 0.25).positions(2, 2).tolist()
        [[0, 1]]
    """
    count = Random(rate).count(*impact.shape)
    order = impact.flatten().cpu().argsort(descending=True, stable=True)
    mask = torch.zeros(impact.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return Positions(mask.view(impact.shape))


def mask_of(kind: str, rate: float, *, seed: int, place: str, impact: Tensor | None = None) -> Sampling:
    """Return a mask by name.

    Args:
        kind: "impact", "residual" (the same of other impacts), "lattice" (cosets), "uniform" (an even grid),
            "uniform-eq8" (the paper's formula) or "random".
        rate: share of the positions that are computed.
        seed: of a random mask.
        place: name such as "conv2/1"; random masks of different places differ.
        impact: [H, W], for an impact mask.

    Raises:
        ValueError: another kind, an impact mask without impacts, or a rate that no lattice has.
    """
    if kind == "lattice":
        return lattice_of(rate)
    if kind == "uniform":
        return Uniform(rate)
    if kind == "uniform-eq8":
        return Uniform(rate, rule="eq8")
    if kind == "random":
        return Random(rate, zlib.crc32(f"{seed}:{place}".encode()))
    if kind in ESTIMATED and impact is not None:
        return highest(impact, rate)
    raise ValueError(f"mask={kind!r}: expected one of {', '.join(MASKS)} (impact and residual with impacts)")
