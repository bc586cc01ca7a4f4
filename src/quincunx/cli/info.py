"""``quincunx info``."""

from __future__ import annotations

import torch

import quincunx as qx
from quincunx.cli.options import (
    Json,
    bad_input,
    example,
    running,
    verb,
)
from quincunx.cli.printing import (
    print_facts,
    show,
)
from quincunx.fusion.decisions import decisions_file
from quincunx.fusion.formats import gain_of
from quincunx.measure.environment import environment
from quincunx.ops import native
from quincunx.train import recipes

__all__ = ["info"]


@verb("info", epilog=example("quincunx info --json"), short_help="Versions, processor, back end, networks.")
def info(as_json: Json = False) -> None:
    """Versions, processor, which back end serves and why, and what can be built."""
    with bad_input(), running():
        serving = qx.backend()
    facts = {
        **environment(),
        "backend": serving.name,
        "backend_reason": serving.reason,
        "isa": serving.isa,
        "AMX tiles": _tiles(serving.isa) if serving.name == "native" else None,
        "level 2 cache": native.level2_bytes() if serving.name == "native" else None,
        "bfloat16": f"{gain_of(torch.bfloat16, 'cpu'):.2f} times as fast as float32 here",
        "int8": f"{gain_of(torch.int8, 'cpu'):.2f} times as fast as float32 here",
        "decisions": None if (kept := decisions_file()) is None else str(kept),
        "networks": qx.networks.names(),
        "recipes": list(recipes.RECIPES),
    }
    if as_json:
        show(facts)
        return
    print_facts(
        {k.replace("_", " "): v for k, v in facts.items() if k not in ("time", "command") and v is not None}
    )


def _tiles(isa: str | None) -> str:
    refused = native.tiles_refused()
    if refused:
        return f"not used: {refused}"
    return f"used for {native.tile_formats()}" if isa == "amx" else f"not used: QUINCUNX_ISA={isa}"
