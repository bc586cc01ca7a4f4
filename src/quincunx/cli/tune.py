"""``quincunx tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import quincunx as qx
from quincunx.cli.options import (
    Json,
    bad_input,
    check_device,
    check_folder,
    example,
    parse_counts,
    running,
    verb,
)
from quincunx.cli.printing import (
    print_facts,
    say,
    show,
)
from quincunx.experiments.bench_cuda import DTYPES
from quincunx.experiments.tuning import best_tiles, cases
from quincunx.experiments.tuning import tune as find_tiles
from quincunx.progress import progress_bar
from quincunx.writing import write_json

__all__ = ["tune"]


@verb(
    "tune",
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
            check_folder(out.parent, out)
        wanted = list(cases(_parse_shapes(shapes), parse_counts("batches", batches), dtype, train))
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
