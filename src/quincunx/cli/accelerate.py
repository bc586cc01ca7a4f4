"""``quincunx accelerate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer

import quincunx as qx
from quincunx.acceleration.pipeline import accelerate_trained, plan_for_target
from quincunx.acceleration.target import FREE, Search, Target
from quincunx.acceleration.together import PATIENCE
from quincunx.cli.export import print_export
from quincunx.cli.network import NetworkOptions, Trained, build_own_network, read_artifact
from quincunx.cli.options import (
    DataOptions,
    FineTuningOptions,
    FittingOptions,
    Json,
    Seed,
    Threads,
    TimingOptions,
    Unlabelled,
    bad_input,
    check_folder,
    example,
    format_named,
    make_folder,
    running,
    use_threads,
    verb,
)
from quincunx.cli.printing import (
    complain,
    print_acceleration,
    print_search,
    say,
    show,
    warn,
)
from quincunx.cli.task import TaskOptions
from quincunx.data import ImageData
from quincunx.deployment.export import ExportFailed, NotFaster
from quincunx.deployment.formats import FORMATS
from quincunx.layers.eightbits import quantisation_of
from quincunx.methods.fitting.settings import LayerRanks
from quincunx.methods.registry import ALIASES, METHODS, candidates_named, method_named, with_candidates
from quincunx.report.acceleration import usage, write_acceleration_report
from quincunx.report.figures import check_can_draw
from quincunx.sampling import parse
from quincunx.surgery.method import Method
from quincunx.train.loop import Interrupted, RunFailed
from quincunx.train.processes import joined

# points of accuracy that the search without a method or a target may lose
_LITTLE = 1.0


@dataclass(frozen=True)
class TargetOptions:
    """What the faster network has to reach."""

    section: ClassVar[str] = "Target"

    speedup: Annotated[
        float | None, typer.Option(help="Speed-up to reach, measured on this machine, such as 2.")
    ] = None
    latency_ms: Annotated[
        float | None, typer.Option(help="Latency to reach, in milliseconds for one batch.")
    ] = None
    macs: Annotated[
        str | None,
        typer.Option(help="Multiply-accumulates to reach for one image: a number, or a share such as 50%."),
    ] = None
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of test accuracy, or units of the task's score such as dB, that may be lost after "
            "fine-tuning, which ends as soon as this and another target are reached."
        ),
    ] = None
    time_budget: Annotated[
        str | None, typer.Option(help="Time limit for scoring candidates, such as 30m, 90s or 1h.")
    ] = None
    scores: Annotated[
        Path | None, typer.Option(help="scores.json of an earlier search, to continue from its scores.")
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only search; print which layers would be replaced, and the predicted speed and, with "
            "--max-drop, loss of accuracy.",
        ),
    ] = False

    @property
    def asked(self) -> dict[str, Any]:
        """The targets themselves, None where not given."""
        return {name: getattr(self, name) for name in ("speedup", "latency_ms", "macs", "max_drop")}

    def check_needless(self) -> None:
        """Refuse what only a search needs, where there is none.

        Raises:
            ValueError: such an option was given.
        """
        for name in ("time_budget", "scores", "dry_run"):
            if getattr(self, name):
                raise ValueError(f"{name}: needs a target, such as --speedup 2")


@dataclass(frozen=True)
class MethodOptions:
    """A method and its settings."""

    section: ClassVar[str] = "Method"

    method: Annotated[
        str | None,
        typer.Option(
            help=f"Without a target: one of {', '.join(METHODS)}, used in every layer. With a target: auto "
            f"(the default) or some of {', '.join(with_candidates())}, separated by commas. Without method, "
            "settings of one and target: a search for the fastest network that loses at most "
            f"{_LITTLE:g} point of accuracy (--max-drop {_LITTLE:g})."
        ),
    ] = None
    allow: Annotated[
        str | None,
        typer.Option(
            help=f"With a target, in place of --method: what the search may choose, with commas: "
            f"{', '.join(FREE)} (a smaller input), which are tried first, and methods."
        ),
    ] = None
    sampling: Annotated[
        str | None,
        typer.Option(
            help="spatialbottleneck, perforate: computed positions, 1/4, 2/4 (the default), 3/4 or others."
        ),
    ] = None
    rank: Annotated[
        str | None,
        typer.Option(
            help="Rank of each layer: a number, a share of the full rank such as 0.5, or full; or for some "
            "layers, as conv2=71,conv*=0.3."
        ),
    ] = None
    rank_budget: Annotated[
        float | None,
        typer.Option(help="Choose the ranks: share of the layers' MACs that all of them may cost together."),
    ] = None
    rate: Annotated[
        str | None,
        typer.Option(help="espace: share of the positions to compute; two with a comma for the two halves."),
    ] = None
    mask: Annotated[
        str | None,
        typer.Option(
            help="espace: which positions to compute: impact, residual, lattice, uniform, uniform-eq8 "
            "or random."
        ),
    ] = None
    fill: Annotated[
        str | None,
        typer.Option(help="perforate, espace: what skipped positions get: zero, nearest or fitted."),
    ] = None
    subspace: Annotated[int | None, typer.Option(help="qcnn: channels of a subspace.")] = None
    codewords: Annotated[int | None, typer.Option(help="qcnn: codewords of a codebook.")] = None
    keep_slower: Annotated[
        bool,
        typer.Option(
            "--keep-slower", help="Keep replacements that save no time; by default their layers are restored."
        ),
    ] = False

    def allowed(self) -> tuple[str, ...]:
        """What --allow or --method names, methods by their present names; "auto" where neither is given.

        Raises:
            ValueError: both are given.
        """
        if self.allow is not None and self.method is not None:
            raise ValueError(f"allow={self.allow!r}: --method names what may be chosen too; leave one out")
        text = self.allow if self.allow is not None else self.method or "auto"
        return tuple(name.strip() for name in text.split(","))

    def settings(self) -> dict[str, Any]:
        """The method's settings, None where not given.

        Raises:
            ValueError: text that says none.
        """
        if self.rank is not None and self.rank_budget is not None:
            raise ValueError("rank_budget: chooses the ranks by itself; leave --rank out")
        return {
            "rank": _rank(self.rank),
            "budget": self.rank_budget,
            "rate": _rate(self.rate),
            "mask": self.mask,
            "fill": self.fill,
            "subspace": self.subspace,
            "codewords": self.codewords,
            "sampling": None if self.sampling is None else parse(self.sampling),
        }


@verb(
    "accelerate",
    epilog=example(
        "quincunx accelerate runs/rrn20 --data cifar10 --rate 0.5 --out fast",
        "quincunx accelerate --model mynets:make --data photos --speedup 1.5",
        "quincunx accelerate net.onnx --data photos --latency-ms 12 --export onnx",
    ),
    short_help="Make a trained network faster.",
)
def accelerate_command(
    network: NetworkOptions,
    images: DataOptions,
    about: TaskOptions,
    target: TargetOptions,
    method: MethodOptions,
    fitting: FittingOptions,
    finetuning: FineTuningOptions,
    timing: TimingOptions,
    unlabelled: Unlabelled = False,
    seed: Seed = 0,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder for the result.", rich_help_panel="Output")] = Path(
        "fast"
    ),
    export_format: Annotated[
        str | None,
        typer.Option(
            "--export",
            help=f"Also write the result for another engine, as quincunx export does: {', '.join(FORMATS)}.",
            rich_help_panel="Output",
        ),
    ] = None,
    plugin: Annotated[
        bool,
        typer.Option(
            "--plugin",
            help="With --export: our kernels compute inside the engine, which loads their library; always so "
            "for a result in int8, which plain operators have not.",
            rich_help_panel="Output",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Replace the convolutions of a trained network by faster ones; report speed gained and accuracy lost.

    Layers are fitted one after the other, in the order of the network, on training images. Then batch norm's
    statistics are estimated again, and the network may be fine-tuned; of the epochs the one with the lowest
    test error is kept, or none if all are worse.

    With a target (--speedup, --latency-ms, --macs or --max-drop) a search chooses the method of each layer,
    or none, by the loss and the time that it measures. The target is judged on the finished network: by its
    time and its test accuracy. If it is missed the best network is kept and the exit code is 1. A layer whose
    replacement saves no time stays as it was.

    Writes the artifact (model), the result (accelerate.json) and report.html. If the command is interrupted,
    run it again: it continues, and finished layers are not fitted again.

    On several processes or machines: torchrun --nproc-per-node 2 --max-restarts 3 -m quincunx accelerate ...;
    they share the scoring of candidates, the test images and the batches of fine-tuning.
    """
    with bad_input(), joined(patience=PATIENCE) as ranks:
        with ranks.agreed():
            use_threads(threads)
            written = None if export_format is None else _export_file(out, export_format)
            settings, asked, task = method.settings(), target.asked, about.chosen()
            chosen: Method | Search
            bare = (
                method.method is None
                and method.allow is None
                and all(value is None for value in settings.values())
            )
            by_default = bare and all(value is None for value in asked.values())
            if by_default:
                if task.scale.unit != "points":
                    raise ValueError(
                        f"max_drop: task {task.name!r} scores by {task.scale.name}; say what may be lost, "
                        "such as --max-drop 0.1, or give --speedup or --method"
                    )
                asked["max_drop"] = _LITTLE
            if any(value is not None for value in asked.values()):
                if method.keep_slower:
                    raise ValueError("keep_slower: a search never takes what gains no time; leave it out")
                if "format" in method.allowed() and timing.dtype not in (None, "float32"):
                    raise ValueError(
                        f"dtype={timing.dtype!r}: --allow format chooses it; leave one of them out"
                    )
                chosen = _search(method, asked, settings, target.time_budget, target.scores)
            else:
                target.check_needless()
                if method.allow is not None:
                    raise ValueError(f"allow={method.allow!r}: needs a target, such as --speedup 2")
                # methods that draw nothing have no seed
                chosen = _method(method.method or "espace", {**settings, "seed": seed or None})
            further, dtype = finetuning.chosen(unlabelled), format_named(timing.dtype)
            check_can_draw()
            check_folder(out)
            found = network.load(seed)
            read = about.read(task, images, seed=seed, unlabelled=unlabelled, quiet=as_json)
            data = found.suited(read, network.mean, network.std, task)
            make_folder(out)
        shared: dict[str, Any] = {
            "layers": fitting.patterns,
            "calibration": fitting.calibration,
            "batch": timing.batch,
            "seed": seed,
            "dtype": dtype,
            "task": task,
            "progress": not as_json,
            "tell": warn,
            "ranks": ranks,
        }
        if target.dry_run and isinstance(chosen, Search):
            with running(), _going_on(out):
                plan = plan_for_target(found.model, chosen, data, out, **shared)
            if as_json:
                show(plan)
            elif ranks.first:
                print_search(plan)
            raise typer.Exit(0 if plan["met"] or not ranks.first else 1)
        with running(), _going_on(out):
            result = accelerate_trained(
                found.model,
                chosen,
                data,
                out,
                recipe=further,
                rounds=timing.rounds,
                workers=images.workers,
                keep_slower=method.keep_slower,
                **shared,
            )
            exported, failed = None, ""
            page = ranks.from_first(lambda: write_acceleration_report(out))
            try:
                if written is not None and ranks.first:
                    exported = _exported(network, found, data, out, written, plugin, seed)
            except RunFailed as error:
                failed = str(error)
    if as_json:
        show(result if exported is None else {**result, "exported": exported.to_dict()})
    elif ranks.first:
        print_acceleration(result)
        say(f"wrote {page} and the artifact {out / 'model'}; to use it:")
        for line in usage(result, out):
            say(f"  {line}")
        if exported is not None:
            print_export(exported)
    if failed:
        complain(failed)
        raise typer.Exit(1)
    if not ranks.first:
        # a launcher kills all as soon as one ends with another code, while the first one still writes
        return
    # nobody asked for what the search without a method or target looks for
    if result["verdict"] is not None and not result["verdict"]["met"] and not by_default:
        raise typer.Exit(1)


def _export_file(out: Path, name: str) -> Path:
    """The file of an export, checked before the long work.

    Raises:
        ValueError: no such format, or one that cannot be written here.
    """
    if name not in FORMATS:
        raise ValueError(f"export={name!r}: expected one of {', '.join(FORMATS)}")
    FORMATS[name].check()
    return out / f"fast{FORMATS[name].suffix}"


def _exported(
    network: NetworkOptions, found: Trained, data: ImageData, out: Path, path: Path, plugin: bool, seed: int
) -> qx.Exported:
    """The finished network for another engine, timed beside the one that it was made of.

    Raises:
        RunFailed: it is not faster there, or cannot be exported; the artifact is there all the same.
    """
    own = network.model or (network.network if str(network.network).endswith(".onnx") else None)
    shape = (1, data.in_channels, *data.size)
    model = build_own_network(own, out, seed, shape).model if own is not None else read_artifact(out)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    low = quantisation_of(model) is not None
    dtype = torch.int8 if low else None
    try:
        return qx.export(model, path, image, plugin=plugin or low, dtype=dtype, baseline=found.model)
    except NotFaster as error:
        named = str(out) if own is None else f"--model {own} --weights {out}"
        size = "" if getattr(model, "onnx_size", data.size) else f" --input {'x'.join(map(str, shape))}"
        told = error.advising("--plugin", f"quincunx export {named}{size} --force")
        raise RunFailed(f"the artifact is in {out / 'model'}; export: {told}") from None
    except (ExportFailed, ValueError, TypeError) as error:
        raise RunFailed(f"the artifact is in {out / 'model'}; export: {error}") from None


def _method(name: str, settings: dict[str, Any]) -> Method:
    """A method with the settings that were given.

    Raises:
        ValueError: an unknown method, or a setting that it has not or refuses.
    """
    kind: Any = method_named(_noted(name))
    given = {key: value for key, value in settings.items() if value is not None}
    known = {field.name for field in fields(kind)}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{_OPTIONS.get(key, key)}={value!r}: {kind.name} has no such setting")
    method: Method = kind(**given)
    return method


def _noted(name: str) -> str:
    """A method's name; of one that it had before the newer one is told."""
    if name in ALIASES:
        typer.echo(f"note: the method {name} is called {ALIASES[name]} now", err=True)
    return name


_OPTIONS = {"budget": "rank_budget"}


@contextmanager
def _going_on(out: Path) -> Iterator[None]:
    """Within: a stop by the user ends with what to do next."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        # that of fine-tuning says how many epochs are done
        tuned = (
            f"{str(error).partition(',')[0]} of fine-tuning" if isinstance(error, Interrupted) else "stopped"
        )
        raise RunFailed(
            f"{tuned}; the same command goes on from here: what is finished is kept in {out}"
        ) from None


def _search(
    method: MethodOptions,
    asked: dict[str, Any],
    settings: dict[str, Any],
    time_budget: str | None,
    scores: Path | None,
) -> Search:
    """A search for a target.

    Raises:
        ValueError: a setting that the search chooses by itself, a target or method that there is not.
    """
    for key, value in settings.items():
        if value is not None:
            raise ValueError(f"{_OPTIONS.get(key, key)}: a search for a target chooses it; leave it out")
    names = method.allowed()
    free = tuple(name for name in FREE if name in names and method.allow is not None)
    names = tuple(name for name in names if name not in free)
    try:
        candidates_named([_noted(name) for name in names])
    except ValueError as error:
        if method.allow is None:
            raise
        known = ", ".join((*FREE, "auto", *with_candidates()))
        raise ValueError(f"allow={method.allow!r}: expected some of {known}, with commas") from error
    if scores is not None and not scores.is_file():
        raise ValueError(f"scores={str(scores)!r}: no such file")
    limit = None if time_budget is None else _duration(time_budget)
    return Search(Target(**asked), names, limit, scores, free)


def _duration(text: str) -> float:
    """Seconds of a text such as 30m."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"time_budget={text!r}: expected a time such as 30m, 90s or 1h")
    return seconds


def _rank(text: str | None) -> LayerRanks | None:
    """One for all layers, or NAME=RANK,... for some."""
    if text is None:
        return None
    parts = [part.strip().rpartition("=") for part in text.split(",")]
    named = [name for name, _, _ in parts]
    if len(parts) == 1 and not named[0]:
        return _one_rank(text)
    if not all(named) or len(set(named)) < len(named):
        raise ValueError(f"rank={text!r}: expected one, or NAME=RANK for each of several layers, with commas")
    return {name: _one_rank(value) for name, _, value in parts}


def _one_rank(text: str) -> int | float | str:
    if text == "full":
        return text
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"rank={text!r}: expected a number, a share in (0, 1] or full") from None


def _rate(text: str | None) -> float | tuple[float, ...] | None:
    if text is None:
        return None
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"rate={text!r}: expected one number or two with a comma, such as 0.25") from None
    return rates[0] if len(rates) == 1 else rates
