"""Replace layers of a network with a method; also exports the names that a method is written with."""

from quincunx.surgery.calibration import Calibration, Context, Layer
from quincunx.surgery.method import Method, Replacement, Work, each

__all__ = ["Calibration", "Context", "Layer", "Method", "Replacement", "Work", "each"]
