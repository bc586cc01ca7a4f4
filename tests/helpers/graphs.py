"""Random networks: layers joined by additions and concatenations."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn


class Graph(nn.Module):
    """Layers in a random order, joined by additions and concatenations; some are used again."""

    def __init__(self, choices):
        super().__init__()
        self.plan, self.parts, channels = [], nn.ModuleList(), [3]
        for kind, back, width in choices:
            at = len(channels) - 1 - back % len(channels)
            if kind == "conv":
                groups = 1 + width % 2 if channels[at] % 2 == 0 else 1
                layer = nn.Conv2d(
                    channels[at], 2 * width, 1 + 2 * (width % 3), padding=width % 3, groups=groups
                )
                self.parts.append(nn.Sequential(layer, nn.BatchNorm2d(2 * width)))
                self.plan.append(("call", at, len(self.parts) - 1))
                channels.append(2 * width)
            elif kind == "again" and (old := self._fitting(channels[at])) is not None:
                self.plan.append(("call", at, old))
                channels.append(self.parts[old][0].out_channels)
            elif kind == "add":
                other = next(i for i in range(len(channels)) if channels[i] == channels[at])
                self.plan.append(("add", at, other))
                channels.append(channels[at])
            elif kind == "cat" and channels[at] < 16:
                self.plan.append(("cat", at, 0))
                channels.append(channels[at] + 3)
            else:
                self.plan.append(("relu", at, 0))
                channels.append(channels[at])
        self.double()
        for part in self.parts:
            part[1].running_mean.normal_()
            part[1].running_var.uniform_(0.5, 2)

    def _fitting(self, channels):
        return next((i for i, part in enumerate(self.parts) if part[0].in_channels == channels), None)

    def forward(self, x):
        values = [x]
        for what, first, second in self.plan:
            a = values[first]
            if what == "call":
                values.append(self.parts[second](a))
            elif what == "add":
                values.append(a + values[second])
            elif what == "cat":
                values.append(torch.cat([a, values[second]], 1))
            else:
                values.append(F.relu(a, inplace=False))
        return torch.cat([v.mean((2, 3)) for v in values], 1)


steps = st.tuples(
    st.sampled_from(["conv", "conv", "again", "relu", "add", "cat"]), st.integers(0, 3), st.integers(1, 4)
)
