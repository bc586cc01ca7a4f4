"""What Python writes into a program and what C++ reads from it have the same names in the same order."""

import re

import pytest

from helpers import ROOT
from quincunx.fusion.program import BufferCode, StepCode


@pytest.mark.parametrize(("enum", "record"), [("BufferField", BufferCode), ("StepField", StepCode)])
def test_both_sides_name_the_fields_alike(enum, record):
    source = (ROOT / "csrc" / "program.h").read_text()
    body = re.search(rf"enum {enum} : int64_t \{{(.*?)\}}", source, re.S)[1]
    *names, count = (name.strip() for name in body.split(","))
    assert count == f"k{enum}s"
    snake = [re.sub(r"(?<!^)(?=[A-Z])", "_", name.removeprefix("k")).lower() for name in names]
    assert snake == list(record._fields)
