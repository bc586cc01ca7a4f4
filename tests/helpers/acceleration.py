"""A small trained network and a clock that counts its multiplications."""

import torch

import quincunx as qx
from helpers.training import pictures
from quincunx.acceleration import baselines, gain, scores, timing
from quincunx.measure.latency import Timing

DATA = pictures(count=60, size=8, channels=3)


METHOD = qx.Espace(rank=0.5, rate=0.5)


def network(seed=0):
    torch.manual_seed(seed)
    return qx.networks.build("cifar-resnet8", 3, 3).eval()


def one_image(models, example):
    """The first image of what ``measure_models`` is given for each network, as a tuple."""
    inputs = dict.fromkeys(models, example) if isinstance(example, torch.Tensor) else example
    given = {name: x if isinstance(x, tuple) else (x,) for name, x in inputs.items()}
    return {
        name: tuple(x[:1].contiguous() if isinstance(x, torch.Tensor) else x for x in arguments)
        for name, arguments in given.items()
    }


def measure_macs(models, example, *, rounds=3, **_):
    """In place of ``measure_models``: a multiply-add takes a nanosecond, everything else no time."""
    first = one_image(models, example)
    macs = {name: qx.cost(m, first[name]).macs for name, m in models.items()}
    return {name: Timing(name, 1, (1e-9 * count,) * rounds) for name, count in macs.items()}


# module, name in it, and what stands there while multiply-adds alone are time
MACS_AS_TIME = (
    *((module, "measure_models", measure_macs) for module in (scores, timing)),
    *((module, "inference_form", lambda model, *_: model) for module in (scores, gain)),
    (timing, "fuse", lambda model, *_, **__: model),
    (timing, "fuse_to_time", lambda model, *_, **__: model),
    # multiplications do not say how fast a format is
    (baselines, "format_served", lambda *_: (None, "not timed")),
)


def clock_of_macs(monkeypatch):
    """Multiply-adds alone move it."""
    for place in MACS_AS_TIME:
        monkeypatch.setattr(*place)
