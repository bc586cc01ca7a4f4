"""CUDA graphs: calls recorded once and replayed, one recording at a time."""

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

# Held by whoever records: CUDA's allocator and the compiler of Triton's kernels want one in a process. And by
# whoever counts a network's work, which is done by hooks on all modules of all threads.
ONE_AT_A_TIME = threading.RLock()


Run = Callable[[], object]


_WARMUP = 3


_STREAMS: dict[int, torch.cuda.Stream] = {}


def capture_stream() -> torch.cuda.Stream:
    """One stream for all captures of a device: workspaces of cuBLAS belong to a stream."""
    device = torch.cuda.current_device()
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return _STREAMS[device]


@contextmanager
def on_stream() -> Iterator[None]:
    """Within: the stream of the captures is the current one."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(run: Run, warmup: int = _WARMUP) -> Run:
    """A function that replays, as one CUDA graph, the kernels that ``run`` launches.

    Args:
        run: reads the same memory at each call; what it decides and compiles is done in the warm-up.
        warmup: calls before the capture.

    Returns:
        A function without arguments; its result is the memory that each replay writes anew.

    Raises:
        RuntimeError: something in the call cannot be captured.
    """
    graph, stream = torch.cuda.CUDAGraph(), capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    # the outer context puts the stream back where a capture fails
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            run()
        torch.cuda.synchronize()
        collects, tries = gc.isenabled(), torch.backends.cudnn.benchmark
        # what is freed by chance must not fall into the capture; cuDNN keeps to what it found before
        gc.disable()
        torch.backends.cudnn.benchmark = False
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                kept = run()
        except RuntimeError as error:
            # the end of a capture that failed says nothing of why
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
