"""The lines that load an exported file, in Python and C++."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["lines_to_use"]


def lines_to_use(
    kind: str, file: str, plugin: bool, inputs: Sequence[str], shape: Sequence[int]
) -> dict[str, list[str]]:
    """Return for "Python" and "C++" the lines that load a file and run it.

    Args:
        kind: name of the format.
        file: its name.
        plugin: whether it holds programs of our kernels.
        inputs: names.
        shape: of the first input.

    Example:
        >>> lines_to_use("onnx", "fast.onnx", False, ["x"], (1, 3, 32, 32))["Python"][1]
        'session = onnxruntime.InferenceSession("fast.onnx")'
    """
    zeros = f"numpy.zeros({tuple(shape)}, numpy.float32)"
    feed = ", ".join(f'"{name}": {zeros if place == 0 else "..."}' for place, name in enumerate(inputs))
    if kind == "onnx":
        options = ["options = onnxruntime.SessionOptions()", "qx.onnxruntime.register(options)"]
        python = [
            "import numpy, onnxruntime" + (", quincunx as qx" if plugin else ""),
            *(options if plugin else []),
            f'session = onnxruntime.InferenceSession("{file}"{", options" if plugin else ""})',
            f"outputs = session.run(None, {{{feed}}})",
        ]
        library = [
            "// the path that qx.onnxruntime.quincunx_library() gives",
            'options.RegisterCustomOpsLibrary("libquincunx_ort.so");',
        ]
        cpp = [
            "#include <onnxruntime_cxx_api.h>",
            "Ort::Env env;",
            "Ort::SessionOptions options;",
            *(library if plugin else []),
            f'Ort::Session session(env, "{file}", options);',
        ]
    elif kind == "openvino":
        python = [
            "import numpy, openvino",
            f'model = openvino.Core().compile_model("{file}", "CPU")',
            f"outputs = model({{{feed}}})",
        ]
        cpp = [
            "#include <openvino/openvino.hpp>",
            f'auto model = ov::Core().compile_model("{file}", "CPU");',
            "auto request = model.create_infer_request();",
        ]
    else:
        library = ["import quincunx._native  # the operators' library"] if plugin else []
        load = (
            f'model = torch.export.load("{file}").module()'
            if kind == "torch"
            else f'model = torch._inductor.aoti_load_package("{file}")'
        )
        python = ["import torch", *library, load, f"outputs = model(torch.zeros({tuple(shape)}))"]
        cpp = (
            ["// torch.export files are for Python; format aoti is for C++"]
            if kind == "torch"
            else [
                "#include <torch/csrc/inductor/aoti_package/model_package_loader.h>",
                *(
                    ['dlopen("_native.abi3.so", RTLD_LAZY | RTLD_GLOBAL);  // from the package quincunx']
                    if plugin
                    else []
                ),
                f'torch::inductor::AOTIModelPackageLoader model("{file}");',
                f"auto outputs = model.run({{torch::zeros({{{', '.join(map(str, shape))}}})}});",
            ]
        )
    return {"Python": python, "C++": cpp}
