"""`lowtide compress`."""

from __future__ import annotations

from typing import Annotated

import typer

from lowtide.cli.options import Calibration, Force, Json, Model, Out, Strict
from lowtide.cli.progress import progress_bar


def compress(
    model: Model,
    out: Out,
    calibration: Calibration = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="How many tokens of it. [default: 12 windows; 24 if made small]", metavar="N")
    ] = None,
    size_mb: Annotated[float | None, typer.Option(help="Make it this small, in MB, all files counted.")] = None,
    kl: Annotated[float | None, typer.Option(help="Make it as small as this KL allows, in nats per token.")] = None,
    step: Annotated[float | None, typer.Option(help="Quantisation step, for a run that must not search.")] = None,
    sparsity: Annotated[
        str | None, typer.Option(help='Prune this share of the decoder\'s weights first, or "auto".', metavar="S")
    ] = None,
    prune_rule: Annotated[str, typer.Option(help="Pruning rule; see `lowtide prune --help`.")] = "importance",
    structure: Annotated[str, typer.Option(help="unstructured, N:M, row, column or block:RxC.")] = "unstructured",
    allocation: Annotated[
        str | None,
        typer.Option(help="Sparsity of each layer: uniform, global or searched. [default: global if it may]"),
    ] = None,
    gradual: Annotated[bool, typer.Option("--gradual", help="Prune in steps: best and slowest.")] = False,
    strict: Strict = False,
    bits_max: Annotated[
        int | None, typer.Option(help="Bits per weight stored at most: 2, 4, 6 or 8. [default: 6; 8 if made small]")
    ] = None,
    coding: Annotated[str, typer.Option(help="Of the file: entropy (small) or packed.")] = "entropy",
    feedback: Annotated[
        str | None,
        typer.Option(help="Choose codes again so that errors cancel: low (for budgets up to 3 bits) or even."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled text.")] = 0,
    force: Force = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Mask rule to store thresholds for, e.g. topk or channel-norm:0,6; repeat for several."),
    ] = None,
    json: Json = False,
) -> None:
    """Compress a model into an artifact that runs at any budget.

    By default it is made to be read dynamically; with --size-mb, --kl, --step or --sparsity to be as small as it can.
    If it is interrupted, the same command goes on where it was.

    \b
    Examples:
      lowtide compress demo:smollm2 smollm2.lowtide
      lowtide compress ./Qwen2.5-1.5B qwen.lowtide --calibration wiki.txt --bits-max 6 --seed 1
      lowtide compress demo:smollm2 smollm2.lowtide --policy channel-norm --policy channel-norm:0,6
      lowtide compress ./SmolLM2-135M smol.lowtide --calibration wiki.txt --feedback low
      lowtide compress demo:smollm2 small.lowtide --size-mb 60 --calibration wiki.txt
      lowtide compress demo:smollm2 sparse.lowtide --sparsity 0.5 --kl 0.2 --calibration wiki.txt
    """
    from lowtide.cli.output import print_json
    from lowtide.compress import compress as run
    from lowtide.compress.thresholds import DEFAULT_POLICIES

    prune = None
    if sparsity is not None:
        from lowtide.cli.prune import parse_sparsity
        from lowtide.compress.prune.apply import PruneOptions

        prune = PruneOptions(
            rule=prune_rule,
            sparsity=parse_sparsity(sparsity),
            structure=structure,
            allocation=allocation or ("global" if structure == "unstructured" else "uniform"),
            sequential="group",
            gradual=gradual,
            strict=strict,
            seed=seed,
        )
    with progress_bar() as progress:
        figures = run(
            model,
            out,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            bits_max=bits_max,
            size_mb=size_mb,
            kl=kl,
            step=step,
            prune=prune,
            coding=coding,
            seed=seed,
            force=force,
            policies=policy or DEFAULT_POLICIES,
            feedback=feedback,
            progress=progress,
        )
    if json:
        print_json(figures)
        return
    entropy = figures.get("entropy")
    if entropy:
        coded, bound = entropy["coded_bits"] / 8e6, entropy["entropy_bits"] / 8e6
        print(f"digits: {coded:.2f} MB coded, {bound:.2f} MB by their entropy ({coded / bound:.4f} times)")
    if figures.get("held_out_kl") is not None:
        print(f"KL {figures['held_out_kl']:.4f} on held-out text, step {figures['step']:.3g}")
    print(
        f"{out}: {figures['weights'] / 1e6:.1f} M weights in {figures['file_bytes'] / 1e6:.1f} MB, "
        f"{figures['file_bits_per_weight']:.2f} bits per weight, {figures['seconds']:.0f} s"
    )
