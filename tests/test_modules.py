"""The rule by which a module is taken for a known class."""

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from quincunx.modules import forward_hooks, known_class, surely


class Named(nn.Conv2d):
    """Builds itself in another way, and computes the same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.note = "mine"

    def extra_repr(self) -> str:
        return self.note


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Inner(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class Computed(nn.BatchNorm2d):
    @property
    def eps(self) -> float:
        return 0.5

    @eps.setter
    def eps(self, value: float) -> None:
        pass


class Called(nn.ReLU):
    def __call__(self, x):
        return super().__call__(x) + 1


def _patched() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3)
    conv.forward = types.MethodType(lambda self, x: x, conv)  # type: ignore[method-assign]
    return conv


@pytest.mark.parametrize(
    "module",
    [
        Doubled(3, 3, 3),
        Inner(3, 3, 3),
        Computed(3),
        Called(),
        _patched(),
        nn.LazyConv2d(3, 3),
        parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
        parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", nn.Sigmoid()),
        nn.Linear(3, 3),
        "no module",
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_may_compute_something_else_is_not_taken_for_its_parent(module: object) -> None:
    assert known_class(module, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)) is None


def test_the_class_itself_and_what_only_builds_it_in_another_way_are() -> None:
    lazy = nn.LazyConv2d(3, 3)
    lazy(torch.zeros(1, 2, 4, 4))
    for module in (nn.Conv2d(3, 3, 3), Named(3), lazy):
        assert known_class(module, (nn.BatchNorm2d, nn.Conv2d)) is nn.Conv2d
    assert known_class(nn.ReLU6(), (nn.Hardtanh,)) is nn.Hardtanh
    assert known_class(nn.ReLU6(), (nn.ReLU6, nn.Hardtanh)) is nn.ReLU6
    assert surely(nn.ReLU(), nn.Conv2d, nn.ReLU)
    assert not surely(nn.ReLU(), nn.Conv2d)


def test_hooks_before_and_after_the_forward_count_and_others_do_not() -> None:
    conv = nn.Conv2d(3, 3, 3)
    conv.register_full_backward_hook(lambda *_: None)
    conv.register_state_dict_pre_hook(lambda *_: None)
    assert forward_hooks(conv) == 0
    conv.register_forward_hook(lambda *_: None)
    conv.register_forward_pre_hook(lambda *_, **__: None, with_kwargs=True)
    assert forward_hooks(conv) == 2
