"""Which back end serves the CPU, and the registration of all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from quincunx.ops import contract, lookup, native, reference

__all__ = ["Backend", "backend", "register"]

_HOW = (
    "install a C++ compiler and install quincunx again (pip install --no-build-isolation -e . in its folder)"
)


@dataclass(frozen=True)
class Backend:
    """What serves the CPU.

    Attributes:
        name: "native" or "reference".
        reason: why that one.
        isa: the instruction set of the native kernels, None for the reference.
    """

    name: str
    reason: str
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.name}{f' ({self.isa})' if self.isa else ''}: {self.reason}"


@lru_cache(maxsize=1)
def backend() -> Backend:
    """Which back end computes on the CPU here, and why.

    The environment variable ``QUINCUNX_BACKEND`` forces "reference" or "native"; it is read once.
    Unforced, the native kernels serve float32 and bfloat16 where they were built, and the reference
    serves every other dtype, such as float64.

    Raises:
        ValueError: ``QUINCUNX_BACKEND`` or ``QUINCUNX_ISA`` names something else.
        RuntimeError: the forced back end is not there.

    Example:
        >>> backend().name in ("native", "reference")
        True
    """
    wanted = os.environ.get("QUINCUNX_BACKEND", "") or "auto"
    if wanted not in ("auto", "native", "reference"):
        raise ValueError(f"QUINCUNX_BACKEND={wanted!r}: expected 'native', 'reference' or 'auto'")
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


@lru_cache(maxsize=1)
def _warn_once() -> None:
    warnings.warn(
        f"quincunx computes with the slow reference: {backend().reason}", RuntimeWarning, stacklevel=5
    )


def _on_cpu(name: str) -> Callable[..., Tensor]:
    fast, slow = getattr(native, name), getattr(reference, name)
    unavailable = native.binary_unavailable if name == "binary_conv" else native.unavailable

    def run(first: Tensor, second: Any, *rest: Any) -> Tensor:
        serving = backend()
        if serving.name == "native":
            refusal = unavailable(first, second)
            if refusal is None:
                result: Tensor = fast(first, second, *rest)
                return result
            if os.environ.get("QUINCUNX_BACKEND") == "native":
                raise TypeError(f"QUINCUNX_BACKEND=native: {refusal}")
        elif os.environ.get("QUINCUNX_BACKEND") != "reference":
            _warn_once()
        result = slow(first, second, *rest)
        return result

    return run


def register() -> None:
    """The reference for every device; on the CPU whichever back end serves."""
    for name in (*contract.OPERATORS, *lookup.OPERATORS):
        contract.implement(name, getattr(reference, name), "CompositeExplicitAutograd")
        if hasattr(native, name):
            contract.implement(name, _on_cpu(name), "CPU")
