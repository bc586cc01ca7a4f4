"""Checkpoints as training scripts write them: every usual form is read, and nothing in it is executed."""

import argparse
import collections
import enum
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quincunx as qx
from quincunx.networks.checkpoints import read_weights
from quincunx.networks.weights import fill_parameters, load, read_npz
from quincunx.pickles import Made, read_pickle

NAME, SETTINGS = "cifar-resnet14", {"width": 3}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return qx.networks.build(NAME, num_classes=5, **SETTINGS).eval()


@pytest.fixture
def saved(tmp_path):
    def save(content, zipped=True):
        path = tmp_path / "weights.pt"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return path

    return save


def prefixed(state, *prefixes):
    return {"".join(prefixes) + name: value for name, value in state.items()}


def shifted(state):
    """Other weights of the same names: an average, say."""
    return {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class Phase(enum.Enum):
    WARM = 1


FORMS = {
    "bare": lambda s: s,
    "net": lambda s: {"net": s, "acc": 91.5},
    "network": lambda s: {"network": s, "epoch": 7, "path": "runs/1"},
    "weights": lambda s: {"weights": collections.OrderedDict(s)},
    "params": lambda s: {"params": {k: nn.Parameter(v, v.is_floating_point()) for k, v in s.items()}},
    "a key of one's own": lambda s: {"best_so_far": s, "epoch": 7},
    "twice": lambda s: {"checkpoint": {"model_state_dict": s, "step": np.int64(3)}, "epoch": np.float32(2)},
    "three times": lambda s: {"run": {"model": {"state_dict": prefixed(s, "module.")}}},
    "an average alone": lambda s: {"model": None, "ema": {"shadow": s}},
    "an average before": lambda s: {"model_ema": shifted(s), "model": s},
    "an average of another key": lambda s: {
        "state_dict_ema": shifted(s),
        "state_dict": prefixed(s, "module."),
    },
    "an average under a usual key": lambda s: {"ema": {"state_dict": shifted(s)}, "trained": s},
    "beside an optimiser": lambda s: {
        "model": s,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]},
        "optimizer_names": {"exp_avg": torch.ones(3)},
        "scheduler": {"last": torch.ones(2)},
        "best": torch.tensor(0.5),
    },
    "beside anything": lambda s: {
        "state_dict": s,
        "args": argparse.Namespace(lr=0.1, nested={"a": (1, 2)}),
        "phase": Phase.WARM,
        "rates": np.arange(3.0),
        "count": collections.Counter("aab"),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "rng": torch.get_rng_state(),
    },
    "other entries among the weights": lambda s: {**s, "epoch": 3, "config": {"depth": 8}},
    "two networks": lambda s: {"discriminator": {"0.weight": torch.ones(2, 2)}, "generator": s},
    "of training loops": lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": {"width": 4}},
    "all wrappers": lambda s: prefixed(s, "_orig_mod.", "module.", "model."),
    "wrappers the other way": lambda s: {"net": prefixed(s, "model.", "_orig_mod.", "module.", "module.")},
    "a part compiled": lambda s: {k.replace("layer2.", "layer2._orig_mod."): v for k, v in s.items()},
    "a part in parallel": lambda s: {k.replace("layer1.", "layer1.module."): v for k, v in s.items()},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_every_usual_form_is_read(network, saved, form, zipped):
    again = load(NAME, saved(form(network.state_dict()), zipped), **SETTINGS)
    assert same(again.state_dict(), network.state_dict())


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_pickles_of_every_protocol(network, tmp_path, protocol):
    content = {"model": collections.OrderedDict(network.state_dict()), "args": argparse.Namespace(a=1)}
    torch.save(content, tmp_path / "w.pth", pickle_protocol=protocol)
    assert same(read_weights(tmp_path / "w.pth"), network.state_dict())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_tensors_of_every_kind_and_layout(saved, zipped):
    kinds = [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.int64,
        torch.bool,
        torch.complex64,
    ]
    state = {f"{kind}": torch.ones(3, 2).to(kind) for kind in (*kinds, torch.uint16, torch.float8_e5m2)}
    whole = torch.arange(24.0).view(4, 6)
    state |= {"view": whole[1:3, ::2], "turned": whole.t(), "scalar": torch.tensor(2.0), "none": whole[:0]}
    state |= {"repeated": torch.arange(3.0).expand(4, 3), "tied": whole}
    found = read_weights(saved({"state_dict": state}, zipped))
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].to(torch.complex64), value.to(torch.complex64))
    # of one block there is one copy
    assert found["turned"].untyped_storage().data_ptr() == found["tied"].untyped_storage().data_ptr()


def test_of_two_sets_the_plain_one_is_taken_and_that_is_said(network, saved, caplog):
    state = network.state_dict()
    path = saved({"ema": {"module": shifted(state)}, "model": state})
    for known in ((), list(state)):
        caplog.clear()
        assert same(read_weights(path, known=known), state)
        assert f"{path}: holds the weights 'model', which are used, and 'ema.module'" in caplog.text
    caplog.clear()
    assert same(read_weights(path, key="ema.module"), shifted(state))
    assert same(load(NAME, path, key="ema.module", **SETTINGS).state_dict(), shifted(state))
    assert not caplog.text
    with pytest.raises(ValueError, match=r"key='emma': expected one of 'model', 'ema.module'"):
        read_weights(path, key="emma")


def test_two_networks_are_told_apart_by_names_or_refused(network, saved, caplog):
    state = network.state_dict()
    other = {f"other.{name}": value for name, value in state.items()}
    path = saved({"student": other, "teacher": state})
    assert same(read_weights(path, known=list(state)), state)
    assert not caplog.text
    with pytest.raises(ValueError, match=r"several state dicts \('student', 'teacher'\); key= says which"):
        read_weights(path)


def test_names_of_the_network_win_over_wrappers(saved):
    """A network that has parts of such names gets them."""
    net = nn.ModuleDict({"model": nn.Linear(2, 2), "head": nn.ModuleDict({"module": nn.Linear(2, 1)})})
    state = net.state_dict()
    for form in (state, prefixed(state, "module."), prefixed(state, "_orig_mod.", "model.")):
        fill_parameters(net, read_weights(saved(form), known=list(state)), "w")
    # two names that would become one are left as they are, and so named
    both = {**prefixed(state, "module."), **prefixed(state, "model.module.")}
    assert read_weights(saved(both), known=list(state)).keys() & both.keys()


REFUSED = {
    "a whole network": (
        lambda n: n,
        r"a whole network \(.*CifarResNet\) was pickled.*network\.state_dict\(\)",
    ),
    "under a key": (lambda n: {"epoch": 2, "ema": n}, r"a whole network \(.*CifarResNet\) was pickled"),
    "in parallel": (nn.DataParallel, r"a whole network \(torch.*DataParallel\) was pickled"),
    "no weights": (
        lambda n: {"epoch": 2, "loss": 0.5},
        r"but a dictionary of 'epoch' \(int\), 'loss' \(float\)",
    ),
    "many entries": (lambda n: {f"k{i}": i for i in range(30)}, r"'k9' \(int\) and 20 more"),
    "a list": (lambda n: [n.state_dict()], "but one list"),
    "a tensor": (lambda n: torch.ones(3), "but one tensor"),
    "arguments": (lambda n: argparse.Namespace(a=1), "but one pickled argparse.Namespace"),
    "an optimiser": (
        lambda n: {"optimizer": torch.optim.SGD(n.parameters(), lr=1).state_dict()},
        r"but a dictionary of 'optimizer' \(dictionary of 2\)",
    ),
}


@pytest.mark.parametrize(("form", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_what_is_refused_says_what_it_holds(network, saved, form, message, zipped):
    path = saved(form(network), zipped)
    with pytest.raises(ValueError, match=rf"^{path}: no checkpoint of tensors .*{message}") as caught:
        load(NAME, path, **SETTINGS)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_name_the_file(network, saved):
    path = saved({"state_dict": network.state_dict(), "epoch": 3})
    with pytest.raises(ValueError, match=rf"{path}: does not fit cifar-resnet20: missing layer1.2"):
        load("cifar-resnet20", path, **SETTINGS)


def test_a_compiled_program_is_no_checkpoint(tmp_path):
    path = archive(tmp_path, b"\x80\x02}.", [("code/__torch__.py", b""), ("constants.pkl", b"\x80\x02).")])
    with pytest.raises(ValueError, match=r"made\.pth: .*TorchScript.*torch\.jit\.load"):
        read_weights(path)


def test_a_safetensors_file_of_another_name(network, tmp_path):
    save_file(prefixed(network.state_dict(), "model.", "_orig_mod."), tmp_path / "pytorch.bin")
    assert same(load(NAME, tmp_path / "pytorch.bin", **SETTINGS).state_dict(), network.state_dict())


# ---------------------------------------------------------------- what files claim


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_nothing_beside_the_weights_is_executed(network, saved, tmp_path, zipped):
    path = saved({"model": network.state_dict(), "harm": [Harm(tmp_path / "harm")]}, zipped)
    assert same(read_weights(path), network.state_dict())
    assert not (tmp_path / "harm").exists()


def archive(tmp_path, program, members=()):
    path = tmp_path / "made.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("made/data.pkl", program)
        for name, content in members:
            file.writestr(f"made/{name}", content)
    return path


PROGRAMS = {
    "a long text": b"\x8d" + (1 << 50).to_bytes(8, "little") + b"ab.",
    "many bytes": b"\x8e" + (1 << 42).to_bytes(8, "little") + b"ab.",
    "a long number": b"\x8b" + (1 << 30).to_bytes(4, "little") + b"ab.",
    "a far place in the memo": b"}r\xff\xff\xff\xff.",
    "a key that takes for ever to hash": b"})" + b"2\x86" * 80 + b"Ns.",
    "a call that allocates": b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "lists in lists": b"]" * 9_000 + b"a" * 8_999 + b".",
    "a call of a text": b"X\x01\0\0\0a)R.",
    "attributes of a list": b"]}b.",
    "no end": b"]",
    "nothing to take": b"a.",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_pickles_that_claim_or_ask_too_much(tmp_path, program):
    path = archive(tmp_path, b"\x80\x02" + program)
    with pytest.raises(ValueError, match=rf"^{path}: no checkpoint of tensors"):
        read_weights(path)


def test_a_pickle_does_no_more_work_than_its_length_allows():
    pairs = b"(" + b"(X\x01\x00\x00\x00aK\x01l" * 2000 + b"lq\x01"
    program = (
        b"\x80\x02ccollections\nOrderedDict\nq\x00" + pairs + b"0" + b"h\x00h\x01\x85R0" * 20_000 + b"N."
    )
    makers = {("collections", "OrderedDict"): lambda pairs: dict(pairs)}
    with pytest.raises(ValueError, match="makes more than a file of its length holds"):
        read_pickle(program, len(program), makers=makers)


def test_unknown_names_are_kept_as_names():
    content = pickle.dumps({"a": argparse.Namespace(b=[1]), "c": Phase.WARM})
    found = read_pickle(content, len(content), makers={})
    assert isinstance(found["a"], Made)
    assert repr(found["a"]) == "argparse.Namespace"
    assert found["a"].state == {"b": [1]}


@pytest.mark.parametrize("count", [10**6, 10**12])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_one_number_does_not_stand_for_many(network, saved, count, zipped):
    """A bias of 10^12 classes takes four bytes in such a file, and the network would be built for it."""
    state = network.state_dict()
    state["linear.weight"] = torch.zeros(1).expand(count, state["linear.weight"].shape[1])
    state["linear.bias"] = torch.zeros(1).expand(count)
    with pytest.raises(ValueError, match=r"a tensor of \(\d+, 12\) that claims more than its 4 stored bytes"):
        load(NAME, saved(state, zipped), **SETTINGS)


def tensor_program(size, stride, count, offset=0):
    def number(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(count) + b"tQ"
    tail = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + storage + tail + b"tRs."


CLAIMS = {
    "more than its block": ((4, 1, 3), "reaches beyond its 3 stored numbers"),
    "from behind its block": ((2, 1, 3, 2), "reaches beyond"),
    "a block longer than its file": ((4, 1, 1000), "has 12 bytes, of which 4,000 are asked for"),
    "no size": ((-1, 1, 3), "whose size is no number"),
    "a stride backwards": ((2, -1, 3), "whose size is no number"),
}


@pytest.mark.parametrize(("claim", "message"), CLAIMS.values(), ids=CLAIMS)
def test_tensors_lie_in_what_is_stored(tmp_path, claim, message):
    path = archive(tmp_path, tensor_program(*claim), [("data/0", bytes(12))])
    with pytest.raises(ValueError, match=message):
        read_weights(path)
    good = archive(tmp_path, tensor_program(2, 2, 3), [("data/0", np.arange(3, dtype=np.float32).tobytes())])
    assert read_weights(good)["a"].tolist() == [0, 2]


def test_damaged_numbers_are_noticed(network, saved):
    path = saved(network.state_dict())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        member = max(
            file.infolist(), key=lambda member: member.file_size if "/data/" in member.filename else 0
        )
    content[member.header_offset + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: no checkpoint of tensors \(Bad CRC"):
        read_weights(path)


NPY_HEADS = {
    "large": "{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000,), }",
    "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }",
    "long texts": "{'descr': '<U300000000', 'fortran_order': False, 'shape': (1,), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "a program": "__import__('os').mkdir('harm')",
    "brackets": "(" * 5000,
}


@pytest.mark.parametrize("head", NPY_HEADS.values(), ids=NPY_HEADS)
def test_arrays_that_claim_too_much(tmp_path, head):
    path = tmp_path / "made.npz"
    with zipfile.ZipFile(path, "w") as file:
        text = head.encode() + b"\n"
        file.writestr("conv/weight.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + bytes(4))
    with pytest.raises(
        ValueError, match=rf"^{path}: no readable .npz file of layers \('conv/weight': "
    ) as caught:
        read_npz(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["overlapping", "lying"])
def test_members_of_archives_that_are_not_what_they_say(tmp_path, kind):
    """Many entries for the same bytes, or one that unpacks to more than it says."""
    array = io.BytesIO()
    np.save(array, np.zeros(300_000, dtype=np.int8))
    path = tmp_path / "made.npz"
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_STORED if kind == "overlapping" else zipfile.ZIP_DEFLATED
    ) as file:
        file.writestr("conv/weight.npy", array.getvalue())
        if kind == "overlapping":
            (member,) = file.infolist()
            file.filelist += [member] * 20
    content = path.read_bytes()
    if kind == "lying":
        path.write_bytes(content.replace(struct.pack("<I", len(array.getvalue())), struct.pack("<I", 200)))
    with pytest.raises(ValueError, match=rf"^{path}: .*(overlap|Bad CRC|claims)"):
        read_npz(path)


@pytest.mark.parametrize("length", [1 << 62, 99 << 20, 40])
def test_heads_of_safetensors_files_are_no_longer_than_the_file(tmp_path, length):
    path = tmp_path / "made.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(20))
    with pytest.raises(ValueError, match=rf"^{path}: no checkpoint .*its head: claims {length:,} bytes"):
        read_weights(path)
