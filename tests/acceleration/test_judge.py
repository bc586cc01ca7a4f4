"""What images can show of a loss, before anything is replaced."""

from types import SimpleNamespace

import pytest

from quincunx.acceleration.judge import doubts_about_drop
from quincunx.measure.tasks import classification, image_to_image


def network(wrong, tested, task=None):
    return SimpleNamespace(score=wrong, scores=range(tested), task=task or classification())


def test_a_loss_within_chance_is_doubted_and_the_images_that_would_show_it_are_counted():
    (doubt,) = doubts_about_drop(network(0.085, 1000), 4000, 1.0)
    assert doubt.startswith("max_drop=1: on 1,000 test images, 8.5% of them wrong")
    assert "differ by up to 1.8 points by chance" in doubt
    assert "on 4,000 images or more" in doubt
    assert doubts_about_drop(network(0.085, 4000), 4000, 1.0) == []


def test_too_few_calibration_images_are_doubted():
    (doubt,) = doubts_about_drop(network(0.05, 100_000), 300, 1.0)
    assert doubt.startswith("max_drop=1 points are 3.0 of the 300 calibration images")
    assert "--calibration 500 has 5" in doubt
    assert doubts_about_drop(network(0.05, 100_000), 500, 1.0) == []


@pytest.mark.parametrize(
    ("before", "allowed"),
    [
        (network(0.085, 1000), None),
        (network(0.0, 1000), 0.0),
        (network(0.0, 1000), 1.0),
        (network(0.0, 0), 1.0),
        (network(29.0, 100, image_to_image(ssim=False)), 0.1),
    ],
)
def test_nothing_is_doubted_where_nothing_is_asked_or_known(before, allowed):
    assert doubts_about_drop(before, 1000, allowed) == []
