"""Compiles the Triton kernels for a GPU, as the launches of a group on the CPU ask for them, and runs none.

    python compile_kernels.py EMPTY_FOLDER

A process of its own: Triton decides at import whether to compile or to interpret.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from lowtide.format.reader import open_artifact
from lowtide.integrations.triton import GradedGroup, graded, kernels

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.tiny import make_artifact  # noqa: E402

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.uint8: "*u8"}
TARGET = GPUTarget("cuda", 80, 32)


class Compiled:
    """Stands for a kernel; a launch compiles it and prints its name."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
        names = self.kernel.arg_names
        types = {
            n: TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for n, a in zip(names, arguments, strict=False)
        }
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=self.kernel, signature={n: types[n] for n in names}, constexprs=constants)
        done = compile(source, target=TARGET, options={"num_warps": num_warps})
        assert done.asm["cubin"]
        print(done.metadata.name)


def main() -> None:
    group = open_artifact(make_artifact(Path(sys.argv[1]) / "tiny", tokenizer=False)).groups["layers.0.qkv"]
    graded.choose_backend = lambda wish, device: "triton"
    for name in ("choose_entries", "sum_digits", "finish_rows"):
        setattr(kernels, name, Compiled(getattr(kernels, name)))
    layer = GradedGroup(group, "cpu")
    layer(torch.zeros(group.in_features), torch.zeros(group.slices))
    layer.apply(torch.zeros(group.in_features), torch.zeros(group.in_features, dtype=torch.int32))


if __name__ == "__main__":
    main()
