"""Load trained weights that others published into the networks here.

Nothing in a file is ever executed: names in a torch checkpoint are not imported, arrays are read without
unpickling, and every size that a file claims is checked against the file.

Example:
    >>> import tempfile
    >>> from quincunx import networks
    >>> state = networks.build("cifar-resnet8", num_classes=7, width=4).state_dict()
    >>> path = tempfile.mkdtemp() + "/published.th"
    >>> torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    >>> networks.weights.load("cifar-resnet8", path, width=4).linear.out_features
    7
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quincunx.networks.checkpoints import read_weights
from quincunx.networks.registry import build
from quincunx.reading import ZIP_DAMAGE, naming, read_member

__all__ = ["fill_parameters", "from_caffe", "load", "normalisation", "read_npz"]

Arrays = Mapping[str, Sequence[Any]]

_SHOWN = 10
_INCEPTION = {
    "1x1": "branch1",
    "3x3_reduce": "branch2.0",
    "3x3": "branch2.1",
    "5x5_reduce": "branch3.0",
    "5x5": "branch3.1",
    "pool_proj": "branch4.1",
}


def _googlenet_layers(heads: bool) -> dict[str, str]:
    layers = {"conv1/7x7_s2": "conv1.conv", "conv2/3x3_reduce": "conv2.conv", "conv2/3x3": "conv3.conv"}
    for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        for layer, module in _INCEPTION.items():
            layers[f"inception_{name}/{layer}"] = f"inception{name}.{module}.conv"
    if heads:
        for i in (1, 2):
            layers[f"loss{i}/conv"] = f"aux{i}.conv.conv"
            layers[f"loss{i}/fc"] = f"aux{i}.fc1"
            layers[f"loss{i}/classifier"] = f"aux{i}.fc2"
    return {**layers, "loss3/classifier": "fc"}


def _squeezenet_layers() -> dict[str, str]:
    layers = {"conv1": "features.0"}
    # features 5 and 8 are poolings
    for fire, at in zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True):
        layers[f"fire{fire}/squeeze1x1"] = f"features.{at}.squeeze"
        layers[f"fire{fire}/expand1x1"] = f"features.{at}.expand1x1"
        layers[f"fire{fire}/expand3x3"] = f"features.{at}.expand3x3"
    return {**layers, "conv10": "classifier.1"}


def _caffe_layers(name: str, given: Arrays) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the map from Caffe's layers to our modules, and the settings of that network."""
    if name == "alexnet":
        layers = {f"conv{i}": f"features.conv{i}" for i in range(1, 6)}
        layers |= {f"fc{i}": f"classifier.fc{i}" for i in (6, 7, 8)}
        return layers, {"form": "original"}
    if name == "googlenet":
        heads = any(layer.startswith(("loss1/", "loss2/")) for layer in given)
        return _googlenet_layers(heads), {"form": "original", "aux": heads}
    if name == "squeezenet1_1":
        return _squeezenet_layers(), {}
    raise ValueError(f"name={name!r}: expected 'alexnet', 'googlenet' or 'squeezenet1_1'")


def from_caffe(name: str, arrays: Arrays) -> dict[str, Tensor]:
    """Return a state dict from the weights of the Caffe Model Zoo.

    Caffe's kernels [out, in / groups, height, width] and matrices [out, in] are in our order, and both
    flatten maps by channel, row, column. Its images have their channels as blue, green, red. The first
    convolution's channels are reversed, so that the network takes **red, green, blue**, 0 to 255, less the
    means 123, 117, 104 (SqueezeNet: 123.68, 116.779, 103.939), at 227 x 227 (GoogLeNet: 224 x 224).

    Args:
        name: "alexnet" for bvlc_alexnet, "googlenet" for bvlc_googlenet, "squeezenet1_1" for
            SqueezeNet v1.1.
        arrays: layer name, as in deploy.prototxt, to [weight, bias], numpy arrays of numbers. Blobs with
            leading ones, as in older files, are accepted. GoogLeNet may include its auxiliary heads,
            ``loss1/...`` and ``loss2/...``.

    Returns:
        float32 weights for ``build("alexnet", n, form="original")``,
        ``build("googlenet", n, form="original", aux=...)`` or ``build("squeezenet1_1", n)``, n being the
        outputs of the last layer.

    Raises:
        ValueError: another network, layers that are missing or unexpected, wrong shapes (the message names at
            most ten of each).
        TypeError: ``arrays`` is not a mapping of arrays.

    Example:
        >>> from_caffe("alexnet", {"conv1": [0, 0], "fc9": [0, 0]})
        Traceback (most recent call last):
        ...
        ValueError: alexnet: missing conv2, conv3, conv4, conv5, fc6, fc7, fc8; unexpected fc9
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays: expected a mapping of layer names, got {type(arrays).__name__}")
    layers, settings = _caffe_layers(name, arrays)
    _check_names(name, list(layers), list(arrays))
    state: dict[str, Tensor] = {}
    for layer, module in layers.items():
        blobs = arrays[layer]
        if not isinstance(blobs, Sequence) or len(blobs) != 2:
            raise TypeError(f"arrays[{layer!r}]: expected [weight, bias]")
        for key, blob in zip(("weight", "bias"), blobs, strict=True):
            state[f"{module}.{key}"] = _tensor(f"arrays[{layer!r}]: {key}", blob)
    expected = _shapes(name, _outputs(state, f"{layers[list(layers)[-1]]}.bias"), 3, settings)
    for key, value in state.items():
        extra = value.dim() - len(expected[key])
        if extra > 0 and value.shape[:extra] == (1,) * extra:
            state[key] = value.reshape(value.shape[extra:])
    _check_shapes(name, expected, state)
    first = next(iter(state))
    state[first] = state[first].flip(1).contiguous()
    return state


def _tensor(what: str, blob: object) -> Tensor:
    array = np.asarray(blob)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{what}: expected numbers, got {array.dtype}")
    return torch.from_numpy(np.array(array, dtype=np.float32))


def read_npz(path: str | Path) -> dict[str, list[Any]]:
    """Return layer names to [weight, bias] from a .npz file with keys LAYER/weight and LAYER/bias.

    A weight may also be LAYER/kernel_hwio, whose axes are height, width, in, out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or a layer that lacks one of the two.
    """
    path = Path(path)
    found: dict[str, dict[str, Any]] = {}
    try:
        with naming(path), path.open("rb") as file:
            length = file.seek(0, 2)
            file.seek(0)
            if file.read(6) == b"\x93NUMPY":
                raise ValueError("one array, no archive of arrays")
            archive = zipfile.ZipFile(file)
            left = 2 * length + (1 << 20)
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                layer, _, kind = key.rpartition("/")
                if not layer or kind not in ("weight", "kernel_hwio", "bias"):
                    raise ValueError(
                        f"key {key[:80]!r}, expected LAYER/weight, LAYER/kernel_hwio or LAYER/bias"
                    )
                # members of an honest archive do not overlap
                left -= member.compress_size
                if left < 0:
                    raise ValueError("members that overlap")
                array = _array(read_member(archive, member, length, what=repr(key[:80])), repr(key[:80]))
                if kind == "kernel_hwio":
                    if array.ndim != 4:
                        raise ValueError(f"{key!r} has {array.ndim} axes, expected 4")
                    kind, array = "weight", array.transpose(3, 2, 0, 1)
                found.setdefault(layer, {})[kind] = array
    except (*ZIP_DAMAGE, MemoryError) as error:
        if isinstance(error, OSError):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path}: no readable .npz file of layers ({reason})") from error
    if lone := [layer for layer, blobs in found.items() if len(blobs) < 2]:
        raise ValueError(f"{path}: weight or bias is missing of {_some(lone)}")
    return {layer: [blobs["weight"], blobs["bias"]] for layer, blobs in found.items()}


def _array(content: bytes, what: str) -> NDArray[Any]:
    """Return the array of a .npy file, after checking its size against the file."""
    source = io.BytesIO(content)
    forms = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(source)
        if version not in forms:
            raise ValueError(f"of version {version}")
        shape, by_columns, dtype = forms[version](source)
    # a header is text that numpy reads as a Python literal
    except (ValueError, SyntaxError, TypeError, LookupError, tokenize.TokenError, RecursionError) as error:
        raise ValueError(f"{what}: no array of numpy ({str(error)[:100]})") from error
    if dtype.kind not in "fiub" or dtype.hasobject:
        raise ValueError(f"{what}: an array of {str(dtype)[:40]}, expected numbers")
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise ValueError(f"{what}: an array without a shape")
    rest = content[source.tell() :]
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError(f"{what}: an array of {str(shape)[:80]} in {len(rest):,} bytes")
    values: NDArray[Any] = np.frombuffer(rest, dtype=dtype)
    return values.reshape(shape, order="F" if by_columns else "C")


def load(name: str, path: str | Path, *, key: str | None = None, **settings: Any) -> nn.Module:
    """Return a network with published weights, in evaluation mode.

    Args:
        name: as for :func:`quincunx.networks.build`; the numbers of classes and of input channels come from
            the weights.
        path: a .npz file of Caffe weights (:func:`read_npz`, :func:`from_caffe`), or a state dict with
            our keys (:func:`read_weights`), which equal torchvision's for the networks that it has.
        key: selects one of several state dicts in the file, as for :func:`read_weights`.
        settings: of the network. Caffe weights determine theirs: the original form, and GoogLeNet's heads.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown network or setting; weights that do not fit (missing and unexpected names and
            wrong shapes, at most ten of each).
    """
    if Path(path).suffix == ".npz":
        arrays = read_npz(path)
        state = from_caffe(name, arrays)
        own = _caffe_layers(name, arrays)[1]
        if wrong := [k for k in own if settings.get(k, own[k]) != own[k]]:
            first = wrong[0]
            raise ValueError(
                f"{first}={settings[first]!r}: the weights in {path} have {first}={own[first]!r}"
            )
        settings = {**own, **settings}
    with torch.device("meta"):
        keys = list(build(name, **settings).state_dict())
    if Path(path).suffix != ".npz":
        state = read_weights(path, known=keys, key=key)
    # counters that older checkpoints lack; no result depends on them
    state |= {k: torch.tensor(0) for k in keys if k.endswith("num_batches_tracked") and k not in state}
    what = f"{path}: does not fit {name}"
    _check_names(what, keys, list(state))
    # the first weight reads the image, the last bias is the classifier's
    num_classes, in_channels = _outputs(state, keys[-1]), _inputs(state, keys[0])
    _check_shapes(what, _shapes(name, num_classes, in_channels, settings), state)
    network = build(name, num_classes, in_channels, **settings)
    network.load_state_dict(state)
    return network.eval()


def fill_parameters(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load weights into a network; their names and sizes must match.

    Args:
        model: filled in place; its weights are undefined if this raises. One of several tied weights
            is enough.
        state: name to tensor.
        what: the weights' description, which starts an error message.

    Raises:
        ValueError: missing and unexpected names and wrong shapes, at most ten of each.

    Example:
        >>> fill_parameters(nn.Linear(3, 2), {"weight": torch.zeros(2, 4), "b": torch.zeros(2)}, "my.pt")
        Traceback (most recent call last):
        ...
        ValueError: my.pt: missing bias; unexpected b; wrong shape of weight (2, 4), expected (2, 3)
    """
    expected, state = model.state_dict(), dict(state)
    for name, value in expected.items():
        if name not in state:
            tied = [k for k in state if k in expected and place_of(expected[k]) == place_of(value)]
            state.update({name: state[tied[0]]} if tied else {})
    if state.keys() == expected.keys():
        # some modules refuse weights without a version; these have the current version's names
        state = OrderedDict(state)
        state._metadata = getattr(expected, "_metadata", None)  # type: ignore[attr-defined]
    try:
        # torch itself knows the names in older versions of a module
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        missing, unexpected = _apart(list(expected), list(state))
        wrong = _wrong_shapes({k: tuple(v.shape) for k, v in expected.items() if k in state}, state)
        if not wrong:
            raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error
    else:
        wrong = []
    if parts := [*_differences(missing, unexpected), *([f"wrong shape of {_some(wrong)}"] if wrong else [])]:
        raise ValueError(f"{what}: {'; '.join(parts)}")


def place_of(value: Tensor) -> tuple[object, ...]:
    """Return the place of a tensor's values in memory; tied weights share it."""
    storage = value.untyped_storage()
    return (
        # empty tensors, and those without values, have no address
        storage.data_ptr() or ("none", storage._cdata),
        value.storage_offset(),
        value.shape,
        value.stride(),
        value.dtype,
    )


def normalisation(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation, of values in [0, 1], used to train the network of a published file.

    Caffe's networks (.npz) take values up to 255 less a mean colour; torch's take ImageNet's mean and
    deviation, which networks for CIFAR-10 also use.

    Example:
        >>> normalisation("resnet20.th")[0]
        (0.485, 0.456, 0.406)
    """
    if Path(path).suffix == ".npz":
        return (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _outputs(state: Mapping[str, Tensor], key: str) -> int:
    return state[key].numel()


def _inputs(state: Mapping[str, Tensor], key: str) -> int:
    return state[key].shape[1] if state[key].dim() > 1 else 1


def _shapes(
    name: str, num_classes: int, in_channels: int, settings: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = build(name, num_classes, in_channels, **settings).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check_names(name: str, expected: list[str], found: list[str]) -> None:
    if parts := _differences(*_apart(expected, found)):
        raise ValueError(f"{name}: {'; '.join(parts)}")


def _apart(expected: Sequence[str], found: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the missing names, and the unexpected names."""
    return [k for k in expected if k not in found], [k for k in found if k not in expected]


def _differences(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    return [
        f"{what} {_some(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys
    ]


def _check_shapes(name: str, expected: dict[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    if wrong := _wrong_shapes(expected, state):
        raise ValueError(f"{name}: wrong shape of {_some(wrong)}")


def _wrong_shapes(expected: dict[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{key} {tuple(state[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if tuple(state[key].shape) != shape
    ]
