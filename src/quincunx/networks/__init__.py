"""Build networks by name, load published weights for them (``networks.weights.load``), and fetch trained
results (``networks.trained.fetch``).

Example:
    >>> from quincunx import networks
    >>> networks.names()[0]
    'rrn20'
    >>> networks.build("rsbn20", num_classes=100, sampling="1/4").classifier.out_features
    100
"""

from quincunx.networks import trained, weights
from quincunx.networks.registry import build, names

__all__ = ["build", "names", "trained", "weights"]
