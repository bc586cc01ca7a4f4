"""Training steps that a GPU repeats on its own: recorded once as a CUDA graph, then replayed.

A step of a small network is some hundred kernels of a few microseconds each, which Python cannot launch as
fast as they run. So a whole step, from the choice of its images to the new weights, is recorded once.
Everything that differs from step to step lies in tensors at fixed addresses: the images of many steps, their
labels and learning rates, and the step's number, which the graph itself increments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quincunx.modules import forward_hooks, surely
from quincunx.ops import backend
from quincunx.ops.cuda_graphs import ONE_AT_A_TIME

__all__ = [
    "Replayed",
    "counted_together",
    "own_stream",
    "warmed",
    "why_not",
    "written",
]

# steps before recording: libraries choose and load their kernels, tables move to the device
_WARM = 3
_FAILED: list[object] = []
_OWN = ("torch", "quincunx")
_COUNT = "num_batches_tracked"
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


class Replayed:
    """A step on the first batch of its images, then on the next ones, without the CPU.

    Warming up changes nothing: all of ``state`` is restored afterwards.

    Args:
        step: one step on images [B, H, W, C] and labels [B], at the rate in ``rate``.
        rate: the learning rate on the device, [1].
        state: all tensors that a step changes.
        shape: (B, H, W, C).
        count: the most batches that can be ready at once.

    Raises:
        RuntimeError: the step cannot be recorded.
        RuntimeError: the step cannot be recorded.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], None],
        rate: Tensor,
        state: Sequence[Tensor],
        shape: tuple[int, int, int, int],
        count: int,
    ) -> None:
        device = rate.device
        self.count, self._step, self._rate, self._state = count, step, rate, list(state)
        self._images = torch.zeros(count, *shape, device=device)
        self._labels = torch.zeros(count, shape[0], dtype=torch.long, device=device)
        self._rates = torch.zeros(count, device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        with ONE_AT_A_TIME, _unchanged([*state, rate]):
            for _ in range(_WARM):
                self._place.zero_()
                self._once()
            self._place.zero_()
            self._replay, self._close = _recorded(self._once, device)

    def _once(self) -> None:
        images = self._images.index_select(0, self._place).squeeze(0)
        labels = self._labels.index_select(0, self._place).squeeze(0)
        self._rate.copy_(self._rates.index_select(0, self._place))
        self._step(images, labels)
        self._place.add_(1)

    def run(self, images: Tensor, labels: Tensor, rates: Tensor) -> None:
        """Run a step for each of at most ``count`` batches; the CPU does not wait for them.

        Args:
            images: of all steps, [n B, H, W, C].
            labels: [n B].
            rates: of each step, [n].
        """
        n = len(rates)
        self._images[:n].copy_(images.view(n, *self._images.shape[1:]))
        self._labels[:n].copy_(labels.view(n, -1))
        self._rates[:n].copy_(rates)
        self._place.zero_()
        for _ in range(n):
            self._replay()
        written(self._state)

    def close(self) -> None:
        """Free the graph's memory, after waiting for running steps."""
        self._close()


def _recorded(
    once: Callable[[], None], device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return functions that repeat ``once`` and free its memory; without graphs, ``once`` and a no-op."""
    if device.type != "cuda":
        return once, lambda: None
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream(device)
    try:
        # other threads continue meanwhile, also with operations that this one may not use
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            once()
    except BaseException:
        # torch's allocator keeps using a graph whose recording failed
        _FAILED.append(graph)
        raise

    def close() -> None:
        stream.synchronize()
        with ONE_AT_A_TIME:
            graph.reset()

    return graph.replay, close


def written(tensors: Sequence[Tensor]) -> None:
    """Tell torch that a graph or a fused optimiser wrote to tensors: caches derived from a weight
    check its version."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def warmed(run: Callable[[], object]) -> None:
    """Run a function once that changes nothing, so that its kernels are ready later."""
    with ONE_AT_A_TIME:
        run()


@contextmanager
def counted_together(model: nn.Module) -> Iterator[None]:
    """Increment batch norms' batch counts together at the end of the context, not one by one.

    Nothing reads these numbers, and each increment costs a kernel.
    """
    held = [
        module._buffers
        for module in model.modules()
        if surely(module, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        and module.training
        and getattr(module, "momentum", None) is not None
    ]
    counts = [(buffers, count) for buffers in held if (count := buffers.get(_COUNT)) is not None]
    for buffers, _ in counts:
        buffers[_COUNT] = None
    try:
        yield
    finally:
        for buffers, count in counts:
            buffers[_COUNT] = count
    if counts:
        torch._foreach_add_([count for _, count in counts], 1)


@contextmanager
def _unchanged(state: Sequence[Tensor]) -> Iterator[None]:
    """Restore each tensor's value at the end of the context."""
    with torch.no_grad():
        before = [value.clone() for value in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in zip(state, before, strict=True):
                value.copy_(old)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run a GPU's work on this thread's own stream within the context, so that several runs share the GPU.

    A stream that the caller chose is kept; on other devices nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        if before != torch.cuda.default_stream():
            yield
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            before.wait_stream(stream)


def why_not(model: nn.Module) -> str | None:
    """Return why a step of a network must not be recorded, None if it may be.

    A graph repeats what the network's code did once. That is the same at each step if all modules are
    torch's or this package's and no other code runs between them.
    """
    for path, module in model.named_modules():
        name = repr(path) if path else "the network"
        if type(module).__module__.partition(".")[0] not in _OWN or "forward" in vars(module):
            return f"{name} has a forward of its own, which may do something else at each step"
        if forward_hooks(module) or any(getattr(module, hooks) for hooks in _BACKWARD_HOOKS):
            return f"{name} has hooks, which run at each step"
    if any(parameter._backward_hooks for parameter in model.parameters()):
        return "a weight has hooks, which run at each step"
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ours = any(type(module).__module__.startswith("quincunx.") for module in model.modules())
    if device.type == "cuda" and ours and (serves := backend(device)).name == "reference":
        return f"without kernels of ours, tables come from the processor at each step ({serves.reason})"
    return None
