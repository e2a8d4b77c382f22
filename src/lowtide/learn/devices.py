"""What training runs on: the processor, or a GPU through torch."""

from __future__ import annotations

import os

import torch

from lowtide.errors import LowtideError
from lowtide.learn.parallel import ON

NAMES = ("auto", "cpu", "cuda")
"""`auto`: the first GPU where torch finds one, else the processor. ROCm's torch calls its GPUs cuda as well."""


def device_for(name: str, processes: int = 1) -> torch.device:
    """The device that a name of NAMES means.

    Several processes are on the processor (`lowtide.learn.parallel`), and so is one that was launched so
    (`accelerate launch --cpu`).

    Raises:
        LowtideError: another name, or a GPU that torch does not find or that several processes cannot share.
    """
    if name not in NAMES:
        raise LowtideError(f"--device {name}: known are {', '.join(NAMES)}")
    if name == "cuda" and processes > 1:
        raise LowtideError(f"--device cuda: {processes} processes train on the processor; leave it out, or start one")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise LowtideError("--device cuda: torch finds no GPU here; install a torch that was built for it")
    kept_off = name == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ON
    return torch.device("cuda" if found and name != "cpu" and processes == 1 and not kept_off else "cpu")


def name_of(device: torch.device) -> str:
    """For figures: what the GPU calls itself, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
