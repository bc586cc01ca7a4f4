"""A network that is not part of quincunx: plain modules with their own forward.

    cd examples
    python own_network.py        # trains and accelerates it in Python; an optional number sets the epochs
    quincunx accelerate --model own_network:make_net --weights own_network.safetensors --data digits

The second command does the same from the command line, with a report. quincunx only needs a
function without arguments that builds the network: ``make_net``.
"""

import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import quincunx as qx
from quincunx.data import batches, load_data
from quincunx.train.evaluation import evaluate


class Branch(nn.Module):
    """Two convolutions in parallel with a 1 x 1, without nn.Sequential."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for _ in range(2)])
        self.side = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = F.relu(norm(conv(y)))
        return y + self.side(x)


class Net(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 5, stride=2, padding=2)
        self.branches = nn.ModuleDict({"fine": Branch(16), "coarse": Branch(16)})
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        fine = self.branches["fine"](x)
        coarse = self.branches["coarse"](F.avg_pool2d(x, 2))
        return self.head(torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], 1))


def make_net() -> nn.Module:
    """Build the network for --model and qx.load; the weights come from a file."""
    return Net()


def main(epochs: int) -> None:
    torch.manual_seed(0)
    data, net = load_data("digits"), make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
    for epoch in range(epochs):
        for images, labels in batches(data.train, data, 32, generator=torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    save_file(net.state_dict(), "own_network.safetensors")

    # accelerate works on a copy and reports what it did
    calibration = list(batches(data.train, data, 50))[:8]
    result = qx.accelerate(net.eval(), qx.LowRank(rank=0.25), calibration=calibration)
    print("replaced:", ", ".join(result.replaced))
    for name, reason in result.skipped.items():
        print(f"{name} stays: {reason}")

    # the artifact stores the name of the function that builds the network, but never imports it
    qx.save(result.model, "own_network_fast", factory="own_network:make_net")
    fast = qx.load("own_network_fast", factory=make_net)
    for name, network in (("before", net), ("after", fast), ("fused", qx.fuse(fast))):
        print(f"{name}: test error {100 * evaluate(network, data.test, data).error:.1f}%")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
