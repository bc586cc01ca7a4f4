"""Accelerate a trained network with a method: fit, re-normalise, fine-tune, judge and time it."""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quincunx.acceleration.baselines import Baselines, Picked, pick
from quincunx.acceleration.free import FreeChoice, SmallerInput, scaled_inputs, sizes_refused
from quincunx.acceleration.gain import without_slower
from quincunx.acceleration.identity import (
    acceleration_identity,
    fits_folder,
    where_named,
)
from quincunx.acceleration.journal import FolderJournal
from quincunx.acceleration.judge import (
    JudgedStage,
    doubts_about,
    doubts_about_drop,
    inputs_of,
    renormalise,
    sample_batches,
)
from quincunx.acceleration.lowered import ready_for, to_train_rounded
from quincunx.acceleration.sample import sample_record
from quincunx.acceleration.scores import Shared
from quincunx.acceleration.search import search
from quincunx.acceleration.target import Search, Target
from quincunx.acceleration.timing import (
    cost_record,
    format_served,
    time_record,
)
from quincunx.acceleration.together import Team
from quincunx.acceleration.watching import search_bar
from quincunx.data import Drawn, ImageData
from quincunx.fusion.fuse import fuse
from quincunx.layers.eightbits import note_quantisation, quantisation_of
from quincunx.measure.environment import environment
from quincunx.measure.tasks import Task, classification
from quincunx.methods import BinaryConnect
from quincunx.methods.registry import candidates_named
from quincunx.modules import copied
from quincunx.networks.artifact import save, storable_state
from quincunx.networks.spec import spec_of
from quincunx.progress import progress_bar
from quincunx.report.verdict import judge as judge_target
from quincunx.surgery.calibration import Layer, Pool
from quincunx.surgery.method import (
    Accelerated,
    Journal,
    Method,
    Replacement,
)
from quincunx.surgery.replace import replace_layers
from quincunx.train.checkpoint import only_writer
from quincunx.train.evaluation import check_finite, label_with, score_images
from quincunx.train.loop import Diverged, StopRule
from quincunx.train.processes import ALONE, Ranks
from quincunx.train.rates import find_rate
from quincunx.train.recipes import Recipe, recipe_with
from quincunx.writing import write_json

__all__ = [
    "accelerate_trained",
    "plan_for_target",
    "run_search",
]

# fine-tuning towards an accuracy ends after this many epochs without progress
_PATIENCE = 5
# if accuracy is missed, also judge networks at these shares of the achieved speed-up
_ALTERNATIVES = (2 / 3, 1 / 3)


def accelerate_trained(
    model: nn.Module,
    method: Method | Search | SmallerInput,
    data: ImageData,
    out: str | Path,
    *,
    layers: Sequence[str] = (),
    calibration: int = 500,
    normalisation: int = 2000,
    recipe: Recipe | None = None,
    batch: int = 8,
    rounds: int = 11,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
    fits: Path | None = None,
    keep_diverged: bool = False,
    keep_slower: bool = True,
    keep_best: bool = True,
    dtype: torch.dtype | None = None,
    task: Task | None = None,
    tell: Callable[[str], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Accelerate a trained network and measure its cost: error at each stage, time of each layer.

    The folder gets ``accelerate.json`` (the result), ``model`` (the artifact, with one-bit weights packed),
    ``layers`` (finished layers, which the same call does not fit again) and, with a recipe, ``finetune``
    (the fine-tuning run; training can continue from its own artifact).

    Args:
        model: a trained network with a spec or a recorded factory; it is not changed.
        method: such as ``qx.Espace()``, a search for a target, or a smaller input.
        data: its training images are used to calibrate and fine-tune, its test images to judge. If they have
            no labels the network's own predictions replace them, and a recipe must train on the network's
            outputs only (``distill=1``).
        out: folder of the results.
        layers: patterns of layer names such as "stages.*.conv2"; by default every layer.
        calibration: number of training images that the method gets.
        normalisation: number of training images used to re-estimate batch norm.
        recipe: of fine-tuning; one with ``distill`` or ``distill_features`` uses the original network as
            teacher. If the target has ``max_drop``, fine-tuning stops once the test error is within it, or
            has not improved for some epochs.
        batch: images of the timed inputs.
        rounds: how often each candidate is timed.
        seed: of the draws and of fine-tuning.
        workers: processes that decode streamed images.
        progress: show bars.
        fits: folder for finished layers instead of ``out``, shared with other methods that have the same
            fits, such as ESPACE at other rates.
        keep_diverged: if fine-tuning diverges, the result is the network from before it, and "diverged"
            and the last stage's name say so.
        keep_slower: keep layers of a method that save the network no time, timed with and without them;
            False restores those, except for methods that reduce the size on disk. A search
            never chooses such layers. The finished network is timed once more: if it is no faster
            than the original, the result is the original.
        keep_best: the result is the fine-tuning epoch of least test error, or the network from before
            fine-tuning if every epoch was worse; False takes the last epoch.
        dtype: number format of inference, such as ``torch.bfloat16``: candidates, layers and both networks
            are timed in it, and the final network is judged in it. The artifact stays float32, but that of
            ``torch.int8``, which takes its ranges from the calibration images; fine-tuning then rounds
            weights and maps as the network in eight bits will (:mod:`quincunx.train.rounded`). A format that
            is slower here than float32 is not used, and ``tell`` is told so.
        task: loss, score and how outputs are compared; by default classification. In a task against the
            original's outputs fine-tuning learns them alone.
        tell: called before the work with each doubt about the input: one sentence.
        ranks: this process's place among several, from :func:`quincunx.train.processes.joined`, each with
            the same arguments. They share the test images, the candidates of a search and each batch of
            fine-tuning (not in eight bits); the first one does all else, with the others idle while it
            measures time, and alone writes.

    Returns:
        The content of ``accelerate.json``, on each process; "verdict" says whether the final test error and
        the final times meet a search's target.

    Raises:
        BlockingIOError: another process works in the folder.
        ValueError: weights that are not finite; the network does not fit the data; anything that the method
            refuses; a pattern that matches nothing; finished layers of another run in the folder.
        Diverged: fine-tuning diverged, and ``keep_diverged`` is False.
        RunFailed: fine-tuning could not continue for another reason.
        FailedAlone: this process, not the first, could not go on with fine-tuning.
    """
    if recipe is not None and recipe.compile and ranks.world > 1:
        raise ValueError("compile=True: steps are compiled in one process; leave it out with several")
    team = _team(model, data, layers, calibration, seed, workers, task or classification(), ranks)

    def work() -> dict[str, Any]:
        with only_writer(Path(out)):
            return _accelerated(
                team, method, Path(out), normalisation=normalisation, recipe=recipe, batch=batch,
                rounds=rounds, progress=progress, fits=fits, keep_diverged=keep_diverged,
                keep_slower=keep_slower, keep_best=keep_best, dtype=dtype, tell=tell,
            )  # fmt: skip

    return team.directed(work)


def _team(
    model: nn.Module,
    data: ImageData,
    layers: Sequence[str],
    calibration: int,
    seed: int,
    workers: int | None,
    task: Task,
    ranks: Ranks,
) -> Team:
    """Check the network, label the data if they have no labels, and say who does the work."""
    check_finite(model)
    data = label_with(model.eval(), data, workers, task, ranks)
    score = partial(score_images, split=data.test, data=data, workers=workers, task=task, original=model)
    return Team(ranks, model, data, task, workers, score, layers, calibration, seed)


def _accelerated(
    team: Team,
    method: Method | Search | SmallerInput,
    out: Path,
    *,
    normalisation: int,
    recipe: Recipe | None,
    batch: int,
    rounds: int,
    progress: bool,
    fits: Path | None,
    keep_diverged: bool,
    keep_slower: bool,
    keep_best: bool,
    dtype: torch.dtype | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Do the work of :func:`accelerate_trained`, which documents the arguments."""
    original, data, task, workers = team.model, team.data, team.task, team.workers
    layers, calibration, seed = team.layers, team.calibration, team.seed
    if recipe is not None and task.needs_original:
        recipe = recipe_with(recipe, distill=1.0)
    identity = acceleration_identity(original, method, data, layers, calibration, seed, task)
    journal = FolderJournal(out / "layers", identity) if fits is None else fits_folder(fits, method, identity)
    images = sample_batches(data, calibration, seed, task=task, workers=workers)
    one = torch.zeros(1, data.in_channels, *data.size)

    size: tuple[int, int] | None = None

    def judged(name: str, network: nn.Module, rounded: bool = False) -> JudgedStage:
        with scaled_inputs(network, size):
            return JudgedStage(name, network, partial(team.judge, rounded=rounded), task)

    stages = [judged("before", original)]
    doubts = doubts_about(stages[0], data)
    if isinstance(method, Search):
        doubts += doubts_about_drop(stages[0], images.images, method.target.max_drop)
    dtype, refused = format_served(original, torch.randn(batch, *one.shape[1:]), dtype)
    if refused:
        doubts.append(refused)
    for doubt in doubts:
        tell(doubt)
    where = where_named(original, layers)
    began = time.perf_counter()
    picked = Picked()
    if isinstance(method, Search):
        free = Baselines(original, images, one, judged, stages[0], task, batch, dtype)
        run = partial(
            run_search, original, images=images, out=out, where=where, one=one, batch=batch, task=task,
            shared=team.shared, pool=team.pool,
        )  # fmt: skip
        picked = pick(method, free, partial(run, progress=progress, journal=journal))
        found, dtype, size = cast(Accelerated, picked.found), picked.dtype, picked.size
    elif isinstance(method, SmallerInput):
        found, size = (
            Accelerated(copied(original).eval(), {}, {}),
            method.size_for((one.shape[2], one.shape[3])),
        )
        for reason in sizes_refused(original, images[0][0][:1], [size]).values():
            raise ValueError(f"{FreeChoice(size=size).name}: {reason}")
        picked = Picked(found, dtype, size)
    else:
        meant = [n for n, m in original.named_modules() if isinstance(m, method.targets) and where(n, m)]
        with _watched(journal, len(meant), progress) as watched:
            found = replace_layers(
                original,
                method,
                where=where,
                calibration=images,
                journal=watched,
                loss=task.impact_function,
                pool=team.pool,
            )
        if found.replaced and not keep_slower and not getattr(method, "saves_bytes", False):
            example = torch.randn(batch, *one.shape[1:])
            found = without_slower(original, found, example, rounds=rounds, dtype=dtype)
    if not found.replaced and size is None and (isinstance(method, Search) or not keep_slower):
        # there is no loss to regain
        recipe = None
    fitting = {"seconds": time.perf_counter() - began, "peak_memory": _peak_resident_bytes()}
    fast = found.model.eval()
    what = "after replacing" if size is None else f"at {FreeChoice(size=size).name}"
    stages.append(judged(what, fast))
    if found.replaced and any(isinstance(m, _BatchNorm) for m in fast.modules()):
        inputs = sample_batches(data, normalisation, seed + 1, 100, task, workers)
        kept = renormalise(fast, images, inputs_of(inputs), task, original)
        doubt = "" if kept else " (not kept: the loss on the calibration images was lower before)"
        stages.append(judged(f"after re-estimating batch norm{doubt}", fast))
    diverged, epochs = None, None
    rate = None
    if recipe is not None and recipe.find_lr:
        with scaled_inputs(fast, size):
            rate = find_rate(
                fast,
                data,
                recipe,
                out / "finetune" / "rate.json",
                seed=seed,
                teacher=original if recipe.taught or task.needs_original else None,
                workers=workers,
                task=task,
            )
        recipe = dataclasses.replace(recipe, lr=rate["lr"], find_lr=False)
    if recipe is not None:
        untuned = copied(fast) if keep_diverged or keep_best else None
        if dtype == torch.int8:
            # fine-tuning has to beat what rounding alone gives
            with scaled_inputs(fast, size):
                alone = fuse(ready_for(fast, dtype, images, task), dtype, force=True)
                stages.append(judged("in int8, before fine-tuning", alone))
                to_train_rounded(fast, images)
        try:
            with scaled_inputs(fast, size):
                history = team.train(
                    fast,
                    recipe,
                    out / "finetune",
                    seed=seed,
                    resume=True,
                    progress=f"fine-tuning{', compiled' * recipe.compile}" if progress else False,
                    teacher=original if recipe.taught or task.needs_original else None,
                    stop=_stop_rule(method, stages[0]),
                    keep_best=keep_best,
                )["history"]
            epochs = len(history)
        except Diverged as error:
            if untuned is None or not keep_diverged:
                raise
            fast, diverged = untuned, str(error)
            found = dataclasses.replace(found, model=fast)
        doubt = "" if diverged is None else " (it diverged: the network from before it)"
        tuned = judged(f"after fine-tuning{doubt}", fast, rounded=True)
        if keep_best and untuned is not None and tuned.cost > stages[-1].cost:
            fast, found = untuned, dataclasses.replace(found, model=untuned)
            shown = task.scale.shown(tuned.score)
            tuned = judged(f"after fine-tuning (not kept: {shown} after its best epoch)", fast)
        stages.append(tuned)

    # beside a format that a search chose stands the network in float32
    before = original if picked.gained is not None else ready_for(original, dtype, images, task)

    def time_result(found: Accelerated, sure: bool = False) -> dict[str, Any]:
        free: dict[str, Any] = {"dtype": dtype, "size": size, "from_float32": picked.gained is not None}
        lower = dataclasses.replace(found, model=ready_for(found.model, dtype, images, task))
        return time_record(before, lower, one, batch, rounds, progress, sure=sure, **free)

    timed = time_result(found, sure=isinstance(method, Search))
    put_back = None
    for_time = isinstance(method, Search) or not (keep_slower or getattr(method, "saves_bytes", False))
    gained = picked.gained or 1.0
    if for_time and found.replaced and (ratio := timed["whole"]["speedup"]["median"] / gained) <= 1:
        # a network that is no faster does not justify its loss
        put_back = ratio
        reason = f"no gain: the finished network was {ratio:.2f} times as fast as before"
        reasons = {**found.skipped, **dict.fromkeys(found.replaced, reason)}
        found = Accelerated(copied(original).eval(), {}, reasons, search=found.search)
        fast = found.model
        stages.append(judged("after putting everything back (it was no faster)", fast))
        timed = time_result(found)
    rest = None
    if dtype is not None and timed["unfused"] is None:
        fast = ready_for(fast, dtype, images, task)
        lower = fuse(fast, dtype, force=True)
        rest = lower.meta["dtype"].get("rest")
        stages.append(judged(f"in {timed['dtype']}", lower))
    packed = BinaryConnect.pack(fast)
    record = quantisation_of(fast)
    if record is not None:
        note_quantisation(packed, record)
    small = one if size is None else one.new_zeros(*one.shape[:2], *size)
    result = {
        "schema": 1,
        "kind": "accelerate",
        **{key: value for key, value in identity.items() if key != "network"},
        "network": spec_of(original),
        "doubts": doubts,
        "recipe": None if recipe is None else recipe.to_dict(),
        **({} if rate is None else {"rate": {k: v for k, v in rate.items() if k != "of"}}),
        "images": {"train": len(data.train), "test": len(data.test)},
        "stages": [stage.against(stages[0]) for stage in stages],
        "epochs": epochs,
        "diverged": diverged,
        "put_back": put_back,
        "skipped": found.skipped,
        "search": found.search,
        **picked.to_dict(),
        "recalled": journal.recalled,
        "fitting": fitting,
        "cost": {"before": cost_record(original, one), "after": cost_record(fast, small)},
        "bytes": {key: _weight_bytes(m) for key, m in (("before", before), ("after", packed))},
        **({} if rest is None or record is None else {"int8": {**record.facts, "rest": rest}}),
        **timed,
        "maps": {name: {k: v.tolist() for k, v in maps.items()} for name, maps in found.maps.items()},
        "sample": sample_record(original, found.replaced, images[0][0][:1], data.mean, data.std),
        "environment": environment(),
    }
    others: list[dict[str, float]] = []
    if isinstance(method, Search) and size is None and method.methods:
        inputs = sample_batches(data, normalisation, seed + 1, 100, task, workers)
        again = partial(run, progress=False, dtype=dtype)
        others = _alternatives(original, method, images, again, judged, task, result, inputs, gained)
    result["verdict"] = judge_target(result, others)
    result["alternatives"] = others
    key = task.scale.key
    info = {"data": data.describe(), f"test_{key}": result["stages"][-1][key]}
    if not task.classifies:
        info["task"] = task.to_dict()
    if size is not None:
        info["input"] = list(size)
    save(packed, out / "model", info=info)
    write_json(out / "accelerate.json", result)
    return result


def _alternatives(
    original: nn.Module,
    method: Search,
    images: Drawn,
    again: Callable[..., Accelerated],
    judged: Callable[[str, nn.Module], JudgedStage],
    task: Task,
    result: dict[str, Any],
    inputs: Drawn,
    gained: float,
) -> list[dict[str, float]]:
    """Return what less speed costs if a target's accuracy was missed: "speedup", and "drop" on test images.

    The networks are fitted and judged without fine-tuning; the scores exist already. ``gained`` is what
    the number format gains by itself.
    """
    verdict = judge_target(result) or {"parts": ()}
    if all(part["met"] for part in verdict["parts"] if part["what"] == "max_drop"):
        return []
    found: list[dict[str, float]] = []
    before = result["stages"][0][task.scale.key]
    reached = float(result["whole"]["speedup"]["median"])
    for share in _ALTERNATIVES:
        wanted = round((1 + share * (reached - 1)) / gained, 2)
        if wanted <= 1:
            break
        less = dataclasses.replace(method, target=Target(speedup=wanted))
        with warnings.catch_warnings():
            # the warning about too few images was given before
            warnings.simplefilter("ignore", UserWarning)
            other = again(less)
        if not other.replaced or other.search is None:
            break
        if any(isinstance(m, _BatchNorm) for m in other.model.modules()):
            renormalise(other.model, images, inputs_of(inputs), task, original)
        drop = task.scale.lost(before, judged("at less speed", other.model).score)
        found.append({"speedup": gained * float(other.search["attempts"][-1]["speedup"]), "drop": drop})
        if drop <= float(method.target.max_drop or 0.0):
            break
    return found


def _weight_bytes(model: nn.Module) -> int:
    """Return the bytes of what an artifact stores, counting each tensor once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    if (record := quantisation_of(model)) is not None:
        return sum(tensor.nbytes for tensor in record.store(model, storable_state(model)).values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _peak_resident_bytes() -> int | None:
    """Return the peak memory of this process in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def run_search(
    model: nn.Module,
    method: Search,
    *,
    images: Sequence[tuple[Tensor, Any]],
    out: Path,
    where: Callable[[str, nn.Module], bool],
    one: Tensor,
    batch: int,
    progress: bool,
    journal: Journal | None = None,
    dry_run: bool = False,
    dtype: torch.dtype | None = None,
    task: Task | None = None,
    shared: Shared | None = None,
    pool: Pool | None = None,
) -> Accelerated:
    """Run a search with a progress bar; its scores are stored in the folder or in the file that it names."""
    with search_bar(progress, method.time_budget) as tell:
        found = search(
            model,
            method.target,
            images,
            candidates=candidates_named(method.methods),
            where=where,
            example_input=torch.randn(batch, *one.shape[1:]),
            table=method.scores or out / "scores.json",
            time_budget=method.time_budget,
            dry_run=dry_run,
            journal=journal,
            tell=tell,
            dtype=dtype,
            task=task,
            shared=shared,
            pool=pool,
        )
    return dataclasses.replace(found.result, search=found.record)


def plan_for_target(
    model: nn.Module,
    method: Search,
    data: ImageData,
    out: str | Path,
    *,
    layers: Sequence[str] = (),
    calibration: int = 500,
    batch: int = 8,
    seed: int = 0,
    progress: bool = False,
    dtype: torch.dtype | None = None,
    task: Task | None = None,
    tell: Callable[[str], None] = lambda _: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Return what a search would choose, with its estimates, without fitting; arguments as in
    :func:`accelerate_trained`."""
    task = task or classification()
    team = _team(model, data, layers, calibration, seed, None, task, ranks)

    def work() -> dict[str, Any]:
        with only_writer(Path(out)):
            return _planned(team, method, Path(out), batch, progress, dtype, tell)

    return team.directed(work)


def _planned(
    team: Team,
    method: Search,
    out: Path,
    batch: int,
    progress: bool,
    dtype: torch.dtype | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Do the work of :func:`plan_for_target`."""
    model, data, task = team.model, team.data, team.task
    before = JudgedStage("before", model, team.judge, task)
    for doubt in doubts_about(before, data):
        tell(doubt)
    images = sample_batches(data, team.calibration, team.seed, task=task, workers=team.workers)
    one = torch.zeros(1, data.in_channels, *data.size)
    dtype, refused = format_served(model, torch.randn(batch, *one.shape[1:]), dtype)
    if refused:
        tell(refused)
    free = Baselines(
        model,
        images,
        one,
        lambda name, network: JudgedStage(name, network, team.judge, task),
        before,
        task,
        batch,
        dtype,
    )
    run = partial(run_search, model, images=images, out=out, where=where_named(model, team.layers))
    run = partial(run, shared=team.shared, pool=team.pool)
    run = partial(run, one=one, batch=batch, task=task, progress=progress, dry_run=True)
    picked = pick(method, free, run)
    return {**(cast(Accelerated, picked.found).search or {}), **picked.to_dict()}


def _stop_rule(method: Method | Search | SmallerInput, before: JudgedStage) -> StopRule | None:
    """Return the rule that stops fine-tuning at an accuracy; None if none was asked for."""
    if not isinstance(method, Search) or method.target.max_drop is None:
        return None
    scale = before.task.scale
    # a tiny margin for the rounding of two shares of ten
    limit = scale.limit(before.score, method.target.max_drop + 1e-9 * scale.factor)
    return StopRule(limit, _PATIENCE, scale)


class _Watched:
    """A journal that also reports each finished layer."""

    def __init__(self, journal: FolderJournal, tell: Callable[[str], None]) -> None:
        self.journal, self.tell = journal, tell

    def recall(self, layer: Layer) -> Replacement | None:
        self.tell(f"at {layer.name}")
        return self.journal.recall(layer)

    def keep(self, layer: Layer, replacement: Replacement) -> None:
        self.journal.keep(layer, replacement)
        self.tell(f"{layer.name} done")


@contextmanager
def _watched(journal: FolderJournal, layers: int, progress: bool) -> Iterator[_Watched]:
    with progress_bar(progress) as bar:
        task = bar.add_task("layers", total=layers, state="")

        def tell(what: str) -> None:
            bar.update(task, advance=what.endswith("done"), state=what)

        yield _Watched(journal, tell)
