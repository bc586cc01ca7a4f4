"""Small networks whose programs have every kind of step, and what their programs were called with."""

import torch
import torch.nn.functional as F
from torch import nn

import quincunx as qx
from quincunx.fusion import calibrated
from quincunx.fusion.fuse import _fuse_joined
from quincunx.fusion.program import Program


class Net(nn.Module):
    """A network from a function of its modules, with batch norms that do something."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        self.eval()

    def forward(self, x):
        return self.run(self, x)


class TwoMaps(Net):
    def forward(self, x, z):
        return self.run(self, x, z)


def sampled(inner=6, outer=6, fill="nearest", sampling=qx.CHESSBOARD, **settings):
    return qx.PerforatedConv2d(inner, outer, 3, sampling=sampling, padding=1, fill=fill, **settings)


def conv(inner=6, outer=6, size=1, **settings):
    return nn.Conv2d(inner, outer, size, padding=size // 2, **settings)


def _compact(m, x):
    y = F.relu(m.first(x))
    y = torch.cat([y, m.one(y)], 1)
    return m.last(F.max_pool2d(m.norm(y), 3, 2, 1))


def _mean(m, x):
    return torch.mean(m.first(x), (2, 3))


def _pooled(m, x):
    return F.adaptive_avg_pool2d(m.first(x), 1)


def _pointwise(m, x):
    y = m.first(x)
    return m.last(torch.sigmoid(m.one(y)) * y)


def _added(m, x):
    y = m.first(x)
    return m.last(torch.relu(y + y))


def _preactivation(m, x):
    y = m.first(x)
    return m.last(m.one(F.relu(m.norm(y))) + y)


def _normalised(m, x):
    """Norms without an activation: of a sum that a shortcut reads too, and behind an activation."""
    y = m.norm(m.first(x)) + x
    z = m.second(m.before(y)) + F.pad(F.avg_pool2d(y, 2, ceil_mode=True), (0, 0, 0, 0, 0, 2))
    return m.last(m.between(F.relu(m.third(z))) + z)


def _fitted(m, x):
    y = F.relu(m.second(F.relu(m.first(x))) + m.short(x))
    return m.last(F.relu(m.norm(m.third(y) + y)))


def _widened(m, x):
    """A shortcut of every second position and of fewer channels, as in the first residual networks."""
    y = F.relu(m.first(x))
    short = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4))
    return m.last(F.relu(m.second(y) + short))


def _silu(m, x):
    return m.last(F.silu(m.first(x)))


def _constants(m, x):
    return m.last(m.one(m.first(x)) * 2.0)


def _broadcast(m, x):
    """What is added has one position, so that it is no shortcut of the convolution."""
    y = m.first(x) + m.short(F.adaptive_avg_pool2d(x, 1))
    return m.last(m.one(F.relu(m.norm(y))) + y)


def _two(m, x, z):
    y = m.first(x) + z
    return F.relu(y), m.second(F.leaky_relu(y, 0.1))


def examples():
    """(network, inputs) by name."""
    torch.manual_seed(5)
    # on 0..1, so that results are of the size of the inputs
    x, odd = torch.rand(2, 6, 8, 10), torch.rand(3, 6, 7, 9)
    spots = qx.Random(0.4, 3)
    return {
        "compact": (
            Net(_compact, first=sampled(), one=conv(6, 4), norm=nn.BatchNorm2d(10), last=conv(10, 5)),
            (x,),
        ),
        "mean": (Net(_mean, first=sampled(sampling=spots)), (odd,)),
        "pooled": (Net(_pooled, first=sampled(sampling=spots)), (odd,)),
        "pointwise": (Net(_pointwise, first=sampled(), one=conv(), last=conv(6, 3, 3)), (odd,)),
        "added": (Net(_added, first=sampled(), last=conv(6, 3, 3)), (x,)),
        "preactivation": (
            Net(_preactivation, first=conv(6, 6, 3), norm=nn.BatchNorm2d(6), one=sampled(), last=conv()),
            (odd,),
        ),
        "normalised": (
            Net(
                _normalised,
                first=conv(6, 6, 3),
                norm=nn.BatchNorm2d(6),
                before=nn.BatchNorm2d(6),
                second=conv(6, 8, 3, stride=2),
                third=conv(8, 8, 3),
                between=nn.BatchNorm2d(8),
                last=conv(8, 5),
            ),
            (odd,),
        ),
        "fitted": (
            Net(
                _fitted,
                first=sampled(fill="fitted"),
                second=sampled(fill="zero"),
                short=conv(),
                third=sampled(fill="fitted", sampling=qx.QUARTER),
                norm=nn.BatchNorm2d(6),
                last=conv(6, 5, 3, groups=1),
            ),
            (x,),
        ),
        "widened": (
            Net(
                _widened,
                first=sampled(),
                second=sampled(6, 10, "fitted", stride=2),
                last=conv(10, 5),
            ),
            (odd,),
        ),
        "silu": (Net(_silu, first=sampled(fill="fitted"), last=conv()), (x,)),
        "constants": (Net(_constants, first=sampled(), one=conv(), last=conv(6, 3, 3)), (x,)),
        "broadcast": (
            Net(
                _broadcast,
                first=conv(6, 6, 3),
                short=conv(),
                norm=nn.BatchNorm2d(6),
                one=conv(),
                last=conv(),
            ),
            (x,),
        ),
        "two": (
            TwoMaps(_two, first=conv(6, 6, 3), second=conv(6, 8, 3, groups=2, stride=2)),
            (x, x[..., :8, :10]),
        ),
        "bottleneck": (qx.networks.build("rsbn8").eval(), (torch.rand(2, 3, 12, 12),)),
        "strided": (qx.networks.build("cifar-resnet8").eval(), (torch.rand(2, 3, 13, 11),)),
    }


def in_eight_bits(model, inputs, real=torch.float32, kept=False):
    """A fused network of which all convolutions, or with ``kept`` every second one, are in eight bits."""
    plain = _fuse_joined(model)
    with torch.no_grad():
        found = calibrated._observe(plain, [inputs], "minmax")
        real_ones = dict.fromkeys(calibrated._layers(plain)[::2], "") if kept else {}
        return calibrated._assembled(plain, found, real_ones, real)


def called(fused, inputs):
    """The programs of a fused network with the arguments and the results of one call each."""
    found = []

    def note(module, arguments, results):
        found.append((module, arguments, results))

    hooks = [m.register_forward_hook(note) for m in fused.modules() if isinstance(m, Program)]
    with torch.no_grad():
        fused(*inputs)
    for hook in hooks:
        hook.remove()
    return found
