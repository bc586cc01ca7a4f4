"""The command line, called in this process."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from quincunx.cli import app


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="quincunx")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def document(*arguments):
    """What ``--json`` prints: one strict JSON document and nothing else."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(result.stdout, parse_constant=refuse)


def refused(*arguments, code=2):
    """The one sentence on standard error with which a call ends."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "Error: "))]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "[Errno" not in result.stderr
    return errors[0]


def check_under(isa, pattern, *files):
    """Run files' tests of some names by the kernels of an instruction set: it is chosen once a process."""
    if os.environ.get("QUINCUNX_ISA"):
        pytest.skip("already inside such a process")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", pattern],
        env={**os.environ, "QUINCUNX_ISA": isa, "QUINCUNX_BACKEND": "native"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
