"""Published methods, each a frozen dataclass of settings that builds a layer's replacement."""

from quincunx.methods.binaryconnect import BinaryConnect
from quincunx.methods.cp import CP
from quincunx.methods.espace import Espace
from quincunx.methods.lowrank import LowRank
from quincunx.methods.perforate import Perforate
from quincunx.methods.qcnn import QCNN
from quincunx.methods.spatialblock import SpatialBlock
from quincunx.methods.spatialbottleneck import SpatialBottleneck

__all__ = [
    "CP",
    "QCNN",
    "BinaryConnect",
    "Espace",
    "LowRank",
    "Perforate",
    "SpatialBlock",
    "SpatialBottleneck",
]
