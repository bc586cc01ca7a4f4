"""``quincunx bench``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from quincunx.cli.options import (
    Json,
    bad_input,
    check_device,
    example,
    make_folder,
    parse_counts,
    running,
    verb,
)
from quincunx.cli.printing import (
    print_bench,
    say,
    show,
)
from quincunx.experiments.bench import SUITES, run_suite
from quincunx.experiments.bench_cuda import DTYPES, run_suite_cuda
from quincunx.progress import progress_bar
from quincunx.report.figures import check_can_draw
from quincunx.report.training import draw_speedup_figure
from quincunx.writing import write_json


@verb(
    "bench",
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
        counts = parse_counts("threads", threads)
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
                figure.write_bytes(draw_speedup_figure(result))
    if as_json:
        show(result)
        return
    print_bench(result)
    say(f"wrote {path}{f' and {figure}' * drawn}")
