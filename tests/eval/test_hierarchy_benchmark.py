"""Section `hierarchy` of benchmarks/dynamic.py on a tiny model."""

import json

import pytest

torch = pytest.importorskip("torch")

from support.rivals import BITS  # noqa: E402
from support.twin import make_twins  # noqa: E402

from lowtide.eval.rivals import HIERARCHIES  # noqa: E402

TEXT = "the end of the tide is there and then another one in the hand " * 12
KEYS = {"model", "rule", "bits", "bits_read_body", "bits_read_total", "kl", "ppl", "trained_tokens", "seed"}


@pytest.fixture
def arguments(tmp_path):
    path, _ = make_twins(tmp_path / "twin.lowtide", folder=tmp_path / "model", policies=("channel-norm", "topk"))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "calibration.txt").write_text(TEXT * 2)
    return [str(tmp_path / "model"), str(path), "--text", str(tmp_path / "text.txt"), "--windows", "2", "--window",
            "32", "--calibration", str(tmp_path / "calibration.txt"), "--calibration-windows", "3", "--bits", f"{BITS}",
            "--work", str(tmp_path / "work"), "--sections", "hierarchy", "--checks", "8",
            "--json"]  # fmt: skip


def run(load, arguments, capsys):
    module = load("dynamic")
    assert module.main(arguments) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_rows_of_every_configuration_at_one_budget(load, arguments, capsys, tmp_path):
    rows = run(load, arguments, capsys)
    checks = ["check every 8 tokens", "check every token, bits not counted"]
    assert [r["rule"] for r in rows] == [*HIERARCHIES, *checks]
    for row in rows:
        assert row.keys() >= KEYS and row["section"] == "hierarchy" and row["scores_of"] == "channel-norm"
        assert row["bits_read_body"] == pytest.approx(BITS, rel=0.01), row["rule"]
        assert row["scores_computed"] > 0 and row["decisions"] >= row["scores_computed"] and row["trained_tokens"] == 0
    by = {r["rule"]: r for r in rows}
    assert by["block of 4 for channel"]["decisions"] < by["channel (flat)"]["decisions"] / 2
    assert by["levels of the layer before, every other"]["scores_computed"] < by["channel (flat)"]["scores_computed"]
    assert by["layer > channel"]["closed"] > 0 and by["channel (flat)"]["closed"] == 0
    check, free = by[checks[0]], by[checks[1]]
    assert check["bits_naive_body"] > free["bits_naive_body"] - 2 > BITS
    cost = float(check["setting"].split()[1])  # bits in bytes: an eighth of what the naive figure adds
    digits = check["bits_read_body"] - cost
    assert check["bits_naive_body"] - digits == pytest.approx(8 * cost, abs=0.01)
    assert free["kl"] < by["channel (flat)"]["kl"]
    lines = (tmp_path / "results" / "dynamic-model.md").read_text().splitlines()
    assert sum(line.startswith("| channel (flat) ") for line in lines) == 2


def test_what_was_measured_is_not_measured_again(load, arguments, capsys, monkeypatch):
    few = [*arguments, "--hierarchies", "channel (flat)", "--checks", ""]
    first = run(load, few, capsys)
    assert len(first) == 1
    monkeypatch.setattr(HIERARCHIES["channel (flat)"], "fit", lambda *_: pytest.fail("fitted again"))
    assert run(load, few, capsys) == first


def test_bad_arguments_are_refused(load, arguments, capsys):
    module = load("dynamic")
    for extra, message in (
        (["--hierarchies", "no-such"], "--hierarchies: no 'no-such'"),
        (["--scores", "topk"], "--scores: no 'topk'"),
        (["--checks", "0"], "--checks 0: numbers of tokens"),
    ):
        with pytest.raises(SystemExit):
            module.main([*arguments, *extra])
        assert message in capsys.readouterr().err
