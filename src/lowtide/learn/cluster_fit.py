"""Finding the clusters of every group's inputs (`lowtide.learn.clusters`), layer by layer, on the dense model's own.

k-means on inputs in units of what an error in them does: `(x_j - mean_j) v_j`, with the importance v that
`channel-norm` goes by. Then logistic regression on the channels that differ most between clusters learns to tell them
apart, and the middles of all groups are taken over the tokens that it puts together: what counts is the cluster that an
engine finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lowtide.compress.dense import Block, DenseModel, decoder_block, rms_norm, rope_tables
from lowtide.errors import LowtideError
from lowtide.format.reader import Artifact
from lowtide.learn.clusters import Keys
from lowtide.learn.graded import FEATURE_GROUPS

TOKENS, BYTES = (8_192, 65_536), 3 << 29
"""Tokens that are looked at: so many at least and at most, between them what a block's inputs leave of so much
memory in bfloat16."""
MEMBERS, DRAWN = 384, 160
"""Tokens of a cluster on average, where that is more than those, and how many of them k-means goes by."""
KEY_CHANNELS = 32
"""Channels that tell clusters apart, at most; a multiple of 16, which is what engines take at once."""
SAMPLE, ROUNDS = 20_000, 15
"""Tokens, at least, and rounds of k-means."""
STEPS, BATCH, RATE = 400, 1024, 0.03
"""Of the logistic regression."""
LEVELS = 15
"""Centroids are stored as whole numbers up to it: with the weights' products made of what is stored, rounding them
costs nothing but a little distance."""
REACH = 4.0
"""Times the root mean square of a channel's centroids that LEVELS stands for, at most."""
MIDDLE, REWEIGHTED, PRIOR = 3.0, 3, 1.0
"""Budget whose threshold says what is near, rounds of reweighting, and tokens at the mean of all that every cluster is
given."""
WIDEST = 16.0
"""Times the median channel's standard deviation that a channel of the keys may have: they are stored in 8 bits."""
Stored = dict[str, NDArray[Any]]


def tokens_for(dense: DenseModel, count: int) -> int:
    """How many tokens to look at for so many clusters."""
    config, (least, most) = dense.config, TOKENS
    values = 3 * config.hidden_size + config.intermediate_size
    return max(least, min(max(most, MEMBERS * count), BYTES // (2 * values)))


def key_channels(inputs: int) -> int:
    """How many of so many channels keys look at."""
    return min(KEY_CHANNELS, inputs // 16 * 16)


@torch.no_grad()
def fit_clusters(
    artifact: Artifact,
    dense: DenseModel,
    ids: torch.Tensor,
    count: int,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Stored]:
    """Clusters of every group but `embed`, as they are stored.

    Args:
        artifact: its importance and means.
        dense: whose inputs they are.
        ids: i64 [B, N].
        count: K.
        seed: of everything drawn.
        report: `report(done, total)`.

    Raises:
        LowtideError: there are fewer tokens than clusters.
    """
    if not key_channels(dense.config.hidden_size):
        raise LowtideError(f"--centroids {count}: the model's {dense.config.hidden_size} channels are too few; give 0")
    if ids.numel() < count:
        raise LowtideError(f"--centroids {count}: the text has {ids.numel()} tokens; give a longer one, or fewer")
    config, generator = dense.config, torch.Generator().manual_seed(seed)
    rope = rope_tables(config, 0, ids.shape[1], dense.device)
    found: dict[str, Stored] = {}
    x = dense.embed(ids)
    for index in range(config.num_layers):
        inputs: dict[str, torch.Tensor] = {}
        x = _through(dense, dense.block(index), x, rope, inputs)
        for source in ("qkv", "gate_up"):
            served = [kind for kind in inputs if FEATURE_GROUPS[kind] == source]
            named = {f"layers.{index}.{kind}": inputs[kind] for kind in served}
            found |= _fit(artifact, f"layers.{index}.{source}", named, count, generator)
        report(index + 1, config.num_layers + 1)
    last = rms_norm(x, dense.final_norm, config.rms_eps).flatten(0, 1)
    found |= _fit(artifact, "head", {"head": last}, count, generator)
    report(config.num_layers + 1, config.num_layers + 1)
    return found


def _through(
    dense: DenseModel,
    block: Block,
    x: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    inputs: dict[str, torch.Tensor],
) -> torch.Tensor:
    """One block: x f32 [B, N, D] -> the same; notes the inputs of its groups, bfloat16 [B * N, in]."""
    seen: dict[str, list[torch.Tensor]] = {}

    def apply(kind: str, x: torch.Tensor) -> torch.Tensor:
        seen.setdefault(kind, []).append(x.flatten(0, 1).to(torch.bfloat16))
        return block.apply(kind, x)

    norms = (block.input_norm, block.post_norm)
    at_once = 1 if x.device.type == "cpu" else 16
    parts = [decoder_block(dense.config, norms, rows, apply, rope) for rows in x.split(at_once)]
    for kind in list(seen):
        inputs[kind] = torch.cat(seen.pop(kind))
    return torch.cat(parts)


def _fit(
    artifact: Artifact, source: str, inputs: dict[str, torch.Tensor], count: int, generator: torch.Generator
) -> dict[str, Stored]:
    """Clusters of the groups that go by `source`'s keys; inputs [T, in] of each."""
    group = artifact.groups[source]
    x = inputs[source].float()
    importance = torch.from_numpy(group.importance.astype(np.float32)).to(x.device)
    z = (x - torch.from_numpy(group.mean.astype(np.float32)).to(x.device)) * importance
    centre = k_means(z[:: max(1, len(z) // max(SAMPLE, DRAWN * count))], count, generator)
    labels = nearest(z, centre)
    channels = _telling(x, centre)
    keys = _keys(x[:, channels], labels, count, generator)
    keys["channels"] = channels.to(torch.int32).cpu().numpy()
    weight = torch.from_numpy(keys["keys"].T.astype(np.float32) * keys["key_scale"][:, None]).to(x.device)
    code = Keys(channels, weight, torch.from_numpy(keys["key_bias"]).to(x.device)).code(x)
    found = {}
    for name, seen in inputs.items():
        found[name] = _middles(artifact, name, seen, code, count)
    found[source] |= keys
    return found


def k_means(z: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Middles f32 [K, in] of clusters of z f32 [T, in] (Lloyd); one that loses all its members starts again."""
    centre = z[torch.randperm(len(z), generator=generator)[:count].to(z.device)].clone()
    for _ in range(ROUNDS):
        labels = nearest(z, centre)
        members = torch.bincount(labels, minlength=count)
        sums = torch.zeros_like(centre).index_add_(0, labels, z)
        again = z[torch.randint(len(z), (count,), generator=generator).to(z.device)]
        centre = torch.where(members[:, None] > 0, sums / members.clamp_min(1)[:, None], again)
    return centre


def nearest(z: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Index i64 [T] of the centre f32 [K, in] that is nearest to z f32 [T, in]."""
    half = centre.pow(2).sum(1) / 2
    return torch.cat([(half - part @ centre.T).argmin(1) for part in z.split(8192)])


def _telling(x: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """The channels i64 [C] that differ most between centres, ascending; C is a multiple of 16."""
    spread = x.std(0)
    between = centre.var(0, correction=0).masked_fill(spread > WIDEST * spread.median(), -1.0)
    return between.topk(key_channels(x.shape[1])).indices.sort().values


def _keys(x: torch.Tensor, labels: torch.Tensor, count: int, generator: torch.Generator) -> Stored:
    """Logistic regression of labels i64 [T] on x f32 [T, C], in stored dtypes."""
    middle, spread = x.mean(0), x.std(0).clamp_min(1e-5)
    z = (x - middle) / spread
    members = torch.bincount(labels, minlength=count).clamp_min(1)[:, None]
    weight = (torch.zeros(count, x.shape[1], device=x.device).index_add_(0, labels, z) / members).requires_grad_(True)
    bias = (-weight.detach().pow(2).sum(1) / 2).requires_grad_(True)
    optimiser = torch.optim.Adam([weight, bias], lr=RATE)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        rows = torch.randint(0, len(z), (min(BATCH, len(z)),), generator=generator).to(x.device)
        with torch.enable_grad():
            loss = F.cross_entropy(z[rows] @ weight.T + bias, labels[rows])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    slope = weight.detach() / spread
    scale = (slope.abs().amax(1) / 127).clamp_min(1e-12)
    digits = (slope / scale[:, None]).round()
    shift = bias.detach() - (digits * scale[:, None]) @ middle
    stored = {"keys": digits.T.contiguous().to(torch.int8), "key_scale": scale, "key_bias": shift}
    return {name: value.cpu().numpy() for name, value in stored.items()}


def _middles(artifact: Artifact, name: str, seen: torch.Tensor, code: torch.Tensor, count: int) -> Stored:
    """Centroids and their step, of inputs [T, in].

    Not quite the means of clusters: an input far from the middle costs a digit more, not the square of its distance, so
    a few of these should not pull it away from the many that could have been near. Below `cut`, the first threshold at
    MIDDLE bits, nothing is read and nothing gained. Reweighted means find the least of `sum log(score^2 + cut^2)`, the
    bits for an error of that size; they begin at the cluster's mean, a little nearer to that of all tokens, as if one
    more had been there.
    """
    group = artifact.groups[name]
    mean = torch.from_numpy(group.mean.astype(np.float32)).to(seen.device)
    importance = torch.from_numpy(group.importance.astype(np.float32)).to(seen.device)
    budgets = artifact.manifest.budgets
    near = min(range(len(budgets)), key=lambda place: abs(budgets[place] - MIDDLE))
    cut = float(group.thresholds[artifact.manifest.policies.index("channel-norm"), near, 0])
    apart = torch.zeros(count, seen.shape[1], device=seen.device)
    for turn in range(1 + REWEIGHTED):
        sums, weights = torch.zeros_like(apart), torch.full_like(apart, PRIOR)
        for part, where in zip(seen.split(8192), code.split(8192), strict=True):
            a = part.float() - mean
            own = torch.ones_like(a)
            if turn:
                own = cut**2 / (((a - apart[where]) * importance).square() + cut**2)
            sums.index_add_(0, where, own * a)
            weights.index_add_(0, where, own)
        apart = sums / weights
    apart[:, torch.from_numpy(group.exact_channels.astype(np.int64)).to(seen.device)] = 0
    reach = torch.minimum(apart.abs().amax(0), REACH * apart.pow(2).mean(0).sqrt())
    step = (reach / LEVELS).to(torch.float16)
    digits = torch.where(step > 0, apart / step.float().clamp_min(1e-12), 0.0).round().clamp(-LEVELS, LEVELS)
    return {"centroids": digits.to(torch.int8).cpu().numpy(), "step": step.cpu().numpy()}
