"""benchmarks/robustness.py: its figures against ones computed apart, its tests of differences, its verdict."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.tiny import ODD, make_artifact  # noqa: E402
from support.twin import make_twins  # noqa: E402

from lowtide.arch import norm_specs  # noqa: E402
from lowtide.compress.dense import DenseModel  # noqa: E402
from lowtide.compress.masked import MaskedModel  # noqa: E402
from lowtide.eval import perturb  # noqa: E402
from lowtide.format.reader import open_artifact  # noqa: E402
from lowtide.rules import get_rule  # noqa: E402

TEXT = "the end of the tide is there and then another one in the hand " * 4
WINDOW = 24
OPTIONS = ("--windows", "6", "--window", str(WINDOW), "--seeds", "0,1", "--label", "tiny", "--json")


@pytest.fixture
def twins(tmp_path):
    path, source = make_twins(tmp_path / "twin.lowtide", folder=tmp_path / "model")
    return path, tmp_path / "model", source


@pytest.fixture
def run(load, twins, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def run(*more, artifacts=(twins[0],), code=0):
        arguments = [str(twins[1]), *map(str, artifacts), "--text", str(text), "--work", str(tmp_path / "work")]
        assert load("robustness").main([*arguments, *OPTIONS, *more]) == code
        printed = capsys.readouterr()
        return json.loads(printed.out) if code == 0 else printed.err

    return run


def by_hand(twins, seen, noise=None):
    """(dense, masked) log-probabilities at 5 bits f64 [N, V] of an input, thresholds as stored."""
    artifact = open_artifact(twins[0])
    norms = {name: artifact.tensor(name) for name, _ in norm_specs(artifact.config)}
    model = MaskedModel(artifact.config, artifact.groups, norms)
    params = {name: g.thresholds[0, 1] for name, g in artifact.groups.items() if name != "embed"}
    dense = DenseModel(twins[2])
    x = dense.embedding[seen] + (0 if noise is None else noise)
    masked, _ = perturb.masked_logits(model, seen, get_rule("channel-norm"), params, noise)
    return tuple(torch.log_softmax(t.double(), -1) for t in (perturb.dense_logits(dense, x), masked))


def kl(p, q):
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_figures_of_every_perturbation(run, load, twins, monkeypatch):
    robustness = load("robustness")
    monkeypatch.setattr(robustness.Masked, "settle", lambda self, windows: None)  # so that thresholds are as stored
    monkeypatch.setattr(robustness, "STRENGTHS", {k: v[-1:] for k, v in robustness.STRENGTHS.items()})
    result = run("--bits", "5", "--seeds", "1")
    rows = {(r["rule"], r["perturbation"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * 6
    text, dense = perturb.EditableText(twins[2]), DenseModel(twins[2])
    tokens = torch.tensor(text.edit([60], lambda _: TEXT))
    clean = tokens[: 6 * WINDOW].view(6, WINDOW)
    sums: dict[str, list] = {}
    for place, ids in enumerate(clean):
        rng = np.random.default_rng((1, place, robustness.zlib.crc32(b"embedding noise")))
        noise = perturb.embedding_noise(dense, WINDOW, 0.6, rng)
        flipped = perturb.hotflip(dense, ids, [8], text.ordinary(), 1000 + place)[0]
        rng = np.random.default_rng((1, place, robustness.zlib.crc32(b"typos")))
        wrong = torch.tensor(text.edit(ids.tolist(), lambda t, rng=rng: perturb.typos(t, 0.1, rng))[:WINDOW])
        pure = by_hand(twins, ids)
        cases = {"none": (ids, ids, None), "embedding noise": (ids, ids, noise)}
        cases |= {"HotFlip": (flipped, ids, None), "typos": (wrong, wrong, None)}
        for kind, (seen, targets, added) in cases.items():
            got = by_hand(twins, seen, added)
            nll = [-float(logp[:-1].gather(1, targets[1:, None]).sum()) for logp in got]
            moved = [kl(a, b) if kind in ("embedding noise", "HotFlip") else 0 for a, b in zip(pure, got, strict=True)]
            words = len(text.decode(targets.tolist()).split())
            sums.setdefault(kind, []).append((kl(*got), *nll, *moved, len(seen), len(targets) - 1, words))
    for kind, found in sums.items():
        divergence, dense_nll, nll, dense_moved, moved, count, targets, words = np.array(found).T
        row, reference = rows["channel-norm", kind], rows["dense", kind]
        assert row["kl"] == pytest.approx((divergence * count).sum() / count.sum(), rel=1e-3), kind
        assert row["ppl"] == pytest.approx(np.exp(nll.sum() / targets.sum()), rel=1e-3), kind
        assert reference["ppl"] == pytest.approx(np.exp(dense_nll.sum() / targets.sum()), rel=1e-3), kind
        if kind in ("embedding noise", "HotFlip"):
            assert row["kl_self"] == pytest.approx((moved * count).sum() / count.sum(), rel=1e-3)
            assert reference["kl_self"] == pytest.approx((dense_moved * count).sum() / count.sum(), rel=1e-3)
            assert row["ppl_ratio"] == pytest.approx(row["ppl"] / rows["channel-norm", "none"]["ppl"])
        if kind == "typos":
            before = np.array(sums["none"])
            ratio = np.exp(nll.sum() / words.sum() - before[:, 2].sum() / before[:, 7].sum())
            assert row["ppl_ratio_word"] == pytest.approx(ratio, rel=1e-3) and row["ppl_ratio"] is None
    assert all(rows["dense", kind]["kl"] == 0 for kind in sums)


def test_all_candidates_and_results(run, twins, tmp_path):
    result = run("--bits", "4.5,5.5,dense", "--windows", "2", artifacts=(twins[0], twins[0]))
    assert json.loads((tmp_path / "results" / "robustness-tiny.json").read_text()) == result
    names = {(r["artifact"], r["bits"]) for r in result["rows"]}
    assert names == {("", None), *((f"twin {i}", b) for i in (1, 2) for b in (4.5, 5.5, "dense"))}
    cells = {(r["perturbation"], r["strength"], r["seed"]) for r in result["rows"]}
    assert len(cells) == 1 + 13 * 2 and len(result["rows"]) == 7 * len(cells)
    clean = {r["bits"]: r for r in result["rows"] if r["perturbation"] == "none"}
    assert clean[4.5]["bits_read_body"] == pytest.approx(4.5, rel=0.005)
    assert clean[5.5]["bits_read_body"] == pytest.approx(5.5, rel=0.005)
    assert clean[4.5]["kl"] > clean[5.5]["kl"] > clean["dense"]["kl"] > 0
    noisy = [r for r in result["rows"] if r["perturbation"] == "embedding noise" and r["artifact"] == "twin 1"]
    moved = [r["kl_self"] for r in noisy if r["bits"] == 4.5 and r["seed"] == 0]
    assert len(moved) == 3 and moved == sorted(moved)
    assert len(result["verdict"]) == 6 and {v["perturbation"] for v in result["verdicts"]} > {"all", "typos", "HotFlip"}
    page = (tmp_path / "results" / "robustness-tiny.md").read_text()
    assert result["verdict"][0] in page and "twin 1 channel-norm, 4.5 bits" in page
    assert result["own_weights"] == []


def test_an_interrupted_run_goes_on(run, load, monkeypatch):
    robustness = load("robustness")
    real, calls, stop_at = robustness.Masked.logits, [], 40

    def counted(self, seen):
        calls.append(self.bits)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(self, seen)

    monkeypatch.setattr(robustness.Masked, "logits", counted)
    short = ("--bits", "5", "--windows", "2")
    with pytest.raises(KeyboardInterrupt):
        run(*short)
    stop_at = None
    first = run(*short)
    took, calls[:] = len(calls) - 40, []
    assert run(*short)["rows"] == first["rows"] and not calls
    run(*short, "--seeds", "0,1,2")
    per_seed, settling = 2 * (1 + 13), 2 * robustness.SETTLE_PASSES
    assert took <= 2 * per_seed + 2 + settling - 30  # it began again where it stood, but for the clean windows
    assert 2 * 13 <= len(calls) <= per_seed + settling  # nothing but the new seed


def test_quick_is_short(run, tmp_path):
    result = run("--quick", "--bits", "5,5.5")
    assert (result["windows"], {r["seed"] for r in result["rows"]}) == (2, {0})
    assert {r["bits"] for r in result["rows"]} == {None, 5.0} and len(result["rows"]) == 2 * 6
    assert {v["verdict"] for v in result["verdicts"]} == {"too few windows"}
    assert (tmp_path / "results" / "robustness-tiny-quick.md").exists()


def test_bad_input_is_one_line(run, tmp_path, twins):
    other, _ = make_twins(tmp_path / "other.lowtide", ODD)
    assert "made from another model: its vocab_size is 101" in run(artifacts=(other,), code=2)
    assert "the model's context holds 64 tokens" in run("--window", "65", "--windows", "1", code=2)
    assert "8 token flips: a window of 12 tokens has 5 positions" in run("--bits", "5", "--window", "12", code=2)
    assert "stores budgets from 4 to 6" in run("--bits", "3", code=2)


def test_weights_of_its_own_are_said(run, tmp_path):
    trained, _ = make_twins(tmp_path / "trained.lowtide", seed=5)
    result = run("--quick", "--bits", "5", artifacts=(trained,))
    assert result["own_weights"] == ["trained"]
    assert [r["kl"] for r in result["rows"] if r["rule"] == "channel-norm"][0] > 0.1


def test_the_rule_ipn_has_its_gains(run, load, tmp_path):
    path = make_artifact(tmp_path / "trained.lowtide", policies=("ipn", "channel-norm"), budgets=(4.0, 5.0, 6.0))
    artifact, robustness = open_artifact(path), load("robustness")
    norms = {name: artifact.tensor(name) for name, _ in norm_specs(artifact.config)}
    model = MaskedModel(artifact.config, artifact.groups, norms)
    seen = robustness.Input(torch.tensor([1, 40, 77, 12, 99]), torch.tensor([1, 40, 77, 12, 99]), 5, 5)
    logits, bits = robustness.Masked(artifact, "trained", model, "ipn", 5.0).logits(seen)
    stored = {name: g for name, g in artifact.groups.items() if name != "embed"}
    params = {name: g.thresholds[0, 1] for name, g in stored.items()}
    gains = {name: 0.0 if g.ipn.gain is None else float(g.ipn.gain[1]) for name, g in stored.items()}
    want, want_bits = model.logits(seen.ids[None], get_rule("ipn"), params, gains)
    assert torch.equal(logits, want[0]) and bits == want_bits
    assert not torch.equal(logits, model.logits(seen.ids[None], get_rule("ipn"), params)[0][0])
    result = run("--quick", "--bits", "5", "--policy", "ipn,channel-norm", artifacts=(path,))
    assert {r["rule"] for r in result["rows"]} == {"dense", "ipn", "channel-norm"}


# ---- tests of differences and the verdict ----


def test_paired_intervals_cover_as_often_as_they_say(load):
    report, rng = load("robustness_report"), np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        test = report.paired(rng.normal(0.3, 1.0, 24))
        assert test["low"] < test["mean"] < test["high"]
        inside += test["low"] < 0.3 < test["high"]
    assert 50 <= inside < 60
    sure = report.paired(np.full(8, 0.25) + 0.01 * np.arange(8))
    assert sure["low"] > 0.25 and sure["p"] == 0.0
    assert report.paired(np.array([-1.0, 1.0] * 4))["p"] > 0.5


def record(window, artifact, kind, nll, **more):
    dense = artifact == ""
    figures = {
        "artifact": artifact,
        "rule": "dense" if dense else "r",
        "target": None if dense else 3.0,
        "window": window,
    }
    figures |= {"perturbation": kind, "strength": 0.1, "seed": 0, "bits": None, "kl": 0.0, "kl_self": None}
    figures |= {"nll": 10 * nll, "targets": 10, "words": 5, "characters": 30, "tokens": 11, "temperature": 1.5}
    return figures | {"nll_soft": 0.0, "kl_self_soft": None, "curve": [10.0, 15.0, 20.0]} | more


def records(lost, lost_dense, lost_soft, kind="typos", windows=8, **more):
    """Clean losses 1 (dense), 1.5 (candidate and softened dense); `lost` etc. are rises in nats per token."""
    out = []
    for w in range(windows):
        jitter = 0.01 * w
        out += [record(w, "", "none", 1.0), record(w, "", kind, 1 + lost_dense + jitter)]
        soft = {"nll_soft": 10 * (1.5 + lost_soft + jitter)}
        out += [record(w, "a", "none", 1.5), record(w, "a", kind, 1.5 + lost + jitter, **soft, **more)]
    return out


@pytest.mark.parametrize(
    ("rises", "windows", "want"),
    [
        ((0.5, 0.4, 0.5), 8, "less robust"),
        ((0.4, 0.5, 0.45), 8, "more robust"),
        ((0.4, 0.5, 0.35), 8, "less sure"),
        ((0.4, 0.4, 0.6), 8, "equal"),
        ((0.5, 0.4, 0.5), 5, "too few windows"),
    ],
)
def test_the_verdict_follows_the_figures(load, rises, windows, want):
    report = load("robustness_report")
    found = records(*rises, windows=windows)
    for i, r in enumerate(found):  # a little noise, as the intervals of "equal" need some width
        r["nll"] += 0.01 * (-1) ** (i // 4)
    (verdict,) = report.verdicts(found, (1.0, 1.5, 2.0))
    assert verdict["verdict"] == want
    assert verdict["loses"]["mean"] == pytest.approx(rises[0] - rises[1], abs=0.003)
    assert verdict["loses_soft"]["mean"] == pytest.approx(rises[0] - rises[2], abs=0.003)
    assert report.VERDICTS[want] in report.sentence(verdict)


@pytest.mark.parametrize(
    ("lost_soft", "moved_dense", "moved_soft", "want"),
    [
        (0.45, 0.1, 0.2, "mixed"),  # loses less than both, moves more
        (0.35, 0.1, 0.2, "less robust"),  # loses less only for being less sure, moves more
        (0.35, 0.4, 0.5, "more robust"),  # moves less than both
        (0.35, 0.4, 0.2, "less sure"),
    ],
)
def test_movement_counts_as_much_as_loss(load, lost_soft, moved_dense, moved_soft, want):
    report = load("robustness_report")
    found = records(0.4, 0.5, lost_soft, kind="HotFlip", kl_self=0.3, kl_self_soft=moved_soft)
    for r in found:
        if r["artifact"] == "" and r["perturbation"] != "none":
            r["kl_self"] = moved_dense
    (verdict,) = report.verdicts(found, (1.0, 1.5, 2.0))
    assert verdict["moves"]["mean"] == pytest.approx(0.3 - moved_dense)
    assert verdict["moves_soft"]["mean"] == pytest.approx(0.3 - moved_soft)
    assert verdict["verdict"] == want


def test_losses_per_word_do_not_depend_on_how_tokens_are_cut(load):
    report = load("robustness_report")
    clean = record(0, "", "none", 1.0)
    whole, half = record(0, "", "typos", 2.0, targets=20), record(0, "", "typos", 1.0, words=2.5)
    assert report.loss(whole, clean) == report.loss(half, clean) == pytest.approx(2.0)
    assert report.loss(record(0, "", "HotFlip", 2.0, words=1), clean) == pytest.approx(2.0)


def test_softening_matches_the_clean_loss(load):
    report = load("robustness_report")
    dense = [record(w, "", "none", 1.2, curve=[12.0, 10.0, 13.0, 17.0]) for w in range(3)]
    picks = [report.softening([record(w, "a", "none", loss) for w in range(3)], dense) for loss in (0.9, 1.2, 1.6, 9.0)]
    assert picks == [1, 2, 3, 3]  # never below the dense model's best temperature
