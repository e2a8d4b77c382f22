"""The pictures: a real PNG, and a page that needs nothing else."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from lowtide.errors import LowtideError
from lowtide.eval.plots import write_html, write_png

CURVES = {
    "graded <best>": [
        {"bits": 3.0, "bits_read_body": 3.01, "kl": 0.1, "ppl": 27.123456},
        {"bits": 2.5, "bits_read_body": 2.5, "kl": 0.3, "ppl": 31.0},
        {"bits": "dense", "bits_read_body": 6.3, "kl": 0.001, "ppl": 25.0},
    ],
    "binary": [{"bits_read_body": 3.0, "kl": 0.62}, {"bits_read_body": 4.0, "kl": 0.0}],
}


def page(tmp_path, curves=CURVES):
    write_html(curves, tmp_path / "kl.html", title="KL & bits")
    return (tmp_path / "kl.html").read_text(encoding="utf-8")


def test_html_is_self_contained_and_escaped(tmp_path):
    text = page(tmp_path)
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    assert "KL &amp; bits" in text and "graded &lt;best&gt;" in text and "<best>" not in text


def test_html_draws_every_point_at_its_place(tmp_path):
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", page(tmp_path), re.S).group(0))
    circles = svg.findall("circle")
    notes = [c.find("title").text for c in circles]
    assert notes == [
        "graded <best>: 2.500 bits, KL 0.30000",
        "graded <best>: 3.010 bits, KL 0.10000",
        "graded <best>: 6.300 bits, KL 0.00100",
        "binary: 3.000 bits, KL 0.62000",
    ]  # by ascending bits; KL 0 has no place on a logarithmic axis
    at = [(float(c.get("cx")), float(c.get("cy"))) for c in circles]
    assert at[0][0] < at[3][0] < at[1][0] < at[2][0]
    assert at[3][1] < at[0][1] < at[1][1] < at[2][1]
    step = (at[2][1] - at[1][1]) / 2  # two decades
    assert at[1][1] - at[3][1] == pytest.approx(step * 0.792, abs=0.3)  # log10(0.62 / 0.1)
    for cx, cy in at:
        assert 60 < cx < 760 and 0 < cy < 440


def test_html_tables_hold_all_figures(tmp_path):
    text = page(tmp_path)
    assert "<td>27.123</td>" in text and "<td>dense</td>" in text
    assert text.count("<table>") == 2


def test_png(tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    write_png(CURVES, tmp_path / "kl.png", title="KL")
    pixels = matplotlib_image.imread(tmp_path / "kl.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert pixels[..., :3].std() > 0.02


@pytest.mark.parametrize("curves", [{}, {"a": []}, {"a": [{"bits_read_body": 3.0, "kl": 0.0}]}])
def test_nothing_to_draw_is_an_error(tmp_path, curves):
    with pytest.raises(LowtideError, match="nothing to draw"):
        page(tmp_path, curves)
    with pytest.raises(LowtideError, match="nothing to draw"):
        write_png(curves, tmp_path / "kl.png")
    assert not list(tmp_path.iterdir())


def test_one_point_is_enough(tmp_path):
    assert "<circle" in page(tmp_path, {"one": [{"bits_read_body": 3.0, "kl": 0.1}]})
