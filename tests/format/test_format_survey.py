"""Figures of layers, and their masks as pictures."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.tiny import make_artifact

from lowtide.cli.app import run
from lowtide.cli.inspect import written_figures
from lowtide.format.reader import open_artifact
from lowtide.format.survey import BINS, importance_histogram, layer_figures, mask_picture
from lowtide.runtime import report


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def artifact(tmp_path: Path, **options):  # type: ignore[no-untyped-def]
    return open_artifact(make_artifact(tmp_path / "a", **({"zero": True, "coding": "entropy"} | options)))


def test_what_the_writer_noted_is_what_is_worked_out(tmp_path):
    opened = artifact(tmp_path, slices=2)
    known = written_figures(opened.manifest.stats)
    for group in opened.groups.values():
        for index, linear in enumerate(group.linears):
            noted, found = layer_figures(group, index, known[linear.name]), layer_figures(group, index)
            assert noted["density"] == pytest.approx(found["density"], abs=1e-4)
            assert noted["entropy_bits"] == pytest.approx(found["entropy_bits"], abs=1e-4)
            assert noted["coded_bits"] > noted["entropy_bits"] and found["coded_bits"] is None


def test_density_counts_what_reads_as_something(tmp_path):
    group = artifact(tmp_path).groups["layers.0.down"]
    read = group.dequantise(0, group.slices) + group.exact_part(0)
    expected = np.count_nonzero(read) / read.size
    assert layer_figures(group, 0)["density"] == pytest.approx(expected, abs=0.03)  # outliers may lie on codes not zero


def test_histogram_counts_every_channel_once(tmp_path):
    group = artifact(tmp_path, exact=3).groups["layers.1.qkv"]
    counts = importance_histogram(group)
    assert len(counts) == BINS and sum(counts) == np.count_nonzero(group.importance)
    group.importance = np.zeros_like(group.importance)
    assert importance_histogram(group) == [0] * BINS


@pytest.mark.parametrize("zero", [True, False])
def test_picture_shows_the_mask(tmp_path, zero):
    group = artifact(tmp_path, zero=zero, slices=1, exact=0, outliers=0.0).groups["layers.0.down"]
    full = mask_picture(group, 0, size=512)
    assert full.shape == (group.linears[0].out_features, group.in_features)
    read = np.abs(group.dequantise(0, 1) / group.col_scale.astype(np.float32))
    if zero:
        np.testing.assert_array_equal(full > 0, read > 0)
    small = mask_picture(group, 0, size=7)
    assert small.shape == (7, 7)
    if zero:
        assert small.mean() == pytest.approx(full.mean(), rel=0.1)


@pytest.mark.parametrize("stats", [{}, {"entropy": 3}, {"entropy": {"layers": {"x": {"density": "much"}}}}])
def test_a_manifest_that_notes_nonsense_is_not_believed(stats):
    assert written_figures(stats) == {}


def test_png_is_one_that_others_read(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3) * 50
    found = image.imread(io.BytesIO(report.png(picture)), format="png")
    np.testing.assert_array_equal(np.rint(found * 255).astype(np.uint8).reshape(2, 3, -1)[..., 0], picture)


class Parser(HTMLParser):
    images, rows = 0, 0

    def handle_starttag(self, tag, attrs):  # type: ignore[no-untyped-def]
        self.images += tag == "img" and dict(attrs)["src"].startswith("data:image/png;base64,")
        self.rows += tag == "tr"
        assert not {"http", "//"} & set(dict(attrs).get("src", "")[:4].split())


def test_the_command_writes_page_and_pictures(tmp_path, capsys):
    opened = artifact(tmp_path)
    page, masks = tmp_path / "page.html", tmp_path / "masks"
    assert run(["inspect", str(opened.path), "--layers", "--html", str(page), "--png", str(masks), "--json"]) == 0
    layers = [linear.name for group in opened.groups.values() for linear in group.linears]
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert [row["layer"] for row in rows] == layers
    assert sorted(p.name for p in masks.iterdir()) == sorted(f"{name}.png" for name in layers)
    parser = Parser()
    parser.feed(page.read_text())
    assert parser.images == len(layers) and parser.rows == len(layers) + 1
    assert run(["inspect", str(opened.path), "--layers"]) == 0
    assert "importance by octave" in capsys.readouterr().out
