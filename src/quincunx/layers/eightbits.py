r"""What a network keeps of its form in eight bits: a record, and weights that are multiples of a scale.

The weights of an output channel are q s with int8 numbers q and one scale s. A batch norm behind multiplies
the channel by one number, so the same q belong to the folded weight. s has at most 16 significant bits: then
q s is exact in float32, and rounding what was rounded changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quincunx.layers.graph import TRANSPOSED, is_conv
from quincunx.modules import surely
from quincunx.ops.int8 import Grid
from quincunx.reading import Entry

__all__ = [
    "Quantisation",
    "decode_weight",
    "encode_weight",
    "note_quantisation",
    "quantisation_of",
    "round_weights",
    "sole_weights",
]

_ATTRIBUTE = "quincunx_int8"
_BITS = 16
# the module's weights beside its own in a file of tensors; no module's name has a slash
_PLACE = "int8/"


@dataclass(frozen=True, eq=False)
class Quantisation:
    """How a network computes in eight bits. Maps and convolutions have the names of a fused network's.

    Attributes:
        grids: map -> what its integers stand for.
        shifts: for every convolution, by the first map that it writes: what is added to its bias, float32
            [O]; None where it stays in real numbers.
        layers: paths of the modules whose weights are whole multiples of a scale wherever they are used.
        facts: what ``meta["int8"]`` of the fused network says.
    """

    grids: Mapping[str, Grid]
    shifts: Mapping[str, Tensor | None]
    layers: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the tensors, JSON-ready."""
        return {
            "grids": {name: [grid.scale, grid.zero] for name, grid in self.grids.items()},
            "convolutions": {name: shift is not None for name, shift in self.shifts.items()},
            "layers": list(self.layers),
            "facts": self.facts,
        }

    def store(self, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state with weights in int8 beside their scales, and the shifts.

        A weight that is no whole multiple of its scale, as one in training, stays as it is.

        Args:
            model: whose state it is.
            state: name -> tensor.
        """
        found = dict(state)
        for path in self.layers:
            name = f"{path}.weight".lstrip(".")
            if name not in found or found[name].dtype != torch.float32:
                continue
            module: Any = model.get_submodule(path)
            integers, scales = encode_weight(module, found[name])
            if torch.equal(decode_weight(module, integers, scales), found[name]):
                found |= {name: integers, f"{_PLACE}scale/{name}": scales}
        shifts = {f"{_PLACE}shift/{k}": v for k, v in self.shifts.items() if v is not None}
        return found | {name: value.contiguous() for name, value in shifts.items()}

    @classmethod
    def read(
        cls, entry: Entry, state: dict[str, Tensor], what: str
    ) -> tuple[Quantisation, dict[str, Tensor]]:
        """Return the record in a file, and the scales of the weights that are stored in int8.

        Args:
            entry: of :meth:`to_dict`.
            state: name -> tensor; what the record has put there is taken out.
            what: the start of an error message about the tensors.

        Raises:
            ValueError: one that no network can have, in one sentence.
        """
        grids = {}
        for name, item in entry["grids"].entries():
            scale, zero = item.items(2)
            try:
                grids[name] = Grid(scale.number(), zero.integer(0))
            except ValueError as error:
                raise item.wrong(f"a scale and a zero point ({error})") from None
        shifts: dict[str, Tensor | None] = {}
        for name, said in entry["convolutions"].entries():
            shift = state.pop(f"{_PLACE}shift/{name}", None)
            if said.boolean() != (shift is not None and _real(shift)):
                raise ValueError(
                    f"{what}: the shift of convolution {name!r} is missing, needless or no vector"
                )
            shifts[name] = shift
        scales: dict[str, Tensor] = {}
        for key in [key for key in state if key.startswith(_PLACE)]:
            name = key.removeprefix(f"{_PLACE}scale/")
            weight, factors = state.get(name), state.pop(key)
            fits = weight is not None and weight.dtype == torch.int8
            if not fits or not _real(factors) or not bool((factors > 0).all()):
                raise ValueError(f"{what}: {key!r} is no scale of a weight in int8")
            scales[name] = factors
        layers = tuple(item.text() for item in entry["layers"].items())
        for name in (f"{path}.weight" for path in layers):
            if name in state and state[name].dtype == torch.int8 and name not in scales:
                raise ValueError(f"{what}: {name!r} is in int8 and has no scale")
        return cls(grids, shifts, layers, _checked(entry["facts"])), scales


def _checked(facts: Entry) -> dict[str, Any]:
    for key in ("layers", "images"):
        facts[key].integer(0)
    facts["drop"].number(0)
    facts["observer"].text()
    for _, why in facts["kept"].entries():
        why.text()
    for side in facts["input"].items(3):
        side.integer(1)
    return dict(facts.object())


def _real(value: Tensor) -> bool:
    return value.dtype == torch.float32 and value.dim() == 1 and bool(value.isfinite().all())


def quantisation_of(model: nn.Module) -> Quantisation | None:
    """Return a network's record, or None."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Quantisation) else None


def note_quantisation(model: nn.Module, record: Quantisation) -> None:
    """Give a network its record."""
    setattr(model, _ATTRIBUTE, record)


# ---------------------------------------------------------------- weights


def _by_output(module: Any, weight: Tensor) -> Tensor:
    """A view of a convolution's weight, [O, products]: of a transposed one [C, O / groups, kh, kw] turned."""
    if not surely(module, *TRANSPOSED):
        return weight.flatten(1)
    grouped = weight.view(module.groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1).flatten(1)


def _as_stored(module: Any, rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`_by_output`."""
    if not surely(module, *TRANSPOSED):
        return rows.view(shape)
    turned = rows.view(module.groups, shape[1], -1, *shape[2:])
    return turned.transpose(1, 2).reshape(shape)


def encode_weight(module: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers of a convolution's weight, int8 of its shape, and the scale of each output, [O].

    q = round(w / s), s = max |w| / 127 rounded up to 16 significant bits; a channel of zeros has s = 1.

    Args:
        module: the convolution.
        weight: its weight, or one of that shape.

    Example:
        >>> encode_weight(conv := nn.Conv2d(1, 1, 1), torch.tensor(1.27).view(1, 1, 1, 1))[0].item()
        127
    """
    rows = _by_output(module, weight.detach().double())
    largest = rows.abs().amax(1)
    mantissa, exponent = torch.frexp(largest / 127)
    scales = torch.ldexp((mantissa * 2**_BITS).ceil(), exponent - _BITS)
    scales = torch.where(largest > 1e-30 * 127, scales, 1.0)
    integers = (rows / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
    return _as_stored(module, integers, weight.shape).contiguous(), scales.float()


def decode_weight(module: nn.Module, integers: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 weight that integers and scales stand for; the inverse of :func:`encode_weight`.

    Raises:
        ValueError: another number of scales than outputs.
    """
    rows = _by_output(module, integers)
    if scales.shape != rows.shape[:1]:
        raise ValueError(f"{len(scales)} scales for {len(rows)} outputs")
    return _as_stored(module, rows.float() * scales[:, None], integers.shape).contiguous()


def round_weights(model: nn.Module, layers: Iterable[str]) -> None:
    """Make the weights of some convolutions whole multiples of their scales, in place."""
    with torch.no_grad():
        for path in layers:
            module: Any = model.get_submodule(path)
            weight = module.weight
            weight.copy_(decode_weight(module, *(t.to(weight.device) for t in encode_weight(module, weight))))


def sole_weights(model: nn.Module, layers: Iterable[str]) -> tuple[str, ...]:
    """Return those of some paths that are convolutions with a float32 weight that no other module has."""
    wanted = {path: model.get_submodule(path) for path in layers}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(id(module))
    found = []
    for path, part in wanted.items():
        weight = part._parameters.get("weight") if is_conv(part) else None
        if weight is None or weight.dtype != torch.float32:
            continue
        if owners[id(weight)] <= {id(module) for module in wanted.values()}:
            found.append(path)
    return tuple(found)
