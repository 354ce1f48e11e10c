"""Norms of torch tensors by MLX through the bridge (pippin.torch.norms) against torch's own, on this CPU.

    .venv-parity/bin/python -m benchmarks.norms [--tokens 1024] [--dim 3072] [--threads 2] [--json results.jsonl]

Milliseconds, the best of some tries in alternation. Needs the extra ``torch``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import benchmarks  # isort: skip  # noqa: F401  (its BLAS comes before MLX)
import torch
import torch.nn.functional as F

from pippin.torch import norms

Call = Callable[[], object]


def pairs(tokens: int, dim: int, dtype: torch.dtype) -> Iterator[tuple[str, Call, Call]]:
    """What is computed, by MLX and by torch."""
    x, residual = torch.randn(1, tokens, dim).to(dtype), torch.randn(1, tokens, dim).to(dtype)
    weight, bias = torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)
    scale, shift, gate = (torch.randn(1, 1, dim).to(dtype) for _ in range(3))
    yield (
        "RMSNorm",
        lambda: norms.norm_infer(x, weight, None, 1e-6, is_rms_norm=True),
        lambda: F.rms_norm(x, (dim,), weight, 1e-6),
    )
    yield (
        "LayerNorm",
        lambda: norms.norm_infer(x, weight, bias, 1e-6),
        lambda: F.layer_norm(x, (dim,), weight, bias, 1e-6),
    )
    yield (
        "LayerNorm, scale, shift",
        lambda: norms.fused_norm_scale_shift(x, None, None, scale, shift, "layer", 1e-6),
        lambda: F.layer_norm(x, (dim,), None, None, 1e-6) * (1 + scale) + shift,
    )
    yield (
        "residual, gate, LayerNorm, scale, shift",
        lambda: norms.fused_scale_residual_norm_scale_shift(residual, x, gate, None, None, scale, shift, "layer", 1e-6),
        lambda: F.layer_norm(residual + x * gate, (dim,), None, None, 1e-6) * (1 + scale) + shift,
    )


def milliseconds(calls: tuple[Call, Call], tries: int) -> tuple[float, float]:
    """Of each, the best of ``tries``, in alternation."""
    best = [float("inf"), float("inf")]
    for _ in range(tries):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's; MLX has its own one")
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--json", type=Path, help="append a line for each row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'':42} {'tokens':>6} {'dtype':>9} {'MLX ms':>8} {'torch ms':>8} {'ratio':>6}")
    with torch.inference_mode():
        for tokens in args.tokens:
            for dtype in (torch.float32, torch.bfloat16):
                for name, ours, theirs in pairs(tokens, args.dim, dtype):
                    mine, its = milliseconds((ours, theirs), args.tries)
                    kind = str(dtype).removeprefix("torch.")
                    print(f"{name:42} {tokens:6} {kind:>9} {mine:8.2f} {its:8.2f} {mine / its:6.2f}")
                    if args.json:
                        line = {"norm": name, "tokens": tokens, "dim": args.dim, "dtype": kind, "mlx_ms": mine}
                        with args.json.open("a") as file:
                            file.write(json.dumps(line | {"torch_ms": its, "threads": args.threads}) + "\n")


if __name__ == "__main__":
    main()
