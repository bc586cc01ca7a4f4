"""Read checkpoint files of training scripts as data, and find the network's weights in them.

torch's files are pickles that refer to blocks of numbers. The pickle is read without importing or calling
the names in it (:mod:`quincunx.pickles`), so that arguments, configurations and whole networks beside the
weights are harmless; only the blocks of the chosen weights are read.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quincunx.pickles import Bounded, Dictionary, Made, Makers, Named, read_pickle
from quincunx.reading import (
    ZIP_DAMAGE,
    bounded,
    naming,
    read_member,
)

__all__ = ["read_weights"]

# Keys under which training scripts store weights: the plain ones first, then averages over training steps.
_PLAIN = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params", "module",
    "net_state_dict", "network_state_dict",
)  # fmt: skip
_AVERAGED = re.compile(r"(?:^|[_.-])(?i:ema|swa|avg|averaged?|shadow)(?=$|[_.-]|\d)|Ema|EMA")
# keys of entries whose tensors are not weights
_NO_WEIGHTS = re.compile(r"(?i)optim|sched|scaler|^amp$|rng|random|hyper|callbacks|loops|^loss|criterion")
# the depth of the search for state dicts, and the most of them
_DEPTH, _SETS = 4, 64
_SHOWN = 10
# parts of names that wrappers add: DataParallel, torch.compile, FSDP, training loops
_WRAPPERS = (
    "module",
    "_orig_mod",
    "model",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
_MAYBE_WRAPPERS = {*_WRAPPERS, "net", "network"}
# bytes that a tensor of repeated values may claim even if fewer are stored
_SPREAD = 1 << 20

_log = logging.getLogger("quincunx")

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class _Block:
    """Stored numbers: their name in the file, type and count; and where a view of them begins."""

    key: str
    dtype: torch.dtype
    count: int
    start: int = 0

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


class _Values:
    """Describes a tensor: a block, and the order of its numbers."""

    __slots__ = ("block", "dtype", "offset", "shape", "stride")

    def __init__(
        self, block: _Block, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.block, self.dtype, self.offset, self.shape, self.stride = block, dtype, offset, shape, stride

    def build(self, state: object) -> None:
        """Ignore attributes that were set on a tensor."""


def _values(block: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: Any = None) -> _Values:
    if not isinstance(block, _Block):
        raise ValueError("a tensor without numbers")
    if any(isinstance(item, dict) and (item.get("conj") or item.get("neg")) for item in rest):
        raise ValueError("a tensor whose values are conjugated or negated when they are read")
    sizes = [offset, *shape, *stride]
    if len(shape) != len(stride) or len(shape) > 64:
        raise ValueError("a tensor whose sizes and strides differ in number")
    if not all(type(n) is int and 0 <= n < 2**62 for n in sizes):
        raise ValueError("a tensor whose size is no number")
    kind = block.dtype if dtype is None else dtype
    offset += block.start if kind == block.dtype else 0
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * kind.itemsize > (block.start + block.count) * block.dtype.itemsize:
        raise ValueError(f"a tensor of {tuple(shape)} that reaches beyond its {block.count} stored numbers")
    stored = block.bytes
    if math.prod(shape) * kind.itemsize > max(stored, _SPREAD):
        raise ValueError(f"a tensor of {tuple(shape)} that claims more than its {stored:,} stored bytes")
    return _Values(block, kind, offset, tuple(shape), tuple(stride))


def _of_kind(*arguments: Any) -> _Values:
    """Read torch._utils._rebuild_tensor_v3, for types that have no storage class."""
    block, offset, shape, stride, _, _, named = arguments[:7]
    dtype = getattr(torch, named.name, None) if isinstance(named, Named) and named.module == "torch" else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor of the unknown kind {named!r}"[:200])
    return _values(block, offset, shape, stride, dtype=dtype)


def _first(value: Any, *_: Any) -> Any:
    return value


def _of_subclass(_: Any, __: Any, arguments: Any, ___: Any) -> Any:
    """Return a tensor of a subclass, described by its plain tensor's arguments."""
    if not isinstance(arguments, tuple) or not arguments:
        return None
    return arguments[0] if isinstance(arguments[0], _Values) else _values(*arguments)


def _ordered(*arguments: Any) -> Dictionary:
    made = Dictionary()
    for pairs in arguments[:1]:
        # protocols before 2 pass the entries at once
        for key, value in pairs if isinstance(pairs, list) else ():
            if isinstance(key, str):
                made[key] = value
    return made


_MAKERS: Makers = {
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): lambda *_: Dictionary(),
    ("torch", "Size"): _first,
    ("torch._utils", "_rebuild_tensor"): _values,
    ("torch._utils", "_rebuild_tensor_v2"): _values,
    ("torch._utils", "_rebuild_tensor_v3"): _of_kind,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_subclass,
    ("torch.nn.parameter", "Parameter"): _first,
}


def _block(identity: Any) -> Any:
    """Return what a persistent id refers to: a block of numbers, or the class of a container."""
    if not isinstance(identity, tuple) or not identity:
        raise ValueError("a reference to nothing")
    if identity[0] in ("module", b"module") and len(identity) > 1:
        return identity[1]
    if len(identity) < 5 or not isinstance(identity[1], Named):
        raise ValueError("a reference to numbers of no kind")
    dtype = _STORAGES.get(identity[1].name)
    if dtype is None:
        raise ValueError(f"numbers of the unknown kind {identity[1]!r}"[:200])
    key, count, view = identity[2], identity[4], identity[5] if len(identity) > 5 else None
    if type(count) is not int or not 0 <= count < 2**62 or not isinstance(key, str | int):
        raise ValueError("a block of numbers without a size")
    start = 0
    if isinstance(view, tuple) and len(view) == 3:
        _, start, count = view
        if (
            type(start) is not int
            or type(count) is not int
            or not 0 <= start < 2**62
            or not 0 <= count < 2**62
        ):
            raise ValueError("a part of a block without a size")
    return _Block(str(key), dtype, count, start)


# ---------------------------------------------------------------- the two kinds of files of torch


Blocks = Callable[[_Block], bytearray]


def _open_zip(path: Path, file: IO[bytes], length: int) -> tuple[object, Blocks]:
    archive = zipfile.ZipFile(file)
    members = {member.filename: member for member in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise ValueError("a zip archive, but not one that torch.save writes")
    (root,) = roots
    if f"{root}constants.pkl" in members or any(name.startswith(f"{root}code/") for name in members):
        raise ValueError(
            "a compiled program of TorchScript; load it with torch.jit.load and save its state_dict() with "
            "torch.save"
        )
    if f"{root}byteorder" in members:
        order = read_member(
            archive, members[f"{root}byteorder"], length, what=f"{path}: byteorder", at_most=64
        )
        if order.decode("latin-1") != sys.byteorder:
            raise ValueError("numbers in the byte order of another machine; load and save it there")
    content = read_member(archive, members[f"{root}data.pkl"], length, what=f"{path}: data.pkl")
    left = [2 * length + (1 << 20)]

    def numbers(block: _Block) -> bytearray:
        member = members.get(f"{root}data/{block.key}")
        if member is None:
            raise ValueError(f"the numbers {block.key[:40]!r} are missing")
        wanted = (block.start + block.count) * block.dtype.itemsize
        if member.file_size < wanted:
            raise ValueError(
                f"{member.filename[:80]!r} has {member.file_size:,} bytes, of which {wanted:,} are asked for"
            )
        # members of an honest archive do not overlap; a compressed one may be longer than its file
        left[0] -= member.compress_size
        if left[0] < 0:
            raise ValueError("members that overlap")
        return bytearray(read_member(archive, member, length, what=f"{path}: {member.filename[:80]!r}"))

    return read_pickle(content, len(content), makers=_MAKERS, persistent=_block), numbers


_MAGIC = 0x1950A86A20F9469CFC6C


def _open_old(file: IO[bytes], length: int) -> tuple[object, Blocks]:
    """Read a file of torch before 1.6: several pickles in a row, then the blocks."""
    source = Bounded(file, length)
    sizes: dict[str, int] = {}

    def noted(identity: Any) -> Any:
        block = _block(identity)
        if isinstance(block, _Block):
            sizes[block.key] = block.dtype.itemsize
        return block

    def following() -> Any:
        return read_pickle(source, length - file.tell(), makers=_MAKERS, persistent=noted)

    if following() != _MAGIC:
        raise ValueError("no file of torch.save")
    if following() != 1001:
        raise ValueError("of an unknown version")
    system = following()
    if isinstance(system, dict) and system.get("little_endian") is (sys.byteorder != "little"):
        raise ValueError("numbers in the byte order of another machine; load and save it there")
    found, keys = following(), following()
    if not isinstance(keys, list):
        raise ValueError("no list of its numbers")
    places: dict[str, tuple[int, int]] = {}
    for key in map(str, keys):
        if key not in sizes:
            raise ValueError("numbers that nothing refers to")
        head = source.read(8)
        count = int.from_bytes(head, sys.byteorder)
        start, size = file.tell(), count * sizes[key]
        if len(head) < 8 or size > length - start:
            raise ValueError("it is cut short")
        places[key] = (start, size)
        file.seek(start + size)

    def numbers(block: _Block) -> bytearray:
        if block.key not in places:
            raise ValueError(f"the numbers {block.key[:40]!r} are missing")
        start, size = places[block.key]
        if (block.start + block.count) * block.dtype.itemsize > size:
            raise ValueError("a tensor that reaches beyond its numbers")
        file.seek(start)
        return bytearray(source.read(size))

    return found, numbers


def _tensors(state: Mapping[str, Any], numbers: Blocks) -> dict[str, Tensor]:
    """Return the described tensors; those of one block share their memory, as they did."""
    blocks: dict[str, bytearray] = {}
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            made[name] = value
            continue
        if value.block.key not in blocks:
            blocks[value.block.key] = numbers(value.block) if value.block.bytes else bytearray()
        content = blocks[value.block.key]
        if 0 in value.shape or not content:
            made[name] = torch.empty(value.shape, dtype=value.dtype)
            continue
        whole = len(content) // value.dtype.itemsize * value.dtype.itemsize
        flat = torch.frombuffer(content, dtype=torch.uint8, count=whole).view(value.dtype)
        made[name] = flat.as_strided(value.shape, value.stride, value.offset)
    return made


# ---------------------------------------------------------------- finding the weights


@dataclass(frozen=True)
class _Found:
    """A set of named tensors: the keys that lead to it, and its tensors."""

    where: tuple[str, ...]
    state: dict[str, Any]

    @property
    def path(self) -> str:
        return ".".join(self.where)

    @property
    def order(self) -> tuple[bool, int, int]:
        """Return a sort key: plain weights before averages, usual keys first, outer before inner."""
        averaged = any(_AVERAGED.search(key) for key in self.where)
        last = self.where[-1] if self.where else ""
        rank = _PLAIN.index(last) if last in _PLAIN else len(_PLAIN)
        return averaged, rank if self.where else -1, len(self.where)


def _entries(value: object) -> dict[Any, Any] | None:
    if isinstance(value, Made):
        return value.entries or None
    return value if isinstance(value, dict) else None


def _is_tensor(value: object) -> bool:
    return isinstance(value, _Values | Tensor)


def _search(value: object) -> list[_Found]:
    """Return every set of named tensors under text keys, except those of optimisers and the like."""
    found: list[_Found] = []
    seen: set[int] = set()
    waiting: deque[tuple[object, tuple[str, ...]]] = deque([(value, ())])
    while waiting and len(found) < _SETS:
        item, where = waiting.popleft()
        entries = _entries(item)
        if entries is None or id(entries) in seen:
            continue
        seen.add(id(entries))
        texts = [(key, inner) for key, inner in entries.items() if isinstance(key, str)]
        state = {key: inner for key, inner in texts if _is_tensor(inner)}
        if state:
            found.append(_Found(where, state))
        if len(where) < _DEPTH:
            waiting += [(inner, (*where, key)) for key, inner in texts if not _NO_WEIGHTS.search(key)]
    return found


def _contents(value: object) -> str:
    """Describe what a file holds, in a few words."""
    entries = _entries(value)
    if entries is None:
        return f"one {_kind(value)}"
    shown = [f"{str(key)[:40]!r} ({_kind(item)})" for key, item in list(entries.items())[:_SHOWN]]
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"a dictionary of {', '.join(shown)}{more}" if shown else "an empty dictionary"


def _kind(value: object) -> str:
    if isinstance(value, Made):
        return f"pickled {str(value)[:80]}"
    entries = _entries(value)
    if entries is not None:
        return f"dictionary of {len(entries)}"
    return "tensor" if _is_tensor(value) else type(value).__name__


def _network_in(value: object) -> Made | None:
    """Return a pickled whole network, at the top or under a key, or None."""
    entries = value.values() if isinstance(value, dict) else ()
    for item in (value, *entries):
        state = item.state if isinstance(item, Made) else None
        if (
            isinstance(item, Made)
            and isinstance(state, dict)
            and ("_modules" in state or "_parameters" in state)
        ):
            return item
    return None


def _refusal(value: object) -> str:
    network = _network_in(value)
    if network is not None:
        return (
            f"a whole network ({str(network)[:80]}) was pickled, which only its own program can read; there, "
            "save the names and tensors instead: torch.save(network.state_dict(), path)"
        )
    return f"it holds no state dict (names and tensors), but {_contents(value)}"


def _choose(
    found: Sequence[_Found], known: Collection[str], key: str | None
) -> tuple[_Found, dict[str, Any], list[_Found]]:
    """Return the chosen weights, renamed to the known names, and other sets that fit equally well."""
    if key is not None:
        found = [one for one in found if one.path == key] or found
        if found[0].path != key:
            raise ValueError(
                f"key={key!r}: expected one of {', '.join(repr(one.path) for one in found[:_SHOWN])}"
            )
    ordered = sorted(found, key=lambda one: one.order)
    if known:
        wanted = {name for name in known if not name.endswith("num_batches_tracked")} or set(known)
        renamed = [_renamed(one.state, known) for one in ordered]
        fits = [sum(name in wanted for name in state) for state in renamed]
        first = fits.index(max(fits))
        alike = [one for one, fit in zip(ordered, fits, strict=True) if fit == fits[first]]
        return ordered[first], renamed[first], alike[1:]
    # single tensors beside the weights, such as a best accuracy, are not weights
    most = max(len(one.state) for one in ordered)
    alike = [one for one in ordered if 2 * len(one.state) > most]
    rivals = [one for one in alike if one.order[:2] == alike[0].order[:2]]
    if len(rivals) > 1:
        names = ", ".join(repr(one.path) for one in rivals[:_SHOWN])
        raise ValueError(f"it holds several state dicts ({names}); key= says which one is meant")
    return alike[0], _renamed(alike[0].state, known), alike[1:]


def _renamed(state: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Remove the parts that wrappers add to names, and use today's spelling.

    A name that the network has stays. In other names the wrappers' parts (``module``,
    ``_orig_mod``, ``model``) are ignored if exactly one name of the network then matches.
    """
    plain = _stripped(state, known)
    targets = plain
    if known:
        known = set(known)
        cores: dict[str, str | None] = {}
        for name in known:
            core = _core(name)
            cores[core] = None if core in cores else name
        targets = {}
        for name, short in plain.items():
            options = (name, short, _today(short), cores.get(_core(_today(short))))
            targets[name] = next((option for option in options if option in known), _today(short)) or short
    else:
        targets = {name: _today(short) for name, short in plain.items()}
    # two names that would become equal stay different, and are reported if they do not fit
    counts: dict[str, int] = {}
    for target in targets.values():
        counts[target] = counts.get(target, 0) + 1
    return {target if counts[target] == 1 else name: state[name] for name, target in targets.items()}


def _stripped(state: Mapping[str, Any], known: Collection[str]) -> dict[str, str]:
    """Return each name, and the name without the wrappers that prefix all of them."""
    short = {name: name for name in state}
    for _ in range(8):
        first = next(iter(short.values()), "").partition(".")[0]
        prefix = f"{first}."
        if first not in _WRAPPERS or not all(
            name.startswith(prefix) and name not in known for name in short.values()
        ):
            break
        short = {name: value.removeprefix(prefix) for name, value in short.items()}
    return short


def _core(name: str) -> str:
    parts = name.split(".")
    return ".".join(part for part in parts[:-1] if part not in _MAYBE_WRAPPERS) + f".{parts[-1]}"


def _today(name: str) -> str:
    """Rename weights of the first published DenseNets, which had a dot in ``denselayer1.norm.1``."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name)


def read_weights(
    path: str | Path, *, known: Collection[str] = (), key: str | None = None
) -> dict[str, Tensor]:
    """Return a state dict from a torch checkpoint (.pth, .pt, .th) or a .safetensors file.

    Nothing in the file is executed, imported or unpickled. The state dict may be the file itself or lie in
    it: under ``state_dict``, ``model``, ``model_state_dict``, ``net``, ``network``, ``weights``, ``params``,
    ``ema`` or another key, also nested (``{"model": {"state_dict": ...}}``), beside an optimiser, epochs and
    arguments of any kind. If there are several, the one with most of the ``known`` names is chosen. If the
    plain weights and an average of them (``ema``, ``model_ema``, ``state_dict_ema``) fit equally well, the
    plain ones are chosen, a warning of the logger ``quincunx`` says so, and ``key`` selects the other.

    The prefixes ``module.`` of parallel training, ``_orig_mod.`` of a compiled network and ``model.`` of
    training loops are removed, in any order, and names of torchvision's first DenseNets
    (``denselayer1.norm.1``) become today's.

    Args:
        path: the file.
        known: the network's names; they do not change, and other names become them if they differ only in
            wrappers' parts (``module``, ``_orig_mod``, ``model``).
        key: selects one of several state dicts, the keys joined by dots: ``"model_ema"``, ``"ema.module"``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state dict; the message says what the file holds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with naming(path), path.open("rb") as file:
            loaded, numbers = _opened(path, file)
            found = _search(loaded)
            if not found:
                raise ValueError(_refusal(loaded))
            chosen, state, others = _choose(found, known, key)
            tensors = _tensors(state, numbers)
    except (*ZIP_DAMAGE, SafetensorError, TypeError, AttributeError, MemoryError) as error:
        if isinstance(error, OSError) and not isinstance(error, zipfile.BadZipFile):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: no checkpoint of tensors ({reason.removeprefix(f'{path}: ')[:1200]})"
        ) from error
    if others and key is None:
        names = ", ".join(repr(one.path) for one in others[:_SHOWN])
        _log.warning(
            "%s: holds the weights %s, which are used, and %s; key= takes another",
            path,
            repr(chosen.path),
            names,
        )
    return tensors


def _opened(path: Path, file: IO[bytes]) -> tuple[object, Blocks]:
    """Return what a file holds, and a function that reads its numbers."""
    head = file.read(9)
    file.seek(0, 2)
    length = file.tell()
    file.seek(0)
    # the length of a header, which is JSON
    if path.suffix == ".safetensors" or (head[8:] == b"{" and int.from_bytes(head[:8], "little") < length):
        bounded(int.from_bytes(head[:8], "little"), what=f"{path}: its head", at_most=max(0, length - 8))
        return load_file(path), lambda block: bytearray()
    if head.startswith(b"PK"):
        return _open_zip(path, file, length)
    if not head.startswith(b"\x80"):
        raise ValueError("neither a file of torch.save nor a .safetensors file" if head else "an empty file")
    return _open_old(file, length)
