"""Outputs and targets of any structure: their tensors by name, and functions applied to each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["mapped", "part_of", "tensors_in"]


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a nested value with their places: "" for a tensor itself, then "out", "boxes.0".

    Tuples, lists, mappings and dataclasses are looked into; None is passed over.

    Raises:
        TypeError: anything else; the message names its place.

    Example:
        >>> [name for name, _ in tensors_in({"out": torch.zeros(1), "more": [torch.zeros(1), None]})]
        ['out', 'more.0']
    """
    if isinstance(value, Tensor):
        yield name, value
        return
    if value is None:
        return
    for key, part in _parts(value, name):
        yield from tensors_in(part, f"{name}.{key}".lstrip("."))


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return ((str(key), part) for key, part in value.items())
    if isinstance(value, (tuple, list)):
        return ((str(i), part) for i, part in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    place = f" at {name!r}" if name else ""
    raise TypeError(
        f"a {type(value).__name__}{place}, expected tensors in tuples, lists, dictionaries or dataclasses"
    )


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a nested value with each tensor changed; anything that is no container is kept.

    Example:
        >>> mapped(lambda t: t + 1, {"a": torch.tensor(1), "b": (torch.tensor(2), "text")})
        {'a': tensor(2), 'b': (tensor(3), 'text')}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(change, part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(change, part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(change, part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: mapped(change, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def part_of(value: Any, images: slice) -> Any:
    """Return some images of a batch's nested value, whose tensors [N, ...] start with the images.

    Example:
        >>> part_of({"mask": torch.arange(4)}, slice(1, 3))
        {'mask': tensor([1, 2])}
    """
    return mapped(lambda tensor: tensor[images], value)
