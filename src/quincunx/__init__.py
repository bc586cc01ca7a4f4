"""quincunx: faster convolutional networks by computing convolutions at only some positions."""

import os
import sys
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

# printing only the version needs nothing that takes seconds to import, such as torch
if sys.argv[1:] != ["--version"] or os.path.basename(sys.argv[0]) not in ("quincunx", "__main__.py", "-m"):
    from quincunx import networks
    from quincunx.acceleration.accelerate import accelerate
    from quincunx.deployment.export import Exported, export
    from quincunx.deployment.onnx_in import from_onnx
    from quincunx.fusion.calibrate import calibrate
    from quincunx.fusion.fuse import fuse
    from quincunx.layers.binary import BinaryConv2d, BinaryLinear
    from quincunx.layers.quantised import CodebookConv2d, CodebookLinear, QuantConv2d, QuantLinear
    from quincunx.layers.sampled import (
        PerforatedConv2d,
        SampledConv2d,
        SampledConvTranspose2d,
        SpatialBottleneck2d,
    )
    from quincunx.layers.separable import CPConv2d, EspaceConv2d, SeparableConv2d
    from quincunx.measure import tasks
    from quincunx.measure.cost import Cost, cost
    from quincunx.measure.tasks.task import Task
    from quincunx.methods import (
        CP,
        QCNN,
        BinaryConnect,
        Espace,
        LowRank,
        Perforate,
        SpatialBlock,
        SpatialBottleneck,
    )
    from quincunx.networks.artifact import load, save
    from quincunx.ops import (
        backend,
        fill_fitted,
        fill_nearest,
        onnxruntime,
        openvino,
        sampled_conv2d,
        sampled_conv_transpose2d,
    )
    from quincunx.sampling import (
        CHESSBOARD,
        QUARTER,
        THREE_QUARTERS,
        Cosets,
        EvenGrid,
        Positions,
        Random,
        Sampling,
        Uniform,
    )
    from quincunx.surgery.method import Accelerated, Method, Replacement

    # these two modules have public names of their own: ``import quincunx.onnxruntime`` finds them too
    sys.modules.update({f"quincunx.{made.__name__.split('.')[-1]}": made for made in (onnxruntime, openvino)})

try:
    __version__ = _version("quincunx")
except _PackageNotFoundError:  # a checkout that is on the path and not installed
    __version__ = "0+unknown"

__all__ = [
    "CHESSBOARD",
    "CP",
    "QCNN",
    "QUARTER",
    "THREE_QUARTERS",
    "Accelerated",
    "BinaryConnect",
    "BinaryConv2d",
    "BinaryLinear",
    "CPConv2d",
    "CodebookConv2d",
    "CodebookLinear",
    "Cosets",
    "Cost",
    "Espace",
    "EspaceConv2d",
    "EvenGrid",
    "Exported",
    "LowRank",
    "Method",
    "Perforate",
    "PerforatedConv2d",
    "Positions",
    "QuantConv2d",
    "QuantLinear",
    "Random",
    "Replacement",
    "SampledConv2d",
    "SampledConvTranspose2d",
    "Sampling",
    "SeparableConv2d",
    "SpatialBlock",
    "SpatialBottleneck",
    "SpatialBottleneck2d",
    "Task",
    "Uniform",
    "accelerate",
    "backend",
    "calibrate",
    "cost",
    "export",
    "fill_fitted",
    "fill_nearest",
    "from_onnx",
    "fuse",
    "load",
    "networks",
    "onnxruntime",
    "openvino",
    "sampled_conv2d",
    "sampled_conv_transpose2d",
    "save",
    "tasks",
]
