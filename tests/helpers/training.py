"""Small networks, small images and runs of a second."""

import json

import torch

import quincunx as qx
from quincunx.data import ImageData, Split
from quincunx.train.loop import fit
from quincunx.train.recipes import Recipe

TINY = Recipe("tiny", epochs=3, batch_size=8, lr=0.05, milestones=(0.5,), warmup=0.1, augment="cifar")


def pictures(count=20, size=8, channels=1, classes=3, name="pictures", seed=5):
    generator = torch.Generator().manual_seed(seed)

    def split(n):
        labels = torch.arange(n) % classes
        noise = torch.randint(0, 100, (n, size, size, channels), generator=generator)
        return Split((noise + 70 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)

    names = tuple("abcdefgh"[:classes])
    train, test = split(count), split(count // 2)
    return ImageData(name, train, test, names, (0.4,) * channels, (0.3,) * channels, augment="none")


DATA = pictures()


def network(name="rsbn8", seed=0, **settings):
    torch.manual_seed(seed)
    return qx.networks.build(name, **{"num_classes": 3, "in_channels": 1, "width": 4, **settings})


def run(folder, *, model=None, data=DATA, recipe=TINY, **options):
    """The result, and the network that was trained."""
    model = network() if model is None else model
    return fit(model, data, recipe, folder, **options), model


def log_of(folder):
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("seconds", "images_per_second"):
            assert line.pop(key) > 0
    return lines


def assert_equal_states(first, second):
    assert list(first) == list(second)
    for key in first:
        assert torch.equal(first[key], second[key]), key


def stop_in(model, step, error):
    """Make the network raise at its ``step``-th training step."""
    steps = []

    def hook(module, _):
        if module.training:
            steps.append(0)
            if len(steps) == step:
                raise error

    model.register_forward_pre_hook(hook)
    return model
