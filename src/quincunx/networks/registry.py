"""Build a network from its name, and describe it by a JSON spec."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from quincunx.networks import (
    alexnet,
    cifar_resnet,
    dense,
    densenet,
    googlenet,
    preresnet,
    pyramidnet,
    resnet,
    squeezenet,
)
from quincunx.sampling import Sampling

__all__ = ["build", "names", "network_spec"]

Factory = Callable[..., nn.Module]

# a pattern, the name that a person types, and the builder; the pattern's groups are passed as integers
_NETWORKS: list[tuple[str, str, Factory]] = [
    (r"rrn(\d+)", "rrn{6n+2}", preresnet.rrn),
    (r"rsbn(\d+)", "rsbn{6n+2}", preresnet.rsbn),
    (r"crn(\d+)", "crn{9n+2}", preresnet.crn),
    (r"csbn(\d+)", "csbn{9n+2}", preresnet.csbn),
    (r"resnet(\d+)", "resnet{18,34,50,101}", resnet.resnet),
    (r"sb-resnet(\d+)", "sb-resnet{18,34,50,101}", resnet.sb_resnet),
    (r"resnext(\d+)", "resnext{50,101}", resnet.resnext),
    (r"sb-resnext(\d+)", "sb-resnext{50,101}", resnet.sb_resnext),
    (r"seresnet(\d+)", "seresnet{18,34,50,101}", resnet.seresnet),
    (r"sb-seresnet(\d+)", "sb-seresnet{18,34,50,101}", resnet.sb_seresnet),
    (r"densenet(\d+)", "densenet{121,161,169,201}", densenet.densenet),
    (r"sb-densenet(\d+)", "sb-densenet{121,161,169,201}", densenet.sb_densenet),
    (r"pyramidnet(\d+)-a(\d+)", "pyramidnet{depth}-a{alpha}", pyramidnet.pyramidnet),
    (r"sb-pyramidnet(\d+)-a(\d+)", "sb-pyramidnet{depth}-a{alpha}", pyramidnet.sb_pyramidnet),
    (r"cifar-resnet(\d+)", "cifar-resnet{6n+2}", cifar_resnet.cifar_resnet),
    (r"sb-cifar-resnet(\d+)", "sb-cifar-resnet{6n+2}", cifar_resnet.sb_cifar_resnet),
    (r"dncnn(\d+)", "dncnn{depth}", dense.dncnn),
    (r"sb-dncnn(\d+)", "sb-dncnn{depth}", dense.sb_dncnn),
    ("unet", "unet", dense.unet),
    ("sb-unet", "sb-unet", dense.sb_unet),
    (r"fcn-resnet(\d+)", "fcn-resnet{18,34,50,101}", dense.fcn_resnet),
    (r"sb-fcn-resnet(\d+)", "sb-fcn-resnet{18,34,50,101}", dense.sb_fcn_resnet),
    ("alexnet", "alexnet", alexnet.alexnet),
    ("googlenet", "googlenet", googlenet.googlenet),
    ("squeezenet1_1", "squeezenet1_1", squeezenet.squeezenet1_1),
]
_EXAMPLES = [
    *(f"{family}{depth}" for family in ("rrn", "rsbn") for depth in (20, 44, 62, 86, 110)),
    *(f"{family}{depth}" for family in ("crn", "csbn") for depth in (29, 47, 65, 83, 101)),
    *(f"{family}{depth}" for family in ("resnet", "sb-resnet") for depth in (18, 34, 50, 101)),
    *(
        f"{family}{depth}-a{alpha}"
        for family in ("pyramidnet", "sb-pyramidnet")
        for depth in (110, 164)
        for alpha in (84, 270)
    ),
    *(f"{family}50" for family in ("resnext", "sb-resnext", "seresnet", "sb-seresnet")),
    "densenet121",
    "sb-densenet121",
    *(f"{family}{depth}" for family in ("cifar-resnet", "sb-cifar-resnet") for depth in (20, 56)),
    "alexnet",
    "googlenet",
    "squeezenet1_1",
    *("dncnn17", "sb-dncnn17", "unet", "sb-unet", "fcn-resnet18", "sb-fcn-resnet18"),
]
# the networks that give an image of as many channels as they take
_IMAGES = (dense.dncnn, dense.sb_dncnn)


def names() -> list[str]:
    """Return the names of the networks in the papers' tables and their relatives; other depths of a family
    can be built too."""
    return list(_EXAMPLES)


def build(
    name: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    *,
    weights: str | Path | None = None,
    **settings: Any,
) -> nn.Module:
    """Return a network by name, with fresh weights from torch's global generator or with trained ones.

    Args:
        name: such as "rrn20" or "rsbn20"; :func:`names` lists those of the papers.
        num_classes: outputs of the last layer, 10 by default; of a network from images to images (DnCNN) the
            channels of its input.
        in_channels: channels of the input image, 3 by default.
        weights: name of a trained result, which is fetched into the cache if it is not there
            (:mod:`quincunx.networks.trained`), or the Path of an artifact; its classes, channels and settings
            are then the default, and the network is in evaluation mode.
        settings: of the network's family: ``sampling`` (a sampling or its name) and ``down`` ("stride" or
            "avgpool") for all SB forms, ``width`` for the ResNets, DnCNN and U-Net,
            ``reduction`` for SE-ResNets, ``form`` ("torchvision" or "original") for AlexNet and GoogLeNet,
            ``aux`` for GoogLeNet,
            ``dropout`` for AlexNet, GoogLeNet and SqueezeNet.

    Returns:
        The network. Its ``quincunx_spec`` is a JSON-ready dictionary that :func:`quincunx.save`
        stores and from which the network is rebuilt.

    Raises:
        ValueError: an unknown name, depth or setting; ``weights`` of another network.
        ConnectionError: the address of trained results cannot be reached.

    Example:
        >>> sum(p.numel() for p in build("rrn20").parameters())
        269722
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: expected the name of a network")
    asked = {"num_classes": num_classes, "in_channels": in_channels}
    for key, value in asked.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value!r}: expected a positive integer")
    if weights is not None:
        # an artifact is built by this function
        from quincunx.networks.trained import build_trained

        return build_trained(name, weights, _plain({**asked, **settings}))
    in_channels = 3 if in_channels is None else in_channels
    for pattern, _, factory in _NETWORKS:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        known = [
            p.name
            for p in inspect.signature(factory).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        for key in settings:
            if key not in known:
                has = ", ".join(known) or "none"
                raise ValueError(f"{key}={settings[key]!r}: {name} has no such setting; it has {has}")
        if num_classes is None:
            num_classes = in_channels if factory in _IMAGES else 10
        network = factory(*(int(g) for g in match.groups()), num_classes, in_channels, **settings)
        # quincunx.save stores it and rebuilds the network from it
        network.quincunx_spec = network_spec(name, num_classes, in_channels, settings)  # type: ignore[assignment]
        return network
    listed = sorted(_EXAMPLES, key=lambda known: -difflib.SequenceMatcher(None, name, known).ratio())
    families = ", ".join(shown for _, shown, _ in _NETWORKS)
    raise ValueError(
        f"name={name!r}: unknown network; nearest first: {', '.join(listed)} (any n >= 1 of {families})"
    )


def network_spec(name: str, num_classes: int, in_channels: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`build`, JSON-ready."""
    return {
        "kind": "network",
        "name": name,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "settings": _plain(settings),
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v.spec if isinstance(v, Sampling) else v for k, v in settings.items()}
