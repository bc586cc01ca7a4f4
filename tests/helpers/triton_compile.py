"""Compiles the GPU kernels for architectures that are not here, and prints what each takes, as JSON lines.

    python tests/helpers/triton_compile.py 90 [part parts]

No GPU, no torch tensors: Triton makes PTX and machine code for any target.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quincunx.ops.triton import kernels
from quincunx.ops.triton.configs import Config, candidates, weight_candidates

FLOATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def compiled(kernel: Any, arguments: dict[str, Any], architecture: int, warps: int, stages: int) -> Any:
    """``arguments``: of each name a type, with ":16" where it is a multiple of 16, or ("is", value)."""
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        given = arguments[name]
        if isinstance(given, tuple):
            signature[name], constants[(place,)] = "constexpr", given[1]
            continue
        if given.endswith(":16"):
            given, attributes[(place,)] = given[:-3], [["tt.divisibility", 16]]
        signature[name] = given
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def gemm(
    dtype: torch.dtype,
    inner: int,
    outer: int,
    config: Config,
    *,
    affine: bool = True,
    transposed: bool = False,
    second: bool = False,
    residual: bool = True,
    wide: bool = False,
    precision: str = "tf32",
) -> dict[str, Any]:
    name = f"*{FLOATS[dtype]}:16"
    none = ("is", None)
    return {
        "x": name,
        "w": name,
        "bias": "*fp32:16",
        "residual": name if residual else none,
        "res_table": "*i32:16" if second else none,
        "scale2": "*fp32:16" if second else none,
        "shift2": "*fp32:16" if second else none,
        "out": name,
        "out2": name if second else none,
        "workspace": "*fp32:16" if config.split > 1 else none,
        "classes": "*i32:16",
        "taps": "*i64:16",
        "index": "*i32:16",
        "rows": none if affine else "*i32:16",
        **dict.fromkeys(("batch", "class_count", "tiles_n", "in_rows", "out_rows", "res_rows"), "i32"),
        "x_channels": "i32:16" if inner % 16 == 0 else "i32",
        "out_channels": "i32:16" if outer % 16 == 0 else "i32",
        "res_channels": "i32:16" if outer % 16 == 0 else "i32",
        "TAPS": ("is", 9),
        "TRANSPOSED": ("is", transposed),
        "C": ("is", inner),
        "O": ("is", outer),
        "AFFINE": ("is", affine),
        "ACT": ("is", 1),
        "ACT2": ("is", 1),
        "WIDE": ("is", wide),
        "PRECISION": ("is", precision),
        "SPLIT": ("is", config.split),
        "BM": ("is", config.rows),
        "BN": ("is", config.columns),
        "BK": ("is", config.depth),
    }


def weight(dtype: torch.dtype, inner: int, outer: int, config: Config) -> dict[str, Any]:
    name = f"*{FLOATS[dtype]}:16"
    sizes = ("batch", "points", "in_rows", "tiles_c", "blocks", "block_parts", "image_parts")
    channels = "i32:16" if inner % 16 == outer % 16 == 0 else "i32"
    return {
        "x": name,
        "y": name,
        "found": "*fp32:16",
        "table": "*i32:16",
        **dict.fromkeys(sizes, "i32"),
        "x_channels": channels,
        "y_channels": channels,
        "C": ("is", inner),
        "O": ("is", outer),
        "TAPS": ("is", 9),
        "GROUPS": ("is", 1),
        "PRECISION": ("is", "tf32"),
        "BP": ("is", config.depth),
        "BO": ("is", config.rows),
        "BC": ("is", config.columns),
    }


def jobs() -> Iterator[tuple[str, Any, dict[str, Any], Config]]:
    """Every kernel with every tile that is tried, and each type and way of reading rows once."""
    tried = candidates(torch.bfloat16, (10**6,), 9, 128, 256, 132)
    tried += [c for c in candidates(torch.bfloat16, (1000,), 9, 128, 128, 132) if c.split in (1, 4)][::3]
    for config in dict.fromkeys(tried):
        for transposed in (False, True):
            arguments = gemm(torch.bfloat16, 128, 256, config, transposed=transposed)
            yield (
                f"gemm {astuple(config)}{' transposed' * transposed}",
                kernels.gather_gemm,
                arguments,
                config,
            )
    usual = Config(64, 64, 32, 4, 5)
    for dtype in FLOATS:
        for precision in ("tf32", "ieee") if dtype == torch.float32 else ("tf32",):
            for affine in (True, False):
                arguments = gemm(dtype, 64, 64, usual, affine=affine, precision=precision)
                yield f"gemm {dtype} {precision} affine={affine}", kernels.gather_gemm, arguments, usual
    for inner, outer in ((3, 17), (20, 48), (16, 16)):
        small = Config(64, 16 if outer == 16 else 32, 16, 4, 5)
        arguments = gemm(torch.float16, inner, outer, small, second=True, wide=True, residual=False)
        yield f"gemm {inner} to {outer}, second output, wide", kernels.gather_gemm, arguments, small
    for config in dict.fromkeys(weight_candidates(torch.bfloat16, 64, 392, 9, 128, 128, 132)[::2]):
        yield (
            f"weight {astuple(config)}",
            kernels.weight_grad,
            weight(torch.bfloat16, 128, 128, config),
            config,
        )
    odd = Config(32, 16, 32, 4, 3)
    for dtype in FLOATS:
        yield f"weight {dtype}", kernels.weight_grad, weight(dtype, 12, 20, odd), odd


def main() -> None:
    architecture, part, parts = (int(v) for v in (*sys.argv[1:], *("0", "1")[len(sys.argv) - 2 :]))
    for number, (name, kernel, arguments, config) in enumerate(jobs()):
        if number % parts != part:
            continue
        made = compiled(kernel, arguments, architecture, config.warps, config.stages)
        ptx = made.asm["ptx"]
        line = {
            "name": name,
            "shared": made.metadata.shared,
            "local": ".local" in ptx,
            "matrix": "mma" in ptx,
            "cubin": len(made.asm["cubin"]),
        }
        print(json.dumps(line), flush=True)  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main()
