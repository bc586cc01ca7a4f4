"""The CUDA back end: gather GEMMs in Triton, which is only imported at the first call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["DTYPES", "OPERATORS", "load", "operator", "unavailable"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = ("conv", "conv_transpose", "conv_weight", "conv_filled", "fill", "collect")
# Ampere: the first architecture with bfloat16, tf32 and asynchronous copies
_LEAST = (8, 0)


@lru_cache(maxsize=1)
def load() -> str | None:
    """Import the kernels. Return None if that works, else why not."""
    try:
        import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error})"
    try:
        _operators()
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        return f"this Triton cannot read the kernels ({str(error).splitlines()[0]})"
    return None


def _operators() -> ModuleType:
    return import_module("quincunx.ops.triton.operators")


def operator(name: str) -> Callable[..., Tensor]:
    """Return the kernels' function for one of ``OPERATORS``."""
    found: Callable[..., Tensor] = getattr(_operators(), name)
    return found


@lru_cache(maxsize=16)
def card(index: int) -> str | None:
    """Return why a card cannot run the kernels; None if it can."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST:
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None


def unavailable(*values: object) -> str | None:
    """Return why the kernels do not support the tensors among these arguments; None if they do."""
    for value in values:
        if isinstance(value, Tensor) and value.dtype not in DTYPES:
            return f"the Triton back end computes in float32, bfloat16 and float16, not {value.dtype}"
    return None
