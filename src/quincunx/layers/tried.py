"""Which way a forward goes for images of some sizes: its layers run on tensors that have no values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quincunx.layers.counts import KEEPING_LAYERS
from quincunx.layers.tracer import Tracer
from quincunx.modules import forward_hooks, held_at

__all__ = ["SIZES", "Trying", "channels_to_try", "without_values"]

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
# images, height, width; sides that halve often and others, so that branches on them go both ways
SIZES = (
    *((2, 64, 64), (2, 65, 97), (2, 16, 16), (2, 2048, 1024), (1, 64, 97), (2, 97, 64), (2, 16, 65)),
    *((2, 65, 16), (1, 8, 8), (2, 224, 224), (2, 256, 256), (1, 33, 47), (1, 512, 768), (1, 225, 223)),
    *((2, 128, 192), (1, 32, 32), (2, 384, 384), (1, 800, 1333), (1, 240, 240), (2, 320, 320)),
    *((1, 299, 299), (1, 192, 192), (1, 448, 448), (2, 160, 160)),
)


def channels_to_try(model: nn.Module) -> Iterator[int]:
    """Yield how many channels a network's images may have, the likeliest first."""
    given = (getattr(module, "in_channels", None) for module in model.modules())
    found = next((channels for channels in given if type(channels) is int), 3)
    yield from dict.fromkeys((found, 3, 1))


def without_values() -> FakeTensorMode:
    """A mode in which tensors have sizes, formats and devices alone."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class Trying(Tracer):
    """A tracer that answers questions about sizes by what they are for some images.

    Args:
        size: images, channels, height and width of each input.
        mode: in which tensors have no values; of all runs of a network, so that it meets each parameter once.
        given: what :class:`Tracer` takes.
    """

    def __init__(self, size: tuple[int, ...], mode: FakeTensorMode, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.size, self.mode = size, mode
        # whether a layer would not take what it was given
        self.failed = False

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind != "output" and not self.failed:
            self.running = True
            # torch logs what a layer does not take, where that is no fault
            silent, _LOGGER.disabled = _LOGGER.disabled, True
            try:
                with self.mode:
                    node.meta["tried"] = self._run(node)
            except Exception as error:
                self.failed = True
                raise self.refusal(str(error)) from error
            finally:
                self.running, _LOGGER.disabled = False, silent
        return node

    def told(self, node: fx.Node, key: str) -> bool | None:
        return None if self.failed or "tried" not in node.meta else bool(node.meta["tried"])

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return held_at(self.root, str(node.target))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["tried"])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = node.target
        if node.op == "call_module":
            function = self.root.get_submodule(str(node.target))
            if type(function) in KEEPING_LAYERS and len(args) == 1 and not forward_hooks(function):
                # its sizes are all that is asked for
                return args[0]
        return function(*args, **kwargs)

    def _input(self, node: fx.Node) -> Any:
        if node.args:
            return node.args[0]
        weight = next((p for p in self.root.parameters() if p.is_floating_point()), None)
        like: dict[str, Any] = {} if weight is None else {"dtype": weight.dtype, "device": weight.device}
        image: Tensor = torch.empty(self.size, **like)
        return image
