"""A short test of an installation: is it right, is it fast, and what stands in its way."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx import networks
from quincunx.experiments.bench import Dense, Regular
from quincunx.fusion.fuse import fuse
from quincunx.measure.cost import cost
from quincunx.measure.environment import environment
from quincunx.measure.latency import measure
from quincunx.networks.trained import cached
from quincunx.ops import backend, native, sampled_conv2d, sampled_conv_transpose2d
from quincunx.ops.int8 import Grid, convolve
from quincunx.sampling import CHESSBOARD, QUARTER, Random, Sampling
from quincunx.writing import cache_folder

__all__ = ["Finding", "examine", "report_line"]

# of the largest value of a map: float32 sums in another order, and bfloat16 with 8 bits
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


# variables whose values change what computes, and say nothing of the person who set them
_VARIABLES = ("QUINCUNX_BACKEND", "QUINCUNX_ISA", "QUINCUNX_L2", "OMP_NUM_THREADS", "KMP_AFFINITY")
# how a finding about optional packages is named
_EXTRA = "extra "


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: "ok"; "note" for what costs speed or a feature; "wrong" for a wrong answer.
        said: what was found, in a sentence.
    """

    name: str
    state: Literal["ok", "note", "wrong"]
    said: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def examine() -> Iterator[Finding]:
    """Test this installation on this machine in about ten seconds: one finding after the other.

    Kernels, gradients and a fused network are compared with torch's own convolutions, and blocks at half of
    the positions are timed against dense ones.

    Example:
        >>> {"ok"} <= {finding.state for finding in examine()} <= {"ok", "note"}
        True
    """
    yield _serving()
    if torch.cuda.is_available():
        yield _gpu()
    for dtype in _TOLERANCE:
        yield _kernels(dtype)
    if backend().name == "native":
        yield _eight_bits()
    yield _gradients()
    for dtype in _TOLERANCE:
        yield _network(dtype)
    for dtype in _TOLERANCE:
        yield _speed(dtype)
    yield _threads()
    yield _cache()
    yield from _extras()


def report_line(findings: list[Finding]) -> str:
    """Return the line to send with a question or a report: versions, processor, and what was found."""
    here, serving = environment(), backend()
    commit = f" ({here['commit']})" if here["commit"] else ""
    parts = [
        f"quincunx {here['quincunx']}{commit}",
        f"torch {here['torch']}",
        f"Python {here['python']}",
        here["platform"],
        f"{here['cpu']}, {here['threads']} of {here['cores']} cores",
        f"{serving.name} {serving.isa or ''}".strip(),
        *([_gpu().said] if torch.cuda.is_available() else []),
        *(f"{name}={os.environ[name]:.40}" for name in _VARIABLES if name in os.environ),
    ]
    odd = [finding for finding in findings if finding.state != "ok"]
    missing = [f.name.removeprefix(_EXTRA) for f in odd if f.name.startswith(_EXTRA)]
    told = [f"{f.state}: {f.name} ({f.said})" for f in odd if not f.name.startswith(_EXTRA)]
    return " | ".join([*parts, *told, *([f"without {', '.join(missing)}"] if missing else [])])


def _serving() -> Finding:
    serving = backend()
    if serving.name == "native":
        tiles = f", tiles for {formats}" if (formats := native.tile_formats()) else ""
        return Finding("back end", "ok", f"{serving.name}, {serving.isa}{tiles}")
    return Finding("back end", "note", f"{serving.name}, which saves no time: {serving.reason}")


def _gpu() -> Finding:
    serving, card = backend("cuda"), torch.cuda.get_device_name()
    if serving.name == "triton":
        return Finding("GPU", "ok", f"{card}, {serving.name}")
    return Finding("GPU", "note", f"{card}, {serving.name}, which saves no time: {serving.reason}")


def _compared(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """The largest difference as a multiple of what rounding may make."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    away = (found.float() - wanted).abs().max() / wanted.abs().max()
    return float(away) / _TOLERANCE[dtype]


def _kernels(dtype: torch.dtype) -> Finding:
    name, worst = f"convolutions in {_name(dtype)}", 0.0
    generator = torch.Generator().manual_seed(0)
    samplings: tuple[Sampling, ...] = (CHESSBOARD, QUARTER, Random(0.3, 1))
    count = 0
    for sampling in samplings:
        for channels, outputs, groups, side in (
            (16, 24, 1, (13, 9)),
            (64, 64, 1, (14, 14)),
            (12, 18, 3, (7, 5)),
        ):
            x = torch.randn(2, channels, *side, generator=generator).to(dtype)
            weight = torch.randn(outputs, channels // groups, 3, 3, generator=generator).to(dtype) / 8
            whole = F.conv2d(x.float(), weight.float(), padding=1, groups=groups)
            mask = sampling.mask(*side)
            y = sampled_conv2d(x, weight, sampling=sampling, padding=1, groups=groups)
            worst = max(worst, _compared(y, whole[:, :, mask][..., None], dtype))
            # a transposed convolution is one over the map with zeros at the positions that were skipped
            back = torch.randn(outputs, channels // groups, 3, 3, generator=generator).to(dtype) / 8
            spread = torch.zeros(2, outputs, *side)
            spread[:, :, mask] = y.float()[..., 0]
            wanted = F.conv_transpose2d(spread, back.float(), padding=1, groups=groups)
            z = sampled_conv_transpose2d(y, back, sampling=sampling, size=side, padding=1, groups=groups)
            worst = max(worst, _compared(z, wanted, dtype))
            count += 2
    if worst > 1:
        return Finding(name, "wrong", f"{worst:.3g} times as far from torch's as rounding explains")
    return Finding(name, "ok", f"{count} equal torch's")


def _eight_bits() -> Finding:
    name, generator, differing, count = "convolutions in int8", torch.Generator().manual_seed(0), 0, 0
    for sampling in ("", CHESSBOARD.spec, QUARTER.spec):
        for channels, outputs, groups in ((16, 24, 1), (128, 64, 1), (36, 18, 3)):
            x = torch.randint(0, 256, (2, channels, 14, 13), generator=generator).byte()
            weight = torch.randint(-128, 128, (outputs, channels // groups, 3, 3), generator=generator).char()
            where: dict[str, Any] = {"sampling": sampling, "padding": (1, 1, 1, 1), "groups": groups}
            grid, multiplier = Grid(0.05, 7), torch.full((outputs,), 1e-3 / channels)
            found, wanted = (
                convolve("conv", x, grid, weight, multiplier, activation=1, out=grid, back_end=end, **where)
                for end in ("native", "reference")
            )
            differing += int((found != wanted).sum())
            count += 1
    if differing:
        return Finding(name, "wrong", f"{differing} numbers differ from the reference's")
    return Finding(name, "ok", f"{count} equal the reference to the bit")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gradients() -> Finding:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 10, 11, generator=generator, requires_grad=True)
    weight = torch.randn(24, 16, 3, 3, generator=generator, requires_grad=True)
    mask = CHESSBOARD.mask(10, 11)
    ours = sampled_conv2d(x, weight, sampling=CHESSBOARD, padding=1)
    theirs = F.conv2d(x, weight, padding=1)[:, :, mask][..., None]
    upstream = torch.randn(theirs.shape, generator=generator)
    pairs = zip(
        torch.autograd.grad(ours, (x, weight), upstream),
        torch.autograd.grad(theirs, (x, weight), upstream),
        strict=True,
    )
    worst = max(_compared(a, b, torch.float32) for a, b in pairs)
    if worst > 1:
        return Finding("gradients", "wrong", f"{worst:.3g} times as far from torch's as rounding explains")
    return Finding("gradients", "ok", "equal torch's")


def _network(dtype: torch.dtype) -> Finding:
    name = f"a fused network in {_name(dtype)}"
    torch.manual_seed(0)
    model, x = networks.build("rsbn20").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted, found = model(x), fuse(model, dtype, force=True)(x)
    # twenty layers: their roundings add up
    worst = _compared(found, wanted, dtype) / 5
    if worst > 1:
        return Finding(
            name, "wrong", f"{worst:.3g} times as far from the network's answer as rounding explains"
        )
    return Finding(name, "ok", "answers as the network does")


def _speed(dtype: torch.dtype) -> Finding:
    name, channels = f"speed in {_name(dtype)}", 64
    torch.manual_seed(0)
    x = torch.randn(1, channels, 28, 28).to(dtype, memory_format=torch.channels_last)
    blocks: dict[str, nn.Module] = {"dense": Dense(channels), "half": Regular(channels, CHESSBOARD)}
    macs = [cost(block, x.float()).macs for block in blocks.values()]
    own = {key: block.to(dtype).eval() for key, block in blocks.items()}
    own["dense"].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    quick = fuse(own["half"], check=x)
    with torch.inference_mode():
        times = measure(
            {"dense": lambda: own["dense"](x), "half": lambda: quick(x)}, rounds=9, round_seconds=0.03
        )
    ratio = times["half"].speedup_over(times["dense"])[0]
    said = (
        f"a residual block of {channels} channels at half of its positions is {ratio:.2f} times as fast as "
        f"torch's dense one, and has 1/{macs[0] / macs[1]:.2f} of its multiplications"
    )
    return Finding(name, "ok" if ratio > 1 else "note", said)


def _threads() -> Finding:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    runtimes = _openmp()
    if len(runtimes) > 1:
        said = f"{' and '.join(runtimes)} are loaded in one process, and take the cores from each other"
        return Finding("threads", "note", said)
    if threads > cores:
        return Finding("threads", "note", f"{threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}")
    return Finding("threads", "ok", f"{threads} of {cores} cores")


def _openmp() -> list[str]:
    """The OpenMP runtimes of this process, where the system tells."""
    with suppress(OSError):
        found = re.findall(r"lib(?:gomp|iomp5|omp)\b[^/\s]*\.so\S*", Path("/proc/self/maps").read_text())
        return sorted({re.split(r"[-.]", name)[0] for name in found})
    return []


def _cache() -> Finding:
    folder = cache_folder()
    if folder is None:
        return Finding("cache", "note", "QUINCUNX_CACHE is set to nothing: each process measures anew")
    place = folder
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Finding("cache", "note", f"{folder} cannot be written: each process measures anew")
    measured = len([*folder.glob("decisions/*.json"), *folder.glob("tiles-*.json")])
    kept = f"{measured} file{'s' * (measured != 1)} of measurements"
    fetched = f", trained results: {', '.join(there)}" if (there := cached()) else ""
    return Finding("cache", "ok", f"{folder}: {kept}{fetched}")


def _extras() -> Iterator[Finding]:
    """The optional packages, as the installed package's own metadata lists them."""
    needed: dict[str, list[str]] = {}
    try:
        listed = requires("quincunx") or []
    except PackageNotFoundError:
        return  # a checkout that is not installed
    for line in listed:
        match = re.match(r"([\w.-]+)[^;]*;.*extra == ['\"]([\w-]+)['\"]", line)
        if match and match[2] != "dev":
            needed.setdefault(match[2], []).append(match[1])
    for extra, packages in needed.items():
        missing = [package for package in packages if not _installed(package)]
        commands = [f"pip install 'quincunx[{extra}]'"] if missing else []
        if extra == "onnx" and not _installed("onnx2torch"):
            # in no extra, since pip would install another torch for it
            missing.append("onnx2torch")
            commands.append("pip install --no-deps onnx2torch")
        if missing:
            said = f"{', '.join(missing)} not installed: {' and '.join(commands)}"
            yield Finding(f"{_EXTRA}{extra}", "note", said)
        else:
            yield Finding(f"{_EXTRA}{extra}", "ok", "installed")


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
