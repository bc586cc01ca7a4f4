"""ONNX Runtime with our kernels: they are an operator of the domain "quincunx" in exported files.

Example:
    >>> qx.onnxruntime.quincunx_library().endswith("libquincunx_ort.so")
    True

With ``options = onnxruntime.SessionOptions()``, ``qx.onnxruntime.register(options)`` before the session is
made lets it read such files. Hosts in C, C++, C# and Java pass the path of :func:`quincunx_library` to their
own function, such as ``RegisterCustomOpsLibrary_V2``. The library works with every release of ONNX Runtime
from 1.17 on, in the threads of the session, and needs neither Python nor PyTorch.
"""

from __future__ import annotations

from typing import Any

from quincunx.ops.libraries import library_path

__all__ = ["quincunx_library", "register"]


def quincunx_library() -> str:
    """Return the path of the library with the operator, for hosts in any language.

    Raises:
        FileNotFoundError: it was not built.

    Example:
        >>> import os
        >>> os.path.basename(quincunx_library())
        'libquincunx_ort.so'
    """
    return library_path("quincunx_ort")


def register(session_options: Any) -> None:
    """Let sessions with these options read files that were exported with our kernels.

    Args:
        session_options: an ``onnxruntime.SessionOptions``.

    Raises:
        TypeError: something else.
        FileNotFoundError: the library was not built.

    Example:
        >>> register("options")
        Traceback (most recent call last):
        ...
        TypeError: session_options='options': expected an onnxruntime.SessionOptions
    """
    add = getattr(session_options, "register_custom_ops_library", None)
    if add is None:
        raise TypeError(f"session_options={session_options!r}: expected an onnxruntime.SessionOptions")
    add(quincunx_library())
