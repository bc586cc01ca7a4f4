"""qx.export: files that engines load in a process of their own, what is in them, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from collections import OrderedDict, namedtuple
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn.utils import prune

import quincunx as qx
from helpers import ROOT
from quincunx.deployment import export as exporting
from quincunx.deployment import writers
from quincunx.deployment.baseline import dense_twin
from quincunx.deployment.export import ExportFailed
from quincunx.deployment.formats import FORMATS, format_for
from quincunx.deployment.verification import Candidate, difference, run_apart
from quincunx.fusion.int8 import Int8Program
from quincunx.fusion.serialise import pieces

FORMS = [(name, plugin) for name in ("onnx", "openvino", "torch") for plugin in (False, True)]
# a third setting: each format and each kind of file meets both of its values
WITH_A_SWITCH = [(name, plugin, place in (0, 3, 4)) for place, (name, plugin) in enumerate(FORMS)]


def network(**settings):
    torch.manual_seed(0)
    return qx.networks.build("rsbn8", width=8, **settings).eval()


def in_a_process(made, folder, last):
    """What the lines in Python that a result gives print, with one more, in a process of their own."""
    code = "\n".join([*made.lines["Python"], last])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "plugin", "even"), WITH_A_SWITCH)
def test_each_format_is_checked_in_three_batches_and_its_lines_run(tmp_path, name, plugin, even):
    path = tmp_path / f"net{FORMATS[name].suffix}"
    x = torch.randn(1, 3, *((16, 16) if even else (15, 13)))
    made = qx.export(network(), path, x, plugin=plugin, force=True, rounds=3, threads=1)
    assert set(made.difference) == {1, 2, 7}
    assert max(made.difference.values()) < 1e-4
    assert made.times["ours"] > 0
    assert made.speedup > 0
    assert made.macs["dense"] > made.macs["ours"]
    written = list(tmp_path.iterdir())
    assert path in written
    assert made.size == sum(part.stat().st_size for part in written)
    assert len(written) == (2 if name == "openvino" else 1)
    content = b"".join(part.read_bytes() for part in written)
    # of this machine there is nothing in it
    for place in (str(Path.home()), str(tmp_path), str(Path(qx.__file__).parent), "site-packages"):
        assert place.encode() not in content
    assert in_a_process(made, tmp_path, "print('ran')") == "ran\n"


def test_an_onnx_file_says_what_it_is(tmp_path):
    model = network()
    model.preprocess = qx.networks.preprocessing.Preprocessing((0.5,) * 3, (0.25,) * 3, (16, 16))
    path = tmp_path / "net.onnx"
    made = qx.export(
        model,
        path,
        torch.randn(1, 3, 16, 16),
        input_names=["image"],
        output_names=["scores"],
        force=True,
        rounds=3,
    )
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [18]
    assert [value.name for value in proto.graph.input] == ["image"]
    assert [value.name for value in proto.graph.output] == ["scores"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert not any(node.domain for node in proto.graph.node)
    facts = json.loads(next(p.value for p in proto.metadata_props if p.key == "quincunx"))
    assert facts["samplings"] == ["cosets of period 2: (0, 0), (1, 1)"]
    assert facts["layers"]["SampledConvTranspose2d"] == 1
    assert (facts["mean"], facts["std"]) == ([0.5] * 3, [0.25] * 3)
    assert facts["macs"] == made.macs
    assert facts["difference"] == max(made.difference.values())
    assert facts["speedup"] == made.speedup


def test_kernels_are_operators_of_our_domain(tmp_path):
    path = tmp_path / "net.onnx"
    qx.export(network(), path, torch.randn(1, 3, 16, 16), plugin=True, force=True, rounds=3)
    proto = onnx.load(str(path))
    nodes = [node for node in proto.graph.node if node.domain]
    assert {(node.domain, node.op_type) for node in nodes} == {("quincunx", "Program")}
    assert not [node for node in proto.graph.node if node.op_type == "Conv"]


@pytest.mark.parametrize("opset", [18, 20, 22])
def test_opsets(tmp_path, opset):
    path = tmp_path / "net.onnx"
    qx.export(network(), path, torch.randn(1, 3, 16, 16), opset=opset, rounds=0)
    assert [entry.version for entry in onnx.load(str(path)).opset_import if not entry.domain] == [opset]


@pytest.mark.parametrize("plugin", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_weights_beyond_the_limit_or_if_asked_go_to_a_second_file(tmp_path, monkeypatch, asked, plugin):
    if not asked:
        monkeypatch.setattr(writers, "EXTERNAL_ABOVE", 1000)
    path = tmp_path / "net.onnx"
    x = torch.randn(1, 3, 16, 16)
    made = qx.export(network(), path, x, rounds=0, external_data=asked, plugin=plugin)
    data = tmp_path / "net.onnx.data"
    assert path.stat().st_size < data.stat().st_size
    assert path.stat().st_mode == data.stat().st_mode
    assert made.size == path.stat().st_size + data.stat().st_size
    assert sorted(part.name for part in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    x = torch.randn(3, 3, 16, 16)
    library = (qx.onnxruntime.quincunx_library(),) if plugin else ()
    found = run_apart([Candidate("a", str(path), "onnxruntime", library)], [[x]], [x], threads=1, rounds=0)
    with torch.no_grad():
        assert difference(found.answers[0], [network()(x)]) < 1e-4


def test_weights_beyond_the_limit_reach_openvino_by_a_second_file(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(writers, "EXTERNAL_ABOVE", 1000)
    made = qx.export(network(), tmp_path / "net.xml", torch.randn(1, 3, 16, 16), rounds=0)
    assert max(made.difference.values()) < 1e-4
    assert sorted(part.name for part in tmp_path.iterdir()) == ["net.bin", "net.xml"]


def test_a_second_place_gets_the_weights_that_are_in_the_first_ones_file(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4))
    x = torch.randn(2, 3, 16, 16)
    write = writers.onnx_writer(writers.trace_for_export(net, [x], ["x"], ["y"], False), 18, True)
    for place in (tmp_path / "a.onnx", tmp_path / "a.onnx", tmp_path / "b.onnx"):
        write(place, {"at": place.name})
    (tmp_path / "a.onnx.data").unlink()
    found = run_apart(
        [Candidate("b", str(tmp_path / "b.onnx"), "onnxruntime")], [[x]], [x], threads=1, rounds=0
    )
    with torch.no_grad():
        assert difference(found.answers[0], [net(x)]) < 1e-4


@pytest.mark.parametrize("plugin", [False, True])
def test_the_network_stays_as_it_was(tmp_path, plugin):
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)),
        qx.SpatialBottleneck2d(8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    before = {
        name: (t, t.clone(), t.requires_grad, t._version)
        for name, t in net.state_dict(keep_vars=True).items()
    }
    qx.export(net, tmp_path / "net.onnx", torch.randn(2, 3, 16, 16), plugin=plugin, force=True, rounds=3)
    after = net.state_dict(keep_vars=True)
    assert net.training
    assert after.keys() == before.keys()
    for name, (same, value, asked, version) in before.items():
        assert after[name] is same, name
        assert same.equal(value), name
        assert (same.requires_grad, same._version) == (asked, version), name


def test_several_inputs_and_outputs_and_a_fixed_batch(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = qx.SpatialBottleneck2d(3, 4), qx.SpatialBottleneck2d(3, 4)

        def forward(self, x, y):
            z = self.a(x) + self.b(y)
            return z, z.mean((2, 3)).view(2, 4)

    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 9, 9), torch.randn(2, 3, 9, 9)
    path = tmp_path / "two.onnx"
    with pytest.raises(ValueError, match="dynamic_batch=False"):
        qx.export(Two().eval(), path, inputs, rounds=0)
    made = qx.export(Two().eval(), path, inputs, rounds=0, dynamic_batch=False)
    assert (made.inputs, made.outputs) == (("input0", "input1"), ("output0", "output1"))
    assert list(made.difference) == [2]


class Mixed(nn.Module):
    """Masks, cosets, concatenation, max pooling, a shortcut; two inputs and two outputs."""

    def __init__(self):
        super().__init__()
        spots = qx.Random(0.5, 1)
        self.a = qx.PerforatedConv2d(3, 4, 3, sampling=spots, padding=1)
        self.b = qx.PerforatedConv2d(2, 4, 3, sampling=spots, padding=1)
        self.point, self.last = nn.Conv2d(8, 6, 1), qx.SpatialBottleneck2d(6, 6)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x, y):
        both = self.point(torch.cat([torch.relu(self.a(x)), self.b(y)], 1))
        pooled = nn.functional.max_pool2d(self.norm(both), 3, 2, 1)
        return torch.relu(self.last(pooled) + pooled), both.mean((2, 3))


@pytest.mark.parametrize(("name", "plugin"), FORMS)
def test_mixed_networks_of_several_inputs(tmp_path, name, plugin):
    torch.manual_seed(0)
    path = tmp_path / f"net{FORMATS[name].suffix}"
    inputs = torch.randn(2, 3, 13, 11), torch.randn(2, 2, 13, 11)
    made = qx.export(Mixed().eval(), path, inputs, plugin=plugin, rounds=0)
    assert set(made.difference) == {1, 2, 7}
    assert max(made.difference.values()) < 1e-4
    assert in_a_process(made, tmp_path, "print(len(outputs))") == "2\n"


class Named(nn.Module):
    """As networks that segment return their maps; the second entry is two maps."""

    def __init__(self, pairs):
        super().__init__()
        self.a, self.b, self.pairs = qx.SpatialBottleneck2d(3, 4), qx.SpatialBottleneck2d(4, 5), pairs

    def forward(self, x):
        y = torch.relu(self.a(x))
        z = self.b(y)
        return OrderedDict(out=z, aux=[y, y.mean((2, 3))] if self.pairs else y)


@pytest.mark.parametrize(("name", "plugin", "pairs"), WITH_A_SWITCH)
def test_outputs_in_dictionaries_keep_their_names(tmp_path, name, plugin, pairs):
    torch.manual_seed(0)
    model = Named(pairs).eval()
    path = tmp_path / f"net{FORMATS[name].suffix}"
    made = qx.export(model, path, torch.randn(2, 3, 9, 8), plugin=plugin, rounds=0)
    how = "with our kernels" if plugin else "as plain operators"
    assert made.sentence().endswith(f", {how}, not timed beside the dense network")
    assert made.outputs == (("output0", "output1", "output2") if pairs else ("out", "aux"))
    assert max(made.difference.values()) < 1e-4


def test_a_file_that_is_not_faster_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.Found, "ratio", lambda self, slower, faster: 0.5)
    path = tmp_path / "net.onnx"
    path.write_text("an older file")
    with pytest.raises(ExportFailed, match=r"0\.50x as fast as .* plugin=True .* force=True"):
        qx.export(network(), path, torch.randn(1, 3, 16, 16), rounds=3)
    assert [part.name for part in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_text() == "an older file"
    made = qx.export(network(), path, torch.randn(1, 3, 16, 16), rounds=3, force=True)
    assert made.speedup == 0.5
    assert path.stat().st_size > 1000


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    """Killed while its engine compares; the process that made the folder is gone, so its lock is too."""
    code = f"""if True:
        import os, torch, quincunx as qx
        from quincunx.deployment import export
        export.run_apart = lambda *_, **__: os.kill(os.getpid(), 9)
        qx.export(torch.nn.Conv2d(3, 4, 3), {str(tmp_path / "n.onnx")!r}, torch.randn(1, 3, 8, 8))
    """
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == -9
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".n.onnx.")
    qx.export(nn.Conv2d(3, 4, 3), tmp_path / "n.onnx", torch.randn(1, 3, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["n.onnx"]


def test_a_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    def wrong(fused, arguments, node=None):
        lowered = lower(fused, arguments, node)
        with torch.no_grad():
            for call in lowered.program0.calls:
                if getattr(call, "weight", None) is not None:
                    call.weight.mul_(1.01)
        return lowered

    lower = exporting.lower
    monkeypatch.setattr(exporting, "lower", wrong)
    with pytest.raises(ExportFailed, match=r"answers differ from the network's by .* nothing was written"):
        qx.export(network(), tmp_path / "net.onnx", torch.randn(1, 3, 16, 16), rounds=0)
    assert not list(tmp_path.iterdir())


def test_a_dense_network_is_written_without_a_ratio(tmp_path):
    model = qx.networks.build("cifar-resnet8", width=8).eval()
    made = qx.export(model, tmp_path / "net.onnx", torch.randn(1, 3, 16, 16))
    assert made.speedup is None
    assert made.sentence().endswith("dense operators for ONNX Runtime")


METHODS = {
    "espace": qx.Espace(rate=0.5),
    "lowrank": qx.LowRank(rank=0.5),
    "cp": qx.CP(rank=0.3, iterations=5),
    "fitted": qx.Perforate(),
    "qcnn": qx.QCNN(),
    "binaryconnect": qx.BinaryConnect(),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:calibration:UserWarning")
def test_accelerated_networks_in_onnx_runtime(tmp_path, name):
    method = METHODS[name]
    torch.manual_seed(0)
    images = torch.randn(16, 3, 15, 16)
    model = qx.networks.build("cifar-resnet8", width=8).eval()
    result = qx.accelerate(model, method, calibration=[images], example_input=images[:2])
    for plugin in (False, True):
        made = qx.export(result.model, tmp_path / "net.onnx", images[:1], plugin=plugin, rounds=0)
        assert max(made.difference.values()) < 1e-4


class Windowed(nn.Module):
    """torch.fx cannot trace it, since it counts up to the height; torch.export can."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        n, c, h, w = x.shape
        rows, columns = len(range(h)) // 2, int(w) // 2
        y = x.view(n, c, 2, rows, 2, columns).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, rows, columns)
        return self.inner(y).view(n, 2, 2, -1, rows, columns).mean((1, 2))


@pytest.mark.parametrize("plugin", [False, True], ids=["plain", "plugin"])
def test_a_layer_in_a_module_that_only_the_exporter_traces(tmp_path, plugin):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Windowed(qx.SpatialBottleneck2d(8, 8)), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(1, 3, 14, 18)
    assert qx.fuse(model.eval()).meta["whole"].keys() == {"1"}
    made = qx.export(model, tmp_path / "net.onnx", x, plugin=plugin, rounds=0)
    assert max(made.difference.values()) < 1e-4


def test_a_failure_of_the_exporter_says_what_it_goes_back_to(tmp_path, monkeypatch):
    def fails(*_):
        try:
            try:
                raise AssertionError("only 4D queries are supported\nand so on")
            except AssertionError as error:
                raise RuntimeError("Error when translating node %attention_1 : [num_users=1]") from error
        except RuntimeError as error:
            raise RuntimeError("Failed to convert. This is step 3/3") from error

    monkeypatch.setitem(exporting.WRITERS, "onnx", fails)
    wanted = r"format onnx failed: AssertionError: only 4D queries are supported \(at the node attention_1\)$"
    with pytest.raises(ExportFailed, match=wanted):
        qx.export(network(), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_kernels_in_bfloat16(tmp_path):
    x = torch.randn(1, 3, 16, 16)
    made = qx.export(
        network(), tmp_path / "n.onnx", x, plugin=True, dtype=torch.bfloat16, force=True, rounds=3
    )
    assert 1e-5 < max(made.difference.values()) < 0.05


@pytest.mark.parametrize("name", ["onnx", "openvino", "torch"])
def test_kernels_in_eight_bits(tmp_path, name):
    """Of images, and of an artifact, which needs none; compared with the fused network in eight bits."""
    model, images = network(), torch.rand(16, 3, 16, 16)
    small = qx.calibrate(model, images, max_drop=100)
    qx.save(small, tmp_path / "small")
    settings = {"plugin": True, "dtype": torch.int8, "force": True, "rounds": 3, "threads": 1}
    sizes = []
    for number, (given, seen) in enumerate(((model, images), (qx.load(tmp_path / "small"), None))):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / f"net{FORMATS[name].suffix}"
        made = qx.export(given, path, images[:1], calibration=seen, **settings)
        assert set(made.difference) == {1, 2, 7}
        assert max(made.difference.values()) < 1e-5
        assert made.dtype == "int8"
        assert made.speedup > 0
        assert "with our kernels in int8" in made.sentence()
        sizes.append(made.size)
    assert max(sizes) - min(sizes) < 2000
    plain = qx.export(model, tmp_path / f"plain{FORMATS[name].suffix}", images[:1], plugin=True, rounds=0)
    # tables weigh the same in both, and much in a network this small
    assert sizes[0] < 0.65 * plain.size


def test_a_file_in_eight_bits_says_what_was_calibrated(tmp_path):
    model, images = network(), torch.rand(20, 3, 16, 16)
    path = tmp_path / "net.onnx"
    qx.export(model, path, images[:1], plugin=True, dtype=torch.int8, calibration=images, rounds=0)
    facts = json.loads(onnx.load(str(path)).metadata_props[0].value)
    fused = qx.fuse(model, torch.int8, calibration=images, force=True)
    assert facts["dtype"] == "int8"
    assert facts["int8"] == {**fused.meta["int8"], "rest": fused.meta["dtype"]["rest"]}
    assert facts["int8"]["images"] == 20
    # its programs are those of the fused network
    node = next(node for node in onnx.load(str(path)).graph.node if node.domain)
    held = {i.name: i.raw_data for i in onnx.load(str(path)).graph.initializer}
    program = next(module for module in fused.modules() if isinstance(module, Int8Program))
    [piece] = pieces(program, images[:1].shape)
    assert held[node.input[0]] == piece.data


def test_a_dense_twin_has_no_layer_of_the_package():
    model = qx.networks.build("rsbn8", width=8).eval()
    twin = dense_twin(model)
    x = torch.randn(2, 3, 16, 16)
    assert twin(x).shape == model(x).shape
    assert not [m for m in twin.modules() if type(m).__module__.startswith("quincunx.layers")]
    assert qx.cost(twin, x).macs == qx.cost(qx.networks.build("rrn8", width=8).eval(), x).macs
    assert dense_twin(qx.networks.build("rrn8", width=8)) is None


@pytest.fixture(scope="module")
def aoti_host(tmp_path_factory):
    """examples/host_aotinductor.cpp, built as its first lines say."""
    if shutil.which("c++") is None:
        pytest.skip("needs c++")
    folder, place = tmp_path_factory.mktemp("host"), Path(torch.__file__).parent
    libraries = [f"-L{place}/lib", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{place}/lib"]
    source = [f"-I{place}/include", str(ROOT / "examples" / "host_aotinductor.cpp")]
    command = ["c++", "-O1", "-std=c++20", *source, *libraries, "-o", str(folder / "host")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "host"


@pytest.mark.parametrize("plugin", [False, True])
def test_aoti_packages_in_python_and_cpp(tmp_path, plugin, aoti_host):
    path = tmp_path / "net.aoti.pt2"
    torch.manual_seed(0)
    model = nn.Sequential(qx.SpatialBottleneck2d(3, 8), nn.ReLU(), qx.SpatialBottleneck2d(8, 4)).eval()
    made = qx.export(model, path, torch.randn(1, 3, 9, 8), plugin=plugin, rounds=0)
    assert made.format == "aoti"
    assert max(made.difference.values()) < 1e-4
    x = torch.randn(3, 3, 9, 8)
    library = find_spec("quincunx._native").origin if plugin else "-"
    command = [str(part) for part in (aoti_host, path, library, 1, *x.shape)]
    done = subprocess.run(command, input=x.numpy().tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert re.fullmatch(r"AOTInductor, 1 threads: [\d.]+ ms\n", done.stderr.decode())
    answer = np.frombuffer(done.stdout, np.float32).reshape(3, 4, 9, 8)
    with torch.no_grad():
        assert difference([answer], [model(x)]) < 1e-4
    if plugin:
        done = subprocess.run([*command[:2], "-", *command[3:]], capture_output=True, text=True)
        assert done.returncode == 1
        assert "quincunx_native::run_program_sized" in done.stderr


X = torch.randn(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("net.tflite", {}, r"path='.*net.tflite': expected a file that ends in one of \.onnx"),
        (
            "net.onnx",
            {"format": "tensorrt"},
            "format='tensorrt': expected one of onnx, openvino",
        ),
        ("net.onnx", {"format": "openvino"}, r"a file in format openvino ends in \.xml"),
        ("no/net.onnx", {}, "no folder"),
        (
            "net.onnx",
            {"dtype": torch.bfloat16},
            r"dtype=torch\.bfloat16: plain operators",
        ),
        ("net.onnx", {"dtype": torch.int8, "calibration": X}, r"dtype=torch\.int8: plain operators"),
        ("net.onnx", {"calibration": X}, "calibration: dtype=None needs none; it is for torch.int8"),
        (
            "net.onnx",
            {"dtype": torch.int8, "plugin": True},
            "calibration=None: dtype=torch.int8 needs at least",
        ),
        ("net.onnx", {"dtype": torch.int8, "plugin": True, "calibration": X}, "calibration: 1 images"),
        ("net.pt2", {"external_data": True}, "external_data=True: files of format torch"),
        ("net.onnx", {"opset": 9}, "opset=9: expected 18 to 23"),
        ("net.onnx", {"input_names": ["a", "b"]}, r"input_names=\['a', 'b'\]: expected 1 different names"),
        ("net.onnx", {"output_names": ["a b"]}, r"output_names=\['a b'\]"),
        ("net.onnx", {"rounds": 2}, "rounds=2: expected 0, or at least 3"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(tmp_path, path, settings, message):
    with pytest.raises(ValueError, match=message):
        qx.export(network(), tmp_path / path, X, **settings)
    assert not list(tmp_path.iterdir())


def test_bad_networks_and_inputs(tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        qx.export("net", path, X)
    with pytest.raises(TypeError, match=r"example_input: expected float32 tensors .* got torch\.float64"):
        qx.export(network(), path, X.double())
    with pytest.raises(TypeError, match="example_input: expected a tensor"):
        qx.export(network(), path, [X])

    with pytest.raises(ValueError, match=r"the network refuses \[1, 4, 16, 16\]: RuntimeError"):
        qx.export(network(), path, torch.randn(1, 4, 16, 16))
    with pytest.raises(TypeError, match=r"export the network that was given to qx\.fuse"):
        qx.export(qx.fuse(network()), path, X)

    class Words(nn.Module):
        def forward(self, x):
            return {"x": x, "why": "because"}

    with pytest.raises(TypeError, match="returns Tensor, str; an exported network returns tensors"):
        qx.export(Words(), path, X)
    assert not list(tmp_path.iterdir())


def test_a_file_that_its_engine_refuses_is_its_sentence(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=re.escape(f"onnxruntime does not run {path}: ")):
        run_apart([Candidate("a", str(path), "onnxruntime")], [[X]], [X], threads=1, rounds=0)


def test_differences_see_shapes_counts_and_nan():
    wanted = [torch.ones(2, 3)]
    assert difference([np.full((2, 3), 1.5)], wanted) == 0.5
    for answers, message in (
        ([], "0 outputs instead of 1"),
        ([np.ones((3, 2))], r"shape \[3, 2\]"),
        ([np.full((2, 3), np.nan)], "not finite"),
        ([np.array([[1, np.inf, 1], [1, 1, 1]])], "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            difference(answers, wanted)
    wanted = [torch.tensor([[1.0, -torch.inf], [torch.nan, 2.0]])]
    assert difference([np.array([[1, -np.inf], [np.nan, 1.0]])], wanted) == 0.5
    for other in (np.array([[1, np.inf], [np.nan, 2]]), np.array([[1, -np.inf], [0, 2]])):
        with pytest.raises(ValueError, match="output 0: other values that are not finite"):
            difference([other], wanted)
    with pytest.raises(ValueError, match="no value is finite, so that nothing can be compared"):
        difference([np.full(2, np.nan)], [torch.full((2,), torch.nan)])


def test_missing_packages_are_named(monkeypatch):
    from quincunx.deployment import formats

    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"format='openvino': needs openvino, .* 'quincunx\[export\]'"):
        format_for("a.xml", None).check()


def test_the_page_on_deploying_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(program.replace('"rsbn8"', '"rsbn8", width=8'), {})
    assert "as fast as the dense network in ONNX Runtime" in capsys.readouterr().out
    assert (tmp_path / "fast.onnx").is_file()
    table = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert table == list(FORMATS)


class ByBatch(nn.Module):
    """It answers one image as no file with a free batch does; zeros and what has no spread do not show it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, x):
        y = self.conv(x - x.mean())
        return y if x.shape[0] == 1 else y - y.mean(0, keepdim=True)


@pytest.mark.parametrize(
    "example", [torch.zeros(2, 3, 6, 6), torch.ones(1, 3, 6, 6), torch.randn(2, 3, 6, 6)]
)
def test_a_file_is_compared_on_values_that_differ(tmp_path, example):
    with pytest.raises(ExportFailed, match=r"answers differ from the network's by \d"):
        qx.export(ByBatch().eval(), tmp_path / "net.onnx", example, rounds=0)
    assert not list(tmp_path.iterdir())


def test_networks_for_some_values_only(tmp_path):
    class Gamma(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x.pow(1 / 2.2).log())

    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(torch.arange(x.shape[-1]) > 3, -float("inf")) * 2

    for model in (Gamma(), Masked()):
        made = qx.export(model.eval(), tmp_path / "net.onnx", torch.rand(1, 3, 8, 8) + 0.1, rounds=0)
        assert max(made.difference.values()) < 1e-4


def test_names_that_the_exporter_gives_to_values_within(tmp_path):
    """Default names of torch's exporter are those of operations, which the next file has too."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            y = self.first(x).relu()
            return {"relu": self.second(y), "conv2d": y.mean((2, 3))}

    x = torch.randn(1, 3, 9, 9)
    for suffix in ("onnx", "xml"):
        made = qx.export(Two().eval(), tmp_path / f"net.{suffix}", x, input_names="conv2d_1", rounds=0)
        assert (made.inputs, made.outputs) == (("conv2d_1",), ("relu", "conv2d"))
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    assert [one.name for one in (*session.get_inputs(), *session.get_outputs())] == [
        "conv2d_1",
        "relu",
        "conv2d",
    ]
    assert session.get_inputs()[0].shape[0] == "batch" == session.get_outputs()[1].shape[0]
    with pytest.raises(ValueError, match="input_names, output_names: 'a' is in both"):
        qx.export(Two().eval(), tmp_path / "net.onnx", x, input_names="a", output_names=["b", "a"], rounds=0)


Pair = namedtuple("Pair", ["low", "high"])


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_fields_of_a_named_tuple_are_names_of_outputs(tmp_path, suffix):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return Pair(high=y * 2, low=y)

    made = qx.export(Both().eval(), tmp_path / f"net.{suffix}", torch.randn(1, 3, 8, 8), rounds=0)
    assert made.outputs == ("low", "high")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_that_a_forward_computes_are_copied(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    for name, change in {
        "weight_norm": nn.utils.weight_norm,
        "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    }.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
        change(model[0])
        with torch.no_grad():
            model[0].bias.add_(1)
            before = model(x)
        model(x)
        made = qx.export(model, tmp_path / "net.onnx", x, rounds=0)
        assert max(made.difference.values()) < 1e-4, name
        fused = qx.fuse(model, check=x)
        torch.testing.assert_close(fused(x), before, rtol=1e-4, atol=1e-5)
        fast = qx.accelerate(model, qx.SpatialBottleneck(), example_input=x).model
        assert fast(x).shape == before.shape
        # the original still learns
        model(x).sum().backward()
        assert any(p.grad is not None for p in model[0].parameters())


class Bent(Pair):
    """Its own constructor computes something."""

    def __new__(cls, low, high):
        return super().__new__(cls, low.relu(), high)


def test_a_named_tuple_with_a_constructor_of_its_own(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return Bent(self.conv(x), x)

    made = qx.export(Both().eval(), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), rounds=0)
    assert made.outputs == ("low", "high")


def test_an_output_that_is_called_like_an_input(tmp_path):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return {"input": x, "recon": self.conv(x).repeat(2, 1, 1, 1)}

    x = torch.randn(1, 3, 8, 8)
    made = qx.export(Again().eval(), tmp_path / "net.onnx", x, rounds=0)
    assert (made.inputs, made.outputs) == (("input",), ("input_output", "recon"))
    outputs = onnx.load(str(tmp_path / "net.onnx")).graph.output
    assert [one.type.tensor_type.shape.dim[0].dim_param for one in outputs] == ["batch", "2*batch"]


@pytest.mark.parametrize("value", [0.1, -3.0])
def test_an_example_of_one_value_keeps_its_sign(tmp_path, value):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, level):
            return self.conv(x) * (level / value).log()[:, :, None, None]

    x = torch.randn(1, 3, 9, 9), torch.full((1, 1), value)
    made = qx.export(Conditioned().eval(), tmp_path / "net.onnx", x, rounds=0)
    assert max(made.difference.values()) < 1e-4


def test_values_within_are_renamed_to_what_is_free():
    def value(name):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2])

    def branch(out):
        return helper.make_graph([helper.make_node("Add", ["in", "input"], [out])], "b", [], [value(out)])

    nodes = [
        helper.make_node("Relu", ["in"], ["input"]),
        helper.make_node("Neg", ["in"], ["input.within"]),
        helper.make_node("Add", ["input", "input.within"], ["k"]),
        helper.make_node("If", ["c"], ["o"], then_branch=branch("output"), else_branch=branch("b")),
        helper.make_node("Add", ["k", "o"], ["out"]),
    ]
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(nodes, "g", [value("in")], [value("out")], [condition])
    writers._rename(graph, {"in": "input", "out": "output"})
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made, full_check=True)
    x = np.array([[1.0, -2.0]], np.float32)
    [found] = onnxruntime.InferenceSession(made.SerializeToString()).run(["output"], {"input": x})
    relu = np.maximum(x, 0)
    assert np.array_equal(found, (relu - x) + (x + relu))
