"""Writes small programs with every kind of step: what fuzz_program mutates. One argument: the folder."""

import sys
from pathlib import Path

import torch

import quincunx as qx
from quincunx.fusion.serialise import NativePiece
from quincunx.fusion.serialise import pieces as pieces_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.programs import called, examples, in_eight_bits


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, (model, x) in examples().items():
        copies = {"float32": qx.fuse(model), "bfloat16": qx.fuse(model, torch.bfloat16, force=True)}
        copies["int8"] = in_eight_bits(model, x)
        copies["mixed"] = in_eight_bits(model, x, torch.bfloat16, kept=True)
        for kind, fused in copies.items():
            for number, (program, inputs, _) in enumerate(called(fused, x)):
                for place, piece in enumerate(pieces_of(program, *(t.shape for t in inputs))):
                    if isinstance(piece, NativePiece):
                        (folder / f"{name}-{kind}-{number}-{place}.quincunx").write_bytes(piece.data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
