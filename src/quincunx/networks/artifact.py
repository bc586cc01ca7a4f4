"""Models on disk: written completely or not at all, and never unpickled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from quincunx import networks
from quincunx.layers.build import build_module
from quincunx.layers.eightbits import Quantisation, decode_weight, note_quantisation, quantisation_of
from quincunx.layers.graph import is_conv
from quincunx.modules import Attached, set_module
from quincunx.networks.preprocessing import Preprocessing
from quincunx.networks.spec import (
    FORMAT,
    FORMAT_VERSION,
    INT8_VERSION,
    SPEC_FILE,
    WEIGHTS_FILE,
    check_factory,
    description_in,
    is_artifact,
    lines_to_load,
    naming_spec,
    note_factory,
    plain_names,
    read_spec_entry,
    replaced_in,
    spec_of,
    unwrapped,
)
from quincunx.networks.weights import fill_parameters, place_of
from quincunx.reading import read_tensors, sha256_of
from quincunx.writing import (
    fill_folder,
    json_text,
    restore,
    storable,
    write_tensors,
)

__all__ = [
    "build_measured",
    "load",
    "save",
    "storable_state",
    "take_dtypes",
]

Factory = Callable[[], nn.Module]


def save(
    model: nn.Module, folder: str | Path, *, info: dict[str, Any] | None = None, factory: str | None = None
) -> Path:
    """Write a model as a folder of ``spec.json`` and ``weights.safetensors``.

    Of a network by :func:`quincunx.calibrate`, weights that compute in eight bits are stored in int8.

    Args:
        model: a network made by :func:`quincunx.networks.build`, or any other with a ``factory``; its
            layers may have been replaced by :func:`quincunx.accelerate`. Wrappers by ``torch.compile``,
            ``DataParallel``, ``DistributedDataParallel`` or ``AveragedModel``, around the whole network or a
            part, are left out.
        folder: created with its parents; an existing artifact is replaced, but only once the new
            one is complete.
        info: JSON-ready facts to store, such as its classes and normalisation.
        factory: the function of yours that builds the network, as "package.module:function". The name is
            stored for people to read and never imported: :func:`load` must be given the function.

    Returns:
        The folder.

    Raises:
        ValueError: a model without a spec or factory; a state dict that holds more than tensors, or
            tensors of a type that the format lacks; a folder that holds something else.
        TypeError: not a network; ``info`` that is not JSON.
        OSError: it cannot be written; previous contents are unchanged.

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
        replaced = replaced_in(unwrapped(model))
        spec = {"kind": "factory", "factory": factory, **({"replaced": replaced} if replaced else {})}
    else:
        spec = spec_of(model)
    state, record = storable_state(model), quantisation_of(unwrapped(model))
    if record is not None:
        state = record.store(unwrapped(model), state)
    place = Path(folder).resolve()
    # before looking at it: a killed run may have moved it aside
    restore(place)
    check_replaceable(folder)

    def write(fresh: Path) -> None:
        weights = fresh / WEIGHTS_FILE
        write_tensors(weights, state)
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION if record is None else INT8_VERSION,
            "model": spec,
            **({} if record is None else {"int8": record.to_dict()}),
            "weights": {"file": WEIGHTS_FILE, "sha256": sha256_of(weights)},
            "info": info or {},
        }
        text = json_text(content) + "\n"
        (fresh / SPEC_FILE).write_text(text, encoding="utf-8")

    try:
        json.dumps(info, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise type(error)(f"info: cannot be written as JSON ({error})") from error
    # resolve a link first, so that the link stays
    fill_folder(place, write)
    return Path(folder)


def storable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's state as it is stored: each tensor in its own memory, only the first of tied
    weights, by names without torch's wrappers.

    Raises:
        ValueError: it holds anything but tensors with values, or tensors that the format cannot hold.
    """
    inner = unwrapped(model)
    found: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    # a wrapper's own state (the number of averaged models) does not belong to the network
    plain = plain_names(inner)
    for name, value in check_state(inner).items():
        found.setdefault(place_of(value), (plain(name), value))
    # a view of a larger tensor would be written with all of it
    whole = {name: value.untyped_storage().nbytes() == value.nbytes for name, value in found.values()}
    return {n: _own(v, copied=not whole[n]) for n, v in found.values()}


def _own(value: Tensor, *, copied: bool) -> Tensor:
    value = value.detach().resolve_conj().resolve_neg()
    return value.clone(memory_format=torch.contiguous_format) if copied else value.contiguous()


def check_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict, after checking that an artifact can hold it.

    Raises:
        ValueError: it holds anything but tensors.
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


# these classes own their values; in another class they may be computed, or lie in other tensors
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def _unstorable(value: Tensor) -> str | None:
    """Return why a tensor cannot be written, or None."""
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
    """Refuse a place where :func:`save` would destroy something that is not an artifact.

    Raises:
        ValueError: it holds files other than an artifact's two, or another program's spec.
    """
    path = Path(folder)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"folder={str(folder)!r}: is a file; not replaced")
    found = {entry.name for entry in path.iterdir()}
    if other := sorted(found - {SPEC_FILE, WEIGHTS_FILE}):
        raise ValueError(f"folder={str(folder)!r}: holds {', '.join(other[:3])}, no artifact; not replaced")
    if found and not is_artifact(path / SPEC_FILE):
        raise ValueError(f"folder={str(folder)!r}: holds no artifact's {SPEC_FILE}; not replaced")


def load(folder: str | Path, *, factory: Factory | None = None) -> nn.Module:
    """Read a model that :func:`save` wrote; in evaluation mode, on the CPU.

    If the artifact records the preprocessing of its training, as those of the command line do, the model has
    an attribute ``preprocess``: a :class:`quincunx.networks.preprocessing.Preprocessing`, a function from
    images as bytes or in [0, 1] to the network's input; it has ``.mean``, ``.std`` and ``.size``.

    Nothing in the folder is executed: nothing is unpickled, and the recorded name of a function
    is not imported. Only the function that you pass is called.

    Args:
        folder: the artifact.
        factory: for a network of your own, the function that builds it: without arguments, with its
            original layers. Its weights do not matter.

    Raises:
        FileNotFoundError: the folder or one of its files does not exist.
        ValueError: a corrupt or foreign artifact; ``factory`` is missing, or not needed; its network
            does not match the weights (missing and unexpected names and wrong shapes).
        TypeError: ``factory`` is not a function, or does not return a network.

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
    spec = read_spec_entry(folder)
    described, replaced, name = description_in(spec)
    spec["weights"]["file"].text(WEIGHTS_FILE)
    weights = folder / WEIGHTS_FILE
    _check_given(folder, described, factory)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: missing from the artifact")
    if sha256_of(weights) != spec["weights"]["sha256"].value:
        raise ValueError(f"{weights}: corrupt, its SHA-256 is not the one in {SPEC_FILE}")
    what = f"{weights}: does not fit {name}"
    state = read_tensors(weights, what=what)
    record, scales = None, dict[str, Tensor]()
    if "int8" in spec:
        record, scales = Quantisation.read(spec["int8"], state, what)
    # exceptions of the user's function go to the user
    own = None if factory is None else made_by(factory)

    def build() -> nn.Module:
        settings = described["settings"]
        return networks.build(
            described["name"], described["num_classes"], described["in_channels"], **settings
        )

    with naming_spec(folder, None if own is None else name):
        if own is None:
            measured = build_measured(lambda: _rebuilt(build(), replaced), state)
            _measure(measured, state, what)
            model = _rebuilt(build(), replaced)
        else:
            _measure_replaced(replaced, state, what)
            model = _rebuilt(own, replaced)
        state = _renamed(model, state)
        for key, scale in scales.items():
            state[key] = _decoded(model, key, state[key], scale, what)
        take_dtypes(model, state)
        fill_parameters(model, state, what)
    if record is not None:
        note_quantisation(unwrapped(model), record)
    if own is not None and getattr(unwrapped(model), "quincunx_spec", {}).get("factory") != name:
        note_factory(unwrapped(model), name)
    seen = Preprocessing.of(spec.value.get("info"))
    if seen is not None and not hasattr(model, "preprocess"):
        model.preprocess = seen  # type: ignore[assignment, unused-ignore]
    return model.eval()


def _decoded(model: nn.Module, name: str, integers: Tensor, scales: Tensor, what: str) -> Tensor:
    """The weight that int8 numbers stand for.

    Raises:
        ValueError: it is none of a convolution, or has other outputs.
    """
    module = model.get_submodule(name.rpartition(".")[0])
    if not is_conv(module) or integers.shape != getattr(module.weight, "shape", None):
        raise ValueError(f"{what}: {name!r} in int8 is no weight of a convolution of this shape")
    if len(scales) != module.out_channels:
        raise ValueError(f"{what}: {name!r} has {len(scales)} scales for {module.out_channels} outputs")
    return decode_weight(module, integers, scales)


def _renamed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state for a network that is wrapped itself, or in parts."""
    plain = plain_names(model)
    names = {plain(name): name for name in model.state_dict()}
    return {names.get(name, name): value for name, value in state.items()}


# ---------------------------------------------------------------- sizes before memory


class _Counted(TorchFunctionMode):
    """Aborts a construction that makes more tensors than a file's weights can fill."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        # creating and initialising a layer takes some tens of calls
        self.left = 5000 + 100 * tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("it has more layers than there are weights for")
        return func(*args, **(kwargs or {}))


def build_measured(build: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """Return ``build()`` with tensors that take no memory, so that their names and sizes can be compared
    with a file's before memory is allocated.

    Raises:
        ValueError: it makes far more tensors than there are in ``state``.
    """
    with torch.device("meta"), _Counted(len(state)):
        return build()


def _measure(measured: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights whose names or sizes do not match a network that was built without memory."""
    claims = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in state.items()
    }
    with warnings.catch_warnings():
        # torch adds missing counters with a warning
        warnings.simplefilter("ignore", UserWarning)
        fill_parameters(measured, claims, what)


def _measure_replaced(replaced: Mapping[str, dict[str, Any]], state: Mapping[str, Tensor], what: str) -> None:
    """Refuse replaced layers that do not match the file's weights, before allocating memory for them.

    Raises:
        ValueError: other names or sizes; an invalid spec of a layer.
    """
    for name, spec in replaced.items():
        if spec["kind"] == "same":
            continue
        # a layer used in several places is stored under one of its names
        names = [name, *(other for other, record in replaced.items() if record.get("as") == name)]
        own = {
            key.removeprefix(f"{place}."): value
            for place in names
            for key, value in state.items()
            if key.startswith(f"{place}.") or not place
        }
        measured = build_measured(lambda spec=spec: build_module(spec), state)  # type: ignore[misc]
        _measure(measured, own, f"{what}: {name}")


def take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network's tensors the types of the tensors that will fill it; their values are undefined.

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
    """Refuse an artifact with a factory if none is given, and a named network if one is given."""
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


def made_by(factory: Factory) -> nn.Module:
    """Return the network that a factory builds.

    Raises:
        TypeError: it is not a network.
    """
    model: object = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"factory: returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _rebuilt(model: nn.Module, replaced: dict[str, dict[str, Any]]) -> nn.Module:
    """Return the network with the modules that ``accelerate`` recorded instead of its own."""
    made: dict[str, nn.Module] = {}
    for name, spec in replaced.items():
        model.get_submodule(name)  # refuses a name that is no layer of this network
        made[name] = made[spec["as"]] if spec.get("kind") == "same" else build_module(spec)
        model = set_module(model, name, made[name])
    for module in made.values():
        if isinstance(module, Attached):
            module.attach(model)
    if replaced:
        model.quincunx_replaced = replaced  # type: ignore[assignment]
    return model
