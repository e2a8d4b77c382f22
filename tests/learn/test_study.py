"""The transfer study on two tiny models: every rule measured once, resumed for nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from support.twin import write_folder

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("importance", "common"):
        sys.modules.pop(name, None)
    module = importlib.import_module("importance")
    common = importlib.import_module("common")
    monkeypatch.setattr(common.save, "__defaults__", (tmp_path / "results",))
    yield module
    for name in ("importance", "common"):
        sys.modules.pop(name, None)


def test_every_rule_is_measured_once_and_a_second_run_measures_nothing(study, small, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text"
    text.write_text("the end of the tide is there and then another one in the hand. " * 8)
    for name in ("a", "b"):
        write_folder(small.source, tmp_path / name)
    args = [str(tmp_path / "a"), f"{tmp_path / 'b'}:{text}:{text}", "--quick", "--steps", "2", "--json"]
    args += ["--work", str(tmp_path / "work")]
    assert study.main(args) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["model"], r["rule"]) for r in rows] == [(m, r) for m in ("a", "b") for r in study.RULES]
    assert all(0 < r["kl"] < 50 and r["ppl"] > 1 and r["sparsity"] == 0.5 and r["seed"] == 0 for r in rows)
    kl = {(r["model"], r["rule"]): r["kl"] for r in rows}
    assert kl["a", "start+gradual"] < kl["a", "start"]
    assert (tmp_path / "results" / "importance.md").read_text().count("| a ") == len(study.RULES)

    def refuse(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(study, "learned", refuse)
    monkeypatch.setattr(study, "baseline", refuse)
    assert study.main(args) == 0
    assert json.loads(capsys.readouterr().out) == rows


def test_bad_input_is_one_line(study, tmp_path, capsys):
    assert study.main([f"{tmp_path}:one", "--work", str(tmp_path / "work")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}:one: give PATH or PATH:CALIBRATION:TEXT\n"
