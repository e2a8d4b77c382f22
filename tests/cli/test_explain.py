"""`lowtide explain` and `lowtide inspect --thresholds`, run as users run them."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from support.tiny import make_artifact

from lowtide.cli.inspect import _threshold_cells, middle_budget, threshold_rows
from lowtide.format.reader import open_artifact
from lowtide.runtime.budget import policy_params

TEXT = "the [tide] is [/in] again"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("cli") / "a.lowtide", policies=("channel-norm", "topk"))


def test_explain_writes_a_page_and_prints_the_extremes(cli, artifact, tmp_path):
    done = cli("explain", artifact, "--prompt", TEXT, "--bits", 5, "--generate", 3, "--html", tmp_path / "out.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny: ")
    assert "channel-norm at 5" in done.stdout
    assert done.stdout.count("| hard |") == done.stdout.count("| easy |") == 5
    assert done.stdout.endswith(f"page: {tmp_path / 'out.html'}\n")
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")


def test_the_page_has_a_name_of_its_own(cli, artifact, tmp_path):
    done = cli("explain", artifact, "-p", "the", "--bits", 5, cwd=tmp_path)
    assert done.stdout.endswith("page: a.explain.html\n")
    assert [p.name for p in tmp_path.iterdir()] == ["a.explain.html"]


def test_json_is_the_data_and_no_page_unless_asked(cli, artifact, tmp_path):
    done = cli("explain", artifact, "-p", TEXT, "--bits", 5, "--token", 3, "--json", cwd=tmp_path)
    figures = json.loads(done.stdout, parse_constant=pytest.fail)
    assert list(tmp_path.iterdir()) == []
    assert figures["chosen"] == 3
    assert "".join(t["text"] for t in figures["tokens"]) == TEXT
    assert np.asarray(figures["bits"]).shape == (len(figures["tokens"]), 2, 4)
    assert set(figures["details"]) == {str(t["index"]) for t in figures["tokens"]}
    cli("explain", artifact, "-p", TEXT, "--bits", 5, "--json", "--html", "x.html", cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.html"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-p", ""), "--prompt: the text is empty"),
        (("-p", "x", "--token", "1"), "--token 1: the text has 1 tokens; give 0 to 0"),
        (("-p", "x" * 65), "--prompt has 65 tokens, the context holds 64"),
        (("-p", "x", "--generate", "64"), "--prompt has 1 tokens and --generate 64"),
        (("-p", "x", "--html", "no/where.html"), "there is no folder no"),
        (("-p", "x", "--html", "."), "--html .: is a folder"),
        (("-p", "x", "--bits", "9"), "--bits 9"),
        (("-p", "x", "--policy", "waterline"), "unknown mask rule 'waterline'"),
        ((), "Missing option '--prompt'"),
    ],
)
def test_bad_input_is_one_line(refused, artifact, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    if "--bits" not in options:
        options = (*options, "--bits", "5")
    assert message in refused("explain", artifact, *options)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_is_none(refused, tmp_path):
    assert "no such folder" in refused("explain", tmp_path / "nowhere", "-p", "x")


def test_help_has_examples(cli):
    text = cli("explain", "--help").stdout
    assert "Examples:" in text
    assert text.count("lowtide explain ") == 4
    assert "\n  explain " in cli("--help").stdout


def test_no_torch_is_imported(artifact, tmp_path):
    code = (
        "import sys; from lowtide.cli.app import run; code = run(sys.argv[1:]); "
        "print({'torch', 'matplotlib'} & set(sys.modules)); sys.exit(code)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "explain",
        artifact,
        "-p",
        "the",
        "--bits",
        "5",
        "--html",
        tmp_path / "x.html",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n")


class TestThresholds:
    """`lowtide inspect --thresholds`."""

    def test_log2_of_every_group(self, cli, artifact):
        figures = json.loads(cli("inspect", artifact, "--thresholds", "--bits", 4.5, "--json").stdout)
        opened = open_artifact(artifact)
        expected = policy_params(opened, None, 4.5).thresholds
        rows = figures["thresholds"]
        assert [row["group"] for row in rows] == [name for name in opened.groups if name != "embed"]
        assert np.exp2([row["theta"] for row in rows]) == pytest.approx(expected, rel=1e-5)
        assert {row["unit"] for row in rows} == {"log2"}
        assert "gain" not in rows[0]
        table = cli("inspect", artifact, "--thresholds", "--bits", 4.5).stdout
        assert "log2 3" in table
        assert f"{rows[3]['theta'][1]:.2f}" in table

    def test_absent_unless_asked(self, cli, artifact):
        assert "thresholds" not in json.loads(cli("inspect", artifact, "--json").stdout)
        assert "log2" not in cli("inspect", artifact).stdout

    def test_counts_are_no_logarithms(self, cli, artifact):
        rows = json.loads(cli("inspect", artifact, "--thresholds", "--policy", "topk", "--json").stdout)["thresholds"]
        assert rows[0]["unit"] == "count"
        assert rows[0]["theta"] == policy_params(open_artifact(artifact), "topk", 5.0).thresholds[0].tolist()

    def test_gain_and_mix_under_ipn(self, cli, tmp_path):
        path = make_artifact(tmp_path / "a", policies=("ipn", "channel-norm"))
        figures = json.loads(cli("inspect", path, "--thresholds", "--bits", 4.5, "--json").stdout)
        opened = open_artifact(path)
        for row in figures["thresholds"][:-1]:
            ipn = opened.groups[row["group"]].ipn
            assert row["gain"] == pytest.approx((ipn.gain[0] + ipn.gain[1]) / 2)
            assert row["mix_norm"] == pytest.approx(np.sqrt((ipn.mix[:-1].astype(float) ** 2).sum()))
            assert row["mix_constant"] == pytest.approx(ipn.mix[-1])
        assert figures["thresholds"][-1]["gain"] is None
        table = cli("inspect", path, "--thresholds", "--bits", 4.5).stdout
        assert "mix norm" in table
        assert f"{figures['thresholds'][0]['mix_norm']:.3f}" in table

    def test_factors_are_log2_of_q_k_and_v_alone(self, cli, tmp_path):
        path = make_artifact(tmp_path / "a", policies=("ipn",), factors=True)
        rows = json.loads(cli("inspect", path, "--thresholds", "--json").stdout)["thresholds"]
        for row in rows:
            factor = open_artifact(path).groups[row["group"]].ipn.factor
            expected = None if factor is None else pytest.approx(np.log2(factor).tolist())
            assert row["apart"] == expected and (factor is not None) == row["group"].endswith("qkv")
        table = cli("inspect", path, "--thresholds").stdout
        assert "q, k, v" in table and "+0.77 +0.00 -0.74" in table and "own for q, k and v" in table
        plain = cli("inspect", make_artifact(tmp_path / "b", policies=("ipn",)), "--thresholds").stdout
        assert "q, k" not in plain

    def test_centroids_are_told(self, cli, tmp_path):
        path = make_artifact(tmp_path / "a", policies=("ipn",), centroids=5)
        assert "ipn: 5 centroids of each group's inputs, told apart by 16 channels" in cli("inspect", path).stdout
        assert json.loads(cli("inspect", path, "--json").stdout)["ipn"]["centroids"] == 5
        assert "centroids" not in cli("inspect", make_artifact(tmp_path / "b", policies=("ipn",))).stdout

    @pytest.mark.parametrize(("policy", "expected"), [(None, 4.0), ("ipn", 4.0), ("channel-norm", 5.0)])
    def test_the_budget_shown_is_one_the_network_was_trained_for(self, tmp_path, policy, expected):
        manifest = open_artifact(make_artifact(tmp_path / "a", policies=("ipn", "channel-norm"))).manifest
        narrow = dataclasses.replace(manifest, ipn=manifest.ipn | {"low": 3.0, "high": 4.5})
        assert middle_budget(narrow, policy) == expected

    def test_never_and_always(self, artifact):
        opened = open_artifact(artifact)
        params = policy_params(opened, None, 5.0)
        params.thresholds[0] = [2.0**-64, 1.0, np.inf]
        row = threshold_rows(opened.groups, params)[0]
        assert row["theta"] == [-64.0, 0.0, None]
        assert _threshold_cells(row) == ["layers.0.qkv", "always", "0.00", "never"]
