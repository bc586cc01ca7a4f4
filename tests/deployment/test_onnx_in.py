"""qx.from_onnx: networks of files as ONNX Runtime reads them, what cannot be read, and the way back."""

import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import quincunx as qx
from quincunx.deployment import onnx_in
from quincunx.deployment.onnx_in import OnnxNetwork
from quincunx.layers.tracing import trace
from quincunx.measure.engines import quiet
from quincunx.networks.spec import lines_to_load


def write(model, path, x, opset=18, free=True, names=("image", "scores")):
    """A file as PyTorch's exporter writes it."""
    batch = torch.export.Dim("batch", min=1)
    with quiet(), torch.no_grad():
        torch.onnx.export(
            model.eval(),
            (x,),
            str(path),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_shapes=({0: batch},) if free else None,
            external_data=False,
        )


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    model = qx.networks.build("cifar-resnet8", width=8).eval()
    path = tmp_path_factory.mktemp("files") / "resnet.onnx"
    write(model, path, torch.randn(2, 3, 16, 16))
    return model, path


def graph(nodes, path, weights=(), opset=13, shape=("n", 3, 8, 8), domain=None):
    """A file of nodes that lead from "x" to "y"."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)]
    made = helper.make_graph(nodes, "net", inputs, outputs, list(weights))
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=9), str(path))


@pytest.mark.parametrize("opset", [18, 20])
def test_networks_of_the_exporter(tmp_path, opset):
    torch.manual_seed(0)
    for name, size in (("cifar-resnet8", 16), ("squeezenet1_1", 64)):
        model = qx.networks.build(name).eval()
        x = torch.randn(2, 3, size, size)
        write(model, tmp_path / "net.onnx", x, opset)
        read = qx.from_onnx(tmp_path / "net.onnx")
        assert not read.training
        for batch in (1, 3):
            other = torch.randn(batch, 3, size, size)
            with torch.no_grad():
                torch.testing.assert_close(read(other), model(other), rtol=1e-4, atol=1e-4)


def test_layers_are_those_of_torch_and_can_be_accelerated(resnet):
    model, path = resnet
    read = qx.from_onnx(path)
    kinds = [type(module) for module in read.modules()]
    assert kinds.count(nn.Conv2d) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert all(p.requires_grad for p in read.parameters())
    x = torch.randn(2, 3, 16, 16)
    result = qx.accelerate(read, qx.SpatialBottleneck(), example_input=x)
    assert len(result.replaced) == 5
    fused = qx.fuse(result.model, check=x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), result.model(x), rtol=1e-4, atol=1e-4)


def test_from_a_file_to_a_faster_file_with_the_same_names(resnet, tmp_path):
    _, path = resnet
    read = qx.from_onnx(path)
    x = torch.randn(1, 3, 16, 16)
    result = qx.accelerate(read, qx.SpatialBottleneck(), example_input=x)
    for plugin in (False, True):
        made = qx.export(result.model, tmp_path / "fast.onnx", x, plugin=plugin, baseline=read, force=True)
        assert (made.inputs, made.outputs) == (("image",), ("scores",))
        assert max(made.difference.values()) < 1e-4
    again = qx.export(result.model, tmp_path / "plain.onnx", x, rounds=0)
    assert again.inputs == ("image",)
    second = qx.from_onnx(tmp_path / "plain.onnx")
    with torch.no_grad():
        torch.testing.assert_close(second(x), result.model(x), rtol=1e-4, atol=1e-4)


def test_an_artifact_of_it_is_loaded_with_the_file(resnet, tmp_path):
    _, path = resnet
    x = torch.randn(2, 3, 16, 16)
    model = qx.accelerate(qx.from_onnx(path), qx.SpatialBottleneck(), example_input=x).model
    qx.save(model, tmp_path / "fast")
    with pytest.raises(ValueError, match=r'factory=lambda: qx\.from_onnx\("resnet\.onnx"\)'):
        qx.load(tmp_path / "fast")
    again = qx.load(tmp_path / "fast", factory=lambda: qx.from_onnx(path))
    with torch.no_grad():
        torch.testing.assert_close(again(x), model.eval()(x))
    qx.save(again, tmp_path / "again")
    assert qx.networks.artifact.read_spec_entry(tmp_path / "again")["model"]["onnx"].value == "resnet.onnx"


def test_several_inputs_and_outputs(tmp_path):
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype("f4"), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Conv", ["z", "w"], ["b"], name="second", pads=[1] * 4),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
        helper.make_node("GlobalAveragePool", ["y"], ["mean"], name="pool"),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3, 8, 8]) for n in ("x", "z")]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n in ("y", "mean")]
    made = helper.make_graph(nodes, "net", inputs, outputs, [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "two.onnx"))
    read = qx.from_onnx(tmp_path / "two.onnx")
    assert read.onnx_names == {"inputs": ["x", "z"], "outputs": ["y", "mean"]}
    y, mean = read(torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8))
    assert (y.shape, mean.shape) == ((1, 4, 8, 8), (1, 4, 1, 1))
    made = qx.export(read, tmp_path / "again.onnx", torch.randn(2, 1, 3, 8, 8).unbind(), rounds=0)
    assert (made.inputs, made.outputs) == (("x", "z"), ("y", "mean"))


# ---------------------------------------------------------------- what is refused


def test_operators_that_cannot_be_read_are_named_with_their_nodes(tmp_path):
    path = tmp_path / "net.onnx"
    graph([helper.make_node("Hardmax", ["x"], ["y"], name="choose")], path)
    with pytest.raises(
        ValueError, match=r"operators that cannot be read: Hardmax \(opset 13\) in node 'choose'"
    ):
        qx.from_onnx(path)
    graph(
        [helper.make_node("Program", ["x"], ["y"], name="ours", domain="quincunx")], path, domain="quincunx"
    )
    with pytest.raises(ValueError, match=r"quincunx::Program \(opset 1\) in node 'ours'"):
        qx.from_onnx(path)
    sides = numpy_helper.from_array(np.array([1, 1]), "sides")
    node = helper.make_node("CenterCropPad", ["x", "sides"], ["y"], name="sides_of_two_axes", axes=[2, 3])
    graph([node], path, [sides], opset=18)
    with pytest.raises(ValueError, match=r"CenterCropPad \(opset 18\) in node 'sides_of_two_axes'"):
        qx.from_onnx(path)


def test_weights_outside_the_file(resnet, tmp_path):
    proto = onnx.load(str(resnet[1]))
    path = tmp_path / "net.onnx"
    onnx.save(proto, str(path), save_as_external_data=True, location="net.data", size_threshold=100)
    assert isinstance(qx.from_onnx(path), OnnxNetwork)
    data = tmp_path / "net.data"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"'net\.data' is shorter than weight '.*' needs"):
        qx.from_onnx(path)
    data.unlink()
    with pytest.raises(FileNotFoundError, match=r"weight '.*' is in 'net\.data', which is not beside it"):
        qx.from_onnx(path)
    outside = onnx.load(str(path), load_external_data=False)
    for tensor in outside.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../net.data"
    path.write_bytes(outside.SerializeToString())
    with pytest.raises(ValueError, match="lies outside the file's folder"):
        qx.from_onnx(path)


def test_files_that_are_no_model(tmp_path, resnet):
    path = tmp_path / "net.onnx"
    with pytest.raises(FileNotFoundError, match=r"net\.onnx: no such file"):
        qx.from_onnx(path)
    content = resnet[1].read_bytes()
    for damaged in (b"", b"no model at all", content[:1000]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"net\.onnx: not an? (valid )?ONNX model"):
            qx.from_onnx(path)


def test_free_sizes_need_an_example(tmp_path):
    path = tmp_path / "net.onnx"
    graph([helper.make_node("Relu", ["x"], ["y"], name="r")], path, shape=("n", 3, "h", "w"))
    with pytest.raises(ValueError, match=r"input 'x' of .* leaves size 2 free \(h\); give an example"):
        qx.from_onnx(path)
    read = qx.from_onnx(path, torch.randn(1, 3, 5, 6))
    assert read(-torch.ones(2, 3, 4, 4)).abs().max() == 0
    with pytest.raises(ValueError, match="example_input: expected 1 tensors"):
        qx.from_onnx(path, (torch.zeros(1), torch.zeros(1)))


def test_an_answer_other_than_onnx_runtimes_is_refused(resnet, monkeypatch):
    convert = onnx_in._convert

    def wrong(path, proto):
        network = convert(path, proto)
        with torch.no_grad():
            next(network.parameters()).mul_(1.1)
        return network

    monkeypatch.setattr(onnx_in, "_convert", wrong)
    with pytest.raises(ValueError, match="answers otherwise than ONNX Runtime, by"):
        qx.from_onnx(resnet[1])


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        (("onnx2torch",), "needs onnx2torch, not installed here; pip install --no-deps onnx2torch"),
        (
            ("onnx", "onnx2torch"),
            "needs onnx, onnx2torch, not installed here; pip install 'quincunx[onnx]' and pip install "
            "--no-deps onnx2torch",
        ),
    ],
)
def test_missing_packages_are_named_with_commands_that_leave_torch_alone(resnet, monkeypatch, absent, said):
    monkeypatch.setattr(onnx_in, "find_spec", lambda name: None if name in absent else name)
    with pytest.raises(ValueError, match=re.escape(said) + "$"):
        qx.from_onnx(resnet[1])


class Halves(nn.Module):
    """Loops over pieces, as blocks of Res2Net do."""

    def __init__(self, channels, pieces):
        super().__init__()
        self.pieces = pieces
        self.convs = nn.ModuleList(
            nn.Conv2d(part.shape[1], 4, 3, padding=1)
            for part in torch.zeros(1, channels, 1, 1).chunk(pieces, 1)
        )

    def forward(self, x):
        parts = x.chunk(self.pieces, 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1).mean((2, 3))


@pytest.mark.parametrize(("channels", "pieces"), [(8, 4), (8, 3)])
def test_pieces_of_a_map_are_read_and_looked_into(tmp_path, channels, pieces):
    torch.manual_seed(0)
    net, x = Halves(channels, pieces).eval(), torch.randn(2, channels, 8, 8)
    write(net, tmp_path / "net.onnx", x, 20)
    read = qx.from_onnx(tmp_path / "net.onnx")
    torch.testing.assert_close(read(x), net(x), rtol=1e-4, atol=1e-5)
    assert not trace(read).whole
    made = qx.accelerate(read, qx.SpatialBottleneck(data=False), example_input=x)
    assert len(made.replaced) == pieces


def test_a_split_of_an_axis_of_unknown_length_is_refused(tmp_path):
    node = helper.make_node("Split", ["x"], ["a", "b"], name="apart", axis=0, num_outputs=2)
    join = helper.make_node("Concat", ["b", "a"], ["y"], axis=0)
    graph([node, join], tmp_path / "net.onnx", opset=18)
    with pytest.raises(ValueError, match=r"Split \(opset 18\) in node 'apart'"):
        qx.from_onnx(tmp_path / "net.onnx")


def constant(name, values, kind=np.float32):
    return numpy_helper.from_array(np.array(values, kind), name)


@pytest.mark.parametrize("kind", ["zeros", "ones", "one position", "random"])
def test_an_example_that_shows_little_lets_nothing_wrong_through(tmp_path, kind):
    path = tmp_path / "net.onnx"
    # as the converter reads it, positions are scaled in another way
    resize = helper.make_node(
        "Resize", ["x", "", "s"], ["y"], name="r", mode="linear", coordinate_transformation_mode="asymmetric"
    )
    graph([resize], path, [constant("s", [1, 1, 2, 2])], shape=("n", 3, "h", "w"))
    example = {
        "zeros": torch.zeros(1, 3, 8, 8),
        "ones": torch.ones(1, 3, 8, 8),
        "one position": torch.randn(1, 3, 1, 1),
        "random": torch.randn(1, 3, 8, 8),
    }[kind]
    with pytest.raises(ValueError, match=r"answers otherwise than ONNX Runtime, by .* \(for an input of "):
        qx.from_onnx(path, example)


def test_sizes_that_a_file_is_not_for_are_no_hindrance(tmp_path):
    path = tmp_path / "net.onnx"
    # of 8 x 8 maps alone
    flat = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    graph(flat, path, [constant("w", np.ones((192, 2)))], shape=("n", 3, "h", "w"))
    read = qx.from_onnx(path, torch.randn(1, 3, 8, 8, requires_grad=True))
    assert read(torch.ones(2, 3, 8, 8)).tolist() == [[192, 192]] * 2


def test_values_that_are_not_finite_in_both_agree(tmp_path):
    path = tmp_path / "net.onnx"
    mask = np.zeros((1, 1, 8, 8), np.float32)
    mask[..., 5:] = -np.inf
    nodes = [helper.make_node("Log", ["x"], ["l"]), helper.make_node("Add", ["l", "m"], ["y"])]
    graph(nodes, path, [constant("m", mask)])
    found = qx.from_onnx(path)(torch.full((1, 3, 8, 8), -1.0))
    assert found[..., :5].isnan().all()


NEWER = {
    "no lower bound": (13, [("Clip", ["x", "", "c"], {})], [constant("c", 0.5)]),
    "slice of opset 9": (9, [("Slice", ["x"], {"axes": [2], "starts": [1], "ends": [7]})], []),
    "upsample of opset 9": (
        9,
        [("Upsample", ["x", "s"], {"mode": "nearest"})],
        [constant("s", [1, 1, 2, 2])],
    ),
    "resize of opset 18": (
        18,
        [("Resize", ["x", "", "s"], {"mode": "linear", "antialias": 0})],
        [constant("s", [1, 1, 2, 2])],
    ),
    "gelu of opset 20": (20, [("Gelu", ["x"], {})], []),
    "gelu twice": (20, [("Gelu", ["x"], {}), ("Gelu", ["n0"], {})], []),
    "mish of opset 18": (18, [("Mish", ["x"], {})], []),
}


@pytest.mark.parametrize("case", NEWER)
def test_operators_of_other_opsets(tmp_path, case):
    opset, kinds, weights = NEWER[case]
    path, source, nodes = tmp_path / "net.onnx", "x", []
    for number, (kind, inputs, settings) in enumerate(kinds):
        source = "y" if number == len(kinds) - 1 else f"n{number}"
        nodes.append(helper.make_node(kind, inputs, [source], name=f"node{number}", **settings))
    graph(nodes, path, weights, opset=opset)
    # it is compared with ONNX Runtime
    assert qx.from_onnx(path)(torch.randn(2, 3, 8, 8)).shape[:2] == (2, 3)


def random(name, *shape):
    return constant(name, np.random.default_rng(0).normal(size=shape) / 3)


def whole(name, *values):
    return constant(name, values, np.int64)


POOL, TWICE = {"kernel_shape": [3, 3]}, {"strides": [2, 2]}
UPPER, LOWER = {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}
KERNEL, UP = random("w", 3, 3, 3, 3), random("w", 3, 2, 4, 3)
WITHOUT_CONVERTER = {
    "tanh gelu": (20, "Gelu", {"approximate": "tanh"}, []),
    "swish": (24, "Swish", {}, []),
    "swish of another slope": (24, "Swish", {"alpha": 2.0}, []),
    "group norm": (21, "GroupNormalization", {"num_groups": 3}, [random("s", 3), random("b", 3)]),
    "rms norm": (23, "RMSNormalization", {"axis": -1}, [random("s", 12)]),
    "length": (13, "LpNormalization", {"axis": 1}, []),
    "threshold": (10, "ThresholdedRelu", {"alpha": 0.4}, []),
    "hard shrink": (9, "Shrink", {"lambd": 0.4}, []),
    "soft shrink": (17, "Shrink", {"lambd": 0.4, "bias": 0.4}, []),
    "squares": (13, "SpaceToDepth", {"blocksize": 2}, []),
    "greatest": (11, "GlobalMaxPool", {}, []),
    "grid": (16, "GridSample", {"align_corners": 1}, [random("g", 2, 5, 6, 2)]),
    "cubic grid": (20, "GridSample", {"mode": "cubic", "padding_mode": "border"}, [random("g", 2, 5, 6, 2)]),
    "pad of two axes": (18, "Pad", {}, [whole("p", 1, 0, 2, 1), "", whole("a", -1, 2)]),
    "wrapped": (19, "Pad", {"mode": "wrap"}, [whole("p", 0, 0, 1, 2, 0, 0, 2, 0)]),
    "same": (13, "Conv", UPPER, [KERNEL]),
    "same, strided": (13, "Conv", UPPER | TWICE, [KERNEL]),
    "same, from below": (13, "Conv", LOWER | TWICE, [KERNEL]),
    "same, even": (13, "Conv", LOWER, [random("w", 3, 3, 2, 4)]),
    "same, 1 x 1": (13, "Conv", UPPER | TWICE, [random("w", 3, 3, 1, 1)]),
    "greatest, same": (13, "MaxPool", POOL | UPPER | TWICE, []),
    "greatest, even": (13, "MaxPool", LOWER | {"kernel_shape": [2, 2]}, []),
    "mean, same": (13, "AveragePool", POOL | UPPER | TWICE, []),
    "mean, from below": (13, "AveragePool", POOL | LOWER | TWICE, []),
    "mean, unequal": (13, "AveragePool", POOL | TWICE | {"pads": [0, 1, 1, 0]}, []),
    "mean with padding": (13, "AveragePool", POOL | {"pads": [0, 0, 1, 2], "count_include_pad": 1}, []),
    "transposed, same": (13, "ConvTranspose", UPPER | TWICE, [UP]),
    "transposed, from below": (13, "ConvTranspose", LOWER | TWICE, [UP]),
    "transposed, unequal": (13, "ConvTranspose", TWICE | {"pads": [0, 1, 1, 0]}, [UP]),
}  # fmt: skip


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
@pytest.mark.parametrize("case", WITHOUT_CONVERTER)
def test_operators_that_the_converter_does_not_have(tmp_path, case, free):
    opset, kind, settings, weights = WITHOUT_CONVERTER[case]
    path = tmp_path / "net.onnx"
    node = helper.make_node(kind, ["x", *(getattr(one, "name", one) for one in weights)], ["y"], **settings)
    shape = (2, 3, "h", "w") if free else (2, 3, 8, 12)
    graph([node], path, [one for one in weights if one], opset=opset, shape=shape)
    x = torch.randn(2, 3, 8, 12)
    read = qx.from_onnx(path, x)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    others = [torch.randn(2, 3, 10, 12), torch.randn(2, 3, 14, 12)] if free else []
    if free and kind not in ("SpaceToDepth", "RMSNormalization"):
        others.append(torch.randn(2, 3, 7, 15))
    for values in (x, *others):
        (wanted,) = session.run(None, {"x": values.numpy()})
        torch.testing.assert_close(read(values), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)
    # as part of a network it is looked into
    assert qx.cost(read, x).macs >= 0


@pytest.mark.parametrize(
    ("kind", "settings", "weights", "said"),
    [
        ("Shrink", {"lambd": 0.5, "bias": 0.1}, [], "cannot read Shrink in node 'n'.*a bias of 0.1"),
        ("Conv", UPPER | {"strides": [3, 3]}, [random("w", 3, 3, 2, 2)], "cannot read Conv in node 'n'"),
        ("GroupNormalization", {"num_groups": 3}, ["x", "x"], "cannot read GroupNormalization in node 'n'"),
        ("ConvTranspose", TWICE | {"output_shape": [16, 24]}, [UP], "not as ONNX Runtime reads it"),
    ],
)
def test_settings_that_cannot_be_read_are_named(tmp_path, kind, settings, weights, said):
    path = tmp_path / "net.onnx"
    node = helper.make_node(
        kind, ["x", *(getattr(one, "name", one) for one in weights)], ["y"], name="n", **settings
    )
    held = [one for one in weights if not isinstance(one, str)]
    graph([node], path, held, opset=21 if kind == "GroupNormalization" else 13, shape=(2, 3, "h", "w"))
    with pytest.raises(ValueError, match=said):
        qx.from_onnx(path, torch.randn(2, 3, 8, 12))


def test_a_network_with_paddings_of_sizes_goes_the_whole_way(tmp_path):
    path, faster = tmp_path / "net.onnx", tmp_path / "faster.onnx"
    source = np.random.default_rng(0)
    steps = [
        ("Conv", UPPER | TWICE, (16, 3, 3, 3)), ("Conv", UPPER, (16, 16, 3, 3)), ("Gelu", {}, ()),
        ("MaxPool", POOL | LOWER | TWICE, ()), ("Conv", UPPER, (16, 16, 3, 3)),
        ("ConvTranspose", UPPER | TWICE, (16, 16, 3, 3)), ("AveragePool", POOL | UPPER | TWICE, ()),
    ]  # fmt: skip
    nodes, weights = [], []
    for number, (kind, settings, shape) in enumerate(steps):
        if shape:
            weights.append(constant(f"w{number}", source.normal(size=shape) / np.prod(shape[1:]) ** 0.5))
        inputs = [f"v{number}" if number else "x", *([f"w{number}"] if shape else [])]
        output = "y" if number == len(steps) - 1 else f"v{number + 1}"
        nodes.append(helper.make_node(kind, inputs, [output], name=f"node{number}", **settings))
    graph(nodes, path, weights, opset=20, shape=("n", 3, "h", "w"))
    x = torch.randn(2, 3, 32, 36)
    made = qx.accelerate(qx.from_onnx(path, x), qx.SpatialBottleneck(), example_input=x).model
    fast = qx.fuse(made, check=x)
    with torch.no_grad():
        for values in (x, torch.randn(1, 3, 33, 29)):
            torch.testing.assert_close(fast(values), made(values), rtol=1e-4, atol=1e-4)
    qx.export(made, faster, example_input=x, force=True, plugin=False)
    (found,) = onnxruntime.InferenceSession(str(faster)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), made(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"antialias": 1}, {"axes": [2, 3]}])
def test_a_resize_that_only_newer_opsets_have_is_refused(tmp_path, settings):
    path = tmp_path / "net.onnx"
    node = helper.make_node("Resize", ["x", "", "s"], ["y"], name="r", mode="linear", **settings)
    scales = [0.5, 0.5] if "axes" in settings else [1, 1, 0.5, 0.5]
    graph([node], path, [constant("s", scales)], opset=18)
    with pytest.raises(ValueError, match=r"operators that cannot be read: Resize \(opset 18\) in node 'r'"):
        qx.from_onnx(path)


def test_the_standards_domain_has_two_names(tmp_path):
    path = tmp_path / "net.onnx"
    graph([helper.make_node("Relu", ["x"], ["y"])], path)
    proto = onnx.load(str(path))
    proto.opset_import[0].domain = "ai.onnx"
    onnx.save(proto, str(path))
    assert qx.from_onnx(path)(-torch.ones(1, 3, 8, 8)).abs().max() == 0


def test_a_clip_of_other_floats_is_left_as_it_is(tmp_path):
    path = tmp_path / "net.onnx"
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Clip", ["h", "", "c"], ["d"], name="clip"),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
    ]
    graph(nodes, path, [constant("c", 0.5, np.float16)])
    with pytest.raises(ValueError, match="cannot read Clip in node 'clip'"):
        qx.from_onnx(path)


@pytest.fixture
def channels_last(tmp_path):
    """A file as TensorFlow's have it: maps [N, H, W, C] in and out, and a vector beside them."""
    source = np.random.default_rng(0)
    weights = [constant(name, source.normal(size=(8, wide, 3, 3)) / 6) for name, wide in (("u", 3), ("v", 8))]
    nodes = [
        helper.make_node("Transpose", ["image"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "u"], ["a"], name="a", **UPPER),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"], name="c", **UPPER),
        helper.make_node("Transpose", ["c"], ["maps"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMean", ["c"], ["means"], axes=[2, 3], keepdims=0),
    ]
    values = [("image", ["n", 20, 16, 3]), ("maps", ["n", 20, 16, 8]), ("means", ["n", 8])]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in values]
    net = helper.make_graph(nodes, "net", made[:1], made[1:], weights)
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(net, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


def test_a_file_of_maps_with_channels_last_goes_in_and_out(channels_last, tmp_path):
    x = torch.randn(2, 3, 20, 16)
    in_file = x.permute(0, 2, 3, 1).contiguous()
    session = onnxruntime.InferenceSession(str(channels_last))
    maps, means = map(torch.from_numpy, session.run(None, {"image": in_file.numpy()}))
    as_it_is, turned = qx.from_onnx(channels_last), qx.from_onnx(channels_last, nchw=True)
    assert as_it_is.onnx_size == (20, 16, 3)
    assert turned.onnx_size == (3, 20, 16)
    for network, given, wanted in ((as_it_is, in_file, maps), (turned, x, maps.permute(0, 3, 1, 2))):
        found = network(given)
        torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], means, rtol=1e-4, atol=1e-5)
    # it is looked into, accelerated, saved and loaded as others are
    made = qx.accelerate(turned, qx.SpatialBottleneck(), example_input=x)
    assert list(made.replaced) == ["network.a", "network.c"]
    fast = qx.fuse(made.model, check=x)
    with torch.no_grad():
        expected = made.model(x)
        torch.testing.assert_close(fast(x)[0], expected[0], rtol=1e-4, atol=1e-5)
    saved = qx.save(made.model, tmp_path / "model")
    loaded = qx.load(saved, factory=lambda: qx.from_onnx(channels_last, nchw=True))
    with torch.no_grad():
        assert torch.equal(loaded(x)[0], expected[0])
    assert lines_to_load(made.model.quincunx_spec, "model") == [
        'qx.load("model", factory=lambda: qx.from_onnx("net.onnx", nchw=True))'
    ]
    # and written in the layout of the file
    for plugin in (False, True):
        path = tmp_path / f"fast{plugin}.onnx"
        exported = qx.export(made.model, path, x, plugin=plugin, baseline=turned, force=True, rounds=3)
        assert (exported.inputs, exported.outputs) == (("image",), ("maps", "means"))
        shapes = [entry.dim_value for entry in onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim]
        assert shapes[1:] == [20, 16, 3]
    (found, _) = onnxruntime.InferenceSession(str(tmp_path / "fastFalse.onnx")).run(
        None, {"image": in_file.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(found), expected[0].permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    # neither network was changed by that
    assert torch.equal(made.model(x)[0], expected[0])
    assert turned(x)[0].shape == (2, 8, 20, 16)


def test_other_files_have_no_layout_to_turn(tmp_path, channels_last):
    path = tmp_path / "flat.onnx"
    graph([helper.make_node("Relu", ["x"], ["y"])], path, shape=("n", 3))
    with pytest.raises(ValueError, match=r"nchw=True: the inputs of .*flat.onnx are not one of four axes"):
        qx.from_onnx(path, nchw=True)
    with pytest.raises(ValueError, match=r"example_input: expected a tensor \[N, C, H, W\]"):
        qx.from_onnx(channels_last, torch.randn(3, 20, 16), nchw=True)
    assert onnx_in.has_channels_last(channels_last)
    assert not onnx_in.has_channels_last(path)
    assert not onnx_in.has_channels_last(tmp_path / "nothing.onnx")
    grey = tmp_path / "grey.onnx"
    graph([helper.make_node("Relu", ["x"], ["y"])], grey, shape=("n", 1, "h", 3))
    assert not onnx_in.has_channels_last(grey)
