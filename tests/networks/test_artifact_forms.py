"""What an artifact holds: wrapped networks without their wrappers, and every type of numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import quincunx as qx


def own():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Hardswish())
    return nn.Sequential(body, nn.Conv2d(5, 3, 1)).eval()


def in_parts(wrap):
    def build(network):
        network[0] = wrap(network[0])
        return network

    return build


WRAPS = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "both": lambda network: torch.compile(nn.DataParallel(network)),
    "averaged": AveragedModel,
    "compiled-part": in_parts(torch.compile),
    "parallel-part": in_parts(nn.DataParallel),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
@pytest.mark.parametrize("replaced", [False, True], ids=["plain", "replaced"])
def test_a_wrapped_network_is_written_without_its_wrappers(tmp_path, wrap, replaced):
    network = own()
    if replaced:
        network = qx.accelerate(network, qx.LowRank(2, data=False)).model
    x = torch.randn(2, 2, 7, 7)
    want = network(x)
    folder = qx.save(wrap(copy.deepcopy(network)), tmp_path / "m", factory="mynets:own")
    torch.testing.assert_close(qx.load(folder, factory=own)(x), want)


def test_a_wrapped_network_keeps_its_spec(tmp_path):
    network = qx.networks.build("rsbn8", width=2).eval()
    folder = qx.save(nn.DataParallel(network), tmp_path / "m")
    for name, value in qx.load(folder).state_dict().items():
        assert torch.equal(value, network.state_dict()[name])


class Versioned(nn.Sequential):
    """As torchvision's MNASNet: weights that no version is noted of are refused."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") not in (1, 2):
            raise ValueError(f"version should be set to 1 or 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def versioned():
    return nn.Sequential(Versioned(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU()), nn.BatchNorm2d(5)).eval()


@pytest.mark.parametrize("replaced", [False, True], ids=["plain", "replaced"])
def test_a_network_that_asks_for_its_version_is_given_it(tmp_path, replaced):
    network, x = versioned(), torch.randn(2, 2, 7, 7)
    if replaced:
        network = qx.accelerate(network, qx.LowRank(2, data=False)).model
    folder = qx.save(network, tmp_path / "m", factory="mynets:versioned")
    assert torch.equal(qx.load(folder, factory=versioned)(x), network(x))


NUMBERS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


class Holds(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value)
        self.weight = nn.Parameter(value.clone(), requires_grad=False)


def bits(value):
    return value.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_every_type_of_numbers_comes_back_to_the_bit(tmp_path, dtype):
    value = torch.randint(0, 2, (3, 8), dtype=torch.uint8)
    value = value.bool() if dtype == torch.bool else value.repeat(1, 8).view(dtype)
    folder = qx.save(Holds(value), tmp_path / "m", factory="mynets:holds")
    # the function makes float32, as functions do; the artifact says what the network had
    found = qx.load(folder, factory=lambda: Holds(torch.zeros(value.shape)))
    assert found.value.dtype == found.weight.dtype == dtype
    assert torch.equal(bits(found.value), bits(value))
    assert torch.equal(bits(found.weight), bits(value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_converted_network_stays_converted(tmp_path, dtype):
    network = qx.networks.build("rrn8", width=2).eval().to(dtype)
    loaded = qx.load(qx.save(network, tmp_path / "m"))
    for (name, one), other in zip(network.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other)


REFUSED = {
    "complex128": (torch.zeros(2, dtype=torch.complex128), r"a tensor of torch\.complex128 under 'value'"),
    "sparse": (torch.eye(3).to_sparse(), r"a tensor of layout torch\.sparse_coo"),
    "meta": (torch.zeros(2, device="meta"), "a tensor without values"),
}


@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_format_has_no_form_for_is_refused_before_anything_is_written(tmp_path, value, message):
    network = nn.Module()
    network.register_buffer("value", value)
    with pytest.raises(ValueError, match=f"model: its state has .*{message}"):
        qx.save(network, tmp_path / "m", factory="mynets:make")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="size is not known before the first call under 'weight'"):
        qx.save(nn.LazyConv2d(3, 1), tmp_path / "m", factory="mynets:make")


def test_shared_strided_and_permuted_tensors_come_back(tmp_path):
    def make():
        network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(3, 6, bias=False))
        network[1].weight = network[0].weight
        return network

    network = make().to(memory_format=torch.channels_last)
    large = torch.arange(40.0)
    network[2].weight = nn.Parameter(large[2:38:2].view(3, 6).t())
    loaded = qx.load(qx.save(network, tmp_path / "m", factory="mynets:make"), factory=make)
    assert loaded[0].weight is loaded[1].weight
    for name, value in network.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert (tmp_path / "m" / "weights.safetensors").stat().st_size < 2000
