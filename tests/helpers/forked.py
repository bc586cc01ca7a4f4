"""Runs pieces of code, each as in a process that began with its environment: only imports are shared.

    python tests/helpers/forked.py MODULE ... < pieces.json

To import torch takes a process some two seconds. This one imports the named modules once and forks for each
piece [code, environment]; nothing of quincunx may be among them, which reads its variables as it is
imported. It prints a JSON list of [exit status, standard output, standard error].
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


def forked(pieces, *modules, cwd=None):
    """The exit status, output and errors of each piece (code, environment), after imports of modules."""
    run = subprocess.run(
        [sys.executable, __file__, *modules],
        input=json.dumps(pieces),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def child(code, environment, out, err):
    for stream, file in ((1, out), (2, err)):
        os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    status = 1
    try:
        exec(compile(code, "<piece>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except Exception:  # noqa: BLE001 - the status and the trace tell it
        traceback.print_exc()
    finally:  # whatever happened, what follows is the parent's
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main():
    sys.path[0] = ""  # as python -c has it, not this file's folder
    pieces, found = json.load(sys.stdin), []
    for name in sys.argv[1:]:
        importlib.import_module(name)
    assert not any(name.partition(".")[0] == "quincunx" for name in sys.modules)
    for code, environment in pieces:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            with out.open("w") as o, err.open("w") as e:
                if (pid := os.fork()) == 0:
                    child(code, environment, o, e)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            found.append([status, out.read_text(), err.read_text()])
    print(json.dumps(found))  # noqa: T201 - what the tests read


if __name__ == "__main__":
    main()
