"""MACs and parameters of a network, per layer and in total."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from quincunx.modules import inference_mode_of

__all__ = [
    "Cost",
    "Row",
    "cost",
]


@dataclass(frozen=True)
class Row:
    """One layer: a module that has its own parameters or multiplies in its own forward.

    Attributes:
        name: the module's path in the network.
        kind: its class.
        macs: multiply-adds for the whole example input.
        params: its own parameters; a shared one counts only where it first occurs.
        output: shape of its output, empty if it did not run.
    """

    name: str
    kind: str
    macs: int
    params: int
    output: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """MACs and parameters.

    Attributes:
        macs: multiply-adds of convolutions, matrix products and attention (half of what torch calls
            FLOPs). Normalisation, activation, pooling and additions are not counted, as in the papers.
        params: number of parameters, trainable or not.
        rows: one :class:`Row` per layer, in the order of the network's modules; MACs and parameters outside
            any layer (a matrix product in the network's own forward) are in a row "(network)".
        uncounted: "layer (class): operator" for each operator that multiplies, or may, but has no formula:
            a Fourier transform, an operator of another library. Their multiply-adds are not counted.
    """

    macs: int
    params: int
    rows: tuple[Row, ...]
    uncounted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


# ---------------------------------------------------------------- operators without a formula in torch


Shape = Sequence[int]


def _rnn(x: Shape, weight: Shape, recurrent: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count all steps of one direction of a layer."""
    return 2 * math.prod(x[:-1]) * (math.prod(weight) + math.prod(recurrent))


def _trilinear(a: Shape, b: Shape, c: Shape, *expanded: Any, out_shape: Any = None, **_: Any) -> int:
    """Count the sum of products a b c: a product for each element of all dimensions."""
    shapes = [list(shape) for shape in (a, b, c)]
    for shape, extra in zip(shapes, expanded, strict=False):
        for dimension in sorted(extra):
            shape.insert(dimension, 1)
    return 2 * math.prod(int(max(sizes)) for sizes in zip(*shapes, strict=True))


def _vector(matrix: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _added_vector(_: Any, matrix: Shape, *__: Any, out_shape: Any = None, **___: Any) -> int:
    return 2 * math.prod(matrix)


def _outer(_: Any, left: Shape, right: Shape, *__: Any, out_shape: Any = None, **___: Any) -> int:
    return 2 * math.prod(left) * math.prod(right)


_ATEN = torch.ops.aten
_FORMULAS = {
    _ATEN.mkldnn_rnn_layer: _rnn,
    _ATEN._trilinear: _trilinear,
    **dict.fromkeys((_ATEN.mv, _ATEN.dot, _ATEN.vdot), _vector),
    _ATEN.addmv: _added_vector,
    **dict.fromkeys((_ATEN.addr, _ATEN.ger), _outer),
}
# torch's own operators that multiply; the others add, compare, move or work elementwise
_MULTIPLY = re.compile(
    r"rnn|lstm|gru|attention|encoder_layer|trilinear|fft|cdist|mkldnn_(linear|conv)|sparse|cholesky|solve"
    r"|linalg_(?!vector_norm|matrix_norm|check_errors|cross|diagonal)|mm(_|$)|matmul|conv|geqrf|ormqr|lu_|svd"
)
# these compute nothing, or are ours and have formulas if they multiply
_KNOWN = {"prim", "prims", "quincunx", "profiler", "c10d", "_c10d_functional", "inductor", "debugprims"}


class _Shares:
    """Divides what a counter counts among modules: each gets what runs in it and in no module within it.

    Modules that several others hold are called from anywhere, so what is within what is seen in the calls.

    Attributes:
        alone: what each module counts, by name.
    """

    def __init__(self, total: Callable[[], int]) -> None:
        self.total = total
        self.alone: dict[str, int] = {}
        self._calls: list[tuple[str, int]] = []
        self._within = [0]

    @property
    def running(self) -> str:
        """The innermost module that runs; "" for the network itself."""
        return self._calls[-1][0] if self._calls else ""

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Count a module's calls; returns the handles of its hooks."""

        def begin(*_: Any) -> None:
            self._calls.append((name, self.total()))
            self._within.append(0)

        def end(*_: Any) -> None:
            before, within = self._calls.pop()[1], self._within.pop()
            whole = self.total() - before
            self.alone[name] = self.alone.get(name, 0) + whole - within
            self._within[-1] += whole

        return [
            module.register_forward_pre_hook(begin, prepend=True),
            module.register_forward_hook(end, always_call=True),
        ]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Records the operators that a counter has no formula for, by the module that runs them.

    Args:
        formulas: of the counter.
        shares: whose running modules are asked.
    """

    def __init__(self, formulas: Any, shares: _Shares) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.formulas, self.shares = formulas, shares
        self.found: dict[tuple[str, str], None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = str(func.name()).partition("::")
        name = name.partition(".")[0]
        multiplies = bool(_MULTIPLY.search(name)) if namespace == "aten" else namespace not in _KNOWN
        if (
            multiplies
            and getattr(func, "_overloadpacket", func) not in self.formulas
            and any(isinstance(value, Tensor) for value in tree_iter((args, kwargs)))
        ):
            self.found[self.shares.running, f"{namespace}::{name}"] = None
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_parts() -> Iterator[None]:
    """Run attention as separate matrix products within the context, also in modules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def cost(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Cost:
    r"""Count multiply-adds and parameters of a network for one input.

    A sampled or transposed sampled convolution costs m kh kw C O / groups per image, m being the number of
    computed positions; a dense one H' W' kh kw C O / groups. Taps outside the map count. Attention,
    recurrent layers and einsum count as the products that they consist of; ``uncounted`` names the rest.

    Args:
        model: any module; it is run once in evaluation mode, without gradients, and is not changed.
        example_input: a tensor [N, C, H, W], or a tuple of arguments. MACs are for the whole batch.

    Returns:
        A :class:`Cost`.

    Raises:
        TypeError: ``example_input`` is neither.

    Source: Peng et al., arXiv:1809.02601, section 3.3.

    Example:
        >>> cost(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 32, 32)).macs
        221184
    """
    if not isinstance(example_input, (Tensor, tuple)):
        raise TypeError(f"example_input: expected a tensor or a tuple, got {type(example_input).__name__}")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, where that is installed

    shapes: dict[str, tuple[int, ...]] = {}
    names = dict(model.named_modules())
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    shares = _Shares(counter.get_total_flops)
    with ExitStack() as stack:
        for name, module in names.items():

            def remember(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                shapes[name] = tuple(output.shape) if isinstance(output, Tensor) else ()

            stack.callback(module.register_forward_hook(remember).remove)
            for handle in shares.watch(name, module):
                stack.callback(handle.remove)
        stack.enter_context(inference_mode_of(model))
        # the counter does not know the CPU's fused attention, nor modules that torch runs in one call
        stack.enter_context(_in_parts())
        watch = stack.enter_context(_Watch(counter.flop_registry, shares))
        stack.enter_context(counter)
        model(*arguments)
    total = counter.get_total_flops() // 2
    rows: list[Row] = []
    seen: set[int] = set()
    for name, module in names.items():
        own = shares.alone.get(name, 0) // 2
        params = 0
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                params += parameter.numel()
        if own or params:
            rows.append(Row(name or "(network)", type(module).__name__, own, params, shapes.get(name, ())))
    uncounted = []
    for name, operator in watch.found:
        uncounted.append(f"{name or '(network)'} ({type(names[name]).__name__}): {operator}")
    return Cost(total, sum(p.numel() for p in model.parameters()), tuple(rows), tuple(uncounted))
