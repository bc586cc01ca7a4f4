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


def clock_of_macs(monkeypatch):
    """Multiply-adds alone move it."""

    def measure(models, example, *, rounds, **_):
        inputs = dict.fromkeys(models, example) if isinstance(example, torch.Tensor) else example
        macs = {name: qx.cost(m, inputs[name][:1].contiguous()).macs for name, m in models.items()}
        return {name: Timing(name, 1, (1e-9 * count,) * rounds) for name, count in macs.items()}

    for module in (scores, timing):
        monkeypatch.setattr(module, "measure_models", measure)
    for module in (scores, gain):
        monkeypatch.setattr(module, "inference_form", lambda model, *_: model)
    monkeypatch.setattr(timing, "fuse", lambda model, *_, **__: model)
    # multiplications do not say how fast a format is
    monkeypatch.setattr(baselines, "format_served", lambda *_: (None, "not timed"))
