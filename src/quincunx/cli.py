"""The command line: verbs, each a library function. Exit code 2 for bad input, 1 for a failed run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import quincunx as qx
from quincunx import recipes
from quincunx.artifact import read_spec, write_json
from quincunx.cost import Cost, cost
from quincunx.data import ImageData, load_data
from quincunx.latency import environment, measure_models
from quincunx.report import Line, collect, label_of, lines, verdicts, write_report
from quincunx.train import ARTIFACT, RunFailed, evaluate, fit, progress_bar, recipe_with

__all__ = ["app", "main"]

app = typer.Typer(
    name="quincunx",
    help="Faster convolutional networks: convolutions computed at only some spatial positions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Seed = Annotated[int, typer.Option(help="Fixes initial weights, data order and augmentation.", min=0)]
Threads = Annotated[int | None, typer.Option(help="Intra-op threads; torch's own number by default.", min=1)]
Size = Annotated[int | None, typer.Option(help="Resize the shorter side to this and crop the centre.", min=1)]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out instead of stopping.")]
TestData = Annotated[
    Path | None, typer.Option("--test-data", help="Folder or archive of the test part, if not in --data.")
]
Sampling = Annotated[
    str | None,
    typer.Option(help="1/4, 2/4, 3/4, cosets:K:a,b;a,b, random:RATE:SEED or uniform:RATE."),
]
Down = Annotated[str | None, typer.Option(help="stride or avgpool.")]
Width = Annotated[int | None, typer.Option(help="Channels of the first stage (16 in the papers).")]


def main() -> None:
    """The console script. Bad input ends with 2, a run that failed with 1."""
    app()


def _fail(message: object, code: int) -> typer.Exit:
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", markup=False, highlight=False)
    return typer.Exit(code)


@contextmanager
def _bad_input() -> Iterator[None]:
    """Within: what the user passed is being checked; a refusal ends with one sentence and code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise _fail(error, 2) from None


@contextmanager
def _run() -> Iterator[None]:
    """Within: the work itself; a failure that is not a defect ends with one sentence and code 1."""
    try:
        yield
    except RunFailed as error:
        raise _fail(error, 1) from None
    except KeyboardInterrupt:
        raise _fail("stopped", 1) from None
    except OSError as error:
        raise _fail(error, 1) from None


def _show(value: Any) -> None:
    """A JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _console() -> Console:
    # a table that is piped into a file is not cut at 80 columns
    return Console(width=None if sys.stdout.isatty() else 140)


def _settings(sampling: str | None, down: str | None, width: int | None) -> dict[str, Any]:
    given = {"sampling": sampling, "down": down, "width": width}
    return {k: v for k, v in given.items() if v is not None}


def _load(data: str, test_data: Path | None, size: int | None, skip_bad: bool, quiet: bool) -> ImageData:
    console = Console(stderr=True, quiet=quiet)
    with console.status(f"reading {data}"):
        loaded = load_data(data, test_source=test_data, size=size, skip_bad=skip_bad)
    for note in loaded.notes:
        Console(stderr=True).print(f"note: {note}", markup=False, highlight=False)
    return loaded


@app.command(epilog="Example: quincunx train --network rsbn20 --data digits --epochs 12 --out runs/first")
def train(
    network: Annotated[str, typer.Option(help="Name, such as rrn20 or rsbn20.")] = "rsbn20",
    data: Annotated[str, typer.Option(help="digits, or a folder or .tar.gz of images by class.")] = "digits",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NETWORK by default.")] = None,
    recipe: Annotated[str | None, typer.Option(help=f"One of {', '.join(recipes.RECIPES)}.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at the start.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On every parameter.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Nesterov momentum.")] = None,
    augment: Annotated[bool | None, typer.Option(help="Crop and flip; the data set says by default.")] = None,
    sampling: Sampling = None,
    down: Down = None,
    width: Width = None,
    test_data: TestData = None,
    size: Size = None,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network; writes a checkpoint each epoch, a log, a result file and an artifact."""
    with _bad_input():
        if threads is not None:
            torch.set_num_threads(threads)
        chosen = recipe_with(
            recipes.by_name(recipe or ("digits" if data == "digits" else "short")),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            augment=augment,
        )
        # a name that does not exist is refused before a large data set is read
        qx.networks.build(network, **_settings(sampling, down, width))
        images = _load(data, test_data, size, skip_bad, as_json)
        torch.manual_seed(seed)
        model = qx.networks.build(
            network, len(images.classes), images.in_channels, **_settings(sampling, down, width)
        )
        folder = out or Path("runs") / network
        with _run():
            result = fit(model, images, chosen, folder, seed=seed, resume=resume, progress=not as_json)
    if as_json:
        _show(result)
        return
    _console().print(
        f"{label_of(result['network'])} on {images.name}: test error {100 * result['test_error']:.2f}% "
        f"of {len(images.test)} images, {result['cost']['macs'] / 1e6:.2f} M MACs, "
        f"{result['seconds']:.0f} s of training; artifact in {folder / ARTIFACT}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command("evaluate", epilog="Example: quincunx evaluate runs/rsbn20/model --data digits")
def evaluate_command(
    artifact: Annotated[Path, typer.Argument(help="Folder written by training or qx.save.")],
    data: Annotated[str, typer.Option(help="digits, or a folder or .tar.gz of images by class.")] = "digits",
    test_data: TestData = None,
    size: Size = None,
    skip_bad: SkipBad = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Loss and top-1 error of an artifact on the test part of a data set."""
    with _bad_input():
        if threads is not None:
            torch.set_num_threads(threads)
        model = qx.load(artifact)
        trained_on = read_spec(artifact)["info"].get("data", {})
        images = _load(data, test_data, size, skip_bad, as_json)
        if trained_on.get("classes", list(images.classes)) != list(images.classes):
            raise ValueError(f"data={data!r}: its classes are not those that {artifact} was trained on")
        if "mean" in trained_on:
            # a network is tested with the normalisation it was trained with
            images = _renormalised(images, trained_on)
        with _run():
            result = evaluate(model, images.test, images)
    if as_json:
        _show({"artifact": str(artifact), "data": images.name, **vars(result), "environment": environment()})
        return
    _console().print(
        f"{artifact} on {images.name}: test error {100 * result.error:.2f}% of {result.images} images, "
        f"loss {result.loss:.4f}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _renormalised(images: ImageData, trained_on: dict[str, Any]) -> ImageData:
    from dataclasses import replace

    if len(trained_on["mean"]) != images.in_channels:
        raise ValueError(
            f"data={images.name!r}: images of {images.in_channels} channels, but the network takes "
            f"{len(trained_on['mean'])}"
        )
    return replace(images, mean=tuple(trained_on["mean"]), std=tuple(trained_on["std"]))


def _parse_input(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"input={text!r}: expected NxCxHxW, such as 1x3x32x32")
    return shape


@app.command("cost", epilog="Example: quincunx cost rsbn20 --sampling 1/4")
def cost_command(
    network: Annotated[str, typer.Argument(help="Name, such as rrn20 or rsbn20.")],
    input_shape: Annotated[str, typer.Option("--input", help="Example input as NxCxHxW.")] = "1x3x32x32",
    num_classes: Annotated[int, typer.Option(help="Outputs of the last layer.")] = 10,
    sampling: Sampling = None,
    down: Down = None,
    width: Width = None,
    as_json: Json = False,
) -> None:
    """MACs and parameters of a network, per layer and in total."""
    with _bad_input():
        shape = _parse_input(input_shape)
        model = qx.networks.build(network, num_classes, shape[1], **_settings(sampling, down, width))
        found = cost(model, torch.zeros(shape))
    if as_json:
        _show({"network": network, "input": list(shape), **found.to_dict()})
        return
    _print_cost(network, shape, found)


def _print_cost(network: str, shape: tuple[int, ...], found: Cost) -> None:
    table = Table(title=f"{network}, input {' x '.join(map(str, shape))}", title_justify="left")
    table.add_column("layer")
    table.add_column("kind")
    for column in ("output", "MACs", "share", "parameters"):
        table.add_column(column, justify="right")
    for row in found.rows:
        if row.macs:
            share = f"{row.macs / found.macs:.1%}"
            output = " x ".join(map(str, row.output))
            table.add_row(row.name, row.kind, output, f"{row.macs:,}", share, f"{row.params:,}")
    rest = sum(row.params for row in found.rows if not row.macs)
    table.add_row("(no MACs: normalisation)", "", "", "0", "", f"{rest:,}", end_section=True)
    table.add_row("total", "", "", f"{found.macs:,}", "100%", f"{found.params:,}")
    _console().print(table)
    _console().print(
        f"{found.macs / 1e6:.1f} M MACs (one multiply-add each; {2 * found.macs / 1e6:.1f} M FLOPs), "
        f"{found.params / 1e6:.3f} M parameters",
        highlight=False,
    )


@app.command("report", epilog="Example: quincunx report results/demo")
def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder with results of training runs.")],
    out: Annotated[Path | None, typer.Option(help="The page; FOLDER/report.html by default.")] = None,
    as_json: Json = False,
) -> None:
    """Draw one self-contained page from the result files below a folder."""
    with _bad_input():
        page = write_report(folder, out)
    if as_json:
        _show({"report": str(page)})
        return
    _console().print(f"wrote {page}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: quincunx info --json")
def info(as_json: Json = False) -> None:
    """Versions, processor, and which back end serves."""
    facts = {**environment(), "networks": qx.networks.names()}
    if as_json:
        _show(facts)
        return
    table = Table(show_header=False)
    for key, value in facts.items():
        table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    _console().print(table)


@app.command(epilog="Example: quincunx demo --out results/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 12,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a small ResNet and its spatial bottleneck twins on digits; compare error, MACs and time."""
    with _bad_input():
        if threads is not None:
            torch.set_num_threads(threads)
        if out.exists() and not out.is_dir():
            raise ValueError(f"out={str(out)!r}: not a folder")
        with _run():
            rows = _demo(out, epochs, seed, quiet=as_json)
    if as_json:
        _show({"out": str(out), "verdicts": verdicts(rows), "rows": [vars(row) for row in rows]})
        return
    _print_lines(rows)
    for sentence in verdicts(rows):
        _console().print(sentence, highlight=False, markup=False, soft_wrap=True)
    _console().print(
        f"wrote {out / 'report.html'} and the artifact {out / 'model'} (qx.load({str(out / 'model')!r}))",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


_DEMO: tuple[tuple[str, dict[str, str]], ...] = (
    ("rrn14", {}),
    ("rsbn14", {"sampling": "2/4"}),
    ("rsbn14", {"sampling": "1/4"}),
)


def _demo(out: Path, epochs: int, seed: int, quiet: bool) -> list[Line]:
    images = load_data("digits")
    models: dict[str, torch.nn.Module] = {}
    # its own earlier results are replaced, nothing else in the folder is touched
    shutil.rmtree(out / "runs", ignore_errors=True)
    for name, settings in _DEMO:
        torch.manual_seed(seed)
        model = qx.networks.build(name, len(images.classes), images.in_channels, **settings)
        label = label_of(qx.artifact.spec_of(model))
        folder = out / "runs" / label.replace(" ", "-").replace("/", "of")
        result = fit(
            model, images, recipe_with(recipes.digits(), epochs=epochs), folder, seed=seed, progress=not quiet
        )
        write_json(out / f"{folder.name}.json", result)
        models[label] = model
    baseline, chessboard = list(models)[:2]
    info = {"data": images.describe()}
    qx.save(models[chessboard], out / "model", info=info)
    for batch in (1, 64):
        _time(models, baseline, batch, images, out, quiet)
    write_report(out)
    return lines(collect(out))


def _time(
    models: dict[str, torch.nn.Module], baseline: str, batch: int, images: ImageData, out: Path, quiet: bool
) -> None:
    height, width = images.size
    example = torch.randn(batch, images.in_channels, height, width)
    example = example.contiguous(memory_format=torch.channels_last)
    rounds = 15
    with progress_bar(not quiet) as bar:
        bar.add_task(f"timing, batch {batch}", total=None, state="")
        timings = measure_models(models, example, rounds=rounds)
    rows = {}
    for name, timing in timings.items():
        ratio, low, high = timing.speedup_over(timings[baseline])
        rows[name] = {**timing.to_dict(), "speedup": {"median": ratio, "q1": low, "q3": high}}
    result = {
        "schema": 1,
        "kind": "latency",
        "setting": f"batch {batch}",
        "how": f"inference, channels_last, {torch.get_num_threads()} threads, medians",
        "rounds": rounds,
        "baseline": baseline,
        "rows": rows,
        "environment": environment(),
    }
    write_json(out / f"latency-batch{batch}.json", result)


def _print_lines(rows: list[Line]) -> None:
    table = Table()
    table.add_column("network")
    for column in ("test error", "wrong", "MACs (M)", "MAC ratio"):
        table.add_column(column, justify="right")
    settings = list(rows[0].times)
    for setting in settings:
        table.add_column(f"ms, {setting}", justify="right")
        table.add_column("speed-up", justify="right")
    for row in rows:
        cells = [
            row.label,
            f"{100 * row.error:.2f}%",
            f"{row.wrong} of {row.tested}",
            f"{row.macs / 1e6:.2f}",
        ]
        cells.append(f"{row.mac_ratio:.2f}")
        for setting in settings:
            cells += [f"{1e3 * row.times[setting][0]:.2f}", f"{row.speedups[setting][0]:.2f}x"]
        table.add_row(*cells)
    _console().print(table)
