"""Positions of a strided shortcut: torch's slices, with one gradient in channels_last."""

import pytest
import torch
from torch import fx

from quincunx.layers.subsample import subsample


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (1, 4, 7, 5), (3, 1, 1, 2)])
def test_it_is_a_slice_with_a_gradient_in_channels_last(shape, stride):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    y, wanted = subsample(x, stride), x[:, :, ::stride, ::stride]
    assert torch.equal(y, wanted)
    grad = torch.randn_like(y)
    (mine,), (theirs,) = (torch.autograd.grad(z, x, grad) for z in (y, wanted))
    assert torch.equal(mine, theirs)
    assert mine.is_contiguous(memory_format=torch.channels_last)
    small = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: subsample(t, stride), small)
    assert torch.autograd.gradgradcheck(lambda t: subsample(t, stride), small)


def test_a_compiled_gradient_is_in_channels_last_too():
    """In a graph the gradient of slices is contiguous, and every convolution before would copy it."""
    x = torch.randn(2, 3, 7, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = torch.compile(lambda t: subsample(t, 2), backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, x[:, :, ::2, ::2])
    grad = torch.randn_like(y)
    (mine,) = torch.autograd.grad(y, x, grad)
    (theirs,) = torch.autograd.grad(x[:, :, ::2, ::2], x, grad)
    assert torch.equal(mine, theirs)
    assert mine.is_contiguous(memory_format=torch.channels_last)


def test_tracers_see_the_slice():
    graph = fx.symbolic_trace(lambda x: subsample(x, 2)).graph
    assert [n.op for n in graph.nodes] == ["placeholder", "call_function", "output"]
