"""benchmarks/joint.py on a tiny model: what it says of two artifacts, and of a training run."""

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.tiny import ODD  # noqa: E402
from support.twin import make_twins  # noqa: E402

from lowtide.eval import evaluate  # noqa: E402
from lowtide.format.reader import open_artifact  # noqa: E402
from lowtide.kernels.reference import ReferenceEngine  # noqa: E402
from lowtide.runtime.budget import body_weights, policy_params  # noqa: E402

TEXT = "the end of the tide is there and then another one in the hand " * 4
GRID = (3.0, 4.5, 6.0)
HISTORY = [
    {"step": 0, "tokens": 0, "points": [{"bits": 2.0, "read": 2.5, "kl": 0.1}, {"bits": 3.0, "read": 3.0, "kl": 0.05}]},
    {
        "step": 9,
        "tokens": 64,
        "points": [{"bits": 2.0, "read": 1.9, "kl": 0.1}, {"bits": 3.0, "read": 3.0, "kl": 0.04}],
    },
]
FIGURES = {"steps": 9, "best_step": 9, "trained_tokens": 64, "probe_ratio": 0.8, "budget_error": 0.01, "seconds": 1.5}
FIGURES |= {"device": "cpu", "products": "int8"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`model`, two artifacts of it, `plain` and `trained`, `other`, which is of another one, and a `text`."""
    folder = tmp_path_factory.mktemp("joint")
    make_twins(folder / "plain", folder=folder / "model", budgets=GRID)
    make_twins(folder / "trained", folder=folder / "again", budgets=GRID, policies=("ipn", "channel-norm"))
    make_twins(folder / "other", ODD, budgets=GRID)
    (folder / "text").write_text(TEXT)
    return folder


def run(load, files, *more, trained="trained"):
    names = [str(files / name) for name in ("model", "plain", trained)]
    return load("joint").main([*names, "--threads", "1", "--work", str(files / "work"), "--label", "tiny", *more])


def test_both_artifacts_at_every_budget(load, files, tmp_path, capsys):
    text = str(files / "text")
    assert run(load, files, "--text", text, "--windows", "2", "--window", "24", "--bits", "4.5,5.5", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["artifact"], r["rule"], r["bits"]) for r in rows] == [
        ("plain", "channel-norm", 4.5),
        ("plain", "channel-norm", 5.5),
        ("trained", "ipn", 4.5),
        ("trained", "ipn", 5.5),
    ]
    for row in rows:
        path = files / row["artifact"]
        want = evaluate(path, files / "model", text, 2, 24, [4.5, 5.5], row["rule"], engine="reference", progress=False)
        point = next(p for p in want["points"] if p["bits"] == row["bits"])
        for key in ("bits_read_body", "bits_read_total", "kl", "ppl"):
            assert row[key] == pytest.approx(point[key], rel=1e-5), (row, key)
        assert row["slices"] == pytest.approx(row["bits_read_body"] - side(path, row["rule"]))
    assert len({r["kl"] for r in rows}) == 4
    saved = json.loads((tmp_path / "results" / "joint-tiny.json").read_text())
    assert saved["rows"] == rows and (saved["windows"], saved["window"], saved["text"]) == (2, 24, "text")
    table = (tmp_path / "results" / "joint-tiny.md").read_text()
    assert all(f"{r['kl']:.4f} | {r['ppl']:10.3f} |" in table for r in rows)


def side(path, policy):
    """Bits per weight that a token reads under thresholds that no score passes."""
    artifact = open_artifact(path)
    params = policy_params(artifact, policy, 5.0)
    nothing = type(params)(params.rule, np.full_like(params.thresholds, np.inf), gains=params.gains)
    _, stats = ReferenceEngine(artifact).decode(3, 0, nothing)
    return stats.body_bits / body_weights(artifact)


def test_the_curve_moves_kl_to_the_budget(load):
    lines = load("joint").curve_table(HISTORY).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["step", "tokens", "read (2)", "KL there", "KL at 2", "read (3)", "KL there", "KL at 3"]
    assert cells[2] == ["0", "0", "2.50", "0.1000", f"{0.1 * math.exp(0.8):.4f}", "3.00", "0.0500", "0.0500"]
    assert cells[3] == ["9", "64", "1.90", "0.1000", f"{0.1 * math.exp(-0.16):.4f}", "3.00", "0.0400", "0.0400"]


def test_a_quick_run_with_the_training_figures(load, files, tmp_path, capsys):
    (tmp_path / "joint.json").write_text(json.dumps(FIGURES | {"history": HISTORY, "out": "/some/where"}))
    options = ["--sampled", "4", "--window", "16", "--figures", str(tmp_path / "joint.json"), "--quick"]
    assert run(load, files, *options) == 0
    saved = json.loads((tmp_path / "results" / "joint-tiny-quick.json").read_text())
    assert [(r["artifact"], r["bits"]) for r in saved["rows"]] == [("plain", 3.0), ("trained", 3.0)]
    assert (saved["windows"], saved["window"], saved["text"]) == (1, 16, "sampled")
    assert saved["training"] == FIGURES | {"history": HISTORY}
    printed = capsys.readouterr().out
    assert "| plain " in printed and "## held-out KL while training" in printed


@pytest.mark.parametrize("texts", [[], ["--text", "x", "--sampled", "1"]])
def test_one_kind_of_text_is_needed(load, texts, capsys):
    with pytest.raises(SystemExit):
        load("joint").arguments(["model", "plain", "trained", *texts])
    assert "give either --text or --sampled" in capsys.readouterr().err


def test_another_models_artifact_is_refused(load, files, capsys):
    assert run(load, files, "--text", str(files / "text"), "--window", "16", "--bits", "5", trained="other") == 2
    assert "another model" in capsys.readouterr().err
