"""Whether an artifact was made from a model."""

from __future__ import annotations

from lowtide.compress.sources import Source
from lowtide.errors import LowtideError
from lowtide.format.reader import Artifact


def check_same_model(artifact: Artifact, source: Source) -> None:
    """Refuse a reference that the artifact was not made from.

    Raises:
        LowtideError: the shapes or the weights differ.
    """
    name = source.name
    ours, theirs = artifact.config, source.config
    for key in (
        "architecture",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
    ):
        a, b = getattr(ours, key), getattr(theirs, key)
        if a != b:
            raise LowtideError(f"{name}: another model than the artifact's: {key} is {b}, not {a}; give its own source")
    if source.fingerprint() != artifact.manifest.model_id:
        raise LowtideError(
            f"{name}: the artifact was made from other weights of this shape; give the model it was made from"
        )
