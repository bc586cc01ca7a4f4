"""Writes small programs with every kind of step: what fuzz_program mutates. One argument: the folder."""

import sys
from pathlib import Path

import torch

import quincunx as qx
from quincunx.fusion.serialise import NativePiece
from quincunx.fusion.serialise import pieces as pieces_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.programs import called, examples


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, (model, x) in examples().items():
        for dtype in (None, torch.bfloat16):
            for number, (program, inputs, _) in enumerate(called(qx.fuse(model, dtype), x)):
                for place, piece in enumerate(pieces_of(program, *(t.shape for t in inputs))):
                    if isinstance(piece, NativePiece):
                        kind = "float32" if dtype is None else "bfloat16"
                        (folder / f"{name}-{kind}-{number}-{place}.quincunx").write_bytes(piece.data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
