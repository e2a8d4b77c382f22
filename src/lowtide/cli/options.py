"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Artifact: TypeAlias = Annotated[Path, typer.Argument(help="Folder made by `lowtide compress`.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Bits: TypeAlias = Annotated[
    str, typer.Option(help='Bits read per weight of the linear layers: a number, or "dense" for all.', metavar="B")
]
BitsList: TypeAlias = Annotated[
    str, typer.Option(help='Budgets in bits per weight, separated by commas; "dense" reads all.', metavar="B,B,...")
]
Policy: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Mask rule that the artifact stores, e.g. channel-norm or topk:0,4. [default: its first]"),
]
Head: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="OFFSET,MARGIN",
        help="Read the output head twice: all rows with thresholds 2^OFFSET higher, then those within MARGIN nats of "
        'the likeliest as the budget says (2.5,4 reads half as much). "once" reads all as the budget says, "full" '
        "all of it whatever the budget is.",
    ),
]
Threads: TypeAlias = Annotated[int | None, typer.Option("--threads", "-t", help="Worker threads. [default: all cores]")]
Isa: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Instruction set: avx512, avx2, neondot, neon, portable. [default: LOWTIDE_ISA, or the best]"),
]
Context: TypeAlias = Annotated[
    int | None, typer.Option(help="Tokens that the KV cache holds. [default: the model's maximum, at most 4096]")
]
CacheBits: TypeAlias = Annotated[
    int, typer.Option(help="Bits of cached keys and values: 16, or 8 for half the memory.")
]
Preload: TypeAlias = Annotated[
    bool, typer.Option("--preload", help="Read what the budget may read into memory before the first token.")
]
Multiplier: TypeAlias = Annotated[
    float, typer.Option(help="Multiply weights by their columns' importance to this power.", metavar="POWER")
]
Temperature: TypeAlias = Annotated[float, typer.Option(help="0 is greedy, 1 the model's own distribution.")]
TopK: TypeAlias = Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0 for all.")]
TopP: TypeAlias = Annotated[float, typer.Option(help="Choose among the likeliest tokens that make up p.")]
Seed: TypeAlias = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
MaxTokens: TypeAlias = Annotated[int, typer.Option("-n", "--max-tokens", help="Tokens to generate at most.")]

# Making artifacts and training: what compress, pack, prune and learn have in common.
Model: TypeAlias = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, .gguf file or demo:smollm2.")]
Out: TypeAlias = Annotated[Path, typer.Argument(help="Folder of the artifact to make.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")]
Strict: TypeAlias = Annotated[bool, typer.Option("--strict", help="Refuse to prune a layer to nothing.")]
Calibration: TypeAlias = Annotated[
    Path | None, typer.Option(help="Text to calibrate on. [default: the model writes its own]", metavar="FILE")
]
TrainingText: TypeAlias = Annotated[
    Path | None, typer.Option("--text", help="Text to train on. [default: the model writes its own]", metavar="FILE")
]
OwnText: TypeAlias = Annotated[
    float,
    typer.Option(
        "--own-text",
        help="Part of the text, from 0 to below 1, that the model writes itself beside --text: what is learned holds "
        "better for other texts then.",
        metavar="PART",
    ),
]
Varied: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--varied",
        help="What the model writes begins with any token, at temperatures from 0.7 to 1: for models that know many "
        "kinds of text.",
    ),
]
TrainingTokens: TypeAlias = Annotated[int, typer.Option("--tokens", help="Tokens of the text, at most.")]
StepWindows: TypeAlias = Annotated[int, typer.Option("--windows", help="Windows of a step; fewer need less memory.")]
Network: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="Another artifact of the model, whose network training begins with.", metavar="ARTIFACT"),
]
LossHead: TypeAlias = Annotated[
    str, typer.Option(help="What the output head is read at, which runs should do, too: once (the budget) or full.")
]
Apart: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--apart/--together",
        help="Thresholds of their own for q, k and v. [default: as in the network it goes on with, or together]",
    ),
]
Centroids: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Clusters of every group's inputs, whose middles' products are kept; 0 for none. [default: those of the "
        "network it begins with, or 64, fewer in small models]"
    ),
]
CheckEvery: TypeAlias = Annotated[
    int, typer.Option(help="Steps between looks at held-out text, each followed by a checkpoint.")
]
Device: TypeAlias = Annotated[
    str, typer.Option(help="auto (the GPU that torch finds, or else the processor), cpu or cuda.")
]
Consistency: TypeAlias = Annotated[float, typer.Option(help="Weight of the mask consistency term.")]
TrainingSeed: TypeAlias = Annotated[int, typer.Option("--seed", help="Of everything drawn.")]
Resume: TypeAlias = Annotated[bool, typer.Option("--resume/--restart", help="Go on from OUT.partial, or begin again.")]


def parse_bits_list(text: str) -> list[float | None]:
    """The budgets of `--bits A,B,...`; "dense" becomes None.

    Raises:
        LowtideError: one is not a budget.
    """
    from lowtide.runtime.budget import parse_bits

    return [parse_bits(part) for part in text.split(",")]
