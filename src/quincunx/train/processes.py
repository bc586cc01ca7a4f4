"""Several processes that work on one network: their ranks and their exchanges."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["ALONE", "Ranks", "as_known", "batch_norm_across", "is_first", "joined", "to_be_told"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes that work together.

    Attributes:
        rank: of this process; the first process writes the run's files.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over all processes."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(v) for v in sums]

    def from_first(self, compute: Callable[[], T]) -> T:
        """Return what the first process computes on every one; its exceptions are raised on all."""
        if self.world == 1:
            return compute()
        # the second entry is an error of the user or the machine, so that the others do not wait in vain
        message: list[Any] = [None, None]
        if self.first:
            try:
                message[0] = compute()
            except (ValueError, OSError, RuntimeError) as error:
                message[1] = error
        dist.broadcast_object_list(message, src=0)
        if message[1] is not None:
            raise as_known(message[1])
        result: T = message[0]
        return result

    def gathered(self, compute: Callable[[], T]) -> list[T]:
        """Return what each process computes, in the order of ranks, on every one.

        An exception of any process is raised on all, so that none waits for one that failed.
        """
        if self.world == 1:
            return [compute()]
        mine: list[Any] = [None, None]
        try:
            mine[0] = compute()
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            mine[1] = error
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        for _, failure in found:
            if failure is not None:
                raise as_known(failure)
        return [value for value, _ in found]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Within, processes do not exchange; if one fails, its exception is raised on all at the end."""
        if self.world == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            failure = error

        def report() -> None:
            if failure is not None:
                raise failure

        self.gathered(report)


ALONE = Ranks()


def as_known(error: Exception) -> Exception:
    """Return an exception, marked as one that all processes of a job have, so that the first one tells it."""
    error.quincunx_known = True  # type: ignore[attr-defined]
    return error


def to_be_told(error: object) -> bool:
    """Return whether this process is the one that tells a failure: the first, or the only one to know it."""
    return is_first() or (isinstance(error, Exception) and not getattr(error, "quincunx_known", False))


def is_first() -> bool:
    """Return whether this is the first process of its job, also before it has joined the others."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str = "cpu", *, patience: timedelta | None = None) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, and yield this process's place; alone without it.

    Processes communicate by gloo on the CPU and by nccl on GPUs. Each takes the GPU of its local rank.

    Args:
        device: "cpu" or "cuda".
        patience: how long a process waits for the others in an exchange; by default as long as torch does.
            A process that died is noticed at once in any case.

    Raises:
        RuntimeError: the others cannot be reached.

    Example:
        >>> with joined() as ranks:
        ...     ranks.first
        True
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, world = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps the addresses of dead processes, where restarted processes would find
        # them; on several machines the count differs, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # numbers that are summed for display stay on the CPU, hence gloo in both cases
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    try:
        yield Ranks(rank, world)
    finally:
        # an exchange that is still referenced would outlive the group and hang at the end
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def batch_norm_across(model: nn.Module) -> Iterator[None]:
    """Make training batch norms compute mean and variance over all processes' images, within the context.

    Each process gets the gradients of the sum of all losses, so several processes train
    like one with the whole batch. It works on any device, unlike torch's ``SyncBatchNorm``.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.forward = partial(_normalise, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward  # restores the class's own forward


def _normalise(norm: _BatchNorm, x: Tensor) -> Tensor:
    if not norm.training:
        result: Tensor = type(norm).forward(norm, x)
        return result
    others = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = x.float()
    # a process without images of this batch takes part with zeros
    count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
    dist.all_reduce(count)
    # do not wait for a GPU at every layer
    images = count.clamp_min(1.0).float() if x.is_cuda else max(float(count), 1.0)
    mean = _summed(wide.sum(others)) / images
    centred = wide - mean.view(shape)
    # in two steps, since the difference of two large sums would lose the variance of a shifted map
    variance = _summed(centred.square().sum(others)) / images
    mean_so_far, variance_so_far, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean_so_far is not None and variance_so_far is not None and batches is not None:
        with torch.no_grad():
            batches.add_(1)
            share = norm.momentum if norm.momentum is not None else 1 / float(batches)
            mean_so_far.lerp_(mean.detach(), share)
            rest = (images - 1).clamp_min(1.0) if isinstance(images, Tensor) else max(images - 1, 1.0)
            variance_so_far.lerp_(variance.detach() * (images / rest), share)
    result = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        result = result * norm.weight.view(shape) + norm.bias.view(shape)
    return result.to(x.dtype)


class _Sum(torch.autograd.Function):
    """Sum over all processes; the gradient is summed too, since each process's loss depends on every term."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _summed(value: Tensor) -> Tensor:
    result: Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return result
