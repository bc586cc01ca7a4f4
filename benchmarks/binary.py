"""One-bit convolutions beside torch's own in float32 with the same weights of +1 and -1, turn by turn."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from quincunx.artifact import write_json
from quincunx.binary import BinaryConv2d, BinaryLinear
from quincunx.latency import environment, measure_models
from quincunx.ops import backend

# channels in and out, size of the map, kernel, groups
CONVOLUTIONS = [
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (96, 256, 27, 5, 2),
    (16, 16, 32, 3, 1),
    (256, 256, 14, 1, 1),
]


def pairs(batch: int) -> list[tuple[str, nn.Module, nn.Module, Tensor]]:
    """(case, dense, packed, input)."""
    found: list[tuple[str, nn.Module, nn.Module, Tensor]] = []
    for inputs, outputs, size, kernel, groups in CONVOLUTIONS:
        own = BinaryConv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups).eval()
        dense = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups).eval()
        dense.load_state_dict({"weight": own.binary_weight().detach(), "bias": own.bias})
        x = torch.randn(batch, inputs, size, size).contiguous(memory_format=torch.channels_last)
        case = f"{inputs} to {outputs} x {size}^2, {kernel} x {kernel}, groups {groups}, batch {batch}"
        found.append((case, dense.to(memory_format=torch.channels_last), own.pack(), x))
    linear = BinaryLinear(9216, 4096).eval()
    full = nn.Linear(9216, 4096).eval()
    full.load_state_dict({"weight": linear.binary_weight().detach(), "bias": linear.bias})
    found.append((f"linear 9216 to 4096, batch {batch}", full, linear.pack(), torch.randn(batch, 9216)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for batch in (1, 8):
        for case, dense, packed, x in pairs(batch):
            with torch.no_grad():
                torch.testing.assert_close(packed(x), dense(x), rtol=1e-3, atol=1e-2)
            found = measure_models({"dense": dense, "binary": packed}, x, threads=arguments.threads)
            middle, low, high = found["binary"].speedup_over(found["dense"])
            rows.append(
                {"case": case, "ratio": middle, "q1": low, "q3": high}
                | {name: timing.to_dict() for name, timing in found.items()}
            )
            print(f"{case}: {middle:.2f}x [{low:.2f}, {high:.2f}]", flush=True)
    if arguments.out:
        write_json(arguments.out, {"environment": environment(), "backend": str(backend()), "rows": rows})


if __name__ == "__main__":
    main()
