"""``quincunx cost``."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import quincunx as qx
from quincunx.cli.options import BuildOptions, Json, bad_input, example, parse_input, running, verb
from quincunx.cli.printing import (
    print_cost,
    show,
)
from quincunx.measure.cost import cost

__all__ = ["cost_command"]


@verb(
    "cost",
    epilog=example("quincunx cost rsbn20 --sampling 1/4"),
    short_help="Multiply-accumulates and parameters of a network.",
)
def cost_command(
    network: Annotated[str, typer.Argument(help="Name of the network, such as rrn20 or rsbn20.")],
    built: BuildOptions,
    input_shape: Annotated[
        str, typer.Option("--input", help="Input shape, NxCxHxW.", rich_help_panel="Network")
    ] = "1x3x32x32",
    num_classes: Annotated[
        int, typer.Option(help="Outputs of the last layer.", rich_help_panel="Network")
    ] = 10,
    as_json: Json = False,
) -> None:
    """Multiply-accumulates (MACs) and parameters of a network, for each layer and in total."""
    with bad_input():
        shape = parse_input(input_shape)
        model = qx.networks.build(network, num_classes, shape[1], **built.settings)
        with running():
            found = cost(model, torch.zeros(shape))
    if as_json:
        show({"network": network, "input": list(shape), **found.to_dict()})
        return
    print_cost(network, shape, found)
