"""`lowtide learn`: training what compression and pruning go by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowtide.cli.options import (
    Apart,
    Centroids,
    CheckEvery,
    Consistency,
    Device,
    Force,
    Json,
    LossHead,
    Model,
    Network,
    Out,
    OwnText,
    Resume,
    StepWindows,
    TrainingSeed,
    TrainingText,
    TrainingTokens,
    Varied,
)

app = typer.Typer(name="learn", help="Train what compression and pruning go by.", no_args_is_help=True)


@app.callback()
def _learn() -> None:
    """Train what compression and pruning go by."""


@app.command()
def importance(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File of the trained network, e.g. importance.safetensors.")],
    text: TrainingText = None,
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
    seed: TrainingSeed = 0,
    resume: Resume = True,
    force: Force = False,
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


@app.command()
def ipn(
    artifact: Annotated[Path, typer.Argument(help="Artifact to add the learned rule to.")],
    model: Annotated[str, typer.Argument(help="The model it was made from: folder, hub id or .gguf file.")],
    out: Out,
    text: TrainingText = None,
    own_text: OwnText = 0.0,
    varied: Varied = False,
    tokens: TrainingTokens = 65_536,
    bits: Annotated[str, typer.Option(help="Lowest and highest budget to train for.", metavar="LOW,HIGH")] = "2,4",
    steps: Annotated[int, typer.Option(help="Steps end to end, after the self-supervised start.")] = 100,
    windows: StepWindows = 8,
    features: Annotated[
        int | None, typer.Option(help="Features of each probe. [default: those of the network it begins with, or 4]")
    ] = None,
    centroids: Centroids = None,
    apart: Apart = None,
    parts: Annotated[str, typer.Option(help="What learns.")] = "importance,theta,offset",
    sparsity_loss: Annotated[
        str, typer.Option(help="hinge (on bits above the budget) or l1 (open masks' mean).")
    ] = "hinge",
    l1: Annotated[float, typer.Option("--l1", help="Weight of the l1 term.")] = 1.0,
    head: LossHead = "once",
    consistency: Consistency = 0.0,
    network: Network = None,
    check_every: CheckEvery = 25,
    device: Device = "auto",
    seed: TrainingSeed = 0,
    resume: Resume = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train the importance prediction network: what each token needs to read. The weights stay as they are.

    From an artifact that has a network with as many features training goes on with that.

    \b
    Examples:
      lowtide learn ipn smol.lowtide ./SmolLM2-135M smol-ipn.lowtide --text wiki.txt
      lowtide learn ipn smol.lowtide ./SmolLM2-135M smol-ipn.lowtide --text wiki.txt --own-text 0.85 --varied
      lowtide learn ipn smol.lowtide ./SmolLM2-135M smol-ipn.lowtide --steps 0
    """
    from lowtide.cli.progress import progress_bar
    from lowtide.learn.ipn_loss import Prices
    from lowtide.learn.ipn_train import IpnOptions
    from lowtide.learn.run_ipn import learn_ipn

    options = IpnOptions(
        steps=steps,
        bits=_budgets(bits),
        windows=windows,
        features=features,
        centroids=centroids,
        apart=apart,
        own_text=own_text,
        varied=varied,
        parts=tuple(p.strip() for p in parts.split(",")),
        head=head,
        prices=Prices(sparsity_loss, l1=l1, consistency=consistency),
        check_every=check_every,
        seed=seed,
    )
    with progress_bar() as report:
        figures = learn_ipn(artifact, model, out, options, text, tokens, resume, force, report, network, device)
    _tell(figures, json)


@app.command()
def joint(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or .gguf file.")],
    out: Out,
    bits: Annotated[float, typer.Option(help="Budget to train for, bits read per weight.")] = 2.5,
    high: Annotated[
        float | None, typer.Option(help="Highest budget that the dial shall reach. [default: 1.5 above, 6 at most]")
    ] = None,
    focus: Annotated[float, typer.Option(help="Part of the steps that train the budget itself.")] = 0.7,
    artifact: Annotated[
        Path | None, typer.Option(help="Artifact of the model to begin with. [default: compress it first]")
    ] = None,
    text: TrainingText = None,
    own_text: OwnText = 0.0,
    varied: Varied = False,
    tokens: TrainingTokens = 262_144,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    windows: StepWindows = 8,
    weight_rate: Annotated[
        float | None, typer.Option(help="Adam's rate for weights, relative to their size. [default: by the width]")
    ] = None,
    rank: Annotated[int, typer.Option(help="Learn an addition of this rank to each matrix; 0: full weights.")] = 0,
    centroids: Centroids = None,
    apart: Apart = None,
    head: LossHead = "once",
    consistency: Consistency = 0.0,
    network: Network = None,
    check_every: CheckEvery = 25,
    device: Device = "auto",
    seed: TrainingSeed = 0,
    resume: Resume = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train the model and what it reads together, against the dense model. The result is an ordinary artifact.

    \b
    Examples:
      lowtide learn joint ./SmolLM2-135M smol.lowtide --bits 2.5 --text wiki.txt
      lowtide learn joint ./stories15M stories.lowtide --bits 2 --steps 400
      accelerate launch --multi_gpu --num_processes 4 -m lowtide.cli learn joint ./stories15M stories.lowtide --bits 2

    Weights, gradients and Adam's state shared out over the processes (FSDP2), for a model too large for one:

    \b
      accelerate launch --use_fsdp --fsdp_version 2 --num_processes 4 -m lowtide.cli learn joint MODEL OUT --bits 2.5
    """
    from lowtide.cli.progress import progress_bar
    from lowtide.learn.ipn_loss import Prices
    from lowtide.learn.ipn_train import IpnOptions
    from lowtide.learn.run_ipn import learn_joint

    options = IpnOptions(
        steps=steps,
        bits=(bits, max(bits + 0.5, min(bits + 1.5, 6.0)) if high is None else high),
        focus=focus,
        windows=windows,
        weight_rate=weight_rate,
        rank=rank,
        centroids=centroids,
        apart=apart,
        own_text=own_text,
        varied=varied,
        head=head,
        prices=Prices(consistency=consistency),
        check_every=check_every,
        seed=seed,
    )
    with progress_bar() as report:
        figures = learn_joint(model, out, options, artifact, text, tokens, None, resume, force, report, network, device)
    _tell(figures, json)


def _tell(figures: dict[str, Any], json: bool) -> None:
    from lowtide.cli.output import print_json

    if not figures:  # one of several processes, and not the first
        return
    if json:
        print_json(figures)
        return
    if figures["diverged"]:
        typer.echo(f"lowtide: the loss diverged at step {figures['steps']}; kept step {figures['best_step']}", err=True)
    points = zip(figures["before"], figures["after"], strict=True)
    held = "; ".join(f"{b['bits']:g} bits: {b['kl']:.4f} -> {a['kl']:.4f} (read {a['read']:.2f})" for b, a in points)
    print(
        f"{figures['out']}: held-out KL at {held}; step {figures['best_step']} of {figures['steps']}, "
        f"{figures['trained_tokens']} tokens, {figures['seconds']:.0f} s"
    )


def _budgets(text: str) -> tuple[float, float]:
    from lowtide.errors import LowtideError

    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise LowtideError(f"--bits {text}: give LOW,HIGH in bits per weight, e.g. 2,4") from None
    return low, high


def _range(text: str) -> tuple[float, float]:
    from lowtide.errors import LowtideError

    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise LowtideError(f"--sparsity {text}: give one number or LOW,HIGH, e.g. 0.4,0.8")
    return values[0], values[-1]
