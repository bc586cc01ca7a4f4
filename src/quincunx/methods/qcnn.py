"""Q-CNN: weights of convolutions and fully connected layers as codewords (Wu et al. 2016)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quincunx.layers.quantised import QuantConv2d, QuantLinear, check_codebook
from quincunx.methods.fitting.codebooks import Quantisation, bits_per_weight, quantise
from quincunx.methods.fitting.moments import POSITIONS, moments
from quincunx.methods.fitting.settings import check_integers, conv_of
from quincunx.methods.points import Point
from quincunx.modules import padding_of
from quincunx.surgery.calibration import Context, Layer
from quincunx.surgery.method import Replacement, Work, each

__all__ = ["QCNN"]


@dataclass(frozen=True)
class QCNN:
    r"""Product quantisation: replaces the weight's sub-vectors of C' input channels by one of K codewords.

    K-means finds the codebooks. Calibration data corrects them, layer by layer from the
    input up: each layer's codewords and assignments minimise the error of its responses,

    .. math:: E\,|y - W' * x - b|^2,

    given the input from the layers already quantised. The bias then removes the mean error; a layer
    without bias gets one. Convolutions become :class:`QuantConv2d`, fully connected layers
    :class:`QuantLinear`. Needs scipy.

    Args:
        subspace: C'. If it does not divide a layer's channels the last subspace is padded with zeros.
        codewords: K; an index takes one byte up to 256, two beyond.
        data: True corrects on data, False quantises the weight only; None corrects if there is
            calibration data.
        iterations: the most sweeps of the correction.
        positions: the most positions of an image that the correction sums over; on larger maps this many are
            drawn.
        linear: whether fully connected layers are quantised too.
        seed: of k-means and of that draw.

    Raises:
        ValueError: fewer than 2 codewords, a subspace below 1, a count outside its range. Layers that do
            not fit a setting are skipped, with the numbers as the reason: fewer channels than C',
            fewer sub-vectors than K.

    Source: Wu, Leng, Wang, Hu, Cheng, arXiv:1512.06473, sections 3.1 to 3.3.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1))
        >>> record = qx.accelerate(net, QCNN(subspace=4, codewords=32)).replaced["0"]
        >>> record["subspace"], record["codewords"], record["kind"]
        (4, 32, 'QuantConv2d')
    """

    name: ClassVar[str] = "qcnn"
    saves_bytes: ClassVar[bool] = True

    subspace: int = 8
    codewords: int = 128
    _: KW_ONLY
    data: bool | None = None
    iterations: int = 4
    positions: int = POSITIONS
    linear: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, subspace=1, iterations=1, positions=1, seed=0)
        check_codebook(self.subspace, self.codewords, self.subspace, None)
        for name, allowed in (("data", (None, True, False)), ("linear", (True, False))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {allowed}")

    @property
    def targets(self) -> tuple[type[nn.Module], ...]:
        """Return the classes of layers that it replaces."""
        return (nn.Conv2d, nn.Linear) if self.linear else (nn.Conv2d,)

    def with_data(self, context: Context) -> bool:
        """Return whether layers are corrected on data: ``data``, or by default whether there is any."""
        return context.calibration is not None if self.data is None else self.data

    @classmethod
    def candidates(cls) -> tuple[QCNN, ...]:
        """Return the settings that a search tries in each layer."""
        return ()

    @classmethod
    def sweep(cls) -> list[Point]:
        """Return the settings for its curve of accuracy against speed."""
        return [
            Point("Q-CNN", f"{length} per codeword, {count}", cls(subspace=length, codewords=count))
            for length, count in ((4, 64), (6, 64), (6, 128), (8, 128))
        ]

    def label(self, pair: bool = False) -> str:
        """Return its settings in a few words."""
        return f"{self.name}, {self.subspace} per codeword, {self.codewords}"

    def refuse(self, layer: Layer, context: Context) -> str | None:
        """Return why a layer is not replaced, or None."""
        conv = _read_as_conv(layer)
        if isinstance(layer.module, nn.Conv2d) and conv.groups == conv.in_channels > 1:
            return "depthwise: a kernel of one channel has no sub-vectors"
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        vectors = taps * conv.out_channels // conv.groups
        try:
            check_codebook(self.subspace, self.codewords, conv.in_channels // conv.groups, vectors)
        except ValueError as error:
            return str(error)
        if self.with_data(context) and layer.calls is not None and layer.calls > 1:
            return f"called {layer.calls} times in a forward: there is no one input to correct it on"
        return None

    def begin(self, layers: Sequence[Layer], context: Context) -> Work:
        """Quantise layer by layer.

        Raises:
            ModuleNotFoundError: scipy is not installed.
        """
        if importlib.util.find_spec("scipy") is None:
            raise ModuleNotFoundError("QCNN needs scipy for k-means: pip install 'quincunx[train]'")
        with_data = self.with_data(context)

        def replace(layer: Layer) -> Replacement:
            conv, data = _read_as_conv(layer), None
            if with_data:
                pairs = context.responses(layer, padded=True)
                if isinstance(layer.module, nn.Linear):
                    pairs = _as_maps(pairs)  # type: ignore[assignment]
                data = moments(conv, pairs, positions=self.positions, seed=self.seed)
            found = quantise(
                conv, self.subspace, self.codewords, data, iterations=self.iterations, seed=self.seed
            )
            module = quantised(layer.module if isinstance(layer.module, nn.Linear) else conv, found)
            record = {
                "subspace": self.subspace,
                "codewords": self.codewords,
                "bits": bits_per_weight(found, conv.weight.numel()),
                "weight_error": found.weight_error,
                "plain_response_error": found.plain_error,
                "response_error": found.response_error,
            }
            return Replacement(module, module.spec, record)

        return each(replace)


def _read_as_conv(layer: Layer) -> nn.Conv2d:
    return conv_of(layer) if isinstance(layer.module, nn.Conv2d) else _as_conv(layer.module)


def _as_conv(module: nn.Module) -> nn.Conv2d:
    """Return a fully connected layer as a 1 x 1 convolution with the same parameters, or the layer."""
    if isinstance(module, nn.Conv2d):
        return module
    if not isinstance(module, nn.Linear):
        raise TypeError(f"expected a Conv2d or a Linear, got {type(module).__name__}")
    conv = nn.Conv2d(module.in_features, module.out_features, 1, bias=module.bias is not None, device="meta")
    conv.weight = nn.Parameter(module.weight.detach()[:, :, None, None], requires_grad=False)
    conv.bias = None if module.bias is None else nn.Parameter(module.bias.detach(), requires_grad=False)
    return conv


def _as_maps(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and responses of a fully connected layer, each as a map of one position."""
    for x, y in pairs:
        yield x.reshape(-1, x.shape[-1], 1, 1), y.reshape(-1, y.shape[-1], 1, 1)


def quantised(module: nn.Module, found: Quantisation) -> QuantConv2d | QuantLinear:
    """Return the module of a quantisation, which replaces the quantised layer."""
    _, k, width = found.codebooks.shape
    made: QuantConv2d | QuantLinear
    bias = found.bias is not None
    if isinstance(module, nn.Conv2d):
        made = QuantConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            subspace=width,
            codewords=k,
            stride=module.stride,
            padding=padding_of(module),
            dilation=module.dilation,
            groups=module.groups,
            bias=bias,
        )
    else:
        conv = _as_conv(module)
        made = QuantLinear(conv.in_channels, conv.out_channels, subspace=width, codewords=k, bias=bias)
    made.to(found.codebooks)
    with torch.no_grad():
        made.codebooks.copy_(found.codebooks)
        made.assignments.copy_(found.assignments)
        if found.bias is not None and made.bias is not None:
            made.bias.copy_(found.bias)
    return made
