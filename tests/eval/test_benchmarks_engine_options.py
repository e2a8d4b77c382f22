"""benchmarks/engine_options.py and benchmarks/channel_order.py on a tiny model."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.twin import make_twins  # noqa: E402

from lowtide.eval import evaluate  # noqa: E402
from lowtide.runtime.budget import FULL_HEAD  # noqa: E402

TEXT = "the end of the tide is there and then another one in the hand " * 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`model`, its `plain` artifact and a `text`."""
    folder = tmp_path_factory.mktemp("options")
    make_twins(folder / "plain", folder=folder / "model", budgets=(3.0, 4.5, 6.0))
    (folder / "text").write_text(TEXT)
    return folder


def run(load, files, *more):
    given = [str(files / "plain"), str(files / "model"), "--text", str(files / "text"), "--threads", "1"]
    return load("engine_options").main([*given, "--windows", "1", "--window", "24", "--label", "tiny", *more])


def test_every_option_against_the_default(load, files, tmp_path, capsys):
    assert run(load, files, "--bits", "4.5", "--heads", "2,4;6,0;full", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    heads = [(16, "once"), (8, "once"), (16, "2,4"), (16, "6,0"), (16, "full")]
    assert [(r["cache_bits"], r["head"]) for r in rows] == heads
    given = ({}, {"cache_bits": 8}, {"head": (2.0, 4.0)}, {"head": (6.0, 0.0)}, {"head": FULL_HEAD})
    for row, options in zip(rows, given, strict=True):
        want = evaluate(
            files / "plain",
            files / "model",
            files / "text",
            1,
            24,
            [4.5],
            engine="reference",
            progress=False,
            **options,
        )["points"][0]
        for key in ("bits_read_body", "bits_read_total", "kl", "ppl"):
            assert row[key] == pytest.approx(want[key], rel=1e-5), (row, key)
    once, eight, wide, narrow, full = rows
    assert eight["cache_bytes"] < once["cache_bytes"] and eight["kl"] != once["kl"]
    assert once["greedy_changed"] is None and 0 <= wide["greedy_changed"] <= narrow["greedy_changed"] <= 24
    assert narrow["bits_read_total"] < once["bits_read_total"] < full["bits_read_total"]
    assert full["bits_read_body"] == pytest.approx(once["bits_read_body"], rel=1e-6) and full["kl"] < once["kl"]
    assert json.loads((tmp_path / "results" / "engine-options-tiny.json").read_text())["rows"] == rows


def test_bad_input_is_one_line(load, files, capsys):
    assert run(load, files, "--bits", "4.5", "--heads", "twice") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("engine_options: error: --head twice")


def test_lines_of_memory(load):
    order = load("channel_order")
    read = np.array([[True, False, True, False], [False, False, False, True]])
    assert order.lines_touched(read, 64) == 1.5
    assert order.lines_touched(read, 32) == (2 + 1) / 2  # two runs to a line
    assert order.lines_touched(read, 48) == (1 + 2 + 1) / 2  # bytes 0-47, 96-143 and 144-191
    assert order.lines_touched(read, 128) == (4 + 2) / 2


def test_the_order_is_made_on_one_text_and_counted_on_another(load, files, tmp_path, capsys):
    given = [str(files / "model"), str(files / "plain"), "--calibration", str(files / "text")]
    more = ["--text", str(files / "text"), "--bits", "4.5", "--every", "1", "--label", "tiny", "--quick", "--json"]
    assert load("channel_order").main([*given, *more]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["matrix"] for r in rows} >= {"q_proj", "o_proj", "up_proj", "down_proj"}
    for row in rows:
        assert 0 <= row["read"] <= 1
        assert row["lines"] >= row["lines_least"] - 1e-9 and row["lines_ordered"] >= row["lines_least"] - 1e-9
    assert (tmp_path / "results" / "channel-order-tiny-quick.md").exists()
