"""`lowtide inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.options import Artifact, Json, Policy

if TYPE_CHECKING:
    from lowtide.format.groups import GroupTensors


def inspect(
    artifact: Artifact,
    bits: Annotated[
        str | None,
        typer.Option(help="Budget whose thresholds are shown. [default: the middle of those stored]", metavar="B"),
    ] = None,
    policy: Policy = None,
    json: Json = False,
) -> None:
    """Show what an artifact holds, layer by layer.

    Shapes, stored bits and side data per weight, outliers, exact channels, thresholds at one budget.

    \b
    Examples:
      lowtide inspect smollm2.lowtide
      lowtide inspect smollm2.lowtide --bits 2.5 --policy topk --json
    """
    from dataclasses import asdict

    from lowtide.cli.output import bits_label, print_json, print_table
    from lowtide.format.reader import open_artifact
    from lowtide.runtime.budget import parse_bits, policy_params

    opened = open_artifact(artifact)
    manifest = opened.manifest
    budget = manifest.budgets[len(manifest.budgets) // 2] if bits is None else parse_bits(bits)
    params = policy_params(opened, policy, budget)
    thresholds = dict(zip((n for n in opened.groups if n != "embed"), params.thresholds.tolist(), strict=True))
    rows = [describe(group, thresholds.get(name)) for name, group in opened.groups.items()]
    weights = sum(row["weights"] for row in rows)
    file_bytes = opened.stored_bytes()
    totals = {"weights": weights, "file_bytes": file_bytes, "file_bits_per_weight": 8 * file_bytes / weights}
    if json:
        budgets = {"budgets": manifest.budgets, "policies": manifest.policies, "slices": manifest.slices}
        shown = {"bits": bits_label(budget), "rule": params.rule}
        # JSON has no infinity: a slice that is never read has no threshold.
        for row in rows:
            row["thresholds"] = [t if abs(t) != float("inf") else None for t in row["thresholds"]]
        print_json({"config": asdict(opened.config), **totals, **budgets, "shown": shown, "groups": rows})
        return
    on_disk = f"{totals['file_bits_per_weight']:.3f} bits per weight on disk"
    print(f"{opened.config.architecture}: {weights / 1e6:.1f} M weights, {on_disk}")
    print(f"budgets {', '.join(map(bits_label, manifest.budgets))}; policies {', '.join(manifest.policies)}")
    print_table(
        ("group", "out x in", "stored", "side", "outliers", "exact", f"{params.rule} at {bits_label(budget)}"),
        (_cells(row) for row in rows),
    )


def describe(group: GroupTensors, thresholds: list[float] | None) -> dict[str, Any]:
    """The figures of one group; bits are per weight, thresholds empty for an embedding (it is only looked up)."""
    weights = group.weights()
    return {
        "group": group.name,
        "in": group.in_features,
        "out": [linear.out_features for linear in group.linears],
        "weights": weights,
        "stored_bits": sum(8 * tensor.nbytes for tensor in group.tensors().values()) / weights,
        "side_bits": 8 * group.side_bytes() / weights,
        "outliers": sum(len(linear.outliers()[0]) for linear in group.linears),
        "exact_channels": [int(c) for c in group.exact_channels],
        "thresholds": thresholds or [],
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["group"],
        f"{'+'.join(map(str, row['out']))} x {row['in']}",
        f"{row['stored_bits']:.3f}",
        f"{row['side_bits']:.3f}",
        f"{row['outliers']} ({100 * row['outliers'] / row['weights']:.2f} %)",
        str(len(row["exact_channels"])),
        " ".join(f"{t:.3g}" for t in row["thresholds"]) or "-",
    )
