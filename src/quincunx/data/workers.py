"""Worker processes that read batches, in the order in which they are needed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["WorkerFailed", "read_batches"]


class WorkerFailed(RuntimeError):
    """A process that reads images or items died or failed."""


def read_batches(dataset: Dataset[Any], order: Sequence[list[int]], workers: int, what: str) -> Iterator[Any]:
    """Yield what a data set's ``__getitems__`` returns for each list of numbers.

    Args:
        dataset: returns whole batches.
        order: the numbers of each batch; a list may be empty.
        workers: processes; 0 reads in this one.
        what: that a worker does, for messages.

    Raises:
        WorkerFailed: a worker died, which is noticed within seconds, or failed.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_as_it_is,
        # the global generator is the network's
        generator=torch.Generator(),
    )
    with _child_signal_kept():
        iterator = iter(loader)
    try:
        for _ in order:
            yield _next(iterator, what)
    finally:
        # an error's traceback would keep the iterator alive, and with it the workers
        stop = getattr(iterator, "_shutdown_workers", None)
        if stop is not None:
            stop()


def _next(iterator: Iterator[Any], what: str) -> Any:
    try:
        return next(iterator)
    except RuntimeError as error:
        raise WorkerFailed(f"a process that {what} failed: {error}") from error


def _as_it_is(batch: Any) -> Any:
    """Return the batch: ``__getitems__`` returns whole batches already."""
    return batch


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Undo a loader's handler for the death of a child process, which raises wherever this process is.

    That could be in the middle of a checkpoint. Waiting for a batch checks the workers anyway.
    """
    in_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if in_main else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)
