"""Benchmarks on an NVIDIA GPU: our kernels against cuDNN and compilers, as CUDA graphs, with the roofline.

Each candidate's call is captured as one CUDA graph; candidates take turns; between calls the second-level
cache is filled with other data. Each candidate's output is compared with the formula in float32 before
timing; one that fails is left out and named.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx import networks
from quincunx.experiments.bench import Dense, Regular, summary
from quincunx.experiments.engines_cuda import (
    Strided,
    can_capture,
    compiled_strided,
    dense_peers,
    ours,
    strided,
    uncaptured,
)
from quincunx.fusion.program import Program
from quincunx.fusion.steps import Step
from quincunx.layers.sampled import SampledConv2d
from quincunx.measure.cost import cost
from quincunx.measure.latency import Timing
from quincunx.measure.latency_cuda import (
    Ceilings,
    Flush,
    ceilings,
    environment_cuda,
    measure_cuda,
    peak_memory_cuda,
    tf32,
)
from quincunx.networks.preresnet import RegularBlock, RegularSBBlock
from quincunx.ops.cuda_graphs import Run, captured, on_stream
from quincunx.ops.geometry import Geometry
from quincunx.ops.plan import forward_plan, position_index
from quincunx.sampling import CHESSBOARD, QUARTER, Random, Sampling

__all__ = ["DTYPES", "SUITES", "Case", "Implementation", "run_suite_cuda"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# channels and side of the map
SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCHES = (64, 256, 1)
DENSITIES = (0.2, 0.25, 0.35, 0.5, 0.75)
PAIRS = {"rSB 2/4": CHESSBOARD, "rSB 1/4": QUARTER}
# images whose outputs are compared
_COMPARED = 8

# parts of (operations, bytes) that run one after the other
Work = list[tuple[float, float]]


@dataclass
class Implementation:
    """One way to compute a case.

    Attributes:
        make: returns a function whose calls launch the work.
        dense: whether it is a dense candidate; the fastest of these is the baseline.
        mac_ratio: MACs of the dense network over its own.
        work: the minimum that it has to compute and to move; empty if unknown.
        fused: whether it is a network by ``qx.fuse``, which records its own graphs.
        wants: from images [n, C, H, W] in float32 to the expected output; None to skip the comparison.
        over: other candidates over which its speed-up is reported, besides the baseline.
    """

    make: Callable[[], Run]
    dense: bool = False
    mac_ratio: float = 1.0
    work: Work = field(default_factory=list)
    fused: bool = False
    wants: Callable[[Tensor], Tensor] | None = None
    over: tuple[str, ...] = ()


@dataclass
class Case:
    """Candidates that are timed together; nothing is on the card until ``candidates`` is called.

    Attributes:
        candidates: returns (the input, the candidates by name).
        graph: whether calls are captured; otherwise they are launched one by one.
    """

    name: str
    batch: int
    dtype: str
    candidates: Callable[[], tuple[Tensor, dict[str, Implementation]]]
    graph: bool = True


def _map(batch: int, channels: int, side: int, dtype: str, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, channels, side, side, generator=generator, device=device)
    return x.to(DTYPES[dtype], memory_format=torch.channels_last)


def _bytes(dtype: str) -> int:
    return DTYPES[dtype].itemsize


# ---------------------------------------------------------------- blocks


class Ended(nn.Module):
    """A block with a ReLU after the addition, as in ResNets, so that cuDNN can fuse all of it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(x))


def _formula(model: Regular, sampling: Sampling, x: Tensor) -> Tensor:
    """Compute a sampled block with torch's dense operators."""
    down, up = (copy.deepcopy(half).to(x.device, torch.float32) for half in (model.down, model.up))
    mask = sampling.mask(*x.shape[2:]).to(x.device)
    inner = F.relu(F.conv2d(x, down.weight, down.bias, padding=1)) * mask
    return F.relu(F.conv_transpose2d(inner, up.weight, up.bias, padding=1) + x)


def _plainly(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = copy.deepcopy(model).eval().to(x.device, torch.float32)(x)
    return found


def _block_work(channels: int, side: int, batch: int, dtype: str, sampling: Sampling | None) -> Work:
    """Return the work of the two halves; the second also reads the shortcut."""
    whole = float(side * side)
    some = float(sampling.count(side, side)) if sampling is not None else whole
    row, weight = batch * channels * _bytes(dtype), 9.0 * channels * channels
    flops = 2 * weight * batch * some
    return [
        (flops, (whole + some) * row + weight * _bytes(dtype)),
        (flops, (some + 2 * whole) * row + weight * _bytes(dtype)),
    ]


def blocks(dtypes: Sequence[str], *, compilers: bool, device: str = "cuda") -> Iterator[Case]:
    """Yield residual blocks in inference: rSB against rRB, each with its last ReLU."""
    for dtype, batch, channels, side in _in_order(dtypes):
        yield Case(
            f"rRB {channels} x {side}^2",
            batch,
            dtype,
            partial(_block, channels, side, batch, dtype, compilers, device),
        )


def _in_order(dtypes: Sequence[str]) -> Iterator[tuple[str, int, int, int]]:
    """Yield the first type at all batches, then the others at the first: a budget may end it anywhere."""
    for number, dtype in enumerate(dtypes):
        for batch in BATCHES if number == 0 else BATCHES[:1]:
            for channels, side in SHAPES:
                yield dtype, batch, channels, side


def _block(
    channels: int, side: int, batch: int, dtype: str, compilers: bool, device: str
) -> tuple[Tensor, dict[str, Implementation]]:
    torch.manual_seed(0)
    x = _map(batch, channels, side, dtype, device)
    dense = Ended(Dense(channels)).eval()
    work = partial(_block_work, channels, side, batch, dtype)
    wants = partial(_plainly, dense)
    found = {
        name: Implementation(partial(make, dense, x), dense=True, work=work(None), wants=wants)
        for name, make in dense_peers(compilers=compilers).items()
    }
    found["rRB"] = Implementation(partial(ours, dense, x), work=work(None), fused=True, wants=wants)
    for name, sampling in PAIRS.items():
        block = Regular(channels, sampling).eval()
        ratio = side * side / sampling.count(side, side)
        shared: dict[str, Any] = {
            "mac_ratio": ratio,
            "work": work(sampling),
            "wants": partial(_formula, block, sampling),
        }
        over = ["rRB"]
        if sampling == QUARTER:
            plain = Strided(block.down, block.up).eval()
            found["cuDNN, stride 2"] = Implementation(partial(strided, plain, x), **shared)
            over.append("cuDNN, stride 2")
            if compilers:
                found["torch.compile, stride 2"] = Implementation(
                    partial(compiled_strided, plain, x), **shared
                )
                over.append("torch.compile, stride 2")
        found[name] = Implementation(partial(ours, Ended(block), x), fused=True, over=tuple(over), **shared)
    return x, found


# ---------------------------------------------------------------- operators


def ops(dtypes: Sequence[str], *, compilers: bool, device: str = "cuda") -> Iterator[Case]:
    """Yield 3 x 3 convolutions with bias and ReLU: our dense kernel, and random masks, against cuDNN."""
    for dtype, batch, channels, side in _in_order(dtypes):
        yield Case(
            f"{channels} x {side}^2",
            batch,
            dtype,
            partial(_operator, channels, side, batch, dtype, compilers, device),
        )


def _operator(
    channels: int, side: int, batch: int, dtype: str, compilers: bool, device: str
) -> tuple[Tensor, dict[str, Implementation]]:
    torch.manual_seed(0)
    x = _map(batch, channels, side, dtype, device)
    dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()).eval()
    work = partial(_operator_work, channels, side, batch, dtype)
    wants = partial(_plainly, dense)
    found = {
        name: Implementation(partial(make, dense, x), dense=True, work=work(None), wants=wants)
        for name, make in dense_peers(compilers=compilers).items()
    }
    found["dense"] = Implementation(partial(_own_dense, dense, x), work=work(None), fused=True, wants=wants)
    for density in DENSITIES:
        sampling = Random(density, 0)
        conv = SampledConv2d(channels, channels, 3, sampling=sampling, padding=1)
        conv.load_state_dict(dense[0].state_dict())
        found[f"random {density}"] = Implementation(
            partial(ours, nn.Sequential(conv, nn.ReLU()), x),
            mac_ratio=side * side / sampling.count(side, side),
            work=work(sampling),
            fused=True,
            wants=partial(_at_positions, dense, sampling),
            over=("dense",),
        )
    return x, found


def _at_positions(dense: nn.Module, sampling: Sampling, x: Tensor) -> Tensor:
    out = _plainly(dense, x)
    index = position_index(sampling.spec, *out.shape[2:]).to(x.device)
    return out.flatten(2)[:, :, index].unsqueeze(3)


def _operator_work(channels: int, side: int, batch: int, dtype: str, sampling: Sampling | None) -> Work:
    read = wrote = side * side
    if sampling is not None:
        index = forward_plan(sampling.spec, Geometry((3, 3), padding=(1, 1, 1, 1)), side, side).index
        # rows that no computed position reads are not counted
        read, wrote = int(torch.unique(index[index >= 0]).numel()), sampling.count(side, side)
    weight = 9.0 * channels * channels
    moved = (read + wrote) * batch * channels * _bytes(dtype) + weight * _bytes(dtype)
    return [(2 * weight * batch * wrote, moved)]


def _own_dense(model: nn.Sequential, x: Tensor) -> Run:
    """Run our kernel even where cuDNN's is faster."""
    conv = copy.deepcopy(model[0]).to(x.device, x.dtype).requires_grad_(False)
    where = Geometry((3, 3), padding=(1, 1, 1, 1))
    weight, bias = conv.weight, conv.bias.float()  # as fuse makes them
    step = Step("dense", "x", weight, bias, where, 1, activation=1, out="y")  # type: ignore[arg-type]
    program = Program([step], ["x"], ["y"], native_only=True)

    def run() -> object:
        with torch.inference_mode(), uncaptured():
            return program(x)[0]

    return run


# ---------------------------------------------------------------- training


def training(dtypes: Sequence[str], *, compilers: bool, device: str = "cuda") -> Iterator[Case]:
    """Yield forward and backward of pre-activation blocks with batch norm, and whole steps of networks."""
    dtype = dtypes[0]
    for channels, side in SHAPES:
        yield Case(
            f"rRB {channels} x {side}^2",
            64,
            dtype,
            partial(_trained_block, channels, side, 64, dtype, device),
        )
    for first, second, side, batch in (("resnet18", "sb-resnet18", 224, 64), ("rrn20", "rsbn20", 32, 1024)):
        for graph in (True, False):
            name = f"{second} / {first}" + ("" if graph else ", launched one by one")
            yield Case(
                name,
                batch,
                dtype,
                partial(_trained_network, first, second, side, batch, dtype, device),
                graph,
            )


def _trained_block(
    channels: int, side: int, batch: int, dtype: str, device: str
) -> tuple[Tensor, dict[str, Implementation]]:
    torch.manual_seed(0)
    x = _map(batch, channels, side, dtype, device)
    dense = RegularBlock(channels, channels, 1)
    flops = 3 * 2 * 2 * 9.0 * channels * channels * batch
    found = {
        "torch": Implementation(partial(_step, dense, x, False), dense=True, work=[(flops * side**2, 0.0)])
    }
    for name, sampling in PAIRS.items():
        count = sampling.count(side, side)
        found[name] = Implementation(
            partial(_step, RegularSBBlock(channels, sampling, "stride"), x, False),
            mac_ratio=side * side / count,
            work=[(flops * count, 0.0)],
        )
    return x, found


def _trained_network(
    first: str, second: str, side: int, batch: int, dtype: str, device: str
) -> tuple[Tensor, dict[str, Implementation]]:
    torch.manual_seed(0)
    x = _map(batch, 3, side, dtype, device)
    models = {name: networks.build(name, _CLASSES) for name in (first, second)}
    macs = {name: cost(model, torch.zeros(1, 3, side, side)).macs for name, model in models.items()}
    found = {}
    for name, model in models.items():
        found["torch" if name == first else name] = Implementation(
            partial(_step, model, x, True),
            dense=name == first,
            mac_ratio=macs[first] / macs[name],
            work=[(3 * 2.0 * macs[name] * batch, 0.0)],
        )
    return x, found


def _step(model: nn.Module, x: Tensor, whole: bool) -> Run:
    """Return forward and backward, for a whole network with the update; all in the input's type."""
    own: nn.Module = copy.deepcopy(model).train()
    own = own.to(device=x.device, dtype=x.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # inside a network the input needs a gradient too
    source = x.detach().requires_grad_(not whole)
    weights: list[Tensor] = list(own.parameters())
    speeds = [torch.zeros_like(weight) for weight in weights] if whole else []
    generator = torch.Generator(x.device).manual_seed(1)
    shape = (x.shape[0], _CLASSES) if whole else x.shape
    upstream = (torch.randn(shape, generator=generator, device=x.device) / x.shape[0]).to(x.dtype)
    if upstream.dim() == 4:
        upstream = upstream.contiguous(memory_format=torch.channels_last)

    def run() -> object:
        for tensor in (source, *weights):
            tensor.grad = None
        out = own(source)
        out.backward(upstream)
        if whole:
            # momentum in three calls, as in torch's optimiser
            with torch.no_grad():
                torch._foreach_mul_(speeds, 0.9)
                torch._foreach_add_(speeds, [t.grad for t in weights if t.grad is not None])
                torch._foreach_add_(weights, speeds, alpha=-1e-3)
        return out.detach() if whole else source.grad

    return run


_CLASSES = 10


# ---------------------------------------------------------------- networks


# dense network, spatial bottleneck network, side of the image, batches
NETWORKS = (
    ("resnet34", "sb-resnet34", 224, (64, 1)),
    ("resnet50", "sb-resnet50", 224, (64, 1)),
    ("resnet18", "sb-resnet18", 224, (64, 1)),
    ("rrn20", "rsbn20", 32, (64, 1)),
)


def whole(dtypes: Sequence[str], *, compilers: bool, device: str = "cuda") -> Iterator[Case]:
    """Yield whole networks in inference; the baseline is the fastest dense one, including ours."""
    for dtype in dtypes[:1]:
        for at in range(max(len(batches) for *_, batches in NETWORKS)):
            for first, second, side, batches in NETWORKS:
                if at < len(batches):
                    make = partial(_network, first, second, side, batches[at], dtype, compilers, device)
                    yield Case(f"{second} / {first}", batches[at], dtype, make)


def _network(
    first: str, second: str, side: int, batch: int, dtype: str, compilers: bool, device: str
) -> tuple[Tensor, dict[str, Implementation]]:
    torch.manual_seed(0)
    x = _map(batch, 3, side, dtype, device)
    dense, sampled = networks.build(first).eval(), networks.build(second).eval()
    macs = [cost(model, torch.zeros(1, 3, side, side)).macs for model in (dense, sampled)]
    work = [_network_work(model, side, batch, dtype) for model in (dense, sampled)]
    found = {
        name: Implementation(partial(make, dense, x), dense=True, work=work[0], wants=partial(_on_cpu, dense))
        for name, make in dense_peers(compilers=compilers).items()
    }
    found["ours, dense"] = Implementation(
        partial(ours, dense, x), dense=True, work=work[0], fused=True, wants=partial(_on_cpu, dense)
    )
    found[second] = Implementation(
        partial(ours, sampled, x),
        mac_ratio=macs[0] / macs[1],
        work=work[1],
        fused=True,
        wants=partial(_on_cpu, sampled),
        over=("ours, dense",),
    )
    return x, found


def _on_cpu(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the output on the CPU, whose operators share nothing with the card's."""
    found: Tensor = model(x.cpu())
    return found.to(x.device)


def _network_work(model: nn.Module, side: int, batch: int, dtype: str) -> Work:
    """Return each layer's products, reads and writes; without shortcuts, so it is a lower bound."""
    sizes: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():

        def remember(_: nn.Module, arguments: Any, out: Any, name: str = name) -> None:
            sizes[name] = arguments[0].numel() + out.numel()

        if not list(module.children()):
            handles.append(module.register_forward_hook(remember))
    rows = cost(model, torch.zeros(1, 3, side, side)).rows
    for handle in handles:
        handle.remove()
    item = _bytes(dtype)
    return [
        (2.0 * row.macs * batch, float((sizes.get(row.name, 0) * batch + row.params) * item))
        for row in rows
        if row.macs
    ]


Suite = Callable[..., Iterator[Case]]
SUITES: dict[str, Suite] = {"ops": ops, "blocks": blocks, "training": training, "networks": whole}


# ---------------------------------------------------------------- running


def run_suite_cuda(
    name: str,
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    compilers: bool = True,
    rounds: int = 11,
    round_seconds: float = 0.02,
    only: str = "",
    budget: float | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Time a suite on the current CUDA device; JSON-ready.

    Args:
        name: a key of ``SUITES``.
        dtypes: keys of ``DTYPES``; the first one in all cases, the others at the first batch.
        compilers: whether torch.compile, and TensorRT if it is installed, are among the peers.
        rounds: how often each candidate is timed.
        round_seconds: approximate duration of a round of one candidate, including flushes.
        only: skip cases whose name does not contain this.
        budget: seconds; a case that would not end in time is left out and named.
        keep: gets the result so far after each case.
        progress: called with the case, how many are done and how many there are.

    Raises:
        ValueError: an unknown suite or type, or no case left.
    """
    begin = perf_counter()
    if name not in SUITES:
        raise ValueError(f"suite={name!r}: expected one of {', '.join(SUITES)}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    cases = [case for case in SUITES[name](dtypes, compilers=compilers) if only in case.name]
    if not cases:
        raise ValueError(f"only={only!r}: no case of {name} has that in its name")
    where_made = environment_cuda()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []

    def result() -> dict[str, Any]:
        return {
            "schema": 1,
            "kind": "bench",
            "suite": name,
            "backend": "cuda",
            "how": _HOW[name],
            "ceilings": most.to_dict(),
            "rows": rows,
            "left_out": left_out,
            "summary": summary(rows, "dtype"),
            "seconds": perf_counter() - begin,
            "environment": where_made,
        }

    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        # all on the captures' stream: a fused network makes its decisions and records for one stream
        with tf32(True), on_stream():
            most, flush = ceilings(), Flush()
            longest = 0.0
            for number, case in enumerate(cases):
                started = perf_counter()
                where = f"{case.name}, batch {case.batch}, {case.dtype}"
                # compilation makes later cases shorter, so the longest case so far is a safe estimate
                if budget is not None and started - begin + 0.7 * longest > budget:
                    left_out.append(where)
                    continue
                progress(where, number, len(cases))
                rows.append(_run_case(case, most, flush, rounds, round_seconds))
                longest = max(longest, perf_counter() - started)
                keep(result())
    finally:
        torch.backends.cudnn.benchmark = benchmark
    return result()


_EACH = "each call a CUDA graph, the second-level cache filled with other data between calls, events, medians"
_HOW = {
    "ops": f"3 x 3 convolution, bias and ReLU, channels_last; {_EACH}",
    "blocks": f"two 3 x 3 convolutions, shortcut, ReLU behind each, channels_last; {_EACH}",
    "training": "forward and backward, of networks the update too; weights and maps in the type named; "
    f"roofline of the products alone; {_EACH}, unless launched one by one",
    "networks": f"inference, batch norm folded, channels_last; {_EACH}",
}


def _run_case(
    case: Case, most: Ceilings, flush: Callable[[], None], rounds: int, round_seconds: float
) -> dict[str, Any]:
    x, candidates = case.candidates()
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    began = perf_counter()
    for name, candidate in candidates.items():
        prepared = _prepared(case, candidate, x)
        if isinstance(prepared, str):
            failed[name] = prepared
        else:
            runs[name], facts[name] = prepared
    preparation = perf_counter() - began
    clocks: list[int] = []
    found: dict[str, Timing] = {}
    if runs:
        found = measure_cuda(runs, rounds=rounds, round_seconds=round_seconds, flush=flush, clocks=clocks)
    row: dict[str, Any] = {
        "case": case.name,
        "batch": case.batch,
        "dtype": case.dtype,
        "best_dense": None,
        "candidates": {},
        "timings": {name: timing.to_dict() for name, timing in found.items()},
        "peak_memory": {name: known["peak_memory"] for name, known in facts.items()},
        "errors": {name: known["error"] for name, known in facts.items() if known["error"] is not None},
        "launch": {name: known["launch"] for name, known in facts.items()},
        "roofline": {},
        "failed": failed,
        "sm_clock_mhz": clocks,
        "preparation_s": preparation,
    }
    for name, timing in found.items():
        if candidates[name].work:
            least = most.floor(candidates[name].work, case.dtype)
            row["roofline"][name] = {"seconds": least, "share": least / timing.median}
    row.update(_ratios(candidates, found, row["roofline"]))
    del runs, candidates, x, prepared, candidate
    # graphs hold memory; free it so that it does not limit the next case
    gc.collect()
    torch.cuda.empty_cache()
    return row


def _ratios(
    candidates: Mapping[str, Implementation], found: Mapping[str, Timing], roofline: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fastest dense candidate, and every other one's speed-up over it."""
    dense = [name for name in found if candidates[name].dense]
    if not dense:
        return {}
    best = min(dense, key=lambda name: found[name].median)
    told = {}
    for name, candidate in candidates.items():
        if name not in found or candidate.dense:
            continue
        middle, low, high = found[name].speedup_over(found[best])
        told[name] = {
            "mac_ratio": candidate.mac_ratio,
            "speedup": middle,
            "q1": low,
            "q3": high,
            "efficiency": middle / candidate.mac_ratio,
        }
        if name in roofline and best in roofline:
            told[name]["roofline_share"] = roofline[name]["share"]
            # the gain of a perfect kernel over a perfect dense one
            told[name]["roofline_ratio"] = roofline[best]["seconds"] / roofline[name]["seconds"]
        for other in candidate.over:
            if other in found:
                told[name][f"speedup_over {other}"] = found[name].speedup_over(found[other])[0]
    return {"best_dense": best, "candidates": told}


def _prepared(case: Case, candidate: Implementation, x: Tensor) -> tuple[Run, dict[str, Any]] | str:
    """Return a candidate ready for timing, after checking its output; or the reason why not."""
    graph = case.graph and (can_capture() or not candidate.fused)
    own = case.graph and candidate.fused and not graph
    try:
        run, most = peak_memory_cuda(candidate.make)
        error = None if candidate.wants is None else _error(run, candidate.wants, x)
        ready = captured(run) if graph else run
    except Exception as failure:  # noqa: BLE001 - the row reports whatever a peer or a kernel raises
        return _error_words(failure)
    launch = "graph" if graph else "a graph of its own" if own else "one by one"
    return ready, {"peak_memory": most, "error": error, "launch": launch}


def _error(run: Run, wants: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return ||output - formula|| / ||formula|| over some images, including the first and last.

    Raises:
        ArithmeticError: an output that is not a number, or far off.
    """
    some = torch.linspace(0, x.shape[0] - 1, min(_COMPARED, x.shape[0]), device=x.device).round().long()
    answer = run()
    if not isinstance(answer, Tensor):
        raise TypeError(f"answered {type(answer).__name__}")
    with torch.no_grad(), tf32(False):
        got, want = answer[some].double(), wants(x[some].float()).double()
        error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    if not error < _MOST_ERROR:
        raise ArithmeticError(f"its answer is off by {error:.2g} of the formula's norm")
    return error


# random networks of 50 layers in bfloat16 come near a tenth of it
_MOST_ERROR = 0.2


def _error_words(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
