"""Models and results on disk: written whole or not at all, and never unpickled."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from quincunx import networks
from quincunx.methods import build_module
from quincunx.networks.weights import fill, place_of
from quincunx.preprocessing import Preprocessing
from quincunx.reading import Entry, difference, read_json, read_tensors, reason_of, sha256_of
from quincunx.surgery import Attached, put
from quincunx.writing import (
    fill_folder,
    restore,
    storable,
    write_atomically,
    write_json,
    write_tensors,
    write_text,
)

__all__ = [
    "build_measured",
    "difference",
    "load",
    "name_of",
    "note_factory",
    "read_json",
    "save",
    "spec_of",
    "storable_state",
    "take_dtypes",
    "write_atomically",
    "write_json",
    "write_text",
]

Factory = Callable[[], nn.Module]

_FORMAT = "quincunx-artifact"
_VERSION = 1
_SPEC, _WEIGHTS = "spec.json", "weights.safetensors"


def spec_of(model: nn.Module) -> dict[str, Any]:
    """The JSON-ready description from which a model can be built again.

    Raises:
        ValueError: the model was not built by :func:`quincunx.networks.build`, and no factory is noted.
    """
    model = unwrapped(model)
    spec = getattr(model, "quincunx_spec", None)
    if not isinstance(spec, dict):
        raise ValueError(
            f"model: {type(model).__name__} has no spec to build it from again; "
            "make it with qx.networks.build(...), or say which function of yours makes it: "
            'factory="package.module:function"'
        )
    replaced = _replaced(model)
    return {**spec, "replaced": replaced} if replaced else spec


# what each of torch's wrappers keeps the network under; its state is named by that
_WRAPPERS: dict[type[nn.Module], str] = {
    nn.DataParallel: "module",
    nn.parallel.DistributedDataParallel: "module",
    AveragedModel: "module",
}


def _wrapped(module: nn.Module) -> str | None:
    """The name under which a wrapper of torch keeps the module that it runs; None of any other module."""
    for kind, name in _WRAPPERS.items():
        if isinstance(module, kind):
            return name
    # torch's compiler is large, and there only where it was used
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if compiler is not None and isinstance(module, compiler.OptimizedModule) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, where torch's compiler, DataParallel, DistributedDataParallel or AveragedModel
    stands around it."""
    while (name := _wrapped(model)) is not None:
        model = model.get_submodule(name)
    return model


def _plain_names(model: nn.Module) -> Callable[[str], str]:
    """Takes from a path the names that wrappers of torch, anywhere in a network, put into it."""
    added = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if (name := _wrapped(module)) is not None
    }

    def plain(path: str) -> str:
        parts = path.split(".")
        return ".".join(p for i, p in enumerate(parts) if ".".join(parts[: i + 1]) not in added)

    return plain if added else str


def _replaced(model: nn.Module) -> dict[str, Any]:
    """What ``accelerate`` noted of the layers that it made, by names without wrappers."""
    plain = _plain_names(model)
    return {
        plain(name): {**spec, **{key: plain(spec[key]) for key in ("as", "partner") if key in spec}}
        for name, spec in getattr(model, "quincunx_replaced", {}).items()
    }


def note_factory(model: nn.Module, factory: str) -> nn.Module:
    """Note in a network which function makes it; :func:`spec_of` then describes the network by that.

    Args:
        model: any network; changed in place by the note alone.
        factory: "package.module:function"; the function takes no arguments and returns such a network.

    Returns:
        The network.

    Raises:
        ValueError: a text of another form.

    Example:
        >>> spec_of(note_factory(nn.Linear(2, 2), "mynets.small:make"))
        {'kind': 'factory', 'factory': 'mynets.small:make'}
    """
    check_factory(factory)
    model.quincunx_spec = {"kind": "factory", "factory": factory}  # type: ignore[assignment]
    return model


def check_factory(factory: object, what: str = "factory") -> None:
    """Refuse what is not of the form package.module:function.

    Raises:
        ValueError: another text, or none.
    """
    name = r"[^\W\d]\w*"
    path = rf"{name}(\.{name})*"
    if not isinstance(factory, str) or not re.fullmatch(rf"{path}:{path}", factory):
        raise ValueError(f"{what}={factory!r}: expected package.module:function, such as mynets.small:make")


def name_of(spec: dict[str, Any]) -> str:
    """The name in a network's spec, or the factory that is noted there."""
    return str(spec["factory"] if spec.get("kind") == "factory" else spec["name"])


def save(
    model: nn.Module, folder: str | Path, *, info: dict[str, Any] | None = None, factory: str | None = None
) -> Path:
    """Write a model as a folder of ``spec.json`` and ``weights.safetensors``.

    Args:
        model: a network made by :func:`quincunx.networks.build`, or any other with a ``factory``; also one
            whose layers :func:`quincunx.accelerate` has replaced. What ``torch.compile``, ``DataParallel``,
            ``DistributedDataParallel`` or ``AveragedModel`` stands around, the whole or a part of it, is
            written without them.
        folder: made with its parents; an artifact that is there is replaced, but only once the new
            one is complete.
        info: JSON-ready facts to keep with it, such as its classes and normalisation.
        factory: which function of yours makes the network, as "package.module:function". It is noted for
            people to read and never imported: :func:`load` must be given the function.

    Returns:
        The folder.

    Raises:
        ValueError: a model without a spec or factory; a state dict that holds more than tensors, or
            tensors that the format has no type for; a folder that holds something else.
        TypeError: no network; ``info`` that is no JSON.
        OSError: it cannot be written; what was there before is still there.

    Example:
        >>> import tempfile
        >>> folder = save(networks.build("rrn8"), tempfile.mkdtemp() + "/small")
        >>> sorted(p.name for p in folder.iterdir())
        ['spec.json', 'weights.safetensors']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if factory is not None:
        check_factory(factory)
        replaced = _replaced(unwrapped(model))
        spec = {"kind": "factory", "factory": factory, **({"replaced": replaced} if replaced else {})}
    else:
        spec = spec_of(model)
    state = storable_state(model)
    place = Path(folder).resolve()
    # before it is looked at: a killed run may have left it aside
    restore(place)
    check_replaceable(folder)

    def write(fresh: Path) -> None:
        weights = fresh / _WEIGHTS
        write_tensors(weights, state)
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": spec,
            "weights": {"file": _WEIGHTS, "sha256": sha256_of(weights)},
            "info": info or {},
        }
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        (fresh / _SPEC).write_text(text, encoding="utf-8")

    try:
        json.dumps(info, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise type(error)(f"info: cannot be written as JSON ({error})") from error
    # where a link leads, so that the link stays
    fill_folder(place, write)
    return Path(folder)


def storable_state(model: nn.Module) -> dict[str, Tensor]:
    """A network's state as it goes to disk: each tensor in memory of its own, of tied weights the first
    alone, by names without torch's wrappers.

    Raises:
        ValueError: it holds something else than tensors with values, or such as the format cannot hold.
    """
    inner = unwrapped(model)
    found: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    # of a wrapper, its own state (how many models an average is of) is no part of the network
    plain = _plain_names(inner)
    for name, value in check_state(inner).items():
        found.setdefault(place_of(value), (plain(name), value))
    # a view of a larger tensor would not be written without the rest
    whole = {name: value.untyped_storage().nbytes() == value.nbytes for name, value in found.values()}
    return {n: _own(v, copied=not whole[n]) for n, v in found.values()}


def _own(value: Tensor, *, copied: bool) -> Tensor:
    value = value.detach().resolve_conj().resolve_neg()
    return value.clone(memory_format=torch.contiguous_format) if copied else value.contiguous()


def check_state(model: nn.Module) -> dict[str, Tensor]:
    """A network's state dict, which an artifact can hold.

    Raises:
        ValueError: it holds something else than tensors.
    """
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: its state has a {type(value).__name__} under {name!r}; an artifact holds tensors"
            )
        if kind := _unstorable(value):
            raise ValueError(f"model: its state has {kind} under {name!r}, which an artifact cannot hold")
    return state


# whose values are the tensor's own; of another class they may be computed, or lie in other tensors
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def _unstorable(value: Tensor) -> str | None:
    """What keeps a tensor from being written as it is, if something does."""
    if is_lazy(value):
        return "a parameter whose size is not known before the first call"
    if type(value) not in _PLAIN:
        return f"a {type(value).__name__}"
    if value.is_meta:
        return "a tensor without values (on the meta device)"
    if value.layout != torch.strided or value.is_quantized:
        return (
            f"a tensor of layout {value.layout}" if not value.is_quantized else f"a tensor of {value.dtype}"
        )
    return None if storable(value.dtype) else f"a tensor of {value.dtype}"


def check_replaceable(folder: str | Path) -> None:
    """Refuse a place where :func:`save` would destroy something that is no artifact.

    Raises:
        ValueError: it holds another file than an artifact's two, or the spec of another program.
    """
    path = Path(folder)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"folder={str(folder)!r}: is a file; not replaced")
    found = {entry.name for entry in path.iterdir()}
    if other := sorted(found - {_SPEC, _WEIGHTS}):
        raise ValueError(f"folder={str(folder)!r}: holds {', '.join(other[:3])}, no artifact; not replaced")
    if found and not _is_ours(path / _SPEC):
        raise ValueError(f"folder={str(folder)!r}: holds no artifact's {_SPEC}; not replaced")


def _is_ours(spec: Path) -> bool:
    try:
        content = read_json(spec)
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and content.get("format") == _FORMAT


def read_spec(folder: str | Path) -> dict[str, Any]:
    """The checked content of an artifact's ``spec.json``.

    Raises:
        FileNotFoundError: the folder or its ``spec.json`` is not there.
        ValueError: not an artifact, or of a later version.
    """
    return _read_spec(Path(folder)).object()


def _read_spec(folder: Path) -> Entry:
    restore(folder.resolve())
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / _SPEC
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no artifact here ({_SPEC} is missing)")
    spec = Entry(read_json(path), path)
    if not isinstance(spec.value, dict) or spec.value.get("format") != _FORMAT:
        raise ValueError(f"{path}: not the spec of a quincunx artifact")
    version = spec.get("version", None).value
    if type(version) is not int or version != _VERSION:
        raise ValueError(f"{path}: version {version!r}, but this program reads version {_VERSION}"[:500])
    return spec


def load(folder: str | Path, *, factory: Factory | None = None) -> nn.Module:
    """Read a model that :func:`save` wrote; in evaluation mode, on the CPU.

    Where the artifact notes how its training saw images, as those of the command line do, the model has an
    attribute ``preprocess``: a :class:`quincunx.preprocessing.Preprocessing`, a function from images in bytes
    or in [0, 1] to what the network takes; ``.mean``, ``.std`` and ``.size`` tell it.

    Nothing in the folder is executed: nothing is unpickled, and the name of a function that was noted there
    is not imported. Only the function that you pass is called.

    Args:
        folder: the artifact.
        factory: for a network of your own, the function that makes it: without arguments, as it was before
            its layers were replaced. Its weights do not matter.

    Raises:
        FileNotFoundError: the folder or one of its files is not there.
        ValueError: a corrupt or foreign artifact; ``factory`` is missing, or given for nothing; its network
            is not the one whose weights these are (missing and unexpected names and wrong shapes).
        TypeError: ``factory`` is no function, or returns no network.

    Example:
        >>> import tempfile
        >>> folder = save(networks.build("rrn8"), tempfile.mkdtemp() + "/small")
        >>> type(load(folder)).__name__
        'PreResNet'
        >>> def make():
        ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> folder = save(make(), folder, factory="mynets:make")
        >>> load(folder, factory=make)[0].out_channels
        8
    """
    folder = Path(folder)
    spec = _read_spec(folder)
    described, replaced, name = _description(spec)
    spec["weights"]["file"].text(_WEIGHTS)
    weights = folder / _WEIGHTS
    _check_given(folder, described, factory)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: missing from the artifact")
    if sha256_of(weights) != spec["weights"]["sha256"].value:
        raise ValueError(f"{weights}: corrupt, its SHA-256 is not the one in {_SPEC}")
    what = f"{weights}: does not fit {name}"
    state = read_tensors(weights, what=what)
    # what a function of the user raises is the user's to see
    own = None if factory is None else made_by(factory)

    def build() -> nn.Module:
        settings = described["settings"]
        return networks.build(
            described["name"], described["num_classes"], described["in_channels"], **settings
        )

    with _describing(folder, None if own is None else name):
        if own is None:
            measured = build_measured(lambda: _rebuilt(build(), replaced), state)
            _measure(measured, state, what)
            model = _rebuilt(build(), replaced)
        else:
            _measure_replaced(replaced, state, what)
            model = _rebuilt(own, replaced)
        state = _renamed(model, state)
        take_dtypes(model, state)
        fill(model, state, what)
    if own is not None:
        note_factory(unwrapped(model), name)
    seen = Preprocessing.of(spec.value.get("info"))
    if seen is not None and not hasattr(model, "preprocess"):
        model.preprocess = seen  # type: ignore[assignment, unused-ignore]
    return model.eval()


def _renamed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state by the names that a network has which is wrapped itself, or in parts."""
    plain = _plain_names(model)
    names = {plain(name): name for name in model.state_dict()}
    return {names.get(name, name): value for name, value in state.items()}


def _description(spec: Entry) -> tuple[dict[str, Any], dict[str, dict[str, Any]], str]:
    """What an artifact's spec says of its network: all of it, its replaced layers, and its name."""
    described = spec["model"]
    if described["kind"].text("network", "factory") == "factory":
        try:
            check_factory(described["factory"].value)
        except ValueError as error:
            raise ValueError(f"{spec.file}: incomplete or altered, {error}"[:500]) from error
    else:
        # what each of them may be is for the network's own function to say
        for key in ("name", "num_classes", "in_channels"):
            described[key]
        described["settings"].object()
    replaced = described.get("replaced", {})
    for _, entry in replaced.entries():
        if entry["kind"].text() == "same" and entry["as"].text() not in replaced:
            raise entry["as"].wrong("the name of another replaced layer")
    return described.object(), replaced.object(), name_of(described.object())


@contextmanager
def _describing(folder: Path, own: str | None) -> Iterator[None]:
    """Within: a network is built from a spec; what does not work names the file."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        if str(error).startswith(str(folder)):
            # names that a file has may be of several lines
            raise ValueError(reason_of(error)) from error
        told = "describes no network that can be built" if own is None else f"does not fit {own}'s network"
        raise ValueError(f"{folder / _SPEC}: {told} ({reason_of(error)})") from error


# ---------------------------------------------------------------- sizes before memory


class _Counted(TorchFunctionMode):
    """Ends a construction that makes more than some weights can be the content of."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        # a layer is made, and drawn, by some tens of calls
        self.left = 5000 + 100 * tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("it has more layers than there are weights for")
        return func(*args, **(kwargs or {}))


def build_measured(build: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """What ``build`` makes, of tensors that take no memory: their names and sizes are to be compared with
    those that a file has before memory is taken.

    Raises:
        ValueError: it makes far more tensors than there are in ``state``.
    """
    with torch.device("meta"), _Counted(len(state)):
        return build()


def _measure(measured: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights whose names or sizes are not those of a network that was only measured."""
    claims = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in state.items()
    }
    with warnings.catch_warnings():
        # counters that torch adds where they are missing
        warnings.simplefilter("ignore", UserWarning)
        fill(measured, claims, what)


def _measure_replaced(replaced: Mapping[str, dict[str, Any]], state: Mapping[str, Tensor], what: str) -> None:
    """Refuse replaced layers that the file's weights are not of, before memory is taken for them.

    Raises:
        ValueError: other names or sizes; no spec of a layer.
    """
    for name, spec in replaced.items():
        if spec["kind"] == "same":
            continue
        # a layer that stands in several places is written under one of their names
        names = [name, *(other for other, said in replaced.items() if said.get("as") == name)]
        own = {
            key.removeprefix(f"{place}."): value
            for place in names
            for key, value in state.items()
            if key.startswith(f"{place}.") or not place
        }
        measured = build_measured(lambda spec=spec: build_module(spec), state)  # type: ignore[misc]
        _measure(measured, own, f"{what}: {name}")


def take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network's tensors the types of those that it is to be filled with; their values are undefined.

    Args:
        model: changed in place.
        state: name to tensor, as a state dict.
    """
    for path, module in model.named_modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            wanted = state.get(f"{path}.{name}" if path else name)
            if value is None or wanted is None or wanted.dtype == value.dtype or wanted.shape != value.shape:
                continue
            fresh = torch.empty_like(value, dtype=wanted.dtype, requires_grad=False)
            if isinstance(value, nn.Parameter):
                if not (wanted.is_floating_point() or wanted.is_complex()):
                    value.requires_grad_(False)
                # the same object, which others may share
                value.data = fresh
            else:
                module._buffers[name] = fresh


def _check_given(folder: Path, described: dict[str, Any], factory: object) -> None:
    """Refuse an artifact of a factory without one, and one of a named network with one."""
    if described["kind"] != "factory":
        if factory is not None:
            raise ValueError(f"factory: {folder} holds {described['name']}, which needs none")
        return
    told = "; ".join(lines_to_load(described, folder))
    if factory is None:
        raise ValueError(
            f"{folder}: holds a network made by {described['factory']!r}, and nothing that a file names is "
            f"imported unasked; if you trust that module: {told}"
        )
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(f"factory={factory!r}: expected a function that returns the network: {told}")


def lines_to_load(described: dict[str, Any], folder: str | Path) -> list[str]:
    """What a person writes after ``import quincunx as qx`` to load an artifact with this spec.

    Example:
        >>> lines_to_load({"kind": "factory", "factory": "mynets:make"}, "fast/model")
        ['from mynets import make', 'qx.load("fast/model", factory=make)']
    """
    place = json.dumps(Path(folder).as_posix(), ensure_ascii=False)
    if described["kind"] != "factory":
        return [f"qx.load({place})"]
    module, _, function = described["factory"].partition(":")
    return [
        f"from {module} import {function.partition('.')[0]}",
        f"qx.load({place}, factory={function})",
    ]


def made_by(factory: Factory) -> nn.Module:
    """What a factory returns.

    Raises:
        TypeError: no network.
    """
    model: object = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory: returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _rebuilt(model: nn.Module, replaced: dict[str, dict[str, Any]]) -> nn.Module:
    """The network with the modules that ``accelerate`` noted in place of its own."""
    made: dict[str, nn.Module] = {}
    for name, spec in replaced.items():
        model.get_submodule(name)  # refuses a name that is no layer of this network
        made[name] = made[spec["as"]] if spec.get("kind") == "same" else build_module(spec)
        model = put(model, name, made[name])
    for module in made.values():
        if isinstance(module, Attached):
            module.attach(model)
    if replaced:
        model.quincunx_replaced = replaced  # type: ignore[assignment]
    return model
