"""The command line: verbs, each a library function. Exit code 2 for bad input, 1 for a failed run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import quincunx as qx
from quincunx import recipes
from quincunx.artifact import read_spec, spec_of, write_json
from quincunx.bench import SUITES, run_suite
from quincunx.console import complain, print_bench, print_cost, print_facts, print_lines, say, show
from quincunx.cost import cost
from quincunx.data import ImageData, load_data
from quincunx.demo import file_name, run_demo
from quincunx.figures import check_can_draw
from quincunx.latency import environment
from quincunx.ranks import joined
from quincunx.report import label_of, speedup_figure, verdicts, write_report
from quincunx.train import (
    ARTIFACT,
    CHECKPOINT,
    Interrupted,
    RunFailed,
    evaluate,
    fit,
    progress_bar,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="quincunx",
    help="Faster convolutional networks: convolutions computed at only some spatial positions.",
    # the mark keeps click from filling the lines up
    epilog="\b\nStart with:\n  quincunx demo\n  quincunx train --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        say(f"quincunx {qx.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _every_verb(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Seed = Annotated[int, typer.Option(help="Fixes initial weights, data order and augmentation.", min=0)]
Threads = Annotated[
    int | None, typer.Option(help="Threads to compute with; torch decides by default.", min=1)
]
Data = Annotated[str, typer.Option(help="digits, or a folder or .tar.gz of images by class.")]
Size = Annotated[int | None, typer.Option(help="Resize the shorter side to this and crop the centre.", min=1)]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out instead of stopping.")]
TestData = Annotated[
    Path | None, typer.Option("--test-data", help="Folder or archive of the test part, if not in --data.")
]
Sampling = Annotated[
    str | None,
    typer.Option(
        help="Computed positions: 1/4, 2/4, 3/4, cosets:K:a,b;a,b, random:RATE:SEED or uniform:RATE; "
        "2/4 by default in rsbn and csbn networks."
    ),
]
Down = Annotated[str | None, typer.Option(help="How to sample down: stride (the default) or avgpool.")]
Width = Annotated[int | None, typer.Option(help="Channels of the first stage; 16 by default.")]


def main() -> None:
    """The command line on this process's arguments."""
    app(prog_name="quincunx")


def _example(text: str) -> str:
    return f"\b\nExample:\n  {text}"


@contextmanager
def _bad_input() -> Iterator[None]:
    """Within: what the user passed is being checked; a refusal ends with one sentence and code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        complain(error)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        complain("stopped")
        raise typer.Exit(1) from None


@contextmanager
def _run() -> Iterator[None]:
    """Within: the work itself; a failure that is not a defect ends with one sentence and code 1."""
    try:
        yield
    except (RunFailed, OSError) as error:
        complain(error)
        raise typer.Exit(1) from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        wanted = re.search(r"\d+ bytes", str(error))
        complain(f"not enough memory for {wanted[0] if wanted else 'this'}")
        raise typer.Exit(1) from None


def _check_folder(folder: Path) -> None:
    """Refuse, before long work, a folder that cannot be made or written.

    Raises:
        ValueError: it or a part of its path is a file, or may not be written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out={str(folder)!r}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out={str(folder)!r}: {there} may not be written")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(folder)!r}: cannot be made ({error.strerror})") from error


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


@app.command(
    epilog=_example("quincunx train --network rsbn20 --data digits --epochs 12 --out runs/first"),
    short_help="Train a network.",
)
def train(
    network: Annotated[str, typer.Option(help="Name, such as rrn20 or rsbn20.")] = "rsbn20",
    data: Data = "digits",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NETWORK and its settings by default.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(recipes.RECIPES)}; digits for the digits, else short."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at the start.")] = None,
    milestones: Annotated[
        str | None, typer.Option(help="Shares of the epochs after which the rate falls, such as 0.5,0.75.")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="What the rate is multiplied by there.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the epochs in which the rate rises.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay, on every parameter.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Nesterov momentum.")] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="none, cifar (pad, crop, flip) or imagenet; by default as suits the data."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 (the default), or mixed: bfloat16 or float16.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Parts in which a batch is computed.")] = None,
    channels_first: Annotated[bool, typer.Option("--channels-first", help="Lay maps out as NCHW.")] = False,
    sampling: Sampling = None,
    down: Down = None,
    width: Width = None,
    test_data: TestData = None,
    size: Size = None,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train a network.

    Writes a checkpoint after each epoch, a log, the result (run.json) and the trained network (model).
    What --recipe names sets epochs, batch size, learning rate, weight decay and momentum; each can be
    set by itself as well.

    On several processes or machines: torchrun --nproc-per-node 2 --max-restarts 3 -m quincunx train ...;
    the batch size is that of all of them, and a run whose process died goes on from its last checkpoint.
    """
    with _bad_input(), joined(_check_device(device)) as ranks:
        _use(threads)
        chosen = recipes.recipe_with(
            recipes.by_name(recipe or ("digits" if data == "digits" else "short")),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            milestones=_parse_shares(milestones),
            gamma=gamma,
            warmup=warmup,
            weight_decay=weight_decay,
            momentum=momentum,
            augment=augment,
            precision=precision,
            accumulate=accumulate,
            channels_last=False if channels_first else None,
        )
        settings = _settings(sampling, down, width)
        # what can be refused without the data is refused before a large data set is read
        label = label_of(spec_of(qx.networks.build(network, **settings)))
        folder = out or Path("runs") / _run_name(network, label, settings, seed)
        resume = resume or ranks.world > 1
        if (folder / CHECKPOINT).exists() and not resume:
            raise ValueError(
                f"out={str(folder)!r}: holds a run already; --resume goes on with it, "
                "another --out starts anew"
            )
        _check_folder(folder)
        images = _load(data, test_data, size, skip_bad, as_json)
        torch.manual_seed(seed)
        model = qx.networks.build(network, len(images.classes), images.in_channels, **settings).to(device)
        _make_folder(folder)
        with _run():
            result = fit(
                model, images, chosen, folder, seed=seed, resume=resume, progress=not as_json, ranks=ranks
            )
    if not ranks.first:
        return
    if as_json:
        show(result)
        return
    say(
        f"{label_of(result['network'])} on {images.name}: test error {100 * result['test_error']:.2f}% "
        f"of {len(images.test)} images, {result['cost']['macs'] / 1e6:.2f} M MACs, "
        f"{result['seconds']:.0f} s of training; artifact in {folder / ARTIFACT}"
    )


def _check_device(device: str) -> str:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no GPU that it can use here")
    return device


def _use(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _run_name(network: str, label: str, settings: dict[str, Any], seed: int) -> str:
    """The network, and what was asked for beyond it, so that two runs do not meet in one folder."""
    name = file_name(label) if settings else network
    return f"{name}-seed{seed}" if seed else name


@app.command(
    "evaluate",
    epilog=_example("quincunx evaluate runs/rsbn20/model --data digits"),
    short_help="Test error of a trained network.",
)
def evaluate_command(
    artifact: Annotated[Path, typer.Argument(help="Folder written by qx.save, or a run's folder.")],
    data: Data = "digits",
    test_data: TestData = None,
    size: Size = None,
    skip_bad: SkipBad = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Loss and top-1 error of an artifact on the test part of a data set."""
    with _bad_input():
        _use(threads)
        if (artifact / ARTIFACT).is_dir():
            artifact = artifact / ARTIFACT
        model = qx.load(artifact)
        trained_on = read_spec(artifact).get("info", {}).get("data", {})
        images = _load(data, test_data, size, skip_bad, as_json)
        if trained_on.get("classes", list(images.classes)) != list(images.classes):
            raise ValueError(f"data={data!r}: its classes are not those that {artifact} was trained on")
        if "mean" in trained_on:
            # a network is tested with the normalisation it was trained with
            images = _renormalised(images, trained_on)
        with _run():
            result = evaluate(model, images.test, images)
    if as_json:
        show({"artifact": str(artifact), "data": images.name, **vars(result), "environment": environment()})
        return
    say(
        f"{artifact} on {images.name}: test error {100 * result.error:.2f}% of {result.images} images, "
        f"loss {result.loss:.4f}"
    )


def _renormalised(images: ImageData, trained_on: dict[str, Any]) -> ImageData:
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


@app.command(
    "cost",
    epilog=_example("quincunx cost rsbn20 --sampling 1/4"),
    short_help="MACs and parameters of a network.",
)
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
        with _run():
            found = cost(model, torch.zeros(shape))
    if as_json:
        show({"network": network, "input": list(shape), **found.to_dict()})
        return
    print_cost(network, shape, found)


@app.command(
    "report",
    epilog=_example("quincunx report results/demo"),
    short_help="Draw a page from result files.",
)
def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder with results (run.json, ...).")],
    out: Annotated[Path | None, typer.Option(help="The page; FOLDER/report.html by default.")] = None,
    as_json: Json = False,
) -> None:
    """Draw one self-contained page from the result files below a folder.

    Networks are compared with the one that timings name as the baseline, else with the one of most MACs.
    Runs of one network that differ in the seed alone are averaged.
    """
    with _bad_input():
        if out is not None:
            _check_folder(out.parent)
        page = write_report(folder, out)
    if as_json:
        show({"report": str(page)})
        return
    say(f"wrote {page}")


@app.command(
    epilog=_example("quincunx bench blocks --threads 1,2 --out results"),
    short_help="Time this machine against other engines.",
)
def bench(
    suite: Annotated[str, typer.Argument(help=f"One of {', '.join(SUITES)}.")],
    out: Annotated[Path, typer.Option(help="Folder of the result file and the figure.")] = Path("results"),
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(help="How often each candidate has its turn.", min=3)] = 11,
    only: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    as_json: Json = False,
) -> None:
    """Time ours against the best dense network, interleaved in one process; writes JSON and a figure.

    ops: single convolutions. blocks: residual blocks in inference. training: forward and backward.
    networks: whole networks, fused. Needs the bench extra (ONNX Runtime, OpenVINO).
    """
    with _bad_input():
        counts = _parse_threads(threads)
        check_can_draw()
        _make_folder(out)
        with _run(), progress_bar(not as_json) as bar:
            task = bar.add_task(suite, total=None, state="")
            result = run_suite(
                suite,
                threads=counts,
                rounds=rounds,
                only=only,
                progress=lambda where, done, total: bar.update(
                    task, completed=done, total=total, state=where
                ),
            )
            bar.update(task, completed=len(result["rows"]), state="")
            path = out / f"bench-{suite}.json"
            write_json(path, result)
            figure = out / f"bench-{suite}.svg"
            figure.write_bytes(speedup_figure(result))
    if as_json:
        show(result)
        return
    print_bench(result)
    say(f"wrote {path} and {figure}")


def _parse_shares(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"milestones={text!r}: expected numbers with commas, such as 0.5,0.75") from None


def _parse_threads(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not counts or min(counts) < 1 or len(counts) != len(text.split(",")):
        raise ValueError(f"threads={text!r}: expected numbers with commas, such as 1,2")
    return counts


@app.command(epilog=_example("quincunx info --json"), short_help="Versions, processor, back end, networks.")
def info(as_json: Json = False) -> None:
    """Versions, processor, which back end serves and why, and what can be built."""
    with _bad_input(), _run():
        serving = qx.backend()
    facts = {
        **environment(),
        "backend": serving.name,
        "backend_reason": serving.reason,
        "isa": serving.isa,
        "networks": qx.networks.names(),
        "recipes": list(recipes.RECIPES),
    }
    if as_json:
        show(facts)
        return
    print_facts(
        {k.replace("_", " "): v for k, v in facts.items() if k not in ("time", "command") and v is not None}
    )


@app.command(
    epilog=_example("quincunx demo --out results/demo"),
    short_help="Train three small networks and compare them.",
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the training images.", min=1)] = 12,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a small ResNet and its spatial bottleneck twins on digits; compare error, MACs and time.

    Takes about two minutes on two cores. Replaces the results of an earlier demonstration in the
    folder and nothing else.
    """
    with _bad_input():
        _use(threads)
        _check_folder(out)
        with _run():
            try:
                rows = run_demo(out, epochs=epochs, seed=seed, progress=not as_json)
            except Interrupted:
                raise RunFailed("stopped; the demonstration starts anew when it is called again") from None
    if as_json:
        show({"out": str(out), "verdicts": verdicts(rows), "rows": [vars(row) for row in rows]})
        return
    print_lines(rows)
    for sentence in verdicts(rows):
        say(sentence)
    say(f"wrote {out / 'report.html'} and the artifact {out / 'model'} (qx.load({str(out / 'model')!r}))")
