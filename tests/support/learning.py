"""What tests of whole training runs share."""

from __future__ import annotations

import numpy as np

from lowtide.format.reader import open_artifact
from lowtide.learn.ipn_train import IpnOptions

FAST = IpnOptions(steps=6, bits=(4.0, 6.0), windows=3, features=4, check_every=3)


def tensors(folder):
    artifact = open_artifact(folder)
    found = {}
    for group in artifact.groups.values():
        found |= {n: np.array(t) for n, t in group.tensors().items()}
    return found
