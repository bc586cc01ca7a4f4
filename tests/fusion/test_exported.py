"""torch.export of fused networks: any batch, nothing of this machine, a library in place of the package."""

import gc
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx.fusion.serialise import load_program, pieces

BATCH = torch.export.Dim("batch", min=1)


def exported(model, x, strict=False):
    return torch.export.export(qx.fuse(model), (x,), dynamic_shapes=({0: BATCH},), strict=strict)


NETWORKS = {
    "rsbn8": lambda: qx.networks.build("rsbn8", width=8),
    "cifar-resnet8": lambda: qx.networks.build("cifar-resnet8", width=8),
    "perforated": lambda: nn.Sequential(
        qx.PerforatedConv2d(3, 8, 3, sampling=qx.Random(0.5, 1), padding=1),
        nn.Hardswish(),
        nn.Conv2d(8, 4, 3),
        nn.AdaptiveAvgPool2d(1),
    ),
}


# each size with each network, and each way with each network and with each size
@pytest.mark.parametrize(
    ("name", "size", "strict"),
    [
        (name, size, (i + j) % 2 == 0)
        for i, name in enumerate(NETWORKS)
        for j, size in enumerate([(16, 16), (15, 18)])
    ],
)
def test_any_batch(name, size, strict):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    program = exported(model, torch.randn(2, 3, *size), strict)
    names = [str(n.target) for n in program.graph.nodes]
    assert any("run_program_sized" in text for text in names)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_are_not_fused_export_both_ways(name, strict):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    x = torch.randn(2, 3, 15, 18)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},), strict=strict)
    for batch in (1, 7):
        x = torch.randn(batch, 3, 15, 18)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x))


class _Several(nn.Module):
    """Two programs with an operation between them that the kernels do not have; two inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = qx.SpatialBottleneck2d(3, 4), qx.SpatialBottleneck2d(4, 4)
        self.pool, self.last = nn.AvgPool2d(3, 1, 1), qx.SpatialBottleneck2d(4, 2)

    def forward(self, x, y):
        z = self.pool(self.first(x))
        z = self.last(torch.cumsum(self.second(z), 1))
        return z + y, z.mean((2, 3))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_several_programs_inputs_outputs_and_formats(strict, dtype):
    torch.manual_seed(0)
    model = _Several().eval()
    fused = qx.fuse(model, dtype, force=True) if dtype else qx.fuse(model)
    inputs = torch.randn(3, 3, 9, 10), torch.randn(3, 2, 9, 10)
    program = torch.export.export(fused, inputs, dynamic_shapes=({0: BATCH}, {0: BATCH}), strict=strict)
    assert sum("run_program_sized" in str(n.target) for n in program.graph.nodes) >= 2
    for batch in (1, 5):
        inputs = torch.randn(batch, 3, 9, 10), torch.randn(batch, 2, 9, 10)
        with torch.no_grad():
            for found, wanted in zip(program.module()(*inputs), fused(*inputs), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2 if dtype else 1e-4)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_a_copy_is_exported_as_itself(strict):
    """A copy's programs have names of their own; of what was deleted nothing is found under another's."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    fused = qx.fuse(NETWORKS["rsbn8"]().eval())
    copied = pickle.loads(pickle.dumps(fused))
    with torch.no_grad():
        wanted = fused(x)
    assert copied.program0._key != fused.program0._key
    del fused
    gc.collect()
    found = torch.export.export(copied, (x,), strict=strict).module()(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_saved_graph_needs_torch_and_the_library_alone(tmp_path):

    torch.manual_seed(0)
    model = NETWORKS["rsbn8"]().eval()
    torch.export.save(exported(model, torch.randn(2, 3, 12, 12)), tmp_path / "net.pt2")
    x = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        torch.save({"x": x, "y": model(x)}, tmp_path / "data.pt")
    library = find_spec("quincunx._native").origin
    code = f"""
import sys, torch
torch.ops.load_library({library!r})
data = torch.load("data.pt")
y = torch.export.load("net.pt2").module()(data["x"])
print(float((y - data["y"]).abs().max()) < 1e-4, "quincunx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "True False\n", done.stderr


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_another_instruction_set_packs_the_weights_anew(tmp_path, isa):
    """Packed weights in the file would be those of the machine that wrote it."""
    torch.manual_seed(0)
    model = NETWORKS["rsbn8"]().eval()
    x = torch.randn(2, 3, 12, 12)
    torch.export.save(exported(model, x), tmp_path / "net.pt2")
    with torch.no_grad():
        torch.save({"x": x, "y": model(x)}, tmp_path / "data.pt")
    code = """
import torch, quincunx as qx
from quincunx.ops import native
native.load()
data = torch.load("data.pt")
y = torch.export.load("net.pt2").module()(data["x"])
print(native.isa(), float((y - data["y"]).abs().max()) < 1e-4)
"""

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "QUINCUNX_ISA": isa},
    )
    assert done.stdout == f"{isa} True\n", done.stderr


def test_the_graph_does_not_depend_on_what_was_measured_here():
    model = NETWORKS["cifar-resnet8"]().eval()
    x = torch.randn(2, 3, 16, 16)
    graphs = []
    for warm in (False, True):
        fused = qx.fuse(model)
        if warm:
            fused(x)
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: BATCH},), strict=False)
        graphs.append([str(n.target) for n in program.graph.nodes if n.op == "call_function"])
    assert graphs[0] == graphs[1]


def test_a_free_size_is_refused():
    model = NETWORKS["rsbn8"]().eval()
    free = {0: BATCH, 2: torch.export.Dim("height", min=8)}
    with pytest.raises(Exception, match="only the batch may be dynamic"):
        torch.export.export(
            qx.fuse(model), (torch.randn(2, 3, 16, 16),), dynamic_shapes=(free,), strict=False
        )


def test_the_operator_refuses_other_sizes_than_the_graph_says():
    fused = qx.fuse(NETWORKS["rsbn8"]().eval())
    [piece] = pieces(fused.program0, (1, 3, 8, 8))
    load_program(piece.data)
    data = torch.frombuffer(bytearray(piece.data), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="other sizes than the graph says"):
        torch.ops.quincunx_native.run_program_sized([torch.randn(1, 3, 8, 8)], data, [3, 1, 1, 1])
