"""A network that quincunx knows nothing of: plain modules, a forward of its own.

    cd examples
    python own_network.py        # trains it, makes it faster in Python; a number behind it sets the epochs
    quincunx accelerate --model own_network:make_net --weights own_network.safetensors --data digits

The second command does the same from the command line, with a report. All that quincunx asks for is a
function without arguments that makes the network: ``make_net``.
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
    """Two convolutions beside a 1 x 1; nothing special, but no nn.Sequential either."""

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
    """What --model and qx.load call; the weights come from a file."""
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

    # surgery works on a copy and says what it did
    calibration = list(batches(data.train, data, 50))[:8]
    result = qx.accelerate(net.eval(), qx.LowRank(rank=0.25), calibration=calibration)
    print("replaced:", ", ".join(result.replaced))
    for name, reason in result.skipped.items():
        print(f"{name} stays: {reason}")

    # the artifact notes which function makes the network, and never imports it by itself
    qx.save(result.model, "own_network_fast", factory="own_network:make_net")
    fast = qx.load("own_network_fast", factory=make_net)
    for name, network in (("before", net), ("after", fast), ("fused", qx.fuse(fast))):
        print(f"{name}: test error {100 * evaluate(network, data.test, data).error:.1f}%")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
