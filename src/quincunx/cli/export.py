"""``quincunx export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import quincunx as qx
from quincunx.acceleration.judge import inputs_of, sample_batches
from quincunx.cli.network import NetworkOptions
from quincunx.cli.options import (
    DataOptions,
    Json,
    Seed,
    Threads,
    bad_input,
    example,
    format_named,
    running,
    use_threads,
    verb,
)
from quincunx.cli.printing import say, show
from quincunx.cli.task import TaskOptions
from quincunx.deployment.export import ExportFailed, NotFaster
from quincunx.deployment.formats import FORMATS, format_for
from quincunx.layers.eightbits import quantisation_of
from quincunx.networks.preprocessing import Preprocessing
from quincunx.train.loop import RunFailed

_TABLE = "; ".join(f"{kind.name} ({kind.suffix}: {kind.title})" for kind in FORMATS.values())


@verb(
    "export",
    epilog=example("quincunx export fast --plugin --out fast.onnx"),
    short_help="Write a network as a file for another engine.",
)
def export_command(
    network: NetworkOptions,
    images: DataOptions,
    about: TaskOptions,
    out: Annotated[
        Path, typer.Option(help="The file; its ending names the format.", rich_help_panel="Output")
    ] = Path("model.onnx"),
    format_name: Annotated[str | None, typer.Option("--format", help=f"One of {_TABLE}.")] = None,
    plugin: Annotated[
        bool,
        typer.Option("--plugin", help="Our kernels compute inside the engine, which loads their library."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="With --plugin: what our kernels compute in, float32, bfloat16 or int8; by default int8 for "
            "an artifact that holds it, else float32. int8 of another network takes its ranges from --data."
        ),
    ] = None,
    calibration: Annotated[
        int, typer.Option(help="With --dtype int8: number of training images that ranges come from.", min=16)
    ] = 128,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Only batches of the size in --input.")
    ] = False,
    opset: Annotated[int, typer.Option(help="Opset of ONNX, 18 to 23.")] = 18,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="ONNX: weights in a second file, which engines map.")
    ] = False,
    input_names: Annotated[str | None, typer.Option(help="Names of the inputs, with commas.")] = None,
    output_names: Annotated[str | None, typer.Option(help="Names of the outputs, with commas.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of timing; 0 times nothing.", min=0)] = 11,
    force: Annotated[
        bool, typer.Option("--force", help="Write the file even if it is not faster than the dense network.")
    ] = False,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a trained network for ONNX Runtime, OpenVINO or PyTorch, checked and timed there.

    The file is loaded by its engine in a new process and compared with the network on other inputs and
    batches. It is timed beside the dense network in the same engine and is written only if it is faster
    (exit code 1 if not), unless --force is given. As plain operators every engine reads it; with --plugin
    our kernels run in it, and their library is needed where it is loaded.

    The size of the input is that of the network's training images, or --input. --data and the options of its
    task serve --dtype int8 alone.
    """
    with bad_input():
        use_threads(threads)
        kind = format_for(out, format_name)
        kind.check()
        chosen = format_named(dtype)
        if chosen == torch.int8 and not plugin:
            raise ValueError(
                "dtype='int8': plain operators are written in float32; --plugin has our kernels' formats"
            )
        found = network.load(seed)
        record = quantisation_of(found.model)
        if dtype is None and record is not None and plugin:
            chosen = torch.int8
        seen = None
        if chosen == torch.int8 and record is None:
            task = about.chosen()
            read = found.suited(about.read(task, images, quiet=as_json), network.mean, network.std, task)
            seen = list(
                inputs_of(sample_batches(read, calibration, seed=0, task=task, workers=images.workers))
            )
        shape = found.shape or _shape(found.model)
        with running():
            try:
                made = qx.export(
                    found.model,
                    out,
                    torch.randn(shape, generator=torch.Generator().manual_seed(seed)),
                    format=kind.name,
                    plugin=plugin,
                    dtype=chosen,
                    calibration=seen,
                    dynamic_batch=not fixed_batch,
                    opset=opset,
                    external_data=external_data,
                    input_names=_names(input_names),
                    output_names=_names(output_names),
                    force=force,
                    threads=threads,
                    rounds=rounds,
                )
            except NotFaster as error:
                raise RunFailed(error.advising("--plugin", "--force")) from None
            except ExportFailed as error:
                raise RunFailed(str(error)) from None
            except ValueError as error:
                raise ValueError(str(error).replace("dynamic_batch=False", "--fixed-batch")) from error
    if as_json:
        show(made.to_dict())
    else:
        print_export(made)


def print_export(made: qx.Exported) -> None:
    """What was written, how fast it is, and how it is loaded."""
    say(made.sentence())
    batches = ", ".join(map(str, made.difference))
    worst = max(made.difference.values())
    say(f"checked in batches of {batches}: at most {worst:.1e} of the largest value apart")
    say(f"{made.size / 1e6:.2f} MB; inputs {', '.join(made.inputs)}; outputs {', '.join(made.outputs)}")
    for language, lines in made.lines.items():
        say(f"{language}:")
        for line in lines:
            say(f"  {line}")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _shape(model: nn.Module) -> tuple[int, ...]:
    """One image of the size of the training images.

    Raises:
        ValueError: the network does not know it.
    """
    see: Any = getattr(model, "preprocess", None)
    if not isinstance(see, Preprocessing) or see.size is None:
        raise ValueError("input: the size of the images is not known; give it, such as --input 1x3x224x224")
    return (1, len(see.mean), *see.size)
