"""`lowtide keyed`: the commands on small files, and their refusals."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lowtide.cli.keyed import app
from lowtide.errors import LowtideError


@pytest.fixture
def run():
    def run(*arguments, stdin=b""):
        done = CliRunner().invoke(app, list(map(str, arguments)), input=stdin)
        if isinstance(done.exception, LowtideError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return run


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.tsv"
    path.write_text("tide\t0.5\nlow tide\t-1.25\n\u00e9t\u00e9\t2\n")
    return path


def test_build_query_info(run, weights, tmp_path):
    built = json.loads(run("build", weights, tmp_path / "w", "--bits", 16, "--json"))
    assert built["keys"] == 3
    assert built["file_bytes"] == (tmp_path / "w").stat().st_size
    assert run("query", tmp_path / "w", "low tide", "tide") == "low tide\t-1.25\ntide\t0.5\n"
    assert run("query", tmp_path / "w", stdin="\u00e9t\u00e9\nunheard\n".encode()) == "\u00e9t\u00e9\t2\nunheard\t0\n"
    assert json.loads(run("query", tmp_path / "w", "tide", "--json")) == {
        "weights": [{"feature": "tide", "weight": 0.5}]
    }
    assert json.loads(run("info", tmp_path / "w", "--json"))["fingerprint_bits"] == [16, 16]
    assert "file bytes" in run("info", tmp_path / "w")


def test_ngram_and_perplexity(run, tmp_path):
    (tmp_path / "text").write_text("the tide is low\n\nthe boat is on the sand\n" * 5)
    figures = json.loads(run("ngram", tmp_path / "text", tmp_path / "m", "--order", 2, "--json"))
    assert figures["order"] == 2
    assert "bytes per ngram" in run("info", tmp_path / "m")
    score = json.loads(run("perplexity", tmp_path / "m", tmp_path / "text", "--json"))
    assert score["words"] == 60
    assert 1 < score["perplexity"] < 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"tide 0.5\n", "line 1 is not a feature, a tab and a number"),
        (b"tide\t1\nebb\tx\n", "line 2"),
        (b"tide\t1\ntide\t2\n", "given twice"),
        (b"tide\tnan\n", "not a finite number"),
        (b"\xff\t1\n", "not UTF-8"),
    ],
)
def test_bad_maps_are_refused(run, tmp_path, data, message):
    (tmp_path / "in").write_bytes(data)
    with pytest.raises(LowtideError, match=message):
        run("build", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_questions_are_refused(run, weights, tmp_path):
    run("build", weights, tmp_path / "w")
    with pytest.raises(LowtideError, match="not UTF-8"):
        run("query", tmp_path / "w", stdin=b"\xff\n")
    with pytest.raises(LowtideError, match="not a file of lowtide keyed"):
        run("query", weights, "tide")
    with pytest.raises(LowtideError, match="cannot be read"):
        run("info", tmp_path / "absent")


@pytest.mark.parametrize("command", ["build", "query", "info", "ngram", "perplexity"])
def test_every_command_has_examples(run, command):
    assert f"lowtide keyed {command} " in run(command, "--help")
