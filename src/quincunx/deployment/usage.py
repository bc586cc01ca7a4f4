"""The lines that load an exported file and run it, in Python and C++."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["lines_to_use"]


def lines_to_use(
    kind: str,
    file: str,
    inputs: dict[str, Sequence[int]],
    outputs: Sequence[str],
    library: str | None = None,
) -> dict[str, list[str]]:
    """Return for "Python" and "C++" the lines that load a file and run it on zeros.

    Lines in C++ are the inside of ``main``, with includes above it.

    Args:
        kind: name of the format.
        file: its name.
        inputs: shapes by name.
        outputs: names.
        library: path of the library of our kernels where the file holds programs.

    Example:
        >>> lines_to_use("onnx", "fast.onnx", {"x": (1, 3, 32, 32)}, ["y"])["Python"][1]
        'session = onnxruntime.InferenceSession("fast.onnx")'
    """
    python, cpp = {"onnx": _onnx, "openvino": _openvino, "torch": _torch, "aoti": _aoti}[kind](
        file, inputs, outputs, library
    )
    return {"Python": python, "C++": cpp}


_Lines = tuple[list[str], list[str]]


def _onnx(file: str, inputs: dict[str, Sequence[int]], outputs: Sequence[str], library: str | None) -> _Lines:
    options = ["options = onnxruntime.SessionOptions()", "qx.onnxruntime.register(options)"]
    feed = ", ".join(f'"{name}": {_numpy(shape)}' for name, shape in inputs.items())
    python = [
        "import numpy, onnxruntime" + (", quincunx as qx" if library else ""),
        *(options if library else []),
        f'session = onnxruntime.InferenceSession("{file}"{", options" if library else ""})',
        f"outputs = session.run(None, {{{feed}}})",
    ]
    made = ", ".join(
        f"Ort::Value::CreateTensor<float>(allocator, shape{number}, {len(shape)})"
        for number, shape in enumerate(inputs.values())
    )
    cpp = [
        "#include <onnxruntime_cxx_api.h>",
        "Ort::Env env;",
        "Ort::SessionOptions options;",
        *([f'options.RegisterCustomOpsLibrary("{library}");'] if library else []),
        f'Ort::Session session(env, "{file}", options);',
        "Ort::AllocatorWithDefaultOptions allocator;",
        *(
            f"const int64_t shape{number}[] = {_braced(shape)};"
            for number, shape in enumerate(inputs.values())
        ),
        f"Ort::Value inputs[] = {{{made}}};  // values: inputs[0].GetTensorMutableData<float>()",
        f"const char* input_names[] = {_braced(map(_quoted, inputs))};",
        f"const char* output_names[] = {_braced(map(_quoted, outputs))};",
        f"auto outputs = session.Run(Ort::RunOptions(), input_names, inputs, {len(inputs)}, output_names, "
        f"{len(outputs)});",
    ]
    return python, cpp


def _openvino(
    file: str, inputs: dict[str, Sequence[int]], outputs: Sequence[str], library: str | None
) -> _Lines:
    feed = ", ".join(f'"{name}": {_numpy(shape)}' for name, shape in inputs.items())
    python = [
        "import numpy, openvino" + (", quincunx as qx" if library else ""),
        "core = openvino.Core()",
        *(["qx.openvino.register(core)"] if library else []),
        f'model = core.compile_model("{file}", "CPU")',
        f"outputs = model({{{feed}}})",
    ]
    extension = [
        f"// built by csrc/openvino/CMakeLists.txt over {library}",
        'core.add_extension("libquincunx_openvino.so");',
    ]
    cpp = [
        "#include <openvino/openvino.hpp>",
        "ov::Core core;",
        *(extension if library else []),
        f'auto request = core.compile_model("{file}", "CPU").create_infer_request();',
        *(
            f"request.set_tensor({_quoted(name)}, ov::Tensor(ov::element::f32, ov::Shape{_braced(shape)}));"
            for name, shape in inputs.items()
        ),
        "request.infer();",
        f"const float* output = request.get_tensor({_quoted(outputs[0])}).data<float>();",
    ]
    return python, cpp


def _torch(
    file: str, inputs: dict[str, Sequence[int]], outputs: Sequence[str], library: str | None
) -> _Lines:
    python = _loaded(f'model = torch.export.load("{file}").module()', inputs, library)
    return python, ["// torch.export files are for Python; format aoti is for C++"]


def _aoti(file: str, inputs: dict[str, Sequence[int]], outputs: Sequence[str], library: str | None) -> _Lines:
    python = _loaded(f'model = torch._inductor.aoti_load_package("{file}")', inputs, library)
    zeros = ", ".join(f"at::zeros({_braced(shape)})" for shape in inputs.values())
    cpp = [
        *(["#include <dlfcn.h>"] if library else []),
        "#include <ATen/ATen.h>",
        "#include <torch/csrc/inductor/aoti_package/model_package_loader.h>",
        # it has a function for Python that nobody calls here
        *([f'dlopen("{library}", RTLD_LAZY | RTLD_GLOBAL);'] if library else []),
        f'torch::inductor::AOTIModelPackageLoader model("{file}");',
        f"auto outputs = model.run({{{zeros}}});",
    ]
    return python, cpp


def _loaded(load: str, inputs: dict[str, Sequence[int]], library: str | None) -> list[str]:
    zeros = ", ".join(f"torch.zeros({tuple(shape)})" for shape in inputs.values())
    operators = [f'torch.ops.load_library("{library}")'] if library else []
    return ["import torch", *operators, load, f"outputs = model({zeros})"]


def _numpy(shape: Sequence[int]) -> str:
    return f"numpy.zeros({tuple(shape)}, numpy.float32)"


def _quoted(name: str) -> str:
    return f'"{name}"'


def _braced(values: Iterable[object]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"
