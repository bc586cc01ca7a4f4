"""The short form of the campaign in interruptions.py."""

import pytest

from soak.interruptions import campaign

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_killed_or_meets_a_full_disk_ends_as_if_undisturbed():
    assert campaign(["accelerate"], kills=1, full_disks=1, seed=0) == []
