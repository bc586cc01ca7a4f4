"""Replaces layers of a network; knows no method. What a method is written with is here by name."""

from quincunx.surgery.calibration import Calibration, Context, Layer
from quincunx.surgery.method import Method, Replacement, Work, each

__all__ = ["Calibration", "Context", "Layer", "Method", "Replacement", "Work", "each"]
