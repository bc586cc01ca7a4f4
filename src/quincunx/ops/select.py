"""Choose the back end for a device, and register all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quincunx.ops import contract, lookup, native, norm, reference, triton

__all__ = ["Backend", "backend", "register", "serving"]

_HOW = (
    "install a C++ compiler and install quincunx again (pip install --no-build-isolation -e . in its folder)"
)


_NAMES = ("native", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """The back end of a device.

    Attributes:
        name: "native" (CPU), "triton" (NVIDIA GPUs) or "reference" (every device).
        reason: why it was chosen.
        isa: the instruction set of the native kernels, or the GPU's architecture; None for the reference.
    """

    name: str
    reason: str
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.isa})' if self.isa else ''}: {self.reason}"


def backend(device: str | torch.device = "cpu") -> Backend:
    """Return the back end that computes on a device here, and why.

    The environment variable ``QUINCUNX_BACKEND`` forces "reference" everywhere, "native" on the CPU or
    "triton" on GPUs. Otherwise the native kernels handle float32 and bfloat16 on the CPU if they were
    built, Triton's handle float32, bfloat16 and float16 on NVIDIA GPUs from compute capability 8.0 on, and
    the reference handles every other dtype and device.

    Args:
        device: such as "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: ``QUINCUNX_BACKEND`` or ``QUINCUNX_ISA`` has an unknown value.
        RuntimeError: the forced back end is not available.

    Example:
        >>> backend().name in ("native", "reference")
        True
    """
    where = torch.device(device)
    if where.type == "cpu":
        return _of_cpu(_wanted())
    if where.type == "cuda":
        if not torch.cuda.is_available():
            return Backend("reference", "torch finds no GPU that it can use here")
        return _of_cuda(_wanted(), torch.cuda.current_device() if where.index is None else where.index)
    return Backend("reference", f"no kernels for {where.type}")


def serving(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the back end that computes in this dtype on this device."""
    name = backend(device).name
    served = {"native": native.DTYPES, "triton": triton.DTYPES}
    return name if dtype in served.get(name, ()) else "reference"


def _wanted() -> str:
    wanted = os.environ.get("QUINCUNX_BACKEND", "") or "auto"
    if wanted not in (*_NAMES, "auto"):
        raise ValueError(f"QUINCUNX_BACKEND={wanted!r}: expected 'native', 'triton', 'reference' or 'auto'")
    return wanted


@lru_cache(maxsize=8)
def _of_cpu(wanted: str) -> Backend:
    if wanted == "reference":
        return Backend("reference", "QUINCUNX_BACKEND=reference")
    missing = native.load()
    if missing is None:
        forced = wanted == "native"
        reason = (
            "QUINCUNX_BACKEND=native" if forced else "the extension is built; other dtypes by the reference"
        )
        return Backend("native", reason, native.isa())
    if wanted == "native":
        raise RuntimeError(f"QUINCUNX_BACKEND=native: the extension cannot be used ({missing}); {_HOW}")
    if os.environ.get("QUINCUNX_ISA"):
        raise ValueError(f"QUINCUNX_ISA={os.environ['QUINCUNX_ISA']!r}: {missing}")
    return Backend("reference", f"the native extension cannot be used ({missing}); {_HOW}")


@lru_cache(maxsize=32)
def _of_cuda(wanted: str, index: int) -> Backend:
    if wanted == "reference":
        return Backend("reference", "QUINCUNX_BACKEND=reference")
    missing = triton.card(index) or triton.load()
    if missing is None:
        major, minor = torch.cuda.get_device_capability(index)
        forced = wanted == "triton"
        reason = "QUINCUNX_BACKEND=triton" if forced else "Triton's kernels; other dtypes by the reference"
        return Backend("triton", reason, f"sm_{major}{minor}")
    if wanted == "triton":
        raise RuntimeError(f"QUINCUNX_BACKEND=triton: {missing}")
    return Backend("reference", missing)


@lru_cache(maxsize=8)
def _warn_once(device: str) -> None:
    warnings.warn(
        f"quincunx computes with the slow reference on {device}: {backend(device).reason}",
        RuntimeWarning,
        stacklevel=5,
    )


def _on(device: str, name: str) -> Callable[..., Tensor]:
    """Return an operator for a kind of device: its kernels, or the reference unless kernels are forced."""
    kernels = "native" if device == "cpu" else "triton"
    slow = getattr(reference, name)
    if device == "cpu":
        unavailable = native.binary_unavailable if name == "binary_conv" else native.unavailable
    else:
        unavailable = triton.unavailable

    def run(first: Tensor, second: Any, *rest: Any) -> Tensor:
        serves = backend(first.device)
        if serves.name == kernels:
            refusal = unavailable(first, second)
            if refusal is None:
                fast = getattr(native, name) if device == "cpu" else triton.operator(name)
                result: Tensor = fast(first, second, *rest)
                return result
            if os.environ.get("QUINCUNX_BACKEND") == kernels:
                raise TypeError(f"QUINCUNX_BACKEND={kernels}: {refusal}")
        elif os.environ.get("QUINCUNX_BACKEND") != "reference":
            _warn_once(device)
        result = slow(first, second, *rest)
        return result

    return run


def register() -> None:
    """Register the reference for every device, and on the CPU and on GPUs the choice of back end."""
    for name in (*contract.OPERATORS, *lookup.OPERATORS, *norm.OPERATORS):
        contract.implement(name, getattr(reference, name), "CompositeExplicitAutograd")
        if hasattr(native, name):
            contract.implement(name, _on("cpu", name), "CPU")
        if name in triton.OPERATORS:
            contract.implement(name, _on("cuda", name), "CUDA")
