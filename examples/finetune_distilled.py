"""An accelerated network fine-tuned by distillation: the original is the teacher, in a loop of your own.

python examples/finetune_distilled.py        # some seconds; optional numbers: epochs before and after
"""

import sys

import torch
import torch.nn.functional as F

import quincunx as qx
from quincunx.data import batches, load_data
from quincunx.modules import copied
from quincunx.train.evaluation import evaluate
from quincunx.train.loss import Loss
from quincunx.train.recipes import Recipe


def main(before: int = 6, after: int = 3) -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    original = qx.networks.build("cifar-resnet8", 10, 1)
    optimizer = torch.optim.SGD(original.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(before):
        for x, y in batches(data.train, data, 32, generator=torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            F.cross_entropy(original(x), y).backward()
            optimizer.step()

    calibration = list(batches(data.train, data, 50))[:8]
    net = qx.accelerate(original.eval(), qx.Perforate(), calibration=calibration).model
    replaced = copied(net).eval()

    # half of the loss compares the outputs with the teacher's, softened; the last maps of each resolution are
    # compared as well. The loss is a sum over images
    shares = Recipe(distill=0.5, temperature=4.0, distill_features=0.5)
    loss = Loss(shares, net, original, example=calibration[0][0][:1])
    print("maps compared:", ", ".join(loss.names))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.005, momentum=0.9, weight_decay=5e-4)
    net.train()
    for epoch in range(after):
        for x, y in batches(data.train, data, 32, generator=torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            with loss.following():
                output, wanted = net(x), loss.asked(x)
                total = loss.of_outputs(output, y, wanted) + loss.of_maps()
            (total / len(x)).backward()
            optimizer.step()

    for name, network in (("before", original), ("replaced", replaced), ("fine-tuned", net)):
        print(f"{name}: test error {100 * evaluate(network, data.test, data).error:.1f}%")


if __name__ == "__main__":
    main(*(int(epochs) for epochs in sys.argv[1:]))
