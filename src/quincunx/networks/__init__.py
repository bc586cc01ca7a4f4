"""Networks by name."""

from quincunx.networks.registry import build, names

__all__ = ["build", "names"]
