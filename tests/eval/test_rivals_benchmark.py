"""benchmarks/dynamic.py on a tiny model: its rows, what it keeps, what it refuses."""

import json
import sys

import pytest

torch = pytest.importorskip("torch")

from support.rivals import BITS  # noqa: E402
from support.twin import make_twins  # noqa: E402

from lowtide import evaluate  # noqa: E402
from lowtide.eval.rivals import RIVALS, OutOfReach, allocation, self_supervised  # noqa: E402
from lowtide.eval.rivals.cats import Cats  # noqa: E402

TEXT = "the end of the tide is there and then another one in the hand " * 12
KEYS = {"model", "rule", "bits", "bits_read_body", "bits_read_total", "kl", "ppl", "trained_tokens", "seed"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(self_supervised, "STEPS", 5)
    monkeypatch.setattr(allocation, "STEPS", 5)


@pytest.fixture
def arguments(tmp_path):
    path, _ = make_twins(tmp_path / "twin.lowtide", folder=tmp_path / "model", policies=("channel-norm", "topk"))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "calibration.txt").write_text(TEXT * 2)
    return [str(tmp_path / "model"), str(path), "--text", str(tmp_path / "text.txt"), "--windows", "2", "--window",
            "32", "--calibration", str(tmp_path / "calibration.txt"), "--calibration-windows", "3", "--bits", f"{BITS}",
            "--engine", "reference", "--work", str(tmp_path / "work"), "--sections", "rivals",
            "--json"]  # fmt: skip


def run(load, arguments, capsys):
    module = load("dynamic")
    assert module.main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_rows_of_every_rival_and_every_stored_policy(load, arguments, capsys, tmp_path):
    result = run(load, arguments, capsys)
    rows = result["rows"]
    assert [r["rule"] for r in rows if r["where"] == "engine"] == ["channel-norm", "topk"]
    assert [r["rule"] for r in rows if r["where"] == "torch"] == list(RIVALS)
    assert all(r.keys() >= KEYS and r["section"] == "rivals" for r in rows)
    for row in (r for r in rows if r["where"] == "torch"):
        assert row["bits_read_body"] == pytest.approx(BITS, rel=0.01), row["rule"]
        assert (row["trained_tokens"] > 0) == ("predictor" in row["rule"])
    assert (tmp_path / "results" / "dynamic-model.md").read_text().count("channel-norm") == 2
    found = evaluate(arguments[1], arguments[0], arguments[3], 2, 32, [BITS], "topk", "reference", progress=False)
    stored = next(r for r in rows if r["rule"] == "topk")
    assert stored["kl"] == pytest.approx(found["points"][0]["kl"])
    assert result["dense_ppl"] == pytest.approx(found["dense_ppl"], rel=1e-5)


def test_our_own_levels_agree_with_the_engine(load, arguments, capsys):
    rows = run(load, [*arguments, "--rules", "graded"], capsys)["rows"]
    engine, ours = (next(r for r in rows if r["rule"] == rule) for rule in ("channel-norm", "graded"))
    # the engine's controller moves as it goes, the rival's offset stands still
    assert ours["kl"] == pytest.approx(engine["kl"], rel=0.25)
    assert ours["bits_read_total"] == pytest.approx(engine["bits_read_total"], rel=0.05)


def test_what_was_measured_is_not_measured_again(load, arguments, capsys, monkeypatch):
    first = run(load, [*arguments, "--rules", "graded;cats"], capsys)["rows"]
    monkeypatch.setattr(RIVALS["cats"], "fit", lambda calibration: pytest.fail("fitted again"), raising=False)
    assert run(load, [*arguments, "--rules", "graded;cats"], capsys)["rows"] == first
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        run(load, [*arguments, "--rules", "cats", "--seed", "1"], capsys)


def test_tables_show_every_rule_and_budget(load, arguments, capsys):
    module = load("dynamic")
    assert module.main([a for a in arguments if a != "--json"] + ["--rules", "graded;static precision"]) == 0
    text = capsys.readouterr().out
    for rule in ("graded", "static precision", "channel-norm", "topk"):
        assert sum(line.startswith(f"| {rule} ") for line in text.splitlines()) == 2
    assert "dense perplexity" in text


def test_a_rule_that_cannot_read_the_budget_is_left_out(load, arguments, capsys, monkeypatch):
    class Hopeless(Cats):
        def fit(self, calibration):
            raise OutOfReach("its floor is above 5 bits")

    monkeypatch.setitem(RIVALS, "cats", Hopeless())
    module = load("dynamic")
    assert module.main([*arguments, "--rules", "cats;graded"]) == 0
    out = capsys.readouterr()
    assert [r["rule"] for r in json.loads(out.out)["rows"]] == ["channel-norm", "topk", "graded"]
    assert "cats: left out, its floor is above 5 bits" in out.err


def test_a_budget_outside_the_grid_is_refused(load, arguments, capsys):
    place = arguments.index("--bits") + 1
    module = load("dynamic")
    assert module.main([*arguments[:place], "1", *arguments[place + 1 :], "--rules", "graded"]) == 2
    assert "--bits 1: this artifact stores budgets from 4 to 6" in capsys.readouterr().err


def test_bad_arguments_are_refused(load, arguments, capsys, monkeypatch):
    module = load("dynamic")
    for extra, message in (
        (["--rules", "no-such"], "--rules: no 'no-such'"),
        (["--sections", "no-such"], "--sections: no 'no-such'"),
        (["--bits", "two"], "--bits two"),
        (["--sampled", "2"], "either --text or --sampled"),
    ):
        with pytest.raises(SystemExit):
            module.main([*arguments, *extra])
        assert message in capsys.readouterr().err
    place = arguments.index("--text") + 1
    assert module.main([*arguments[:place], "missing.txt", *arguments[place + 1 :]]) == 2
    assert "missing.txt" in capsys.readouterr().err
    assert "dynamic" in sys.modules
