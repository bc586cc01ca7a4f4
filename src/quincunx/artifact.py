"""Models and results on disk: written whole or not at all, and never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quincunx import networks
from quincunx.methods import build_module
from quincunx.networks.weights import fill, place_of
from quincunx.surgery import Attached, put

__all__ = [
    "difference",
    "load",
    "name_of",
    "note_factory",
    "read_json",
    "save",
    "spec_of",
    "write_atomically",
    "write_json",
    "write_text",
]

Factory = Callable[[], nn.Module]

_FORMAT = "quincunx-artifact"
_VERSION = 1
_SPEC, _WEIGHTS = "spec.json", "weights.safetensors"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in ``path``'s place.

    If writing fails (a full disk, say) the file that was there before survives untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _sync(temporary)
        # mkstemp makes files that only their owner can read
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Strict JSON (no NaN), atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error


def difference(theirs: Any, ours: Any) -> str:
    """The fields in which two descriptions differ, as a sentence's end."""
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"was {theirs!r}, now {ours!r}"
    found = []
    for key in {**theirs, **ours}:
        one, other = theirs.get(key), ours.get(key)
        if one != other:
            # of two nested descriptions only what differs
            nested = (
                isinstance(one, dict)
                and isinstance(other, dict)
                and not {"name", "factory"}.isdisjoint({**one, **other})
            )
            found.append(f"{key} {difference(one, other) if nested else f'was {one!r}, now {other!r}'}")
    return ", ".join(found)


def spec_of(model: nn.Module) -> dict[str, Any]:
    """The JSON-ready description from which a model can be built again.

    Raises:
        ValueError: the model was not built by :func:`quincunx.networks.build`, and no factory is noted.
    """
    spec = getattr(model, "quincunx_spec", None)
    if not isinstance(spec, dict):
        raise ValueError(
            f"model: {type(model).__name__} has no spec to build it from again; "
            "make it with qx.networks.build(...), or say which function of yours makes it: "
            'factory="package.module:function"'
        )
    replaced = getattr(model, "quincunx_replaced", {})
    return {**spec, "replaced": replaced} if replaced else spec


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
            whose layers :func:`quincunx.accelerate` has replaced.
        folder: made with its parents; an artifact that is there is replaced, but only once the new
            one is complete.
        info: JSON-ready facts to keep with it, such as its classes and normalisation.
        factory: which function of yours makes the network, as "package.module:function". It is noted for
            people to read and never imported: :func:`load` must be given the function.

    Returns:
        The folder.

    Raises:
        ValueError: a model without a spec or factory; a state dict that holds more than tensors; a folder
            that holds something else.
        OSError: it cannot be written; what was there before is still there.

    Example:
        >>> import tempfile
        >>> folder = save(networks.build("rrn8"), tempfile.mkdtemp() + "/small")
        >>> sorted(p.name for p in folder.iterdir())
        ['spec.json', 'weights.safetensors']
    """
    if factory is not None:
        check_factory(factory)
        replaced = getattr(model, "quincunx_replaced", {})
        spec = {"kind": "factory", "factory": factory, **({"replaced": replaced} if replaced else {})}
    else:
        spec = spec_of(model)
    state = _written(model)
    check_replaceable(folder)
    # where a link leads, so that the link stays and the temporary folder is on the same disk
    place = Path(folder).resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        weights = fresh / _WEIGHTS
        try:
            # the metadata marks a PyTorch file for other readers
            save_file(state, str(weights), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder}: the weights cannot be written ({error})") from error
        write_json(
            fresh / _SPEC,
            {
                "format": _FORMAT,
                "version": _VERSION,
                "model": spec,
                "weights": {"file": _WEIGHTS, "sha256": _sha256(weights)},
                "info": info or {},
            },
        )
        _sync(weights)
        fresh.chmod(0o755)
        _swap(fresh, place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Path(folder)


def _written(model: nn.Module) -> dict[str, Tensor]:
    """What goes to disk: each tensor in memory of its own, of tied weights the first alone.

    Raises:
        ValueError: the state dict holds something else than tensors.
    """
    found: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for name, value in check_state(model).items():
        found.setdefault(place_of(value), (name, value))
    # a view of a larger tensor would not be written without the rest
    whole = {name: value.untyped_storage().nbytes() == value.nbytes for name, value in found.values()}
    return {n: v.contiguous() if whole[n] else v.clone().contiguous() for n, v in found.values()}


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
    return state


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


def _swap(fresh: Path, folder: Path) -> None:
    """Put a complete folder in another's place; the old one comes back if that fails."""
    if not folder.exists():
        fresh.replace(folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    try:
        folder.replace(old)
        fresh.replace(folder)
    finally:
        # whatever went wrong, Ctrl-C included
        if not folder.exists():
            old.replace(folder)
        shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_spec(folder: str | Path) -> dict[str, Any]:
    """The checked content of an artifact's ``spec.json``.

    Raises:
        FileNotFoundError: the folder or its ``spec.json`` is not there.
        ValueError: not an artifact, or of a later version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / _SPEC
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no artifact here ({_SPEC} is missing)")
    spec = read_json(path)
    if not isinstance(spec, dict) or spec.get("format") != _FORMAT:
        raise ValueError(f"{path}: not the spec of a quincunx artifact")
    if spec.get("version") != _VERSION:
        raise ValueError(
            f"{path}: version {spec.get('version')!r}, but this program reads version {_VERSION}"
        )
    return spec


def load(folder: str | Path, *, factory: Factory | None = None) -> nn.Module:
    """Read a model that :func:`save` wrote; in evaluation mode, on the CPU.

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
    spec = read_spec(folder)
    try:
        described = spec["model"]
        expected = spec["weights"]["sha256"]
        weights = folder / spec["weights"]["file"]
        if described["kind"] not in ("network", "factory") or weights.parent != folder:
            raise ValueError(f"model kind {described['kind']!r}, weights {spec['weights']['file']!r}")
        name = name_of(described)
        if described["kind"] == "factory":
            check_factory(described["factory"])
        else:
            arguments = (described["name"], described["num_classes"], described["in_channels"])
            settings = dict(described["settings"])
        replaced = dict(described.get("replaced", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / _SPEC}: incomplete or altered ({error!r})") from error
    _check_given(folder, described, factory)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: missing from the artifact")
    if _sha256(weights) != expected:
        raise ValueError(f"{weights}: corrupt, its SHA-256 is not the one in {_SPEC}")
    # what a function of the user raises is the user's to see
    own = None if factory is None else made_by(factory)
    try:
        model = _rebuilt(networks.build(*arguments, **settings) if own is None else own, replaced)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        told = "describes no network that can be built" if own is None else f"does not fit {name}'s network"
        raise ValueError(f"{folder / _SPEC}: {told} ({error})") from error
    if own is not None:
        note_factory(model, name)
    try:
        state = load_file(str(weights))
    except SafetensorError as error:
        raise ValueError(f"{weights}: does not fit {name} ({error})") from error
    fill(model, state, f"{weights}: does not fit {name}")
    return model.eval()


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
