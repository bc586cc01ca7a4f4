"""Stand-ins for the values of a network, and the tracer that records what its forward does with them.

What only a value could answer (its type, its hash, whether it is true) ends the tracing of the module that
asks, which becomes one node; see :mod:`quincunx.layers.tracing`.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import itertools
import math
import operator
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quincunx.layers.alike import compares_maps, decided
from quincunx.layers.conversions import converting
from quincunx.layers.counts import count_in, count_of, is_torchs, numbers_of, pieces_of
from quincunx.layers.kinds import kind_answer
from quincunx.layers.sizes import (
    Fork,
    Made,
    Question,
    Raised,
    Settled,
    Shape,
    SizeGuard,
    about_sizes,
    by_identity,
    known,
    mark,
    pieces_by_size,
    raised_by_network,
)
from quincunx.layers.ways import Asked, Ways
from quincunx.modules import first_line, forward_hooks

__all__ = [
    "Tracer",
    "called_as_modules_are",
    "drew",
    "random_states",
    "reason",
    "restore_random_states",
    "watching",
]

_AUGMENTED = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "imatmul"),
)
_isinstance = builtins.isinstance


class _Value(fx.Proxy):
    """A stand-in for a value of the network, which does not answer what only the value could."""

    tracer: Tracer

    def __getattr__(self, k: str) -> _Attribute:
        return _Attribute(self, k)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise self.tracer.refusal(f"it sets {name!r} of a tensor")
        super().__setattr__(name, value)

    def __setitem__(self, index: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        number = count_of(self)
        if number is None:
            raise self.tracer.refusal("it asks for the length of a value that is known only when it runs")
        self.tracer.guard_count(self.node)
        return number

    def __round__(self, digits: int | None = None) -> fx.Proxy:
        given = (self,) if digits is None else (self, digits)
        return self.tracer.create_proxy("call_function", round, given, {})

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        this: Any = self
        return this // other, this % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        this: Any = self
        return other // this, other % this

    def __int__(self) -> int:
        value = self.tracer.number_of(about_sizes(self.node))
        if value is None:
            raise self.tracer.refusal("it makes an integer of a value that is known only when it runs")
        return int(value)

    def __index__(self) -> int:
        return int(self)

    def __float__(self) -> float:
        raise self.tracer.refusal("it makes a number of a value that is known only when it runs")

    def __repr__(self) -> str:
        return self.tracer.text_of(self) or super().__repr__()

    def __format__(self, form: str) -> str:
        return self.tracer.text_of(self, form) or super().__format__(form)

    def __hash__(self) -> int:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not str(caller).startswith(("torch.", "quincunx.")):
            raise self.tracer.refusal("it looks something up by a value that is known only when it runs")
        return id(self)


class _Attribute(_Value, fx.proxy.Attribute):
    """An attribute of a stand-in."""

    __hash__ = _Value.__hash__


def _augment(name: str) -> None:
    def change(self: _Value, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    setattr(_Value, f"__{name}__", change)


for _name in _AUGMENTED:
    _augment(_name)


def _surely_tensor(node: fx.Node) -> bool:
    """Whether a value is known to be a tensor: an argument, or what torch's own layers make of such."""
    if node.op == "placeholder":
        return not str(node.target).startswith("*")
    if node.op == "call_module":
        return bool(node.meta.get("tensor", False))
    if node.op == "call_function" and node.target in _TENSOR_FUNCTIONS:
        return any(_surely_tensor(other) for other in node.all_input_nodes)
    return False


_TENSOR_FUNCTIONS = {
    *(operator.add, operator.iadd, operator.mul, operator.sub, operator.truediv, torch.add, torch.cat),
    *(torch.relu, torch.sigmoid, torch.nn.functional.relu, torch.nn.functional.conv2d),
}
_TENSOR_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d),
    *(nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Dropout),
    *(nn.Identity, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Hardswish, nn.LeakyReLU),
)


def _watched_isinstance(value: Any, classes: Any) -> bool:
    """``isinstance`` while tracing: to a forward that asks, stand-ins of tensors are tensors."""
    if type(value) not in (_Value, _Attribute):
        return _isinstance(value, classes)
    caller = sys._getframe(1)
    library = str(caller.f_globals.get("__name__", ""))
    if library.startswith(("torch.", "quincunx.")) or (
        library == "torch" and caller.f_code.co_name != "is_tensor"
    ):
        return _isinstance(value, classes)
    if type(value) is _Value and _surely_tensor(value.node):
        value.node.meta["asked"] = True
        return issubclass(Tensor, classes)
    raise value.tracer.refusal("it asks for the type of a value that is known only when it runs")


def _largest_or_smallest(function: Callable[..., Any]) -> Callable[..., Any]:
    """``max`` or ``min`` while tracing: of sizes, a value that the graph works out at each call."""

    @functools.wraps(function)
    def watched(*given: Any, **named: Any) -> Any:
        one: Any = given[0] if len(given) == 1 else None
        if type(one) in (_Value, _Attribute) and not named and about_sizes(one.node) is not None:
            return one.tracer.create_proxy("call_function", function, given, {})
        of: Any = one if type(one) in (list, tuple) else given
        values = [value for value in of if type(value) in (_Value, _Attribute)]
        numbers = all(type(value) in (int, float, bool, _Value, _Attribute) for value in of)
        if not values or not numbers or named or any(about_sizes(value.node) is None for value in values):
            return function(*given, **named)
        return values[0].tracer.create_proxy("call_function", function, tuple(of), {})

    return watched


def _made_of_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that takes no stand-ins, while tracing."""

    @functools.wraps(function)
    def watched(*given: Any, **named: Any) -> Any:
        parts = itertools.chain(given, *(one for one in given if type(one) in (list, tuple)))
        values = [value for value in parts if type(value) in (_Value, _Attribute)]
        if not values:
            return function(*given, **named)
        return values[0].tracer.create_proxy("call_function", function, given, named)

    return watched


_NO_STAND_INS: tuple[Any, ...] = (
    *(torch.zeros, torch.ones, torch.empty, torch.tensor, torch.as_tensor, torch.finfo, torch.iinfo),
    *(torch.full, torch.eye),
)
_NO_SIZES: tuple[Any, ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


class Tracer(fx.Tracer):
    """Torch's tracer, which falls back to running a module where it cannot look into it.

    Args:
        leaf: whether a module is one node.
        whole: modules that are known to be one node, and why.
        numbers: whether arguments whose default is a number stay arguments.
        settled: what is known about the forward's questions about sizes.
        assumed: answers to others, to see what follows; then those that nothing is known about get one too,
            and what the forward raises is let through. None to leave them unanswered.
        ways: what is answered where both ways go on; None to leave that unanswered.

    Attributes:
        whole: name of a module that runs as it is -> why, for those that were tried.
        fixed: arguments that were fixed to their default.
        asked: questions that were answered without knowing the right answer.
        values: what texts made by the forward say of sizes.
    """

    def __init__(
        self,
        leaf: Callable[[nn.Module], bool],
        whole: dict[str, str],
        numbers: bool,
        settled: Settled,
        assumed: Mapping[str, bool] | None = None,
        ways: Ways | None = None,
    ) -> None:
        super().__init__()
        self.settled, self.assumed, self.ways = settled, assumed, ways
        self.asked: list[Question] = []
        self.values: list[tuple[Any, str]] = []
        self.questions, self.times = 0, Counter[str]()
        self.leaf, self.numbers = leaf, numbers
        self.fixed: dict[str, Any] = {}
        self.owner = threading.get_ident()
        self.whole = dict(whole)
        self.refused = ""
        self.parameters: dict[str, fx.Proxy] = {}
        self.autocast = _autocast()
        # whether layers run now, on values
        self.running = False

    @property
    def elsewhere(self) -> bool:
        """Whether somebody else calls what the tracer exchanged: another thread, or a layer that runs."""
        return self.running or threading.get_ident() != self.owner

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def refusal(self, reason: str) -> fx.proxy.TraceError:
        """An error to raise; it counts even if the forward catches it and goes on in another way."""
        self.refused = self.refused or reason
        return fx.proxy.TraceError(reason)

    def to_bool(self, obj: fx.Proxy) -> bool:
        answer = None if threading.get_ident() != self.owner else self._answer(obj.node)
        if answer is None:
            raise self.refusal("symbolically traced variables cannot be used as inputs to control flow")
        return answer

    def _answer(self, node: fx.Node) -> bool | None:
        """The answer to a question about sizes; None where none can be given."""
        if (kind := kind_answer(node, self.root)) is not None:
            answer, needed = kind
            for of, guard in needed:
                if all(user.target != guard for user in of.users):
                    self.create_node("call_function", guard, (of,), {})
            return answer
        expression = about_sizes(node)
        self.questions += 1
        # an assumed answer may be one with which a loop never ends
        if expression is None or self.questions > _MOST_QUESTIONS:
            return None
        question = Question(expression, False, _place_in_code())
        self.times[question.key] += 1
        if self.times[question.key] > _MOST_TIMES:
            return None
        known = self.settled.answers.get(question.key)
        if known is not None:
            self._guard(expression, *known)
            return known[0]
        if (sure := decided(expression, self.graph, self.root)) is not None:
            return sure
        if self.ways is not None or self.settled.is_barred(question.key, question.place):
            answer = self.number_of(expression)
            return self._way(node, question) if answer is None else bool(answer)
        if self.assumed is None:
            self.settled.met = True
            return None
        usual = bool(self.settled.places.get(question.place, False))
        answers = {q.key: q.answer for q in self.asked} | dict(self.assumed)
        question = replace(question, answer=answers.get(question.key, usual))
        if all(question.key != other.key for other in self.asked):
            self.asked.append(question)
        return question.answer

    def _way(self, node: fx.Node, question: Question) -> bool | None:
        """The answer to a question with which the forward goes on either way; None where none is given."""
        ways, key = self.ways, question.key
        if ways is None or key in ways.closed:
            self.settled.met = True
            return None
        if (known := ways.ends.get((key, question.place))) is not None:
            self._guard(question.expression, *known)
            return known[0]
        if (answer := ways.fixed.get(key)) is not None:
            self._guard(question.expression, answer, Raised(ValueError, _OTHER_SIZES))
            return answer
        if key not in ways.met:
            if (answer := self.told(node, key)) is None:
                return None
            ways.met[key] = ways.told[key] = answer
            ways.places[key] = question.place
            if compares_maps(question.expression):
                ways.comparing.add(key)
        self.create_node("call_function", Asked(key), (node,), {})
        return ways.met[key]

    def told(self, node: fx.Node, key: str) -> bool | None:
        """What a question with two ways is answered in this run; None where it is not known."""
        ways = self.ways or Ways()
        return ways.path.get(key, ways.usual.get(key))

    def guard_count(self, node: fx.Node) -> None:
        """Let the graph raise where a value has another number of pieces than it was traced for."""
        expression: Made | None
        text = _OTHER_DIMENSIONS
        if (sizes := about_sizes(node)) is not None:
            expression = Made(len, (sizes,))
        else:
            node = _sliced(node)
            expression = pieces_by_size(node)
            if _is_chunk(node):
                text = "chunk gives other pieces than the network was traced for"
        if expression is None or node.meta.get("counted"):
            return
        node.meta["counted"] = True
        question = Made(operator.eq, (expression, count_in(node, self.root)))
        self._guard(question, True, Raised(IndexError, text))

    def _guard(self, question: Shape | Made, answer: bool, otherwise: Fork | Raised) -> None:
        """Let the graph ask a question at each call, and raise where it has another answer."""
        guard, read = SizeGuard.of(question, answer, otherwise, self.graph)
        shapes = tuple(self.create_node("call_function", getattr, (n, "shape"), {}) for n in read)
        self.create_node("call_function", guard, shapes, {})

    def length_of(self, value: Any) -> Any:
        """``len`` of a value: a number where it is known how many pieces there are, or of a map the first of
        its sizes, which the graph reads at each call."""
        if count_of(value) is not None or not _surely_tensor(value.node):
            return len(value)
        value.node.meta["asked"] = True
        return value.shape[0]

    def number_of(self, expression: Made | Shape | None) -> Any:
        """What an expression is that numbers of dimensions and channels decide; None if they do not. The
        graph asks again."""
        nodes = by_identity(self.graph)
        value = known(
            expression, lambda of: numbers_of(nodes[of], self.root) if of in nodes else (None, None)
        )
        if value is not None:
            self._guard(Made(operator.eq, (expression, value)), True, Raised(IndexError, _OTHER_DIMENSIONS))
        return value

    def text_of(self, value: fx.Proxy, form: str = "") -> str:
        """What a text says of a size, where texts are needed for what the forward raises."""
        if self.assumed is None or threading.get_ident() != self.owner:
            return ""
        expression = about_sizes(value.node)
        return "" if expression is None else mark(self.values, expression, form)

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        # a chunk that is missing raises by itself; of other pieces and sizes there may be more, or fewer
        if count_of(obj) is not None and not _is_chunk(_sliced(obj.node)):
            self.guard_count(obj.node)
        if (pieces := pieces_of(obj)) is not None:
            return iter(pieces)
        raise self.refusal("it goes through a value in a loop, whose length is known only when it runs")

    def keys(self, obj: fx.Proxy) -> Any:
        raise self.refusal("it asks for the names in a dictionary that is known only when it runs")

    def note_set(self, module: nn.Module, name: str, value: object) -> None:
        """A forward sets an attribute of one of the network's modules.

        Raises:
            TraceError: of the kind that the copy would not follow: a setting, a tensor, a number that counts.
        """
        if module not in (self.submodule_paths or {}) or self.elsewhere:
            return
        tensors = name in module._parameters or name in module._buffers or name in module._modules
        plain = type(value) in (bool, int, float, str)
        same = plain and name in vars(module) and vars(module)[name] == value
        if tensors or ((plain or is_torchs(module)) and not same):
            raise self.refusal(f"it sets {name!r} of a {type(module).__name__}")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return forward_hooks(m) > 0 or self.leaf(m) or is_torchs(m)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocast() != self.autocast:
            raise fx.proxy.TraceError("it switches autocast by itself")
        return super().create_node(kind, target, *args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self.elsewhere:
            return attr_val
        self.parameters = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Flags, texts and the like are their default; tensors and numbers are the graph's inputs."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for parameter in parameters:
            value = parameter.default
            number = type(value) in (int, float) and math.isfinite(value) and self.numbers
            if value is parameter.empty:
                value = self.create_proxy("placeholder", parameter.name, (), {})
            elif number or _isinstance(value, Tensor):
                value = self.create_proxy("placeholder", parameter.name, (value,), {})
            else:
                self.fixed[parameter.name] = value
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                positional.append(value)
        return (lambda root: root_fn(root, *positional, **named)), [self.root]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.elsewhere:
            return forward(*args, **kwargs)
        if m not in (self.submodule_paths or {}):
            return self._call_made(m, forward, args, kwargs)
        name, calls_as_modules_do = self.path_of_module(m), called_as_modules_are(m)
        if name in self.whole or self.is_leaf_module(m, name):
            if not calls_as_modules_do:
                raise fx.proxy.TraceError(f"{name} has a __call__ of its own, and cannot run as it is")
            if name in self.whole:
                return self.create_proxy("call_module", name, args, kwargs)
            result = super().call_module(m, forward, args, kwargs)
            if type(m) in _TENSOR_MODULES and not forward_hooks(m) and "forward" not in vars(m):
                result.node.meta["tensor"] = True
            return result
        last, states = next(iter(reversed(self.graph.nodes)), None), random_states()
        asked, met = len(self.asked), list(self.ways.met) if self.ways is not None else []
        stack = dict(self.module_stack)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if self.refused:
                raise fx.proxy.TraceError(self.refused)
            return result
        except Exception as error:
            # what follows from an answer that was only assumed is seen by whoever called this
            assumed = len(self.asked) > asked or (self.ways is not None and len(self.ways.met) > len(met))
            follows = assumed and not self.refused and raised_by_network(error)
            if not calls_as_modules_do or follows:
                raise
            del self.asked[asked:]
            if self.ways is not None:
                self.ways.met = {key: self.ways.met[key] for key in met}
            # what was recorded of it goes; it runs as it is
            for node in reversed(list(self.graph.nodes)):
                if node is last:
                    break
                self.parameters.pop(str(node.target), None)
                self.graph.erase_node(node)
            self.module_stack.clear()
            self.module_stack.update(stack)
            restore_random_states(states)
            self.whole[name] = reason(error)
            self.refused = ""
            return self.create_proxy("call_module", name, args, kwargs)

    def _call_made(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module that is none of the network's: one that the forward makes, ``nn.ReLU()(x)``."""
        if next(itertools.chain(m.parameters(), m.buffers()), None) is not None:
            raise self.refusal(
                f"it calls a {type(m).__name__} with parameters that is not one of its modules"
            )
        if forward_hooks(m) or not called_as_modules_are(m):
            raise self.refusal(f"it makes a {type(m).__name__} with hooks or a __call__ of its own")
        return forward(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Containers keep their type: torch.fx would make a plain dict, list or tuple of every subclass."""
        if _isinstance(a, fx.Proxy) and a.tracer is not self:
            raise fx.proxy.TraceError("it keeps values from one call to the next")
        if _isinstance(a, fx.Proxy) or type(a) in (dict, list, tuple, slice, range):
            return super().create_arg(a)
        if _isinstance(a, (dict, list, tuple)) and not hasattr(a, "_fields"):
            return self._container(a)
        return super().create_arg(a)

    def _container(self, a: Any) -> Any:
        """A node that makes a container of a subclass again."""
        if type(a) in (torch.Size, fx.immutable_collections.immutable_list):
            return super().create_arg(tuple(a))
        if type(a) is fx.immutable_collections.immutable_dict:
            return super().create_arg(dict(a))
        make: Callable[..., Any] = type(a)
        parts: tuple[Any, ...] = ()
        named: dict[str, Any] = {}
        if is_dataclass(a):
            named = {field.name: getattr(a, field.name) for field in fields(a) if field.init}
        elif _isinstance(a, dict):
            parts = (list(a.items()),)
            if hasattr(a, "default_factory"):
                make = _Made(a.default_factory, type(a))
        else:
            parts = (list(a),)
        made = make(*parts, **named)
        lost = [name for name in getattr(a, "__dict__", {}) if name not in vars(made)]
        same = list(made.items()) == list(a.items()) if _isinstance(a, dict) else list(made) == list(a)
        if type(made) is not type(a) or not same or lost:
            raise fx.proxy.TraceError(
                f"it makes a {type(a).__name__}, which cannot be made again from its parts"
            )
        return self.create_node("call_function", make, self.create_arg(parts), self.create_arg(named))


class _Made:
    """A container that takes a function first, such as a defaultdict, made from its items."""

    def __init__(self, first: Callable[[], Any], kind: Callable[..., Any]) -> None:
        self.first, self.kind = first, kind
        self.__name__ = getattr(kind, "__name__", "made")

    def __repr__(self) -> str:
        return f"{self.__name__} of {self.first!r}"

    def __call__(self, items: Any) -> Any:
        return self.kind(self.first, items)


def _sliced(node: fx.Node) -> fx.Node:
    """What a node is a slice of, of a slice too; itself if it is none."""
    while node.target is operator.getitem and _isinstance(node.args[1], slice):
        node = node.all_input_nodes[0]
    return node


def _is_chunk(node: fx.Node) -> bool:
    return str(getattr(node.target, "__name__", node.target)) == "chunk"


_OTHER_SIZES = "the network goes another way for images of this size than for those it was traced for"
_OTHER_DIMENSIONS = "a map has other dimensions than the network was traced for, which was in batches"
# that one run of a forward may ask
_MOST_QUESTIONS = 10_000
# that one question may be asked in a run; a loop that waits for another answer never ends
_MOST_TIMES = 300


def _place_in_code() -> tuple[str, int]:
    """Where the forward asks what is being answered."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")) in (
        __name__,
        "torch.fx.proxy",
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_code.co_firstlineno}", frame.f_lasti


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def random_states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def restore_random_states(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


def drew(states: tuple[Any, Any, Tensor]) -> bool:
    now = random_states()
    same_numpy = all(np.array_equal(a, b) for a, b in zip(states[1], now[1], strict=True))
    return states[0] != now[0] or not same_numpy or not torch.equal(states[2], now[2])


@contextmanager
def watching(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    set_attribute, delete_attribute = nn.Module.__setattr__, nn.Module.__delattr__

    def watched_set(module: nn.Module, name: str, value: Any) -> None:
        tracer.note_set(module, name, value)
        set_attribute(module, name, value)

    def watched_delete(module: nn.Module, name: str) -> None:
        tracer.note_set(module, name, None)
        delete_attribute(module, name)

    patches: list[tuple[Any, str, Any]] = [(builtins, "isinstance", _watched_isinstance)]
    patches += [(builtins, f.__name__, _largest_or_smallest(f)) for f in (max, min)]
    patches += [(torch, f.__name__, _made_of_values(f)) for f in _NO_STAND_INS]
    patches += [(F, f.__name__, _made_of_values(f)) for f in _NO_SIZES]
    own = [(place, name, getattr(place, name)) for place, name, _ in patches]
    for place, name, function in patches:
        setattr(place, name, function)
    nn.Module.__setattr__ = watched_set  # type: ignore[method-assign, assignment]
    nn.Module.__delattr__ = watched_delete  # type: ignore[method-assign]
    try:
        with converting(model):
            yield
    finally:
        for place, name, function in own:
            setattr(place, name, function)
        nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
        nn.Module.__delattr__ = delete_attribute  # type: ignore[method-assign]


def reason(error: Exception) -> str:
    text, kind = first_line(error), type(error).__name__
    known = _isinstance(error, (fx.proxy.TraceError, TypeError, RuntimeError))
    return text if known or text == kind else f"{kind}: {text}"


def called_as_modules_are(module: nn.Module) -> bool:
    """Whether a call runs hooks and forward, and nothing else."""
    own = (
        c for c in type(module).__mro__ if c not in (nn.Module, object) and not issubclass(c, fx.GraphModule)
    )
    return not any("__call__" in vars(c) for c in own)
