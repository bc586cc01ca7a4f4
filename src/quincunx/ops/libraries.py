"""The libraries without torch that come with the package, and programs that they run.

``libquincunx`` has the C interface of ``csrc/capi/quincunx.h``, ``libquincunx_ort`` ONNX Runtime's operator.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["LoadedProgram", "library_path"]

# what an exported graph calls a program
DOMAIN, OPERATOR, OPSET = "quincunx", "Program", 1
_ABI = 1
_FLOAT32, _NCHW = 0, 0


def library_path(name: str) -> str:
    """Return the path of a library that comes with the package.

    Args:
        name: "quincunx" or "quincunx_ort".

    Raises:
        FileNotFoundError: it was not built.

    Example:
        >>> Path(library_path("quincunx")).name
        'libquincunx.so'
    """
    path = Path(__file__).resolve().parent / "lib" / f"lib{name}.so"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there; it is built when quincunx is installed on a machine with a C++ compiler"
        )
    return str(path)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("channels", "height", "width", "rank")]


class _Map(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
    ]


@lru_cache(maxsize=1)
def _library() -> Any:
    library = ctypes.CDLL(library_path("quincunx"))
    pointer, number = ctypes.c_void_p, ctypes.c_size_t
    library.qx_error.restype = ctypes.c_char_p
    library.qx_load.argtypes = [pointer, number, ctypes.POINTER(pointer)]
    library.qx_free.argtypes = [pointer]
    for name in ("qx_inputs", "qx_outputs"):
        getattr(library, name).argtypes, getattr(library, name).restype = [pointer], number
    for name in ("qx_input_shape", "qx_output_shape"):
        getattr(library, name).argtypes = [pointer, number, ctypes.POINTER(_Shape)]
    library.qx_memory.argtypes, library.qx_memory.restype = [pointer], ctypes.c_int64
    maps: list[Any] = [ctypes.POINTER(_Map), number]
    library.qx_run.argtypes = [pointer, pointer, ctypes.c_int64, *maps, *maps]
    library.qx_threads.argtypes = [ctypes.c_int64, ctypes.POINTER(pointer)]
    if library.qx_abi_version() != _ABI:
        raise RuntimeError(f"libquincunx has interface {library.qx_abi_version()}, this package needs {_ABI}")
    return library


def _check(code: int) -> None:
    if code:
        raise ValueError(_library().qx_error().decode())


@lru_cache(maxsize=8)
def _threads(count: int) -> ctypes.c_void_p:
    """Threads of libquincunx, which live as long as the process."""
    host = ctypes.c_void_p()
    _check(_library().qx_threads(count, ctypes.byref(host)))
    return host


class LoadedProgram:
    """A program's bytes, ready to run on arrays without torch. Several threads may run one at the same time.

    Args:
        data: from :func:`quincunx.fusion.serialise.program_bytes`; not needed afterwards.

    Attributes:
        input_shapes, output_shapes: of one image, (C, H, W); (C,) where the result is [N, C].

    Raises:
        ValueError: the bytes are no program, or damaged; the sentence says what is wrong.

    Example:
        >>> from quincunx.fusion.serialise import program_bytes
        >>> fused = qx.fuse(qx.networks.build("rrn8").eval())
        >>> program = LoadedProgram(program_bytes(fused.program0, (1, 3, 32, 32)))
        >>> (y,) = program.run([np.zeros((2, 3, 32, 32), np.float32)])
        >>> y.shape
        (2, 64, 8, 8)
    """

    def __init__(self, data: bytes | np.ndarray) -> None:
        held = (
            np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data, np.uint8)
        )
        self._program = ctypes.c_void_p()
        _check(_library().qx_load(held.ctypes.data, held.nbytes, ctypes.byref(self._program)))
        self.input_shapes = self._shapes(_library().qx_inputs, _library().qx_input_shape)
        self.output_shapes = self._shapes(_library().qx_outputs, _library().qx_output_shape)

    def __del__(self) -> None:
        if getattr(self, "_program", None):
            _library().qx_free(self._program)

    def _shapes(self, count: Any, shape_of: Any) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        for number in range(count(self._program)):
            shape = _Shape()
            _check(shape_of(self._program, number, ctypes.byref(shape)))
            whole = (shape.channels, shape.height, shape.width)
            found.append(whole if shape.rank == 4 else whole[:1])
        return found

    @property
    def memory(self) -> int:
        """Bytes held: tables and packed weights."""
        return int(_library().qx_memory(self._program))

    def run(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray] | None = None, threads: int = 1
    ) -> list[np.ndarray]:
        """Return the results for a batch.

        Args:
            inputs: float32 [N, C, H, W] each.
            outputs: contiguous float32 arrays for the results; None for new ones.
            threads: how many work, the caller's included.

        Raises:
            ValueError: arrays of another size or type than the program's.
        """
        arrays = [np.ascontiguousarray(x) for x in inputs]
        batch = arrays[0].shape[0] if arrays and arrays[0].ndim else 0
        for number, x in enumerate(arrays):
            if x.dtype != np.float32:
                raise ValueError(f"input {number}: expected float32, got {x.dtype}")
            wanted = (batch, *self.input_shapes[number]) if number < len(self.input_shapes) else x.shape
            if x.shape != wanted:
                raise ValueError(f"input {number}: expected {list(wanted)}, got {list(x.shape)}")
        if outputs is None:
            outputs = [np.empty((batch, *shape), np.float32) for shape in self.output_shapes]
        for number, y in enumerate(outputs):
            if y.dtype != np.float32 or not y.flags.c_contiguous:
                raise ValueError(f"output {number}: expected contiguous float32, got {y.dtype}")
        host = _threads(threads) if threads > 1 else None
        _check(
            _library().qx_run(
                self._program, host, batch, _maps(arrays), len(arrays), _maps(outputs), len(outputs)
            )
        )
        return list(outputs)


def _maps(arrays: Sequence[np.ndarray]) -> Any:
    return (_Map * len(arrays))(*(_Map(x.ctypes.data, x.nbytes, _FLOAT32, _NCHW) for x in arrays))
