"""Training losses: a task's loss, the distance from another network's outputs, and from its maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.measure.tasks import Task, classification
from quincunx.modules import inference_mode_of
from quincunx.train.recipes import Recipe

__all__ = ["Loss", "shared_maps"]

Hook = Callable[[nn.Module, object, Any], None]


class Loss:
    r"""The loss of a recipe, summed over images.

    .. math:: (1 - a) \, \ell(z, y) + a \, d(z, z')
        + b \, \frac{1}{L} \sum_l \lVert F_l - F'_l \rVert^2 / \lVert F'_l \rVert^2

    with outputs z, targets y and maps F; primes mark the teacher's. The loss l and the distance d are the
    task's: in classification the cross-entropy and T^2 KL(softmax(z'/T) || softmax(z/T)) (Hinton et al.,
    arXiv:1503.02531). Maps are hints (Romero et al., arXiv:1412.6550), here of equal shapes and therefore
    compared directly. a, T and b are the recipe's ``distill``, ``temperature`` and ``distill_features``.

    Args:
        recipe: the shares.
        model: the network that learns.
        teacher: evaluated and not changed; None for none.
        example: an input batch, used to find shared maps.
        task: by default classification.

    Raises:
        ValueError: the teacher is missing, or not used; no map in common.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        teacher: nn.Module | None,
        example: Tensor,
        task: Task | None = None,
    ) -> None:
        self.task = task or classification()
        if self.task.needs_original and teacher is None:
            raise ValueError(
                f"teacher: task {self.task.name!r} learns the outputs of another network; give a teacher"
            )
        if (teacher is not None) != (recipe.taught or self.task.needs_original):
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

    def asked(self, images: Tensor) -> Any:
        """Return the teacher's output; None without a teacher."""
        if self.teacher is None:
            return None
        with inference_mode_of(self.teacher):
            return self.task.taught_by(self.teacher(images))

    def of_outputs(self, output: Any, target: Any, wanted: Any, images: int | None = None) -> Tensor:
        """Return the task's loss, or its mixture with the distance from the teacher's output.

        Args:
            output: the network's.
            target: of the data.
            wanted: the teacher's output, or None.
            images: how many they are of, where it is known.
        """
        share = self.recipe.distill
        total: Tensor | float = 0.0
        # targets with no share in the loss are not read: there may be none
        if share < 1:
            truth = wanted if self.task.needs_original else target
            total = (1 - share) * self.task.losses(output, truth, images).sum()
        if wanted is not None and share:
            total = total + share * self.task.distances(output, wanted, self.recipe.temperature, images).sum()
        return torch.as_tensor(total)

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
