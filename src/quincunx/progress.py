"""A progress bar for long work, and whether anything of the kind is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

__all__ = ["is_silenced", "progress_bar", "seconds_left", "silenced"]

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


def seconds_left(task: Task) -> float | None:
    """Return the seconds that a task still takes, if the rest goes as what is done; None if nobody can say.

    A task that began with some of it done, such as a resumed one, is judged by what it did since. ``limit``
    among its fields is a budget in seconds, which ends it.
    """
    if task.finished:
        return 0.0
    elapsed, begun = task.elapsed, float(task.fields.get("begun") or 0.0)
    if task.total is None or elapsed is None:
        return None
    limit = task.fields.get("limit")
    most = None if limit is None else max(float(limit) - elapsed, 0.0)
    if task.completed <= begun:
        return most
    left = elapsed * (task.total - task.completed) / (task.completed - begun)
    return left if most is None else min(left, most)


class _Left(ProgressColumn):
    """Time left, from the whole run: steps of a search take seconds or minutes, so the last say little."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = seconds_left(task)
        shown = "-:--:--" if left is None else str(timedelta(seconds=round(left)))
        return Text(shown, style="progress.remaining")


class _Count(MofNCompleteColumn):
    """How many of how many; a share of one in percent."""

    def render(self, task: Task) -> Text:
        if isinstance(task.total, float) and task.total == 1.0:
            return Text(f"{100 * task.completed:3.0f}%", style="progress.download")
        return super().render(task)


class _Bar(Progress):
    """Knows with how much done each task began."""

    def add_task(self, description: str, *arguments: Any, **given: Any) -> TaskID:
        given.setdefault("begun", given.get("completed", 0))
        return super().add_task(description, *arguments, **given)


@contextmanager
def progress_bar(shown: bool) -> Iterator[Progress]:
    """Show a bar with count, elapsed and remaining time, on standard error; nothing if :func:`silenced`."""
    from rich.console import Console

    # a narrow terminal cuts the state and no number
    whole, rest = Column(no_wrap=True, min_width=7), Column(ratio=1, no_wrap=True, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        _Count(table_column=Column(no_wrap=True, min_width=4)),
        TimeElapsedColumn(table_column=whole),
        TextColumn("left", table_column=Column(no_wrap=True, min_width=4)),
        _Left(table_column=whole),
        TextColumn("{task.fields[state]}", markup=False, table_column=rest),
    )
    hidden = not shown or is_silenced()
    with _Bar(*columns, console=Console(stderr=True), expand=True, disable=hidden) as bar:
        yield bar
