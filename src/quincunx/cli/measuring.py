"""Verbs that measure and show: cost, bench, report, info."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

import quincunx as qx
from quincunx import recipes
from quincunx.artifact import write_json
from quincunx.bench import SUITES, run_suite
from quincunx.bench_cuda import DTYPES, run_suite_cuda
from quincunx.cli.common import (
    Down,
    Json,
    Sampling,
    Threads,
    Width,
    app,
    bad_input,
    check_device,
    check_folder,
    example,
    make_folder,
    parse_input,
    running,
    settings_of,
    use_threads,
)
from quincunx.console import print_bench, print_cost, print_facts, say, show
from quincunx.cost import cost
from quincunx.figures import check_can_draw
from quincunx.latency import environment
from quincunx.progress import progress_bar
from quincunx.report import speedup_figure, write_report
from quincunx.timings import time_runs
from quincunx.tuning import best_tiles, cases
from quincunx.tuning import tune as find_tiles


@app.command(
    "cost",
    epilog=example("quincunx cost rsbn20 --sampling 1/4"),
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
    with bad_input():
        shape = parse_input(input_shape)
        model = qx.networks.build(network, num_classes, shape[1], **settings_of(sampling, down, width))
        with running():
            found = cost(model, torch.zeros(shape))
    if as_json:
        show({"network": network, "input": list(shape), **found.to_dict()})
        return
    print_cost(network, shape, found)


@app.command(
    "report",
    epilog=example("quincunx report results/demo"),
    short_help="Draw a page from result files.",
)
def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder with results (run.json, ...).")],
    out: Annotated[Path | None, typer.Option(help="The page; FOLDER/report.html by default.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Time the runs' networks first, at these batch sizes, such as 1,8.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Draw one self-contained page from the result files below a folder.

    Networks are compared with the one that timings name as the baseline, else with the one of most MACs.
    Runs of one network that differ in the seed alone are averaged.
    """
    with bad_input():
        if out is not None:
            check_folder(out.parent)
        use_threads(threads)
        if time is not None:
            check_can_draw()
            batches = _parse_counts("time", time)
            with running():
                time_runs(folder, batches, progress=not as_json)
        page = write_report(folder, out)
    if as_json:
        show({"report": str(page)})
        return
    say(f"wrote {page}")


@app.command(
    epilog=example("quincunx bench blocks --threads 1,2 --out results"),
    short_help="Time this machine against other engines.",
)
def bench(
    suite: Annotated[str, typer.Argument(help=f"One of {', '.join(SUITES)}.")],
    out: Annotated[Path, typer.Option(help="Folder of the result file and the figure.")] = Path("results"),
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(help="How often each candidate has its turn.", min=3)] = 11,
    only: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help=f"With cuda: types with commas, of {', '.join(DTYPES)} (by tf32).")
    ] = "bfloat16",
    budget: Annotated[
        float | None, typer.Option(help="With cuda: seconds; cases that do not fit are left out.", min=1)
    ] = None,
    compilers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="With cuda: whether torch.compile is a peer.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Time ours against the best dense network, interleaved in one process; writes JSON and a figure.

    ops: single convolutions. blocks: residual blocks in inference. training: forward and backward.
    networks: whole networks, fused. Needs the bench extra (ONNX Runtime, OpenVINO). The same command again
    goes on after an interruption.

    With --device cuda each call is a CUDA graph, and the peers are cuDNN, torch.compile and TensorRT, where
    that is installed; the result so far is written after each case.
    """
    with bad_input():
        counts = _parse_counts("threads", threads)
        on_card = check_device(device) == "cuda"
        if budget is not None and not on_card:
            raise ValueError(f"budget={budget:g}: only with --device cuda")
        check_can_draw()
        make_folder(out)
        stem = f"bench-{suite}-cuda" if on_card else f"bench-{suite}"
        path, figure = out / f"{stem}.json", out / f"{stem}.svg"
        with running(), progress_bar(not as_json) as bar:
            task = bar.add_task(suite, total=None, state="")

            def progress(where: str, done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, state=where)

            if on_card:
                result = run_suite_cuda(
                    suite,
                    dtypes=[part.strip() for part in dtype.split(",")],
                    compilers=compilers,
                    rounds=rounds,
                    only=only,
                    budget=budget,
                    keep=partial(write_json, path),
                    progress=progress,
                )
            else:
                result = run_suite(
                    suite,
                    threads=counts,
                    rounds=rounds,
                    only=only,
                    keep=out / f".bench-{suite}.json",
                    progress=progress,
                )
            bar.update(task, completed=len(result["rows"]), state="")
            write_json(path, result)
            if drawn := any(row["candidates"] for row in result["rows"]):
                figure.write_bytes(speedup_figure(result))
    if as_json:
        show(result)
        return
    print_bench(result)
    say(f"wrote {path}{f' and {figure}' * drawn}")


def _parse_counts(name: str, text: str) -> list[int]:
    counts = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not counts or min(counts) < 1 or len(counts) != len(text.split(",")):
        raise ValueError(f"{name}={text!r}: expected numbers with commas, such as 1,2")
    return counts


@app.command(
    epilog=example("quincunx tune --device cuda --shapes 128x28,256x14 --batches 64"),
    short_help="Find the tiles that a GPU computes fastest with.",
)
def tune(
    device: Annotated[str, typer.Option(help="cuda; the CPU's kernels need no tuning.")] = "cuda",
    shapes: Annotated[
        str, typer.Option(help="Channels x side of maps, with commas.")
    ] = "64x56,128x28,256x14,512x7",
    batches: Annotated[str, typer.Option(help="Images a call, with commas.")] = "1,64,256",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)} (by tf32).")] = "bfloat16",
    train: Annotated[bool, typer.Option("--train", help="The gradients of weights, too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write all timings to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Time the tiles of the GPU kernels on this card, and keep the fastest for later calls.

    Without it the kernels take tiles that were measured on another card, or a rule's. Some minutes; what is
    found is kept in the user's cache folder, for batches up to twice as large.
    """
    with bad_input():
        if check_device(device) != "cuda":
            raise ValueError(f"device={device!r}: only cuda has tiles to find")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        serving = qx.backend("cuda")
        if serving.name != "triton":
            raise ValueError(f"device={device!r}: no kernels to tune: {serving.reason}")
        if out is not None:
            check_folder(out.parent)
        wanted = list(cases(_parse_shapes(shapes), _parse_counts("batches", batches), dtype, train))
        with running(), progress_bar(not as_json) as bar:
            task = bar.add_task("compiling", total=None, state="")

            def progress(where: str, done: int, total: int) -> None:
                bar.update(task, description="timing", completed=done, total=total, state=where)

            result = find_tiles(wanted, torch.device("cuda", torch.cuda.current_device()), progress=progress)
        if out is not None:
            write_json(out, result)
    if as_json:
        show(result)
        return
    print_facts(best_tiles(result))
    say(f"kept in {result['kept']}")


def _parse_shapes(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        channels, _, side = part.strip().partition("x")
        if not (channels.isdigit() and side.isdigit() and int(channels) and int(side) > 1):
            raise ValueError(f"shapes={text!r}: expected channels x side, such as 128x28, with commas")
        found.append((int(channels), int(side)))
    return found


@app.command(epilog=example("quincunx info --json"), short_help="Versions, processor, back end, networks.")
def info(as_json: Json = False) -> None:
    """Versions, processor, which back end serves and why, and what can be built."""
    with bad_input(), running():
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
