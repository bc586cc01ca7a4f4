"""Fused networks in torch, in ONNX Runtime and in OpenVINO with our kernels, and dense ones in these engines.

Every candidate of a network is timed in turn in one process. The file has, for each network, batch and number
of threads: seconds with quartiles, the plug-ins' time over that of ``qx.fuse`` in torch (target 1.05), the
speed-up over the dense network in the same engine beside the MAC ratio (target 0.9 of it), the difference of
the answers, and for the last network the time to load it and the memory that it holds over its weights.

    OMP_NUM_THREADS=1 python benchmarks/plugins.py --out results/plugins.json      # about 8 minutes
"""

from __future__ import annotations

import argparse
import io
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quincunx as qx
from quincunx.fusion.serialise import NativePiece, pieces
from quincunx.measure.engines import PEERS, REST, quiet
from quincunx.measure.environment import environment
from quincunx.measure.latency import Timing, measure, using_threads
from quincunx.ops import backend
from quincunx.ops.libraries import DOMAIN, OPERATOR, LoadedProgram
from quincunx.writing import write_json


class Block(nn.Module):
    """Two convolutions with a shortcut, dense or as a spatial bottleneck."""

    def __init__(self, channels: int, bottleneck: bool) -> None:
        super().__init__()
        kinds = (qx.SampledConv2d, qx.SampledConvTranspose2d)
        sampled = [kind(channels, channels, 3, sampling=qx.CHESSBOARD, padding=1) for kind in kinds]
        dense = [nn.Conv2d(channels, channels, 3, padding=1) for _ in kinds]
        self.first, self.second = sampled if bottleneck else dense
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return torch.relu(x + (self.second(y, x.shape[2:]) if self.bottleneck else self.second(y)))


def block(channels: int) -> tuple[nn.Module, nn.Module]:
    return Block(channels, False), Block(channels, True)


# name: (dense, with sampled convolutions), shape of an image
NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], tuple[int, int, int]]] = {
    "block of 16 at 8 x 8": (lambda: block(16), (16, 8, 8)),
    "block of 64 at 56 x 56": (lambda: block(64), (64, 56, 56)),
    "block of 128 at 28 x 28": (lambda: block(128), (128, 28, 28)),
    "block of 256 at 14 x 14": (lambda: block(256), (256, 14, 14)),
    **{
        bottleneck: (lambda names=(dense, bottleneck): tuple(map(qx.networks.build, names)), (3, side, side))
        for dense, bottleneck, side in (
            ("rrn20", "rsbn20", 32),
            ("rrn110", "rsbn110", 32),
            ("resnet18", "sb-resnet18", 224),
            ("resnet34", "sb-resnet34", 224),
        )
    },
}


class Exported(nn.Module):
    """A program as one node of a graph."""

    def __init__(self, piece: NativePiece) -> None:
        super().__init__()
        self.shapes = piece.output_shapes
        self.register_buffer("data", torch.frombuffer(bytearray(piece.data), dtype=torch.uint8))

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        kinds, sizes = [torch.float32] * len(self.shapes), [(maps[0].shape[0], *s) for s in self.shapes]
        found = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{OPERATOR}", (self.data, *maps), dtypes=kinds, shapes=sizes, version=1
        )
        return tuple(found)


def exported(model: nn.Module, x: Tensor) -> bytes:
    """The fused network as ONNX, its programs as one node each."""
    fused, seen = qx.fuse(model), {}
    hooks = [
        program.register_forward_hook(lambda m, a, _: seen.update({m: [t.shape for t in a]}))
        for program in fused.modules()
        if hasattr(program, "settle")
    ]
    with torch.no_grad():
        fused(x)
    for hook in hooks:
        hook.remove()
    for name, program in list(fused.named_children()):
        if program in seen:
            [piece] = pieces(program, *seen[program])
            setattr(fused, name, Exported(piece))
    with quiet(), torch.no_grad():
        written = torch.onnx.export(fused, (x,), dynamo=True, verbose=False)
    if written is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return bytes(written.model_proto.SerializeToString())


def by_onnxruntime(data: bytes, x: Tensor, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    qx.onnxruntime.register(options)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


def by_openvino(data: bytes, x: Tensor, threads: int) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    qx.openvino.register(core, threads)
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    request = core.compile_model(core.read_model(io.BytesIO(data)), "CPU", settings).create_infer_request()
    return lambda: request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)[0]


def case(name: str, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    """One network at one batch and number of threads."""
    make, image = NETWORKS[name]
    torch.manual_seed(0)
    dense, ours = (model.eval() for model in make())
    x = torch.randn(batch, *image)
    rows: dict[str, Callable[[], Any]] = {}
    with using_threads(threads), warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        data = exported(ours, x)
        fused, fused_dense = qx.fuse(ours), qx.fuse(dense)
        rows["qx.fuse"] = lambda: fused(x)
        rows["qx.fuse, dense"] = lambda: fused_dense(x)
        rows["onnxruntime"] = by_onnxruntime(data, x, threads)
        rows["onnxruntime, dense"] = PEERS["ONNX Runtime"](dense, x, threads)
        rows["openvino"] = by_openvino(data, x, threads)
        rows["openvino, dense"] = PEERS["OpenVINO"](dense, x, threads)
        wanted = fused(x).numpy()
        scale = float(np.abs(wanted).max())
        differences = {
            key: float(np.abs(np.asarray(rows[key]()) - wanted).max()) / scale
            for key in ("onnxruntime", "openvino")
        }
        rest = REST if threads > 1 else 0.0
        timed = measure(rows, threads=threads, rounds=rounds, round_seconds=0.03, rest=rest)
    ratio = qx.cost(dense, x).macs / qx.cost(ours, x).macs
    result: dict[str, Any] = {"name": name, "batch": batch, "threads": threads, "mac_ratio": ratio}
    result["seconds"] = {key: _spread(timing) for key, timing in timed.items()}
    result["difference"] = differences
    print(f"{name}, batch {batch}, {threads} threads: MAC ratio {ratio:.2f}", flush=True)
    for engine in ("onnxruntime", "openvino"):
        over, low, high = timed["qx.fuse"].speedup_over(timed[engine])
        gain, gain_low, gain_high = timed[engine].speedup_over(timed[f"{engine}, dense"])
        result[engine] = {"time_over_fuse": [over, low, high], "speedup": [gain, gain_low, gain_high]}
        milliseconds = 1e3 * timed[engine].median
        print(f"  {engine}: {milliseconds:.3f} ms, {over:.2f} of qx.fuse, {gain:.2f}x of dense", flush=True)
    return result


def _spread(timing: Timing) -> list[float]:
    return [timing.median, *timing.quartiles]


def loading(name: str) -> dict[str, Any]:
    """The time to read and pack the largest program of a network, and what it holds."""
    make, image = NETWORKS[name]
    fused = qx.fuse(make()[1].eval())
    found: list[bytes] = []
    for program in (m for m in fused.modules() if hasattr(m, "settle")):
        program.register_forward_hook(
            lambda m, a, _: found.extend(p.data for p in pieces(m, *(t.shape for t in a)))  # type: ignore[union-attr]
        )
    with torch.no_grad():
        fused(torch.randn(1, *image))
    data = max(found, key=len)
    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        loaded = LoadedProgram(data)
        seconds.append(time.perf_counter() - begin)
    row = {
        "name": name,
        "bytes": len(data),
        "seconds": sorted(seconds)[4],
        "memory": loaded.memory / len(data),
    }
    print(f"{name}: {len(data) / 1e6:.0f} MB in {row['seconds']:.3f} s, {row['memory']:.2f} times in memory")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK"
    )
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    cases = [
        case(name, batch, threads, arguments.rounds)
        for name in arguments.only
        for batch in arguments.batch
        for threads in arguments.threads
    ]
    loads = [loading(name) for name in arguments.only[-1:]]
    if arguments.out:
        written = {"schema": 1, "kind": "bench-plugins", "backend": str(backend()), "cases": cases}
        write_json(arguments.out, {**written, "loading": loads, "environment": environment()})


if __name__ == "__main__":
    main()
