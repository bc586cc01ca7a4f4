"""The rule by which a module is taken for a known class."""

import threading
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from quincunx.modules import copied, forward_hooks, known_class, surely


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


class Refuses(nn.Module):
    """Its copy fails in its own way."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise self.error


def remembers() -> nn.Module:
    net = nn.Linear(3, 2)
    net.seen = [net(torch.ones(1, 3)) * 2]  # type: ignore[assignment, list-item, unused-ignore]
    return net


def locked() -> nn.Module:
    net = nn.Sequential(nn.ReLU())
    net[0].guard = threading.RLock()
    return net[0]


def nested() -> nn.Module:
    net: nn.Module = nn.ReLU()
    for _ in range(1500):
        net = nn.Sequential(net)
    return net


@pytest.mark.parametrize(
    "make",
    [
        remembers,
        locked,
        lambda: Refuses(ValueError("no\nsecond line")),
        lambda: Refuses(AttributeError()),
        lambda: Refuses(NotImplementedError("not here")),
    ],
)
def test_copying_that_fails_names_the_part_in_one_sentence(make) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), make()))
    with pytest.raises(
        TypeError, match=r"^model: its part '1\.1', a \w+, cannot be copied \(.+\)$"
    ) as caught:
        copied(net)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("share", [False, True])
def test_tensors_that_a_forward_left_are_copied_with_their_values(share: bool) -> None:
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    x = torch.randn(4, 3)
    net[1].seen = net(x)
    made = copied(net, share=share)
    assert torch.equal(made(x), net(x))
    assert made[1].seen.grad_fn is None
    assert torch.equal(made[1].seen, net[1].seen)
    assert made[1].seen.data_ptr() != net[1].seen.data_ptr()
    # the weight is made of what the copy learns
    with torch.no_grad():
        made[0].weight_g.mul_(2)
    assert torch.equal(net(x), made(x)) == share


def test_a_network_nested_too_deep_is_refused_in_one_sentence() -> None:
    with pytest.raises(TypeError, match=r"^model: cannot be copied \(maximum recursion"):
        copied(nested())


def test_a_copy_made_in_inference_mode_can_be_trained() -> None:
    outside = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.inference_mode():
        inside = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        copies = [copied(outside), copied(inside)]
    for net in copies:
        assert not any(t.is_inference() for t in (*net.parameters(), *net.buffers()))
        net(torch.randn(2, 3, 5, 5)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    assert not torch.is_inference_mode_enabled()


def test_a_copy_that_shares_has_layers_of_its_own_and_parameters_in_the_same_memory() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))
    net[2].weight = net[0].weight
    made = copied(net, share=True).requires_grad_(False).eval()
    assert made[2].weight is made[0].weight
    assert made[0].weight is not net[0].weight
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        net[0].weight.fill_(2)
        net[1].running_mean.fill_(2)
    assert made[0].weight.eq(2).all()
    assert not made[1].running_mean.any()
    made[0].weight = nn.Parameter(torch.zeros(3, 3, 3, 3))
    assert net[0].weight.eq(2).all()


def test_a_shared_copy_of_what_was_made_in_inference_mode_has_ordinary_tensors() -> None:
    with torch.inference_mode():
        net = nn.Linear(2, 2)
    assert not any(p.is_inference() for p in copied(net, share=True).parameters())
