"""Several processes accelerate one network: the first decides and writes, the others compute their shares."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from quincunx.acceleration.identity import where_named
from quincunx.acceleration.judge import sample_batches
from quincunx.acceleration.scores import Measured, Scores
from quincunx.data import ImageData
from quincunx.measure.tasks import Task
from quincunx.surgery.method import Method
from quincunx.train.evaluation import Scored, images_at_once, score_shared
from quincunx.train.loop import Diverged, RunFailed, fit
from quincunx.train.processes import ALONE, Ranks, as_known

__all__ = ["PATIENCE", "FailedAlone", "Team"]

T = TypeVar("T")

# the others wait while the first process fits layers and measures time
PATIENCE = timedelta(days=7)


class FailedAlone(RunFailed):
    """One process failed amid what all of them do, so that the others cannot know the reason."""


@dataclass
class Team:
    """The processes that accelerate one network; each has the network and the data by itself.

    The first process runs the program. What can be shared is a method here: it sends the others the name
    and the arguments, all do their share, and the first goes on with the result. In between the others
    wait, so that times are measured undisturbed. Alone a team does everything itself.

    Args:
        ranks: this process's place.
        model: the original network.
        data: its data set, with labels.
        task: what is scored.
        workers: processes that read streamed images.
        score: (network, rank=, world=) -> loss and score of each test image of this share.
        layers: patterns of the layers that a search may replace.
        calibration: number of calibration images.
        seed: of their draw.
    """

    ranks: Ranks
    model: nn.Module
    data: ImageData
    task: Task
    workers: int | None
    score: Callable[..., Scored]
    layers: Sequence[str] = ()
    calibration: int = 500
    seed: int = 0
    # of another process than the first: what a search scores, by its settings
    scores: dict[str, Scores] = field(default_factory=dict)

    def directed(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns on the first process; the others compute what it asks for meanwhile.

        Raises:
            FailedAlone: this process, not the first, failed where the others cannot know it.
            Exception: what ``work`` raises, on all processes.
        """
        if self.ranks.world == 1:
            return work()
        if not self.ranks.first:
            return cast(T, self._follow())
        try:
            result = work()
        except Exception as error:
            # if the others are gone there is nobody to tell, and this error matters more
            with suppress(RuntimeError):
                self._say("failed", _portable(error))
            raise
        self._say("done", result)
        return result

    def alone(self) -> Team:
        """Return a team of this process only, with the same network and data."""
        return replace(self, ranks=ALONE)

    def judge(self, network: nn.Module) -> Scored:
        """Return loss and score of each test image, in order."""
        if self.ranks.world == 1:
            return self.score(network)
        self._say("judge", _packed(network))
        return self._judged(network)

    def train(self, network: nn.Module, *args: Any, teacher: nn.Module | None, **options: Any) -> Any:
        """Return what :func:`quincunx.train.loop.fit` returns; the teacher is the original or None."""
        if self.ranks.world > 1:
            sent = {**options, "progress": False}
            # what each process has by itself is not sent: a task may hold functions that cannot be
            self._say("train", (_packed(network), args, teacher is not None, sent))
        return self._trained(network, *args, taught=teacher is not None, **options)

    def losses(self, scores: Scores, numbers: Sequence[int], seconds: float) -> list[Measured]:
        """Return what all processes measure of a search's candidates; see ``Scores.measure_losses``."""
        settings = (tuple(scores.candidates), scores.dtype, tuple(scores.example.shape), _digest(scores))
        self._say("losses", (settings, list(numbers), seconds))
        return self._measured(lambda: scores, numbers, seconds)

    # ------------------------------------------------------------ what all processes do

    def _judged(self, network: nn.Module) -> Scored:
        split = self.data.test
        score = partial(self.score, network)
        return score_shared(score, len(split), images_at_once(split, self.task), self.ranks)

    def _trained(self, network: nn.Module, *args: Any, taught: bool, **options: Any) -> Any:
        return fit(
            network,
            self.data,
            *args,
            ranks=self.ranks,
            teacher=self.model if taught else None,
            workers=self.workers,
            task=self.task,
            **options,
        )

    def _measured(
        self, found: Callable[[], Scores], numbers: Sequence[int], seconds: float
    ) -> list[Measured]:
        rank, world = self.ranks.rank, self.ranks.world
        # neighbours go together: candidates for one layer share what is gathered at it
        ours = numbers[rank * len(numbers) // world : (rank + 1) * len(numbers) // world]
        parts = self.ranks.gathered(lambda: found().measure_losses(ours, seconds))
        return [one for part in parts for one in part]

    # ------------------------------------------------------------ the other processes

    def _follow(self) -> Any:
        while True:
            name, given = self._heard()
            if name == "done":
                return given
            if name == "failed":
                raise as_known(given)
            if name == "train":
                self._train_along(*given)
                continue
            # an exception of a share is raised on all processes, and the first one's answer to it counts
            with suppress(ValueError, TypeError, OSError, RuntimeError):
                if name == "judge":
                    self._judged(_unpacked(given))
                else:
                    settings, numbers, seconds = given
                    self._measured(partial(self._scores_of, *settings), numbers, seconds)

    def _train_along(self, packed: Any, args: tuple[Any, ...], taught: bool, options: dict[str, Any]) -> None:
        try:
            self._trained(_unpacked(packed), *args, taught=taught, **options)
        except Diverged:
            # the loss is that of all processes, so all stop in the same step
            pass
        except Exception as error:
            raise FailedAlone(f"process {self.ranks.rank}: {error}") from error

    def _scores_of(
        self,
        candidates: tuple[Method, ...],
        dtype: torch.dtype | None,
        shape: tuple[int, ...],
        digest: str,
    ) -> Scores:
        if digest not in self.scores:
            images = sample_batches(self.data, self.calibration, self.seed, task=self.task)
            where, example = where_named(self.model, self.layers), torch.zeros(shape)
            # one search at a time: its maps are large
            self.scores = {
                digest: Scores(self.model, images, candidates, where, example, _silent, dtype, self.task)
            }
            if _digest(self.scores[digest]) != digest:
                raise ValueError(
                    f"process {self.ranks.rank} has another network or other calibration images than "
                    "the first process; all must read the same files"
                )
        return self.scores[digest]

    # ------------------------------------------------------------ messages

    def _say(self, name: str, given: Any) -> None:
        dist.broadcast_object_list([name, given], src=0)

    def _heard(self) -> tuple[str, Any]:
        message: list[Any] = [None, None]
        dist.broadcast_object_list(message, src=0)
        return message[0], message[1]


def _silent(*_: Any) -> None:
    """The first process tells what is done."""


def _digest(scores: Scores) -> str:
    """Return what tells a search's candidates and images from others."""
    rows = [f"{row.layers} {row.method!r}" for row in scores.rows]
    text = "\n".join([*rows, *scores.marks, str(scores.dtype), str(tuple(scores.example.shape))])
    return hashlib.sha256(text.encode()).hexdigest()


def _packed(network: nn.Module) -> tuple[bytes, list[Callable[..., Any]]]:
    """Return a network as it is sent to another process.

    Raises:
        ValueError: it holds what cannot be sent.
    """
    try:
        # a graph of torch.fx leaves its hooks out, so they go beside it
        return pickle.dumps(network), list(network._forward_pre_hooks.values())
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"model: cannot be sent to the other processes ({error}); run it in one process, without torchrun"
        ) from error


def _unpacked(sent: tuple[bytes, list[Callable[..., Any]]]) -> nn.Module:
    network = cast(nn.Module, pickle.loads(sent[0]))
    network._forward_pre_hooks.clear()
    for hook in sent[1]:
        network.register_forward_pre_hook(hook)
    return network


def _portable(error: Exception) -> Exception:
    """Return an exception that can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception may refuse in any way
        return RuntimeError(str(error))
    return error
