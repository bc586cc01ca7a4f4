"""One training loop: reproducible, resumable to the bit on the CPU, and it documents itself."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from quincunx.artifact import (
    check_replaceable,
    difference,
    name_of,
    save,
    spec_of,
    write_json,
    write_text,
)
from quincunx.binary import PackedConv2d, PackedLinear
from quincunx.checkpoint import check_disk, only_writer, read_checkpoint, write_checkpoint
from quincunx.cost import Cost, cost, inference_mode_of
from quincunx.data import ImageData, WorkerFailed, batches, memory
from quincunx.distillation import Loss
from quincunx.evaluation import check_channels, check_scores, device_of, evaluate
from quincunx.latency import environment
from quincunx.progress import progress_bar
from quincunx.ranks import ALONE, Ranks, batch_norm_across
from quincunx.reading import reason_of
from quincunx.recipes import Recipe, from_dict

__all__ = ["Diverged", "Interrupted", "RunFailed", "StopRule", "fit", "identity_of", "other_part"]

# the weight of an auxiliary classifier's loss in training (Szegedy et al. 2015, section 5)
_AUXILIARY = 0.3
CHECKPOINT, LOG, RESULT, ARTIFACT = "checkpoint.pt", "log.jsonl", "run.json", "model"


class RunFailed(RuntimeError):
    """Training started and could not go on; the message says what is kept."""


class Diverged(RunFailed):
    """The loss became infinite or not a number; the message says where."""


class Interrupted(RunFailed):
    """Training was stopped by the user; the message says how to go on."""


@dataclass(frozen=True)
class StopRule:
    """When a run ends before its last epoch.

    Attributes:
        error: it ends once the test error is no greater; None for never.
        patience: it ends after so many epochs without a lower test error; None for never.

    Example:
        >>> StopRule(patience=2).reason([{"test_error": e} for e in (0.3, 0.2, 0.25, 0.2)])
        'no lower test error in 2 epochs'
    """

    error: float | None = None
    patience: int | None = None

    def reason(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Why a run with this history is over; None if it is not."""
        errors = [entry["test_error"] for entry in history]
        if not errors:
            return None
        if self.error is not None and errors[-1] <= self.error:
            return f"the test error is within {100 * self.error:.2f}%"
        if self.patience is not None and len(errors) - 1 - errors.index(min(errors)) >= self.patience:
            return f"no lower test error in {self.patience} epochs"
        return None


def fit(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    folder: str | Path,
    *,
    seed: int = 0,
    resume: bool = False,
    progress: bool | str = False,
    ranks: Ranks = ALONE,
    teacher: nn.Module | None = None,
    workers: int | None = None,
    stop: StopRule | None = None,
    keep_best: bool = False,
) -> dict[str, Any]:
    """Train a network and write the run's folder.

    The folder gets ``checkpoint.pt`` (after each epoch, atomically), ``log.jsonl`` (a line an epoch),
    ``run.json`` (the result) and ``model/`` (the artifact). Order and augmentation of an epoch depend
    on the seed and the epoch's number alone, so a resumed run equals an uninterrupted one, bit for
    bit on the CPU with the same number of threads.

    Several processes, each with the same arguments and its own ``ranks``, share each batch: the
    recipe's batch size is that of all of them, batch norm takes its statistics over all of them, and
    the losses are those of one process with the whole batch, up to rounding. The first one writes.
    They always go on from a checkpoint that is there, since a launcher starts them again after one of
    them died.

    Args:
        model: a network made by :func:`quincunx.networks.build`, or one whose factory is noted; trained
            in place, on the device where it is.
        data: training and test images.
        recipe: how.
        folder: of the run.
        seed: of order and augmentation.
        resume: go on from the folder's checkpoint, or start if there is none.
        progress: show a bar, under this name.
        ranks: this process's place among several, from :func:`quincunx.ranks.joined`.
        teacher: whose answers a recipe with ``distill`` asks for, and whose maps one with
            ``distill_features``; it is evaluated and left as it is.
        workers: processes that decode streamed images; by default one a core, at most eight.
        stop: ends the run early; "stopped" in the result then says why.
        keep_best: the network ends as it was after the epoch of least test error, "best_epoch" in the
            result, and not as after the last.

    Returns:
        The content of ``run.json``.

    Raises:
        ValueError: the network has packed weights of one bit; it or its teacher does not fit the data; a
            teacher is missing, or there for nothing; a step needs more memory than is free; the checkpoint is
            corrupt, or of another network, recipe, seed or data set; the folder holds something else where
            the artifact goes.
        FileExistsError: the folder holds a run and ``resume`` was not asked for.
        RunFailed: the loss is not finite, a streamed image cannot be read, the disk is full or too small,
            or another process writes to the folder; the last checkpoint is kept.
        Interrupted: Ctrl-C; the last checkpoint is kept.
    """
    rule = stop or StopRule()
    run = _Run(model, data, recipe, Path(folder), seed, ranks, teacher, workers, rule, keep_best)
    return run.go(resume, progress)


def _check_memory(cost_of_one: Cost, recipe: Recipe, ranks: Ranks) -> None:
    """Refuse a step whose maps alone, one for each layer, do not fit in the memory that is free."""
    images = math.ceil(recipe.batch_size / ranks.world / recipe.accumulate)
    values = sum(math.prod(row.output) for row in cost_of_one.rows)
    memory.check(
        f"a step of {images} images",
        images * values * (4 if recipe.precision == "float32" else 2),
        "a smaller --batch-size or a larger --accumulate needs less",
    )


def identity_of(network: dict[str, Any], recipe: Recipe, data: ImageData, seed: int) -> dict[str, Any]:
    """What two runs must share to be the same run, JSON-ready."""
    return {"network": network, "recipe": recipe.to_dict(), "data": data.describe(), "seed": seed}


def other_part(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first part in which a run is another one than :func:`identity_of` says, and how; None if none is.

    Raises:
        ValueError: its recipe is none.
    """
    for part, wanted in ours.items():
        found = theirs.get(part)
        if part == "recipe":
            # a field that was not there yet has its default
            found = from_dict(found or {}).to_dict()
        if found != wanted:
            return f"{part}: {difference(found, wanted)}"
    return None


def _best_epoch(history: Sequence[Mapping[str, float]]) -> int:
    """The number of the first epoch of least test error; of equal ones that of the least test loss."""
    best = min(history, key=lambda entry: (entry["test_error"], entry["test_loss"]))
    return int(best["epoch"])


def _is_entry(value: object) -> bool:
    """Whether a checkpoint's history has an epoch here."""
    names = ("epoch", "train_error", "test_loss", "test_error", "seconds")
    return isinstance(value, dict) and all(type(value.get(name)) in (int, float) for name in names)


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        recipe: Recipe,
        folder: Path,
        seed: int,
        ranks: Ranks,
        teacher: nn.Module | None,
        workers: int | None,
        stop: StopRule,
        keep_best: bool = False,
    ) -> None:
        self.stop, self.keep_best = stop, keep_best
        # the weights after the best epoch, where they are asked for
        self.best: dict[str, Tensor] | None = None
        self.model, self.data, self.recipe, self.folder, self.seed = model, data, recipe, folder, seed
        self.ranks, self.workers = ranks, workers
        self.spec = spec_of(model)
        for name, module in model.named_modules():
            if isinstance(module, (PackedConv2d, PackedLinear)):
                raise ValueError(
                    f"{name}: weights of one bit are for inference and do not train; start from the run "
                    "that trained them, such as the folder finetune"
                )
        self.device = device_of(model)
        check_channels(model, data)
        height, width = data.size
        example = torch.zeros(1, data.in_channels, height, width, device=self.device)
        with inference_mode_of(model):
            check_scores(model(example), data)
        self.loss = Loss(recipe, model, teacher, example)
        if not data.labelled and recipe.distill < 1:
            raise ValueError(
                f"distill={recipe.distill:g}: the images of {data.name} have no labels; 1 learns from "
                "the teacher alone"
            )
        if teacher is not None:
            with inference_mode_of(teacher):
                check_scores(teacher(example), data)
        self.cost = cost(model, example)
        self.augment = recipe.augment or data.augment
        # float16 has too few exponents for small gradients: the loss is scaled up before it is derived
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov and recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )
        # what a step goes through: gradients of several processes are averaged by torch
        self.stepped: nn.Module = model
        self.history: list[dict[str, float]] = []
        self.saved = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def go(self, resume: bool, progress: bool | str) -> dict[str, Any]:
        with ExitStack() as stack:
            try:
                if self.ranks.first:
                    stack.enter_context(only_writer(self.folder))
                # whoever starts several processes starts them again after one of them died
                self._begin(resume or self.ranks.world > 1)
                if self.ranks.world > 1:
                    stack.enter_context(batch_norm_across(self.model))
                    self.stepped = DistributedDataParallel(self.model)
                    # what is still there when the process ends can keep it from ending
                    stack.callback(self._part)
                return self._epochs(progress)
            except KeyboardInterrupt:
                kept = (
                    f"whose checkpoint is in {self.checkpoint}; the same command with --resume goes on"
                    if self.checkpoint.exists()
                    else "before there was a checkpoint; the same command starts again"
                )
                raise Interrupted(
                    f"stopped after {self.saved} of {self.recipe.epochs} epochs, {kept}"
                ) from None
            except FileExistsError:
                raise
            except BlockingIOError as error:
                raise RunFailed(str(error)) from error
            except OSError as error:
                raise RunFailed(
                    f"{error}; the run's last whole checkpoint, if it had one, is still in {self.checkpoint}"
                ) from error

    def _part(self) -> None:
        self.stepped = self.model
        for parameter in self.model.parameters():
            parameter.grad = None

    def _begin(self, resume: bool) -> None:
        """Everything that may be refused before the first step."""
        content = self.ranks.from_first(lambda: self._found(resume))
        if content is not None:
            self._restore(content)
        # what cannot be written is better known before the training than after it
        self.ranks.from_first(lambda: check_replaceable(self.folder / ARTIFACT))
        state = sum(t.nbytes for t in self.model.state_dict().values())
        # a checkpoint has weights and momentum, and the old one stays until the new one is written
        self.ranks.from_first(lambda: check_disk(self.folder, (7 if self.keep_best else 5) * state))
        _check_memory(self.cost, self.recipe, self.ranks)
        if not self.history:
            self._save()
        self._write_log()

    def _found(self, resume: bool) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        if not resume:
            raise FileExistsError(
                f"{self.folder}: holds a run already; --resume goes on with it, another --out starts anew"
            )
        return read_checkpoint(self.checkpoint)

    def _epochs(self, progress: bool | str) -> dict[str, Any]:
        with progress_bar(bool(progress) and self.ranks.first) as bar:
            steps = math.ceil(len(self.data.train) / self.recipe.batch_size)
            task = bar.add_task(
                progress if isinstance(progress, str) else name_of(self.spec),
                total=steps * self.recipe.epochs,
                completed=steps * len(self.history),
                state="",
            )
            while len(self.history) < self.recipe.epochs and self.stop.reason(self.history) is None:
                entry = self._epoch(
                    len(self.history), steps, lambda state: bar.update(task, advance=1, state=state)
                )
                self.history.append(entry)
                if self.keep_best and _best_epoch(self.history) == len(self.history):
                    self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
                self._save()
                self._write_log()
        return self._finish()

    def _epoch(self, number: int, steps: int, advance: Any) -> dict[str, float]:
        # a large odd factor keeps the streams of neighbouring seeds and epochs apart
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        # anything random inside the network draws from the global generator
        torch.manual_seed((self.seed * 1_000_003 + number + 1) % 2**63)
        self.model.train()
        began = time.perf_counter()
        total, wrong, lr, count = 0.0, 0.0, self.recipe.lr, len(self.data.train)
        epoch_batches = batches(
            self.data.train,
            self.data,
            self.recipe.batch_size,
            generator=generator,
            augment=self.augment,
            channels_last=self.recipe.channels_last,
            rank=self.ranks.rank,
            world=self.ranks.world,
            workers=self.workers,
        )
        for step, (images, labels) in enumerate(self._read(epoch_batches)):
            taken = number * steps + step
            lr = self.recipe.lr_at(taken / (self.recipe.epochs * steps), taken)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.zero_grad(set_to_none=True)
            whole = min(self.recipe.batch_size, count - step * self.recipe.batch_size)
            loss, errors = self._derive(images.to(self.device), labels.to(self.device), whole)
            if not math.isfinite(loss):
                raise self._diverged("loss", loss, number, step + 1, lr)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss * whole
            wrong += errors
            advance(f"epoch {number + 1} loss {total / (step * self.recipe.batch_size + whole):.3f}")
        seconds = time.perf_counter() - began
        tested = evaluate(self.model, self.data.test, self.data, ranks=self.ranks, workers=self.workers)
        if not math.isfinite(tested.loss):
            # the last step may be the one that broke the weights: they must not replace good ones
            raise self._diverged("test loss", tested.loss, number, steps, lr)
        return {
            "epoch": number + 1,
            "lr": lr,
            "train_loss": total / count,
            "train_error": wrong / count,
            "test_loss": tested.loss,
            "test_error": tested.error,
            "seconds": seconds,
            "images_per_second": count / seconds,
        }

    def _read(self, source: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; an image that cannot be read, or a worker that died, ends the run with its reason."""
        while True:
            try:
                batch = next(source)
            except StopIteration:
                return
            except (ValueError, WorkerFailed) as error:
                raise RunFailed(
                    f"{error}; the checkpoint after epoch {self.saved} is kept in {self.checkpoint}"
                ) from error
            yield batch

    def _derive(self, images: Tensor, labels: Tensor, whole: int) -> tuple[float, float]:
        """Mean loss and wrong answers of a batch of ``whole`` images, its gradients left at the parameters.

        ``images`` are this process's share of the batch.
        """
        loss, wrong = 0.0, 0
        parts = self.recipe.accumulate
        for i, (part, answers) in enumerate(
            zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        ):
            # of several processes each takes part in every exchange, also without images of its own
            if not len(answers) and self.ranks.world == 1:
                continue
            with self._exchange(last=i == parts - 1):
                with self._autocast(), self.loss.following():
                    outputs, wanted = self.stepped(part), self.loss.asked(part)
                    maps = self.loss.of_maps()
                scores, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
                check_scores(scores, self.data)
                share = (self.loss.of_scores(scores, answers, wanted) + maps) / whole
                for other in auxiliary:
                    share = share + _AUXILIARY * self.loss.of_scores(other, answers, wanted) / whole
                # torch takes the mean of the processes' gradients, where the sum is wanted
                self.scaler.scale(share * self.ranks.world).backward()  # type: ignore[no-untyped-call]
            loss += float(share.detach())
            wrong += int((scores.detach().argmax(1) != answers).sum())
        loss, errors = self.ranks.total([loss, wrong])
        return loss, errors

    def _exchange(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged once a step, with its last part."""
        if isinstance(self.stepped, DistributedDataParallel) and not last:
            return self.stepped.no_sync()
        return nullcontext()

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.recipe.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _diverged(self, what: str, value: float, number: int, step: int, lr: float) -> Diverged:
        return Diverged(
            f"the {what} is {value} in epoch {number + 1}, step {step}, at learning rate {lr:g}; the "
            f"checkpoint after epoch {number} is kept in {self.checkpoint}; a smaller --lr may help"
        )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it."""
        return identity_of(self.spec, self.recipe, self.data, self.seed)

    def _save(self) -> None:
        if self.ranks.first:
            write_checkpoint(
                self.checkpoint,
                {
                    "identity": json.dumps(self._identity()),
                    "history": json.dumps(self.history),
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    **({} if self.best is None else {"best": self.best}),
                },
            )
        self.saved = len(self.history)

    def _write_log(self) -> None:
        if not self.ranks.first:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_text(self.folder / LOG, lines)

    def _restore(self, content: dict[str, Any]) -> None:
        ours = self._identity()
        try:
            other = other_part({**json.loads(content["identity"])}, ours)
            state, momentum, scale = content["model"], content["optimizer"], content["scaler"]
            history = json.loads(content["history"])
            if not isinstance(history, list) or not all(_is_entry(entry) for entry in history):
                raise ValueError("no history of epochs")
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.checkpoint}: incomplete or altered ({error!r})") from error
        if other is not None:
            raise ValueError(
                f"{self.checkpoint}: give another --out, or delete {self.folder} to start anew: a checkpoint "
                f"of another {other}"
            )
        try:
            self.model.load_state_dict(state)
            self.optimizer.load_state_dict(momentum)
            if scale:
                self.scaler.load_state_dict(scale)
            if self.keep_best and "best" in content:
                now = self.model.state_dict()
                if {k: v.shape for k, v in content["best"].items()} != {k: v.shape for k, v in now.items()}:
                    raise ValueError("other weights of the best epoch")
                self.best = dict(content["best"])
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.checkpoint}: does not fit the network ({reason_of(error)})") from error
        self.history, self.saved = history, len(history)

    def _finish(self) -> dict[str, Any]:
        last = self.history[-1]
        if self.best is not None:
            self.model.load_state_dict(self.best)
            last = self.history[_best_epoch(self.history) - 1]
        result = {
            "schema": 1,
            "kind": "train",
            **self._identity(),
            "augment": self.augment,
            "device": self.device.type,
            "processes": self.ranks.world,
            "cost": {"macs": self.cost.macs, "params": self.cost.params},
            "test_error": last["test_error"],
            "test_loss": last["test_loss"],
            "seconds": sum(entry["seconds"] for entry in self.history),
            "history": self.history,
            "environment": environment(),
        }
        if self.best is not None:
            result["best_epoch"] = last["epoch"]
        if len(self.history) < self.recipe.epochs:
            result["stopped"] = self.stop.reason(self.history)
        info = {"data": self.data.describe(), "test_error": last["test_error"]}
        if self.ranks.first:
            save(self.model, self.folder / ARTIFACT, info=info)
            write_json(self.folder / RESULT, result)
        return result
