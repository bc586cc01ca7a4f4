"""A loaded network says how it was trained to see images."""

import pytest
import torch
from torch import nn

import quincunx as qx
from quincunx.networks.preprocessing import Preprocessing

INFO = {"data": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "size": [16, 16]}}


def test_bytes_and_shares_become_what_the_network_takes(tmp_path):
    model = qx.load(qx.save(qx.networks.build("cifar-resnet8", 3, 3), tmp_path / "net", info=INFO))
    assert (model.preprocess.mean, model.preprocess.size) == ((0.4, 0.5, 0.6), (16, 16))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    seen = model.preprocess(pixels)
    expected = torch.stack(
        [
            (pixels[:, c] / 255 - m) / s
            for c, (m, s) in enumerate(zip(INFO["data"]["mean"], INFO["data"]["std"], strict=True))
        ],
        1,
    )
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(model.preprocess(pixels / 255), expected)
    torch.testing.assert_close(model.preprocess(pixels[0]), expected[0])
    assert qx.fuse(model)(seen).shape == (2, 3)
    with pytest.raises(ValueError, match="images: expected 3 channels"):
        model.preprocess(pixels[:, :1])


@pytest.mark.parametrize(
    "info",
    [None, {}, {"data": 3}, {"data": {"mean": "a", "std": [1]}}, {"data": {"mean": [0.1], "std": [0]}}],
)
def test_an_artifact_that_notes_none_has_none(info, tmp_path):
    model = qx.load(
        qx.save(nn.Sequential(nn.Conv2d(1, 2, 1)), tmp_path / "net", factory="a:b", info=info or {}),
        factory=lambda: nn.Sequential(nn.Conv2d(1, 2, 1)),
    )
    assert not hasattr(model, "preprocess")
    assert Preprocessing.of(info) is None
