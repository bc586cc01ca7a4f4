"""Training losses: labels, another network's outputs, and its maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.modules import inference_mode_of
from quincunx.train.recipes import Recipe

__all__ = ["Loss", "shared_maps"]

Hook = Callable[[nn.Module, object, Any], None]


class Loss:
    r"""The loss of a recipe, summed over images.

    .. math:: (1 - a) \, CE(z, y) + a \, T^2 \, KL(\sigma(z'/T) \| \sigma(z/T))
        + b \, \frac{1}{L} \sum_l \lVert F_l - F'_l \rVert^2 / \lVert F'_l \rVert^2

    with scores z, labels y and maps F; primes mark the teacher's (Hinton et al.,
    arXiv:1503.02531; maps as hints: Romero et al., arXiv:1412.6550, here of equal shapes and therefore
    compared directly). a, T and b are the recipe's ``distill``, ``temperature`` and ``distill_features``.

    Args:
        recipe: the shares.
        model: the network that learns.
        teacher: evaluated and not changed; None for none.
        example: an input batch, used to find shared maps.

    Raises:
        ValueError: the teacher is missing, or not used; no map in common.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, teacher: nn.Module | None, example: Tensor) -> None:
        if (teacher is not None) != recipe.taught:
            need = "needs a teacher" if teacher is None else "makes no use of the teacher"
            raise ValueError(
                f"teacher: the recipe's distill={recipe.distill:g}, distill_features="
                f"{recipe.distill_features:g} {need}"
            )
        self.recipe, self.model, self.teacher = recipe, model, teacher
        self.names: tuple[str, ...] = ()
        self._ours: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        if teacher is not None and recipe.distill_features > 0:
            self.names = shared_maps(teacher, model, example)
            if not self.names:
                raise ValueError(
                    f"distill_features={recipe.distill_features:g}: the network and its teacher have no "
                    "map of one name and shape"
                )

    @contextmanager
    def following(self) -> Iterator[None]:
        """Record the maps of both networks within the context."""
        networks = ((self.model, self._ours), (self.teacher, self._theirs))
        handles = [
            network.get_submodule(name).register_forward_hook(_keeping(kept, name))
            for network, kept in networks
            if network is not None
            for name in self.names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._ours.clear()
            self._theirs.clear()

    def asked(self, images: Tensor) -> Tensor | None:
        """Return the teacher's scores; None without a teacher."""
        if self.teacher is None:
            return None
        with inference_mode_of(self.teacher):
            scores: Tensor = self.teacher(images)
        return scores.float()

    def of_scores(self, scores: Tensor, answers: Tensor, wanted: Tensor | None) -> Tensor:
        """Return cross-entropy with the labels, or its mixture with the teacher's outputs."""
        heat, share = self.recipe.temperature, self.recipe.distill
        scores = scores.float()
        # labels with no share in the loss are not read: there may be none
        plain = F.cross_entropy(scores, answers, reduction="sum") if share < 1 else scores.new_zeros(())
        if wanted is None or not share:
            return plain
        soft = F.kl_div(
            F.log_softmax(scores / heat, 1), F.log_softmax(wanted / heat, 1), reduction="sum", log_target=True
        )
        return (1 - share) * plain + share * heat**2 * soft

    def of_maps(self) -> Tensor | float:
        """Return the relative squared distance between the maps of both networks' last passes."""
        if not self.names:
            return 0.0
        far = []
        for name in self.names:
            ours, theirs = (kept.pop(name).float().flatten(1) for kept in (self._ours, self._theirs))
            size = theirs.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
            far.append(((ours - theirs).square().sum(1) / size).sum())
        return self.recipe.distill_features * torch.stack(far).mean()


def shared_maps(teacher: nn.Module, model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return the modules with the teacher's last map of each resolution that the other network has too.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU())
        >>> shared_maps(net, net, torch.zeros(1, 3, 8, 8))
        ('1', '3')
    """
    shapes, ours = _map_shapes(teacher, example), _map_shapes(model, example)
    # a later module of the same resolution replaces an earlier one
    last = {shape[2:]: name for name, shape in shapes.items() if ours.get(name) == shape}
    return tuple(name for size, name in last.items() if min(size) > 1)


def _map_shapes(model: nn.Module, example: Tensor) -> dict[str, torch.Size]:
    """Return the shape of each inner module's output that is a map, in the order in which they finish."""
    found: dict[str, torch.Size] = {}

    def noting(name: str) -> Hook:
        def note(_module: nn.Module, _inputs: object, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                found.pop(name, None)
                found[name] = output.shape

        return note

    handles = [m.register_forward_hook(noting(n)) for n, m in model.named_modules() if n]
    try:
        with inference_mode_of(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _keeping(kept: dict[str, Tensor], name: str) -> Hook:
    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        kept[name] = output

    return keep
