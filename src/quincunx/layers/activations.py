"""The elementwise activations, as modules and as functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["ACTIVATIONS", "ACTIVATION_FUNCTIONS"]

# elementwise: they apply to a sampled map as to any other
ACTIVATIONS = (
    nn.ReLU,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardsigmoid,
)


ACTIVATION_FUNCTIONS = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardtanh, F.hardswish, F.hardsigmoid),
    *(F.softplus, F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh),
}
