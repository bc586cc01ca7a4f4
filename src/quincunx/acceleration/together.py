"""Several processes accelerate one network: the first decides and writes, the others compute their shares."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quincunx.acceleration.identity import where_named
from quincunx.acceleration.judge import sample_batches
from quincunx.acceleration.scores import Measured, Scores, Shared
from quincunx.data import Drawn, ImageData
from quincunx.measure.tasks import Task
from quincunx.modules import copied
from quincunx.surgery.calibration import Calibration, Context, Pass, Pool
from quincunx.surgery.method import Method
from quincunx.surgery.walks import Walk
from quincunx.train.evaluation import Scored, images_at_once, score_shared
from quincunx.train.loop import Diverged, RunFailed, fit
from quincunx.train.processes import Ranks, as_known
from quincunx.train.rounded import computing_rounded

__all__ = ["PATIENCE", "FailedAlone", "Team"]

T = TypeVar("T")

# the others wait while the first process fits layers and measures time
PATIENCE = timedelta(days=7)
_OTHER_IMAGES = (
    "process {} has another network or other calibration images than the first process; all must read "
    "the same files"
)


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
    # of another process than the first: what a search scores, by its settings, and the original's walk
    scores: dict[str, Scores] = field(default_factory=dict)
    walk: Walk = field(default_factory=Walk)

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

    def judge(self, network: nn.Module, rounded: bool = False) -> Scored:
        """Return loss and score of each test image, in order; ``rounded``: as in training in eight bits."""
        if self.ranks.world > 1:
            # a graph that rounds cannot be sent: each process makes its own
            self._say("judge", (_packed(network), rounded))
        return self._judged(network, rounded)

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

    @property
    def shared(self) -> Shared | None:
        """Return :meth:`losses`, or None alone."""
        return None if self.ranks.world == 1 else self.losses

    @property
    def pool(self) -> Pool | None:
        """Return :meth:`totals`, or None alone."""
        return None if self.ranks.world == 1 else self.totals

    def totals(self, context: Context, work: Pass) -> dict[str, Tensor]:
        """Return the sums of a pass through the calibration data, of which each process reads a share.

        Shares are added up in float64, so that a fit is that of one process up to rounding.
        """
        network = _packed(context.network) if context.changed else None
        self._say("totals", (network, _pickled(work), self.marks))
        return self._totalled(context.original, context.network, context.changed, work, context.walks)

    @cached_property
    def images(self) -> Drawn:
        """The calibration images with their targets."""
        return sample_batches(self.data, self.calibration, self.seed, task=self.task, workers=self.workers)

    @cached_property
    def marks(self) -> str:
        """What tells the calibration images from others; finding it takes a pass through them."""
        return _marks(self.images)

    # ------------------------------------------------------------ what all processes do

    def _judged(self, network: nn.Module, rounded: bool) -> Scored:
        split = self.data.test
        score = partial(self.score, network)
        with computing_rounded(network) if rounded else nullcontext():
            if self.ranks.world == 1:
                return score()
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

    def _totalled(
        self,
        original: nn.Module,
        network: nn.Module,
        changed: bool,
        work: Pass,
        walks: tuple[Walk, Walk],
        marks: str = "",
    ) -> dict[str, Tensor]:
        rank, world, count = self.ranks.rank, self.ranks.world, len(self.images)
        first = rank * count // world
        ours = self.images[first : (rank + 1) * count // world]
        found: dict[str, Tensor] = {}

        def sum_up() -> dict[str, torch.Size]:
            if marks and marks != self.marks:
                raise ValueError(_OTHER_IMAGES.format(rank))
            if ours:
                context = Context(original, network, Calibration(ours, original, first))
                context.changed, context.loss = changed, self.task.impact_function
                context.walks = walks
                found.update(work(context))
            return {name: value.shape for name, value in found.items()}

        shapes: dict[str, torch.Size] = {}
        for of_one in self.ranks.gathered(sum_up):
            for name, shape in of_one.items():
                if shapes.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"calibration: sums of {tuple(shape)} and {tuple(shapes[name])} at {name!r}; "
                        "images of one size are needed"
                    )
        for name, shape in shapes.items():
            # a process without batches adds nothing
            total = found.setdefault(name, torch.zeros(shape, dtype=torch.float64)).contiguous()
            dist.all_reduce(total)
            found[name] = total
        return found

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
                    self._judged(_unpacked(given[0]), given[1])
                elif name == "totals":
                    sent, work, marks = given
                    network = copied(self.model).eval() if sent is None else _unpacked(sent)
                    # the changed network is another object each time, from which no walk could go on
                    walks = self.walk, Walk(0)
                    self._totalled(self.model, network, sent is not None, pickle.loads(work), walks, marks)
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
            where, example = where_named(self.model, self.layers), torch.zeros(shape)
            # one search at a time: its maps are large
            self.scores = {
                digest: Scores(self.model, self.images, candidates, where, example, _silent, dtype, self.task)
            }
            if _digest(self.scores[digest]) != digest:
                raise ValueError(_OTHER_IMAGES.format(self.ranks.rank))
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


def _marks(images: Sequence[tuple[Tensor, Any]]) -> str:
    """Return what tells calibration images from others; as the sum of each batch does."""
    found = [f"{tuple(x.shape)} {x.double().sum().item():.6g}" for x, _ in images]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _packed(network: nn.Module) -> tuple[bytes, list[Callable[..., Any]]]:
    """Return a network as it is sent to another process.

    Raises:
        ValueError: it holds what cannot be sent.
    """
    # a graph of torch.fx leaves its hooks out, so they go beside it
    return _pickled(network), list(network._forward_pre_hooks.values())


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
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
