"""Training steps through torch.compile: what must hold before a run begins with it, and how it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quincunx.modules import copied

__all__ = ["NotCompiled", "check_compiles", "compiled", "failing_as"]


class NotCompiled(ValueError):
    """torch.compile does not work here, or not for this network; the message says why."""


def compiled(model: nn.Module) -> nn.Module:
    """Return the network's forward and backward pass as compiled code; weights and buffers are shared.

    One graph for each batch size, of which a run has few: code for one size is faster than code for all.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> compiled(net).weight is net.weight  # compiled at the first call
        True
    """
    made: nn.Module = torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    return made


def check_compiles(model: nn.Module, example: Tensor) -> None:
    """Check that a network compiles as a whole here, before a run begins.

    The network is traced but not compiled, and the compiler is tried on a sum; both take seconds.

    Args:
        model: does not change.
        example: a batch [N, C, H, W] with N >= 2.

    Raises:
        NotCompiled: no compiler works here, or the network's forward does something that needs Python.
    """
    device = example.device
    with failing_as(
        f"no compiler works here for {device.type}, which needs g++ or what CXX names"
        if device.type == "cpu"
        else f"no compiler works here for {device.type}"
    ):
        torch.compile(_sum, dynamic=False)(torch.ones(3, device=device))
    # batch statistics change in training mode
    tried = copied(model).train()
    with failing_as("the network cannot be compiled whole"):
        torch.compile(tried, fullgraph=True, dynamic=False, backend="eager")(example)


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Make the compiler's failures within the context one sentence.

    Raises:
        NotCompiled: the compiler failed; errors of the network itself are not changed.
    """
    # imports the compiler, which takes longer than importing all of this package
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        # the rest is advice for the compiler's own developers
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = lines[:2] if lines and lines[0].endswith("raised:") else lines[:1]
        reason = (" ".join(shown) or type(error).__name__)[:300].rstrip(".")
        raise NotCompiled(f"compile=True: {what} ({reason}); leave it out to train without") from error


def _sum(x: Tensor) -> Tensor:
    return x + 1
