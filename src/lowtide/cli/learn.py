"""`lowtide learn`: training what compression and pruning go by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.options import Json

app = typer.Typer(name="learn", help="Train what compression and pruning go by.", no_args_is_help=True)


@app.callback()
def _learn() -> None:
    """Train what compression and pruning go by."""


@app.command()
def importance(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, .gguf file or demo:smollm2.")],
    out: Annotated[Path, typer.Argument(help="File of the trained network, e.g. importance.safetensors.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to train on. [default: the model writes its own]", metavar="FILE")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps end to end; half as many block by block come before.")] = 120,
    sparsity: Annotated[
        str, typer.Option(help="Lowest and highest sparsity to train for.", metavar="LOW,HIGH")
    ] = "0.4,0.8",
    own: Annotated[
        bool, typer.Option("--own/--shared", help="Learn rows and columns of this model, too; serves it alone.")
    ] = True,
    also: Annotated[
        list[str] | None, typer.Option(help="Another model to train on in turn, with --shared; repeat for several.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Network to begin with. [default: the package's]", metavar="FILE")
    ] = None,
    relaxation: Annotated[str, typer.Option(help="Masks: straight-through or hard-concrete.")] = "straight-through",
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume/--restart", help="Go on from OUT.partial, or begin again.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    json: Json = False,
) -> None:
    """Train the importance network: which weights may go.

    The network that comes with the package needs no training. Training on your own model improves it there. If it is
    interrupted, the same command goes on where it was.

    \b
    Examples:
      lowtide learn importance ./SmolLM2-135M smol.safetensors --text wiki.txt
      lowtide learn importance ./a shared.safetensors --shared --also ./b --also ./c --steps 400
    """
    from lowtide.cli.output import print_json
    from lowtide.cli.progress import progress_bar
    from lowtide.learn.run import learn_importance
    from lowtide.learn.train_importance import TrainOptions

    options = TrainOptions(
        steps=steps,
        warm_steps=steps // 2,
        sparsity=_range(sparsity),
        own=own and not also,
        relaxation=relaxation,
        seed=seed,
    )
    with progress_bar() as report:
        figures = learn_importance([model, *(also or [])], out, options, text, start, resume, force, report)
    if json:
        print_json(figures)
        return
    if figures["diverged"]:
        typer.echo(f"lowtide: the loss diverged at step {figures['steps']}; kept step {figures['best_step']}", err=True)
    print(
        f"{out}: held-out KL {figures['kl_before']:.4f} -> {figures['kl_after']:.4f} (mean over sparsities 0.5, 0.6 "
        f"and 0.7, no weight updates), step {figures['best_step']} of {figures['steps']}, {figures['seconds']:.0f} s"
    )


def _range(text: str) -> tuple[float, float]:
    from lowtide.errors import LowtideError

    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise LowtideError(f"--sparsity {text}: give one number or LOW,HIGH, e.g. 0.4,0.8")
    return values[0], values[-1]
