"""A tiny artifact together with the dense model that it codes without loss.

The dense weights are what the digits, outliers and exact columns say when everything is read, so the dense model and a
full read of the artifact agree but for the coefficients' int8 rounding and the float16 KV cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.tiny import DEFAULT, Tiny, make_groups, make_norms, make_tokenizer

from lowtide.arch import LM_HEAD, ModelConfig
from lowtide.compress.sources import Source, open_source
from lowtide.format.groups import GroupTensors
from lowtide.format.writer import ArtifactWriter
from lowtide.kernels import reference_ops as ops


class TwinSource:
    """A `lowtide.compress.sources.Source` out of tensors in memory."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray[Any, Any]], files: dict[str, bytes]
    ) -> None:
        self.name = "twin"
        self.config = config
        self._tensors = dict(tensors)
        self._files = files

    def names(self) -> list[str]:
        return list(self._tensors)

    def has(self, tensor: str) -> bool:
        return tensor in self._tensors

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._tensors[name].astype(np.float32))

    def stored(self, name: str) -> np.ndarray[Any, Any]:
        return np.frombuffer(self._tensors[name].tobytes(), np.uint8)

    def tokenizer_files(self) -> dict[str, bytes]:
        return self._files

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            digest.update(name.encode() + self._tensors[name].tobytes())
        return digest.hexdigest()


def write_folder(source: TwinSource, folder: Path) -> None:
    """The source as a Hugging Face folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(source.config.to_hf()))
    tensors = {name: source.tensor(name).numpy() for name in source.names()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, data in source.tokenizer_files().items():
        (folder / name).write_bytes(data)


def make_twins(path: Path, base: Tiny = DEFAULT, folder: Path | None = None, **options: Any) -> tuple[Path, Source]:
    """An artifact at `path` and the source it was "made from"; options as for `make_artifact`.

    With a folder the source is written there as a Hugging Face model and opened from it.

    A tied model has no outliers: reading one as a row of the embedding and as a row of the head gives two different
    numbers, which no single dense tensor can hold.
    """
    tiny = dataclasses.replace(base, **options)
    if tiny.tied:
        tiny = dataclasses.replace(tiny, outliers=0.0)
    groups = [_without_mean(group, tiny) for group in make_groups(tiny)]
    norms = dict(make_norms(tiny))
    tensors: dict[str, np.ndarray[Any, Any]] = dict(norms)
    for group in groups:
        for i, linear in enumerate(group.linears):
            if group.name == "embed":
                rows = [ops.embedding_row(group, token) for token in range(linear.out_features)]
                tensors[f"{linear.name}.weight"] = np.stack(rows)
                continue
            tensors[f"{linear.name}.weight"] = group.dequantise(i, group.slices) + group.exact_part(i)
            if tiny.qkv_bias and group.name.endswith(".qkv"):
                tensors[f"{linear.name}.bias"] = linear.bias.astype(np.float32)
    files = make_tokenizer(tiny.vocab)
    source: Source = TwinSource(tiny.config(), tensors, files)
    assert tiny.tied or LM_HEAD + ".weight" in tensors
    if folder is not None:
        write_folder(TwinSource(tiny.config(), tensors, files), folder)
        source = open_source(folder)
    with ArtifactWriter(path) as writer:
        for group in groups:
            writer.add_group(group)
        for name, values in norms.items():
            writer.add_tensor(name, values)
        for name, data in files.items():
            writer.add_file(name, data)
        writer.finish(
            config=tiny.config(),
            slices=tiny.slices,
            budgets=list(tiny.budgets),
            policies=list(tiny.policies),
            model_id=source.fingerprint(),
            stats={"source": "twin"},
            ipn=tiny.ipn,
        )
    return path, source


def _without_mean(group: GroupTensors, tiny: Tiny) -> GroupTensors:
    """The group with mean 0, no folded bias, and no shrink at the full read."""
    own_bias = tiny.qkv_bias and group.name.endswith(".qkv")
    linears = [
        dataclasses.replace(linear, bias=linear.bias if own_bias else np.zeros_like(linear.bias))
        for linear in group.linears
    ]
    shrink = group.shrink.copy()
    shrink[-1] = 1.0
    return dataclasses.replace(group, mean=np.zeros_like(group.mean), shrink=shrink, linears=linears)
