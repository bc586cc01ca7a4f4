"""Which positions are worth computing: masks by name, and the impact of each position on the loss."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.sampling import Positions, Random, Sampling, Uniform
from quincunx.streams import Batch, evaluation

__all__ = ["MASKS", "Loss", "highest", "impacts", "mask_of", "self_loss"]

MASKS = ("impact", "uniform", "uniform-eq8", "random")

# (output of the network, target or None) -> the sum of the images' losses
Loss = Callable[[Any, Any], Tensor]


def self_loss(output: Any, target: Any) -> Tensor:
    """Cross-entropy, summed over images: with the targets, or with what the network predicts itself.

    Raises:
        TypeError: the network's output is not a tensor of logits [N, classes, ...].
    """
    if not isinstance(output, Tensor) or output.dim() < 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"loss=None: expected logits [N, classes, ...] from the network, got {got}; give a loss"
        )
    if target is None:
        target = output.detach().argmax(1)
    return F.cross_entropy(output, target, reduction="sum")


def impacts(
    network: nn.Module, modules: Mapping[str, nn.Module], data: Iterable[Batch], loss: Loss | None = None
) -> dict[str, Tensor]:
    r"""The impact of each position of the outputs of some modules, in one pass with gradients.

    .. math:: I_p = E \sum_c \left| \frac{\partial L}{\partial O_{c,p}}\, O_{c,p} \right|

    is, to first order, what setting a position's values to zero changes in the loss of an image.

    Args:
        network: run in evaluation mode; its parameters get no gradients.
        modules: parts of it that return maps [N, C, H, W], each called once in a forward.
        data: batches, with targets or without.
        loss: of (output, target), summed over the images; by default :func:`self_loss`.

    Returns:
        For each name the impacts, float64 [H, W].

    Raises:
        ValueError: a loss that is not finite, a module that was not called, no batches, or maps whose
            size changes from batch to batch; layer and batch are named.

    Source: Lin et al., ESPACE (AAAI 2017), eqs. 9 to 11.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> impacts(net, {"conv": net[0]}, [Batch(0, torch.randn(2, 3, 6, 6))])["conv"].shape
        torch.Size([4, 4])
    """
    sums: dict[str, Tensor] = {}
    images = 0
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
                # a copy goes on: what follows may write in place
                return outputs[name].clone()

            stack.callback(module.register_forward_hook(see, prepend=True).remove)
        for batch in data:
            outputs.clear()
            total = (loss or self_loss)(network(batch.input), batch.target)
            if missing := set(modules) - set(outputs):
                raise ValueError(f"calibration: batch {batch.index} never reaches layer {min(missing)!r}")
            if not bool(total.isfinite()):
                raise ValueError(f"calibration: batch {batch.index} has loss {float(total.detach())}")
            gradients = torch.autograd.grad(total, list(outputs.values()), allow_unused=True)
            for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
                if gradient is None:
                    gradient = torch.zeros_like(output)
                found = (gradient * output.detach()).double().abs().sum((0, 1))
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
    if not images:
        raise ValueError("calibration: holds no images")
    return {name: total / images for name, total in sums.items()}


def highest(impact: Tensor, rate: float) -> Positions:
    """The max(1, round(rate H W)) positions of the highest impact; of equals the first in row-major order.

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
    """A mask by name.

    Args:
        kind: "impact", "uniform" (an even grid), "uniform-eq8" (the paper's formula) or "random".
        rate: share of the positions that are computed.
        seed, place: of a random mask; each place, such as "conv2/1", has a draw of its own.
        impact: [H, W], of an impact mask.

    Raises:
        ValueError: another kind, or an impact mask without impacts.
    """
    if kind == "uniform":
        return Uniform(rate)
    if kind == "uniform-eq8":
        return Uniform(rate, rule="eq8")
    if kind == "random":
        return Random(rate, zlib.crc32(f"{seed}:{place}".encode()))
    if kind == "impact" and impact is not None:
        return highest(impact, rate)
    raise ValueError(f"mask={kind!r}: expected one of {', '.join(MASKS)} (impact with impacts)")
