"""Training settings: one dataclass, and named recipes, which are functions that return it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quincunx.data import AUGMENTATIONS

__all__ = ["RECIPES", "Recipe", "by_name", "from_dict", "recipe_with"]

_OPTIMIZERS = ("sgd", "adam")
_PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """Training settings: SGD with momentum, or Adam, and a step schedule.

    Attributes:
        name: of the recipe.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: initial learning rate.
        milestones: shares of the epochs after which the rate is multiplied by ``gamma``.
        gamma: factor of the learning rate.
        every: the rate is also multiplied by ``gamma`` each time this many steps have passed; 0 for never.
        warmup: share of the epochs in which the rate rises linearly from zero.
        weight_decay: on every parameter.
        momentum: of SGD; of Adam the decay of the gradients' mean.
        nesterov: whether SGD uses Nesterov's form.
        distill: share of the loss for a teacher's outputs instead of the labels (Hinton et
            al., arXiv:1503.02531): temperature^2 times the Kullback-Leibler divergence of the softened
            distributions.
        temperature: distillation temperature.
        distill_features: weight of the distance between the teacher's last map of each resolution and
            the network's own (Romero et al., arXiv:1412.6550); see :class:`quincunx.train.loss.Loss`.
        augment: "none", "cifar" (pad, crop, flip) or "imagenet" (crop by scale and aspect, mirror,
            jitter); None uses the data set's default.
        precision: "float32", or automatic mixed precision: convolutions and the maps between them in
            "bfloat16" or, with scaled losses, "float16"; weights, batch statistics and loss in float32.
        accumulate: parts in which a batch passes through the network before the weights change;
            batch norm then normalises each part separately.
        optimizer: "sgd", or "adam" with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101),
            which suits losses of images, whose gradients are small.
        channels_last: whether to use the channels_last memory format.
        find_lr: whether fine-tuning first looks for the best of some rates around ``lr``, by short runs on
            a part of the training images (:func:`quincunx.train.rates.find_rate`).
        first: share of the steps, at the beginning, in which only the layers that replaced others train:
            fills, halves of spatial bottlenecks, kernels; then everything does.
        compile: whether forward and backward pass run through ``torch.compile``; the first step of each
            batch size then takes up to minutes, and random draws in the network differ.

    Raises:
        ValueError: a value out of its range.
    """

    name: str = "custom"
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    every: int = 0
    warmup: float = 0.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = True
    distill: float = 0.0
    temperature: float = 4.0
    distill_features: float = 0.0
    augment: str | None = None
    precision: str = "float32"
    accumulate: int = 1
    channels_last: bool = True
    optimizer: str = "sgd"
    find_lr: bool = False
    first: float = 0.0
    compile: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for key in ("epochs", "batch_size", "accumulate", "every"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{key}={value!r}: expected an integer")
        for key, holds, expected in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "a positive number"),
            ("milestones", all(0 < m < 1 for m in self.milestones), "shares of the epochs, in (0, 1)"),
            ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
            ("every", self.every >= 0, "at least 0"),
            ("distill", 0 <= self.distill <= 1, "a share of the loss, in [0, 1]"),
            ("temperature", 0 < self.temperature < math.inf, "a positive number"),
            ("distill_features", 0 <= self.distill_features < math.inf, "at least 0"),
            ("warmup", 0 <= self.warmup < 1, "a share of the epochs, in [0, 1)"),
            ("first", 0 <= self.first <= 1, "a share of the steps, in [0, 1]"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("augment", self.augment in (None, *AUGMENTATIONS), f"one of {', '.join(AUGMENTATIONS)}"),
            ("precision", self.precision in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}"),
            ("optimizer", self.optimizer in _OPTIMIZERS, f"one of {', '.join(_OPTIMIZERS)}"),
            ("accumulate", 1 <= self.accumulate <= self.batch_size, "from 1 to batch_size"),
        ):
            if not holds:
                raise ValueError(f"{key}={getattr(self, key)!r}: expected {expected}")

    @property
    def taught(self) -> bool:
        """Return whether a teacher is needed."""
        return self.distill > 0 or self.distill_features > 0

    def lr_at(self, progress: float, step: int = 0) -> float:
        """Return the learning rate after a share ``progress`` of all steps, ``step`` in number."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        falls = sum(progress >= m for m in self.milestones)
        return self.lr * self.gamma ** (falls + (step // self.every if self.every else 0))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields JSON-ready; :func:`from_dict` reads them."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}


def cifar() -> Recipe:
    """Return 400 epochs, rate 0.1, a tenth at 200 and 300, batch 64 (Peng et al., arXiv:1809.02601, 4.1)."""
    return Recipe(name="cifar", epochs=400, batch_size=64, lr=0.1, milestones=(0.5, 0.75), weight_decay=1e-4)


def short() -> Recipe:
    """Return 20 epochs on small images: a useful accuracy within the hour, not the paper's."""
    return Recipe(
        name="short",
        epochs=20,
        batch_size=128,
        lr=0.2,
        milestones=(0.6, 0.85),
        warmup=0.04,
        weight_decay=5e-4,
    )


def pyramidnet() -> Recipe:
    """Return 300 epochs, a tenth at 150 and 225, otherwise as CIFAR (Peng et al., 4.5; Han et al. 2017)."""
    return dataclasses.replace(cifar(), name="pyramidnet", epochs=300)


def imagenet() -> Recipe:
    """Return 100 epochs, rate 0.1, a tenth at 30, 60 and 90, batch 256 (Peng et al., 5)."""
    return Recipe(
        name="imagenet",
        epochs=100,
        batch_size=256,
        lr=0.1,
        milestones=(0.3, 0.6, 0.9),
        weight_decay=1e-4,
        augment="imagenet",
    )


def finetune() -> Recipe:
    """Return ESPACE's: rate 1e-4 halved every 10,000 steps, momentum 0.95, weight decay 5e-4 (Lin et al.)."""
    return Recipe(
        name="finetune",
        epochs=5,
        batch_size=64,
        lr=1e-4,
        milestones=(),
        gamma=0.5,
        every=10_000,
        momentum=0.95,
        nesterov=False,
        weight_decay=5e-4,
    )


def recover() -> Recipe:
    """Return what regains accuracy after layers were replaced: rate found by short runs around 0.01, half of
    the loss from the original's outputs, a tenth at 60% and 85%."""
    return Recipe(
        name="recover",
        epochs=5,
        batch_size=128,
        lr=0.01,
        milestones=(0.6, 0.85),
        warmup=0.04,
        weight_decay=5e-4,
        distill=0.5,
        find_lr=True,
    )


def digits() -> Recipe:
    """Return the recipe for the 1,437 training digits: small batches, twelve epochs."""
    return Recipe(name="digits", epochs=12, batch_size=32, lr=0.1, milestones=(0.6, 0.85), warmup=0.04)


def denoising() -> Recipe:
    """Return 50 epochs of Adam, rate 1e-3, a tenth at 30 and at 45 (Zhang et al., arXiv:1608.03981, use
    SGD)."""
    return Recipe(
        name="denoising",
        epochs=50,
        batch_size=16,
        lr=1e-3,
        milestones=(0.6, 0.9),
        weight_decay=0.0,
        optimizer="adam",
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (cifar, pyramidnet, imagenet, short, finetune, recover, digits, denoising)
}


def from_dict(fields: dict[str, Any]) -> Recipe:
    """Return a recipe from :meth:`Recipe.to_dict`; a field that did not exist yet takes its default.

    Raises:
        ValueError: a field that no recipe has, or a value out of its range.
    """
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(Recipe)})
    if unknown:
        raise ValueError(f"recipe: has no {', '.join(unknown)}")
    return Recipe(**fields)


def by_name(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        ValueError: an unknown name; the nearest one is listed first.

    Example:
        >>> by_name("cifar").epochs
        400
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        listed = [*nearest, *(n for n in RECIPES if n not in nearest)]
        raise ValueError(f"recipe={name!r}: unknown recipe; nearest first: {', '.join(listed)}")
    return RECIPES[name]()


def recipe_with(recipe: Recipe, **changes: Any) -> Recipe:
    """Return a recipe with the given fields changed; None keeps a field."""
    return dataclasses.replace(recipe, **{k: v for k, v in changes.items() if v is not None})
