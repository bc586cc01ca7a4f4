"""The page on tasks: its program runs, and what it names is there."""

import re
import warnings

import torch

import quincunx as qx
from helpers import ROOT

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_the_program_runs():
    [program] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    scope = {}
    with warnings.catch_warnings():
        # on a busy machine no candidate of so small a network may save time
        warnings.simplefilter("ignore", UserWarning)
        exec(program, scope)
    assert "drop" in scope["result"].search
    image = torch.zeros(2, 1, 4, 4)
    assert scope["depth"].scores(image + 3, image).tolist() == [3, 3]
    assert scope["depth"].read({"image": 1, "depth": 2}) == (1, 2)


def test_every_ready_task_is_in_the_table():
    assert set(re.findall(r"^\| `([\w-]+)` \|", PAGE, flags=re.MULTILINE)) == set(qx.tasks.READY)
