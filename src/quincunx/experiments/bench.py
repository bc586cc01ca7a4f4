"""Benchmarks: ours against the best dense network a user could pick, interleaved in one process."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx import networks
from quincunx.acceleration.accelerate import accelerate
from quincunx.fusion.fuse import fuse
from quincunx.fusion.program import Program
from quincunx.fusion.steps import Step
from quincunx.layers.sampled import SampledConv2d, SampledConvTranspose2d, SpatialBottleneck2d
from quincunx.measure.cost import cost
from quincunx.measure.engines import PEERS, REST, Run, quiet
from quincunx.measure.environment import environment
from quincunx.measure.latency import measure, using_threads
from quincunx.methods import Espace
from quincunx.networks.preresnet import RegularBlock, RegularSBBlock
from quincunx.ops import backend
from quincunx.ops.geometry import Geometry
from quincunx.reading import one_line, read_json
from quincunx.sampling import CHESSBOARD, QUARTER, Random, Sampling
from quincunx.writing import write_json

__all__ = ["SUITES", "Case", "Dense", "Regular", "run_suite", "summary"]

# channels, side of the map, batch
SHAPES = (
    *((c, s, b) for b in (1, 8) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))),
    (16, 32, 64),
    (32, 16, 64),
    (64, 8, 64),
)
DENSITIES = (0.2, 0.35, 0.5, 0.75)
DENSE_PEERS = ("torch eager", "torch.compile", "ONNX Runtime", "OpenVINO")


@dataclass
class Case:
    """What is timed together: dense candidates, of which the fastest is the baseline, and ours.

    Attributes:
        dense: name -> maker of a function.
        ours: name -> (maker of a function, MACs of the dense network over ours).
        compiled: name of ours -> maker of the same by torch.compile; the faster of the two counts.
        baselines: names of the dense candidates of which the fastest is the baseline; the others are timed
            beside it.
        dtype: format in which the machine's own matrix product is timed in each round.
    """

    name: str
    batch: int
    dense: dict[str, Callable[[int], Run]]
    ours: dict[str, tuple[Callable[[int], Run], float]]
    facts: Callable[[], dict[str, Any]] = dict
    baselines: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    compiled: dict[str, Callable[[int], Run]] = field(default_factory=dict)


# ---------------------------------------------------------------- the blocks


class Dense(nn.Module):
    """Two 3 x 3 convolutions and the shortcut, batch norm folded: what remains of rRB in inference."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x))) + x  # type: ignore[no-any-return]


class Regular(nn.Module):
    """rSB: the same pair at the positions of a sampling."""

    def __init__(self, channels: int, sampling: Sampling) -> None:
        super().__init__()
        self.down = SampledConv2d(channels, channels, 3, sampling=sampling, padding=1)
        self.up = SampledConvTranspose2d(channels, channels, 3, sampling=sampling, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)), x.shape[2:]) + x  # type: ignore[no-any-return]


class _Bottleneck(nn.Module):
    """cRB, or cSB with a spatial bottleneck in place of the 3 x 3 convolution."""

    def __init__(self, channels: int, spatial: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4 * channels, channels, 1)
        self.conv2 = spatial
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.conv3(inner) + x  # type: ignore[no-any-return]


def _map(batch: int, channels: int, side: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, side, side, generator=generator)
    return x.to(dtype, memory_format=torch.channels_last)


def _fused(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Callable[[int], Run]:
    def make(_: int) -> Run:
        quick = fuse(model, dtype, check=x[:1], force=True)

        def run() -> object:
            with torch.inference_mode():
                return quick(x)

        return run

    return make


def _peer(name: str, model: nn.Module, x: Tensor) -> Callable[[int], Run]:
    return lambda threads: PEERS[name](model, x, threads)


def _ratio(dense: nn.Module, other: nn.Module, x: Tensor) -> float:
    return cost(dense, x[:1].float()).macs / cost(other, x[:1].float()).macs


# ---------------------------------------------------------------- suites


def ops(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Iterator[Case]:
    """One 3 x 3 convolution: our dense one, and random masks, against oneDNN in channels_last."""
    for channels, side, batch in shapes:
        x = _map(batch, channels, side)
        dense = nn.Conv2d(channels, channels, 3, padding=1).eval().requires_grad_(False)
        ours: dict[str, tuple[Callable[[int], Run], float]] = {"dense": (_native_dense(dense, x), 1.0)}
        for density in DENSITIES:
            sampled = SampledConv2d(channels, channels, 3, sampling=Random(density, 0), padding=1)
            ours[f"random {density}"] = (_fused(sampled, x), _ratio(dense, sampled, x))
        peers = {"oneDNN": _peer("torch eager", dense, x), "oneDNN, packed weights": _packed(dense, x)}
        yield Case(f"{channels} x {side}^2", batch, peers, ours)


def _native_dense(conv: nn.Conv2d, x: Tensor) -> Callable[[int], Run]:
    """Our kernel even where torch's is the faster one."""

    def make(_: int) -> Run:
        step = Step("dense", "x", conv.weight, conv.bias, Geometry((3, 3), padding=(1, 1, 1, 1)), 1, out="y")
        program = Program([step], ["x"], ["y"], native_only=True)
        return lambda: program(x)

    return make


def _packed(conv: nn.Conv2d, x: Tensor) -> Callable[[int], Run]:
    """oneDNN with its weights packed once, as torch's compiler uses it."""
    one = [1, 1]
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
        conv.weight.to_mkldnn(), one, one, one, 1, list(x.shape)
    )

    def make(_: int) -> Run:
        run = torch.ops.mkldnn._convolution_pointwise
        return lambda: run(x, weight, conv.bias, one, one, one, 1, "none", [], "")

    return make


_SAMPLED = {
    "rSB 2/4": CHESSBOARD,
    "rSB 1/4": QUARTER,
    "random 0.5": Random(0.5, 0),
    "random 0.25": Random(0.25, 0),
}


def blocks(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Iterator[Case]:
    """Residual blocks in inference: rSB against rRB, cSB against cRB, in float32 and bfloat16."""
    for channels, side, batch in shapes:
        torch.manual_seed(0)
        x, half = _map(batch, channels, side), _map(batch, channels, side, torch.bfloat16)
        dense = Dense(channels).eval()
        ours = {"rRB": (_fused(dense, x), 1.0)}
        for name, sampling in _SAMPLED.items():
            block = Regular(channels, sampling).eval()
            ours[name] = (_fused(block, x), _ratio(dense, block, x))
        low = Regular(channels, CHESSBOARD).eval().bfloat16()
        ours["rSB 2/4 bfloat16"] = (_fused(low, half), ours["rSB 2/4"][1])
        peers = {name: _peer(name, dense, x) for name in (*DENSE_PEERS, "OpenVINO bfloat16")}
        facts = partial(_peaks, {"rRB": dense, "rSB 2/4": Regular(channels, CHESSBOARD).eval()}, x)
        yield Case(f"rRB {channels} x {side}^2", batch, peers, ours, facts)
        if channels < 64 or batch == 64:
            continue
        wide = _map(batch, 4 * channels, side)
        bottleneck = _Bottleneck(channels, nn.Conv2d(channels, channels, 3, padding=1)).eval()
        spatial = _Bottleneck(channels, SpatialBottleneck2d(channels, channels)).eval()
        yield Case(
            f"cRB {4 * channels}-{channels} x {side}^2",
            batch,
            {name: _peer(name, bottleneck, wide) for name in DENSE_PEERS},
            {"cSB 2/4": (_fused(spatial, wide), _ratio(bottleneck, spatial, wide))},
        )


LOW_PEERS = (
    "torch eager bfloat16",
    "torch.compile bfloat16",
    "OpenVINO bfloat16",
    "OpenVINO bfloat16, NHWC bfloat16 maps",
)


def low_blocks(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Iterator[Case]:
    """Residual blocks in inference in bfloat16, maps in bfloat16 too; beside them float32 and int8."""
    for channels, side, batch in shapes:
        torch.manual_seed(0)
        x, half = _map(batch, channels, side), _map(batch, channels, side, torch.bfloat16)
        dense = Dense(channels).eval()
        ours = {"rRB": (_fused(copy.deepcopy(dense).bfloat16(), half), 1.0)}
        for name, sampling in _SAMPLED.items():
            block = Regular(channels, sampling).eval()
            ratio = _ratio(dense, block, x)
            ours[name] = (_fused(copy.deepcopy(block).bfloat16(), half), ratio)
            if name == "rSB 2/4":
                ours["rSB 2/4 in float32"] = (_fused(block, x), ratio)
        beside = ("torch eager", "OpenVINO", "OpenVINO int8")
        peers = {name: _peer(name, dense, x) for name in (*LOW_PEERS, *beside)}
        facts = partial(_peaks, {"rRB": dense, "rSB 2/4": Regular(channels, CHESSBOARD).eval()}, half)
        name = f"rRB {channels} x {side}^2"
        yield Case(name, batch, peers, ours, facts, baselines=LOW_PEERS, dtype=torch.bfloat16)


def low_networks() -> Iterator[Case]:
    """Whole networks in bfloat16 by ``qx.fuse(model, torch.bfloat16)``, images and answers in float32."""
    for first, second, side in (
        ("rrn20", "rsbn20", 32),
        ("rrn110", "rsbn110", 32),
        *((f"resnet{depth}", f"sb-resnet{depth}", 224) for depth in (18, 34, 50)),
    ):
        torch.manual_seed(0)
        dense, sampled = networks.build(first).eval(), networks.build(second).eval()
        for batch in (1, 8):
            x = _map(batch, 3, side)
            low = ("torch eager bfloat16", "OpenVINO bfloat16")
            # OpenVINO does not compile a quantised shortcut that is padded with channels
            beside = ("OpenVINO", "OpenVINO int8") if first.startswith("resnet") else ("OpenVINO",)
            peers = {
                "ours, dense bfloat16": _fused(dense, x, torch.bfloat16),
                **{name: _peer(name, dense, x) for name in (*low, *beside)},
            }
            ours = {second: (_fused(sampled, x, torch.bfloat16), _ratio(dense, sampled, x))}
            baselines = ("ours, dense bfloat16", *low)
            facts = partial(_peaks_of_networks, {first: dense, second: sampled}, x, torch.bfloat16)
            name = f"{second} / {first}"
            yield Case(name, batch, peers, ours, facts, baselines, torch.bfloat16)


INT8_PEERS = ("OpenVINO int8", "ONNX Runtime int8")


def _fused_int8(model: nn.Module, x: Tensor, keep_ends: bool) -> Callable[[int], Run]:
    """In eight bits whatever it costs: random weights have no answers to lose."""

    def make(_: int) -> Run:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(16, *x.shape[1:], generator=generator)
        settings: dict[str, Any] = {"observer": "minmax", "max_drop": 100, "keep_ends": keep_ends}
        quick = fuse(model, torch.int8, calibration=images, check=x[:1], force=True, **settings)

        def run() -> object:
            with torch.inference_mode():
                return quick(x)

        return run

    return make


def int8_blocks(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Iterator[Case]:
    """Residual blocks in inference in eight bits, float32 maps in front and behind; beside them bfloat16.

    Every convolution is in eight bits, as in the middle of a network. All candidates turn their maps from and
    to float32, which a network does at its ends alone.
    """
    for channels, side, batch in shapes:
        torch.manual_seed(0)
        x = _map(batch, channels, side)
        dense = Dense(channels).eval()
        ours = {"rRB": (_fused_int8(dense, x, False), 1.0)}
        for name, sampling in {"rSB 2/4": CHESSBOARD, "rSB 1/4": QUARTER}.items():
            block = Regular(channels, sampling).eval()
            ratio = _ratio(dense, block, x)
            ours[name] = (_fused_int8(block, x, False), ratio)
            if name == "rSB 2/4":
                ours["rSB 2/4 in bfloat16"] = (_fused(block, x, torch.bfloat16), ratio)
        engines = (*INT8_PEERS, "torch int8")
        peers = {name: _peer(name, dense, x) for name in (*engines, "OpenVINO bfloat16", "OpenVINO")}
        yield Case(f"rRB {channels} x {side}^2", batch, peers, ours, baselines=engines)


def int8_networks() -> Iterator[Case]:
    """Whole networks in eight bits by ``qx.fuse(model, torch.int8)``, images and answers in float32.

    Every convolution is in eight bits, the first and the last too, as the peers have it.
    """
    for first, second, side in (
        ("rrn20", "rsbn20", 32),
        *((f"resnet{depth}", f"sb-resnet{depth}", 224) for depth in (18, 50)),
    ):
        torch.manual_seed(0)
        dense, sampled = networks.build(first).eval(), networks.build(second).eval()
        for batch in (1, 8):
            x = _map(batch, 3, side)
            # OpenVINO does not compile a quantised shortcut that is padded with channels
            engines = INT8_PEERS if first.startswith("resnet") else INT8_PEERS[1:]
            peers = {
                "ours, dense int8": _fused_int8(dense, x, False),
                **{name: _peer(name, dense, x) for name in (*engines, "OpenVINO bfloat16")},
            }
            ratio = _ratio(dense, sampled, x)
            ours = {
                second: (_fused_int8(sampled, x, False), ratio),
                f"{second} in bfloat16": (_fused(sampled, x, torch.bfloat16), ratio),
            }
            baselines = ("ours, dense int8", *engines)
            yield Case(f"{second} / {first}", batch, peers, ours, baselines=baselines)


# dense network, spatial bottleneck network, side of the image, batch
TRAINED = (
    ("rrn20", "rsbn20", 32, 64),
    ("rrn110", "rsbn110", 32, 64),
    ("resnet18", "sb-resnet18", 64, 32),
    ("resnet18", "sb-resnet18", 128, 8),
)
FORMATS = (torch.float32, torch.bfloat16)
TRAINERS = ("torch eager", "torch.compile")


def training(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    pairs: Sequence[tuple[str, str, int, int]] = (),
    *,
    formats: Sequence[torch.dtype] = (torch.float32,),
    trainers: Sequence[str] = ("torch eager",),
) -> Iterator[Case]:
    """Forward and backward in training: pre-activation blocks with batch norm, then whole networks.

    In bfloat16 under autocast, with weights in float32, and the dense candidates too. A network's step has
    no optimizer, whose time is that of the parameters, as many on both sides.

    Args:
        shapes: channels, side and batch of the blocks.
        pairs: as ``TRAINED``; beside a resnet the same network accelerated by ESPACE at rate 1/2.
        formats: torch.float32, torch.bfloat16 or both, a case for each.
        trainers: of ``TRAINERS``, how the dense candidates run, and ours.
    """
    for dtype in formats:
        for channels, side, batch in shapes:
            # as the block before leaves it
            x = _map(batch, channels, side, dtype)
            models: dict[str, nn.Module] = {
                "rRB": RegularBlock(channels, channels, 1),
                "rSB 2/4": RegularSBBlock(channels, CHESSBOARD, "stride"),
            }
            # inside a network the input needs a gradient too
            yield _trained_case(f"rRB {channels} x {side}^2", models, x, dtype, trainers, inner=True)
    for dtype in formats:
        for first, second, side, batch in pairs:
            torch.manual_seed(0)
            x = _map(batch, 3, side)
            models = {name: networks.build(name) for name in (first, second)}
            if first.startswith("resnet"):
                # which positions a mask has is of no matter to the time, and random images have no impact
                espace = Espace(rank=0.5, rate=0.5, mask="uniform")
                models["ESPACE 1/2"] = accelerate(models[first], espace, example_input=x[:1]).model
            yield _trained_case(f"{second} / {first}, {side}^2", models, x, dtype, trainers, inner=False)


def _trained_case(
    name: str,
    models: dict[str, nn.Module],
    x: Tensor,
    dtype: torch.dtype,
    trainers: Sequence[str],
    *,
    inner: bool,
) -> Case:
    """The first of the models is dense; facts are the most memory of each one's step."""
    low = "" if dtype == torch.float32 else " bfloat16"
    (_, dense), *others = models.items()
    peers = {f"{how}{low}": _trained(dense, x, dtype, how, inner) for how in trainers}
    ours = {f"{n}{low}": (_trained(m, x, dtype, inner=inner), _ratio(dense, m, x)) for n, m in others}
    compiles = [how for how in trainers if how == "torch.compile"]
    compiled = {f"{n}{low}": _trained(m, x, dtype, how, inner, False) for n, m in others for how in compiles}

    def facts() -> dict[str, Any]:
        runs = {n: _trained(model, x, dtype, inner=inner)(1) for n, model in models.items()}
        return {"peak_memory": {n: peak_memory(run) for n, run in runs.items()}}

    return Case(f"{name}{low}", len(x), peers, ours, facts, tuple(peers), dtype, compiled)


def _trained(
    model: nn.Module,
    x: Tensor,
    dtype: torch.dtype = torch.float32,
    how: str = "torch eager",
    inner: bool = True,
    first: bool = True,
) -> Callable[[int], Run]:
    """A step; ``first``: the first of a case's, which forgets what was compiled for the case before."""

    def make(threads: int) -> Run:
        model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        call: Callable[[Tensor], Tensor] = model
        if how == "torch.compile":
            if first:
                torch.compiler.reset()
            call = torch.compile(model)
        source = x.detach().requires_grad_(inner)
        upstream: list[Tensor] = []

        def run() -> object:
            source.grad = None
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = call(source)
            if not upstream:
                upstream.append(torch.randn_like(out))
            out.backward(upstream[0])  # type: ignore[no-untyped-call]
            return source.grad if inner else next(model.parameters()).grad

        if how == "torch.compile":
            with quiet(), using_threads(threads):
                run()  # compiles both passes for this number of threads
        return run

    return make


# dense network, spatial bottleneck network, side of the image, batches
PAIRS = (
    *((f"rrn{d}", f"rsbn{d}", 32, (1, 8, 64)) for d in (20, 110)),
    ("crn29", "csbn29", 32, (1, 8, 64)),
    ("pyramidnet110-a84", "sb-pyramidnet110-a84", 32, (1, 8)),
    ("pyramidnet164-a84", "sb-pyramidnet164-a84", 32, (1, 8)),
    *((f"resnet{d}", f"sb-resnet{d}", 224, (1, 8)) for d in (18, 34, 50, 101)),
)


def whole(pairs: Sequence[tuple[str, str, int, Sequence[int]]] = PAIRS) -> Iterator[Case]:
    """Whole networks, both fused; beside them the dense one on other engines and on smaller images."""
    for first, second, side, batches in pairs:
        torch.manual_seed(0)
        dense, sampled = networks.build(first).eval(), networks.build(second).eval()
        small = _side_of_equal_cost(dense, sampled, side)
        for batch in batches:
            x, less = _map(batch, 3, side), _map(batch, 3, small)
            peers = {
                "ours, dense": _fused(dense, x),
                **{n: _peer(n, dense, x) for n in ("torch eager", "ONNX Runtime", "OpenVINO")},
            }
            whole_macs = cost(dense, x[:1]).macs
            ours = {
                second: (_fused(sampled, x), _ratio(dense, sampled, x)),
                # what anybody can have without any method
                f"{first} at {small}^2": (_fused(dense, less), whole_macs / cost(dense, less[:1]).macs),
            }
            facts = partial(_peaks_of_networks, {first: dense, second: sampled}, x, None)
            yield Case(f"{second} / {first}", batch, peers, ours, facts)


def _side_of_equal_cost(dense: nn.Module, sampled: nn.Module, side: int) -> int:
    """The image size at which the dense network's MACs are nearest to the other's at ``side``."""
    wanted, whole_macs = (cost(model, _map(1, 3, side)).macs for model in (sampled, dense))
    # strides round, so that MACs go up in steps: near the square root the best one is looked for
    about = round(side * math.sqrt(wanted / whole_macs))
    near = range(max(1, about - 4), min(side, about + 5))
    return min(near, key=lambda s: abs(cost(dense, _map(1, 3, s)).macs - wanted))


SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "ops": ops,
    "blocks": blocks,
    "training": partial(training, SHAPES, TRAINED, formats=FORMATS, trainers=TRAINERS),
    "networks": whole,
    "blocks-bfloat16": low_blocks,
    "networks-bfloat16": low_networks,
    "blocks-int8": int8_blocks,
    "networks-int8": int8_networks,
}


# ---------------------------------------------------------------- running


def run_suite(
    name: str,
    *,
    threads: Sequence[int] = (1, 2),
    rounds: int = 11,
    round_seconds: float = 0.04,
    only: str = "",
    keep: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Time a suite; JSON-ready.

    Args:
        name: a key of ``SUITES``.
        threads: intra-op threads, one set of rows for each.
        rounds, round_seconds: as in :func:`quincunx.measure.latency.measure`.
        only: leave out cases whose name does not contain this.
        keep: file of the rows that are done, so that an interrupted suite goes on; rows that another
            commit, version, machine or number of rounds made are timed anew. Removed at the end.
        progress: called with the case, how many are done and how many there are.

    Raises:
        ValueError: an unknown suite, or no case left.
        ModuleNotFoundError: the ``bench`` extra is not installed.
    """
    if name not in SUITES:
        raise ValueError(f"suite={name!r}: expected one of {', '.join(SUITES)}")
    cases = [case for case in SUITES[name]() if only in case.name]
    if not cases:
        raise ValueError(f"only={only!r}: no case of {name} has that in its name")
    # before the work: what is edited while it runs was not measured
    where_made = environment()
    made_by = {key: where_made[key] for key in _MADE_BY} | {"suite": name, "rounds": rounds}
    done = _kept(keep, made_by)
    rows: list[dict[str, Any]] = []
    for case in cases:
        for count in threads:
            where = f"{case.name}, batch {case.batch}, {count} thread{'s' * (count > 1)}"
            progress(where, len(rows), len(cases) * len(threads))
            row = done.get((case.name, case.batch, count)) or _run_case(case, count, rounds, round_seconds)
            rows.append(row)
            if keep is not None:
                done[case.name, case.batch, count] = row
                write_json(keep, {"made_by": made_by, "rows": list(done.values())})
    if keep is not None:
        keep.unlink(missing_ok=True)
    return {
        "schema": 1,
        "kind": "bench",
        "suite": name,
        "backend": str(backend()),
        "rows": rows,
        "summary": summary(rows),
        "environment": where_made,
    }


# what two parts of one result must share
_MADE_BY = ("commit", "quincunx", "torch", "python", "cpu", "capability", "cores")


def _kept(keep: Path | None, made_by: dict[str, Any]) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The rows of an interrupted suite, by case, batch and threads."""
    if keep is None or not keep.exists():
        return {}
    content = read_json(keep)
    # code that is in no commit may be other code each time
    if content.get("made_by") != made_by or str(made_by["commit"]).endswith("+"):
        return {}
    return {(row["case"], row["batch"], row["threads"]): row for row in content["rows"]}


def _run_case(case: Case, threads: int, rounds: int, round_seconds: float) -> dict[str, Any]:
    compiled = {name: f"{name}, torch.compile" for name in case.compiled}
    makers = {
        **case.dense,
        **{name: make for name, (make, _) in case.ours.items()},
        **{compiled[name]: make for name, make in case.compiled.items()},
    }
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, make in makers.items():
        try:
            runs[name] = make(threads)
        except RuntimeError as error:  # noqa: PERF203
            # another engine may not compile a network on some processor
            if name not in case.dense:
                raise
            refused[name] = one_line(error)
    runs[_REFERENCE] = _matrix_product(case.dtype)
    found = measure(
        runs, threads=threads, rounds=rounds, round_seconds=round_seconds, rest=REST if threads > 1 else 0.0
    )
    full = case.baselines or [name for name in case.dense if "bfloat16" not in name]
    full = [name for name in full if name in runs]
    if not full:
        raise RuntimeError(f"{case.name}: no engine runs the dense network: {refused}")
    best = min(full, key=lambda name: found[name].median)
    candidates: dict[str, dict[str, Any]] = {}
    for name, (_, mac_ratio) in case.ours.items():
        forms = [name, *([compiled[name]] if name in compiled else [])]
        faster = min(forms, key=lambda form: found[form].median)
        middle, low, high = found[faster].speedup_over(found[best])
        candidates[name] = {
            "mac_ratio": mac_ratio,
            "speedup": middle,
            "q1": low,
            "q3": high,
            "efficiency": middle / mac_ratio,
        }
        if name in compiled:
            candidates[name]["faster"] = faster
            candidates[name]["compiled_over_eager"] = found[compiled[name]].speedup_over(found[name])[0]
        for other in ("rSB 2/4", "OpenVINO bfloat16"):
            if "bfloat16" in name and other in found:
                candidates[name][f"speedup_over {other}"] = found[name].speedup_over(found[other])[0]
    return {
        "case": case.name,
        "batch": case.batch,
        "threads": threads,
        "best_dense": best,
        "candidates": candidates,
        "refused": refused,
        "timings": {name: timing.to_dict() for name, timing in found.items()},
        "slow_rounds": _slow_rounds(found[_REFERENCE].seconds),
        **case.facts(),
    }


# timed beside the candidates, and no candidate: where it is slow, the machine is
_REFERENCE = "reference"
_SLOW = 1.25


def _matrix_product(dtype: torch.dtype) -> Run:
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lambda: a @ a


def _slow_rounds(seconds: Sequence[float]) -> list[int]:
    """The rounds, from 0, in which the reference took a quarter longer than in half of them."""
    usual = median(seconds)
    return [number for number, taken in enumerate(seconds) if taken > _SLOW * usual]


def summary(rows: Sequence[dict[str, Any]], by: str = "threads") -> list[dict[str, Any]]:
    """For each kind of case, candidate and number of threads the geometric mean and the worst ratio.

    ``by`` names what rows are told apart by instead of threads.
    """
    groups: dict[tuple[str, str, Any], list[tuple[float, dict[str, Any], str]]] = {}
    for row in rows:
        kind = row["case"].split()[0] if row["case"][0].isalpha() else ""
        for name, entry in row["candidates"].items():
            for key in [k for k in entry if k.startswith("speedup")]:
                label = f"{name}{key.removeprefix('speedup')}"
                place = f"{row['case']}, batch {row['batch']}"
                groups.setdefault((kind, label, row[by]), []).append((entry[key], entry, place))
    found = []
    for (kind, label, count), entries in groups.items():
        ratios = [ratio for ratio, _, _ in entries]
        worst = min(entries, key=lambda entry: entry[0])
        macs = math.exp(sum(math.log(entry["mac_ratio"]) for _, entry, _ in entries) / len(entries))
        mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
        found.append(
            {
                "kind": kind,
                "candidate": label,
                by: count,
                "mac_ratio": macs,
                "mean": mean,
                "worst": worst[0],
                "worst_case": worst[2],
                "cases": len(ratios),
            }
        )
    return found


def _peaks(models: dict[str, nn.Module], x: Tensor) -> dict[str, Any]:
    """Of fused blocks in the format of their map."""
    own = {name: copy.deepcopy(model).to(x.dtype) for name, model in models.items()}
    return {"peak_memory": {name: peak_memory(_fused(model, x)(1)) for name, model in own.items()}}


def _peaks_of_networks(models: dict[str, nn.Module], x: Tensor, dtype: torch.dtype | None) -> dict[str, Any]:
    """Of networks in torch in a format, and fused in it."""
    eager = "torch eager" if dtype is None else "torch eager bfloat16"
    found = {name: peak_memory(_peer(eager, model, x)(1)) for name, model in models.items()}
    fused = {f"{name}, fused": peak_memory(_fused(m, x, dtype)(1)) for name, m in models.items()}
    return {"peak_memory": found | fused}


def peak_memory(run: Run) -> int:
    """The most bytes that torch's CPU allocator had given out during a call beyond those before it."""
    run()  # tables and packed weights are made once and stay
    # the profiler's library would report each of its own steps on standard error
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = run()
    del kept
    now = most = 0
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    for event in sorted(results.events(), key=lambda e: e.start_ns()) if results is not None else ():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
