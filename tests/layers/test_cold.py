"""The first call of all is a compiler's, an export's, or one without values: no table is there yet."""

import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import quincunx as qx
from quincunx.layers.paired import PairedDown2d, PairedUp2d
from quincunx.layers.separable import MaskedConv2d

SAMPLINGS = {
    "cosets": qx.CHESSBOARD,
    "random": qx.Random(0.4, 1),
    "even": qx.Uniform(0.4),
    "eq8": qx.Uniform(0.2, "eq8"),
    "positions": qx.Positions(torch.eye(8, dtype=torch.bool) | torch.eye(8, dtype=torch.bool).flip(0)),
}
LAYERS = {
    "perforated": lambda s: qx.PerforatedConv2d(4, 6, 3, sampling=s, padding=1),
    "bottleneck": lambda s: qx.SpatialBottleneck2d(4, 6, sampling=s),
    # two, which have different tables
    "circular": lambda s: nn.Sequential(
        qx.SpatialBottleneck2d(4, 6, sampling=s, padding_mode="circular"),
        qx.SpatialBottleneck2d(6, 5, 5, sampling=s, padding_mode="circular"),
    ),
    "reflect": lambda s: qx.SpatialBottleneck2d(4, 6, sampling=s, padding_mode="reflect"),
    "resized": lambda s: MaskedConv2d(4, 6, 3, sampling=s, stride=2, padding=1, resize_masks=True),
    "espace": lambda s: qx.EspaceConv2d(
        4, 6, 3, rank=3, masks=(s, s), stride=2, padding=1, resize_masks=True
    ),
}


def forget():
    """Drop every table that a sampling was made into."""
    kept = ("sampling", "plan", "padded", "separable", "steps", "reference")
    modules = [m for name, m in sys.modules.items() if name.startswith("quincunx.") and name.endswith(kept)]
    tables = {
        id(value): value for m in modules for value in vars(m).values() if hasattr(value, "cache_clear")
    }
    assert len(tables) > 10
    for table in tables.values():
        table.cache_clear()


def compiled(module, x):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")(x)


def without_values(module, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = module(mode.from_tensor(x)).shape
    found = module(x)
    assert found.shape == shape
    return found


def on_another_device(module, x):
    torch.set_default_device("meta")
    try:
        return module(x)
    finally:
        torch.set_default_device(None)


def in_inference_mode(module, x):
    with torch.inference_mode():
        module(x)
    found = module(x.clone().requires_grad_())
    found.sum().backward()
    return found.detach()


FIRST = {
    "compiled": compiled,
    "exported": lambda module, x: torch.export.export(module, (x,), strict=False).module()(x),
    "exported, strict": lambda module, x: torch.export.export(module, (x,), strict=True).module()(x),
    "graph": lambda module, x: make_fx(module)(x)(x),
    "without values": without_values,
    "another default device": on_another_device,
    "inference mode": in_inference_mode,
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_table_is_needed_before_a_first_call(sampling, kind):
    module, x = LAYERS[kind](SAMPLINGS[sampling]).eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        wanted = module(x)
    for name, call in FIRST.items():
        forget()
        torch.testing.assert_close(call(module, x), wanted, rtol=0, atol=1e-5, msg=name)
        # what the call left behind serves others
        torch.testing.assert_close(module(x), wanted, rtol=0, atol=1e-5, msg=f"after {name}")


def test_a_pair_without_values_knows_its_grid():
    down = PairedDown2d(3, 4, sampling=qx.CHESSBOARD)
    model = nn.Sequential(down, nn.ReLU(), PairedUp2d(4, 8, sampling=qx.CHESSBOARD, partner="0"))
    model[2].attach(model)
    x = torch.randn(2, 3, 6, 8)
    compiled(model, x)  # from now on the halves do not rely on sizes seen before
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x)).shape == (2, 8, 6, 8)


@pytest.mark.parametrize("make", [LAYERS["bottleneck"], LAYERS["circular"]])
def test_a_map_with_another_number_of_positions_is_refused_while_compiling(make):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            module = make(qx.CHESSBOARD)
            self.block = module[0] if isinstance(module, nn.Sequential) else module

        def forward(self, x):
            return self.block.up(self.block.down(x), (x.shape[2] - 2, x.shape[3]))

    module, x = Wrong(), torch.randn(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"expected \[N, C, m, 1\]"):
        module(x)
    with pytest.raises(Exception, match=r"expected \[N, C, m, 1\]"):
        compiled(module, x)
