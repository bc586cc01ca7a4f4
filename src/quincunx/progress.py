"""A progress bar for long work, whether anything of the kind is wanted, and the log of a command."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
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

__all__ = ["LOG", "is_silenced", "logged_to", "progress_bar", "seconds_left", "silenced"]

_SILENCED = ContextVar("silenced", default=False)
# What the command line says, which it shows by itself; nothing is written without a handler, such
# as logged_to. Other modules warn through the logger above it.
LOG = logging.getLogger("quincunx.command")
LOG.addHandler(logging.NullHandler())
LOG.propagate = False
# a bar writes to the log this often at most, in seconds
_LOGGED_EVERY = 10.0


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Within: what the command line says, and how long work gets on, is appended to a file, with times.

    Raises:
        OSError: it cannot be opened for writing.
    """
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    # a logger without handlers shows its warnings; one with a file has to be told to
    also = [one for one in (handler, logging.lastResort) if one is not None]
    above = logging.getLogger("quincunx")
    before = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    for one in also:
        above.addHandler(one)
    try:
        yield
    finally:
        for one in also:
            above.removeHandler(one)
        LOG.removeHandler(handler)
        LOG.setLevel(before)
        handler.close()


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
    """Knows with how much done each task began, and writes to the log now and then."""

    _logged_at = float("-inf")

    def add_task(self, description: str, *arguments: Any, **given: Any) -> TaskID:
        given.setdefault("begun", given.get("completed", 0))
        return super().add_task(description, *arguments, **given)

    def update(self, task_id: TaskID, *arguments: Any, **given: Any) -> None:
        super().update(task_id, *arguments, **given)
        task = next((task for task in self.tasks if task.id == task_id), None)
        now = time.monotonic()
        if task is not None and (task.finished or now - self._logged_at >= _LOGGED_EVERY):
            self._logged_at = now
            LOG.info("%s", _in_words(task))


def _in_words(task: Task) -> str:
    """Describe how far a task is, on one line."""
    left = seconds_left(task)
    done = f"{task.completed:g}" if task.total is None else f"{task.completed:.4g} of {task.total:g}"
    parts = [f"{task.description}: {done}"]
    parts += [f"about {timedelta(seconds=round(left))} left"] if left else []
    parts += [str(task.fields["state"])] if task.fields.get("state") else []
    return ", ".join(parts)


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
