"""A trained network made faster by a method: fitted, re-normalised, fine-tuned, judged and timed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quincunx.artifact import save, spec_of, write_json
from quincunx.checkpoint import only_writer
from quincunx.choice import Search, Target, pair_name
from quincunx.cost import cost, inference_mode_of
from quincunx.data import ImageData, batches
from quincunx.evaluation import answered_by, check_finite, judged
from quincunx.fuse import fuse
from quincunx.gain import without_slower
from quincunx.journal import FolderJournal
from quincunx.latency import Timing, environment, measure_models
from quincunx.methods import BinaryConnect
from quincunx.methods.registry import candidates_named
from quincunx.modules import copied
from quincunx.peers import PEERS
from quincunx.progress import progress_bar
from quincunx.recipes import Recipe
from quincunx.scores import eager_form
from quincunx.search import search
from quincunx.streams import Layer, run_order
from quincunx.surgery import Accelerated, Journal, Method, Replacement, accelerate
from quincunx.train import Diverged, StopRule, fit
from quincunx.verdict import judge as judge_target

__all__ = [
    "accelerate_trained",
    "mcnemar",
    "plan_for_target",
    "reestimate_batch_norm",
    "response_errors",
    "sample",
    "searched",
    "shared_fits",
    "time_accelerated",
    "time_layers",
    "time_together",
    "where_named",
]

# epochs without progress after which a fine-tuning towards an accuracy ends
_PATIENCE = 5
# about how long a round of a layer lasts: there are many, and each is called some hundred times in all
_LAYER_SECONDS = 0.01
# rounds that are added for a whole network where much hangs on its time
_MORE_ROUNDS = 31
# a network that has no more test images right than a guess, by so many deviations, is not a trained one
_CHANCE_DEVIATIONS = 2.0
# where accuracy is missed: shares of the speed that was reached at which it is looked at, too
_ALTERNATIVES = (2 / 3, 1 / 3)
# networks beside the original that are held at once to be timed in turn, and what that one is called
_TOGETHER, _ORIGINAL = 6, "(original)"


def sample(data: ImageData, count: int, seed: int = 0, batch_size: int = 50) -> list[tuple[Tensor, Tensor]]:
    """Unaugmented batches of ``count`` training images drawn at random, fewer if there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor]] = []
    left = count
    for images, labels in batches(data.train, data, batch_size, generator=generator):
        found.append((images[:left], labels[:left]))
        left -= len(found[-1][1])
        if left < 1:
            break
    return found


def reestimate_batch_norm(model: nn.Module, inputs: Iterable[Tensor]) -> int:
    """Set each batch norm's mean and variance to those of some inputs; weights stay as they are.

    A layer that was replaced gives its successors other maps, whose statistics the network does not
    know. Each batch counts alike (momentum 1 / number of batches).

    Returns:
        The number of batch norms.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> reestimate_batch_norm(norm, [torch.full((4, 3, 2, 2), 5.0)]), norm.running_mean[0].item()
        (1, 5.0)
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    kept = [(norm, norm.momentum) for norm in norms]
    with inference_mode_of(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        try:
            for batch in inputs:
                model(batch)
        finally:
            for norm, momentum in kept:
                norm.momentum = momentum
    return len(norms)


def mcnemar(before: Tensor, after: Tensor) -> dict[str, float]:
    """McNemar's exact two-sided test of two networks on the same images, from which were right.

    Returns:
        "lost" (right before, wrong after), "won", and "p" of a difference as large by chance.

    Example:
        >>> found = mcnemar(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        >>> found["lost"], found["won"], found["p"]
        (1, 0, 1.0)
    """
    from scipy.stats import binomtest

    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    p = float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0
    return {"lost": lost, "won": won, "p": p}


def accelerate_trained(
    model: nn.Module,
    method: Method | Search,
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
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Make a trained network faster and say what it cost: error at each stage, time of each layer.

    The folder gets ``accelerate.json`` (the result), ``model`` (the artifact, weights of one bit packed),
    ``layers`` (finished layers, which the same call does not make again) and, with a recipe, ``finetune``
    (that run, from whose own artifact training can go on).

    Args:
        model: a trained network with a spec or a noted factory; it is left as it is.
        method: such as ``qx.Espace()``, or a search for a target.
        data: its training images calibrate and fine-tune, its test images judge. Where they have no
            labels the network's own answers take their place, and a recipe has to learn from it alone
            (``distill=1``).
        out: folder of the results.
        layers: patterns of layer names such as "stages.*.conv2"; by default every layer.
        calibration: training images the method is given.
        normalisation: training images by which batch norm is estimated anew.
        recipe: of fine-tuning; one with ``distill`` or ``distill_features`` has the original network as
            teacher. With a
            target's ``max_drop`` it ends once the test error is within it, or stays for
            some epochs.
        batch: images of the timed inputs.
        rounds: how often each candidate is timed.
        seed: of the draws and of fine-tuning.
        workers: processes that decode streamed images.
        progress: show bars.
        fits: folder where finished layers are kept instead, for other methods that fit them in the same
            way; such are ESPACE's at other rates.
        keep_diverged: if fine-tuning diverges, the network from before it is the result, and "diverged"
            and the last stage's name say so.
        keep_slower: a method's layers stay also where the network, timed with and without them, gains no
            time by them; False puts those back, but for methods whose gain is the size on disk. A search
            never takes such layers. What is finished is timed once more: where the whole network is no faster
            after all, the original is the result.
        keep_best: of fine-tuning the epoch of least test error is the result, or the network from before it
            where every epoch was worse; False takes the last epoch.
        tell: called with each doubt about the input, before the work: one sentence.

    Returns:
        The content of ``accelerate.json``; "verdict" says whether a search's target is met by the final
        test error and the final times.

    Raises:
        BlockingIOError: another process works in the folder.
        ValueError: weights that are not finite; the network does not fit the data; what the method refuses;
            a pattern that matches nothing; finished layers of another run in the folder.
        Diverged: fine-tuning did, and ``keep_diverged`` is False.
        RunFailed: fine-tuning could not go on for another reason.
    """
    with only_writer(Path(out)):
        return _accelerated(
            model.eval(), method, data, Path(out), layers=layers, calibration=calibration,
            normalisation=normalisation, recipe=recipe, batch=batch, rounds=rounds, seed=seed,
            workers=workers, progress=progress, fits=fits, keep_diverged=keep_diverged,
            keep_slower=keep_slower, keep_best=keep_best, tell=tell,
        )  # fmt: skip


def _accelerated(
    original: nn.Module,
    method: Method | Search,
    data: ImageData,
    out: Path,
    *,
    layers: Sequence[str],
    calibration: int,
    normalisation: int,
    recipe: Recipe | None,
    batch: int,
    rounds: int,
    seed: int,
    workers: int | None,
    progress: bool,
    fits: Path | None,
    keep_diverged: bool,
    keep_slower: bool,
    keep_best: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """As :func:`accelerate_trained`, which says what the arguments are."""
    check_finite(original)
    data = answered_by(original, data, workers)
    identity = _identity(original, method, data, layers, calibration, seed)
    journal = (
        FolderJournal(out / "layers", identity) if fits is None else _shared_fits(fits, method, identity)
    )
    images = sample(data, calibration, seed)
    one = torch.zeros(1, data.in_channels, *data.size)
    judge = partial(judged, split=data.test, data=data, workers=workers)
    stages = [_Stage("before", original, judge)]
    doubts = _doubts(stages[0], data)
    for doubt in doubts:
        tell(doubt)
    where = where_named(original, layers)
    began = time.perf_counter()
    if isinstance(method, Search):
        found = searched(original, method, images, out, where, batch, progress, journal)
    else:
        meant = [n for n, m in original.named_modules() if isinstance(m, method.targets) and where(n, m)]
        with _watched(journal, len(meant), progress) as watched:
            found = accelerate(original, method, where=where, calibration=images, journal=watched)
        if found.replaced and not keep_slower and not getattr(method, "saves_bytes", False):
            found = without_slower(original, found, torch.randn(batch, *one.shape[1:]), rounds=rounds)
    if not found.replaced and (isinstance(method, Search) or not keep_slower):
        # there is nothing to win back
        recipe = None
    fitting = {"seconds": time.perf_counter() - began, "peak_memory": _peak_memory()}
    fast = found.model.eval()
    stages.append(_Stage("after replacing", fast, judge))
    if found.replaced and any(isinstance(m, _BatchNorm) for m in fast.modules()):
        kept = _renormalised(fast, images, [x for x, _ in sample(data, normalisation, seed + 1, 100)])
        doubt = "" if kept else " (not kept: the loss on the calibration images was lower before)"
        stages.append(_Stage(f"after re-estimating batch norm{doubt}", fast, judge))
    diverged, epochs = None, None
    if recipe is not None:
        untuned = copied(fast) if keep_diverged or keep_best else None
        try:
            history = fit(
                fast,
                data,
                recipe,
                out / "finetune",
                seed=seed,
                resume=True,
                progress="fine-tuning" if progress else False,
                teacher=original if recipe.taught else None,
                workers=workers,
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
        tuned = _Stage(f"after fine-tuning{doubt}", fast, judge)
        if keep_best and untuned is not None and tuned.error > stages[-1].error:
            fast, found = untuned, dataclasses.replace(found, model=untuned)
            name = f"after fine-tuning (not kept: {100 * tuned.error:.2f}% after its best epoch)"
            tuned = _Stage(name, fast, judge)
        stages.append(tuned)
    timed = _timed(original, found, one, batch, rounds, progress, sure=isinstance(method, Search))
    put_back = None
    for_time = isinstance(method, Search) or not (keep_slower or getattr(method, "saves_bytes", False))
    if for_time and found.replaced and (ratio := timed["whole"]["speedup"]["median"]) <= 1:
        # what is no faster is not worth what it lost
        put_back = ratio
        reason = f"no gain: the finished network was {ratio:.2f} times as fast as before"
        reasons = {**found.skipped, **dict.fromkeys(found.replaced, reason)}
        found = Accelerated(copied(original).eval(), {}, reasons, search=found.search)
        fast = found.model
        stages.append(_Stage("after putting everything back (it was no faster)", fast, judge))
        timed = _timed(original, found, one, batch, rounds, progress)
    packed = BinaryConnect.pack(fast)
    result = {
        "schema": 1,
        "kind": "accelerate",
        **{key: value for key, value in identity.items() if key != "network"},
        "network": spec_of(original),
        "doubts": doubts,
        "recipe": None if recipe is None else recipe.to_dict(),
        "images": {"train": len(data.train), "test": len(data.test)},
        "stages": [stage.against(stages[0]) for stage in stages],
        "epochs": epochs,
        "diverged": diverged,
        "put_back": put_back,
        "skipped": found.skipped,
        "search": found.search,
        "recalled": journal.recalled,
        "fitting": fitting,
        "cost": {key: _cost(m, one) for key, m in (("before", original), ("after", fast))},
        "bytes": {key: _weight_bytes(m) for key, m in (("before", original), ("after", packed))},
        **timed,
        "maps": {name: {k: v.tolist() for k, v in maps.items()} for name, maps in found.maps.items()},
        "environment": environment(),
    }
    others: list[dict[str, float]] = []
    if isinstance(method, Search) and found.search is not None:
        search_again = partial(_alternatives, original, method, data, images, where, batch, out, judge)
        others = search_again(result, [x for x, _ in sample(data, normalisation, seed + 1, 100)])
    result["verdict"] = judge_target(result, others)
    info = {"data": data.describe(), "test_error": result["stages"][-1]["error"]}
    save(packed, out / "model", info=info)
    write_json(out / "accelerate.json", result)
    return result


def _doubts(before: _Stage, data: ImageData) -> list[str]:
    """What makes it doubtful that the network is trained and is shown the images it was trained on."""
    tested, classes = len(before.right), len(data.classes)
    if not data.labelled or classes < 2 or not tested:
        return []
    chance = 1 / classes
    guessed = tested * chance + _CHANCE_DEVIATIONS * (tested * chance * (1 - chance)) ** 0.5
    if int(before.right.sum()) > guessed:
        return []
    return [
        f"the network as it is has {100 * before.error:.2f}% of {tested:,} test images wrong, no better than "
        f"a guess among {classes} classes: are its weights the trained ones, the classes in the order of its "
        "training, and --mean and --std those of its training?"
    ]


def _alternatives(
    original: nn.Module,
    method: Search,
    data: ImageData,
    images: list[tuple[Tensor, Tensor]],
    where: Callable[[str, nn.Module], bool],
    batch: int,
    out: Path,
    judge: Callable[[nn.Module], tuple[Tensor, ...]],
    result: dict[str, Any],
    inputs: Sequence[Tensor],
) -> list[dict[str, float]]:
    """What less speed costs, where a target's accuracy was missed: "speedup", and "drop" on the test images.

    The networks are fitted and judged without fine-tuning; the scores are there already.
    """
    verdict = judge_target(result) or {"parts": ()}
    if all(part["met"] for part in verdict["parts"] if part["what"] == "max_drop"):
        return []
    found: list[dict[str, float]] = []
    wrong = result["stages"][0]["error"]
    reached = float(result["whole"]["speedup"]["median"])
    for share in _ALTERNATIVES:
        wanted = round(1 + share * (reached - 1), 2)
        if wanted <= 1:
            break
        less = dataclasses.replace(method, target=Target(speedup=wanted))
        with warnings.catch_warnings():
            # of few images it was warned before
            warnings.simplefilter("ignore", UserWarning)
            other = searched(original, less, images, out, where, batch, False)
        if not other.replaced or other.search is None:
            break
        if any(isinstance(m, _BatchNorm) for m in other.model.modules()):
            _renormalised(other.model, images, inputs)
        _, right, _ = judge(other.model)
        drop = 100 * (int((~right).sum()) / len(right) - wrong)
        found.append({"speedup": float(other.search["attempts"][-1]["speedup"]), "drop": drop})
        if drop <= float(method.target.max_drop or 0.0):
            break
    return found


def _weight_bytes(model: nn.Module) -> int:
    """Of what an artifact keeps, each tensor once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def shared_fits(
    folder: Path,
    model: nn.Module,
    method: Method,
    data: ImageData | None,
    *,
    layers: Sequence[str] = (),
    calibration: int = 500,
    seed: int = 0,
) -> FolderJournal:
    """The journal in ``folder`` of finished layers that all methods share which fit them in the same way.

    Such are ESPACE's at other rates. Arguments as in :func:`accelerate_trained`.
    """
    return _shared_fits(folder, method, _identity(model, method, data, layers, calibration, seed))


def _shared_fits(folder: Path, method: Method | Search, identity: dict[str, Any]) -> FolderJournal:
    after = getattr(method, "after_fits", ())
    settings = {key: value for key, value in identity["method"].items() if key not in after}
    reduced = {**identity, "method": settings}
    digest = hashlib.sha256(json.dumps(reduced, sort_keys=True).encode()).hexdigest()
    return FolderJournal(folder / f"{method.name}-{digest[:12]}", reduced)


def _identity(
    model: nn.Module,
    method: Method | Search,
    data: ImageData | None,
    layers: Sequence[str],
    calibration: int,
    seed: int,
) -> dict[str, Any]:
    """What decides on the finished layers of a run, JSON-ready."""
    settings = {f.name: repr(getattr(method, f.name)) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    same = trained_identity(model, data, layers=layers, calibration=calibration, seed=seed)
    return {**same, "method": {"name": method.name, **settings}}


def trained_identity(
    model: nn.Module,
    data: ImageData | None,
    *,
    layers: Sequence[str] = (),
    calibration: int = 500,
    seed: int = 0,
    **_: Any,
) -> dict[str, Any]:
    """What decides on the results of a run besides method and recipe, JSON-ready.

    Other options of :func:`accelerate_trained` are taken and left out: they decide on times alone.
    """
    state = hashlib.sha256(b"".join(_bytes(t) for t in model.state_dict().values())).hexdigest()
    return {
        "network": spec_of(model),
        "weights": state,
        "data": None if data is None else data.describe(),
        "layers": list(layers),
        "calibration": calibration,
        "seed": seed,
    }


def _peak_memory() -> int | None:
    """The most bytes that this process has held so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def searched(
    model: nn.Module,
    method: Search,
    images: list[tuple[Tensor, Tensor]],
    out: Path,
    where: Callable[[str, nn.Module], bool],
    batch: int,
    progress: bool,
    journal: Journal | None = None,
    *,
    dry_run: bool = False,
) -> Accelerated:
    """What a search finds, with a bar; its scores are kept in the folder or where it says."""
    with progress_bar(progress) as bar:
        task = bar.add_task("searching", total=1.0, state="")

        def tell(what: str, share: float) -> None:
            bar.update(task, state=what, completed=share if share >= 0 else None)

        found = search(
            model,
            method.target,
            images,
            candidates=candidates_named(method.methods),
            where=where,
            example_input=torch.randn(batch, *images[0][0].shape[1:]),
            table=method.scores or out / "scores.json",
            time_budget=method.time_budget,
            dry_run=dry_run,
            journal=journal,
            tell=tell,
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
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What a search would choose, with its estimates, and nothing more; arguments as in
    :func:`accelerate_trained`."""
    check_finite(model)
    with only_writer(Path(out)):
        data = answered_by(model.eval(), data)
        for doubt in _doubts(_Stage("before", model, partial(judged, split=data.test, data=data)), data):
            tell(doubt)
        images = sample(data, calibration, seed)
        where = where_named(model, layers)
        found = searched(model.eval(), method, images, Path(out), where, batch, progress, dry_run=True)
    return found.search or {}


def _stop_rule(method: Method | Search, before: _Stage) -> StopRule | None:
    """Of fine-tuning towards an accuracy; None where none was asked for."""
    if not isinstance(method, Search) or method.target.max_drop is None:
        return None
    # by a hair more, for what adding two shares of ten rounds away
    return StopRule(before.error + method.target.max_drop / 100 + 1e-9, _PATIENCE)


def _renormalised(
    model: nn.Module, images: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]
) -> bool:
    """Estimate batch norm anew, and take it back where that raises the loss on the given images."""

    def loss() -> float:
        with inference_mode_of(model):
            return sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in images)

    before, state = loss(), copy.deepcopy(model.state_dict())
    reestimate_batch_norm(model, inputs)
    if loss() <= before:
        return True
    model.load_state_dict(state)
    return False


def time_accelerated(
    model: nn.Module,
    found: Accelerated,
    one: Tensor,
    *,
    peers: Sequence[str] = (),
    batch: int = 8,
    rounds: int = 11,
    progress: bool = False,
) -> dict[str, Any]:
    """MACs and times before and after, as :func:`accelerate_trained` gives them.

    Args:
        model: the network before; its weights need not be trained, since times do not depend on them.
        found: what became of it.
        one: an input [1, C, H, W].
        peers: engines of ``quincunx.peers.PEERS`` that are timed in turn with it, on each layer and on the
            network as they were before; ratios are under "peers".
        batch, rounds, progress: as in :func:`accelerate_trained`.
    """
    return {
        "cost": {key: _cost(m, one) for key, m in (("before", model), ("after", found.model))},
        **_timed(model, found, one, batch, rounds, progress, peers),
    }


def response_errors(
    model: nn.Module, fast: nn.Module, names: Sequence[str], inputs: Iterable[Tensor]
) -> dict[str, float]:
    r"""E|y - y'|^2 / E|y - mean y|^2 of layers, each given the input that it has in the original network.

    Means are of each channel over all images and positions, sums in float64.
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in names}

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_layer: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
            flat = [t.transpose(0, 1).flatten(1).double() for t in (y, y - fast.get_submodule(name)(*given))]
            row = (flat[0].sum(1), flat[0].square().sum(1), flat[1].square().sum(1))
            sums[name].append(torch.stack([*row, torch.full_like(row[0], flat[0].shape[1])]))

        return note

    handles = [model.get_submodule(name).register_forward_hook(compare(name)) for name in names]
    try:
        with inference_mode_of(model), inference_mode_of(fast):
            for batch in inputs:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, rows in sums.items():
        total, square, error, count = torch.stack(rows).sum(0)
        found[name] = float(error.sum() / (square - total.square() / count).sum())
    return found


def _bytes(value: Tensor) -> bytes:
    return (
        bytes(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()) if value.dim() else b""
    )


def _cost(model: nn.Module, one: Tensor) -> dict[str, int]:
    found = cost(model, one)
    return {"macs": found.macs, "params": found.params}


def where_named(model: nn.Module, patterns: Sequence[str]) -> Callable[[str, nn.Module], bool]:
    """Which layers the patterns mean; all without any.

    Raises:
        ValueError: one of them matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            some = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
            raise ValueError(
                f"layers={pattern!r}: no layer has such a name; there are {', '.join(some[:10])}"
            )
    return lambda name, _: not patterns or any(fnmatch(name, pattern) for pattern in patterns)


class _Stage:
    """The network at one point: which test images it has right."""

    def __init__(self, name: str, model: nn.Module, judge: Callable[..., tuple[Tensor, ...]]) -> None:
        self.name = name
        self.losses, self.right, self.among = judge(model)

    @property
    def error(self) -> float:
        return int((~self.right).sum()) / len(self.right)

    def against(self, first: _Stage) -> dict[str, Any]:
        facts = {
            "name": self.name,
            "loss": float(self.losses.mean()),
            "error": self.error,
            "top5_error": float((~self.among).double().mean()),
        }
        return facts if self is first else {**facts, **mcnemar(first.right, self.right)}


class _Watched:
    """A journal that also tells a person which layer is finished."""

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


def _timed(
    original: nn.Module,
    found: Accelerated,
    one: Tensor,
    batch: int,
    rounds: int,
    progress: bool,
    peers: Sequence[str] = (),
    *,
    sure: bool = False,
) -> dict[str, Any]:
    """Milliseconds of each replaced layer and of the whole network, before and after, both fused.

    Where nothing was replaced there is one network. The whole network is timed for longer where ``sure``
    asks for it, or it is not clear whether it is faster.
    """
    models = {"before": original, "after": found.model}
    rows = time_layers(
        original,
        found,
        one,
        peers=peers,
        batch=batch,
        rounds=rounds,
        progress=progress,
        round_seconds=_LAYER_SECONDS,
    )
    forms, unfused = _forms(models, one)
    beside_whole = dict.fromkeys(peers, original)
    shape = (batch, *one.shape[1:])
    if not found.replaced:
        # one network, whose times would differ by chance
        del forms["after"]
    timings = _measured(forms, shape, rounds, beside_whole)
    if not found.replaced:
        timings["after"] = timings["before"]
    if found.replaced and (sure or not timings["after"].clearly_faster_than(timings["before"])):
        more = _measured(forms, shape, _MORE_ROUNDS, beside_whole)
        timings = {name: timing.and_more(more[name]) for name, timing in timings.items()}
    whole = _ratio(timings)
    engine = "qx.fuse" if unfused is None else "each layer by qx.fuse, the whole network without it,"
    threads = torch.get_num_threads()
    many = "s" if threads > 1 else ""
    how = f"{engine} before and after, channels_last, {threads} thread{many}, batch {batch}"
    return {"layers": rows, "whole": whole, "batch": batch, "how": how, "unfused": unfused}


def time_layers(
    original: nn.Module,
    found: Accelerated,
    one: Tensor,
    *,
    peers: Sequence[str] = (),
    batch: int = 8,
    rounds: int = 11,
    progress: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """A row for each replaced layer: its record, and seconds before and after, both fused.

    Args:
        original, found, one, peers, batch, rounds, progress: as in :func:`time_accelerated`.
        options: of :func:`quincunx.latency.measure_models`, such as ``round_seconds``.
    """
    with inference_mode_of(original):
        order = run_order(original, one, None) or {}
    rows = []
    models = {"before": original, "after": found.model}
    with progress_bar(progress) as bar:
        task = bar.add_task("timing", total=len(found.replaced), state="")
        for name, record in found.replaced.items():
            bar.update(task, state=name)
            names = record.get("pair", [name])
            if name == names[0]:
                # within a network a layer that fx cannot trace stays whole
                chains = {key: nn.Sequential(_chain(model, names)) for key, model in models.items()}
                layers = {key: fuse(chain) for key, chain in chains.items()}
                beside = dict.fromkeys(peers, chains["before"])
                timings = _measured(layers, (batch, *order[name][1][1:]), rounds, beside, **options)
                rows.append({**_joined([found.replaced[n] for n in names], names), **_ratio(timings)})
            bar.update(task, advance=1)
    return rows


def time_together(
    original: nn.Module,
    fast: Mapping[str, Callable[[], nn.Module]],
    shape: tuple[int, int, int],
    *,
    batch: int = 8,
    rounds: int = 11,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Seconds of whole networks and how much faster each is than the original, all in turn in one process.

    Args:
        original: the network before.
        fast: name -> function that gives a network with the same input; a few are held at a time, each
            few with the original among them.
        shape: (C, H, W) of an image.
        batch, rounds, progress: as in :func:`accelerate_trained`.
    """
    names, found = list(fast), {}
    with progress_bar(progress) as bar:
        task = bar.add_task("timing together", total=len(names), state="")
        for start in range(0, len(names), _TOGETHER):
            some = names[start : start + _TOGETHER]
            whole = {_ORIGINAL: original, **{name: fast[name]() for name in some}}
            forms, _ = _forms(whole, torch.randn(1, *shape))
            timings = _measured(forms, (batch, *shape), rounds, {})
            for name in some:
                found[name] = _ratio({"before": timings[_ORIGINAL], "after": timings[name]})
            bar.update(task, advance=len(some))
    return found


def _chain(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A layer, or the two of a pair with a ReLU between them."""
    parts = [model.get_submodule(name) for name in names]
    return parts[0] if len(parts) == 1 else nn.Sequential(parts[0], nn.ReLU(), parts[1])


def _joined(records: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """One row for the layers that are replaced together."""
    macs = {key: sum(record[key] for record in records) for key in ("macs_before", "macs_after")}
    return {"name": pair_name(names), **records[0], **records[-1], **macs}


def _forms(models: dict[str, nn.Module], one: Tensor) -> tuple[dict[str, nn.Module], str | None]:
    """All fused, or none where one cannot be, as with a forward that depends on its data; and why.

    Args:
        one: an input of one image, on which each is compared with what it was made of.
    """
    try:
        return {key: fuse(model, check=one) for key, model in models.items()}, None
    except TypeError as error:
        return {key: eager_form(model) for key, model in models.items()}, str(error)


def _measured(
    models: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    rounds: int,
    peers: Mapping[str, nn.Module],
    **options: Any,
) -> dict[str, Timing]:
    """Models, and others run by engines of those names, in turn."""
    x = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    others = {name: PEERS[name](model, x, torch.get_num_threads()) for name, model in peers.items()}
    return measure_models(models, x, others=others, rounds=rounds, **options)


def _ratio(timings: dict[str, Timing]) -> dict[str, Any]:
    after = timings["after"]

    def over(other: Timing) -> dict[str, float]:
        return dict(zip(("median", "q1", "q3"), after.speedup_over(other), strict=True))

    own = ("before", "after")
    ratio = over(timings["before"])
    # the times beside a ratio are to have it: medians of each alone drift apart
    before = timings["before"].median
    seconds = {"seconds_before": before, "seconds_after": before / ratio["median"]}
    peers = {
        name: {"seconds": timing.median, "speedup": over(timing)}
        for name, timing in timings.items()
        if name not in own
    }
    return {
        **seconds,
        "speedup": ratio,
        "threads": timings["after"].threads,
        "rounds": len(timings["after"].seconds),
        **({"peers": peers} if peers else {}),
    }
