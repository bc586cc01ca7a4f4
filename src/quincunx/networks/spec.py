"""The spec of an artifact: a network's description in JSON, from which it can be rebuilt."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

from quincunx.reading import Entry, one_line, read_json
from quincunx.writing import (
    restore,
)

__all__ = [
    "check_factory",
    "format_of",
    "lines_to_load",
    "name_of",
    "note_factory",
    "read_spec",
    "spec_of",
    "unwrapped",
]

FORMAT = "quincunx-artifact"


# the second version has weights in eight bits, and is written for these alone
FORMAT_VERSION, INT8_VERSION = 1, 2


SPEC_FILE, WEIGHTS_FILE = "spec.json", "weights.safetensors"


def spec_of(model: nn.Module) -> dict[str, Any]:
    """Return the JSON-ready description from which a model can be rebuilt.

    Raises:
        ValueError: the model was not built by :func:`quincunx.networks.build`, and has no recorded factory.
    """
    model = unwrapped(model)
    spec = getattr(model, "quincunx_spec", None)
    if not isinstance(spec, dict) and isinstance(model, fx.GraphModule) and "int8" in model.meta:
        raise ValueError(
            "model: a fused network is made for this machine; save the network that it was made of: "
            "small = qx.calibrate(model, images), qx.save(small, folder), qx.fuse(small, torch.int8)"
        )
    if not isinstance(spec, dict):
        raise ValueError(
            f"model: {type(model).__name__} has no spec to build it from again; "
            "make it with qx.networks.build(...), or say which function of yours makes it: "
            'factory="package.module:function"'
        )
    replaced = replaced_in(model)
    return {**spec, "replaced": replaced} if replaced else spec


# the attribute under which each of torch's wrappers stores the network; it prefixes names in the state
_WRAPPERS: dict[type[nn.Module], str] = {
    nn.DataParallel: "module",
    nn.parallel.DistributedDataParallel: "module",
    AveragedModel: "module",
}


def _wrapped(module: nn.Module) -> str | None:
    """Return the name under which a torch wrapper stores the module that it runs; None for other modules."""
    for kind, name in _WRAPPERS.items():
        if isinstance(module, kind):
            return name
    # torch's compiler is large, and imported only if it was used
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if compiler is not None and isinstance(module, compiler.OptimizedModule) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network without a wrapper by torch's compiler, DataParallel, DistributedDataParallel or
    AveragedModel."""
    while (name := _wrapped(model)) is not None:
        model = model.get_submodule(name)
    return model


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """Return a function that removes from a path the names that torch's wrappers in a network add."""
    added = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if (name := _wrapped(module)) is not None
    }

    def plain(path: str) -> str:
        parts = path.split(".")
        return ".".join(p for i, p in enumerate(parts) if ".".join(parts[: i + 1]) not in added)

    return plain if added else str


def replaced_in(model: nn.Module) -> dict[str, Any]:
    """Return what ``accelerate`` recorded about the layers that it made, by names without wrappers."""
    plain = plain_names(model)
    return {
        plain(name): {**spec, **{key: plain(spec[key]) for key in ("as", "partner") if key in spec}}
        for name, spec in getattr(model, "quincunx_replaced", {}).items()
    }


def note_factory(model: nn.Module, factory: str) -> nn.Module:
    """Record in a network the function that builds it; :func:`spec_of` then describes the network by it.

    Args:
        model: any network; only the record is added.
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
    """Check that a text has the form package.module:function.

    Raises:
        ValueError: another text, or not a text.
    """
    name = r"[^\W\d]\w*"
    path = rf"{name}(\.{name})*"
    if not isinstance(factory, str) or not re.fullmatch(rf"{path}:{path}", factory):
        raise ValueError(f"{what}={factory!r}: expected package.module:function, such as mynets.small:make")


def format_of(spec: dict[str, Any]) -> str:
    """Return the number format of an artifact's network, from its ``spec.json``: "float32" or "int8".

    Example:
        >>> format_of({"version": 1}), format_of({"version": 2, "int8": {}})
        ('float32', 'int8')
    """
    return "int8" if "int8" in spec else "float32"


def name_of(spec: dict[str, Any]) -> str:
    """Return the name in a network's spec, or its factory."""
    return str(spec["factory"] if spec.get("kind") == "factory" else spec["name"])


def is_artifact(spec: Path) -> bool:
    try:
        content = read_json(spec)
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_spec(folder: str | Path) -> dict[str, Any]:
    """Return the checked content of an artifact's ``spec.json``.

    Raises:
        FileNotFoundError: the folder or its ``spec.json`` does not exist.
        ValueError: not an artifact, or of a later version.
    """
    return read_spec_entry(Path(folder)).object()


def read_spec_entry(folder: Path) -> Entry:
    restore(folder.resolve())
    if not folder.is_dir():
        wrong = "a file, expected the folder of an artifact" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {wrong}")
    path = folder / SPEC_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no artifact here ({SPEC_FILE} is missing)")
    spec = Entry(read_json(path), path)
    if not isinstance(spec.value, dict) or spec.value.get("format") != FORMAT:
        raise ValueError(f"{path}: not the spec of a quincunx artifact")
    version = spec.get("version", None).value
    if type(version) is not int or version not in (FORMAT_VERSION, INT8_VERSION):
        known = f"versions {FORMAT_VERSION} and {INT8_VERSION}"
        raise ValueError(f"{path}: version {version!r}, but this program reads {known}"[:500])
    if ("int8" in spec) != (version == INT8_VERSION):
        raise ValueError(f"{path}: incomplete or altered, version {version} with or without 'int8'")
    return spec


def description_in(spec: Entry) -> tuple[dict[str, Any], dict[str, dict[str, Any]], str]:
    """Return a spec's description of its network, its replaced layers, and its name."""
    described = spec["model"]
    if described["kind"].text("network", "factory") == "factory":
        try:
            check_factory(described["factory"].value)
        except ValueError as error:
            raise ValueError(f"{spec.file}: incomplete or altered, {error}"[:500]) from error
    else:
        # the network's own function checks their values
        for key in ("name", "num_classes", "in_channels"):
            described[key]
        described["settings"].object()
    replaced = described.get("replaced", {})
    for _, entry in replaced.entries():
        if entry["kind"].text() == "same" and entry["as"].text() not in replaced:
            raise entry["as"].wrong("the name of another replaced layer")
    return described.object(), replaced.object(), name_of(described.object())


@contextmanager
def naming_spec(folder: Path, own: str | None) -> Iterator[None]:
    """Name the file in errors raised while a network is built from a spec, within the context."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        if str(error).startswith(str(folder)):
            # names in a file may span several lines
            raise ValueError(one_line(error)) from error
        told = "describes no network that can be built" if own is None else f"does not fit {own}'s network"
        raise ValueError(f"{folder / SPEC_FILE}: {told} ({one_line(error)})") from error


def lines_to_load(described: dict[str, Any], folder: str | Path) -> list[str]:
    """Return the lines that load an artifact with this spec, after ``import quincunx as qx``.

    Example:
        >>> lines_to_load({"kind": "factory", "factory": "mynets:make"}, "fast/model")
        ['from mynets import make', 'qx.load("fast/model", factory=make)']
    """
    place = json.dumps(Path(folder).as_posix(), ensure_ascii=False)
    if described["kind"] != "factory":
        return [f"qx.load({place})"]
    if "onnx" in described:
        file = json.dumps(described["onnx"], ensure_ascii=False) + (", nchw=True" * ("nchw" in described))
        return [f"qx.load({place}, factory=lambda: qx.from_onnx({file}))"]
    module, _, function = described["factory"].partition(":")
    return [
        f"from {module} import {function.partition('.')[0]}",
        f"qx.load({place}, factory={function})",
    ]
