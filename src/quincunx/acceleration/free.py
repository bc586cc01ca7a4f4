"""What makes a network faster and costs nothing to make: another number format, a smaller input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quincunx.acceleration.target import Target
from quincunx.measure.tasks.scale import Scale
from quincunx.measure.tasks.structure import tensors_in
from quincunx.methods.points import Point
from quincunx.modules import inference_mode_of

__all__ = [
    "FreeChoice",
    "SmallerInput",
    "format_to_use",
    "meets",
    "scaled_inputs",
    "size_to_use",
    "sizes_refused",
    "smaller_sizes",
]

# of an image's sides, that are tried
SHARES = (0.875, 0.75, 0.625, 0.5)
# sides are whole multiples of the first, or of the second where they are shorter than the third
_MULTIPLE, _SMALL_MULTIPLE, _SHORT = 8, 2, 64
# what a format may lose of the points that may be lost, or of the score where none are named
_SHARE_FOR_FORMAT, _LITTLE_POINTS, _LITTLE_SHARE = 0.25, 0.2, 0.002


@dataclass(frozen=True)
class FreeChoice:
    """A number format and an input size of a network that otherwise stays as it is.

    Attributes:
        dtype: number format of inference; None for float32.
        size: height and width to which images are scaled; None for their own.
    """

    dtype: torch.dtype | None = None
    size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Return it in words.

        Example:
            >>> FreeChoice(torch.bfloat16, (24, 24)).name
            'bfloat16, input 24 x 24'
        """
        parts = [] if self.dtype is None else [self.format_name]
        parts += [] if self.size is None else [f"input {self.size[0]} x {self.size[1]}"]
        return ", ".join(parts) or "as it is"

    @property
    def format_name(self) -> str:
        """Return the number format's name."""
        return str(self.dtype or torch.float32).removeprefix("torch.")


@dataclass(frozen=True)
class SmallerInput:
    """The network as it is with smaller images, in place of a method: a point of a comparison.

    Attributes:
        share: of the images' sides.

    Raises:
        ValueError: a share that is not in (0, 1).
    """

    share: float
    name: ClassVar[str] = "input"
    targets: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share!r}: expected a number in (0, 1)")

    def size_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width for images of a size, whole multiples of 8, or of 2 below 64.

        Example:
            >>> SmallerInput(0.75).size_for((227, 227)), SmallerInput(0.75).size_for((32, 48))
            ((168, 168), (24, 36))
        """
        multiple = _MULTIPLE if min(size) >= _SHORT else _SMALL_MULTIPLE
        height, width = (int(side * self.share) // multiple * multiple for side in size)
        return height, width

    @classmethod
    def sweep(cls) -> list[Point]:
        """Return the shares that draw its curve of accuracy against speed."""
        return [Point("smaller input", f"{share:g} of each side", cls(share)) for share in SHARES]


@contextmanager
def scaled_inputs(network: nn.Module, size: tuple[int, int] | None) -> Iterator[None]:
    """Within: a network scales its images down first, bilinear with antialiasing; with None it does not.

    Example:
        >>> net = nn.Flatten()
        >>> with scaled_inputs(net, (4, 4)):
        ...     net(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 48])
    """
    if size is None:
        yield
        return
    handle = network.register_forward_pre_hook(partial(_scaled, size))
    try:
        yield
    finally:
        handle.remove()


def _scaled(size: tuple[int, int], _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *others = given
    return (F.interpolate(first, size, mode="bilinear", antialias=True), *others)


def smaller_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the sizes that are tried for images of a size, largest first: 7/8 to 1/2 of their sides.

    Example:
        >>> smaller_sizes((224, 224)), smaller_sizes((32, 32))
        ([(192, 192), (168, 168), (136, 136), (112, 112)], [(28, 28), (24, 24), (20, 20), (16, 16)])
    """
    found = dict.fromkeys(SmallerInput(share).size_for(size) for share in SHARES)
    return [(h, w) for h, w in found if min(h, w) > 0 and (h, w) != size]


def sizes_refused(
    model: nn.Module, image: Tensor, sizes: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], str]:
    """Return the sizes at which a network has no answer that stands for the one to the whole image, and why.

    An answer of another shape, as a map's, is to another question: segmentation, denoising and detection
    cannot be had from a smaller input.

    Args:
        model: the network.
        image: [1, C, H, W].
        sizes: to try.
    """
    refused: dict[tuple[int, int], str] = {}
    with inference_mode_of(model):
        wanted = _shapes(model(image))
        for size in sizes:
            try:
                with scaled_inputs(model, size):
                    found = _shapes(model(image))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                told = next(iter(str(error).splitlines()), type(error).__name__)
                refused[size] = f"the network refuses it: {told}"
                continue
            if found != wanted:
                refused[size] = "its answer has another shape"
    return refused


def _shapes(output: Any) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in tensors_in(output)]


def format_to_use(
    rows: Sequence[Mapping[str, Any]], target: Target, scale: Scale, before: float
) -> Mapping[str, Any] | None:
    """Return the row of the number format to search in, or None to stay in float32.

    It is the fastest that loses no more on the calibration images than a quarter of what may be lost, or a
    fifth of a point (of other scores two thousandths) where nothing is said.

    Args:
        rows: of :func:`quincunx.acceleration.pipeline.accelerate_trained`'s "free".
        target: of the search.
        scale: of the score.
        before: the network's score on the calibration images.
    """
    little = _LITTLE_POINTS if scale.unit == "points" else _LITTLE_SHARE * abs(before)
    allowed = little if target.max_drop is None else _SHARE_FOR_FORMAT * target.max_drop
    fit = [
        row
        for row in rows
        if row["size"] is None and row["dtype"] != "float32" and row["calibration_drop"] <= allowed
    ]
    fast = [row for row in fit if row["speedup"]["q1"] > 1]
    return max(fast, key=_speed, default=None)


def size_to_use(rows: Sequence[Mapping[str, Any]], target: Target, dtype: str) -> Mapping[str, Any] | None:
    """Return the row of the input size that meets a target on the calibration images, or None.

    Of several it is the one that loses least; if nothing but a loss is asked for, the fastest.

    Args:
        rows: as for :func:`format_to_use`.
        target: of the search.
        dtype: the format in which the network runs.
    """
    fit = [row for row in rows if row["size"] is not None and row["dtype"] == dtype and meets(row, target)]
    if target.to_dict().keys() == {"max_drop"}:
        return max(fit, key=_speed, default=None)
    return min(fit, key=lambda row: (row["calibration_drop"], -_speed(row)), default=None)


def meets(row: Mapping[str, Any], target: Target) -> bool:
    """Return whether a row's speed, MACs and loss on the calibration images are those asked for."""
    if target.max_drop is not None and row["calibration_drop"] > target.max_drop:
        return False
    if target.speedup is not None:
        return _speed(row) >= target.speedup
    if target.latency_ms is not None:
        return bool(1e3 * row["seconds"] <= target.latency_ms)
    return target.macs is None or bool(row["macs"] <= target.macs_of(row["macs_before"]))


def _speed(row: Mapping[str, Any]) -> float:
    return float(row["speedup"]["median"])
