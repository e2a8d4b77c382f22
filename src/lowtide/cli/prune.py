"""`lowtide prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.options import Calibration, Json, Model, Strict


def prune(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to make; pruned weights are zeros in it.")],
    rule: Annotated[
        str, typer.Option(help="magnitude, random, wanda, sparsegpt, or importance (ours).")
    ] = "importance",
    sparsity: Annotated[
        str, typer.Option(help='Share of the weights that go, 0 to below 1, or "auto".', metavar="S")
    ] = "0.5",
    structure: Annotated[
        str, typer.Option(help="unstructured, N:M (e.g. 2:4), row, column or block:RxC.")
    ] = "unstructured",
    allocation: Annotated[
        str, typer.Option(help="Among layers: uniform, erk, global, or searched (slow).")
    ] = "uniform",
    calibration: Calibration = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="How many tokens of it. [default: 12 windows]", metavar="N")
    ] = None,
    updates: Annotated[
        bool | None,
        typer.Option("--updates/--no-updates", help="Best values for the weights that stay. [default: as the rule]"),
    ] = None,
    dsnot: Annotated[bool, typer.Option("--dsnot", help="Refine the mask by swapping weights (DSnoT).")] = False,
    sequential: Annotated[
        str, typer.Option(help="Whose inputs layers see: no (the dense model's), block or group (of the pruned one).")
    ] = "no",
    gradual: Annotated[
        bool, typer.Option("--gradual/--no-gradual", help="Remove in steps with updates between: best and slowest.")
    ] = False,
    network: Annotated[
        str | None, typer.Option(help="Importance network that --gradual goes by.", metavar="FILE")
    ] = None,
    strict: Strict = False,
    dtype: Annotated[str | None, typer.Option(help="f16 or f32. [default: f32 if the model is, else f16]")] = None,
    seed: Annotated[int, typer.Option(help="Of sampled text, random masks and the search.")] = 0,
    work: Annotated[
        Path | None, typer.Option(help="Folder that keeps the calibration, to go on and to try other rules.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model folder OUT if it is there.")] = False,
    json: Json = False,
) -> None:
    """Prune a model's linear layers and write it as a Hugging Face folder that any tool reads.

    \b
    Examples:
      lowtide prune demo:smollm2 smollm2-half --sparsity 0.5
      lowtide prune ./Qwen2.5-1.5B qwen-24 --rule sparsegpt --structure 2:4 --calibration wiki.txt
      lowtide prune demo:smollm2 smollm2-auto --sparsity auto --allocation global --sequential group
      lowtide prune demo:smollm2 smollm2-best --sparsity 0.6 --gradual
    """
    import sys

    from lowtide.cli.output import print_json
    from lowtide.cli.progress import progress_bar
    from lowtide.compress.dense import DenseModel
    from lowtide.compress.prune.apply import PruneOptions, layer_sizes, prune_model
    from lowtide.compress.prune.folder import check_target, dtype_of, write_folder
    from lowtide.compress.sources import open_source
    from lowtide.compress.text import sampled_windows, windows_of_file

    options = PruneOptions(
        rule=rule,
        sparsity=parse_sparsity(sparsity),
        structure=structure,
        allocation=allocation,
        updates=updates,
        dsnot=dsnot,
        sequential=sequential,
        gradual=gradual,
        network=network,
        strict=strict,
        seed=seed,
    )
    check_target(out, force)
    source = open_source(model)
    layer_sizes(source, structure)  # refuses before the long work begins
    dtype_of(source, dtype)
    with progress_bar() as progress:
        if calibration is None:
            ids = sampled_windows(DenseModel(source), seed, lambda done, total: progress("sample", done, total))
        else:
            ids = windows_of_file(source, calibration, tokens=calibration_tokens)
        pruned, report = prune_model(source, ids, options, work=work, progress=progress)
        size = write_folder(pruned, out, dtype, force)
    for warning in report["warnings"]:
        print(f"lowtide: warning: {warning}", file=sys.stderr)
    if json:
        print_json(report | {"out": str(out), "file_bytes": size})
        return
    print(
        f"{out}: {report['zeros'] / 1e6:.2f} M of {report['weights'] / 1e6:.2f} M weights of the linear layers are "
        f"zero ({1 - report['density']:.1%}), {size / 1e6:.1f} MB, {report['seconds']:.0f} s"
    )


def parse_sparsity(text: str) -> float | None:
    """The number of `--sparsity`; None for "auto".

    Raises:
        LowtideError: neither.
    """
    from lowtide.errors import LowtideError

    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise LowtideError(f'--sparsity {text}: must be a number from 0 to below 1, or "auto"') from None
