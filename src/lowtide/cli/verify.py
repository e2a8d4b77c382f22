"""`lowtide verify`."""

from __future__ import annotations

from lowtide.cli.options import Artifact, Json


def verify(artifact: Artifact, json: Json = False) -> None:
    """Check every hash and value of an artifact.

    The exit code is 2 if anything is wrong.

    \b
    Examples:
      lowtide verify smollm2.lowtide
      lowtide verify smollm2.lowtide --json
    """
    from lowtide.cli.output import print_json
    from lowtide.format.reader import open_artifact

    opened = open_artifact(artifact, verify="full")
    manifest, size = opened.manifest, opened.stored_bytes()
    if json:
        figures = {"files": len(manifest.files), "tensors": len(manifest.tensors), "bytes": size}
        print_json({"ok": True, "format_version": manifest.format_version, **figures})
        return
    print(f"ok: {len(manifest.files)} files, {len(manifest.tensors)} tensors, {size / 1e6:.1f} MB, all hashes match")
