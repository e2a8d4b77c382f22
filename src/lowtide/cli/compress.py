"""`lowtide compress`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.options import Json

STAGES = {
    "sample": "writing calibration text",
    "forward": "running the model",
    "quantise": "coding layers",
    "write": "writing the artifact",
}


def compress(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, .gguf file or demo:smollm2.")],
    out: Annotated[Path, typer.Argument(help="Folder of the artifact to make.")],
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on. [default: the model writes its own]", metavar="FILE")
    ] = None,
    bits_max: Annotated[int, typer.Option(help="Bits per weight stored: 2, 4, 6 or 8.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the sampled text.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Mask rule to store thresholds for, e.g. topk or channel-norm:0,6; repeat for several."),
    ] = None,
    json: Json = False,
) -> None:
    """Compress a model into an artifact that runs at any budget.

    If it is interrupted, the same command goes on where it was.

    \b
    Examples:
      lowtide compress demo:smollm2 smollm2.lowtide
      lowtide compress ./Qwen2.5-1.5B qwen.lowtide --calibration wiki.txt --bits-max 6 --seed 1
      lowtide compress demo:smollm2 smollm2.lowtide --policy channel-norm --policy channel-norm:0,6
    """
    from lowtide.cli.output import print_json
    from lowtide.compress import compress as run
    from lowtide.compress.thresholds import DEFAULT_POLICIES

    with progress_bar() as progress:
        figures = run(
            model,
            out,
            calibration=calibration,
            bits_max=bits_max,
            seed=seed,
            force=force,
            policies=policy or DEFAULT_POLICIES,
            progress=progress,
        )
    if json:
        print_json(figures)
        return
    print(
        f"{out}: {figures['weights'] / 1e6:.1f} M weights in {figures['file_bytes'] / 1e6:.1f} MB, "
        f"{figures['file_bits_per_weight']:.2f} bits per weight, {figures['seconds']:.0f} s"
    )


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; yields the function to call with (stage, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    tasks = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(STAGES.get(stage, stage), total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report
