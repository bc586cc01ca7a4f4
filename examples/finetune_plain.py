"""An accelerated network fine-tuned in a loop of your own, as any other module of torch.

python examples/finetune_plain.py        # some seconds; optional numbers: epochs before and after
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import quincunx as qx
from quincunx.data import batches, load_data
from quincunx.train.evaluation import evaluate


def train(net: nn.Module, images: TensorDataset, epochs: int, rate: float) -> nn.Module:
    """Train with what loops often have: a schedule, clipped gradients, averaged weights, which it returns."""
    loader = DataLoader(images, batch_size=32, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    net.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(net)
    return average.module.eval()


def main(before: int = 6, after: int = 3) -> None:
    torch.manual_seed(0)
    data = load_data("digits")
    # any source of batches will do; these are small enough to be two tensors
    images = TensorDataset(*next(batches(data.train, data, len(data.train))))
    net = train(qx.networks.build("cifar-resnet8", 10, 1), images, before, 0.1)

    result = qx.accelerate(net, qx.Espace(rank=0.5, rate=0.5), calibration=DataLoader(images, batch_size=50))
    errors = {"before": evaluate(net, data.test, data).error}
    errors["replaced"] = evaluate(result.model.eval(), data.test, data).error
    tuned = train(result.model, images, after, 0.02)
    errors["fine-tuned"] = evaluate(tuned, data.test, data).error
    # fused networks are for inference: fine-tune first, then fuse
    fast = qx.fuse(tuned, check=images[:8][0])
    errors["fused"] = evaluate(fast, data.test, data).error
    for name, error in errors.items():
        print(f"{name}: test error {100 * error:.1f}%")


if __name__ == "__main__":
    main(*(int(epochs) for epochs in sys.argv[1:]))
