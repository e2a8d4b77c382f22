"""`lowtide inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.options import Artifact, Json, Policy

if TYPE_CHECKING:
    from lowtide.format.groups import GroupTensors
    from lowtide.format.manifest import Manifest
    from lowtide.kernels.types import PolicyParams


def inspect(
    artifact: Artifact,
    bits: Annotated[
        str | None,
        typer.Option(help="Budget whose thresholds are shown. [default: the middle of those stored]", metavar="B"),
    ] = None,
    policy: Policy = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Density, step, entropy, coded bits and importance of every layer.")
    ] = False,
    thresholds: Annotated[
        bool,
        typer.Option("--thresholds", help="Thresholds of every layer and group as log2, and what ipn adds to them."),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write these with every mask as a page.", metavar="FILE")] = None,
    png: Annotated[Path | None, typer.Option(help="Write every mask as a picture.", metavar="FOLDER")] = None,
    json: Json = False,
) -> None:
    """Show what an artifact holds, group by group and layer by layer.

    Shapes, stored bits and side data per weight, outliers, exact channels, thresholds at one budget. With --layers what
    static coding made of each layer: the importance histogram counts input channels by octave around the rms. With
    --thresholds, under the rule ipn, also the gain at that budget, and the norm and the constant of the mix that makes
    a token's offset.

    \b
    Examples:
      lowtide inspect smollm2.lowtide
      lowtide inspect smollm2.lowtide --bits 2.5 --policy topk --json
      lowtide inspect smollm2.lowtide --layers --html smollm2.html --png masks
      lowtide inspect smollm2.lowtide --thresholds --policy channel-norm --bits 3
    """
    from dataclasses import asdict

    from lowtide.cli.output import bits_label, print_json, print_table
    from lowtide.format.reader import open_artifact
    from lowtide.runtime.budget import parse_bits, policy_params

    opened = open_artifact(artifact)
    manifest = opened.manifest
    budget = middle_budget(manifest, policy) if bits is None else parse_bits(bits)
    params = policy_params(opened, policy, budget)
    budget = budget if params.bits is None else params.bits
    table = dict(zip((n for n in opened.groups if n != "embed"), params.thresholds.tolist(), strict=True))
    rows = [describe(group, table.get(name)) for name, group in opened.groups.items()]
    cuts = threshold_rows(opened.groups, params) if thresholds else []
    found = _layers(opened, html, png) if layers or html or png else []
    weights = sum(row["weights"] for row in rows)
    file_bytes = opened.stored_bytes()
    totals = {"weights": weights, "file_bytes": file_bytes, "file_bits_per_weight": 8 * file_bytes / weights}
    if json:
        budgets = {"budgets": manifest.budgets, "policies": manifest.policies, "slices": manifest.slices}
        if manifest.ipn is not None:
            budgets["ipn"] = dict(manifest.ipn)
        shown = {"bits": bits_label(budget), "rule": params.rule}
        # JSON has no infinity: a slice that is never read has no threshold.
        for row in rows:
            row["thresholds"] = [t if abs(t) != float("inf") else None for t in row["thresholds"]]
        extra = {"thresholds": cuts} if thresholds else {}
        figures = {**totals, **budgets, "shown": shown, "groups": rows, "layers": found, **extra}
        print_json({"config": asdict(opened.config), **figures})
        return
    on_disk = f"{totals['file_bits_per_weight']:.3f} bits per weight on disk"
    print(f"{opened.config.architecture}: {weights / 1e6:.1f} M weights, {on_disk}")
    print(f"budgets {', '.join(map(bits_label, manifest.budgets))}; policies {', '.join(manifest.policies)}")
    if manifest.ipn is not None and manifest.ipn["centroids"]:
        told = f"told apart by {manifest.ipn['key_channels']} channels"
        print(f"ipn: {manifest.ipn['centroids']} centroids of each group's inputs, {told}")
    if manifest.ipn is not None and manifest.ipn["factors"]:
        print("ipn: thresholds of their own for q, k and v (--thresholds shows them)")
    print_table(
        ("group", "out x in", "stored", "side", "outliers", "exact", f"{params.rule} at {bits_label(budget)}"),
        (_cells(row) for row in rows),
    )
    if found:
        print_table(
            ("layer", "density", "step", "entropy", "coded", "importance by octave"),
            (_layer_cells(row) for row in found),
        )
    if cuts:
        steps = [f"{cuts[0]['unit']} {s + 1}" for s in range(manifest.slices)]
        added = ["gain", "mix norm", "mix constant"] if params.gains is not None else []
        added += ["q, k, v"] if "apart" in cuts[0] else []
        print_table(("group", *steps, *added), (_threshold_cells(row) for row in cuts))


def middle_budget(manifest: Manifest, policy: str | None) -> float:
    """The middle of the stored budgets; under the rule `ipn` of those it was trained for, so that nothing warns."""
    stored, ipn = manifest.budgets, manifest.ipn
    if ipn is not None and (policy or manifest.policies[0]).partition(":")[0].strip() == "ipn":
        stored = [b for b in stored if ipn["low"] <= b <= ipn["high"]] or stored
    return stored[len(stored) // 2]


def threshold_rows(groups: dict[str, GroupTensors], params: PolicyParams) -> list[dict[str, Any]]:
    """The thresholds of every group but `embed`.

    Returns:
        group, unit ("log2", or for rules that do not compare scores "count" or "z"), theta (one for each slice in that
        unit; None where a slice is never read, and -64 for log2 where it always is); under the rule `ipn` gain,
        mix_norm (Euclidean, over the features) and mix_constant, None for the head; where q, k and v go apart, log2 of
        what their thresholds are the group's times, None for other groups.
    """
    import numpy as np

    unit = {"topk": "count", "statistical-topk": "z"}.get(params.rule, "log2")
    apart = any(group.ipn is not None and group.ipn.factor is not None for group in groups.values())
    rows: list[dict[str, Any]] = []
    for i, (name, group) in enumerate((n, g) for n, g in groups.items() if n != "embed"):
        cuts = params.thresholds[i].astype(np.float64)
        if unit == "log2":
            cuts = np.log2(np.maximum(cuts, 2.0**-64))
        row: dict[str, Any] = {
            "group": name,
            "unit": unit,
            "theta": [float(t) if np.isfinite(t) else None for t in cuts],
        }
        if params.gains is not None:
            mix = None if group.ipn is None else group.ipn.mix
            row["gain"] = None if mix is None else float(params.gains[i])
            row["mix_norm"] = None if mix is None else float(np.linalg.norm(mix[:-1]))
            row["mix_constant"] = None if mix is None else float(mix[-1])
            factor = None if group.ipn is None else group.ipn.factor
            if apart:
                row["apart"] = None if factor is None else np.log2(factor).tolist()
        rows.append(row)
    return rows


def _threshold_cells(row: dict[str, Any]) -> list[str]:
    def theta(cut: float | None) -> str:
        if cut is None:
            return "never"
        if row["unit"] != "log2":
            return f"{cut:.4g}"
        return "always" if cut == -64 else f"{cut:.2f}"

    def shown(value: float | list[float] | None) -> str:
        if isinstance(value, list):
            return " ".join(f"{part:+.2f}" for part in value)
        return "-" if value is None else f"{value:.3f}"

    added = [row[key] for key in ("gain", "mix_norm", "mix_constant", "apart") if key in row]
    return [row["group"], *map(theta, row["theta"]), *map(shown, added)]


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


def _layers(opened: Any, html: Path | None, png: Path | None) -> list[dict[str, Any]]:
    """Figures of every layer; writes the page and the pictures that are wanted."""
    from lowtide.cli.progress import progress_bar
    from lowtide.format.survey import layer_figures, mask_picture
    from lowtide.runtime import report

    known = written_figures(opened.manifest.stats)
    members = [(group, i) for group in opened.groups.values() for i in range(len(group.linears))]
    rows, pictures = [], []
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
    with progress_bar() as progress:
        for done, (group, index) in enumerate(members):
            name = group.linears[index].name
            rows.append(layer_figures(group, index, known.get(name)))
            if html is not None or png is not None:
                pictures.append(mask_picture(group, index))
            if png is not None:
                (png / f"{name}.png").write_bytes(report.png(pictures[-1]))
            progress("inspect", done + 1, len(members))
    if html is not None:
        size = (
            f"{opened.stored_bytes() / 1e6:.1f} MB, {opened.manifest.coding}, up to {2 * opened.manifest.slices} bits"
        )
        report.write_page(
            html, str(opened.manifest.stats.get("source", opened.path.name)), size, zip(rows, pictures, strict=True)
        )
    return rows


def written_figures(stats: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Figures of layers that the writer noted in the manifest's free part; what does not look like them is left out."""
    entropy = stats.get("entropy")
    layers = entropy.get("layers") if isinstance(entropy, dict) else None
    keys = ("density", "entropy_bits", "coded_bits")
    return {
        name: entry
        for name, entry in (layers.items() if isinstance(layers, dict) else ())
        if isinstance(entry, dict) and all(isinstance(entry.get(key), (int, float)) for key in keys)
    }


def _layer_cells(row: dict[str, Any]) -> tuple[str, ...]:
    coded = "-" if row["coded_bits"] is None else f"{row['coded_bits']:.3f}"
    histogram = " ".join(map(str, row["importance_histogram"]))
    return row["layer"], f"{row['density']:.3f}", f"{row['step']:.3g}", f"{row['entropy_bits']:.3f}", coded, histogram


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
