"""OpenVINO with our kernels: reads .onnx and .xml files that hold programs, and runs these on its CPU device.

With ``core = openvino.Core()``, ``qx.openvino.register(core)`` before ``core.read_model(path)``. It is an
operation written in Python over the C interface of libquincunx, so that OpenVINO's release does not matter;
``csrc/openvino`` has the same as a library in C++, to be built for one release.

Example:
    >>> qx.openvino.register("core")
    Traceback (most recent call last):
    ...
    TypeError: core='core': expected an openvino.Core
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from quincunx.ops.libraries import DOMAIN, OPERATOR, LoadedProgram

__all__ = ["register"]


def register(core: Any, threads: int | None = None) -> None:
    """Let a core read models with programs, from ONNX files and from OpenVINO's own.

    A program computes in what it was made in, whatever precision the device was asked for. Maps arrive in
    float32, or where the device computes in float16, rounded to that. A second request at the same time runs
    its programs in its own thread alone.

    Args:
        core: an ``openvino.Core``.
        threads: that work on a program; None for ``INFERENCE_NUM_THREADS`` of the CPU device, or if that is
            not set, the processors that this process may use.

    Raises:
        TypeError: ``core`` is something else.
        ValueError: ``threads`` below 1.
        FileNotFoundError: libquincunx was not built.

    Example:
        >>> register(None)
        Traceback (most recent call last):
        ...
        TypeError: core=None: expected an openvino.Core
    """
    if not hasattr(core, "add_extension"):
        raise TypeError(f"core={core!r}: expected an openvino.Core")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads={threads!r}: expected an integer of at least 1")
    from openvino.frontend.onnx import ConversionExtension

    count = threads or int(core.get_property("CPU", "INFERENCE_NUM_THREADS")) or _processors()
    operation = _operation(count)

    def convert(node: Any) -> Any:
        inputs = [node.get_input(number) for number in range(node.get_input_size())]
        return operation(inputs).outputs()

    core.add_extension(operation)
    core.add_extension(ConversionExtension(OPERATOR, DOMAIN, convert))


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@lru_cache(maxsize=8)
def _operation(threads: int) -> Any:
    """The operation as a class of OpenVINO's; importing OpenVINO takes long."""
    from openvino import Dimension, Op, PartialShape, Type

    class QuincunxProgram(Op):  # type: ignore[misc]
        """Input 0 is the program as a constant, the others are maps.

        The type in .xml files has this name, as in ``csrc/openvino/extension.cpp``.
        """

        def __init__(self, inputs: Sequence[Any] | None = None, program: LoadedProgram | None = None) -> None:
            super().__init__(self)
            self.program: Any = program
            if inputs is not None:
                self.set_arguments(inputs)
                self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self) -> None:
            if self.program is None:
                node = self.input_value(0).get_node()
                if node.get_type_name() != "Constant":
                    raise ValueError("quincunx: the program, input 0, must be a constant of the model")
                self.program = LoadedProgram(np.asarray(node.data))
            shapes = self.program.input_shapes
            if self.get_input_size() != len(shapes) + 1:
                raise ValueError(
                    f"quincunx: the program has {len(shapes)} maps, the node {self.get_input_size() - 1}"
                )
            batch = Dimension.dynamic()
            for number, shape in enumerate(shapes):
                given = self.get_input_partial_shape(number + 1)
                wanted = PartialShape([Dimension.dynamic(), *shape])
                if not given.compatible(wanted):
                    raise ValueError(f"quincunx: map {number} must be {wanted}, got {given}")
                if given.rank.is_static and given[0].is_static:
                    batch = given[0]
                kind = self.get_input_element_type(number + 1)
                if kind not in (Type.f32, Type.f16, Type.dynamic):
                    raise ValueError(f"quincunx: map {number} must be float32 or float16, got {kind}")
            # a device that computes in float16 converts the maps of the whole model
            kind = Type.f16 if self.get_input_element_type(1) == Type.f16 else Type.f32
            self.set_output_size(len(self.program.output_shapes))
            for number, shape in enumerate(self.program.output_shapes):
                self.set_output_type(number, kind, PartialShape([batch, *shape]))

        def clone_with_new_inputs(self, new_inputs: Sequence[Any]) -> QuincunxProgram:
            return QuincunxProgram(new_inputs, self.program)

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            maps = [tensor.data.astype(np.float32, copy=False) for tensor in inputs[1:]]
            for tensor, shape in zip(outputs, self.program.output_shapes, strict=True):
                tensor.shape = [maps[0].shape[0], *shape]
            arrays = [tensor.data for tensor in outputs]
            results = [y if y.dtype == np.float32 else np.empty(y.shape, np.float32) for y in arrays]
            self.program.run(maps, results, threads)
            for y, result in zip(arrays, results, strict=True):
                if y is not result:
                    y[...] = result
            return True

        def visit_attributes(self, visitor: Any) -> bool:
            return True

    return QuincunxProgram
