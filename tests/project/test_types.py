"""A user's types: the package says that it has some, and mypy --strict accepts every public name."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import quincunx as qx
from helpers import ROOT

FILE = Path(__file__).with_name("typed_use.py")


def test_strict_types_accept_a_users_file_and_refuse_a_wrong_one(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import torch\nimport quincunx as qx\n"
        "qx.cost(torch.nn.Identity(), torch.zeros(1)).macs.upper()\nqx.Uniform('half')\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", ".mypy_cache/users"]
    # found as an installed package, so that py.typed counts
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")
    }
    run = subprocess.run(
        [*command, str(FILE), str(wrong)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    errors = [line for line in run.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 2, run.stdout + run.stderr
    assert all(line.partition(":")[0].endswith("wrong.py") for line in errors)
    assert '"int" has no attribute "upper"' in errors[0]
    assert 'Argument 1 to "Uniform"' in errors[1]


def test_the_users_file_has_every_public_name():
    used = {
        node.attr
        for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qx"
    }
    assert set(qx.__all__) - used == set()
