"""A user's file with the whole public API: mypy --strict accepts every call, with the type said here."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import quincunx as qx
from quincunx.surgery import Context, Layer, Work, each


class Keep:
    """A method of the user's."""

    name = "keep"
    targets: tuple[type[nn.Module], ...] = (nn.Conv2d,)

    def refuse(self, layer: Layer, context: Context) -> str | None:
        return None

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        return each(lambda layer: qx.Replacement(layer.module, {"kind": "conv"}, {}))


class Net(nn.Module):
    """A network of our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = qx.SampledConv2d(3, 8, 3, sampling=qx.CHESSBOARD, padding=1)
        self.second = qx.SampledConvTranspose2d(8, 8, 3, sampling=qx.CHESSBOARD, padding=1)
        self.block = qx.SpatialBottleneck2d(8, 8, sampling=qx.QUARTER, down="avgpool")
        self.perforated = qx.PerforatedConv2d(8, 8, 3, sampling=qx.THREE_QUARTERS, padding=1)
        self.split = qx.SeparableConv2d(8, 8, 3, rank=4, padding=1)
        self.cp = qx.CPConv2d(8, 8, 3, rank=4, padding=1)
        self.espace = qx.EspaceConv2d(8, 8, 3, rank=4, masks=(qx.Uniform(0.5), qx.Random(0.5, 0)))
        self.binary = qx.BinaryConv2d(8, 8, 3, padding=1)
        self.head = qx.BinaryLinear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x), (x.shape[2], x.shape[3]))
        for layer in (self.block, self.perforated, self.split, self.cp, self.espace, self.binary):
            y = layer(y)
        out: Tensor = self.head(y.mean((2, 3)))
        return out


def operators(x: Tensor, weight: Tensor) -> None:
    y = qx.sampled_conv2d(x, weight, sampling=qx.CHESSBOARD, padding=1)
    assert_type(y, Tensor)
    z = qx.sampled_conv_transpose2d(y, weight, sampling=qx.CHESSBOARD, size=(8, 8), padding=1)
    assert_type(z, Tensor)
    assert_type(qx.fill_nearest(y, sampling=qx.CHESSBOARD, size=(8, 8)), Tensor)
    assert_type(qx.fill_fitted(y, weight, sampling=qx.CHESSBOARD, size=(8, 8), reach=1), Tensor)


def samplings(mask: Tensor) -> list[qx.Sampling]:
    own = [qx.Cosets(3, [(0, 0), (1, 2)]), qx.Positions(mask), qx.EvenGrid(0.5), qx.Uniform(0.25, rule="eq8")]
    assert_type(own[0].mask(8, 8), Tensor)
    assert_type(own[0].count(8, 8), int)
    assert_type(own[0].density, float)
    assert_type(own[0].spec, str)
    return [*own, qx.Random(0.5, seed=1)]


def accelerate(model: nn.Module, images: list[tuple[Tensor, Tensor]], folder: Path) -> nn.Module:
    methods: list[qx.Method] = [
        qx.SpatialBottleneck(qx.QUARTER),
        qx.Perforate(qx.CHESSBOARD, fill="nearest"),
        qx.SpatialBlock(qx.CHESSBOARD, fill="nearest"),
        qx.Espace(rank=0.5, rate=0.5),
        qx.LowRank(rank=0.5),
        qx.CP(rank=0.2),
        qx.BinaryConnect(),
        qx.QCNN(subspace=4, codewords=64),
        Keep(),
    ]
    result = qx.accelerate(model, methods[0], calibration=images)
    assert_type(result, qx.Accelerated)
    assert_type(result.model, nn.Module)
    assert_type(result.skipped, dict[str, str])
    assert_type(result.summary(), str)
    found = qx.accelerate(
        model, "auto", calibration=images, speedup=2.0, max_drop=1.0, scores=folder / "s.json"
    )
    fast = qx.fuse(found.model, torch.bfloat16, check=images[0][0])
    assert_type(qx.calibrate(model, images, observer="minmax"), nn.Module)
    small = qx.BinaryConnect.pack(model)
    assert_type(qx.save(small, folder, factory="nets:make"), Path)
    assert_type(qx.load(folder, factory=Net), nn.Module)
    cost = qx.cost(fast, images[0][0])
    assert_type(cost, qx.Cost)
    assert_type(cost.macs, int)
    assert_type(qx.backend("cpu").reason, str)
    return fast


def networks(path: Path) -> None:
    assert_type(qx.networks.names(), list[str])
    assert_type(qx.networks.build("rsbn20", 100, sampling="1/4"), nn.Module)
    assert_type(qx.networks.weights.load("cifar-resnet20", path), nn.Module)


def tasks() -> qx.Task:
    ready: Mapping[str, qx.Task] = {
        "a": qx.tasks.classification(),
        "b": qx.tasks.segmentation(),
        "c": qx.tasks.image_to_image(),
        "d": qx.tasks.multilabel(),
        "e": qx.tasks.agreement(),
    }
    assert_type(ready["a"].scale, qx.tasks.Scale)
    return qx.Task(
        "depth",
        loss=lambda output, target: (output - target).abs().flatten(1).mean(1),
        score=lambda output, target: (output - target).square().flatten(1).mean(1).sqrt(),
        scale=qx.tasks.Scale("RMSE", "m", "lower"),
    )


def engines(model: nn.Module, folder: Path) -> None:
    made = qx.export(model, folder / "fast.onnx", torch.zeros(1, 3, 32, 32), plugin=True)
    assert_type(made, qx.Exported)
    assert_type(made.speedup, float | None)
    assert_type(qx.from_onnx(folder / "model.onnx"), nn.Module)
    assert_type(qx.onnxruntime.quincunx_library(), str)
    qx.openvino.register(object())


def quantised(layer: nn.Conv2d) -> list[type[nn.Module]]:
    return [qx.QuantConv2d, qx.QuantLinear, qx.CodebookConv2d, qx.CodebookLinear]
