"""Questions that a forward asks about the format and the device of its maps, while it is traced.

``if x.dtype == torch.float16`` and ``if x.is_cuda`` have one answer in a network whose weights are of one
format on one device, for inputs of that format there. What a forward makes with ``dtype=x.dtype`` is not
asked about and follows the input at each call. An input of another kind is refused by a guard in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from quincunx.layers.counts import KEEPING, is_torchs
from quincunx.layers.onecall import OneCall
from quincunx.layers.sizes import about_sizes
from quincunx.modules import forward_hooks, held_at

__all__ = ["KindGuard", "kind_answer", "suits"]

T = TypeVar("T")
_CAST_TO = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_MOVES = {"to", "cpu", "cuda", "type", "type_as", "xpu", "ipu"}
_ON = {"is_cuda": "cuda", "is_cpu": "cpu", "is_mps": "mps", "is_xpu": "xpu", "is_meta": "meta"}
_OF_FORMAT = ("is_floating_point", "is_complex")
_COMPARING: tuple[Callable[..., Any], ...] = (
    *(operator.eq, operator.ne, operator.and_, operator.or_, operator.xor),
)


class _UnknownError(Exception):
    """It does not follow from the network."""


@dataclass(frozen=True)
class KindGuard(OneCall):
    """Raises where an input is of another format, or elsewhere, than a forward's branch was traced for.

    Attributes:
        name: of the input.
        kind: its format, or the type of its device.
    """

    name: str
    kind: torch.dtype | str
    __name__ = "kind_guard"

    def run(self, x: Any) -> None:
        """
        Raises:
            TypeError: the input is of another kind.
        """
        if self.differs(x):
            found = x.device.type if isinstance(self.kind, str) else x.dtype
            raise TypeError(
                f"{self.name}: the network goes another way for {found} than for {self.kind}, which it was "
                "traced for"
            )

    def differs(self, x: Any) -> bool:
        """Return whether a tensor is of another kind."""
        return isinstance(x, Tensor) and self.kind not in (x.dtype, x.device.type)


def kind_answer(node: fx.Node, root: nn.Module) -> tuple[bool, list[tuple[fx.Node, KindGuard]]] | None:
    """Return the answer to a question about formats and devices, and what has to hold of the inputs for it.

    Args:
        node: the question.
        root: the network.

    Returns:
        None where it does not follow from the network.
    """
    kinds = _Kinds(root)
    try:
        answer = bool(kinds.value(node))
    except _UnknownError:
        return None
    return (answer, list(kinds.needed)) if kinds.asked else None


def suits(graph: fx.Graph, first: Callable[[], Tensor]) -> bool:
    """Return whether an input is of the kind that a network was traced for; nothing is asked if any is."""
    guards = [node.target for node in graph.nodes if isinstance(node.target, KindGuard)]
    if not guards:
        return True
    x = first()
    return not any(guard.differs(x) for guard in guards)


class _Kinds:
    """What follows of formats and devices from a network's weights.

    Attributes:
        needed: inputs, and of which kind they have to be.
        asked: whether a format or a device was.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.needed: dict[tuple[fx.Node, KindGuard], None] = {}
        self.asked = False

    def value(self, given: Any) -> Any:
        """The value of a node that is made of formats, devices and constants."""
        if isinstance(given, (tuple, list)):
            return tuple(self.value(part) for part in given)
        if not isinstance(given, fx.Node):
            return given
        name, arguments = str(getattr(given.target, "__name__", given.target)), given.args
        if given.kwargs or given.op not in ("call_function", "call_method"):
            raise _UnknownError
        if given.target is getattr:
            return self._attribute(arguments[0], str(arguments[1]))
        if name in _OF_FORMAT and len(arguments) == 1:
            return getattr(self._format(arguments[0]), name)
        if given.op == "call_function" and given.target in _COMPARING:
            return given.target(*map(self.value, arguments))
        raise _UnknownError

    def _attribute(self, of: Any, name: str) -> Any:
        if not isinstance(of, fx.Node):
            raise _UnknownError
        if name == "dtype":
            return self._format(of)
        if name == "device":
            return self._device(of)
        if name in _ON:
            return self._device(of).type == _ON[name]
        if of.target is getattr and of.args[1] in ("dtype", "device"):
            return getattr(self.value(of), name)
        raise _UnknownError

    # -------------------------------------------------------- of one value

    def _format(self, of: Any) -> torch.dtype:
        """The format of a value."""
        self.asked = True
        if not isinstance(of, fx.Node):
            raise _UnknownError
        if of.op == "placeholder":
            self._of_input(of, found := _only(_formats(self.root)))
            return found
        if of.op == "get_attr":
            return self._held(of).dtype
        if of.op == "call_module":
            own = _formats(self._plain(of))
            return _only(own) if own else self._format(_only(set(of.all_input_nodes)))
        name = str(getattr(of.target, "__name__", of.target))
        if of.op == "call_method" and name in _CAST_TO and len(of.args) == 1:
            return _CAST_TO[name]
        if name in KEEPING and name not in _MOVES and not of.kwargs.get("dtype"):
            return _only({self._format(other) for other in of.all_input_nodes})
        raise _UnknownError

    def _device(self, of: Any) -> torch.device:
        """The device of a value; all weights are on one, and what is not moved stays there."""
        self.asked = True
        device = _only({tensor.device for tensor in _tensors(self.root)})
        seen, todo = set(), [of]
        while todo:
            node = todo.pop()
            if not isinstance(node, fx.Node):
                raise _UnknownError
            if node in seen:
                continue
            seen.add(node)
            name = str(getattr(node.target, "__name__", node.target))
            held = node.op in ("placeholder", "get_attr")
            if node.op == "placeholder":
                self._of_input(node, device.type)
            elif node.op == "call_module":
                self._plain(node)
            maps = [other for other in node.all_input_nodes if about_sizes(other) is None]
            # what a call makes of no map may be anywhere
            if name in _MOVES or "device" in node.kwargs or not (maps or held):
                raise _UnknownError
            todo += maps
        return device

    def _of_input(self, node: fx.Node, kind: torch.dtype | str) -> None:
        if sum(other.op == "placeholder" for other in node.graph.nodes) > 1:
            # which of several are maps, is not known
            raise _UnknownError
        self.needed[node, KindGuard(str(node.target), kind)] = None

    def _held(self, node: fx.Node) -> Tensor:
        try:
            tensor = held_at(self.root, str(node.target))
        except AttributeError:
            raise _UnknownError from None
        if not isinstance(tensor, Tensor):
            raise _UnknownError
        return tensor

    def _plain(self, node: fx.Node) -> nn.Module:
        """A layer whose answers have the format of its weights, on their device."""
        module = self.root.get_submodule(str(node.target))
        ours = is_torchs(module) or type(module).__module__.startswith("quincunx.")
        if not ours or forward_hooks(module) or "forward" in vars(module):
            raise _UnknownError
        return module


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _formats(module: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in _tensors(module) if tensor.is_floating_point()}


def _only(found: set[T]) -> T:
    if len(found) != 1:
        raise _UnknownError
    return next(iter(found))
