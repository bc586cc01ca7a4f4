"""The short form of the campaign in interruptions.py."""

import tempfile

import pytest

from soak.interruptions import campaign, same

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_killed_or_meets_a_full_disk_ends_as_if_undisturbed(tmp_path, monkeypatch):
    # a campaign keeps its folders, to look at what went wrong
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert campaign(["accelerate"], kills=1, full_disks=1, seed=0) == []


def test_what_differs_is_seen_but_for_the_last_digits_of_fractions():
    left = {"rows": [{"loss": 0.00117272, "layers": 2, "name": "a"}], "model": "0123"}
    for other, equal in (
        ({"rows": [{"loss": 0.001172725, "layers": 2, "name": "a"}], "model": "0123"}, True),
        ({"rows": [{"loss": 0.0011737, "layers": 2, "name": "a"}], "model": "0123"}, False),
        ({"rows": [{"loss": 0.00117272, "layers": 3, "name": "a"}], "model": "0123"}, False),
        ({"rows": [{"loss": 0.00117272, "layers": 2}], "model": "0123"}, False),
        ({"rows": [], "model": "0123"}, False),
        ({**left, "model": "0124"}, False),
    ):
        assert same(left, other) is equal
