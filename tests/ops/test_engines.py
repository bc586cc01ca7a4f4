"""Programs in ONNX Runtime, in OpenVINO and in programs in C and C++: what the fused network answers."""

import os
import re
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import quincunx as qx
from helpers import ROOT
from helpers.programs import called, examples
from quincunx.fusion.serialise import load_program, pieces
from quincunx.ops import backend
from quincunx.ops.libraries import DOMAIN, OPERATOR, OPSET, library_path

pytestmark = pytest.mark.skipif(backend().name != "native", reason="programs run in native kernels")
ONE_PIECE = ["mean", "pooled", "compact", "fitted", "bottleneck", "two", "preactivation"]


def node_of(*arguments):
    onnx = pytest.importorskip("onnx")
    return onnx.helper.make_node(OPERATOR, *arguments, domain=DOMAIN)


def model_of(inputs, outputs, nodes, constants=(), dtype="FLOAT"):
    onnx = pytest.importorskip("onnx")
    kind = onnx.TensorProto.DataType.Value(dtype)

    def info(name, shape):
        return onnx.helper.make_tensor_value_info(name, kind, ["N", *shape])

    graph = onnx.helper.make_graph(
        nodes,
        "program",
        [info(name, shape) for name, shape in inputs],
        [info(name, shape) for name, shape in outputs],
        [
            onnx.helper.make_tensor(name, onnx.TensorProto.UINT8, [len(data)], data, raw=True)
            for name, data in constants
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN, OPSET)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def of_piece(piece, data=None, dtype="FLOAT"):
    node = node_of(["bytes", *piece.inputs], list(piece.outputs))
    inputs = zip(piece.inputs, piece.input_shapes, strict=True)
    outputs = zip(piece.outputs, piece.output_shapes, strict=True)
    return model_of(inputs, outputs, [node], [("bytes", piece.data if data is None else data)], dtype)


def single(name, batch=None):
    """The last program of an example as one piece, its arguments, and torch's results."""
    model, x = examples()[name]
    program, arguments, _ = called(qx.fuse(model), x)[-1]
    if batch is not None:
        arguments = [torch.rand(batch, *a.shape[1:]) for a in arguments]
    [piece] = pieces(program, *(a.shape for a in arguments))
    results = program(*arguments)
    return piece, [a.contiguous().numpy() for a in arguments], [y.numpy() for y in results]


def close(found, wanted, rtol=1e-4):
    assert len(found) == len(wanted)
    for got, expected in zip(found, wanted, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-5)


def rounded(piece, arguments, dtype):
    """The program's results for maps in ``dtype``, and the error of rounding these to it in turn."""
    given = [torch.from_numpy(a).to(dtype).float() for a in arguments]
    return [y.numpy() for y in load_program(piece.data)(*given)], 1e-4 + torch.finfo(dtype).eps / 2


# ---------------------------------------------------------------- ONNX Runtime


def session(data, threads=1):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    qx.onnxruntime.register(options)
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ONE_PIECE)
def test_onnxruntime_answers_as_torch(name, threads):
    for batch in (1, 2, 7):
        piece, arguments, results = single(name, batch)
        made = session(of_piece(piece), threads)
        for _ in range(3):
            close(made.run(None, dict(zip(piece.inputs, arguments, strict=True))), results)


def test_onnxruntime_says_what_is_wrong_with_a_graph():
    piece, arguments, _ = single("two")
    with pytest.raises(Exception, match="quincunx: the program is damaged: its checksum is wrong"):
        session(of_piece(piece, piece.data[:-1] + b"?"))
    with pytest.raises(Exception, match="quincunx: these 5 bytes are no program of quincunx"):
        session(of_piece(piece, b"hello"))
    inputs = list(zip(piece.inputs, piece.input_shapes, strict=True))
    outputs = list(zip(piece.outputs, piece.output_shapes, strict=True))
    names = ["bytes", *piece.inputs, piece.inputs[0]]
    more = node_of(names, list(piece.outputs))
    with pytest.raises(Exception, match=r"quincunx: the program has \d maps and \d outputs, the node"):
        session(model_of(inputs, outputs, [more], [("bytes", piece.data)]))
    free = [(name, ["h", "w", "c"]) for name, _ in inputs]
    node = node_of(["bytes", *piece.inputs], list(piece.outputs))
    made = session(model_of(free, outputs, [node], [("bytes", piece.data)]))
    wrong = {name: x[:, :, 1:] for name, x in zip(piece.inputs, arguments, strict=True)}
    with pytest.raises(Exception, match=r"quincunx: map 0 must be float32 \[N, 6, 8, 10\] with one N"):
        made.run(None, wrong)


def test_sessions_and_torch_at_the_same_time():
    """Two sessions, a program in torch's threads and one in ours, from four threads."""
    piece, arguments, results = single("bottleneck", 4)
    first, second = session(of_piece(piece), 2), session(of_piece(piece), 1)
    feed = dict(zip(piece.inputs, arguments, strict=True))
    program, tensors = load_program(piece.data), [torch.from_numpy(a) for a in arguments]
    failures = []

    def work(run):
        try:
            for _ in range(30):
                close(run(), results)
        except BaseException as error:  # noqa: BLE001  # told to the test's own thread
            failures.append(error)

    calls = (
        lambda: first.run(None, feed),
        lambda: first.run(None, feed),
        lambda: second.run(None, feed),
        lambda: [y.numpy() for y in program(*tensors)],
    )
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_registering_twice_and_something_else():
    runtime = pytest.importorskip("onnxruntime")
    for _ in range(2):
        qx.onnxruntime.register(runtime.SessionOptions())
    with pytest.raises(TypeError, match=r"expected an onnxruntime\.SessionOptions"):
        qx.onnxruntime.register(None)


# ---------------------------------------------------------------- OpenVINO


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The library in C++, built against the headers of the wheel."""
    pytest.importorskip("openvino")
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    package, build = Path(find_spec("openvino").origin).parent, tmp_path_factory.mktemp("openvino")
    settings = [f"-DOpenVINO_DIR={package}/cmake", f"-DQUINCUNX_LIBRARY={library_path('quincunx')}"]
    for command in (
        ["cmake", "-S", ROOT / "csrc" / "openvino", "-B", build, *settings, "-DCMAKE_CXX_FLAGS=-O1"],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "libquincunx_openvino.so"


def compiled(data, folder, register, hint="f32"):
    openvino = pytest.importorskip("openvino")
    (folder / "model.onnx").write_bytes(data)
    core = openvino.Core()
    register(core)
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 2}
    return core.compile_model(core.read_model(folder / "model.onnx"), "CPU", settings)


def answers(made, piece, arguments, results):
    """Compare a compiled model's answer with the program's."""
    openvino = pytest.importorskip("openvino")
    found, slack = made(dict(zip(piece.inputs, arguments, strict=True))), {}
    # what it computes in: the hint, if the processor has that. Maps of programs stay in float32 under bf16
    if made.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f16:
        results, slack["rtol"] = rounded(piece, arguments, torch.float16)
    close([found[name] for name in piece.outputs], results, **slack)


@pytest.mark.parametrize("hint", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ONE_PIECE)
def test_openvino_answers_as_torch(name, hint, tmp_path):
    for batch in (1, 7):
        piece, arguments, results = single(name, batch)
        made = compiled(of_piece(piece), tmp_path, lambda core: qx.openvino.register(core, 2), hint)
        answers(made, piece, arguments, results)


@pytest.mark.parametrize("hint", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ["mean", "two"])
def test_the_extension_in_cpp_answers_as_torch(name, hint, extension, tmp_path):
    piece, arguments, results = single(name, 3)
    made = compiled(of_piece(piece), tmp_path, lambda core: core.add_extension(str(extension)), hint)
    answers(made, piece, arguments, results)
    with pytest.raises(Exception, match="its checksum is wrong"):
        compiled(of_piece(piece, piece.data[:-1] + b"?"), tmp_path, lambda c: c.add_extension(str(extension)))


@pytest.mark.parametrize(("language", "kind"), [("python", "f16"), ("c++", "f16"), ("c++", "bf16")])
@pytest.mark.parametrize("name", ["mean", "two"])
def test_openvinos_maps_in_half_precision(name, language, kind, request, tmp_path):
    """By the model's own ``evaluate``, which does not ask what the processor has."""
    openvino = pytest.importorskip("openvino")
    piece, arguments, _ = single(name, 3)
    dtype, onnxs = {"f16": (torch.float16, "FLOAT16"), "bf16": (torch.bfloat16, "BFLOAT16")}[kind]
    results, slack = rounded(piece, arguments, dtype)
    (tmp_path / "model.onnx").write_bytes(of_piece(piece, dtype=onnxs))
    core, kind = openvino.Core(), getattr(openvino.Type, kind)
    if language == "python":
        qx.openvino.register(core, 2)
    else:
        core.add_extension(str(request.getfixturevalue("extension")))
    model = core.read_model(tmp_path / "model.onnx")
    assert [y.get_element_type() for y in model.outputs] == [kind] * len(results)
    # numpy has no bfloat16
    given = [torch.from_numpy(a).to(dtype).view(torch.int16).numpy() for a in arguments]
    found = [np.empty(y.shape, np.int16) for y in results]
    assert model.evaluate(*([openvino.Tensor(a, a.shape, kind) for a in half] for half in (found, given)))
    close([torch.from_numpy(y).view(dtype).float().numpy() for y in found], results, rtol=slack)


def test_openvinos_own_format_and_parallel_requests(tmp_path):
    openvino = pytest.importorskip("openvino")
    piece, arguments, results = single("bottleneck", 4)
    (tmp_path / "model.onnx").write_bytes(of_piece(piece))
    core = openvino.Core()
    qx.openvino.register(core, 2)
    openvino.save_model(core.read_model(tmp_path / "model.onnx"), tmp_path / "model.xml")
    made = core.compile_model(tmp_path / "model.xml", "CPU", {"NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 2})
    requests = [made.create_infer_request() for _ in range(4)]
    for request in requests:
        request.start_async(arguments)
    for request in requests:
        request.wait()
        close([request.get_output_tensor(0).data], results)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_its_own_format_from_cpp_and_python(dtype, extension, tmp_path):
    """One .xml file, read by the extension, by the operation in Python and by a host in C++."""
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = qx.networks.build("rsbn8", width=8).eval()
    x = torch.rand(3, 3, 13, 12)
    fused = qx.fuse(model) if dtype is None else qx.fuse(model, dtype, force=True)
    with torch.no_grad():
        result = fused(x).numpy()
    path = tmp_path / "net.xml"
    made = qx.export(model, path, x, plugin=True, dtype=dtype, rounds=0)
    assert "qx.openvino.register(core)" in made.lines["Python"]
    assert "<layer" in path.read_text()
    assert 'type="QuincunxProgram"' in path.read_text()
    for register in (lambda core: core.add_extension(str(extension)), qx.openvino.register):
        core = openvino.Core()
        register(core)
        for hint in ("f32", "bf16"):
            answer = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})(x.numpy())[0]
            # the classifier behind the program is OpenVINO's own
            slack = 1e-5 if hint == "f32" else 2e-2
            np.testing.assert_allclose(answer, result, rtol=1e-4, atol=slack)
    with pytest.raises(Exception, match="QuincunxProgram"):
        openvino.Core().read_model(path)
    host = openvino_host(tmp_path)
    answer = answer_of([host, path, extension, 2, *x.shape], [x.numpy()], result.shape)
    np.testing.assert_allclose(answer, result, rtol=1e-4, atol=2e-2)  # by default in what the processor has


def test_openvino_says_what_is_wrong(tmp_path):
    openvino = pytest.importorskip("openvino")
    piece, _, _ = single("two")
    with pytest.raises(Exception, match="its checksum is wrong"):
        compiled(of_piece(piece, piece.data[:-1] + b"?"), tmp_path, qx.openvino.register)
    with pytest.raises(ValueError, match="threads=0: expected an integer of at least 1"):
        qx.openvino.register(openvino.Core(), 0)


def test_both_engines_and_torch_in_one_process():
    code = """
import sys; sys.path.insert(0, "tests")
import numpy as np, torch, threading, pathlib, tempfile, os
from ops.test_engines import compiled, close, of_piece, session, single
from quincunx.fusion.serialise import load_program
import quincunx as qx
piece, arguments, results = single("bottleneck", 4)
feed = dict(zip(piece.inputs, arguments))
ort = session(of_piece(piece), 2)
folder = pathlib.Path(tempfile.mkdtemp())
ov = compiled(of_piece(piece), folder, lambda core: qx.openvino.register(core, 2))
program = load_program(piece.data)
bad = []
def work(run):
    try:
        for _ in range(20): close(run(), results)
    except BaseException as error: bad.append(error)
calls = [lambda: ort.run(None, feed),
         lambda: [program(*(torch.from_numpy(a) for a in arguments))[0].numpy()]] * 2
threads = [threading.Thread(target=work, args=(c,)) for c in calls]
for t in threads: t.start()
for _ in range(20): close([ov(feed)[0]], results)
for t in threads: t.join()
assert not bad, bad
print("fine")
"""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout == "fine\n", done.stderr


def test_forked_workers_have_sessions_of_their_own():
    """After a parent that used all of them; an engine's own threads do not survive a fork, so a worker makes
    its sessions."""
    code = """
import sys; sys.path.insert(0, "tests")
import faulthandler, os, pathlib, tempfile, torch
from ops.test_engines import compiled, close, of_piece, session, single
from quincunx.fusion.serialise import load_program
from quincunx.ops.libraries import LoadedProgram
import quincunx as qx
torch.set_num_threads(2)
piece, arguments, results = single("bottleneck", 4)
feed, tensors = dict(zip(piece.inputs, arguments)), [torch.from_numpy(a) for a in arguments]
program, loaded = load_program(piece.data), LoadedProgram(piece.data)
def engines():
    folder = pathlib.Path(tempfile.mkdtemp())
    model = compiled(of_piece(piece), folder, lambda core: qx.openvino.register(core, 2))
    return session(of_piece(piece), 2), model
def work(ort, ov):
    close(ort.run(None, feed), results)
    close([ov(feed)[0]], results)
    close(loaded.run(arguments, threads=2), results)
    close([program(*tensors)[0].numpy()], results)
own = engines()
work(*own)
children = []
for number in range(2):
    children.append(os.fork())
    if not children[-1]:
        faulthandler.dump_traceback_later(120, exit=True)
        torch.set_num_threads(1)
        try: work(*engines())
        except BaseException as error: print(error); os._exit(1)
        os._exit(0)
work(*own)
print([os.waitpid(child, 0)[1] for child in children])
"""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert done.stdout == "[0, 0]\n", done.stderr


# ---------------------------------------------------------------- programs in C and C++


def built(compiler, *arguments):
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    done = subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def answer_of(command, arguments, shape, env=None):
    given = b"".join(a.tobytes() for a in arguments)
    done = subprocess.run(
        [str(c) for c in command], input=given, capture_output=True, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr.decode()
    assert re.search(r"\d+ threads: [\d.]+ ms", done.stderr.decode())
    return np.frombuffer(done.stdout, np.float32).reshape(shape)


def test_a_host_in_c(tmp_path):
    piece, arguments, results = single("two", 3)
    (tmp_path / "program").write_bytes(piece.data)
    library = Path(library_path("quincunx"))
    flags = ["-O1", "-Wall", "-Werror", "-I", ROOT / "csrc" / "capi", f"-Wl,-rpath,{library.parent}"]
    built("cc", *flags, ROOT / "examples" / "host_c.c", library, "-o", tmp_path / "host")
    for threads in (1, 2):
        command = [tmp_path / "host", tmp_path / "program", 3, threads]
        whole = answer_of(command, arguments, -1)
        np.testing.assert_allclose(whole, np.concatenate([y.ravel() for y in results]), rtol=1e-4, atol=1e-5)
    (tmp_path / "program").write_bytes(piece.data[:-1])
    done = subprocess.run([tmp_path / "host", tmp_path / "program", "1", "1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "program: the program is incomplete: it should have" in done.stderr


def test_a_host_of_onnxruntime_in_c(tmp_path):
    """Built with the facts that the operator uses, which have the header's names."""
    runtime = pytest.importorskip("onnxruntime")
    library = next((Path(runtime.__file__).parent / "capi").glob("libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip("this onnxruntime has no library of its own")
    # the name that the library itself has
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    facts = ROOT / "csrc" / "onnxruntime" / "onnxruntime_facts.h"
    (tmp_path / "onnxruntime_c_api.h").write_text(f'#include "{facts}"\n')
    flags = ["-O1", "-I", tmp_path, f"-Wl,-rpath,{tmp_path}"]
    built("cc", *flags, ROOT / "examples" / "host_onnxruntime.c", library, "-o", tmp_path / "host")
    piece, arguments, results = single("bottleneck", 3)
    (tmp_path / "model.onnx").write_bytes(of_piece(piece))
    [result], [x] = results, arguments
    head = [tmp_path / "host", tmp_path / "model.onnx", qx.onnxruntime.quincunx_library()]
    for threads in (1, 2):
        command = [*head, threads, piece.inputs[0], piece.outputs[0], *x.shape, result.size]
        close([answer_of(command, [x], result.shape)], [result])


def openvino_host(folder):
    package = Path(find_spec("openvino").origin).parent
    [library] = (package / "libs").glob("libopenvino.so.*")
    source, libraries = ROOT / "examples" / "host_openvino.cpp", f"-Wl,-rpath,{package}/libs"
    flags = ["-O1", "-std=c++17", "-I", package / "include", libraries, f"-Wl,-rpath-link,{package}/libs"]
    built("c++", *flags, source, library, "-o", folder / "host")
    return folder / "host"


def test_a_host_of_openvino_in_cpp(extension, tmp_path):
    piece, [x], [result] = single("bottleneck", 3)
    (tmp_path / "model.onnx").write_bytes(of_piece(piece))
    command = [openvino_host(tmp_path), tmp_path / "model.onnx", extension, 2, *x.shape]
    close([answer_of(command, [x], result.shape)], [result])


def test_the_page_on_plugins_runs():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(programs) == 3
    names = {}
    for program in programs:
        exec(program, names)
    torch.testing.assert_close(names["y"], names["fused"].program0(names["x"])[0])


# ---------------------------------------------------------------- the interface's facts

HEADERS = [
    Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime")),
    Path("/usr/include/onnxruntime/core/session"),
    Path("/usr/local/include/onnxruntime"),
]


def test_the_facts_of_onnxruntime_are_those_of_its_header(tmp_path):
    """``ONNXRUNTIME_INCLUDE`` names a folder with onnxruntime_c_api.h."""
    folder = next((path for path in HEADERS if (path / "onnxruntime_c_api.h").is_file()), None)
    if folder is None:
        pytest.skip("the header of ONNX Runtime is not installed")
    facts = ROOT / "csrc" / "onnxruntime" / "onnxruntime_facts.h"
    text = facts.read_text()
    fields = {
        record: [
            name
            for name in re.findall(
                r"\(\*(\w+)\)\(", re.search(rf"struct {record} \{{(.*?)\n\}};", text, re.S)[1]
            )
            if name[0].isupper()
        ]
        for record in ("OrtApi", "OrtCustomOp")
    }
    assert len(fields["OrtApi"]) > 25
    assert len(fields["OrtCustomOp"]) == 21
    values = re.findall(r"\b((?:ORT_|ONNX_TENSOR_|INPUT_|Ort(?:Arena|MemType))\w+) = \d+", text)
    assert len(values) >= 11
    lines = [
        f'printf("{record}.{name} %zu\\n", offsetof(struct {record}, {name}));'
        for record, names in fields.items()
        for name in names
    ] + [f'printf("{name} %d\\n", (int){name});' for name in values]
    body = "#include <stddef.h>\n#include <stdio.h>\nint main(void) {" + "\n".join(lines) + "}\n"
    found = []
    for number, include in enumerate((facts, folder / "onnxruntime_c_api.h")):
        source = tmp_path / f"{number}.c"
        source.write_text(f'#include "{include}"\n{body}')
        built("cc", source, "-o", tmp_path / str(number))
        found.append(subprocess.run([tmp_path / str(number)], capture_output=True, text=True).stdout)
    assert found[0] == found[1]
