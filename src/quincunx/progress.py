"""A progress bar for long work, and whether anything of the kind is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["is_silenced", "progress_bar", "silenced"]

_SILENCED = ContextVar("silenced", default=False)


@contextmanager
def silenced(wanted: bool = True) -> Iterator[None]:
    """Within: no bar and no note is shown."""
    before = _SILENCED.set(wanted)
    try:
        yield
    finally:
        _SILENCED.reset(before)


def is_silenced() -> bool:
    """Whether whoever called wants results, warnings and errors alone."""
    return _SILENCED.get()


@contextmanager
def progress_bar(shown: bool) -> Iterator[Progress]:
    """Show a bar with count, elapsed and remaining time, on standard error; nothing if :func:`silenced`."""
    from rich.console import Console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown or is_silenced()) as bar:
        yield bar
