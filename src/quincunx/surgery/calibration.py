"""Run calibration data through a network: the order of layers, their inputs and their responses.

Activations are streamed batch by batch, since a layer's responses on all the data need not fit in memory.
What does fit is kept for the next layer (:mod:`quincunx.surgery.walks`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from quincunx.layers.padded import pad_map, sides_of
from quincunx.modules import evaluation, first_line
from quincunx.surgery.walks import Leg, Walk

__all__ = [
    "Batch",
    "Calibration",
    "Context",
    "Layer",
    "Responses",
    "run_order",
]

T = TypeVar("T")
# sums over a pass through a context's data, float64 by name; a function that can be sent to another process
Pass = Callable[["Context"], dict[str, Tensor]]
Pool = Callable[["Context", Pass], dict[str, Tensor]]
Visit = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that a method may replace.

    Attributes:
        name: its path in the network, empty for the network itself.
        names: all its paths; more than one if a module is used in several places.
        module: the layer, with the original weights.
        calls: how often one forward calls it; None if the network was not run.
        input_shape: [N, C, H, W] of its first input; None if the network was not run.
        output_shape: [N, C, H, W] of its first output; None if the network was not run.
    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    calls: int | None = None
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None

    @property
    def input_size(self) -> tuple[int, int]:
        """Return (H, W) of its input, with what ``padding_mode`` other than "zeros" puts around it."""
        height, width = _size(self.name, self.input_shape)
        top, bottom, left, right = sides_of(self.module) or (0, 0, 0, 0)
        return height + top + bottom, width + left + right

    @property
    def grid(self) -> tuple[int, int]:
        """Return (H', W') of its output."""
        return _size(self.name, self.output_shape)


def _size(name: str, shape: tuple[int, ...] | None) -> tuple[int, int]:
    if shape is None:
        raise ValueError(f"example_input=None: the size of layer {name!r} is needed; give an example input")
    return shape[-2], shape[-1]


@dataclass(frozen=True)
class Batch:
    """One batch of calibration data, on the network's device.

    Attributes:
        index: its number, from 0.
        input: the network's argument, or the first tensor in it: the images.
        target: the target that came with it; None if the data has only inputs.
        arguments: the network's positional arguments; by default only ``input``.
        keywords: the network's keyword arguments.
    """

    index: int
    input: Tensor
    target: Any = None
    arguments: tuple[Any, ...] | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Return whether ``input`` is the network's only argument."""
        given = (self.input,) if self.arguments is None else self.arguments
        return not self.keywords and len(given) == 1 and given[0] is self.input

    @cached_property
    def mark(self) -> str:
        """What tells the values of ``input`` from others': a digest."""
        values = self.input.detach().cpu().contiguous().flatten().view(torch.uint8)
        return hashlib.sha256(values.numpy().data).hexdigest()

    def ask(self, network: nn.Module) -> Any:
        """Return a network's output for this batch."""
        return network(*((self.input,) if self.arguments is None else self.arguments), **self.keywords)


@dataclass(frozen=True)
class _Leading:
    """The first elements of what can be read repeatedly."""

    elements: Iterable[Any]
    count: int

    def __iter__(self) -> Iterator[Any]:
        return islice(self.elements, self.count)


# keys of a dictionary that hold targets, and keys that hold inputs
_TARGETS = ("labels", "label", "targets", "target", "y")
_INPUTS = ("pixel_values", "images", "image", "imgs", "img", "inputs", "input", "x", "data")
_KINDS = inspect.Parameter


@dataclass(frozen=True)
class _Signature:
    """The arguments of a network's forward.

    Attributes:
        places: names of the positional arguments.
        required: how many of them have no default.
        names: names of the keyword arguments.
        open_places: whether it accepts any number of positional arguments.
        open_names: whether it accepts any keyword.
    """

    places: tuple[str, ...]
    required: int
    names: frozenset[str]
    open_places: bool
    open_names: bool

    @classmethod
    def of(cls, network: nn.Module) -> _Signature:
        try:
            parameters = inspect.signature(network.forward).parameters.values()
        except (TypeError, ValueError):
            return cls(("input",), 1, frozenset(), False, False)
        places = [p for p in parameters if p.kind in (_KINDS.POSITIONAL_ONLY, _KINDS.POSITIONAL_OR_KEYWORD)]
        named = [p.name for p in parameters if p.kind in (_KINDS.POSITIONAL_OR_KEYWORD, _KINDS.KEYWORD_ONLY)]
        kinds = {p.kind for p in parameters}
        return cls(
            tuple(p.name for p in places),
            sum(p.default is _KINDS.empty for p in places),
            frozenset(named),
            _KINDS.VAR_POSITIONAL in kinds,
            _KINDS.VAR_KEYWORD in kinds,
        )

    def __str__(self) -> str:
        return f"forward({', '.join(self.places)}{', ...' if self.open_places or self.open_names else ''})"


class Calibration:
    """Batches that can be read repeatedly, each in one of the usual forms.

    A batch holds the network's arguments and, if known, its target:

    - a tensor; a list or tuple of one, as a DataLoader of a TensorDataset returns;
    - (input, target);
    - several inputs in the order of the network's forward, with or without a target after them. Forward's
      signature decides: with as many elements as it requires all are inputs, and one more is a target; the
      same holds for as many, and one more, as it accepts in total. ((x1, x2), target) is always clear;
    - a dictionary. "labels", "label", "targets", "target" or "y" is the target, unless forward requires an
      argument of that name. Other keys that forward names are passed by keyword, and the rest is ignored.
      If forward names none of them, the network is called with the whole dictionary if it accepts one, else
      with the image: "pixel_values", "image", "x", "input" and the like, or the only tensor.

    A sample without a batch dimension, which the network's first convolution reads as one image, is a
    batch of one, with its target.

    Args:
        batches: an iterable of batches that restarts each time it is iterated, or a data set with
            a length.
        network: the batches are moved to its device, and its forward's signature decides their form.
        start: number of the first batch, where these are a part of all.

    Raises:
        TypeError: not iterable, or an iterator, which can be read only once.
    """

    def __init__(self, batches: Iterable[Any], network: nn.Module, start: int = 0) -> None:
        if _by_number(batches):
            batches = _Numbered(batches)
        if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
            raise TypeError(
                f"calibration: expected an iterable of batches, got {type(batches).__name__}; "
                "one batch is [batch]"
            )
        if isinstance(batches, Iterator):
            raise TypeError(
                f"calibration: a {type(batches).__name__} can be read only once, and each layer is fitted "
                "from a pass of its own; pass a list or a DataLoader"
            )
        self.batches, self.start = batches, start
        self.network = network
        self.signature = _Signature.of(network)
        # number of dimensions of an input -> whether it is one sample
        self.samples: dict[int, bool] = {}
        # whether the network accepts a dictionary none of whose keys forward names
        self.whole: bool | None = None
        parameter = next(network.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device

    def __iter__(self) -> Iterator[Batch]:
        """Yield each batch in turn.

        Raises:
            TypeError: an element in none of these forms.
            ValueError: no batches; a batch with another number of dimensions than the network reads.
        """
        index = -1
        for index, element in enumerate(self.batches, self.start):
            yield self._read(index, element)
        if index < 0:
            raise ValueError("calibration: holds no batches")

    def first(self) -> Batch:
        """Return the first batch."""
        return next(iter(self))

    def leading(self, count: int) -> Calibration:
        """Return the first ``count`` batches alone."""
        return Calibration(_Leading(self.batches, count), self.network, self.start)

    def _read(self, index: int, element: Any) -> Batch:
        arguments, keywords, target = self._parts(index, element)
        given = _brought((*arguments, *keywords.values()), self.device)
        tensors = list(_tensors(given))
        if not tensors or (isinstance(given[0], Tensor) and not given[0].dim()):
            raise TypeError(_unread(index, element, self.signature))
        target = _brought(target, self.device)
        if all(isinstance(value, Tensor) for value in given) and self._sample(index, given, tuple(keywords)):
            given = tuple(value[None] for value in given)
            target = _as_batch(target)
        arguments, values = given[: len(arguments)], given[len(arguments) :]
        return Batch(
            index, next(_tensors(given)), target, arguments, dict(zip(keywords, values, strict=True))
        )

    def _parts(self, index: int, element: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Return the network's positional and keyword arguments, and the target."""
        takes = self.signature
        if isinstance(element, Tensor):
            return (element,), {}, None
        if isinstance(element, Mapping):
            return self._from_dictionary(index, element)
        if not isinstance(element, (tuple, list)) or not element:
            raise TypeError(_unread(index, element, takes))
        first, count = element[0], len(element)
        if isinstance(first, Mapping) and count <= 2:
            arguments, keywords, target = self._from_dictionary(index, first)
            return arguments, keywords, element[1] if count == 2 else target
        if isinstance(first, (tuple, list)) and count <= 2:
            target = element[1] if count == 2 else None
            fits = takes.open_places or takes.required <= len(first) <= len(takes.places)
            return (tuple(first) if fits else (first,)), {}, target
        if not isinstance(first, Tensor):
            raise TypeError(_unread(index, element, takes))
        most, required = len(takes.places), max(1, takes.required)
        if count == 1 or (count == required and not takes.open_places):
            return tuple(element), {}, None
        if count == required + 1 or (count == most + 1 and not takes.open_places):
            return tuple(element[:-1]), {}, element[-1]
        if count == most and not takes.open_places:
            return tuple(element), {}, None
        raise TypeError(_unread(index, element, takes))

    def _from_dictionary(
        self, index: int, element: Mapping[Any, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        takes = self.signature
        required = takes.places[: takes.required]
        label = next((key for key in _TARGETS if key in element and key not in required), None)
        target = None if label is None else element[label]
        rest = {key: value for key, value in element.items() if key != label}
        keywords = {
            k: v for k, v in rest.items() if k in takes.names or (takes.open_names and type(k) is str)
        }
        if keywords:
            missing = [name for name in required if name not in keywords]
            if missing:
                raise TypeError(
                    f"calibration: batch {index} has {_keys(element)}, but {takes} needs {missing[0]!r} too"
                )
            if list(keywords) == list(takes.places[:1]):
                return tuple(keywords.values()), {}, target
            # the images come first, whatever the order of the keys
            return (), {k: keywords[k] for k in sorted(keywords, key=_place_of(takes))}, target
        tensors = [key for key, value in rest.items() if isinstance(value, Tensor)]
        key = next((key for key in _INPUTS if key in tensors), tensors[0] if len(tensors) == 1 else None)
        if len(required) <= 1 and self._takes_whole(element):
            return (dict(element),), {}, target
        if key is None or len(required) > 1:
            raise TypeError(
                f"calibration: batch {index} is a {type(element).__name__} of {_keys(element)}, which "
                f"{takes} does not name, and the network cannot be called with it"
            )
        return (rest[key],), {}, target

    def _takes_whole(self, element: Mapping[Any, Any]) -> bool:
        """Return whether the network can be called with a dictionary; tries it once."""
        if self.whole is None:
            try:
                with evaluation(self.network), torch.no_grad():
                    self.network(_brought(dict(element), self.device))
                self.whole = True
            except (TypeError, AttributeError):
                # the exceptions of code that treats a dictionary as a tensor
                self.whole = False
        return self.whole

    def _sample(self, index: int, given: tuple[Tensor, ...], names: tuple[str, ...]) -> bool:
        """Return whether these are one sample: the first convolution then gets no batch dimension.

        Raises:
            ValueError: it gets neither a batch nor a sample.
        """
        dims = given[0].dim()
        if dims >= 4:
            return False
        if dims not in self.samples:
            reads = self._read_by_first(given, names)
            if reads == 0 and self._read_by_first(tuple(value[None] for value in given), names) == 4:
                reads = 3  # a forward that needs a batch raised before its first convolution
            if reads not in (None, 3, 4):
                raise ValueError(
                    f"calibration: batch {index} has shape {tuple(given[0].shape)}, which the network cannot "
                    "read; expected batches [N, C, H, W]; one (input, target) pair is [(input, target)]"
                )
            self.samples[dims] = reads == 3
        return self.samples[dims]

    def _read_by_first(self, given: tuple[Tensor, ...], names: tuple[str, ...]) -> int | None:
        """Return the dimensions of the first convolution's input: None without one, 0 if forward raises."""
        found: list[int] = []

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            found.append(inputs[0].dim() if inputs and isinstance(inputs[0], Tensor) else 0)
            raise _Reached

        convolutions = [module for module in self.network.modules() if isinstance(module, nn.Conv2d)]
        if not convolutions:
            return None
        places = len(given) - len(names)
        with ExitStack() as stack:
            for module in convolutions:
                stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.enter_context(evaluation(self.network))
            stack.enter_context(torch.no_grad())
            try:
                self.network(*given[:places], **dict(zip(names, given[places:], strict=True)))
            except _Reached:
                return found[0]
            except Exception:  # noqa: BLE001 - a user's forward may raise anything for such an input
                return 0
        return None


class _Numbered:
    """A data set that is read by index, as often as asked."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return (self.items[i] for i in range(len(self.items)))


def _by_number(batches: object) -> bool:
    """Return whether an object has a length and elements by index, but no iteration of its own."""
    parts = hasattr(batches, "__len__") and hasattr(batches, "__getitem__")
    return parts and not isinstance(batches, Iterable)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def _brought(value: Any, device: torch.device) -> Any:
    """Move a value to a device; tensors of inference mode, which have no gradient, become ordinary ones."""
    if isinstance(value, Tensor):
        value = value.to(device)
        if not value.is_inference():
            return value
        with torch.inference_mode(False):
            return value.clone()
    if isinstance(value, Mapping):
        return {key: _brought(one, device) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        moved = [_brought(one, device) for one in value]
        return tuple(moved) if isinstance(value, tuple) else moved
    return value


def _as_batch(target: Any) -> Any:
    """Return a sample's target as the target of a batch of one."""
    if isinstance(target, Tensor):
        return target[None]
    if isinstance(target, Mapping):
        return {key: _as_batch(one) for key, one in target.items()}
    return target if target is None else [target]


def _place_of(takes: _Signature) -> Callable[[str], int]:
    return lambda name: takes.places.index(name) if name in takes.places else len(takes.places)


def _keys(element: Mapping[Any, Any]) -> str:
    return "the keys " + ", ".join(repr(key) for key in list(element)[:8]) if element else "no keys"


def _unread(index: int, element: Any, takes: _Signature) -> str:
    """Describe why an element is not a batch."""
    several = f" of {len(element)}" if isinstance(element, (tuple, list)) else ""
    return (
        f"calibration: batch {index} is a {type(element).__name__}{several}; expected an input tensor "
        f"[N, C, H, W], an (input, target) pair, a dictionary, or the arguments of {takes} and a target"
    )


# the most bytes of maps that are kept instead of being recomputed
MOST_KEPT = 2 << 30


class _Reached(BaseException):
    """Ends a forward at the requested layer; not an Exception, so that no error handler catches it."""


def run_order(
    network: nn.Module,
    example_input: Tensor | tuple[Any, ...] | None,
    data: Calibration | None,
    *,
    changed: bool = False,
) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] | None:
    """Return the modules in the order of their first call: name -> (calls, input shape, output shape).

    Shapes are empty if a module takes or returns anything but one tensor. None if there
    is nothing to run the network on. Errors of a ``changed`` network are not blamed on
    the data.

    Raises:
        TypeError: ``example_input`` is neither a tensor nor a tuple.
        ValueError: the network cannot run the first batch of the data.
    """
    if example_input is None and data is None:
        return None
    if example_input is None:
        example = data.first()  # type: ignore[union-attr]
    elif isinstance(example_input, (Tensor, tuple)):
        arguments = example_input if isinstance(example_input, tuple) else (example_input,)
        example = Batch(0, arguments[0] if arguments else torch.empty(0), arguments=arguments)
    else:
        raise TypeError(f"example_input: expected a tensor or a tuple, got {type(example_input).__name__}")
    found: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {}
    with ExitStack() as stack:
        for name, module in network.named_modules():

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                # a module starts before those it calls; we ask about layers, so order by entry
                found.setdefault(name, (0, (), ()))

            def leave(_: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                calls, first_in, first_out = found[name]
                if not calls and len(inputs) == 1 and isinstance(inputs[0], Tensor):
                    first_in = tuple(inputs[0].shape)
                    first_out = tuple(output.shape) if isinstance(output, Tensor) else ()
                found[name] = (calls + 1, first_in, first_out)

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, prepend=True).remove)
        stack.enter_context(evaluation(network))
        with torch.no_grad():
            try:
                example.ask(network)
            except Exception as error:
                if example_input is not None or changed:
                    raise
                shape = f"{tuple(example.input.shape)}, {str(example.input.dtype).removeprefix('torch.')}"
                raise ValueError(
                    f"calibration: batch 0 ({shape}) cannot be run by the network, which raises "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
    return found


class Shortcut(Protocol):
    """Provides a layer's inputs without running the network from its own input."""

    def inputs(self, network: nn.Module, names: Sequence[str]) -> Iterator[Tensor] | None:
        """Return the inputs of the first call of a layer with these names, batch by batch, or None."""


class Responses:
    """Pairs (input in the changed network, response of the original layer) of one layer, batch by batch.

    With ``padded``, inputs have around them what ``padding_mode`` other than "zeros" puts there.
    Iterating runs both networks up to the layer, once per batch of calibration data, starting from the
    context's shortcut if there is one, else from the layer before where its values were kept. A context that
    keeps values keeps the original network's pairs, if they are not too large.

    Raises:
        ValueError: while iterating: a value that is not finite, or a batch for which the layer is
            not called; the message names layer and batch.
    """

    def __init__(self, context: Context, layer: Layer, padded: bool = False) -> None:
        self.context, self.layer = context, layer
        self.sides = sides_of(layer.module) if padded else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        original, network, kept = self.context.original, self.context.network, self.context.kept
        name = self.layer.name
        key, held = ("responses", name), 0
        known: list[tuple[Tensor, Tensor]] = kept.get(key, []) if kept is not None else []
        found: list[tuple[Tensor, Tensor]] = []
        before = None if known else self._shortcut(original)
        now = self._shortcut(network) if self.context.changed else None
        first = second = None
        if self.context.shortcut is None:
            names, walks = self.layer.names, self.context.walks
            first = None if known else walks[0].leg(original, names)
            second = walks[1].leg(network, names) if self.context.changed else None
        for batch in self.context.data:
            with evaluation(original), evaluation(network), torch.no_grad():
                if known:
                    pair = known[batch.index]
                elif before is not None:
                    seen = next(before)
                    pair = seen, self.layer.module(seen)
                elif (walked := _walked(first, batch)) is not None:
                    pair = walked, self.layer.module(walked)
                else:
                    pair = _run_to(original, name, batch, True)
                seen, response = pair
                if now is not None:
                    seen = next(now)
                elif (walked := _walked(second, batch)) is not None:
                    seen = walked
                elif self.context.changed:
                    seen, _ = _run_to(network, name, batch, False)
            _check_finite(name, batch.index, seen, response)
            held += sum(t.numel() * t.element_size() for t in pair)
            if kept is not None and held <= MOST_KEPT:
                found.append(pair)
            else:
                found.clear()
            if self.sides is not None:
                seen = pad_map(seen, self.sides, str(self.layer.module.padding_mode))
            yield seen, response
        if kept is not None and held <= MOST_KEPT:
            kept[key] = found

    def _shortcut(self, network: nn.Module) -> Iterator[Tensor] | None:
        shortcut = self.context.shortcut
        if shortcut is None:
            return None
        with evaluation(network):
            return shortcut.inputs(network, self.layer.names)


def _walked(leg: Leg | None, batch: Batch) -> Tensor | None:
    """Return a layer's input for a batch, if it can be had without the network's own forward."""
    return leg.input(batch.index, batch.input, batch.mark) if leg is not None and batch.plain else None


def _run_to(network: nn.Module, name: str, batch: Batch, answer: bool) -> tuple[Tensor, Tensor]:
    """Return the input and, if wanted, the output of a layer; the forward ends there."""
    caught: list[Tensor] = []
    module = network.get_submodule(name)

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        # copies, since later operations may write in place
        caught.append(inputs[0].clone())
        if not answer:
            raise _Reached

    def leave(_: nn.Module, __: Any, output: Tensor) -> None:
        caught.append(output)
        raise _Reached

    # the input after a user's hooks, the output before they change it: the layer's own computation
    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, prepend=True)]
    try:
        batch.ask(network)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not caught:
        raise ValueError(f"calibration: batch {batch.index} never reaches layer {name!r}")
    return caught[0], caught[-1]


def _check_finite(name: str, index: int, *tensors: Tensor) -> None:
    # a finite sum has no term that is not, and needs no memory; a large one need not mean anything
    if not all(bool(t.sum().isfinite()) or bool(t.isfinite().all()) for t in tensors):
        raise ValueError(
            f"calibration: layer {name or '(network)'!r}: batch {index} gives a value that is not finite"
        )


class Context:
    """The network before and after the changes so far, and the data.

    Attributes:
        original: the user's network, read only.
        network: the copy that is being changed.
        changed: whether one of its layers has been replaced.
        walks: what both networks computed in front of the layer that was fitted last.
        pairs: convolutions with only a norm and an activation between them, on one grid.
        kept: the values that :meth:`once` keeps; None to keep nothing.
        shortcut: provides layers' inputs; None if networks run from their own inputs.
        loss: of (output, target), the scalar whose gradient says which positions matter; None for the
            cross-entropy with labels or the network's own predictions.
        pool: adds up what several processes sum over their shares of the data; None for this one alone.
    """

    pool: Pool | None = None
    pairs: tuple[tuple[Layer, Layer], ...] = ()
    kept: dict[Any, Any] | None = None
    shortcut: Shortcut | None = None
    loss: Callable[[Any, Any], Tensor] | None = None

    def __init__(self, original: nn.Module, network: nn.Module, calibration: Calibration | None) -> None:
        self.original, self.network, self.calibration = original, network, calibration
        self.changed = False
        self.walks = Walk(), Walk()

    @property
    def data(self) -> Calibration:
        """The calibration data.

        Raises:
            ValueError: there is none.
        """
        if self.calibration is None:
            raise ValueError("calibration=None: this method is fitted on data; give it input batches")
        return self.calibration

    def responses(self, layer: Layer, padded: bool = False) -> Responses:
        """Return pairs of a layer's input in the changed network and its response in the original one.

        With ``padded``, an input has around it what ``padding_mode`` other than "zeros" puts there.
        """
        return Responses(self, layer, padded)

    def total(self, work: Pass) -> dict[str, Tensor]:
        """Return the sums of a pass through the data, of which several processes may each read a share."""
        return work(self) if self.pool is None else self.pool(self, work)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return ``make()``; keep it by key while no layer is changed, if ``kept`` is a dict."""
        if self.kept is None or self.changed:
            return make()
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found

    def survey(self, layers: Sequence[Layer], visit: Visit) -> None:
        """Run the original network once over the data: ``visit(name, input, output)`` at each call.

        Inputs have around them what ``padding_mode`` other than "zeros" puts there.

        Raises:
            ValueError: a value that is not finite.
        """
        with ExitStack() as stack:
            at = 0
            for layer in layers:

                def see(
                    conv: nn.Module, inputs: tuple[Any, ...], output: Tensor, name: str = layer.name
                ) -> None:
                    _check_finite(name, at, inputs[0], output)
                    sides = sides_of(conv)
                    seen = inputs[0] if sides is None else pad_map(inputs[0], sides, str(conv.padding_mode))
                    visit(name, seen, output)

                module = self.original.get_submodule(layer.name)
                stack.callback(module.register_forward_hook(see, prepend=True).remove)
            stack.enter_context(evaluation(self.original))
            stack.enter_context(torch.no_grad())
            for batch in self.data:
                at = batch.index
                batch.ask(self.original)
