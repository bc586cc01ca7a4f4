"""The verb that makes a trained network faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import quincunx as qx
from quincunx import recipes
from quincunx.acceleration import accelerate_trained
from quincunx.acceleration_report import write_acceleration_report
from quincunx.cli.common import (
    Data,
    Json,
    Seed,
    Size,
    SkipBad,
    Stream,
    TestData,
    Threads,
    Workers,
    app,
    as_trained,
    bad_input,
    check_folder,
    example,
    make_folder,
    read_data,
    running,
    started,
    use_threads,
)
from quincunx.console import print_acceleration, say, show
from quincunx.figures import check_can_draw
from quincunx.surgery import Method

Settings = dict[str, Any]


def _espace(settings: Settings) -> Method:
    return qx.Espace(**settings)


def _lowrank(settings: Settings) -> Method:
    for name in ("rate", "mask"):
        if name in settings:
            raise ValueError(f"{name}={settings[name]!r}: lowrank computes every position; it has no masks")
    return qx.LowRank(**settings)


METHODS: dict[str, Callable[[Settings], Method]] = {"espace": _espace, "lowrank": _lowrank}


@app.command(
    "accelerate",
    epilog=example("quincunx accelerate runs/rrn20 --data cifar10 --rate 0.5 --out fast"),
    short_help="Make a trained network faster.",
)
def accelerate_command(
    network: Annotated[str, typer.Argument(help="Artifact or run, or a network's name with --weights.")],
    weights: Annotated[
        Path | None, typer.Option(help="Published weights of the named network, in a file.")
    ] = None,
    data: Data = "digits",
    test_data: TestData = None,
    size: Size = None,
    skip_bad: SkipBad = False,
    stream: Stream = None,
    workers: Workers = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "espace",
    rank: Annotated[
        str | None, typer.Option(help="Of each layer: a number, a share such as 0.5, or full.")
    ] = None,
    rank_budget: Annotated[
        float | None, typer.Option(help="Choose ranks: share of the MACs all layers together may cost.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Share of computed positions, one number or two with a comma.")
    ] = None,
    mask: Annotated[str | None, typer.Option(help="Which positions: impact, uniform or random.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only layers of these names, with commas; * stands for anything.")
    ] = None,
    calibration: Annotated[int, typer.Option(help="Training images to fit on.", min=1)] = 500,
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning; 0 for none.", min=0)] = 0,
    recipe: Annotated[str, typer.Option(help="Of fine-tuning.")] = "finetune",
    lr: Annotated[float | None, typer.Option(help="Learning rate of fine-tuning.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of fine-tuning: float32 (the default), bfloat16 or float16.")
    ] = None,
    distill: Annotated[
        float | None, typer.Option(help="Share of the loss that follows the original network.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images of the timed inputs.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="How often each layer is timed.", min=3)] = 11,
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("fast"),
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Replace the convolutions of a trained network by faster ones and say what it gains and costs.

    Layers are fitted one by one to training images, in the order of the network; batch norm is estimated
    anew, then the network may be fine-tuned. Writes the artifact (model), the result (accelerate.json) and
    report.html. The same command again goes on after an interruption: finished layers are not fitted again.
    """
    with bad_input():
        use_threads(threads)
        if method not in METHODS:
            raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
        settings = {"rank": _rank(rank), "budget": rank_budget, "rate": _rate(rate), "mask": mask}
        if rank is not None and rank_budget is not None:
            raise ValueError("rank_budget: chooses the ranks by itself; leave --rank out")
        chosen = METHODS[method]({**{k: v for k, v in settings.items() if v is not None}, "seed": seed})
        further = None
        if finetune_epochs:
            further = recipes.recipe_with(
                recipes.by_name(recipe), epochs=finetune_epochs, lr=lr, precision=precision, distill=distill
            )
        check_can_draw()
        check_folder(out)
        model, start = _trained(network, weights)
        images = as_trained(
            read_data(data, test_data, size, skip_bad=skip_bad, stream=stream, quiet=as_json), start
        )
        make_folder(out)
        with running():
            result = accelerate_trained(
                model,
                chosen,
                images,
                out,
                layers=[] if layers is None else [part.strip() for part in layers.split(",")],
                calibration=calibration,
                recipe=further,
                batch=batch,
                rounds=rounds,
                seed=seed,
                workers=workers,
                progress=not as_json,
            )
            page = write_acceleration_report(out)
    if as_json:
        show(result)
        return
    print_acceleration(result)
    say(f"wrote {page} and the artifact {out / 'model'} (qx.fuse(qx.load({str(out / 'model')!r})))")


def _trained(network: str, weights: Path | None) -> tuple[nn.Module, Path]:
    """The network, and what it was read from."""
    if weights is not None:
        return started(network, weights, {}), weights
    if not Path(network).is_dir():
        raise ValueError(
            f"network={network!r}: not the folder of an artifact or a run; a network's name needs --weights"
        )
    return started("", Path(network), {}), Path(network)


def _rank(text: str | None) -> int | float | str | None:
    if text is None or text == "full":
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
