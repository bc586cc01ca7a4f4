"""Which way a forward goes for images of some sizes: its layers run on tensors that have no values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from quincunx.layers.tracer import Tracer
from quincunx.modules import held_at

__all__ = ["SIZES", "Trying", "channels_to_try"]

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
# images, height, width; sides that halve often and others, so that branches on them go both ways
SIZES = (
    *((2, 64, 64), (2, 65, 97), (1, 64, 97), (2, 97, 64), (2, 224, 224), (1, 33, 47), (2, 16, 16), (1, 8, 8)),
    *((1, 512, 768), (2, 2048, 1024), (1, 225, 223), (2, 128, 192), (2, 90, 90), (1, 32, 32), (2, 384, 384)),
    (1, 800, 1333),
)


def channels_to_try(model: nn.Module) -> Iterator[int]:
    """Yield how many channels a network's images may have, the likeliest first."""
    given = (getattr(module, "in_channels", None) for module in model.modules())
    found = next((channels for channels in given if type(channels) is int), 3)
    yield from dict.fromkeys((found, 3, 1))


class Trying(Tracer):
    """A tracer that answers questions about sizes by what they are for some images.

    Args:
        size: images, channels, height and width of each input.
        given: what :class:`Tracer` takes.
    """

    def __init__(self, size: tuple[int, ...], *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.size = size
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
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
        return function(*args, **kwargs)

    def _input(self, node: fx.Node) -> Any:
        if node.args:
            return node.args[0]
        weight = next((p for p in self.root.parameters() if p.is_floating_point()), None)
        like: dict[str, Any] = {} if weight is None else {"dtype": weight.dtype, "device": weight.device}
        image: Tensor = torch.empty(self.size, **like)
        return image
