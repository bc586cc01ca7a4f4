"""An accelerated network fine-tuned by Lightning (pip install 'quincunx[train,lightning]').

python examples/finetune_lightning.py        # some seconds; optional numbers: epochs before and after
"""

import sys

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quincunx as qx
from quincunx.data import batches, load_data
from quincunx.train.evaluation import evaluate


class Classifier(L.LightningModule):
    """Any network with a loss; nothing in it knows of quincunx."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(net: nn.Module, images: TensorDataset, epochs: int, rate: float) -> nn.Module:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=5.0,
        accumulate_grad_batches=2,
        # with a fast bfloat16 product: precision="bf16-mixed"
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # a network from qx.load is in evaluation mode, and Lightning keeps modes as they are
    trainer.fit(Classifier(net.train(), rate), DataLoader(images, batch_size=32, shuffle=True))
    return net.eval()


def main(before: int = 6, after: int = 3) -> None:
    L.seed_everything(0, verbose=False)
    data = load_data("digits")
    images = TensorDataset(*next(batches(data.train, data, len(data.train))))
    net = train(qx.networks.build("cifar-resnet8", 10, 1), images, before, 0.1)

    result = qx.accelerate(net, qx.SpatialBottleneck(), calibration=DataLoader(images, batch_size=50))
    errors = {"before": evaluate(net, data.test, data).error}
    errors["replaced"] = evaluate(result.model.eval(), data.test, data).error
    errors["fine-tuned"] = evaluate(train(result.model, images, after, 0.02), data.test, data).error
    for name, error in errors.items():
        print(f"{name}: test error {100 * error:.1f}%")


if __name__ == "__main__":
    main(*(int(epochs) for epochs in sys.argv[1:]))
