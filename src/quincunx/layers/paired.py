"""The two halves of a spatial bottleneck that replaces a pair of convolutions.

Between them the network's own norm and activation see a sampled map. A network calls the
second half with that map only, so the map itself carries the size of its grid. Neither half stores state
of a forward, which may run in several threads, on several sizes, and again in a backward pass.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_map

from quincunx.layers.sampled import SampledConvTranspose2d, SampledDown2d, half_padding
from quincunx.ops.geometry import Geometry, two_integers
from quincunx.sampling import Sampling, constant

__all__ = ["PairedDown2d", "PairedUp2d", "SampledMap", "first_half", "grid_size", "of_grid", "size_known"]

_GETTER = type(Tensor.data.__get__)  # type: ignore[attr-defined, unused-ignore]
_DATA = Tensor.data.__get__  # type: ignore[attr-defined, unused-ignore]


class SampledMap(Tensor):
    """A sampled map [N, C, m, 1] that knows its grid's size (H, W) and passes it on to results.

    Example:
        >>> y = nn.ReLU()(PairedDown2d(3, 8, sampling=qx.CHESSBOARD)(torch.randn(1, 3, 6, 4)))
        >>> type(y).__name__, tuple(y.shape), y.grid_size
        ('SampledMap', (1, 8, 12, 1), (6, 4))
    """

    grid_size: tuple[int, int] | None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = (*args, *(kwargs or {}).values())
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(func, OpOverload):  # in a compiled part, which takes plain tensors
                return func(*tree_map(_plain, args), **tree_map(_plain, dict(kwargs or {})))
            # a mode that intercepts every operation may support only plain tensors
            if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
                args, kwargs = tree_map(_plain, args), tree_map(_plain, dict(kwargs or {}))
            result = func(*args, **(kwargs or {}))
            if isinstance(func, OpOverloadPacket) and func._qualified_op_name.startswith("quincunx::"):
                return result  # on another grid
        if type(func) is _GETTER and func != _DATA:
            return result  # .grad, ._base and similar are other tensors
        sizes = [size for size in map(_size, _tensors(given)) if size is not None]
        if not sizes or any(other != sizes[0] for other in sizes):
            return result
        if type(result) in (tuple, list):
            return type(result)(_sized(part, sizes[0], given) for part in result)
        return _sized(result, sizes[0], given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            if not self.is_leaf:
                return super().__deepcopy__(memo)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]
            plain = self.detach().as_subclass(Tensor).requires_grad_(self.requires_grad)
            made: Tensor = _sized(copy.deepcopy(plain, memo), self.grid_size)
        memo[id(self)] = made
        return made


def of_grid(y: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Return a sampled map that an operator has just made, with the size (H, W) of its grid."""
    result: Tensor = _sized(y, size)
    return result


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, SampledMap) else value


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from _tensors(value)


def _size(value: Tensor) -> tuple[int, int] | None:
    return value.grid_size if isinstance(value, SampledMap) else None


def _sized(result: Any, size: tuple[int, int] | None, given: Sequence[Any] = ()) -> Any:
    """Give a result the size, if it may still hold the map's positions and is not one of the inputs."""
    if type(result) is not Tensor or result.dim() < 3:
        return result
    if torch.compiler.is_compiling():
        result = result.as_subclass(SampledMap)
    elif any(result is value for value in given):
        return result
    else:
        # change the tensor itself: a new tensor over the same values would be a view, which some in-place
        # operations may not change
        result.__class__ = SampledMap
    result.grid_size = size  # type: ignore[attr-defined, unused-ignore]
    return result


class Grid:
    """The grids that a first half has seen, shared with its partner; no state of a forward.

    A map that lost its size on the way still has its number of positions. If all grids seen so far
    with that number have one size, it is that size.

    Attributes:
        sizes: number of positions -> the only size seen with it; None if there were several.
        symbols: the size while a tracer uses symbols instead of values; only its trace reads it.
        key: the key under which a compiled first half records that it saw grids missing in ``sizes``.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int] | None] = {}
        self.symbols: Sequence[Any] | None = None
        self.key = str(next(_KEYS))

    def see(self, positions: int, size: tuple[int, int]) -> None:
        """Record a grid."""
        if self.sizes.setdefault(positions, size) != size:
            self.sizes[positions] = None

    def only(self, positions: int) -> tuple[int, int] | None:
        """Return the only possible size of a map with this many positions, or None."""
        return None if self.key in _COMPILED else self.sizes.get(positions)


_KEYS = itertools.count()
_COMPILED: set[str] = set()


@constant
def _note_compiled(key: str) -> bool:
    """Record the key; called once, while compiling."""
    _COMPILED.add(key)
    return True


def grid_size(size: Sequence[int], *geometry: Sequence[int]) -> tuple[int, int]:
    """Return (H', W') of a first half's grid for its input's (H, W).

    Args:
        size: (H, W).
        geometry: kernel, stride, padding and dilation of a strided half; nothing for the map's own grid.

    Example:
        >>> grid_size((9, 8), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1))
        (5, 4)
    """
    if not geometry:
        return size[0], size[1]
    return Geometry.make(*geometry).grid(size[0], size[1])


class PairedDown2d(SampledDown2d):
    """The first half: a convolution at the positions of a sampling, [N, C, H, W] to [N, O, m, 1].

    Its arguments are those of :class:`quincunx.layers.sampled.SampledDown2d`. It
    returns a :class:`SampledMap`, which tells its partner the map's size. Both share ``grid``.

    Source: Peng et al., arXiv:1809.02601, section 3 (rSB).

    Example:
        >>> down = PairedDown2d(3, 8, sampling=qx.CHESSBOARD)
        >>> y = down(torch.randn(1, 3, 6, 6))
        >>> tuple(y.shape), y.grid_size
        ((1, 8, 18, 1), (6, 6))
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.grid = Grid()

    @property
    def changes(self) -> tuple[tuple[int, ...], ...]:
        """Kernel, stride, padding and dilation, from which the grid follows; () if it is the map's own."""
        if self.stride == (1, 1):
            return ()
        return self.kernel_size, self.stride, self.borders, self.dilation

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        size = grid_size(x.shape[2:], *self.changes)
        if torch.compiler.is_dynamo_compiling():
            _note_compiled(self.grid.key)
        elif type(y) is not Tensor or torch.compiler.is_compiling() or not all(type(v) is int for v in size):
            self.grid.symbols = size
        else:
            self.grid.see(y.shape[2], size)
        # a proxy's class must not change
        return _sized(y, size)  # type: ignore[no-any-return]


def size_known(y: Tensor, positions: int, grid: Grid, partner: str) -> Sequence[int]:
    """Return the size (H, W) of the grid of a sampled map, from the map or from what the first half has seen.

    Raises:
        RuntimeError: neither knows it.
    """
    size: Sequence[int] | None = _size(y)
    if size is not None:
        return size
    symbols, grid.symbols = grid.symbols, None
    if symbols is not None:
        return symbols
    size = None if torch.compiler.is_compiling() else grid.only(positions)
    if size is None:
        raise RuntimeError(
            f"the second half of the pair of {partner!r}: the grid's size is unknown, since its "
            "input is no SampledMap that comes from the first half and not exactly one grid of as many "
            "positions was seen; call it with the size"
        )
    return size


def first_half(network: nn.Module, partner: str) -> PairedDown2d:
    """Return the first half of a pair by its name.

    Raises:
        AttributeError: the network has no module of this name.
        ValueError: that module is not a first half.
    """
    first = network.get_submodule(partner)
    if not isinstance(first, PairedDown2d):
        raise ValueError(f"partner={partner!r}: expected a PairedDown2d, got {type(first).__name__}")
    return first


class PairedUp2d(SampledConvTranspose2d):
    """The second half: from the sampled map [N, C, m, 1] to every position, [N, O, H, W].

    Args:
        in_channels: channels C of the sampled map.
        out_channels: channels O of the result.
        kernel_size: an integer or (vertical, horizontal); the padding keeps the size.
        sampling: the positions of the sampled map.
        partner: the path of the first half in the network.
        dilation: an integer or (vertical, horizontal).
        groups: channel groups.
        bias: whether a trained bias is added.

    Raises:
        RuntimeError: at a call without a size, if an operation between the halves made a plain tensor of the
            map and grids of several sizes have as many positions.

    Source: Peng et al., arXiv:1809.02601, section 3 (rSB).

    Example:
        >>> net = nn.Sequential(PairedDown2d(3, 8, sampling=qx.CHESSBOARD), nn.ReLU(),
        ...                     PairedUp2d(8, 3, sampling=qx.CHESSBOARD, partner="0"))
        >>> net[2].attach(net)
        >>> net(torch.randn(1, 3, 6, 6)).shape
        torch.Size([1, 3, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        sampling: Sampling,
        partner: str,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        kernel, spread = two_integers("kernel_size", kernel_size, 1), two_integers("dilation", dilation, 1)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            sampling=sampling,
            padding=half_padding(kernel, spread),
            dilation=spread,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
        )
        self.partner, self.grid = partner, Grid()

    def attach(self, network: nn.Module) -> None:
        """Take the grid's size from the first half in ``network`` from now on.

        Raises:
            AttributeError: the network has no module of the partner's name.
            ValueError: that module is not a first half.
        """
        self.grid = first_half(network, self.partner).grid

    def forward(self, y: Tensor, size: Sequence[int] | None = None, shortcut: Tensor | None = None) -> Tensor:
        if size is None:
            size = size_known(y, y.shape[2], self.grid, self.partner)
        with torch._C.DisableTorchFunctionSubclass():
            return super().forward(y, size, shortcut)
