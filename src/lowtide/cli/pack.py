"""`lowtide pack`."""

from __future__ import annotations

from typing import Annotated

import typer

from lowtide.cli.options import Artifact, Force, Json, Out


def pack(
    artifact: Artifact,
    out: Out,
    coding: Annotated[
        str | None, typer.Option(help="entropy (small) or packed (opens without an image). [default: as it is]")
    ] = None,
    bits_max: Annotated[int | None, typer.Option(help="Bits per weight to keep: 2, 4, 6 or 8. [default: all]")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Store an artifact another way: coded or packed, or with fewer bits.

    A coded artifact's model.safetensors may be a partial download: its beginning holds the whole model at fewer bits.

    \b
    Examples:
      lowtide pack smollm2.lowtide smollm2-packed.lowtide --coding packed
      lowtide pack smollm2.lowtide smollm2-4bit.lowtide --bits-max 4
    """
    from lowtide.cli.output import print_json
    from lowtide.cli.progress import progress_bar
    from lowtide.format.reader import open_artifact
    from lowtide.format.repack import repack

    with progress_bar() as progress:
        manifest = repack(
            artifact, out, coding=coding, bits_max=bits_max, force=force,
            report=lambda done, total: progress("entropy", done, total),
        )  # fmt: skip
    size = open_artifact(out).stored_bytes()
    if json:
        print_json({"out": str(out), "coding": manifest.coding, "slices": manifest.slices, "file_bytes": size})
        return
    print(f"{out}: {size / 1e6:.1f} MB, {manifest.coding}, {2 * manifest.slices} bits per weight at most")
