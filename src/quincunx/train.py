"""One training loop: reproducible, resumable to the bit on the CPU, and it documents itself."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from quincunx.artifact import check_replaceable, save, spec_of, write_atomically, write_json
from quincunx.cost import cost, inference_mode_of
from quincunx.data import ImageData, Split, batches
from quincunx.latency import environment

__all__ = ["Evaluation", "Interrupted", "Recipe", "RunFailed", "evaluate", "fit", "read_checkpoint"]

_FORMAT = "quincunx-checkpoint"
_VERSION = 1
CHECKPOINT, LOG, RESULT, ARTIFACT = "checkpoint.pt", "log.jsonl", "run.json", "model"


_AUGMENTATIONS = ("none", "cifar", "imagenet")
_PRECISIONS = ("float32", "bfloat16", "float16")


class RunFailed(RuntimeError):
    """Training started and could not go on; the message says what is kept."""


class Interrupted(RunFailed):
    """Training was stopped by the user; the message says how to go on."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum and a step schedule.

    Attributes:
        name: of the recipe.
        epochs: passes over the training images.
        batch_size: images a step.
        lr: learning rate at the start.
        milestones: shares of the epochs after which the rate is multiplied by ``gamma``.
        warmup: share of the epochs in which the rate rises linearly from zero.
        weight_decay: on every parameter.
        momentum: of SGD, Nesterov's form.
        augment: "none", "cifar" (pad, crop, flip) or "imagenet" (crop by scale and aspect, mirror,
            jitter); None lets the data set say.
        precision: "float32", or automatic mixed precision: convolutions and the maps between them in
            "bfloat16" or, with scaled losses, "float16"; weights, batch statistics and loss in float32.
        accumulate: parts in which a batch passes through the network before the weights change;
            batch norm then normalises each part by itself.
        channels_last: memory format.

    Raises:
        ValueError: a value out of its range.
    """

    name: str = "custom"
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float = 0.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    augment: str | None = None
    precision: str = "float32"
    accumulate: int = 1
    channels_last: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for key in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{key}={value!r}: expected an integer")
        for key, holds, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("milestones", all(0 < m < 1 for m in self.milestones), "shares of the epochs, in (0, 1)"),
            ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
            ("warmup", 0 <= self.warmup < 1, "a share of the epochs, in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("augment", self.augment in (None, *_AUGMENTATIONS), f"one of {', '.join(_AUGMENTATIONS)}"),
            ("precision", self.precision in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}"),
            ("accumulate", 1 <= self.accumulate <= self.batch_size, "from 1 to batch_size"),
        ):
            if not holds:
                raise ValueError(f"{key}={getattr(self, key)!r}: expected {expected}")

    def lr_at(self, progress: float) -> float:
        """The learning rate after a share ``progress`` of all steps."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        return self.lr * self.gamma ** sum(progress >= m for m in self.milestones)


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and share of wrong answers (top-1 error, in [0, 1]) over ``images`` images."""

    loss: float
    error: float
    images: int


def evaluate(model: nn.Module, split: Split, data: ImageData, *, batch_size: int = 256) -> Evaluation:
    """Loss and top-1 error of a network on one part of a data set.

    Raises:
        ValueError: the network's outputs are not the data set's classes, or its inputs not its images.
    """
    _check_channels(model, data)
    loss, wrong = 0.0, 0
    with inference_mode_of(model):
        for images, labels in batches(split, data, batch_size):
            scores = model(images)
            _check_scores(scores, data)
            loss += float(F.cross_entropy(scores, labels, reduction="sum"))
            wrong += int((scores.argmax(1) != labels).sum())
    return Evaluation(loss / len(split), wrong / len(split), len(split))


def _check_channels(model: nn.Module, data: ImageData) -> None:
    taken = getattr(model, "quincunx_spec", {}).get("in_channels", data.in_channels)
    if taken != data.in_channels:
        raise ValueError(
            f"model: takes images of {taken} channels, but those of {data.name} have {data.in_channels}"
        )


def _check_scores(scores: Tensor, data: ImageData) -> None:
    if scores.dim() != 2 or scores.shape[1] != len(data.classes):
        raise ValueError(
            f"model: gives scores of shape {tuple(scores.shape)}, but {data.name} has "
            f"{len(data.classes)} classes"
        )


@contextmanager
def progress_bar(shown: bool) -> Iterator[Progress]:
    """A bar with count, elapsed and remaining time, on standard error."""
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
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield bar


def fit(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    folder: str | Path,
    *,
    seed: int = 0,
    resume: bool = False,
    progress: bool | str = False,
) -> dict[str, Any]:
    """Train a network and write the run's folder.

    The folder gets ``checkpoint.pt`` (after each epoch, atomically), ``log.jsonl`` (a line an epoch),
    ``run.json`` (the result) and ``model/`` (the artifact). Order and augmentation of an epoch depend
    on the seed and the epoch's number alone, so a resumed run equals an uninterrupted one, bit for
    bit on the CPU with the same number of threads.

    Args:
        model: a network made by :func:`quincunx.networks.build`; trained in place.
        data: training and test images.
        recipe: how.
        folder: of the run.
        seed: of order and augmentation.
        resume: go on from the folder's checkpoint, or start if there is none.
        progress: show a bar, under this name.

    Returns:
        The content of ``run.json``.

    Raises:
        ValueError: the network does not fit the data; the checkpoint is corrupt, or of another network,
            recipe, seed or data set; the folder holds something else where the artifact goes.
        FileExistsError: the folder holds a run and ``resume`` was not asked for.
        RunFailed: the loss is not finite, or the disk is full; the last checkpoint is kept.
        Interrupted: Ctrl-C; the last checkpoint is kept.
    """
    return _Run(model, data, recipe, Path(folder), seed).go(resume, progress)


class _Run:
    """The state of one training run."""

    def __init__(self, model: nn.Module, data: ImageData, recipe: Recipe, folder: Path, seed: int) -> None:
        self.model, self.data, self.recipe, self.folder, self.seed = model, data, recipe, folder, seed
        self.spec = spec_of(model)
        _check_channels(model, data)
        height, width = data.size
        example = torch.zeros(1, data.in_channels, height, width)
        with inference_mode_of(model):
            _check_scores(model(example), data)
        self.cost = cost(model, example)
        self.augment = recipe.augment or ("cifar" if data.augment else "none")
        # float16 has too few exponents for small gradients: the loss is scaled up before it is derived
        self.scaler = torch.amp.GradScaler("cpu", enabled=recipe.precision == "float16")
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
        )
        self.history: list[dict[str, float]] = []
        self.saved = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def go(self, resume: bool, progress: bool | str) -> dict[str, Any]:
        if self.checkpoint.exists():
            if not resume:
                raise FileExistsError(
                    f"{self.folder}: holds a run already; --resume goes on with it, another --out starts anew"
                )
            self._restore()
        # an artifact that cannot be written is better known before the training than after it
        check_replaceable(self.folder / ARTIFACT)
        try:
            if not self.history:
                self._save()
            self._write_log()
            with progress_bar(bool(progress)) as bar:
                steps = math.ceil(len(self.data.train) / self.recipe.batch_size)
                task = bar.add_task(
                    progress if isinstance(progress, str) else self.spec["name"],
                    total=steps * self.recipe.epochs,
                    completed=steps * len(self.history),
                    state="",
                )
                while len(self.history) < self.recipe.epochs:
                    entry = self._epoch(
                        len(self.history), steps, lambda state: bar.update(task, advance=1, state=state)
                    )
                    self.history.append(entry)
                    self._save()
                    self._write_log()
            return self._finish()
        except KeyboardInterrupt:
            kept = (
                f"whose checkpoint is in {self.checkpoint}; the same command with --resume goes on"
                if self.checkpoint.exists()
                else "before there was a checkpoint; the same command starts again"
            )
            raise Interrupted(f"stopped after {self.saved} of {self.recipe.epochs} epochs, {kept}") from None
        except OSError as error:
            raise RunFailed(
                f"{error}; the run's last whole checkpoint, if it had one, is still in {self.checkpoint}"
            ) from error

    def _epoch(self, number: int, steps: int, advance: Any) -> dict[str, float]:
        # a large odd factor keeps the streams of neighbouring seeds and epochs apart
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        # anything random inside the network draws from the global generator
        torch.manual_seed((self.seed * 1_000_003 + number + 1) % 2**63)
        self.model.train()
        began = time.perf_counter()
        total, wrong, lr = 0.0, 0, self.recipe.lr
        epoch_batches = batches(
            self.data.train,
            self.data,
            self.recipe.batch_size,
            generator=generator,
            augment=self.augment != "none",
            channels_last=self.recipe.channels_last,
        )
        for step, (images, labels) in enumerate(epoch_batches):
            lr = self.recipe.lr_at((number * steps + step) / (self.recipe.epochs * steps))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.zero_grad(set_to_none=True)
            loss, errors = self._derive(images, labels)
            if not math.isfinite(loss):
                raise self._diverged("loss", loss, number, step + 1, lr)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss * len(labels)
            wrong += errors
            advance(f"epoch {number + 1} loss {total / ((step * self.recipe.batch_size) + len(labels)):.3f}")
        seconds = time.perf_counter() - began
        tested = evaluate(self.model, self.data.test, self.data)
        if not math.isfinite(tested.loss):
            # the last step may be the one that broke the weights: they must not replace good ones
            raise self._diverged("test loss", tested.loss, number, steps, lr)
        count = len(self.data.train)
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

    def _derive(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """Mean loss and wrong answers of one batch, its gradients added to the parameters'."""
        loss, wrong = 0.0, 0
        for part, answers in zip(
            images.tensor_split(self.recipe.accumulate),
            labels.tensor_split(self.recipe.accumulate),
            strict=True,
        ):
            if not len(answers):
                continue
            with self._autocast():
                scores = self.model(part)
            _check_scores(scores, self.data)
            share = F.cross_entropy(scores.float(), answers) * (len(answers) / len(labels))
            self.scaler.scale(share).backward()  # type: ignore[no-untyped-call]
            loss += float(share.detach())
            wrong += int((scores.detach().argmax(1) != answers).sum())
        return loss, wrong

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.recipe.precision)
        return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)

    def _diverged(self, what: str, value: float, number: int, step: int, lr: float) -> RunFailed:
        return RunFailed(
            f"the {what} is {value} in epoch {number + 1}, step {step}, at learning rate {lr:g}; the "
            f"checkpoint after epoch {number} is kept in {self.checkpoint}; a smaller --lr may help"
        )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it."""
        return {
            "network": self.spec,
            "recipe": {**asdict(self.recipe), "milestones": list(self.recipe.milestones)},
            "data": self.data.describe(),
            "seed": self.seed,
        }

    def _save(self) -> None:
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "identity": json.dumps(self._identity()),
            "history": json.dumps(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        # written by Python, whose errors tell a full disk from a defect; torch's own writer does not
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(self.checkpoint, lambda path: _write_bytes(path, buffer.getbuffer()))
        self.saved = len(self.history)

    def _write_log(self) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_atomically(self.folder / LOG, lambda path: _write(path, lines))

    def _restore(self) -> None:
        content = read_checkpoint(self.checkpoint)
        ours = self._identity()
        try:
            theirs = json.loads(content["identity"])
            state, momentum, scale = content["model"], content["optimizer"], content["scaler"]
            history = json.loads(content["history"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.checkpoint}: incomplete or altered ({error!r})") from error
        for part in ("network", "recipe", "data", "seed"):
            if theirs.get(part) != ours[part]:
                difference = _difference(theirs.get(part), ours[part])
                raise ValueError(f"{self.checkpoint}: a checkpoint of another {part}: {difference}")
        try:
            self.model.load_state_dict(state)
            self.optimizer.load_state_dict(momentum)
            if scale:
                self.scaler.load_state_dict(scale)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.checkpoint}: does not fit the network ({error})") from error
        self.history, self.saved = history, len(history)

    def _finish(self) -> dict[str, Any]:
        last = self.history[-1]
        result = {
            "schema": 1,
            "kind": "train",
            **self._identity(),
            "augment": self.augment,
            "device": "cpu",
            "cost": {"macs": self.cost.macs, "params": self.cost.params},
            "test_error": last["test_error"],
            "test_loss": last["test_loss"],
            "seconds": sum(entry["seconds"] for entry in self.history),
            "history": self.history,
            "environment": environment(),
        }
        info = {"data": self.data.describe(), "test_error": last["test_error"]}
        save(self.model, self.folder / ARTIFACT, info=info)
        write_json(self.folder / RESULT, result)
        return result


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_bytes(path: Path, content: memoryview) -> None:
    path.write_bytes(content)


def _difference(theirs: Any, ours: Any) -> str:
    """The fields in which two descriptions differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        differing = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
        return ", ".join(f"{k} was {theirs.get(k)!r}, now {ours.get(k)!r}" for k in differing)
    return f"was {theirs!r}, now {ours!r}"


# what zipfile and torch.load raise on damaged or foreign files
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint's content; only tensors and plain values are ever unpickled.

    Raises:
        ValueError: a corrupt or foreign file.
    """
    try:
        # torch itself reads damaged weights without a word
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: corrupt, or no checkpoint of quincunx ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path}: no checkpoint of quincunx")
    if content.get("version") != _VERSION:
        raise ValueError(f"{path}: version {content.get('version')!r}, but this program reads {_VERSION}")
    return content


def recipe_with(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with the given fields changed; None leaves a field as it is."""
    return dataclasses.replace(recipe, **{k: v for k, v in changes.items() if v is not None})
