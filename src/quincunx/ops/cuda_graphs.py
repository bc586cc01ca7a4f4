"""CUDA graphs: record calls once and replay them, one recording at a time."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = [
    "ONE_AT_A_TIME",
    "Run",
    "capture_stream",
    "captured",
    "on_stream",
]

# Held while recording: CUDA's allocator and Triton's compiler allow one recording per process. Also held
# while counting a network's work, which uses hooks on all modules of all threads.
ONE_AT_A_TIME = threading.RLock()


Run = Callable[[], object]


_WARMUP = 3


_STREAMS: dict[int, torch.cuda.Stream] = {}


def capture_stream() -> torch.cuda.Stream:
    """Return the one stream for all captures of a device: workspaces of cuBLAS belong to a stream."""
    device = torch.cuda.current_device()
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return _STREAMS[device]


@contextmanager
def on_stream() -> Iterator[None]:
    """Make the captures' stream the current one within the context."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(run: Run, warmup: int = _WARMUP) -> Run:
    """Return a function that replays, as one CUDA graph, the kernels that ``run`` launches.

    Args:
        run: reads the same memory at each call; it must decide and compile during the warm-up.
        warmup: calls before the capture.

    Returns:
        A function without arguments; its result is the memory that each replay overwrites.

    Raises:
        RuntimeError: something in the call cannot be captured.
    """
    graph, stream = torch.cuda.CUDAGraph(), capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    # the outer context restores the stream if a capture fails
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            run()
        torch.cuda.synchronize()
        collects, tries = gc.isenabled(), torch.backends.cudnn.benchmark
        # garbage collection must not free memory during the capture; cuDNN must keep the algorithms it found
        gc.disable()
        torch.backends.cudnn.benchmark = False
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                kept = run()
        except RuntimeError as error:
            # the error at the end of a failed capture does not say why
            first = error.__context__
            raise RuntimeError(f"capture: {first or error}") from error
        finally:
            torch.backends.cudnn.benchmark = tries
            if collects:
                gc.enable()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> object:
        graph.replay()
        return kept

    replay()
    torch.cuda.synchronize()
    return replay


def timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
