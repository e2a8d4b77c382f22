"""Error feedback for the graded code: digits are chosen again so that the errors of channels cancel.

Rounding every weight to its nearest code makes each error small. What a layer's output suffers is their sum over the
channels, and inputs are correlated, so other codes make that sum smaller (GPTQ, arXiv 2210.17323, for a code that is
read whole). A graded code is read at another level in every channel and token. With a the centred inputs, m_tjk in
{0, 1} whether token t reads slice k of channel j, and u_ijk what that slice adds to weight ij, a row's error is

    e_ti = y*_ti - sum_jk psi_tjk u_ijk,        psi_tjk = a_tj m_tjk,

y* being what the dense layer gives for the dense model's input, less what is read whatever the mask. A weight's S
numbers u_ij. follow from its one code q_ij, so for one channel of a row all 4^S codes are compared exactly, the others
held: cost(q) = u(q)' G_jj u(q) - 2 u(q)' h_j. That is coordinate descent, which never makes what it minimises larger.

Correlations between channels are shrunk, for calibration text is short; and every channel keeps a little of the wish to
be right by itself when it is read in full, which is what decides digits that the text hardly ever reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

COUPLED = 2048
"""Channels that are worked on together, at most: the moments of S times as many features are held. Runs of channels in
wider layers take turns, each seeing what the others leave."""
TURN = 32
"""Channels between two products with all moments."""
SHRINK, MAX_SHRINK = 2.0, 0.9
"""Part of the moments between channels that is taken for chance, times channels over tokens."""
OWN, FLOOR = 0.02, 0.003
"""Weight of a channel's error by itself, read in full: a part of its energy, and of the mean energy of channels."""


@dataclass
class Coded:
    """The digits of a group and what they mean.

    digits: u8 [out, in]; values: f32 [4^S, S], what each slice of a code adds, in units of rows f32 [out] times cols
    f32 [in]; held: bool [out, in], digits that must stay (outliers, exact channels).
    """

    digits: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor
    held: torch.Tensor

    @property
    def slices(self) -> int:
        """S."""
        return self.values.shape[1]

    def parts(self, first: int, last: int) -> torch.Tensor:
        """u of a run of channels, f32 [(last - first) * S, out], slices of a channel next to each other."""
        run = self.values[self.digits[:, first:last].long()] * self.cols[first:last, None]
        return (run * self.rows[:, None, None]).permute(1, 2, 0).reshape(-1, len(self.rows))

    def planes(self) -> list[torch.Tensor]:
        """What every slice adds to the weights, S of f32 [out, in]."""
        scale = self.rows[:, None] * self.cols
        return [self.values[:, k][self.digits.long()].mul_(scale) for k in range(self.slices)]


@dataclass
class Seen:
    """What a group saw on T tokens.

    inputs: f32 [T, in], centred, 0 for exact channels; wanted: the same of the dense model; open: bool [S, T, in],
    slices read; error: f32 [T, out], the dense layer's output less ours with the digits as they are; weight: f32 [T].
    """

    inputs: torch.Tensor
    wanted: torch.Tensor
    open: torch.Tensor
    error: torch.Tensor
    weight: torch.Tensor


@torch.no_grad()
def recode(coded: Coded, seen: Seen, target: torch.Tensor, sweeps: int = 2) -> None:
    """Choose `coded.digits` again, in place; `seen.error` follows.

    target: f32 [out, in], the dense weights, 0 where digits are held. sweeps: over the channels.
    """
    inputs = seen.inputs.shape[1]
    energy = (seen.inputs.square() * seen.weight[:, None]).mean(0)
    runs = -(-inputs // COUPLED)
    bounds = [inputs * i // runs for i in range(runs + 1)]
    for _ in range(sweeps if runs > 1 else 1):
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            problem = _problem(coded, seen, target, energy, first, last)
            before = coded.parts(first, last)
            for _ in range(1 if runs > 1 else sweeps):
                _sweep(coded, problem, first, last)
            moved = coded.parts(first, last).sub_(before).unflatten(0, (last - first, coded.slices))
            for k, mask in enumerate(seen.open):
                seen.error.addmm_(seen.inputs[:, first:last] * mask[:, first:last], moved[:, k], alpha=-1)


@dataclass
class _Problem:
    """Moments f32 [n S, n S] of a run of n channels and their products with what is wanted, f32 [n S, out]."""

    moments: torch.Tensor
    wanted: torch.Tensor


def _problem(coded: Coded, seen: Seen, target: torch.Tensor, energy: torch.Tensor, first: int, last: int) -> _Problem:
    """cost(u) = u' moments u - 2 u' wanted of a run of channels, the others' digits held."""
    tokens, count, slices = len(seen.inputs), last - first, coded.slices
    moments, slope = _sums(seen, first, last)
    now = coded.parts(first, last)
    shrink = min(MAX_SHRINK, SHRINK * seen.inputs.shape[1] / tokens)
    own = _own_view(moments, slices).clone()
    moments.mul_(1 - shrink)
    # what the channel's own input asks for, and what its digits give of that
    per_channel = target[:, first:last].T[:, None, :]
    a, b = seen.inputs[:, first:last], seen.wanted[:, first:last] * seen.weight[:, None]
    asked = torch.stack([(a * mask[:, first:last] * b).mean(0) for mask in seen.open], 1)
    given = torch.bmm(own, now.view(count, slices, -1))
    slope.mul_(1 - shrink).add_(asked[:, :, None] * per_channel - given, alpha=shrink)
    prior = OWN * energy[first:last] + FLOOR * float(energy.mean())
    slope += prior[:, None, None] * (per_channel - now.view(count, slices, -1).sum(1, keepdim=True))
    _own_view(moments, slices).add_(shrink * own + prior[:, None, None])
    return _Problem(moments, slope.flatten(0, 1) + moments @ now)


def _sums(seen: Seen, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over tokens of psi psi', f32 [n S, n S], and of psi e', f32 [n, S, out], for a run of n channels."""
    slices, count, tokens = len(seen.open), last - first, len(seen.inputs)
    root = seen.weight.sqrt()[:, None]
    features = [seen.inputs[:, first:last] * mask[:, first:last] * root for mask in seen.open]
    moments = torch.empty(count, slices, count, slices)
    slope = torch.empty(count, slices, seen.error.shape[1])
    error = seen.error * root
    for k, one in enumerate(features):
        slope[:, k] = one.T @ error / tokens
        for m in range(k, slices):
            found = one.T @ features[m] / tokens
            moments[:, k, :, m] = found
            moments[:, m, :, k] = found.T
    return moments.view(count * slices, -1), slope


def _own_view(moments: torch.Tensor, slices: int) -> torch.Tensor:
    """The blocks on the diagonal, a view [n, S, S]."""
    width = moments.shape[0]
    step = width * slices + slices
    return moments.as_strided((width // slices, slices, slices), (step, width, 1))


def _sweep(coded: Coded, problem: _Problem, first: int, last: int) -> None:
    """Choose the codes of every channel of the run once, in turn."""
    slices, rows, values = coded.slices, coded.rows, coded.values
    u = coded.parts(first, last)
    for start in range(first, last, TURN):
        end = min(start + TURN, last)
        part = slice((start - first) * slices, (end - first) * slices)
        left = problem.wanted[part] - problem.moments[part] @ u
        block = problem.moments[part, part]
        for j in range(start, end):
            here = slice((j - start) * slices, (j - start + 1) * slices)
            whole = slice((j - first) * slices, (j - first + 1) * slices)
            own, held = block[here, here], coded.held[:, j]
            h = left[here] + own @ u[whole]
            scale = rows * coded.cols[j]
            square = ((values @ own) * values).sum(1)  # of every code, in units of scales
            cost = torch.addmm(scale[:, None] * square, h.T, values.T, beta=1, alpha=-2)
            code = torch.where(held, coded.digits[:, j].long(), cost.argmin(1))
            change = values[code].T * scale - u[whole]
            coded.digits[:, j] = code.to(torch.uint8)
            u[whole] += change
            left.addmm_(block[:, here], change, alpha=-1)
