"""Every example runs as its first lines say, on small inputs."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT
from quincunx.networks.spec import read_spec

EXAMPLES = ROOT / "examples"


def run(folder, *arguments):
    """What a program prints that runs in a folder; it must end well."""
    done = subprocess.run(
        [sys.executable, *(str(a) for a in arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_example_is_tested_here_and_told_of_in_the_readme():
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    tuned = [f"finetune_{how}.py" for how in ("distilled", "lightning", "plain")]
    assert names == [*tuned, "own_method.py", "own_network.py", "package_network.py", "torchvision_timm.py"]
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"examples/{name}" in readme for name in names)


def test_a_network_of_the_package(tmp_path):
    text = run(tmp_path, EXAMPLES / "package_network.py", 1)
    before, after = (float(n) for n in re.search(r"([\d.]+) M MACs became ([\d.]+) M", text).groups())
    assert after < 0.6 * before
    errors = dict(re.findall(r"^Test error ([\w -]+): ([\d.]+)%", text, re.MULTILINE))
    # an epoch is little, but chance is 90%
    assert float(errors["before"]) < 60
    assert float(errors["after fine-tuning"]) < 60
    assert text.endswith("loaded and fused: (8, 10)\n")
    assert not list(tmp_path.iterdir())


def errors_in(text):
    return {name: float(e) for name, e in re.findall(r"^([\w-]+): test error ([\d.]+)%$", text, re.MULTILINE)}


def test_fine_tuning_in_a_plain_loop(tmp_path):
    errors = errors_in(run(tmp_path, EXAMPLES / "finetune_plain.py", 2, 1))
    assert set(errors) == {"before", "replaced", "fine-tuned", "fused"}
    # chance is 90%
    assert errors["before"] < 40
    assert errors["fine-tuned"] < 40
    assert abs(errors["fine-tuned"] - errors["fused"]) < 0.6
    assert not list(tmp_path.iterdir())


def test_fine_tuning_by_distillation(tmp_path):
    text = run(tmp_path, EXAMPLES / "finetune_distilled.py", 2, 1)
    assert text.startswith("maps compared: layer1, layer2, layer3\n")
    errors = errors_in(text)
    assert set(errors) == {"before", "replaced", "fine-tuned"}
    assert errors["fine-tuned"] < 50


def test_fine_tuning_by_lightning_where_it_is_installed(tmp_path):
    pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")
    errors = errors_in(run(tmp_path, EXAMPLES / "finetune_lightning.py", 2, 1))
    assert set(errors) == {"before", "replaced", "fine-tuned"}
    assert errors["before"] < 60
    assert errors["fine-tuned"] < 60


def test_a_method_of_the_user(tmp_path):
    path = EXAMPLES / "own_method.py"
    assert len(path.read_text().splitlines()) < 60
    text = run(tmp_path, path, 1)
    ratios = [float(r) for r in re.findall(r"rate [\d.]+: ([\d.]+) times fewer MACs", text)]
    assert len(ratios) == 2
    assert 1 < ratios[0] < ratios[1]
    assert "random positions" in text
    assert "a search for 80% of the MACs" in text


def test_a_network_of_the_user_in_python_and_by_the_command_in_its_first_lines(tmp_path):
    shutil.copy(EXAMPLES / "own_network.py", tmp_path)
    text = run(tmp_path, "own_network.py", 2)
    assert "branches.fine.convs.0" in text.partition("replaced: ")[2].splitlines()[0]
    errors = dict(re.findall(r"^(\w+): test error ([\d.]+)%$", text, re.MULTILINE))
    assert set(errors) == {"before", "after", "fused"}
    assert float(errors["before"]) < 40
    assert float(errors["after"]) < 50
    assert abs(float(errors["after"]) - float(errors["fused"])) < 0.6
    [command] = re.findall(r"^    quincunx (.*)$", (EXAMPLES / "own_network.py").read_text(), re.MULTILINE)
    quick = ("--calibration", "60", "--rounds", "3", "--method", "lrd")
    said = run(tmp_path, "-m", "quincunx", *command.split(), *quick)
    # the example prints one digit less
    judged = float(re.search(r"Test error before: ([\d.]+)", said)[1])
    assert judged == pytest.approx(float(errors["before"]), abs=0.06)
    assert 'qx.load("fast/model", factory=make_net)' in said
    assert read_spec(tmp_path / "fast" / "model")["model"]["factory"] == "own_network:make_net"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the example of the two libraries prints."""
    return run(tmp_path_factory.mktemp("both"), EXAMPLES / "torchvision_timm.py")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_networks_of_torchvision_and_timm_where_they_import(both, library):
    """Either it was done, or the library really does not import here and the example says why."""
    text = both
    module = {"torchvision": "torchvision.models", "timm": "timm"}[library]
    importing = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    if importing.returncode == 0:
        assert re.search(
            rf"^{library}: 4 convolutions replaced; loaded and fused, \de-0[4-9] apart$", text, re.M
        )
    else:
        reason = importing.stderr.splitlines()[-1]
        [line] = [line for line in text.splitlines() if line.startswith(f"{module}: does not import here")]
        assert line == f"{module}: does not import here ({reason})"
