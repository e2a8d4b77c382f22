"""`learn importance`: from a model and a text to a file, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from support.twin import write_folder

from lowtide.cli import learn
from lowtide.errors import LowtideError
from lowtide.learn import checkpoint, train_importance
from lowtide.learn.run import learn_importance
from lowtide.learn.train_importance import TrainOptions

OPTIONS = TrainOptions(steps=3, warm_steps=1, check_every=2)
TEXT = "the end of the tide is there and then another one in the hand. " * 4


@pytest.fixture
def place(small, tmp_path):
    """A folder with `model`, `text` and nothing else."""
    write_folder(small.source, tmp_path / "model")
    (tmp_path / "text").write_text(TEXT)
    return tmp_path


def contents(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_command_trains_and_prints_the_figures(place, capsys):
    app = typer.main.get_command(learn.app)
    args = ["importance", str(place / "model"), str(place / "out.safetensors"), "--text", str(place / "text")]
    app([*args, "--steps", "2", "--seed", "1", "--sparsity", "0.5", "--json"], standalone_mode=False)
    figures = json.loads(capsys.readouterr().out)
    assert contents(place) == ["model", "out.safetensors", "text"]
    network, about = checkpoint.load(place / "out.safetensors")
    assert about["seed"] == 1 and about["own"] and len(network.row_vectors) == 14
    assert figures["kl_after"] <= figures["kl_before"]
    assert {"steps", "best_step", "diverged", "tokens"} <= set(about)


def test_sparsity_is_one_number_or_two():
    assert learn._range("0.5") == (0.5, 0.5)
    assert learn._range("0.4,0.8") == (0.4, 0.8)
    for text in ("", "a", "0.4,0.5,0.6"):
        with pytest.raises(LowtideError, match="--sparsity .*: give one number or LOW,HIGH"):
            learn._range(text)


def test_an_interrupted_run_goes_on(place, monkeypatch):
    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if (stage, done) == ("train", 2):
            raise Stop

    with pytest.raises(Stop):
        learn_importance([place / "model"], place / "out", OPTIONS, place / "text", report=stop)
    assert "out.partial" in contents(place) and "out" not in contents(place)
    shutil.copytree(place / "out.partial", place / "kept")
    seen = []
    learn_importance([place / "model"], place / "out", OPTIONS, place / "text", report=lambda *a: seen.append(a))
    assert "out.partial" not in contents(place)
    assert [s for s in seen if s[0] in ("warm", "train")] == [("train", 2, 3), ("train", 3, 3)]
    assert not [s for s in seen if s[0] == "calibrate"]  # statistics are kept, too
    seen.clear()
    shutil.move(place / "kept", place / "again.partial")
    learn_importance(
        [place / "model"], place / "again", OPTIONS, place / "text", resume=False, report=lambda *a: seen.append(a)
    )
    assert ("warm", 1, 1) in seen


def test_two_models_share_one_network(place, monkeypatch):
    shared = train_importance.TrainOptions(steps=2, warm_steps=0, check_every=2)
    figures = learn_importance([place / "model"] * 2, place / "out", shared, place / "text")
    assert len(figures["models"]) == 2
    assert not checkpoint.load(place / "out")[0].row_vectors


def test_bad_input_is_refused_and_leaves_nothing(place):
    model, text, out = place / "model", place / "text", place / "out"
    short, binary = place / "short", place / "binary"
    short.write_text(TEXT[:40])
    binary.write_bytes(b"\xff\xfe")
    (place / "exists").write_text("")
    before = contents(place)
    for args, message in (
        (([place / "nowhere"], out, OPTIONS, text), "no such model"),
        (([model], out, OPTIONS, place / "none"), "cannot read the text"),
        (([model], out, OPTIONS, binary), "not UTF-8"),
        (([model], out, OPTIONS, short), "training needs two windows of 32: give a longer text"),
        (([model], place / "exists", OPTIONS, text), "exists already"),
        (([model], place / "no" / "out", OPTIONS, text), "must name a file in a folder that exists"),
        (([model], out, OPTIONS, text, text), "cannot be read as an importance network"),
    ):
        with pytest.raises(LowtideError, match=message):
            learn_importance(*args)
        assert contents(place) == before
