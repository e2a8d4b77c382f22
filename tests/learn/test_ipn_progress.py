"""The average over the last steps, which is what training keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowtide.learn.ipn_progress import Run


def run_of(values, decay):
    p = nn.Parameter(torch.tensor([values[0], -values[0]]))
    run = Run()
    run.follow({"p": p}, decay)
    for value in values[1:]:
        p.data = torch.tensor([value, -value])
        run.step += 1
        run.follow({"p": p}, decay)
    return run, p


def test_the_first_steps_weigh_alike():
    run, _ = run_of([1.0, 3.0, 8.0], 0.95)
    torch.testing.assert_close(run.average["p"], torch.tensor([4.0, -4.0]))


def test_later_ones_fade():
    values = torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()
    run, _ = run_of(values, 0.9)
    mean = values[0]
    for n, value in enumerate(values[1:], 1):
        part = max(0.1, 1 / (n + 1))
        mean = (1 - part) * mean + part * value
    assert run.average["p"][0].item() == pytest.approx(mean, rel=1e-5)


def test_without_decay_it_is_the_last_step():
    run, p = run_of([0.3, 0.1, 0.7], 0.0)
    assert torch.equal(run.average["p"], p.data)


def test_parameters_are_the_average_inside_and_themselves_again_after():
    run, p = run_of([1.0, 3.0], 0.95)
    with pytest.raises(RuntimeError), run.averaged({"p": p}):
        assert p.tolist() == [2.0, -2.0]
        run.keep({"p": p}, 0.5)
        raise RuntimeError
    assert p.tolist() == [3.0, -3.0] and run.average["p"].tolist() == [2.0, -2.0]
    run.restore({"p": p})
    assert p.tolist() == [2.0, -2.0]
