"""benchmarks/static.py, codec.py and pruning.py on tiny models: their rows say what the library says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from support.twin import make_twins

from lowtide.compress import compress
from lowtide.format.reader import open_artifact

FOLDER = Path(__file__).parents[2] / "benchmarks"
TEXT = "the tide goes out and the tide comes in again " * 30
MODULES = ("common", "rounding", "peers", "quality", "static", "codec", "codec_peers", "pruning", "opening")


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Imports a benchmark by name; its results go to a temporary folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name, *arguments):
        for module in MODULES:
            sys.modules.pop(module, None)
        module = importlib.import_module(name)
        monkeypatch.setattr(importlib.import_module("common").save, "__defaults__", (tmp_path / "results",))
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *map(str, arguments)])
        return module

    yield run
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def model(tmp_path):
    make_twins(tmp_path / "twin.lowtide", folder=tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "calibration.txt").write_text(TEXT[7:] + " strange sand")
    return tmp_path / "model"


def test_static_tables_of_a_tiny_model(load, model, tmp_path, capsys):
    options = ["--text", tmp_path / "text.txt", "--calibration", tmp_path / "calibration.txt", "--windows", 2]
    options += ["--window", 12, "--steps", "0.05,0.01,0.004", "--sparsity", "0.5", "--static", "5"]
    options += ["--work", tmp_path / "work", "--label", "tiny", "--json"]
    static = load("static", model, *options)
    assert static.main(list(map(str, [model, *options]))) == 0
    rows = json.loads(capsys.readouterr().out)
    result = json.loads((tmp_path / "results" / "static-tiny.json").read_text())
    assert [row for rows_ in result["sections"].values() for row in rows_] == rows
    files = {r["codec"] + f" {r.get('step', '')}": r for r in result["sections"]["files"]}
    ours = [files[f"lowtide {step}"] for step in (0.05, 0.01, 0.004)]
    assert ours[0]["file_bytes"] < ours[1]["file_bytes"] < ours[2]["file_bytes"]
    assert ours[0]["kl"] > ours[1]["kl"] > ours[2]["kl"] > 0
    for row in ours:
        assert 0 < row["entropy_bits"] <= row["coded_bits"] < 8 * row["file_bytes"]
    made = next((tmp_path / "work").glob("*/step-0.01-seed-0-calibration"))
    assert ours[1]["file_bytes"] == sum(f.stat().st_size for f in made.iterdir())
    assert open_artifact(made).manifest.stats["step"] == 0.01
    pruned = next(r for r in result["sections"]["files"] if "pruned" in r["codec"])
    assert pruned["density"] <= 0.51 and pruned["kl"] > ours[1]["kl"]
    assert any(r["codec"].startswith("round to nearest") for r in result["sections"]["files"])
    levels = result["sections"]["levels"]
    assert {r["artifact"] for r in levels} >= {"graded", "static, step 0.004", "static, 50% pruned"}
    multiplier = {r["importance_multiplier"]: r["kl"] for r in result["sections"]["importance"]}
    assert multiplier[0.0] == pytest.approx(ours[1]["kl"], rel=1e-4)
    assert len(set(multiplier.values())) == len(multiplier)
    assert "## files" in (tmp_path / "results" / "static-tiny.md").read_text()


def test_pairs_take_the_smallest_file_that_is_as_good(load):
    static = load("static")
    rows = [{"codec": "lowtide", "file_bytes": size, "kl": kl} for size, kl in ((10, 0.5), (20, 0.1), (30, 0.05))]
    peers = [
        {"codec": f"llama.cpp {t}", "file_bytes": 100, "kl": kl} for t, kl in (("A", 0.1), ("B", 0.01), ("F16", 1))
    ]
    (found,) = static.pairs(rows, peers)
    assert (found["file_bytes"], found["peer"], found["peer_kl"], found["peer_file_bytes"]) == (
        20,
        "llama.cpp A",
        0.1,
        100,
    )


@pytest.mark.parametrize(
    "arguments", [["model"], ["model", "--sampled", "1", "--text", "x"], ["model", "--sections", "x"]]
)
def test_static_refuses_what_makes_no_sense(load, arguments, capsys):
    with pytest.raises(SystemExit):
        load("static").arguments(arguments)
    assert "error" in capsys.readouterr().err


def test_opening_measures_what_is_coded_and_refuses_the_rest(load, model, tmp_path, capsys):
    for coding in ("entropy", "packed"):
        compress(model, tmp_path / coding, coding=coding)
    module = load("opening")
    assert module.main([str(tmp_path / "entropy"), "--quick", "--label", "tiny", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["weights"] > 1000 and row["file_bytes"] == open_artifact(tmp_path / "entropy").stored_bytes()
    assert 0 < row["open_s"] < 60 and row["weights_per_s"] == row["weights"] / row["unpack_s"]
    assert module.main([str(tmp_path / "packed")]) == 2
    assert "is not entropy-coded" in capsys.readouterr().err


def test_codec_rows_without_peers(load, model, tmp_path, capsys):
    module = load("codec", model, "--quick", "--no-peers", "--name", "tiny", "--json")
    assert module.main() == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(r["codec"] == "lowtide" for r in rows)
    assert all(r["coded_bits"] >= r["entropy_bits"] > 0 for r in rows)
    assert (tmp_path / "results" / "codec-tiny.json").exists()
