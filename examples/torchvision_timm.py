"""Unchanged networks of torchvision and timm.

    python examples/torchvision_timm.py

If one of the two cannot be imported, such as a torchvision built for another torch, the program says so and
continues. With weights and data the command line is enough; torchvision's functions need no arguments:

    quincunx accelerate --model torchvision.models:resnet18 --weights resnet18.pth --data ImageNet \
        --input 1x3x224x224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
"""

import importlib
import tempfile
from types import ModuleType
from typing import Any

import torch
from torch import nn

import quincunx as qx

# the module, function and arguments that build each network
NETWORKS: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "torchvision": ("torchvision.models", "resnet18", (), {"weights": None, "num_classes": 10}),
    "timm": ("timm", "create_model", ("resnet18",), {"pretrained": False, "num_classes": 10}),
}


def imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    # a library whose compiled part does not match this torch raises RuntimeError
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        print(f"{name}: does not import here ({type(error).__name__}: {reason})")
        return None


def main() -> None:
    images = [torch.randn(4, 3, 64, 64) for _ in range(2)]
    for library, (module, function, arguments, settings) in NETWORKS.items():
        found = imported(module)
        if found is None:
            continue

        def make(
            found: ModuleType = found, how: tuple[Any, ...] = (function, arguments, settings)
        ) -> nn.Module:
            name, given, named = how
            network: nn.Module = getattr(found, name)(*given, **named)
            return network

        # random images and weights show that it works, not how well; use real ones for that
        result = qx.accelerate(
            make().eval(),
            qx.LowRank(rank=0.25),
            where=lambda name, _: name.startswith("layer1."),
            calibration=images,
        )
        with tempfile.TemporaryDirectory() as folder:
            # stored for people: the function that builds it, in your own module
            qx.save(result.model, f"{folder}/fast", factory="my_networks:make")
            fast = qx.fuse(qx.load(f"{folder}/fast", factory=make))
        with torch.no_grad():
            far = (fast(images[0]) - result.model(images[0])).abs().max()
        print(f"{library}: {len(result.replaced)} convolutions replaced; loaded and fused, {far:.0e} apart")


if __name__ == "__main__":
    main()
