"""The training loop: reproducible, resumable (bit for bit on the CPU), and self-documenting.

A GPU computes asynchronously. The loop therefore keeps the images on the device, reads losses only
occasionally, and replays the steps of a small network as a CUDA graph (:mod:`quincunx.train.replay`).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.sgd import sgd
from torch.utils._pytree import tree_map_only

from quincunx.data import ImageData, Part, Pass, Resident, Split, WorkerFailed, batches, can_reside, memory
from quincunx.layers.binary import PackedConv2d, PackedLinear
from quincunx.layers.eightbits import quantisation_of
from quincunx.measure.cost import Cost, cost
from quincunx.measure.environment import environment
from quincunx.measure.tasks import BadTask, Task, classification
from quincunx.measure.tasks.ready import is_usual
from quincunx.measure.tasks.scale import ERROR, Scale
from quincunx.measure.tasks.structure import mapped, part_of
from quincunx.modules import evaluation, inference_mode_of
from quincunx.networks.artifact import check_replaceable, save
from quincunx.networks.spec import name_of, spec_of
from quincunx.ops.cuda_graphs import ONE_AT_A_TIME
from quincunx.progress import progress_bar
from quincunx.reading import differing_fields, one_line
from quincunx.surgery.norms import JoinedNorms, join_norms
from quincunx.train.checkpoint import (
    check_disk,
    only_writer,
    read_checkpoint,
    write_checkpoint,
)
from quincunx.train.compiled import NotCompiled, check_compiles, compiled, failing_as
from quincunx.train.evaluation import (
    Evaluation,
    check_channels,
    check_scores,
    device_of,
    evaluate,
    images_at_once,
)
from quincunx.train.loss import Loss
from quincunx.train.processes import ALONE, Ranks, batch_norm_across
from quincunx.train.recipes import Recipe, from_dict
from quincunx.train.replay import (
    Replayed,
    counted_together,
    own_stream,
    warmed,
    why_not,
    written,
)
from quincunx.train.rounded import computing_rounded
from quincunx.writing import write_json, write_text

__all__ = ["Diverged", "Interrupted", "RunFailed", "StopRule", "fit", "other_part", "run_identity"]

CHECKPOINT, LOG, RESULT, ARTIFACT = "checkpoint.pt", "log.jsonl", "run.json", "model"
# on a GPU: steps between readings of the losses if steps are not replayed; the range of a test batch's
# size, within a limit of pixels
_READ_EVERY = 100
_TESTED_AT_ONCE, _TESTED_PIXELS = (256, 1024), 1 << 22


class RunFailed(RuntimeError):
    """Training started and could not continue; the message says what is kept."""


class Diverged(RunFailed):
    """The loss became infinite or not a number; the message says where."""


class Interrupted(RunFailed):
    """The user stopped training; the message says how to continue."""


@dataclass(frozen=True)
class StopRule:
    """Says when a run ends before its last epoch.

    Attributes:
        error: the run ends once the test error is at most this, or in another task than classification once
            the test score is at least as good; None for never.
        patience: the run ends after this many epochs without a better score; None for never.
        scale: the score's, by default that of classification.

    Example:
        >>> StopRule(patience=2).reason([{"test_error": e} for e in (0.3, 0.2, 0.25, 0.2)])
        'no lower test error in 2 epochs'
    """

    error: float | None = None
    patience: int | None = None
    scale: Scale = ERROR

    def reason(self, history: Sequence[Mapping[str, float]]) -> str | None:
        """Return why a run with this history ends; None if it continues."""
        scale = self.scale
        scores = [entry[f"test_{scale.key}"] for entry in history]
        if not scores:
            return None
        if self.error is not None and scale.reached(scores[-1], self.error):
            return f"the test {scale.name} is within {scale.shown(self.error)}"
        costs = [scale.cost(score) for score in scores]
        if self.patience is not None and len(costs) - 1 - costs.index(min(costs)) >= self.patience:
            better = "lower" if scale.better == "lower" else "higher"
            return f"no {better} test {scale.name} in {self.patience} epochs"
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
    task: Task | None = None,
) -> dict[str, Any]:
    """Train a network and write the run's folder.

    The folder gets ``checkpoint.pt`` (after each epoch, atomically), ``log.jsonl`` (a line per epoch),
    ``run.json`` (the result) and ``model/`` (the artifact). Order and augmentation of an epoch depend
    only on the seed and the epoch's number, so a resumed run equals an uninterrupted one, bit for
    bit on the CPU with the same number of threads.

    Several processes, each with the same arguments and its own ``ranks``, share each batch: the
    recipe's batch size is the total, batch norm computes its statistics over all of them, and
    the losses are those of one process with the whole batch, up to rounding. The first process writes.
    Several processes always resume from an existing checkpoint, since a launcher restarts them after one
    of them died.

    On a GPU, order and augmentation equal those of the CPU with the same seed. The images stay on the device
    if they are in memory and not augmented as photographs. The loop checks that losses are finite several
    times per epoch, not at each step, and before writing a checkpoint. The steps of one process with
    networks of torch's and this package's modules are replayed as a CUDA graph unless the recipe
    accumulates, has a teacher, uses float16 or is compiled; "graph" in the result says whether they were, and
    if not, why.

    Several runs may share one process in threads, each with its own networks and folders, for example on a
    GPU that one small network does not fill. A network's random draws during training (dropout) then
    depend on the other runs, since the process has one generator for them; nothing else does.

    Args:
        model: a network made by :func:`quincunx.networks.build`, or one with a recorded factory; trained
            in place, on its current device.
        data: training and test images.
        recipe: the training settings.
        folder: of the run.
        seed: of order and augmentation.
        resume: continue from the folder's checkpoint, or start if there is none.
        progress: show a bar, under this name.
        ranks: this process's place among several, from :func:`quincunx.train.processes.joined`.
        teacher: gives the outputs for a recipe with ``distill``, and the maps for one with
            ``distill_features``; it is evaluated and not changed.
        workers: processes that decode streamed images; by default one per core, at most eight.
        stop: ends the run early; "stopped" in the result then says why.
        keep_best: the network ends with the weights of the epoch of the best test score, "best_epoch" in the
            result, instead of those of the last.
        task: the loss and the score; by default classification. In a task against the original's outputs the
            teacher is the original.

    Returns:
        The content of ``run.json``.

    Raises:
        ValueError: the network has packed one-bit weights; it or its teacher does not fit the data; a
            teacher is missing, or not used; a step needs more memory than is free; the checkpoint is
            corrupt, or belongs to another network, recipe, seed or data set; the folder holds something else
            at the artifact's place; the recipe compiles, and there are several processes, no compiler works
            here or the network cannot be compiled whole.
        FileExistsError: the folder holds a run and ``resume`` is False.
        RunFailed: the loss is not finite, a streamed image cannot be read, the disk is full or too small,
            or another process writes to the folder; the last checkpoint is kept.
        Interrupted: Ctrl-C; the last checkpoint is kept.
    """
    if recipe.find_lr:
        raise ValueError("recipe: find_lr=True: quincunx.train.rates.find_rate finds lr; then find_lr=False")
    rule = stop or StopRule(scale=(task or classification()).scale)
    with ONE_AT_A_TIME:
        run = _Run(model, data, recipe, Path(folder), seed, ranks, teacher, workers, rule, keep_best, task)
    with computing_rounded(model):
        return run.go(resume, progress)


def _check_memory(
    cost_of_one: Cost, share: float, recipe: Recipe, ranks: Ranks, device: torch.device
) -> None:
    """Refuse a step whose maps, one per layer, do not fit in the free memory.

    ``share`` is the size of training images relative to those of the cost.
    """
    images = math.ceil(recipe.batch_size / ranks.world / recipe.accumulate)
    values = sum(math.prod(row.output) for row in cost_of_one.rows)
    memory.check(
        f"a step of {images} images",
        int(images * values * share * (4 if recipe.precision == "float32" else 2)),
        "a smaller --batch-size or a larger --accumulate needs less",
        _free_on(device) if device.type == "cuda" else None,
    )


def _check_rounded(recipe: Recipe, device: torch.device) -> None:
    """Refuse what does not go together with training in eight bits."""
    if device.type != "cpu":
        raise ValueError("model: one that was calibrated for eight bits trains on the CPU")
    if recipe.distill_features > 0:
        raise ValueError(
            f"distill_features={recipe.distill_features:g}: maps within a network in eight bits are rounded; "
            "distill learns from the teacher's outputs"
        )


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.AdamW(
            model.parameters(),
            lr=recipe.lr,
            betas=(recipe.momentum, 0.999),
            weight_decay=recipe.weight_decay,
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
    )


def _others(model: nn.Module, spec: Mapping[str, Any]) -> list[nn.Parameter]:
    """The parameters outside the layers that replaced others.

    Raises:
        ValueError: there are none of these.
    """
    replaced = spec.get("replaced", {})
    if not replaced:
        raise ValueError("first: no layer of this network replaced another; expected 0")
    own = {id(p) for name in replaced for p in model.get_submodule(name).parameters()}
    return [p for p in model.parameters() if id(p) not in own]


def _free_on(device: torch.device) -> int:
    """Return the free bytes of a GPU, including those that torch caches."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def _runs_apart(device: torch.device) -> bool:
    """Return whether a device computes asynchronously, so that reading a value costs time."""
    return device.type == "cuda"


def run_identity(
    network: dict[str, Any], recipe: Recipe, data: ImageData, seed: int, task: Task | None = None
) -> dict[str, Any]:
    """Return everything that two runs must share to be the same run, JSON-ready."""
    facts = {"network": network, "recipe": recipe.to_dict(), "data": data.describe(), "seed": seed}
    return facts if task is None or is_usual(task) else {**facts, "task": task.identity}


def other_part(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """Return the first part in which a run differs from :func:`run_identity`, and how; None if none differs.

    Raises:
        ValueError: its recipe is invalid.
    """
    for part, wanted in ours.items():
        found = theirs.get(part)
        if part == "recipe":
            # a field that did not exist yet takes its default
            found = from_dict(found or {}).to_dict()
        if found != wanted:
            return f"{part}: {differing_fields(found, wanted)}"
    return None


def _best_epoch(history: Sequence[Mapping[str, float]], scale: Scale = ERROR) -> int:
    """Return the number of the first epoch of the best test score; ties go to the least test loss."""
    name = f"test_{scale.key}"
    best = min(history, key=lambda entry: (scale.cost(entry[name]), entry["test_loss"]))
    return int(best["epoch"])


def _is_entry(value: object, key: str) -> bool:
    """Return whether a value is a valid epoch of a checkpoint's history."""
    names = ("epoch", f"train_{key}", "test_loss", f"test_{key}", "seconds")
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
        task: Task | None = None,
    ) -> None:
        self.task = task or classification()
        self.scale, self.teacher = self.task.scale, teacher
        self.stop, self.keep_best = stop, keep_best
        # the weights after the best epoch, if asked for
        self.best: dict[str, Tensor] | None = None
        self.model, self.data, self.recipe, self.folder, self.seed = model, data, recipe, folder, seed
        self.ranks, self.workers = ranks, workers
        self.spec, self.rounded = spec_of(model), quantisation_of(model)
        if self.rounded is not None:
            _check_rounded(recipe, device_of(model))
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
        if self.task.classifies:
            with inference_mode_of(model):
                check_scores(model(example), data)
        self.loss = Loss(recipe, model, teacher, example, self.task)
        if not data.labelled and recipe.distill < 1 and not self.task.needs_original:
            raise ValueError(
                f"distill={recipe.distill:g}: the images of {data.name} have no labels; 1 learns from "
                "the teacher alone"
            )
        if teacher is not None and self.task.classifies:
            with inference_mode_of(teacher):
                check_scores(teacher(example), data)
        self.cost = cost(model, example)
        self.augment = recipe.augment or data.augment
        # float16 has too few exponents for small gradients, so the loss is scaled before the backward pass
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        if recipe.compile and ranks.world > 1:
            raise NotCompiled(
                f"compile=True: {ranks.world} processes exchange batch statistics within the network, which "
                "cannot be compiled whole then; leave it out, or train in one process"
            )
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = _optimizer(model, recipe)
        # what waits while the layers that replaced others train alone
        self.waiting = _others(model, self.spec) if recipe.first else []
        # the module that a step calls: torch averages the gradients of several processes
        self.stepped: nn.Module | JoinedNorms = model
        self.history: list[dict[str, float]] = []
        self.tested: Evaluation | None = None
        self.saved = 0
        self.apart: _Apart | None = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def go(self, resume: bool, progress: bool | str) -> dict[str, Any]:
        with ExitStack() as stack:
            try:
                if self.ranks.first:
                    stack.enter_context(only_writer(self.folder))
                # a launcher restarts all processes after one died
                self._begin(resume or self.ranks.world > 1)
                if self.ranks.world > 1:
                    stack.enter_context(batch_norm_across(self.model))
                    self.stepped = DistributedDataParallel(self.model)
                    # DistributedDataParallel, if still alive, can keep the process from ending
                    stack.callback(self._part)
                else:
                    if self.recipe.compile:
                        self.stepped = compiled(self.model)
                    stack.enter_context(own_stream(self.device))
                if _runs_apart(self.device):
                    self.apart = _Apart(self)
                    stack.callback(self.apart.close)
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
        """Run every check that may refuse the run before the first step."""
        content = self.ranks.from_first(lambda: self._found(resume))
        if content is not None:
            self._restore(content)
        # find out before training, not after it, that the result cannot be written
        self.ranks.from_first(lambda: check_replaceable(self.folder / ARTIFACT))
        state = sum(t.nbytes for t in self.model.state_dict().values())
        # a checkpoint has weights and momentum, and the old one stays until the new one is written
        self.ranks.from_first(lambda: check_disk(self.folder, (7 if self.keep_best else 5) * state))
        share = math.prod(self.data.step_size(self.augment)) / math.prod(self.data.size)
        _check_memory(self.cost, share, self.recipe, self.ranks, self.device)
        if not self.task.classifies:
            self._try_loss()
        if self.recipe.compile and len(self.history) < self.recipe.epochs:
            shape = (2, self.data.in_channels, *self.data.step_size(self.augment))
            with self._autocast():
                check_compiles(self.model, torch.zeros(shape, device=self.device))
        if not self.history:
            self._save()
        self._write_log()

    def _try_loss(self) -> None:
        """Check on one image that the loss has a gradient to the weights, before a run begins.

        Raises:
            ValueError: it has none, or is not finite.
        """
        images, target = next(batches(self.data.train, self.data, 1, workers=0))
        images, target = images.to(self.device), mapped(lambda t: t.to(self.device), target)
        with evaluation(self.model), torch.enable_grad():
            loss = self.loss.of_outputs(self.model(images), target, self.loss.asked(images), len(images))
            named = [p for p in self.model.parameters() if p.requires_grad]
            found = torch.autograd.grad(loss, named, allow_unused=True) if loss.requires_grad else ()
        name = self.task.name
        if not any(gradient is not None for gradient in found):
            raise BadTask(
                f"task {name!r}: its loss has no gradient to the network's weights; it must be computed from "
                "the output by torch, without detach(), item(), argmax or torch.no_grad()"
            )
        if not bool(loss.isfinite()):
            raise BadTask(f"task {name!r}: the loss of the first training image is {float(loss)}")

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
                if self.apart is not None:
                    self.apart.record()
                entry = self._epoch(
                    len(self.history),
                    steps,
                    lambda state, done=1: bar.update(task, advance=done, state=state),
                )
                self.history.append(entry)
                if self.keep_best and _best_epoch(self.history, self.scale) == len(self.history):
                    self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
                self._save()
                self._write_log()
        return self._finish()

    def generator(self, number: int) -> torch.Generator:
        """Return the generator that draws the order and the augmentation of an epoch."""
        # a large odd factor separates the streams of neighbouring seeds and epochs
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)

    def _epoch(self, number: int, steps: int, advance: Callable[..., None]) -> dict[str, float]:
        # random operations inside the network use the global generator
        torch.manual_seed((self.seed * 1_000_003 + number + 1) % 2**63)
        self.model.train()
        if self.stepped is self.model and self.device.type == "cpu":
            self.stepped = join_norms(self.model)
        began = time.perf_counter()
        count = len(self.data.train)
        rates = [self._rate(number * steps + step, steps) for step in range(steps)]
        total, scored, done = 0.0, 0.0, 0
        work = self._steps(number, rates) if self.apart is None else self.apart.steps(number, rates)
        for so_far, total, scored in work:  # noqa: B007 - the last values are used
            seen = min(count, so_far * self.recipe.batch_size)
            advance(f"epoch {number + 1} loss {total / seen:.3f}", so_far - done)
            done = so_far
        seconds = time.perf_counter() - began
        try:
            tested = self.tested = self._tested()
        except BadTask as error:
            raise RunFailed(
                f"{error}; the checkpoint after epoch {number} is kept in {self.checkpoint}"
            ) from error
        if not math.isfinite(tested.loss):
            # the last step may have broken the weights: they must not replace good ones
            raise self.diverged("test loss", tested.loss, number, f"step {steps}", rates[-1])
        return {
            "epoch": number + 1,
            "lr": rates[-1],
            "train_loss": total / count,
            f"train_{self.scale.key}": scored / count,
            "test_loss": tested.loss,
            f"test_{self.scale.key}": tested.score,
            "seconds": seconds,
            "images_per_second": count / seconds,
        }

    def _rate(self, taken: int, steps: int) -> float:
        """Return the learning rate after a number of steps in total."""
        return self.recipe.lr_at(taken / (self.recipe.epochs * steps), taken)

    def _steps(self, number: int, rates: Sequence[float]) -> Iterator[tuple[int, float, float]]:
        """Run the steps of an epoch; after each yield their number, summed losses and summed scores."""
        total, scored, count = 0.0, 0.0, len(self.data.train)
        for step, (images, labels) in enumerate(self.read(number)):
            for group in self.optimizer.param_groups:
                group["lr"] = rates[step]
            self.optimizer.zero_grad(set_to_none=True)
            whole = min(self.recipe.batch_size, count - step * self.recipe.batch_size)
            share, scores = self.derive(images, labels, whole)
            loss, all_scores = self.ranks.total([float(share), float(scores)])
            if not math.isfinite(loss):
                raise self.diverged("loss", loss, number, f"step {step + 1}", rates[step])
            self.hold_back(number, step, len(rates))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss * whole
            scored += all_scores
            yield step + 1, total, scored

    def hold_back(self, number: int, step: int, steps: int) -> None:
        """Leave out of a step what waits for the layers that replaced others."""
        if number * steps + step < self.recipe.first * self.recipe.epochs * steps:
            for parameter in self.waiting:
                parameter.grad = None  # neither moved nor decayed

    def _tested(self) -> Evaluation:
        if self.apart is None:
            return evaluate(
                self.model,
                self.data.test,
                self.data,
                ranks=self.ranks,
                workers=self.workers,
                task=self.task,
                original=self.teacher,
            )
        fewest, most = _TESTED_AT_ONCE
        most = max(fewest, min(most, _TESTED_PIXELS // math.prod(self.data.size)))
        most = images_at_once(self.data.test, self.task, most)
        count = len(self.data.test)
        return evaluate(
            self.model,
            self.data.test,
            self.data,
            # batches of one size, since each size may need its own kernels
            batch_size=math.ceil(count / math.ceil(count / most)),
            ranks=self.ranks,
            workers=self.workers,
            held=self.apart.tests,
            task=self.task,
            original=self.teacher,
        )

    def read(self, number: int) -> Iterator[tuple[Tensor, Any]]:
        """Yield an epoch's batches on the device; an unreadable image or a dead worker ends the run
        with the reason."""
        source = batches(
            self.data.train,
            self.data,
            self.recipe.batch_size,
            generator=self.generator(number),
            augment=self.augment,
            channels_last=self.recipe.channels_last,
            rank=self.ranks.rank,
            world=self.ranks.world,
            workers=self.workers,
        )
        while True:
            try:
                images, labels = next(source)
            except StopIteration:
                return
            except (ValueError, WorkerFailed) as error:
                raise RunFailed(
                    f"{error}; the checkpoint after epoch {self.saved} is kept in {self.checkpoint}"
                ) from error
            yield images.to(self.device), mapped(lambda tensor: tensor.to(self.device), labels)

    def derive(self, images: Tensor, labels: Any, whole: int) -> tuple[Tensor, Tensor]:
        """Return mean loss and summed scores of a batch of ``whole`` images; leave its gradients.

        ``images`` are this process's share of the batch; the results are for this share, on the device.
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        scored = torch.zeros((), dtype=torch.float64, device=self.device)
        parts, start = self.recipe.accumulate, 0
        for i, part in enumerate(images.tensor_split(parts)):
            # every process must take part in each exchange, even without images
            if not len(part) and self.ranks.world == 1:
                continue
            target = part_of(labels, slice(start, start + len(part)))
            start += len(part)
            with self._exchange(last=i == parts - 1), self._compiling():
                with self._autocast(), self.loss.following():
                    output, wanted = self.stepped(part), self.loss.asked(part)
                    maps = self.loss.of_maps()
                if self.task.classifies:
                    check_scores(output[0] if isinstance(output, tuple) else output, self.data)
                share = (self.loss.of_outputs(output, target, wanted, len(part)) + maps) / whole
                # torch averages the processes' gradients, but we want their sum
                self.scaler.scale(share * self.ranks.world).backward()  # type: ignore[no-untyped-call]
            loss = loss + share.detach()
            truth = wanted if self.task.needs_original else target
            if len(part):
                scored = scored + self.task.scores(output, truth, len(part)).sum()
        return loss, scored

    def _exchange(self, *, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients once per step, with its last part."""
        if isinstance(self.stepped, DistributedDataParallel) and not last:
            return self.stepped.no_sync()
        return nullcontext()

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Make what the compiler alone refuses at a step the end of the run."""
        if not self.recipe.compile:
            yield
            return
        try:
            with failing_as("the compiler failed at a step"):
                yield
        except NotCompiled as error:
            raise RunFailed(
                f"{error}; the checkpoint after epoch {self.saved} is kept in {self.checkpoint}"
            ) from error

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.recipe.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def diverged(self, what: str, value: float, number: int, where: str, lr: float) -> Diverged:
        return Diverged(
            f"the {what} is {value} in epoch {number + 1}, {where}, at learning rate {lr:g}; the "
            f"checkpoint after epoch {number} is kept in {self.checkpoint}; a smaller --lr may help"
        )

    def _identity(self) -> dict[str, Any]:
        """Return everything that a checkpoint must share with the run that resumes it."""
        facts = run_identity(self.spec, self.recipe, self.data, self.seed, self.task)
        if self.rounded is None:
            return facts
        record = json.dumps(self.rounded.to_dict(), sort_keys=True)
        return {**facts, "int8": hashlib.sha256(record.encode()).hexdigest()}

    def _save(self) -> None:
        if self.ranks.first:
            content = {
                "identity": json.dumps(self._identity()),
                "history": json.dumps(self.history),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                **({} if self.best is None else {"best": self.best}),
            }
            if self.device.type != "cpu":
                content = tree_map_only(Tensor, Tensor.cpu, content)
            write_checkpoint(self.checkpoint, content)
        self.saved = len(self.history)

    def _write_log(self) -> None:
        if not self.ranks.first:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_text(self.folder / LOG, lines)

    def _restore(self, content: dict[str, Any]) -> None:
        # a run in float32 is another than one in eight bits
        ours = {"int8": None, **self._identity()}
        try:
            other = other_part({**json.loads(content["identity"])}, ours)
            state, momentum, scale = content["model"], content["optimizer"], content["scaler"]
            history = json.loads(content["history"])
            if not isinstance(history, list) or not all(
                _is_entry(entry, self.scale.key) for entry in history
            ):
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
            raise ValueError(f"{self.checkpoint}: does not fit the network ({one_line(error)})") from error
        self.history, self.saved = history, len(history)

    def _finish(self) -> dict[str, Any]:
        last = self.history[-1]
        if self.best is not None:
            self.model.load_state_dict(self.best)
            last = self.history[_best_epoch(self.history, self.scale) - 1]
        result = {
            "schema": 1,
            "kind": "train",
            **self._identity(),
            "augment": self.augment,
            "device": self.device.type,
            "processes": self.ranks.world,
            "cost": {"macs": self.cost.macs, "params": self.cost.params},
            f"test_{self.scale.key}": last[f"test_{self.scale.key}"],
            "test_loss": last["test_loss"],
            "seconds": sum(entry["seconds"] for entry in self.history),
            "history": self.history,
            "environment": environment(),
        }
        if not self.task.classifies and self.task.further:
            # of the network as it is now, which a resumed run that was finished has not tested
            known = self.tested if self.best is None and self.tested is not None else self._tested()
            result["further"] = known.further
        if self.best is not None:
            result["best_epoch"] = last["epoch"]
        if self.apart is not None:
            result |= self.apart.facts()
        if len(self.history) < self.recipe.epochs:
            result["stopped"] = self.stop.reason(self.history)
        info = {"data": self.data.describe(), f"test_{self.scale.key}": result[f"test_{self.scale.key}"]}
        if "task" in result:
            info["task"] = result["task"]
        if self.ranks.first:
            save(self.model, self.folder / ARTIFACT, info=info)
            write_json(self.folder / RESULT, result)
        return result


class _Apart:
    """The steps of a run on a device that computes asynchronously."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.held, self.tests = self._held(run.data.train, run.augment), self._held(run.data.test, "none")
        self.total = torch.zeros((), dtype=torch.float64, device=run.device)
        self.scored = torch.zeros((), dtype=torch.float64, device=run.device)
        self.rate = torch.zeros(1, device=run.device)
        # the step of a whole batch, and that of the smaller one at an epoch's end
        self.replayed: Replayed | None = None
        self.rest: Replayed | None = None
        self.why: str | None = "no step was needed"
        self._tried = False
        self._next: tuple[int, Pass] | None = None

    def _held(self, part: Part, augment: str) -> Resident | None:
        """Put the images on the device, if they fit there."""
        if not isinstance(part, Split) or not can_reside(part, augment):
            return None
        device = self.run.device
        if device.type == "cuda" and part.images.nbytes > _free_on(device) // 2:
            return None
        return Resident(part, self.run.data, device)

    # ---- replaying

    def _why_not(self) -> str | None:
        run = self.run
        for holds, why in (
            (run.ranks.world == 1, "several processes exchange at each step"),
            (run.recipe.optimizer == "sgd", "steps of Adam are not recorded"),
            (run.recipe.accumulate == 1, "batches pass in parts"),
            (run.loss.teacher is None, "a teacher is asked at each step"),
            (not run.recipe.first, "some layers train before the others"),
            (not run.recipe.compile, "the network is compiled"),
            (not run.scaler.is_enabled(), "in float16 the scale of the losses may change at each step"),
            (self.held is not None, "the images come from the processor"),
            (len(run.data.train) >= run.recipe.batch_size, "there are fewer images than a batch has"),
        ):
            if not holds:
                return why
        return why_not(run.model)

    def record(self) -> None:
        """Record a step if it can be replayed; network, momentum and counts do not change."""
        if self._tried:
            return
        self._tried, self.why = True, self._why_not()
        if self.why is None and self.held is not None:
            try:
                self._record(self.held)
            except RuntimeError as error:
                self._forget()
                self.why = f"a step cannot be recorded ({one_line(error)})"

    def _record(self, held: Resident) -> None:
        run, size = self.run, self.run.recipe.batch_size
        run.model.train()
        state = [*run.model.parameters(), *run.model.buffers(), self.total, self.scored]
        for group in run.optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                # torch creates them at the first step as a copy of the gradient, which zeros lead to as well
                kept = run.optimizer.state[parameter]
                if kept.get("momentum_buffer") is None:
                    kept["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
                state.append(kept["momentum_buffer"])
        whole, rest = divmod(len(held), size)
        count = min(held.at_once(size), whole)
        self.replayed = Replayed(self._whole_step, self.rate, state, (size, *held.shape), count)
        if rest:
            self.rest = Replayed(self._whole_step, self.rate, state, (rest, *held.shape), 1)
        # run the rest of an epoch once, so that one thread at a time compiles kernels
        warmed(run._tested)
        run.model.train()

    def _whole_step(self, images: Tensor, labels: Tensor) -> None:
        """Run a step from bytes to weights, for images [B, H, W, C]; nothing in it waits for the device."""
        with counted_together(self.run.model):
            self._derive(images.permute(0, 3, 1, 2), labels, len(labels))
        self._update()

    def _derive(self, images: Tensor, labels: Tensor, whole: int) -> None:
        run = self.run
        run.optimizer.zero_grad(set_to_none=True)
        loss, scored = run.derive(images if run.recipe.channels_last else images.contiguous(), labels, whole)
        self.total.add_(loss * whole)
        self.scored.add_(scored)

    def _update(self) -> None:
        """Take an optimiser step with the rate on the device, which a graph can contain."""
        run = self.run
        # the fused kernel reads the rate from the device, others take a number
        fused = run.device.type == "cuda"
        rate: Any = self.rate if fused else float(self.rate)
        for group in run.optimizer.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            momentum = [run.optimizer.state[p]["momentum_buffer"] for p in learning if group["momentum"]]
            with torch.no_grad():
                sgd(
                    learning,
                    [p.grad for p in learning],
                    momentum,
                    fused=fused,
                    foreach=False,
                    lr=rate,
                    **{
                        k: group[k] for k in ("weight_decay", "momentum", "dampening", "nesterov", "maximize")
                    },
                )
            written(learning)

    # ---- an epoch

    def steps(self, number: int, rates: Sequence[float]) -> Iterator[tuple[int, float, float]]:
        """Run the steps like :meth:`_Run._steps`, but yield after several steps at a time."""
        run, size, count = self.run, self.run.recipe.batch_size, len(self.run.data.train)
        self.total.zero_()
        self.scored.zero_()
        if self.held is None:
            source = run.read(number)
        else:
            taken = self._taken(number).to(run.device)
            if self.replayed is not None:
                yield from self._replays(number, rates, self.held, taken, self.replayed)
                return
            source = self.held.batches(taken)
        for step, (images, labels) in enumerate(source):
            self._note_rate(rates[step])
            self._derive(images, labels, min(size, count - step * size))
            run.hold_back(number, step, len(rates))
            run.scaler.step(run.optimizer)
            run.scaler.update()
            if (step + 1) % _READ_EVERY == 0 or step + 1 == len(rates):
                yield self._so_far(number, step + 1, rates)

    def _replays(
        self, number: int, rates: Sequence[float], held: Resident, taken: Pass, replayed: Replayed
    ) -> Iterator[tuple[int, float, float]]:
        """Replay an epoch's steps, as many at a time as there are images ready."""
        size, on_device = self.run.recipe.batch_size, torch.tensor(rates, device=self.run.device)
        whole, done = len(held) // size, 0
        while done < len(rates):
            some = min(replayed.count, whole - done)
            # the smaller batch, if there is one, is the last
            which = replayed if some else self.rest
            some = max(some, 1)
            if which is None:
                raise AssertionError("a smaller batch that nobody recorded")
            images, labels = held.some(taken, done * size, (done + some) * size)
            which.run(images, labels, on_device[done : done + some])
            done += some
            yield self._so_far(number, done, rates)
        self._note_rate(rates[-1])

    def _note_rate(self, rate: float) -> None:
        for group in self.run.optimizer.param_groups:
            group["lr"] = rate

    def _so_far(self, number: int, done: int, rates: Sequence[float]) -> tuple[int, float, float]:
        """Return steps, summed losses and summed scores; waits for the device."""
        run = self.run
        if done == len(rates) and self.held is not None and number + 1 < run.recipe.epochs:
            # the device is busy meanwhile
            self._next = number + 1, self._drawn(number + 1)
        total, scored = run.ranks.total([float(self.total), float(self.scored)])
        if not math.isfinite(total):
            raise run.diverged("loss", total, number, f"by step {done}", rates[done - 1])
        return done, total, scored

    def _taken(self, number: int) -> Pass:
        if self._next is not None and self._next[0] == number:
            return self._next[1]
        return self._drawn(number)

    def _drawn(self, number: int) -> Pass:
        run = self.run
        if self.held is None:
            raise AssertionError("drawn for images that are elsewhere")
        return self.held.drawn(
            run.recipe.batch_size,
            generator=run.generator(number),
            augment=run.augment,
            rank=run.ranks.rank,
            world=run.ranks.world,
        )

    def facts(self) -> dict[str, Any]:
        """Return the facts for the result."""
        device = self.run.device
        own = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        return {**own, "graph": {"used": self.replayed is not None, "why_not": self.why}}

    def _forget(self) -> None:
        """Free the memory of recorded steps, which holds the gradients."""
        self.run.optimizer.zero_grad(set_to_none=True)
        for replayed in (self.replayed, self.rest):
            if replayed is not None:
                replayed.close()
        self.replayed = self.rest = None

    def close(self) -> None:
        self._forget()
        # free GPU memory now, not when Python's garbage collector finds the reference cycles
        self.held = self.tests = None
