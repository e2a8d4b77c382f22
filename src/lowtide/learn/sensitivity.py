"""Self-supervised start of the probes: how much does an error at this token, in this group, cost?

For one sampled label per token (Fisher information, as in calibration) the gradient g at a group's outputs gives the
token's sensitivity `s_t = sum_i (r_i g_ti)^2`, where the row scales r stand for the size of the code's errors. Reading
b bits costs `s_t 2^-2b`, so the best offset of the waterline is `o_t = log2(s_t) / 2` and, predicted as o, what
remains is `E[s 2^-2o] 2^(2 E[o])`. That is what the probes are fitted to: one noisy draw of s is enough, since the
minimum is at the conditional mean.

The quadratic picture fails where nothing is read at all, so sensitivities get a floor and the offsets start at START of
what it asks for; training end to end decides from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lowtide.compress.dense import DenseModel, decoder_block, draw, rms_norm, rope_tables
from lowtide.compress.products import product_type
from lowtide.learn.graded import FEATURE_GROUPS, GradedModel
from lowtide.learn.ipn import LIMIT, Ipn

FLOOR = 0.05
"""Part of the mean sensitivity that is added to all."""
START = 0.6
"""Part of the quadratic model's offset to begin with."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Parts of the fitted offset that are tried on tokens held out: a short text teaches noise, too."""
RATE, DECAY, BATCH = 3e-3, 1.0, 1024
PROBE_TOKENS, PROBE_BYTES = (16_384, 65_536), 2 << 30
"""Tokens that the probes' self-supervised start sees: so many at least and at most, between them what their inputs
leave of so much memory. On stories15M 14,000 leave 0.77 of the distortion, 50,000 leave 0.76, as 100,000 do."""


@dataclass
class Sensitivities:
    """What was seen at T tokens: inputs[probe group] bfloat16 [T, in], say[group] f32 [T]."""

    inputs: dict[str, torch.Tensor]
    say: dict[str, torch.Tensor]


def probe_tokens(dense: DenseModel) -> int:
    """How many tokens to look at: inputs of two probes a layer wait in bfloat16."""
    least, most = PROBE_TOKENS
    return max(least, min(most, PROBE_BYTES // (4 * dense.config.hidden_size * dense.config.num_layers)))


def sensitivities(
    model: GradedModel, ids: torch.Tensor, seed: int = 0, report: Callable[[int, int], None] = lambda *_: None
) -> Sensitivities:
    """Gradients of the dense model, window by window. ids: i64 [B, N]; report(done, total)."""
    dense, config = model.dense, model.config
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, list[torch.Tensor]] = {}
    say: dict[str, list[torch.Tensor]] = {}
    scales = model.row_scales
    rope = rope_tables(config, 0, ids.shape[1], dense.device)
    head = dense.head_weight.to(product_type())
    for done, row in enumerate(ids):
        x = dense.embed(row[None]).requires_grad_(True)
        for index in range(config.num_layers):
            block = dense.block(index)

            def apply(kind: str, x: torch.Tensor, index: int = index) -> torch.Tensor:
                name = f"layers.{index}.{kind}"
                if FEATURE_GROUPS[kind] == kind:
                    inputs.setdefault(name, []).append(x.detach()[0].to(torch.bfloat16))
                bias = dense.block(index).biases[kind]
                y = F.linear(x.to(product_type()), dense.block(index).weights[kind].to(product_type())).float()
                y = y if bias is None else y + bias

                def keep(g: torch.Tensor) -> None:
                    say.setdefault(name, []).append((g[0] * scales[name]).pow(2).sum(-1))

                y.register_hook(keep)
                return y

            with torch.enable_grad():
                x = decoder_block(config, (block.input_norm, block.post_norm), x, apply, rope)
        with torch.enable_grad():
            logits = F.linear(rms_norm(x, dense.final_norm, config.rms_eps)[0].to(product_type()), head).float()
            labels = draw(logits.detach().softmax(-1), generator)
            F.cross_entropy(logits, labels, reduction="sum").backward()
        report(done + 1, len(ids))
    return Sensitivities({n: torch.cat(v) for n, v in inputs.items()}, {n: torch.cat(v) for n, v in say.items()})


def cost(say: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """log of the distortion that offsets o (log2) leave, relative to none: 0 for o = 0. Both f32 [T]."""
    natural = 2 * math.log(2) * offset
    return (say / say.mean() * torch.exp(-natural)).mean().log() + natural.mean()


def fit_probes(ipn: Ipn, seen: Sensitivities, steps: int = 600, seed: int = 0) -> dict[str, float]:
    """Set every probe and mix. Returns each group's `cost` on tokens held out (the last tenth), as a ratio up to 1."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for name, stored in seen.inputs.items():
        served = [g for g in seen.say if g.rpartition(".")[0] == name.rpartition(".")[0]
                  and FEATURE_GROUPS[g.rpartition(".")[2]] == name.rpartition(".")[2]]  # fmt: skip
        say = torch.stack([seen.say[g] / seen.say[g].mean() + FLOOR for g in served])
        found |= dict(zip(served, _fit(ipn, name, served, stored.float(), say, steps, generator), strict=True))
    return found


def _fit(
    ipn: Ipn, name: str, served: list[str], x: torch.Tensor, say: torch.Tensor, steps: int, generator: torch.Generator
) -> list[float]:
    """One probe and the mixes of the groups it serves; say f32 [groups, T]."""
    train = len(x) - len(x) // 10
    probe, bias = ipn.get(name, "probe"), ipn.get(name, "bias")
    mixes = [ipn.get(g, "mix") for g in served]
    assert probe is not None and bias is not None
    spread = x[:train].std(0).clamp_min(1e-4)
    centre = x[:train].mean(0)
    p = probe.detach().clone().requires_grad_(True)
    b = torch.zeros_like(bias).requires_grad_(True)
    m = torch.zeros(len(served), ipn.features + 1, device=x.device).requires_grad_(True)
    optimiser = torch.optim.AdamW([p, b, m], lr=RATE, weight_decay=DECAY)
    z = (x - centre) / spread

    def offsets(part: torch.Tensor) -> torch.Tensor:
        raw = torch.relu(part @ p.T + b) @ m[:, :-1].T + m[:, -1]
        return (LIMIT * torch.tanh(raw / LIMIT)).T

    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = torch.randint(0, train, (min(BATCH, train),), generator=generator).to(x.device)
        loss = torch.stack([cost(s[rows], o) for s, o in zip(say, offsets(z[rows]), strict=True)]).sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    ratios = []
    with torch.no_grad():
        held, seen = offsets(z[train:]), offsets(z[:train])
        probe.copy_(p / spread)
        bias.copy_(b - (p / spread) @ centre)
        for mix, values, s, o, fitted in zip(mixes, m, say, held, seen, strict=True):
            assert mix is not None
            tried = [(float(cost(s[train:], part * o).exp()), part) for part in STRENGTHS]
            ratio, strength = min(tried)
            ratios.append(ratio)
            mix.copy_(values * (START * strength))
            mix[-1] -= START * strength * fitted.mean()  # a mean of 0 leaves the budget where it was
    return ratios
