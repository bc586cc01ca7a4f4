"""The backward pass computes no gradient that nobody asked for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import quincunx as qx
from quincunx.layers.sampled import SampledConv2d, SampledConvTranspose2d


class Called(TorchDispatchMode):
    """Names of our operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "quincunx":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("needed", "also"), [(False, []), (True, ["adjoint"])])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_first_layers_input_gradient_is_left_out(needed, also, transposed):
    if transposed:
        layer = SampledConvTranspose2d(3, 4, 3, sampling=qx.CHESSBOARD, padding=1)
        x, adjoint = torch.randn(2, 3, 18, 1, requires_grad=needed), "conv"
        out = layer(x, (6, 6))
    else:
        layer = SampledConv2d(3, 4, 3, sampling=qx.CHESSBOARD, padding=1)
        x, adjoint = torch.randn(2, 3, 6, 6, requires_grad=needed), "conv_transpose"
        out = layer(x)
    with Called() as called:
        out.sum().backward()
    assert sorted(called.names) == sorted([*(adjoint for _ in also), "conv_weight"])
    assert (x.grad is not None) is needed
