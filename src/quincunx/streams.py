"""What calibration data does inside a network: which layers run when, on what, and what they answer.

Activations are streamed batch by batch and never kept: a layer's responses on all the data would
not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Batch", "Calibration", "Context", "Layer", "Responses", "evaluation", "run_order"]

T = TypeVar("T")
Visit = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that a method may replace.

    Attributes:
        name: its path in the network, empty for the network itself.
        names: all its paths; more than one where a module is used in several places.
        module: the layer itself, with the original weights.
        calls: how often one forward calls it; None where the network was not run.
        input_shape, output_shape: [N, C, H, W] of its first call; None where it was not run.
    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    calls: int | None = None
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) of its input."""
        return _size(self.name, self.input_shape)

    @property
    def grid(self) -> tuple[int, int]:
        """(H', W') of its output."""
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
        input: what the network is called with.
        target: what came with it; None where the data has only inputs.
    """

    index: int
    input: Tensor
    target: Any = None


class Calibration:
    """Batches that can be read again and again.

    Args:
        batches: an iterable of tensors, or of (input, target) pairs, that starts anew each time it is
            iterated.
        network: whose device the batches are brought to.

    Raises:
        TypeError: not iterable, or an iterator, which can be read only once.
    """

    def __init__(self, batches: Iterable[Any], network: nn.Module) -> None:
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            raise TypeError(
                f"calibration: expected an iterable of batches, got {type(batches).__name__}; "
                "one batch is [batch]"
            )
        if isinstance(batches, Iterator):
            raise TypeError(
                f"calibration: a {type(batches).__name__} can be read only once, and each layer is fitted "
                "from a pass of its own; pass a list or a DataLoader"
            )
        self.batches = batches
        parameter = next(network.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device

    def __iter__(self) -> Iterator[Batch]:
        """Each batch in turn.

        Raises:
            TypeError: an element that is neither a tensor nor a pair that begins with one.
            ValueError: no batches.
        """
        index = -1
        for index, element in enumerate(self.batches):
            pair = isinstance(element, (tuple, list)) and len(element) == 2
            x, target = element if pair else (element, None)
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"calibration: batch {index} is a {type(element).__name__}; expected an input tensor or "
                    "an (input, target) pair"
                )
            if isinstance(target, Tensor):
                target = target.to(self.device)
            yield Batch(index, x.to(self.device), target)
        if index < 0:
            raise ValueError("calibration: holds no batches")


# bytes of maps that are kept instead of being computed again
MOST_KEPT = 2 << 30


@contextmanager
def evaluation(network: nn.Module) -> Iterator[None]:
    """Within: every module in evaluation mode; each module's own mode after."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Reached(BaseException):
    """Ends a forward at the layer that was asked for; no error, so that no handler of errors sees it."""


def run_order(
    network: nn.Module, example_input: Tensor | tuple[Any, ...] | None, data: Calibration | None
) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] | None:
    """Modules in the order of their first call: name -> (calls, input shape, output shape).

    Shapes are empty where a module takes or returns something else than one tensor. None where there
    is nothing to run the network on.

    Raises:
        TypeError: ``example_input`` is neither a tensor nor a tuple.
    """
    if example_input is None and data is None:
        return None
    if example_input is None:
        arguments: tuple[Any, ...] = (next(iter(data)).input,)  # type: ignore[arg-type]
    elif isinstance(example_input, (Tensor, tuple)):
        arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    else:
        raise TypeError(f"example_input: expected a tensor or a tuple, got {type(example_input).__name__}")
    found: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {}
    with ExitStack() as stack:
        for name, module in network.named_modules():

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                # a module begins before those it calls; layers are what is asked about, so order by entry
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
            network(*arguments)
    return found


class Shortcut(Protocol):
    """A way to what a layer reads that does not begin at the network's input."""

    def inputs(self, network: nn.Module, names: Sequence[str]) -> Iterator[Tensor] | None:
        """What the first call of a layer, which has these names, reads of each batch; None without a way."""


class Responses:
    """Pairs (input in the changed network, response of the original layer) of one layer, batch by batch.

    Iterating runs both networks up to the layer, once for each batch of calibration data, from where the
    context has a shortcut. A context that keeps things keeps what the original network gives, where that
    is not too much.

    Raises:
        ValueError: while iterating: a value that is not finite, or a batch for which the layer is
            not called; layer and batch are named.
    """

    def __init__(self, context: Context, layer: Layer) -> None:
        self.context, self.layer = context, layer

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        original, network, kept = self.context.original, self.context.network, self.context.kept
        name = self.layer.name
        key, held = ("responses", name), 0
        known: list[tuple[Tensor, Tensor]] = kept.get(key, []) if kept is not None else []
        found: list[tuple[Tensor, Tensor]] = []
        before = None if known else self._shortcut(original)
        now = self._shortcut(network) if self.context.changed else None
        for batch in self.context.data:
            with evaluation(original), evaluation(network), torch.no_grad():
                if known:
                    pair = known[batch.index]
                elif before is not None:
                    seen = next(before)
                    pair = seen, self.layer.module(seen)
                else:
                    pair = _run_to(original, name, batch, True)
                seen, response = pair
                if now is not None:
                    seen = next(now)
                elif self.context.changed:
                    seen, _ = _run_to(network, name, batch, False)
            _check_finite(name, batch.index, seen, response)
            held += sum(t.numel() * t.element_size() for t in pair)
            if kept is not None and held <= MOST_KEPT:
                found.append(pair)
            yield seen, response
        if kept is not None and held <= MOST_KEPT:
            kept[key] = found

    def _shortcut(self, network: nn.Module) -> Iterator[Tensor] | None:
        shortcut = self.context.shortcut
        if shortcut is None:
            return None
        with evaluation(network):
            return shortcut.inputs(network, self.layer.names)


def _run_to(network: nn.Module, name: str, batch: Batch, answer: bool) -> tuple[Tensor, Tensor]:
    """Input and, if wanted, output of a layer; the forward ends there."""
    caught: list[Tensor] = []
    module = network.get_submodule(name)

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        # copies, since what follows may write in place
        caught.append(inputs[0].clone())
        if not answer:
            raise _Reached

    def leave(_: nn.Module, __: Any, output: Tensor) -> None:
        caught.append(output)
        raise _Reached

    # the input as a user's hooks leave it, the output before they change it: what the layer itself does
    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, prepend=True)]
    try:
        network(batch.input)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not caught:
        raise ValueError(f"calibration: batch {batch.index} never reaches layer {name!r}")
    return caught[0], caught[-1]


def _check_finite(name: str, index: int, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(
            f"calibration: layer {name or '(network)'!r}: batch {index} gives a value that is not finite"
        )


class Context:
    """The network before and after the changes so far, and the data.

    Attributes:
        original: the user's network, read only.
        network: the copy that is being changed.
        changed: whether a layer of it has been replaced.
        pairs: convolutions with nothing but a norm and an activation between them, on one grid.
        kept: what :meth:`once` keeps; None for nothing.
        shortcut: to what layers read; None where networks run from their inputs.
    """

    pairs: tuple[tuple[Layer, Layer], ...] = ()
    kept: dict[Any, Any] | None = None
    shortcut: Shortcut | None = None

    def __init__(self, original: nn.Module, network: nn.Module, calibration: Calibration | None) -> None:
        self.original, self.network, self.calibration = original, network, calibration
        self.changed = False

    @property
    def data(self) -> Calibration:
        """The calibration data.

        Raises:
            ValueError: there is none.
        """
        if self.calibration is None:
            raise ValueError("calibration=None: this method is fitted on data; give it input batches")
        return self.calibration

    def responses(self, layer: Layer) -> Responses:
        """What a layer sees in the changed network and answered in the original one."""
        return Responses(self, layer)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` gives; kept for each key while no layer is changed, if ``kept`` is a dict."""
        if self.kept is None or self.changed:
            return make()
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found

    def survey(self, layers: Sequence[Layer], visit: Visit) -> None:
        """One pass of the original network over the data: ``visit(name, input, output)`` at each call.

        Raises:
            ValueError: a value that is not finite.
        """
        with ExitStack() as stack:
            at = 0
            for layer in layers:

                def see(
                    _: nn.Module, inputs: tuple[Any, ...], output: Tensor, name: str = layer.name
                ) -> None:
                    _check_finite(name, at, inputs[0], output)
                    visit(name, inputs[0], output)

                module = self.original.get_submodule(layer.name)
                stack.callback(module.register_forward_hook(see, prepend=True).remove)
            stack.enter_context(evaluation(self.original))
            stack.enter_context(torch.no_grad())
            for batch in self.data:
                at = batch.index
                self.original(batch.input)
