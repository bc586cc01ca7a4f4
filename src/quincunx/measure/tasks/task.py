"""What a network is for: how a batch is read, the loss, the score, and the distance between two outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quincunx.measure.tasks.doing import digest_of
from quincunx.measure.tasks.scale import Scale
from quincunx.measure.tasks.structure import mapped, tensors_in

__all__ = ["BadTask", "Figure", "Task", "read_pair", "relative_distance"]

# (output, target) -> one number for each image
Measure = Callable[[Any, Any], Tensor]
# the names under which a dictionary holds its input and its target
INPUTS = ("pixel_values", "images", "image", "imgs", "img", "inputs", "input", "x", "data")
TARGETS = ("labels", "label", "targets", "target", "masks", "mask", "y")


class BadTask(ValueError):
    """A task's functions do not fit the network or the data; the message names task and function."""


@dataclass(frozen=True)
class Figure:
    """A further figure of merit that is reported beside the score.

    Attributes:
        of: (output, target) -> [N, ...], what each image contributes.
        total: (sum over all images, number of images) -> the figure; by default the mean.
        scale: name, unit and direction.

    Example:
        >>> error = Figure(lambda y, target: (y - target).abs().flatten(1).mean(1), Scale("MAE", ""))
        >>> error.total(torch.tensor(6.0), 3)
        2.0
    """

    of: Measure
    scale: Scale
    total: Callable[[Tensor, int], float] = lambda total, images: float(total) / images


def read_pair(batch: Any) -> tuple[Any, Any]:
    """Return the input and the target of a batch: a pair, a dictionary with usual names, or only an input.

    Raises:
        TypeError: another structure.

    Example:
        >>> image = torch.zeros(1, 3, 8, 8)
        >>> read_pair({"image": image, "mask": image[:, 0]})[1].shape, read_pair(image)[1]
        (torch.Size([1, 8, 8]), None)
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        places = [next((n for n in names if n in batch), None) for names in (INPUTS, TARGETS)]
        if places[0] is not None:
            return batch[places[0]], None if places[1] is None else batch[places[1]]
        raise TypeError(
            f"batch: a dictionary with {', '.join(map(repr, batch))}, expected an input under one of "
            f"{', '.join(INPUTS[:3])}; give the task a read"
        )
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    raise TypeError(
        f"batch: a {type(batch).__name__}, expected (input, target), a dictionary or a tensor; give the task "
        "a read"
    )


def relative_distance(output: Any, original: Any) -> Tensor:
    r"""Return how far outputs of any structure are from another network's, for each image, [N].

    .. math:: d = \frac{1}{K} \sum_k \lVert y_k - y'_k \rVert^2 / \lVert y'_k \rVert^2

    over the K tensors of the output, each [N, ...]; of whole numbers and truth values the share of those
    that differ. A tensor whose original is all zeros counts with its own squares.

    Args:
        output: a tensor, or tuples, lists, dictionaries or dataclasses of tensors.
        original: the same structure.

    Raises:
        BadTask: another structure, tensors of other shapes, or tensors that do not begin with the images.

    Example:
        >>> relative_distance({"a": torch.ones(2, 4)}, {"a": torch.tensor([[2.0] * 4, [1.0] * 4])})
        tensor([0.2500, 0.0000])
    """
    try:
        ours, theirs = list(tensors_in(output)), list(tensors_in(original))
    except TypeError as error:
        raise BadTask(f"the network gives {error}") from error
    if [name for name, _ in ours] != [name for name, _ in theirs] or not ours:
        names = [", ".join(repr(name) for name, _ in some) or "nothing" for some in (ours, theirs)]
        raise BadTask(f"outputs of other structure: {names[0]}, where the original network gives {names[1]}")
    count = ours[0][1].shape[0] if ours[0][1].dim() else None
    parts = []
    for (name, y), (_, wanted) in zip(ours, theirs, strict=True):
        if y.shape != wanted.shape or not y.dim() or y.shape[0] != count:
            raise BadTask(
                f"output {name!r}: shapes {tuple(y.shape)} and {tuple(wanted.shape)} of the original "
                "cannot be "
                "compared image by image; expected two equal shapes that begin with the images (let the "
                "network "
                "return its maps before such as boxes are chosen from them)"
            )
        if y.is_complex():
            y, wanted = torch.view_as_real(y), torch.view_as_real(wanted.to(y.dtype))
        first, second = y.flatten(1) if y.dim() > 1 else y[:, None], wanted.reshape(y.shape[0], -1)
        if y.is_floating_point():
            size = second.float().square().sum(1)
            parts.append((first.float() - second.float()).square().sum(1) / torch.where(size > 0, size, 1.0))
        else:
            parts.append((first != second).float().mean(1))
    return torch.stack(parts).mean(0)


@dataclass(frozen=True)
class Task:
    r"""What a network is for: how a batch is read, the loss, the score, how outputs are compared.

    It serves everywhere: calibration, impact masks, searches, fine-tuning, judging and reports. Ready tasks
    are functions of ``qx.tasks``: ``classification``, ``multilabel``, ``segmentation``, ``image_to_image``,
    ``agreement``.

    Args:
        name: in messages and results.
        loss: (output, target) -> losses of the images, [N], or their mean, a scalar; with a gradient.
        score: (output, target) -> scores of the images, [N]. The score of a set is their mean, so that two
            networks can be compared image by image.
        scale: the score's name, unit and direction, such as ``qx.tasks.Scale("PSNR", "dB", "higher")``.
        distance: (output, original's output) -> distances of the images, [N], 0 where both are equal and with
            a gradient: of searches and of learning from a teacher; by default
            :func:`quincunx.measure.tasks.relative_distance`.
        tempered: whether ``distance`` takes ``temperature=``, as the divergence of softened distributions.
        read: a batch of the data -> (input, target); by default :func:`quincunx.measure.tasks.read_pair`.
        further: more figures that are reported, by name.
        against: what ``loss`` and ``score`` get as the target: "targets" of the data, or "original", the
            original network's output; then no labels are needed.
        understand: (output, target, number of the batch) -> the target in the form that loss and score take,
            of calibration data given in Python.
        impact: (output, target) -> a scalar, the loss of impact masks; by default the sum of ``loss``.
        classifies: whether outputs are scores of classes [N, classes], the score is the share of wrong
            answers, and impact masks without labels take the network's own answers for them.

    Raises:
        TypeError: a field of another kind.
        ValueError: another ``against``.

    Example:
        >>> depth = Task(
        ...     "depth",
        ...     loss=lambda output, target: (output - target).abs().flatten(1).mean(1),
        ...     score=lambda output, target: (output - target).square().flatten(1).mean(1).sqrt(),
        ...     scale=qx.tasks.Scale("RMSE", "m", "lower"),
        ... )
        >>> depth.scores(torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)).tolist()
        [1.0, 1.0]
    """

    name: str
    loss: Measure
    score: Measure
    scale: Scale
    _: KW_ONLY
    distance: Callable[..., Tensor] = relative_distance
    tempered: bool = False
    read: Callable[[Any], tuple[Any, Any]] = read_pair
    further: Mapping[str, Figure] = field(default_factory=dict)
    against: str = "targets"
    understand: Callable[[Any, Any, int], Any] = lambda output, target, index: target
    impact: Callable[[Any, Any], Tensor] | None = None
    classifies: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name={self.name!r}: expected a text")
        for part in ("loss", "score", "distance", "read", "understand"):
            if not callable(getattr(self, part)):
                raise TypeError(f"{part}={getattr(self, part)!r}: expected a function")
        if not isinstance(self.scale, Scale):
            raise TypeError(f"scale={self.scale!r}: expected a qx.tasks.Scale, such as Scale('PSNR', 'dB')")
        if self.against not in ("targets", "original"):
            raise ValueError(f"against={self.against!r}: expected 'targets' or 'original'")
        for name, figure in self.further.items():
            if not isinstance(figure, Figure):
                raise TypeError(f"further[{name!r}]={figure!r}: expected a qx.tasks.Figure")

    @property
    def needs_original(self) -> bool:
        """Return whether targets are the original network's outputs."""
        return self.against == "original"

    def losses(self, output: Any, target: Any, images: int | None = None) -> Tensor:
        """Return the losses of a batch's images, [N].

        Args:
            output: of the network.
            target: what it is compared with.
            images: N, where it is known; by default as many as the output begins with.

        Raises:
            BadTask: ``loss`` fails, or returns something else.
        """
        return self._of_images(self._called("loss", self.loss, output, target), output, images)

    def _of_images(self, found: Any, output: Any, images: int | None) -> Tensor:
        """Return what ``loss`` gave as a loss of each image."""
        if isinstance(found, Tensor) and found.dim() == 0:
            count = _images_in(output) if images is None else images
            return found[None] if count is None else found.expand(count)
        return self._checked("loss", found, output, images)

    def scores(self, output: Any, target: Any, images: int | None = None) -> Tensor:
        """Return the scores of a batch's images, [N], in float64; arguments as for :meth:`losses`.

        Raises:
            BadTask: ``score`` fails, or returns something else.
        """
        with torch.no_grad():
            found = self._called("score", self.score, output, target)
            if isinstance(found, (np.ndarray, list)):
                # of a library of scores
                found = torch.as_tensor(np.asarray(found))
            return self._checked("score", found, output, images).double()

    def distances(
        self, output: Any, original: Any, temperature: float = 1.0, images: int | None = None
    ) -> Tensor:
        """Return the distances of a batch's outputs from another network's, [N].

        Raises:
            BadTask: ``distance`` fails, or returns something else.
        """
        more = {"temperature": temperature} if self.tempered else {}
        found = self._called("distance", self.distance, output, original, **more)
        return self._checked("distance", found, output, images)

    def figure(self, name: str, output: Any, target: Any) -> Tensor:
        """Return what each image of a batch contributes to a further figure, [N, ...], in float64.

        Raises:
            BadTask: the figure's function fails.
        """
        with torch.no_grad():
            found: Tensor = self._called(f"figure {name!r}", self.further[name].of, output, target)
            return found.double()

    def impact_loss(self, output: Any, target: Any) -> Tensor:
        r"""Return the scalar whose gradient says which positions matter.

        It is the sum of the losses. Without targets, where the network is compared with itself, every loss
        is at its minimum and has no gradient; there it is half the squared norm of each output relative to
        its own size, so that the impact of a position is its share of the outputs.
        """
        if self.impact is not None:
            return self.impact(output, target)
        if target is not None and not self.needs_original:
            found = self._called("loss", self.loss, output, self.understand(output, target, 0))
            # of how many images an output is, it need not say
            each = isinstance(found, Tensor) and found.dim() == 1
            return found.sum() if each else self._of_images(found, output, None).sum()
        parts = [y.float().flatten(1) for _, y in tensors_in(output) if y.is_floating_point() and y.dim()]
        sizes = [y.detach().square().sum(1).clamp_min(torch.finfo(torch.float32).tiny) for y in parts]
        return torch.stack(
            [(y.square().sum(1) / (2 * s)).sum() for y, s in zip(parts, sizes, strict=True)]
        ).sum()

    def taught_by(self, original: Any) -> Any:
        """Return an output of the original network as a target: detached and in float32."""
        return mapped(lambda t: t.detach().float() if t.is_floating_point() else t.detach(), original)

    @property
    def impact_function(self) -> Callable[[Any, Any], Tensor] | None:
        """Return :meth:`impact_loss`; None in classification, where methods know the loss themselves."""
        return None if self.classifies and self.impact is None else self.impact_loss

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the score's scale, JSON-ready: what a result file says of the task."""
        return {"name": self.name, "score": self.scale.to_dict(), "against": self.against}

    @property
    def identity(self) -> dict[str, Any]:
        """Return what tells the task from others, JSON-ready: :meth:`to_dict`, and a digest of what its
        functions do, so that nothing is taken over from before they were changed."""
        own = (self.loss, self.score, self.distance, self.read, self.understand, self.impact)
        digest = digest_of([*own, self.tempered, self.classifies])
        return {**self.to_dict(), "functions": digest}

    def _called(self, what: str, function: Callable[..., Any], *given: Any, **more: Any) -> Any:
        """Return what a function gives; its failure is bad input, and names task and function."""
        try:
            return function(*given, **more)
        except BadTask as error:
            raise BadTask(f"task {self.name!r}: {error}") from error
        except Exception as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
                raise
            line = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
            raise BadTask(
                f"task {self.name!r}: its {what} raises {type(error).__name__}: {line} (outputs "
                f"{_shapes(given[0])}, targets {_shapes(given[1])})"
            ) from error

    def _checked(self, what: str, found: Any, output: Any, images: int | None) -> Tensor:
        count = _images_in(output) if images is None else images
        if isinstance(found, Tensor) and found.dim() == 1 and count in (None, len(found)):
            return found
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        scalar = " or their mean, a scalar" if what == "loss" else ""
        many = "[N]" if count is None else f"[{count}]"
        raise BadTask(
            f"task {self.name!r}: its {what} gives {got}, expected one number for each image, {many}{scalar}"
        )


def _images_in(output: Any) -> int | None:
    """Return the number of images in an output; None if it does not say."""
    try:
        return next((int(t.shape[0]) for _, t in tensors_in(output) if t.dim()), None)
    except TypeError:
        return None


def _shapes(value: Any) -> str:
    try:
        found = [f"{name + ' ' if name else ''}{list(t.shape)}" for name, t in tensors_in(value)]
    except TypeError:
        return f"of type {type(value).__name__}"
    return ", ".join(found[:4]) or "none"
