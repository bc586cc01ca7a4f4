"""ONNX files as networks: read by onnx2torch, compared with ONNX Runtime before anything else."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quincunx.deployment.onnx_operators import register
from quincunx.deployment.onnx_rewrites import fix_sizes, in_opset_17
from quincunx.deployment.verification import difference, drawn_like
from quincunx.measure.engines import quiet

__all__ = ["OnnxNetwork", "as_in_file", "from_onnx", "has_channels_last", "is_channels_last"]

# of the converter's operators, those that need torchvision's own kernels
_VISION = {"NonMaxSuppression", "RoiAlign"}
_TOLERANCE = 1e-4


class OnnxNetwork(nn.Module):
    """A network that was read from an ONNX file.

    Attributes:
        network: what computes, a ``torch.fx.GraphModule`` whose layers are torch's.
        onnx_names: names of the file's inputs and outputs, which :func:`quincunx.export` keeps.
        onnx_size: sizes of its input after the batch, such as (3, 224, 224), if the file fixes all of them;
            None too for several inputs.
        onnx_maps: for a network that takes [N, C, H, W] where the file has [N, H, W, C], which outputs are
            maps, and likewise [N, C, H, W]; None for one that takes and gives what the file does.
    """

    network: fx.GraphModule
    onnx_size: tuple[int, ...] | None = None
    onnx_maps: tuple[bool, ...] | None = None

    def __init__(self, network: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.onnx_names = {"inputs": list(inputs), "outputs": list(outputs)}

    def forward(self, x: Tensor) -> Any:
        if self.onnx_maps is None:
            return self.network(x)
        found = self.network(x.permute(0, 2, 3, 1))
        values = list(found) if isinstance(found, (tuple, list)) else [found]
        values = [
            y.permute(0, 3, 1, 2) if is_map else y for y, is_map in zip(values, self.onnx_maps, strict=True)
        ]
        return values if isinstance(found, (tuple, list)) else values[0]


# tracers need each argument by name
class _Two(OnnxNetwork):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.network(x, y)


class _Three(OnnxNetwork):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        return self.network(x, y, z)


_KINDS = {1: OnnxNetwork, 2: _Two, 3: _Three}


def from_onnx(
    path: str | Path, example_input: Tensor | tuple[Tensor, ...] | None = None, *, nchw: bool = False
) -> nn.Module:
    """Return the network of an ONNX file, compared with ONNX Runtime on several inputs.

    It is read by onnx2torch (``pip install 'quincunx[onnx]'`` and ``pip install --no-deps onnx2torch``);
    convolutions, batch norm and activations become torch's modules, which :func:`quincunx.accelerate`
    replaces like those of any network. Inputs and outputs keep their names in files that
    :func:`quincunx.export` writes.

    Args:
        path: the file; weights in other files are found beside it.
        example_input: inputs for the comparison; needed if the file leaves sizes other than the batch free.
            It is also compared on random values drawn from the example's, in another batch and at other
            sizes where these are free and ONNX Runtime takes them.
        nchw: for a file whose input is [N, H, W, C], as those from TensorFlow are: the network takes, and
            ``example_input`` is, [N, C, H, W], and outputs of four axes are [N, C, H, W] too.
            :func:`quincunx.export` writes what is made of it in the file's layout again.

    Returns:
        A module in evaluation mode that maps float32 tensors in the order of the file's inputs to what the
        file computes, a tensor or a list of them. Frozen sizes of the file, such as a batch of 1 in a
        reshape, stay.

    Raises:
        FileNotFoundError: no such file, or a file of weights is missing.
        ValueError: not an ONNX model, or one of more than three inputs; with ``nchw``, one whose input is not
            of four axes; an operator that cannot be read (node and operator are named); free sizes without
            ``example_input``; an answer other than ONNX Runtime's by more than 1e-4 of the output's largest
            value; a package that is not installed.

    Example:
        >>> from_onnx("missing.onnx")
        Traceback (most recent call last):
        ...
        FileNotFoundError: missing.onnx: no such file
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    missing = [name for name in ("onnx", "onnx2torch", "onnxruntime") if find_spec(name) is None]
    if missing:
        commands = ["pip install 'quincunx[onnx]'"] if {*missing} - {"onnx2torch"} else []
        # pip would take the newest torchvision for it, and with that another torch
        commands += ["pip install --no-deps onnx2torch"] if "onnx2torch" in missing else []
        raise ValueError(
            f"{path}: reading it needs {', '.join(missing)}, not installed here; {' and '.join(commands)}"
        )
    proto = _read(path)
    known = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in known]
    outputs = [value.name for value in proto.graph.output]
    if len(inputs) not in _KINDS:
        raise ValueError(f"{path}: has {len(inputs)} inputs; 1 to {max(_KINDS)} can be read")
    if nchw:
        example_input = _channels_last(path, inputs, example_input)
    examples = _examples(path, inputs, example_input)
    graph = _convert(path, proto)
    model = _KINDS[len(inputs)](graph, [value.name for value in inputs], outputs).eval().requires_grad_(False)
    answers = _compare(path, model, _sets(inputs, examples))
    sizes = tuple(entry.dim_value for entry in inputs[0].type.tensor_type.shape.dim[1:])
    model.onnx_size = sizes if len(inputs) == 1 and all(sizes) else None
    if nchw:
        model.onnx_size = None if model.onnx_size is None else (sizes[-1], *sizes[:-1])
        model.onnx_maps = tuple(answer.dim() == 4 for answer in answers)
    model.quincunx_spec = {  # type: ignore[assignment]
        "kind": "factory",
        "factory": "quincunx:from_onnx",
        "onnx": path.name,
        **({"nchw": True} if nchw else {}),
    }
    # layers can be trained further
    return model.requires_grad_(True)


def _read(path: Path) -> Any:
    """
    Raises:
        FileNotFoundError: weights in another file that is not there.
        ValueError: no ONNX model, or a damaged one.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        bare = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not an ONNX model") from error
    if not bare.graph.node:
        raise ValueError(f"{path}: not an ONNX model, or one without operators")
    for tensor in bare.graph.initializer:
        places = {entry.key: entry.value for entry in tensor.external_data}
        location = places.get("location")
        if location is None:
            continue
        outside = (path.parent / location).resolve()
        if not outside.is_relative_to(path.parent.resolve()):
            raise ValueError(
                f"{path}: weight {tensor.name!r} lies outside the file's folder, in {location!r}"
            )
        if not outside.is_file():
            raise FileNotFoundError(
                f"{path}: weight {tensor.name!r} is in {location!r}, which is not beside it"
            )
        end = int(places.get("offset", 0)) + int(places.get("length", 0))
        if outside.stat().st_size < end:
            raise ValueError(f"{path}: {location!r} is shorter than weight {tensor.name!r} needs")
    try:
        onnx.checker.check_model(str(path))
        return _in_one_domain(onnx.load(str(path)))
    except (onnx.checker.ValidationError, ValueError, RuntimeError, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: not a valid ONNX model ({said[0][:300]})") from error


def _in_one_domain(proto: Any) -> Any:
    """The standard's operators have two names for their domain; the empty one is used here."""
    for part in (*proto.opset_import, *proto.graph.node):
        part.domain = "" if part.domain == "ai.onnx" else part.domain
    return proto


# how many channels an image has
_CHANNELS = {1, 3, 4}


def has_channels_last(path: str | Path) -> bool:
    """Return whether the only input of an ONNX file is images [N, H, W, C], by its sizes."""
    if find_spec("onnx") is None:
        return False
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, ValueError, RuntimeError, OSError):
        # whoever reads it is told
        return False
    known = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in known]
    sizes = [entry.dim_value for entry in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    return len(sizes) == 4 and is_channels_last(sizes)


def is_channels_last(shape: Sequence[int]) -> bool:
    """Return whether four sizes can be those of images [N, H, W, C], and of no images [N, C, H, W].

    Example:
        >>> is_channels_last((1, 224, 224, 3)), is_channels_last((1, 3, 224, 224))
        (True, False)
    """
    return shape[3] in _CHANNELS and shape[1] not in _CHANNELS


def _channels_last(path: Path, inputs: Sequence[Any], given: Any) -> Any:
    """Return an example [N, C, H, W] in the file's layout.

    Raises:
        ValueError: several inputs, or none of four axes.
    """
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        raise ValueError(f"nchw=True: the inputs of {path} are not one of four axes, [N, H, W, C]")
    if given is None:
        return None
    (x,) = given if isinstance(given, tuple) and len(given) == 1 else (given,)
    if not isinstance(x, Tensor) or x.dim() != 4:
        raise ValueError("example_input: expected a tensor [N, C, H, W] with nchw=True")
    return x.permute(0, 2, 3, 1).contiguous()


def as_in_file(examples: tuple[Tensor, ...], model: nn.Module, *others: nn.Module) -> tuple[Tensor, ...]:
    """Return inputs of a network in the layout of the file that it was read from; if that is another one
    than the network's, the network and others of the same file take it from now on."""
    if not isinstance(model, OnnxNetwork) or model.onnx_maps is None:
        return examples
    for network in (model, *others):
        if isinstance(network, OnnxNetwork):
            network.onnx_maps = None
    return tuple(x.permute(0, 2, 3, 1).contiguous() for x in examples)


def _examples(path: Path, inputs: Sequence[Any], given: Any) -> tuple[Tensor, ...]:
    """
    Raises:
        ValueError: inputs that are not float32, free sizes, or examples of another number.
    """
    for value in inputs:
        if value.type.tensor_type.elem_type != 1:
            raise ValueError(f"{path}: input {value.name!r} is not float32")
    if given is not None:
        found = given if isinstance(given, tuple) else (given,)
        if len(found) != len(inputs) or not all(isinstance(x, Tensor) for x in found):
            raise ValueError(f"example_input: expected {len(inputs)} tensors, the inputs of {path}")
        return tuple(x.detach() for x in found)
    made = []
    source = torch.Generator().manual_seed(0)
    for value in inputs:
        sizes = []
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.dim_value and place:
                raise ValueError(
                    f"example_input=None: input {value.name!r} of {path} leaves size {place} free "
                    f"({dim.dim_param or '?'}); give an example, on the command line --input 1x3x224x224"
                )
            sizes.append(dim.dim_value or 2)
        made.append(torch.randn(sizes, generator=source))
    return tuple(made)


# ---------------------------------------------------------------- the converter


@contextmanager
def _stand_ins() -> Iterator[None]:
    """While the converter is imported: it imports torchvision for two operators of detectors alone, which
    many installations do not have, or have for another build of torch."""
    made = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    made["torchvision"].ops = made["torchvision.ops"]  # type: ignore[attr-defined]
    made["torchvision.ops"].roi_align = None  # type: ignore[attr-defined]
    before = {
        name: sys.modules[name] for name in list(sys.modules) if name.partition(".")[0] == "torchvision"
    }
    for name in before:
        del sys.modules[name]
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _converter() -> tuple[Callable[[Any], fx.GraphModule], Callable[..., Any]]:
    if "onnx2torch" not in sys.modules:
        with quiet(), _stand_ins():
            import_module("onnx2torch")
    from onnx2torch.converter import convert
    from onnx2torch.node_converters import get_converter

    register()
    return convert, get_converter


def _convert(path: Path, proto: Any) -> fx.GraphModule:
    """
    Raises:
        ValueError: operators that the converter does not have, or not with these settings.
    """
    convert, converter_of = _converter()
    try:
        with quiet():
            proto, refused = in_opset_17(proto)
    # an optimizer may raise anything
    except Exception as error:
        raise ValueError(f"{path}: cannot be read: {type(error).__name__}: {error}"[:500]) from error
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    unknown: dict[str, list[str]] = {}
    for name, operator, version in refused:
        unknown.setdefault(f"{operator} (opset {version})", []).append(name)
    newer = {name for name, _, _ in refused}
    for number, node in enumerate(proto.graph.node):
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        version = opsets.get(node.domain, 1)
        if (node.name or f"number {number}") in newer:
            continue
        try:
            converter_of(domain=node.domain, operation_type=node.op_type, version=version)
        # of an operator that no standard has, the converter's own search fails
        except Exception:  # noqa: BLE001
            known = False
        else:
            known = node.op_type not in _VISION
        if not known:
            named = f"{operator} (opset {version})"
            unknown.setdefault(named, []).append(node.name or f"number {number}")
    if unknown:
        parts = [f"{named} in node {', '.join(map(repr, nodes[:3]))}" for named, nodes in unknown.items()]
        raise ValueError(f"{path}: operators that cannot be read: {'; '.join(parts[:5])}")
    try:
        with quiet():
            return fix_sizes(convert(proto))
    # what a converter raises for settings that it does not have
    except Exception as error:
        named = _node_in(error)
        raise ValueError(f"{path}: cannot read {named}: {type(error).__name__}: {error}"[:500]) from error


def _node_in(error: BaseException) -> str:
    """The node at which a conversion failed."""
    trace, found = error.__traceback__, "the graph"
    while trace is not None:
        node = trace.tb_frame.f_locals.get("onnx_node")
        if node is not None:
            found = f"{node.operation_type} in node {node.name!r}"
        trace = trace.tb_next
    return found


# an example with larger sides is compared at smaller ones
_LARGE_SIDE = 64


def _sets(inputs: Sequence[Any], examples: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Inputs for the comparison: the examples, random values of their shapes, and others of other shapes
    where these are free: with constant values or at single positions different networks may answer alike."""
    known = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inputs]
    if any(x.dim() != len(sizes) for x, sizes in zip(examples, known, strict=True)):
        # ONNX Runtime says so
        return [tuple(examples)]
    source = torch.Generator().manual_seed(1)

    def smaller_or_larger(place: int, size: int, odd: int) -> int:
        return (size // 2 if size > _LARGE_SIDE else 2 * size) + odd * place

    changes: tuple[Callable[[int, int], int], ...] = (
        lambda place, size: size,
        lambda place, size: size if place else size + 1,
        lambda place, size: smaller_or_larger(place, size, 0) if place else size,
        lambda place, size: smaller_or_larger(place, size, 1) if place else size,
    )
    made, seen = [tuple(examples)], set()
    for change in changes:
        shapes = tuple(
            tuple(
                fixed or change(place, size)
                for place, (size, fixed) in enumerate(zip(x.shape, sizes, strict=True))
            )
            for x, sizes in zip(examples, known, strict=True)
        )
        if shapes not in seen:
            seen.add(shapes)
            made.append(
                tuple(drawn_like(x, shape, source) for x, shape in zip(examples, shapes, strict=True))
            )
    return made


def _compare(path: Path, model: nn.Module, sets: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return what ONNX Runtime answers to the first of the inputs.

    Raises:
        ValueError: the network cannot run, or answers otherwise than ONNX Runtime.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    first: list[Tensor] = []
    for number, examples in enumerate(sets):
        try:
            if not number:
                session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
                names = [value.name for value in session.get_inputs()]
            feeds = dict(zip(names, (x.numpy() for x in examples), strict=True))
            wanted = [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]
        # the runtime's exceptions are classes of their own
        except Exception as error:
            if number:
                # of a size, or a value, that the file is not for
                continue
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{path}: ONNX Runtime does not run it ({said[0][:300]})") from error
        try:
            with torch.no_grad():
                found = model(*examples)
        except Exception as error:
            if number:
                # whoever calls it with such sizes is told
                continue
            raise ValueError(
                f"{path}: read, but does not run in PyTorch ({type(error).__name__}: {error})"[:500]
            ) from error
        if number and not all(value.isfinite().any() for value in wanted if value.is_floating_point()):
            continue
        _agree(path, found, wanted, [list(x.shape) for x in examples])
        first = first or wanted
    return first


def _agree(path: Path, found: Any, wanted: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> None:
    """
    Raises:
        ValueError: two networks answer differently.
    """
    answers = list(found) if isinstance(found, (tuple, list)) else [found]
    try:
        gap = difference([answer.numpy() for answer in answers], wanted)
    except ValueError as error:
        raise ValueError(f"{path}: read, but not as ONNX Runtime reads it: {error}") from error
    if gap > _TOLERANCE:
        at = ", ".join("x".join(map(str, shape)) for shape in shapes)
        raise ValueError(
            f"{path}: read, but answers otherwise than ONNX Runtime, by {gap:.1e} of the largest value (for "
            f"an input of {at})"
        )
