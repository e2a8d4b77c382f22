"""Structures, exact counts, ties, and the knee."""

from __future__ import annotations

import math

import pytest
import torch

from lowtide.compress.prune.masks import (
    Structure,
    auto_sparsity,
    check_sparsity,
    make_mask,
    parse_structure,
    threshold_mask,
)
from lowtide.errors import LowtideError

SCORE = torch.randperm(8 * 12, generator=torch.Generator().manual_seed(3)).view(8, 12).float()


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:8", "row", "column", "block:4x16"])
def test_structures_read_as_they_are_written(text):
    assert str(parse_structure(text)) == text


@pytest.mark.parametrize(
    "text", ["", "4:2", "0:4", "4:4", "2:4:8", "blocks", "block:4", "block:0x4", "block:4x0", "-1:4"]
)
def test_other_structures_are_refused_by_name(text):
    with pytest.raises(LowtideError, match=f"--structure {text}"):
        parse_structure(text)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_sparsity_outside_0_to_1_is_refused(sparsity):
    with pytest.raises(LowtideError, match="--sparsity"):
        check_sparsity(sparsity)
    with pytest.raises(LowtideError, match="--sparsity"):
        make_mask(SCORE, sparsity, Structure("unstructured"))


@pytest.mark.parametrize("sparsity, gone", [(0.0, 0), (0.5, 48), (0.37, 36), (0.99, 95)])
def test_unstructured_removes_exactly_the_lowest(sparsity, gone):
    mask = make_mask(SCORE, sparsity, Structure("unstructured"))
    assert int((~mask).sum()) == gone
    assert gone == 0 or float(SCORE[~mask].max()) < float(SCORE[mask].min())


def test_per_row_every_row_loses_the_same():
    mask = make_mask(SCORE, 0.25, Structure("unstructured"), per_row=True)
    assert (~mask).sum(1).tolist() == [3] * 8
    assert all(SCORE[i][~mask[i]].max() < SCORE[i][mask[i]].min() for i in range(8))


def test_per_row_counts_add_up():
    mask = make_mask(SCORE, 0.3, Structure("unstructured"), per_row=True)
    assert int((~mask).sum()) == 29 and set((~mask).sum(1).tolist()) == {3, 4}


def test_n_of_m_survive_in_every_group():
    mask = make_mask(SCORE, 0.9, parse_structure("1:4"))
    assert (mask.view(8, 3, 4).sum(2) == 1).all()
    assert torch.equal(SCORE[mask], SCORE.view(8, 3, 4).amax(2).flatten())


def test_n_m_that_does_not_divide_names_the_layer():
    with pytest.raises(LowtideError, match="mine has 12 inputs"):
        make_mask(SCORE, 0.5, parse_structure("2:8"), "mine")
    with pytest.raises(LowtideError, match="mine is 8 x 12"):
        make_mask(SCORE, 0.5, parse_structure("block:3x4"), "mine")


def test_rows_columns_and_blocks_go_whole():
    row = make_mask(SCORE, 0.25, parse_structure("row"))
    assert sorted(row.sum(1).tolist()) == [0, 0] + [12] * 6
    assert set((~row[:, 0]).nonzero()[:, 0].tolist()) == set(SCORE.sum(1).topk(2, largest=False).indices.tolist())
    column = make_mask(SCORE, 0.25, parse_structure("column"))
    assert set((~column[0]).nonzero()[:, 0].tolist()) == set(SCORE.sum(0).topk(3, largest=False).indices.tolist())
    assert (column == column[0]).all()
    block = make_mask(SCORE, 0.5, parse_structure("block:4x3"))
    parts = block.view(2, 4, 4, 3).transpose(1, 2).reshape(8, 12)
    assert sorted(parts.sum(1).tolist()) == [0] * 4 + [12] * 4


def test_of_equal_scores_the_later_goes():
    mask = make_mask(torch.ones(2, 4), 0.5, Structure("unstructured"))
    assert mask.tolist() == [[True] * 4, [False] * 4]
    assert make_mask(torch.ones(1, 4), 0.5, parse_structure("2:4")).tolist() == [[True, True, False, False]]


def test_one_threshold_over_layers():
    parts = [SCORE[:3], SCORE[3:] * 10]
    masks = threshold_mask(parts, 0.4)
    assert [m.shape for m in masks] == [p.shape for p in parts]
    gone = torch.cat([p[~m] for p, m in zip(parts, masks, strict=True)])
    kept = torch.cat([p[m] for p, m in zip(parts, masks, strict=True)])
    assert len(gone) == 38 and gone.max() < kept.min()


def test_auto_finds_where_the_scores_break():
    score = torch.cat([torch.full((70,), 1e-4), torch.full((30,), 1.0)])
    assert auto_sparsity(score) == pytest.approx(0.70, abs=0.01)
    assert auto_sparsity(torch.ones(100)) == 0.0  # a straight line has no knee
    assert auto_sparsity(torch.zeros(100)) == 0.0
