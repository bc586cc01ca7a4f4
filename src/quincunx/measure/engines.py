"""Other engines with one interface: a module and an example become a function to time.

Each engine gets its best configuration: batch norm folded if possible, channels_last or its own layout,
packed weights, the same number of threads, full float32 arithmetic.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from quincunx.layers.graph import trace
from quincunx.measure.latency import using_threads
from quincunx.modules import copied

__all__ = ["PEERS", "REST", "fold_batch_norm", "onnx_bytes", "quiet"]

Run = Callable[[], object]

# seconds between turns on several threads: so long do those of ONNX Runtime spin for more work after a call
REST = 0.05


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode with each batch norm directly after a convolution folded into it."""
    own = copied(model).eval()
    traced = fx.GraphModule(own, trace(own))
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if isinstance(norm, nn.BatchNorm2d) else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = modules[str(before.target)]
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.requires_grad_(False)


def _eager(model: nn.Module, x: Tensor, threads: int) -> Run:
    folded = fold_batch_norm(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _without_gradients(folded, x)


def _without_gradients(network: nn.Module, x: Tensor) -> Run:
    def run() -> object:
        with torch.inference_mode():
            return network(x)

    return run


def _compiled(model: nn.Module, x: Tensor, threads: int) -> Run:
    folded = fold_batch_norm(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.compiler.reset()
    with quiet(), using_threads(threads), torch.no_grad():
        # freezing packs the weights once
        compiled: Callable[[Tensor], object] = torch.compile(folded, options={"freezing": True})
        compiled(x)  # compiles

    def run() -> object:
        with torch.no_grad():
            return compiled(x)

    return run


# an export takes seconds and is shared by several engines and numbers of threads
_EXPORTED: WeakKeyDictionary[nn.Module, dict[torch.Size, bytes]] = WeakKeyDictionary()


def onnx_bytes(model: nn.Module, x: Tensor) -> bytes:
    """Return the model as ONNX with fixed shapes."""
    known = _EXPORTED.setdefault(model, {})
    if x.shape not in known:
        known[x.shape] = _export(model, x)
    return known[x.shape]


def _export(model: nn.Module, x: Tensor) -> bytes:
    with quiet():
        program = torch.onnx.export(fold_batch_norm(model), (x,), dynamo=True, verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return bytes(program.model_proto.SerializeToString())


def _onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Run:
    return _in_onnxruntime(onnx_bytes(model, x), x, threads)


def _onnxruntime_int8(model: nn.Module, x: Tensor, threads: int) -> Run:
    """Quantised statically, as for OpenVINO."""
    return _in_onnxruntime(_quantised_onnx(model, x), x, threads)


def _in_onnxruntime(content: bytes, x: Tensor, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed)


def _openvino(model: nn.Module, x: Tensor, threads: int, precision: str = "f32") -> Run:
    import openvino

    core = openvino.Core()
    settings = {**_one_stream(threads), "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(io.BytesIO(onnx_bytes(model, x))), "CPU", settings)
    request = compiled.create_infer_request()
    feed = {0: x.contiguous().numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)


def _openvino_bf16(model: nn.Module, x: Tensor, threads: int) -> Run:
    return _openvino(model, x, threads, "bf16")


def _openvino_bf16_maps(model: nn.Module, x: Tensor, threads: int) -> Run:
    """Inputs and outputs are bfloat16 in NHWC as well, as between the layers of a network."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    core = openvino.Core()
    read = core.read_model(io.BytesIO(onnx_bytes(model, x)))
    prepared = PrePostProcessor(read)
    one, result = prepared.input(), prepared.output()
    one.tensor().set_element_type(openvino.Type.bf16).set_layout(openvino.Layout("NHWC"))
    one.model().set_layout(openvino.Layout("NCHW"))
    result.tensor().set_element_type(openvino.Type.bf16)
    if len(read.output().partial_shape) == 4:
        result.model().set_layout(openvino.Layout("NCHW"))
        result.tensor().set_layout(openvino.Layout("NHWC"))
    settings = {**_one_stream(threads), "INFERENCE_PRECISION_HINT": "bf16"}
    request = core.compile_model(prepared.build(), "CPU", settings).create_infer_request()
    rows = x.to(torch.bfloat16).permute(0, 2, 3, 1).contiguous()
    given = openvino.Tensor(rows.view(torch.uint16).numpy(), list(rows.shape), openvino.Type.bf16)
    return lambda: request.infer({0: given}, share_inputs=True, share_outputs=True)


def _openvino_int8(model: nn.Module, x: Tensor, threads: int) -> Run:
    """Quantised statically by ONNX Runtime's tool: scales from one batch, per channel for weights."""
    import openvino

    core = openvino.Core()
    quantised = core.read_model(io.BytesIO(_quantised_onnx(model, x)))
    request = core.compile_model(quantised, "CPU", _one_stream(threads)).create_infer_request()
    feed = {0: x.contiguous().numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)


def _quantised_onnx(model: nn.Module, x: Tensor) -> bytes:
    from onnxruntime import quantization

    class One(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.left = [{name: x.contiguous().numpy()}]

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    import onnxruntime

    with quiet(), tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "model.onnx"), Path(folder, "quantised.onnx")
        source.write_bytes(onnx_bytes(model, x))
        providers = ["CPUExecutionProvider"]
        name = onnxruntime.InferenceSession(str(source), providers=providers).get_inputs()[0].name
        quantization.quantize_static(source, target, One(name), per_channel=True)
        return target.read_bytes()


def _torch_int8(model: nn.Module, x: Tensor, threads: int) -> Run:
    """torch's own quantised convolutions, their activations fused; quantised statically on one batch."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    with quiet():
        settings = get_default_qconfig_mapping("x86")
        watched = quantize_fx.prepare_fx(fold_batch_norm(model), settings, (x,))
        watched(x)
        quantised = quantize_fx.convert_fx(watched)
    return _without_gradients(quantised, x.contiguous(memory_format=torch.channels_last))


def _one_stream(threads: int) -> dict[str, Any]:
    return {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}


def _eager_bf16(model: nn.Module, x: Tensor, threads: int) -> Run:
    return _eager(_lowered(model), _low_map(x), threads)


def _compiled_bf16(model: nn.Module, x: Tensor, threads: int) -> Run:
    return _compiled(_lowered(model), _low_map(x), threads)


def _lowered(model: nn.Module) -> nn.Module:
    # batch norm is folded in float32, then weights are rounded
    return fold_batch_norm(model).to(torch.bfloat16)


def _low_map(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16, memory_format=torch.channels_last)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and warnings of exporters and compilers; what they raise says what is wrong."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


# name -> (module, example, threads) -> a function that runs it once
PEERS: dict[str, Callable[[nn.Module, Tensor, int], Run]] = {
    "torch eager": _eager,
    "torch.compile": _compiled,
    "ONNX Runtime": _onnxruntime,
    "OpenVINO": _openvino,
    "OpenVINO bfloat16": _openvino_bf16,
    "OpenVINO bfloat16, NHWC bfloat16 maps": _openvino_bf16_maps,
    "torch eager bfloat16": _eager_bf16,
    "torch.compile bfloat16": _compiled_bf16,
    "OpenVINO int8": _openvino_int8,
    "ONNX Runtime int8": _onnxruntime_int8,
    "torch int8": _torch_int8,
}
