"""quincunx export, and accelerate from an ONNX file to an ONNX file."""

import json
import re
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import quincunx as qx
from helpers.commands import call, document, refused
from quincunx.measure.engines import quiet

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nets") / "rsbn"
    data = {"mean": [0.5] * 3, "std": [0.25] * 3, "size": [16, 16], "classes": list("abcdefghij")}
    qx.save(qx.networks.build("rsbn8", width=8), folder, info={"data": data})
    return folder


def test_an_artifact_becomes_a_file(artifact, tmp_path):
    path = tmp_path / "net.onnx"
    result = call("export", artifact, "--out", path, "--plugin", "--force", "--rounds", 3, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert re.search(r"[\d.]+x as fast as the dense network in ONNX Runtime, with our kernels", said)
    assert "checked in batches of 1, 2, 7: at most" in said
    assert 'onnxruntime.InferenceSession("net.onnx", options)' in said
    assert 'Ort::Session session(env, "net.onnx", options);' in said
    [image] = onnx.load(str(path)).graph.input
    assert [d.dim_value for d in image.type.tensor_type.shape.dim][1:] == [3, 16, 16]


def test_json_names_and_other_sizes(artifact, tmp_path):
    found = document(
        *("export", artifact, "--out", tmp_path / "net.xml", "--input", "2x3x15x14", "--rounds", 0),
        *("--input-names", "image", "--output-names", "scores", "--fixed-batch"),
    )
    assert (found["format"], found["inputs"], found["outputs"]) == ("openvino", ["image"], ["scores"])
    assert list(found["difference"]) == ["2"]


def test_a_file_that_is_not_faster_ends_with_1(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("quincunx.deployment.verification.Found.ratio", lambda *_: 0.8)
    said = refused("export", artifact, "--out", tmp_path / "net.onnx", "--rounds", 3, code=1)
    assert "0.80x as fast" in said
    assert "--plugin runs our kernels in it, --force writes it all the same" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "net.engine"], "expected a file that ends in one of"),
        (["--format", "coreml"], "format='coreml': expected one of"),
        (["--dtype", "int8"], "dtype='int8': plain operators are written in float32; --plugin"),
        (["--dtype", "int4"], "dtype='int4': expected"),
        (["--plugin", "--dtype", "int8", "--data", "nowhere"], "nowhere"),
        (["--opset", "7"], "opset=7: expected 18 to 23"),
        (["--input", "3x16"], "input='3x16': expected NxCxHxW"),
    ],
)
def test_bad_input_is_one_sentence(artifact, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("export", artifact, *arguments)
    assert not list(tmp_path.iterdir())


def test_eight_bits_of_images_and_of_an_artifact_that_holds_them(tmp_path, monkeypatch):
    """Ranges from training images; an artifact in int8 has them, and is written in int8 by default."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data = {"mean": [0.3], "std": [0.4], "size": [8, 8], "classes": list("0123456789")}
    model = qx.networks.build("rsbn8", 10, 1, width=8).eval()
    qx.save(model, "plain", info={"data": data})
    qx.save(qx.calibrate(model, torch.rand(20, 1, 8, 8), max_drop=100), "small", info={"data": data})
    common = ("--plugin", "--force", "--threads", 1)
    # the speed is told of one file only; the others need no timing
    untimed = (*common, "--rounds", 0)
    found = document("export", "plain", "--out", "a.onnx", "--dtype", "int8", "--data", "digits", *untimed)
    assert (found["dtype"], found["plugin"]) == ("int8", True)
    facts = json.loads(onnx.load("a.onnx").metadata_props[0].value)
    assert facts["int8"]["images"] == 128
    said = call("export", "small", "--out", "b.onnx", *common, "--rounds", 3).stdout
    assert "with our kernels in int8" in " ".join(said.split())
    assert json.loads(onnx.load("b.onnx").metadata_props[0].value)["int8"]["images"] == 20
    assert (
        document("export", "small", "--out", "c.onnx", "--dtype", "float32", *untimed)["dtype"] == "float32"
    )
    # plain operators have the rounded weights
    assert document("export", "small", "--out", "d.onnx", "--rounds", 0)["dtype"] == "float32"


def test_accelerate_writes_its_result_in_eight_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quincunx.acceleration.timing.speed_ratio", lambda *_: 2.0)
    torch.manual_seed(0)
    data = {"mean": [0.3], "std": [0.4], "size": [8, 8], "classes": list("0123456789")}
    qx.save(qx.networks.build("rrn8", 10, 1, width=8).eval(), "plain", info={"data": data})
    result = call(
        *("accelerate", "plain", "--data", "digits", "--method", "spatialbottleneck", "--keep-slower"),
        *("--calibration", 60, "--rounds", 3, "--dtype", "int8", "--export", "onnx", "--threads", 1),
    )
    said = " ".join((result.stdout + result.stderr).split())
    if result.exit_code:
        assert "export: " in said
        assert "in int8" in said
    else:
        facts = json.loads(onnx.load("fast/fast.onnx").metadata_props[0].value)
        assert (facts["dtype"], facts["plugin"], facts["int8"]["images"]) == ("int8", True, 60)


def test_a_network_without_a_size_needs_the_input(tmp_path):
    qx.save(qx.networks.build("rsbn8", width=8), tmp_path / "net")
    assert "--input 1x3x224x224" in refused("export", tmp_path / "net", "--out", tmp_path / "net.onnx")


def test_from_onnx_to_onnx(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = qx.networks.build("cifar-resnet8", width=8, in_channels=1).eval()
    with quiet(), torch.no_grad():
        torch.onnx.export(
            model,
            (torch.randn(2, 1, 32, 32),),
            "model.onnx",
            verbose=False,
            input_names=["image"],
            output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    result = call(
        *("accelerate", "model.onnx", "--data", "digits", "--method", "spatialbottleneck", "--keep-slower"),
        *("--calibration", 60, "--rounds", 3, "--export", "torch", "--plugin", "--mean", 0.3, "--std", 0.4),
    )
    said = result.stdout + result.stderr
    assert (tmp_path / "fast" / "model" / "spec.json").is_file(), said
    # how fast so small a network is depends on the machine
    if result.exit_code:
        assert "is in fast/model; export: " in said
    else:
        assert (tmp_path / "fast" / "fast.pt2").is_file()
    assert 'qx.load("fast/model", factory=lambda: qx.from_onnx("model.onnx"))' in said
    last = call(
        *("export", "--model", "model.onnx", "--weights", "fast", "--input", "1x1x8x8", "--force"),
        *("--out", "faster.onnx", "--rounds", 3),
    )
    assert last.exit_code == 0, last.stderr
    made = onnx.load("faster.onnx").graph
    assert [value.name for value in (*made.input, *made.output)] == ["image", "scores"]


def test_an_onnx_file_is_evaluated(tmp_path):
    digits = torch.zeros(1, 1, 32, 32)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    qx.export(net.eval(), tmp_path / "net.onnx", digits, force=True)
    found = document("evaluate", tmp_path / "net.onnx", "--data", "digits", "--mean", "0.3", "--std", "0.4")
    assert found["images"] == 360
    assert call("evaluate", tmp_path / "net.onnx", "--data", "digits").stdout.startswith(
        f"{tmp_path / 'net.onnx'} on digits"
    )
    said = refused("evaluate", tmp_path / "net.onnx", "--data", "digits", "--size", "16")
    assert "input='1x1x32x32': the images of digits are 1x16x16 (--size says how large)" in said
    (tmp_path / "net.txt").write_text("")
    said = refused("evaluate", tmp_path / "net.txt", "--data", "digits")
    assert "net.txt: a file, expected the folder of an artifact" in said


def test_an_onnx_file_of_free_sizes_takes_that_of_the_option(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    with quiet():
        torch.onnx.export(
            net, (torch.zeros(2, 1, 8, 8),), str(tmp_path / "net.onnx"), dynamo=True, dynamic_shapes=(sizes,)
        )
    given = ("evaluate", tmp_path / "net.onnx", "--data", "digits")
    assert "leaves size 2 free" in refused(*given)
    assert "on the command line --input" in refused(*given)
    assert document(*given, "--input", "1x1x32x32")["images"] == 360


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 3, padding=1))

    def forward(self, image):
        return self.layers(image.permute(0, 3, 1, 2)).mean((2, 3))


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
def test_a_file_of_images_with_channels_last_is_given_them_so(tmp_path, monkeypatch, free):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {0: torch.export.Dim("n")}
    if free:
        sizes |= {1: torch.export.Dim("h", min=4), 2: torch.export.Dim("w", min=4)}
    with quiet():
        torch.onnx.export(
            ChannelsLast().eval(),
            (torch.zeros(2, 32, 32, 1),),
            "net.onnx",
            dynamo=True,
            dynamic_shapes=(sizes,),
            input_names=["image"],
        )
    # either order says the same
    shapes = [("--input", text) for text in ("1x32x32x1", "1x1x32x32")] + ([()] if not free else [])
    data = ("--data", "digits")
    losses = [document("evaluate", "net.onnx", *data, *shape)["loss"] for shape in shapes]
    assert len(set(losses)) == 1
    shape = shapes[0] if free else ()
    made = call(
        *("accelerate", "net.onnx", *data, "--method", "spatialbottleneck", "--keep-slower", *shape),
        *("--calibration", 60, "--rounds", 3),
    )
    assert made.exit_code == 0, made.stderr
    assert 'factory=lambda: qx.from_onnx("net.onnx", nchw=True))' in made.stdout
    given = ("export", "--model", "net.onnx", "--weights", "fast", "--force", "--rounds", 3)
    last = call(*given, "--out", "fast.onnx", "--input", "1x32x32x1")
    assert last.exit_code == 0, last.stderr
    [image] = onnx.load("fast.onnx").graph.input
    assert image.name == "image"
    assert [entry.dim_value for entry in image.type.tensor_type.shape.dim][1:] == [32, 32, 1]


def test_an_accelerated_file_of_free_sizes_is_exported_as_it_is_advised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    with quiet():
        torch.onnx.export(
            net, (torch.zeros(2, 1, 8, 8),), "net.onnx", dynamo=True, dynamic_shapes=(sizes,), verbose=False
        )
    # as on a machine where it is not faster
    monkeypatch.setattr("quincunx.deployment.verification.Found.ratio", lambda *_: 0.8)
    done = call(
        *("accelerate", "net.onnx", "--data", "digits", "--method", "spatialbottleneck", "--keep-slower"),
        *("--calibration", 60, "--rounds", 3, "--input", "1x1x32x32", "--export", "onnx", "--out", "fast"),
    )
    assert done.exit_code == 1, done.stdout
    advice = re.search(r"quincunx (export .* --force) writes it", " ".join(done.stderr.split()))[1]
    assert advice == "export --model net.onnx --weights fast --input 1x1x32x32 --force"
    done = call(*advice.split(), "--out", "fast.onnx", "--rounds", 3)
    assert done.exit_code == 0, done.stderr
    assert Path("fast.onnx").is_file()


def test_a_file_of_fixed_sizes_says_them_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    qx.export(net, "net.onnx", torch.zeros(1, 1, 8, 8), rounds=0)
    assert document("export", "net.onnx", "--out", "again.onnx", "--rounds", 0)["inputs"] == ["input"]
    qx.export(net, "one.onnx", torch.zeros(1, 1, 8, 8), dynamic_batch=False, rounds=0)
    said = refused("export", "one.onnx", "--out", "again.onnx", "--rounds", 0)
    assert "--fixed-batch fixes the batch to the example's" in said
    made = document("export", "one.onnx", "--out", "again.onnx", "--rounds", 0, "--fixed-batch")
    assert not made["dynamic_batch"]


def test_bad_onnx_files_and_formats_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "missing.onnx: no such file" in refused("accelerate", "missing.onnx", "--data", "digits")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    assert "not an ONNX model" in refused("accelerate", "bad.onnx", "--data", "digits")
    said = refused("accelerate", "bad.onnx", "--data", "digits", "--export", "tflite")
    assert "export='tflite': expected one of onnx" in said
