"""What a fused network answers, compared with the network."""

import torch


def same_answers(fused, net, shapes):
    """Compare the answers to random inputs of some shapes."""
    with torch.no_grad():
        for shape in shapes:
            x = torch.randn(shape)
            torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)
