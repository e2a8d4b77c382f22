"""Tiny synthetic artifacts: random weights, everything else as a real one. Built in milliseconds.

`make_artifact(tmp_path / "tiny", slices=2, tied=False)` returns the folder; `Tiny` lists the options.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.arch import GroupSpec, ModelConfig, group_specs, norm_specs
from lowtide.format import codec
from lowtide.format.groups import GroupTensors, IpnTensors, LinearTensors, ipn_shapes
from lowtide.format.manifest import IpnInfo, has_ipn
from lowtide.format.writer import ArtifactWriter

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Tiny:
    """What `make_artifact` takes as keywords. The defaults have every irregularity: exact channels, outliers, padding.

    Attributes:
        qkv_bias: True makes a qwen2, False a llama.
        exact: exact channels of each group.
        outliers: share of weights kept as outliers.
        force: passed to ArtifactWriter.
        zero, coding: fields of the manifest.
        features: of the IPN, which is there if one of the policies is the rule `ipn`.
        centroids, key_channels: of the IPN; 0 centroids are none.
    """

    hidden: int = 48
    intermediate: int = 80
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 12
    vocab: int = 130
    tied: bool = True
    qkv_bias: bool = False
    slices: int = 3
    exact: int = 2
    outliers: float = 0.02
    budgets: tuple[float, ...] = (4.0, 5.0, 6.0)
    policies: tuple[str, ...] = ("channel-norm",)
    max_position: int = 64
    tokenizer: bool = True
    seed: int = 0
    force: bool = False
    zero: bool = False
    coding: str = "packed"
    features: int = 16
    centroids: int = 0
    key_channels: int = 16
    factors: bool = False

    @property
    def ipn(self) -> IpnInfo | None:
        """What the manifest says about the IPN."""
        if not has_ipn(list(self.policies)):
            return None
        return {
            "features": self.features,
            "low": self.budgets[0],
            "high": self.budgets[-1],
            "centroids": self.centroids,
            "key_channels": self.key_channels if self.centroids else 0,
            "factors": int(self.factors),
        }

    def config(self) -> ModelConfig:
        return ModelConfig(
            architecture="qwen2" if self.qkv_bias else "llama",
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_eps=1e-5,
            rope_theta=10000.0,
            max_position=self.max_position,
            tied=self.tied,
            qkv_bias=self.qkv_bias,
            bos_token_id=1,
            eos_token_ids=(2,),
        )


DEFAULT = Tiny()

#: Sizes that are multiples of nothing.
ODD = Tiny(hidden=41, intermediate=67, layers=1, heads=3, kv_heads=1, head_dim=10, vocab=101, tied=False)


def make_artifact(path: str | Path, base: Tiny = DEFAULT, **options: Any) -> Path:
    """Write a tiny artifact.

    Args:
        path: folder to make.
        base: options to start from, e.g. `ODD`.
        options: fields of `Tiny` to change.

    Returns:
        The folder.
    """
    tiny = replace(base, **options)
    config = tiny.config()
    with ArtifactWriter(path, force=tiny.force) as writer:
        for group in make_groups(tiny):
            writer.add_group(group)
        for name, values in make_norms(tiny):
            writer.add_tensor(name, values)
        if tiny.tokenizer:
            for name, data in make_tokenizer(tiny.vocab).items():
                writer.add_file(name, data)
        writer.finish(
            config=config,
            slices=tiny.slices,
            budgets=list(tiny.budgets),
            policies=list(tiny.policies),
            model_id="0123456789abcdef" * 4,
            stats={"source": "tiny", "seed": tiny.seed},
            zero=tiny.zero,
            coding=tiny.coding,
            ipn=tiny.ipn,
        )
    return Path(path)


def make_groups(tiny: Tiny) -> Iterator[GroupTensors]:
    """Random, valid groups of the whole model, in the order of `arch.group_specs`."""
    rng = np.random.default_rng(tiny.seed)
    for spec in group_specs(tiny.config()):
        yield make_group(spec, tiny, rng)


def make_norms(tiny: Tiny) -> Iterator[tuple[str, F32]]:
    """(name, float32 [hidden]) of every norm, around 1."""
    rng = np.random.default_rng(tiny.seed + 1)
    for name, length in norm_specs(tiny.config()):
        yield name, rng.normal(1.0, 0.1, length).astype(np.float32)


def make_group(spec: GroupSpec, tiny: Tiny, rng: np.random.Generator) -> GroupTensors:
    """One random, valid group; weights have a variance of 1 / in."""
    inputs = spec.in_features
    exact = np.sort(rng.choice(inputs, min(tiny.exact, inputs), replace=False)).astype(np.int32)
    mean = rng.normal(0, 0.1 if spec.has_thresholds else 0.0, inputs).astype(np.float16)
    importance = np.abs(rng.normal(1, 0.4, inputs))
    importance[exact] = 0
    importance /= max(float(np.sqrt(np.mean(importance**2))), 1e-6)
    mean[exact] = 0
    col_scale = rng.uniform(0.5, 1.5, inputs).astype(np.float16)
    col_scale[exact] = 1
    has_bias = tiny.qkv_bias and spec.name.endswith(".qkv")
    linears = []
    for linear in spec.linears:
        dense = rng.normal(0, inputs**-0.5, (linear.out_features, inputs)).astype(np.float32)
        own_bias = rng.normal(0, 0.1 if has_bias else 0.0, linear.out_features)
        bias = own_bias + dense @ mean.astype(np.float32)
        linears.append(_linear(linear.name, dense, bias, exact, col_scale, tiny, rng))
    shrink = np.linspace(0.9, 1.0, tiny.slices, dtype=np.float32)
    return GroupTensors(
        zero=tiny.zero,
        name=spec.name,
        in_features=inputs,
        slices=tiny.slices,
        mean=mean,
        col_scale=col_scale,
        importance=importance.astype(np.float16),
        shrink=shrink,
        exact_channels=exact,
        thresholds=_thresholds(spec, tiny),
        linears=linears,
        ipn=make_ipn(spec, tiny, exact) if tiny.ipn else None,
    )


def make_ipn(spec: GroupSpec, tiny: Tiny, exact: NDArray[np.int32]) -> IpnTensors | None:
    """A random IPN whose offsets spread over a few units of log2, some of them clipped. From a generator of its own, so
    that everything else in the artifact is the same without it."""
    sizes = (tiny.features, len(tiny.budgets), tiny.centroids, tiny.key_channels, tiny.factors)
    shapes = ipn_shapes(spec.name, spec.in_features, *sizes)
    if not shapes:
        return None
    rng = np.random.default_rng([tiny.seed, *spec.name.encode()])
    importance = np.abs(rng.normal(1, 0.5, spec.in_features))
    importance[exact] = 0
    made = IpnTensors(importance=importance.astype(np.float16))
    if "ipn_mix" in shapes:
        made.mix = rng.normal(0, 2 / tiny.features**0.5, shapes["ipn_mix"]).astype(np.float32)
        made.gain = np.linspace(0.5, 1.0, len(tiny.budgets), dtype=np.float32)
    if "ipn_probe" in shapes:
        made.probe = rng.integers(-127, 128, shapes["ipn_probe"]).astype(np.int8)
        made.scale = (rng.uniform(0.5, 2, tiny.features) / 73 / spec.in_features**0.5).astype(np.float32)
        made.bias = rng.normal(0, 0.5, tiny.features).astype(np.float32)
    if "ipn_factor" in shapes:
        made.factor = np.float32([1.7, 1.0, 0.6] if spec.name.startswith("layers.0.") else [1.5, 1.0, 1.0])
    if "ipn_centroids" in shapes:
        _add_centroids(made, shapes, exact, rng)
    return made


def _add_centroids(
    made: IpnTensors, shapes: dict[str, tuple[int, ...]], exact: NDArray[np.int32], rng: np.random.Generator
) -> None:
    """Random centroids, about as far from the mean as inputs are, and keys that find each of them now and then."""
    count, inputs = shapes["ipn_centroids"]
    made.centroids = rng.integers(-127, 128, (count, inputs)).astype(np.int8)
    step = rng.uniform(0.3, 1.0, inputs) / 127
    step[exact] = 0
    made.step = step.astype(np.float16)
    if "ipn_keys" in shapes:
        size = shapes["ipn_channels"][0]
        made.channels = np.sort(rng.choice(inputs, size, replace=False)).astype(np.int32)
        made.keys = rng.integers(-127, 128, (size, count)).astype(np.int8)
        made.key_scale = (rng.uniform(0.8, 1.2, count) / 73).astype(np.float32)
        made.key_bias = rng.normal(0, 0.3, count).astype(np.float32)


def _linear(
    name: str,
    dense: F32,
    bias: NDArray[np.float64],
    exact: NDArray[np.int32],
    col_scale: NDArray[np.float16],
    tiny: Tiny,
    rng: np.random.Generator,
) -> LinearTensors:
    out, inputs = dense.shape
    row_scale = (dense.std(axis=1) * rng.uniform(0.9, 1.3, out)).astype(np.float16)
    candidates = np.setdiff1d(np.arange(out * inputs), (np.arange(out)[:, None] * inputs + exact).ravel())
    picked = rng.choice(candidates, int(tiny.outliers * len(candidates)), replace=False)
    rows, cols = np.divmod(picked, inputs)
    values = (dense[rows, cols] + np.sign(dense[rows, cols]) * 3 * inputs**-0.5).astype(np.float16)
    small = dense.copy()
    small[rows, cols] = 0
    small /= row_scale.astype(np.float32)[:, None] * col_scale.astype(np.float32)
    top = 4**tiny.slices - 1
    digits = np.clip(np.rint(small * 4 ** (tiny.slices - 1) + top / 2), 0, top).astype(np.uint8)
    ptr, row, gap, value = codec.pack_outliers(rows, cols, values, out)
    return LinearTensors(
        name=name,
        weight=codec.pack_digits(digits, tiny.slices),
        row_scale=row_scale,
        bias=bias.astype(np.float16),
        exact=np.ascontiguousarray(dense[:, exact].T.astype(np.float16)),
        outlier_ptr=ptr,
        outlier_row=row,
        outlier_gap=gap,
        outlier_value=value,
        out_features=out,
    )


def _thresholds(spec: GroupSpec, tiny: Tiny) -> F32:
    """Plausible tables: the higher the budget, the more channels pass; a dense policy ignores them."""
    if not spec.has_thresholds:
        return np.zeros((0, 0, tiny.slices), np.float32)
    table = np.zeros((len(tiny.policies), len(tiny.budgets), tiny.slices), np.float32)
    for p, policy in enumerate(tiny.policies):
        for b, budget in enumerate(tiny.budgets):
            for s in range(tiny.slices):
                share = max(0.05, 0.9 - 0.35 * s - 0.15 * (tiny.budgets[-1] - budget))
                table[p, b, s] = {
                    "topk": round(share * spec.in_features),
                    "statistical-topk": 0.8 - 2 * share,
                    "dense": 0.0,
                }.get(policy.partition(":")[0], 0.8 * (1 - share))
    return table


def make_tokenizer(vocab: int) -> dict[str, bytes]:
    """A character-level `tokenizer.json` of exactly `vocab` tokens (at least 99) and its config."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens = ["<unk>", "<s>", "</s>", "\n", *(chr(code) for code in range(32, 127))]
    merges: list[tuple[str, str]] = []
    for pair in ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd"):
        if len(tokens) < vocab:
            tokens.append(pair)
            merges.append((pair[0], pair[1]))
    tokens += [f"<extra_{n}>" for n in range(vocab - len(tokens))]
    if len(tokens) != vocab:
        raise ValueError(f"a tiny tokenizer needs at least {len(tokens)} tokens, not {vocab}")
    model = models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    }
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }
