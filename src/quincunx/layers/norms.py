"""Batch norm with the addition and the activation behind it, in two passes each way over maps in training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torchs
from torch.utils.module_tracker import ModuleTracker

from quincunx.layers.paired import SampledMap, of_grid
from quincunx.layers.sampled import SampledConvTranspose2d
from quincunx.ops.norm import ACTIVATIONS, norm_act_and_input
from quincunx.ops.select import serving
from quincunx.ops.traced import in_forward_mode

__all__ = ["NormAct2d", "has_global_hooks", "normalise", "normalise_apart", "spread_onto"]


def normalise(
    x: Tensor, norm: nn.BatchNorm2d, activation: str = "none", shortcut: Tensor | None = None
) -> Tensor:
    r"""Apply a batch norm, add a map and apply an activation: act(norm(x) + shortcut).

    .. math:: y = \mathrm{act}\Big(w_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c + r\Big)

    A training step on the CPU does it in two passes over the maps forward and two backward, and keeps for
    the backward pass the norm's input and, with a shortcut, the result. It needs a map in channels_last of
    float32 or bfloat16, and an ordinary ``nn.BatchNorm2d`` in training mode without hooks. Everything else
    calls the norm, adds and activates: evaluation, other classes such as ``SyncBatchNorm``, tracing, export.

    Args:
        x: map [N, C, H, W], or a sampled map [N, C, m, 1].
        norm: its running statistics are updated as its own forward does.
        activation: "none", "relu" or "relu6".
        shortcut: r, a map of the result's shape, or None.

    Returns:
        The map, of the shape and dtype of x.

    Raises:
        ValueError: an unknown activation, or one value per channel, as torch has it.

    Source: Ioffe and Szegedy, arXiv:1502.03167, algorithm 1 and the formulas after it.

    Example:
        >>> x, norm = torch.randn(2, 3, 4, 4), nn.BatchNorm2d(3)
        >>> torch.allclose(normalise(x, norm, "relu"), torch.relu(norm(x)), atol=1e-6)
        True
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if not (_is_plain(norm) and _is_served(x, norm, shortcut)) or in_forward_mode():
        return _composed(x, norm, activation, shortcut)
    size = None
    if isinstance(x, SampledMap):
        size = x.grid_size
        x = x.as_subclass(Tensor)
    y, mean, variance = torch.ops.quincunx.norm_act(
        x, norm.weight, norm.bias, shortcut, norm.eps, ACTIVATIONS[activation]
    )
    _track(norm, mean, variance, x.numel() // x.shape[1])
    return y if size is None else of_grid(y, size)


def normalise_apart(x: Tensor, norm: nn.BatchNorm2d, activation: str = "none") -> tuple[Tensor, Tensor]:
    """Return :func:`normalise` of a map and the map itself, for a network that also reads it elsewhere.

    The gradients of both are added in the pass that writes the norm's own, and not in one of their own.

    Args:
        x, norm, activation: those of :func:`normalise`.

    Returns:
        act(norm(x)), and x: what else reads the map has to read this one.

    Example:
        >>> inner, x = normalise_apart(torch.randn(2, 3, 4, 4), nn.BatchNorm2d(3), "relu")
        >>> inner.shape == x.shape
        True
    """
    # compilers add gradients where they write them anyway
    apart = torch.compiler.is_compiling() or type(x) is not Tensor
    if apart or not (_is_plain(norm) and _is_served(x, norm, None)):
        return normalise(x, norm, activation), x
    x, y, mean, variance = norm_act_and_input(x, norm.weight, norm.bias, norm.eps, ACTIVATIONS[activation])
    _track(norm, mean, variance, x.numel() // x.shape[1])
    return y, x


def _composed(x: Tensor, norm: nn.Module, activation: str, shortcut: Tensor | None) -> Tensor:
    z: Tensor = norm(x)
    if shortcut is not None:
        z = z + shortcut
    if activation == "none":
        return z
    return F.relu(z) if activation == "relu" else F.relu6(z)


def spread_onto(
    shortcut: Tensor, y: Tensor, up: SampledConvTranspose2d, size: Sequence[int] | None = None
) -> Tensor:
    """Return up(y) + shortcut: a sampled map spread over all positions, and a map added.

    A training step on the CPU writes the sum in one pass, under the conditions of :func:`normalise`.

    Args:
        shortcut: map [N, O, H, W].
        y: sampled map [N, C, m, 1].
        up: the second half of a spatial bottleneck.
        size: (H, W) if known from elsewhere; the shortcut's otherwise.

    Returns:
        The map [N, O, H, W].

    Example:
        >>> from quincunx.sampling import CHESSBOARD
        >>> up = SampledConvTranspose2d(4, 3, 3, sampling=CHESSBOARD, padding=1)
        >>> spread_onto(torch.zeros(2, 3, 4, 4), torch.randn(2, 4, 8, 1), up).shape
        torch.Size([2, 3, 4, 4])
    """
    size = shortcut.shape[2:] if size is None else size
    if _is_plain(up, SampledConvTranspose2d) and _runs_here(y) and type(shortcut) is Tensor:
        whole = (y.shape[0], up.out_channels, *size)
        if tuple(shortcut.shape) == whole and shortcut.dtype == y.dtype and _is_row_map(shortcut):
            joined: Tensor = up(y, size, shortcut)
            return joined
    apart: Tensor = up(y, size)
    return apart + shortcut


def _is_plain(module: nn.Module, kind: type[nn.Module] = nn.BatchNorm2d) -> bool:
    """Return whether a module is in training and its call does what this class says and no more."""
    return (
        type(module) is kind
        and module.training
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not has_global_hooks()
    )


def has_global_hooks() -> bool:
    """Return whether hooks of all modules see the maps between them, in whatever thread.

    Those of torch's counters do not: they follow names. A count in one thread would else change what another
    thread's training computes, by rounding.
    """
    if not torchs._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    forward = (torchs._global_forward_pre_hooks, torchs._global_forward_hooks)
    backward = (torchs._global_backward_pre_hooks, torchs._global_backward_hooks)
    found = [hook for hooks in (*forward, *backward) for hook in list(hooks.values())]
    return any(type(getattr(hook, "__self__", None)) is not ModuleTracker for hook in found)


def _is_served(x: Tensor, norm: nn.BatchNorm2d, shortcut: Tensor | None) -> bool:
    """Return whether the operator takes a map with a norm and a shortcut."""
    if not _runs_here(x) or x.shape[1] != norm.num_features or x.numel() <= x.shape[1]:
        return False
    if norm.weight is not None and norm.weight.dtype == torch.float64:
        return False
    return shortcut is None or (
        type(shortcut) is Tensor and shortcut.shape == x.shape and shortcut.dtype == x.dtype
    )


def _runs_here(x: Tensor) -> bool:
    """Return whether our kernels take a map: stand-ins of tracers and other devices are not for them."""
    compiling = torch.compiler.is_compiling()
    if torch.compiler.is_exporting() if compiling else torch._C._get_tracing_state() is not None:
        return False
    if not compiling and torch._C._are_functorch_transforms_active():
        # vmap, grad and jvp take apart what is called, and need torch's own operators
        return False
    if type(x) is not Tensor and (type(x) is not SampledMap or compiling):
        return False
    return _is_row_map(x) and (compiling or serving(x.device, x.dtype) == "native")


def _is_row_map(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, values: int) -> None:
    """Update the running statistics; of the variance with values - 1, as torch does."""
    so_far, spread = norm.running_mean, norm.running_var
    if not norm.track_running_stats or so_far is None or spread is None:
        return
    with torch.no_grad():
        share: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                # a tensor, since a number would make a compiler stop here
                share = norm.num_batches_tracked.to(so_far.dtype).reciprocal()
        so_far.lerp_(mean.to(so_far.dtype), share)
        spread.lerp_((variance * (values / (values - 1))).to(spread.dtype), share)


class NormAct2d(nn.Module):
    """A network's batch norm with the addition and the activation that follow it: :func:`normalise`.

    It holds the network's own norm, so that weights, statistics and mode are those of the network.

    Args:
        norm: any batch norm of maps.
        activation: "none", "relu" or "relu6".

    Example:
        >>> NormAct2d(nn.BatchNorm2d(3), "relu")(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, norm: nn.BatchNorm2d, activation: str = "none") -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return normalise(x, self.norm, self.activation, shortcut)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
