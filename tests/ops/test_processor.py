import pytest

from quincunx.ops.processor import cpu_name, described

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 2

processor\t: 1
model\t\t: 1
model name\t: another
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (INTEL, "Intel(R) Xeon(R) Processor (family 6, model 207, stepping 2)"),
        (INTEL.replace("207", "143"), "Intel(R) Xeon(R) Processor (family 6, model 143, stepping 2)"),
        (ARM, "implementer 0x41, part 0xd40"),
        ("model name: Some Processor\n", "Some Processor"),
        ("nothing of the kind\n", ""),
        ("", ""),
    ],
)
def test_generations_of_one_name_are_told_apart(text, name):
    assert described(text) == name


def test_this_processor_has_a_name():
    assert cpu_name()
