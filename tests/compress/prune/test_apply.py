"""Whole models: overlay, report, sequential pruning, folders, and the command."""

from __future__ import annotations

import json

import pytest
import torch

from lowtide.arch import group_specs
from lowtide.compress.dense import DenseModel
from lowtide.compress.prune import PRUNERS
from lowtide.compress.prune.apply import PruneOptions, prune_model
from lowtide.compress.prune.folder import write_folder
from lowtide.compress.prune.problems import ProblemStore
from lowtide.compress.sources import open_source
from lowtide.compress.sources.overlay import OverlaySource
from lowtide.errors import LowtideError


@pytest.fixture
def model(small_model) -> DenseModel:
    return DenseModel(small_model(tied=False, qkv_bias=True).source())


@pytest.fixture
def ids(model) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def store(model, ids, tmp_path) -> ProblemStore:
    return ProblemStore(tmp_path / "store", model, ids)


def body(source) -> dict[str, torch.Tensor]:
    names = [linear.name for spec in group_specs(source.config) if spec.is_body for linear in spec.linears]
    return {n: source.tensor(n + ".weight") for n in names}


def loss(model: DenseModel, changed, ids) -> float:
    """KL to the dense model."""
    dense, ours = (torch.log_softmax(m.logits(ids), -1) for m in (model, DenseModel(changed)))
    return float((dense.exp() * (dense - ours)).sum(-1).mean())


@pytest.mark.parametrize("rule", PRUNERS)
def test_a_model_pruned_by_every_rule(model, ids, store, rule):
    source, report = prune_model(model.source, ids, PruneOptions(rule, 0.5), store=store)
    zeros = {n: float((w == 0).float().mean()) for n, w in body(source).items()}
    assert zeros == pytest.approx(dict.fromkeys(zeros, 0.5), abs=0.02)
    assert report["density"] == pytest.approx(0.5, abs=0.005) and report["warnings"] == []
    assert {n: v["sparsity"] for n, v in report["layers"].items()} == pytest.approx(zeros)
    assert torch.equal(source.tensor("lm_head.weight"), model.source.tensor("lm_head.weight"))
    assert source.fingerprint() != model.source.fingerprint()
    json.dumps(report)


def test_updates_can_be_asked_for_and_refused(model, ids, store):
    dense = body(model.source)
    plain, _ = prune_model(model.source, ids, PruneOptions("sparsegpt", updates=False), store=store)
    assert all(torch.equal(w[w != 0], dense[n][w != 0]) for n, w in body(plain).items())
    figures = {}
    for updates in (False, True):
        options = PruneOptions("wanda", updates=updates)
        source, report = prune_model(model.source, ids, options, store=store)
        figures[updates] = sum(v["error"] for v in report["layers"].values())
    assert figures[True] < 0.9 * figures[False]


def test_sequential_pruning_helps_on_its_own_text(model, ids, store):
    losses = {}
    for sequential in ("no", "block", "group"):
        options = PruneOptions("importance", 0.6, sequential=sequential)
        losses[sequential] = loss(model, prune_model(model.source, ids, options, store=store)[0], ids)
    assert losses["group"] < 0.6 * losses["no"]
    assert losses["block"] != losses["no"]


def test_sequential_with_nothing_pruned_is_the_model(model, ids, store):
    source, _ = prune_model(model.source, ids, PruneOptions("importance", 0.0, sequential="group"), store=store)
    assert loss(model, source, ids) < 1e-4


@pytest.mark.parametrize("allocation", ["erk", "global", "searched"])
def test_allocations_keep_the_total(model, ids, store, tmp_path, allocation):
    options = PruneOptions("wanda", 0.5, allocation=allocation, generations=2, children=2)
    _, report = prune_model(model.source, ids, options, store=store, work=tmp_path / "work")
    assert report["density"] == pytest.approx(0.5, abs=0.01)


def test_search_never_ends_worse_than_uniform(model, ids, store, tmp_path):
    plain, _ = prune_model(model.source, ids, PruneOptions("wanda", 0.6), store=store)
    options = PruneOptions("wanda", 0.6, allocation="searched", generations=4, children=4)
    found, _ = prune_model(model.source, ids, options, store=store, work=tmp_path / "work")
    assert loss(model, found, ids[:4]) < loss(model, plain, ids[:4])


def test_auto_sparsity_is_reported(model, ids, store):
    _, report = prune_model(model.source, ids, PruneOptions("wanda", None), store=store)
    assert 0.1 < report["sparsity"] < 0.95
    assert report["density"] == pytest.approx(1 - report["sparsity"], abs=0.02)


def test_a_layer_without_weights_is_named(model, ids, store):
    for problem in (p for block in store for p in block if p.name == "model.layers.1.self_attn.o_proj"):
        problem.weight.zero_()  # the model's own tensor: DenseModel keeps the block
    _, report = prune_model(model.source, ids, PruneOptions("wanda"), store=store)
    assert report["warnings"] == ["model.layers.1.self_attn.o_proj: nothing would be left of it"]
    with pytest.raises(LowtideError, match="layers.1.self_attn.o_proj: nothing would be left"):
        prune_model(model.source, ids, PruneOptions("wanda", strict=True), store=store)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "best"}, "--rule best: known are"),
        ({"sparsity": 1.0}, "--sparsity 1"),
        ({"structure": "5:4"}, "--structure 5:4"),
        ({"allocation": "fair"}, "--allocation fair: known are uniform"),
        ({"sequential": "yes"}, "--sequential yes: known are no, block, group"),
        ({"structure": "2:4", "allocation": "global"}, "gives every layer the same"),
        ({"structure": "row", "dsnot": True}, "dsnot swaps single weights"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(LowtideError, match=message):
        PruneOptions(**options)


def test_a_structure_that_does_not_fit_is_refused_before_calibration(model, ids, monkeypatch):
    monkeypatch.setattr("lowtide.compress.prune.problems.block_pass", None)
    with pytest.raises(LowtideError, match="q_proj has 48 inputs"):
        prune_model(model.source, ids, PruneOptions(structure="2:5"))


def test_overlays_refuse_foreign_tensors(model):
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(LowtideError, match="has shape"):
        OverlaySource(model.source, {name: torch.zeros(3, 3)})
    with pytest.raises(LowtideError, match="no such tensor"):
        OverlaySource(model.source, {"model.layers.9.x": torch.zeros(3, 3)})
    with pytest.raises(LowtideError, match="NaN or infinity"):
        OverlaySource(model.source, {name: torch.full((48, 48), torch.inf)})


@pytest.mark.parametrize("dtype", [None, "f16", "f32"])
def test_a_folder_holds_the_pruned_model(model, ids, store, tmp_path, dtype):
    pruned, _ = prune_model(model.source, ids, PruneOptions("wanda"), store=store)
    size = write_folder(pruned, tmp_path / "out", dtype)
    again = open_source(tmp_path / "out")
    assert again.config == model.config and again.tokenizer_files() == model.source.tokenizer_files()
    for name, weight in body(pruned).items():
        stored = weight.half().float() if dtype == "f16" else weight
        assert torch.equal(again.tensor(name + ".weight"), stored)
    assert size == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())


def test_folders_are_not_overwritten_by_chance(model, tmp_path):
    write_folder(model.source, tmp_path / "out")
    with pytest.raises(LowtideError, match="exists already"):
        write_folder(model.source, tmp_path / "out")
    write_folder(model.source, tmp_path / "out", force=True)
    (tmp_path / "letters").mkdir()
    with pytest.raises(LowtideError, match="is no model folder"):
        write_folder(model.source, tmp_path / "letters", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letters", "model", "out"]


def test_a_failed_write_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowtide.compress.prune.folder.save_file", full)
    with pytest.raises(LowtideError, match="No space left"):
        write_folder(model.source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def run_command(arguments: list[str]) -> None:
    import typer

    from lowtide.cli.prune import prune

    app = typer.Typer()
    app.command()(prune)
    app(arguments, standalone_mode=False)


def test_the_command(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lowtide.compress.text.SAMPLE_WINDOWS", 4)
    folder, out = small_model().folder, tmp_path / "out"
    run_command([str(folder), str(out), "--sparsity", "0.6", "--rule", "wanda", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["density"] == pytest.approx(0.4, abs=0.01) and report["out"] == str(out)
    assert float((open_source(out).tensor("model.layers.0.mlp.up_proj.weight") == 0).float().mean()) > 0.55
    for arguments, message in [
        ([str(folder), str(out)], "exists already"),
        ([str(folder), str(out), "--force", "--sparsity", "most"], "--sparsity most"),
        ([str(folder), str(out), "--force", "--dtype", "int3"], "--dtype int3"),
    ]:
        with pytest.raises(LowtideError, match=message):
            run_command(arguments)
