"""All processes of a training run, and the one that goes on from its checkpoint, multiply in the same type."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lowtide.compress import products
from lowtide.learn.parallel import Parallel

NAME = "products"


def agree(team: Parallel, work: Path, device: torch.device = products.CPU) -> str:
    """Set the type of products on a device; returns its name.

    LOWTIDE_PRODUCTS comes first, then what the run in `work` began with, then what the first process finds fastest.

    Raises:
        LowtideError: a type that is unknown.
    """
    kept = work / NAME
    if team.main:
        if kept.exists() and not os.environ.get(products.VARIABLE):
            products.use(kept.read_text().strip(), f"{kept}: products ")
            products.use(products.on_device(products.name(), device))
        kept.write_text(products.name() + "\n")
    names = list(products.TYPES)
    here = names.index(products.name()) if team.main else 0
    found = names[int(team.first(torch.tensor(here)))]
    products.use(found)
    return found
