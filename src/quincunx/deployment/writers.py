"""Lowered networks as files: torch.export once, then each format's own exporter and its own passes."""

from __future__ import annotations

import io
import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, fx, nn

from quincunx.measure.engines import quiet
from quincunx.ops.libraries import DOMAIN
from quincunx.ops.openvino import register

__all__ = ["EXTERNAL_ABOVE", "METADATA", "WRITERS", "Traced", "Write", "check_names", "trace_for_export"]

# the key of the metadata in files of every format
METADATA = "quincunx"
# a protocol buffer holds at most 2 GiB; larger weights go to a second file
EXTERNAL_ABOVE = 2**31 - 2**20
_OPSETS = range(18, 24)

Write = Callable[[Path, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Traced:
    """A lowered network as a graph of torch's operators.

    Attributes:
        program: of torch.export.
        inputs, outputs: names.
        dynamic: whether the batch is free.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: bool


def _makes_named_tuple(value: Any) -> bool:
    """Whether a node makes a named tuple of its arguments, without a constructor of the user's own."""
    if not isinstance(value, fx.Node) or value.op != "call_function" or not hasattr(value.target, "_fields"):
        return False
    kinds = getattr(value.target, "__mro__", ())
    maker = next((kind for kind in kinds if "__new__" in vars(kind)), None)
    return maker is not None and maker.__bases__ == (tuple,)


def _without_names(value: Any) -> Any:
    """What a graph returns, with tuples for named tuples: of their classes a file knows nothing."""
    if _makes_named_tuple(value):
        fields = value.target._fields[len(value.args) :]
        known = {**value.target._field_defaults, **value.kwargs}
        return _without_names((*value.args, *(known[name] for name in fields)))
    if isinstance(value, tuple):
        return tuple(map(_without_names, value))
    if isinstance(value, list):
        return [_without_names(part) for part in value]
    return {key: _without_names(part) for key, part in value.items()} if isinstance(value, dict) else value


def _return_tuples(module: fx.GraphModule) -> None:
    """Let a graph return tuples for named tuples; it is changed."""
    for node in module.graph.find_nodes(op="output"):
        node.args = _without_names(node.args)
    for node in reversed(module.graph.nodes):
        if _makes_named_tuple(node) and not node.users:
            module.graph.erase_node(node)
    module.recompile()


def trace_for_export(
    module: nn.Module,
    arguments: Sequence[Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic: bool,
) -> Traced:
    """Return a module as a graph, with a free batch if asked.

    Raises:
        ValueError: the network fixes its batch, or torch.export cannot trace it.
    """
    shapes = None
    if isinstance(module, fx.GraphModule):
        _return_tuples(module)
    if dynamic:
        # a batch of 1 would become a constant
        arguments = [torch.cat([x, x]) if x.shape[0] == 1 else x for x in arguments]
        batch = torch.export.Dim("batch", min=1)
        shapes = tuple({0: batch} for _ in arguments)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, tuple(arguments), dynamic_shapes=shapes, strict=False)
    # an exporter may raise anything
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        hint = "; dynamic_batch=False fixes the batch to the example's" if dynamic else ""
        raise ValueError(
            f"model: torch.export cannot trace it, {type(error).__name__}: {reason[:300]}{hint}"
        ) from error
    return Traced(program, tuple(inputs), tuple(outputs), dynamic)


# ---------------------------------------------------------------- ONNX


def _onnx_proto(traced: Traced, opset: int) -> Any:
    """A model in memory, optimised by the exporter's own passes, without traces of this machine's files.

    Raises:
        ValueError: an opset that the exporter does not write.
    """
    if opset not in _OPSETS:
        raise ValueError(f"opset={opset}: expected {_OPSETS.start} to {_OPSETS.stop - 1}")
    # names that nothing within the graph has
    names = {f"quincunx.{place}.{name}": name for place, name in enumerate(traced.inputs + traced.outputs)}
    own = list(names)
    with quiet():
        made = torch.onnx.export(
            traced.program,
            dynamo=True,
            opset_version=opset,
            input_names=own[: len(traced.inputs)],
            output_names=own[len(traced.inputs) :],
            optimize=True,
            verbose=False,
        )
    if made is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    proto = made.model_proto
    found = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if found != opset:
        raise ValueError(
            f"opset={opset}: the exporter wrote opset {found}, since not every operator converts"
        )
    _forget(proto)
    _rename(proto.graph, names)
    if traced.dynamic:
        _name_batch(proto.graph)
    return proto


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Give values of a graph other names; what has one of these already gets another one."""
    there = {name for part in _graphs(graph) for node in part.node for name in (*node.input, *node.output)}
    made = dict(names)
    for name in names.values():
        inner = name
        while inner in there or inner in made.values():
            inner += ".within"
        made[name] = inner
    for part in _graphs(graph):
        for node in part.node:
            for values in (node.input, node.output):
                for place, name in enumerate(values):
                    values[place] = made.get(name, name)
        for value in (*part.input, *part.output, *part.value_info, *part.initializer):
            value.name = made.get(value.name, value.name)


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those of its branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _name_batch(graph: Any) -> None:
    """Call the batch what it is; the exporter numbers free sizes."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    values = (value for part in _graphs(graph) for value in (*part.input, *part.output, *part.value_info))
    for value in values:
        for size in value.type.tensor_type.shape.dim:
            if symbol and size.dim_param:
                size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", size.dim_param)


def _forget(proto: Any) -> None:
    """Leave out documentation and metadata of the exporter, which name source files of this machine."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    graphs = [proto.graph, *proto.functions]
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for part in (*graph.node, *getattr(graph, "value_info", ()), *getattr(graph, "initializer", ())):
            part.doc_string = ""
            if hasattr(part, "metadata_props"):
                del part.metadata_props[:]
    for part in (*proto.graph.input, *proto.graph.output):
        part.doc_string = ""
        if hasattr(part, "metadata_props"):
            del part.metadata_props[:]


def onnx_writer(traced: Traced, opset: int = 18, external: bool = False) -> Write:
    """Return a function that writes a graph as ONNX, weights in a second file ``<name>.data`` if asked or
    beyond 2 GB.

    Raises:
        ValueError: an opset that the exporter does not write.
    """
    import onnx

    proto = _onnx_proto(traced, opset)
    apart = external or _is_large(proto)
    kept: list[Path] = []  # where the weights are, once they are no longer in the model

    def write(path: Path, metadata: Mapping[str, Any]) -> None:
        proto.producer_name = "quincunx"
        proto.producer_version = str(metadata.get("quincunx", ""))
        onnx.helper.set_model_props(proto, {METADATA: json.dumps(metadata, sort_keys=True)})
        outside = path.with_name(f"{path.name}.data")
        if not apart:
            outside.unlink(missing_ok=True)
            onnx.save_model(proto, str(path))
            return
        if not kept:
            _save_apart(proto, path, outside)
            kept.append(outside)
        else:
            _name_outside(proto, outside.name)
            path.write_bytes(proto.SerializeToString())
            if kept[0] != outside:
                shutil.copyfile(kept[0], outside)
        # it is written for its owner alone
        outside.chmod(path.stat().st_mode)

    return write


def _is_large(proto: Any) -> bool:
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > EXTERNAL_ABOVE


def _save_apart(proto: Any, path: Path, outside: Path) -> None:
    """Write a model and its weights, which move from memory into the second file: twice would be too much."""
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data

    outside.unlink(missing_ok=True)
    convert_model_to_external_data(proto, all_tensors_to_one_file=True, location=outside.name)
    onnx.save_model(proto, str(path))


def _name_outside(proto: Any, name: str) -> None:
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name


# ---------------------------------------------------------------- OpenVINO


def openvino_writer(traced: Traced, opset: int = 18) -> Write:
    """Return a function that writes a graph as OpenVINO's IR, an .xml and a .bin file, weights in float32."""
    import openvino

    proto = _onnx_proto(traced, opset)
    core = openvino.Core()
    if any(node.domain == DOMAIN for node in proto.graph.node):
        register(core)
    # OpenVINO reads weights of a second file when it needs them
    folder = mkdtemp(prefix="quincunx-") if _is_large(proto) else None
    if folder is None:
        model = core.read_model(io.BytesIO(proto.SerializeToString()))
    else:
        place = Path(folder) / "network.onnx"
        _save_apart(proto, place, place.with_name("network.onnx.data"))
        model = core.read_model(str(place))
    del proto

    def write(path: Path, metadata: Mapping[str, Any]) -> None:
        model.set_rt_info(json.dumps(metadata, sort_keys=True), [METADATA])
        openvino.save_model(model, str(path), compress_to_fp16=False)

    if folder is not None:
        weakref.finalize(write, shutil.rmtree, folder, ignore_errors=True)
    return write


# ---------------------------------------------------------------- torch


def torch_writer(traced: Traced, opset: int = 0) -> Write:
    """Return a function that writes what ``torch.export.load`` reads."""
    _forget_torch(traced.program)

    def write(path: Path, metadata: Mapping[str, Any]) -> None:
        extra = {f"{METADATA}.json": json.dumps(metadata, sort_keys=True)}
        with quiet():
            torch.export.save(traced.program, str(path), extra_files=extra)

    return write


def _forget_torch(program: torch.export.ExportedProgram) -> None:
    for graph in program.graph_module.modules():
        for node in getattr(getattr(graph, "graph", None), "nodes", ()):
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
                node.meta.pop(key, None)


def aoti_writer(traced: Traced, opset: int = 0) -> Write:
    """Return a function that compiles a graph and writes what ``torch._inductor.aoti_load_package`` reads.

    It is compiled at each call; the package holds code for this machine's instruction set.
    """
    _forget_torch(traced.program)

    def write(path: Path, metadata: Mapping[str, Any]) -> None:
        import torch._inductor

        config = {"aot_inductor.metadata": {METADATA: json.dumps(metadata, sort_keys=True)}}
        with quiet(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                traced.program, package_path=str(path), inductor_configs=config
            )

    return write


WRITERS: dict[str, Callable[[Traced, int], Write]] = {
    "onnx": onnx_writer,
    "openvino": openvino_writer,
    "torch": torch_writer,
    "aoti": aoti_writer,
}

_PLAIN_NAME = re.compile(r"[^\x00-\x20]+")


def check_names(what: str, names: Sequence[str], count: int) -> tuple[str, ...]:
    """Return names of inputs or outputs.

    Raises:
        ValueError: too few or too many, one twice, or one with spaces.
    """
    names = [names] if isinstance(names, str) else names
    if len(names) != count or len(set(names)) != count or not all(map(_PLAIN_NAME.fullmatch, names)):
        raise ValueError(f"{what}={list(names)!r}: expected {count} different names without spaces")
    return tuple(names)
