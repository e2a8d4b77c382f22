"""Maps from text features to weights in few bits: the features themselves are not stored.

    from lowtide import keyed

    keyed.build(["tide", "harbour"], [0.5, -1.25], "weights.ltk")
    store = keyed.open("weights.ltk")
    store.get("tide")                       # 0.5
    store.get_many(["harbour", "unheard"])  # [-1.25, 0.0], 0 for what is not stored

A feature that is not stored gets a weight that is not its own with a small, known chance: see docs/fingerprint.md.
`lowtide.keyed.ngram` and `lowtide.keyed.classifier` are built on it.
"""

from lowtide.keyed.store import KeyedStore, build, open_store

open = open_store  # noqa: A001  # keyed.open, as gzip.open

__all__ = ["KeyedStore", "build", "open", "open_store"]
