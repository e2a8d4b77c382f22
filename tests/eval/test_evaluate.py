"""evaluate(): the figures against ones computed apart, and the references that are refused."""

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.tiny import ODD  # noqa: E402
from support.twin import TwinSource, make_twins  # noqa: E402

from lowtide.arch import group_specs  # noqa: E402
from lowtide.compress.dense import DenseModel  # noqa: E402
from lowtide.errors import LowtideError  # noqa: E402
from lowtide.eval import evaluate  # noqa: E402
from lowtide.format.reader import open_artifact  # noqa: E402
from lowtide.kernels.reference import ReferenceEngine  # noqa: E402
from lowtide.runtime.budget import BudgetController, body_side_bits, body_weights, policy_params  # noqa: E402

TEXT = "the end of the tide is there and then another one in the hand " * 3
WINDOW = 24


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return make_twins(tmp_path_factory.mktemp("eval") / "twin.lowtide")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(twins, text, **options):
    options = {"windows": 2, "window": WINDOW, "bits": [5.5], "engine": "reference", "progress": False} | options
    return evaluate(*twins, text, **options)


def log_probabilities(logits):
    return torch.log_softmax(torch.as_tensor(np.asarray(logits), dtype=torch.float64), -1).numpy()


def by_hand(artifact, source, windows, bits):
    """One budget's figures by the definitions of the issue, written without the code under test."""
    model, engine = DenseModel(source), ReferenceEngine(artifact)
    controller = BudgetController(
        policy_params(artifact, None, bits), bits, body_weights(artifact), body_side_bits(artifact)
    )
    kl, nll, dense_nll, body, total = [], [], [], [], []
    for row in windows:
        want = log_probabilities(model.logits(torch.from_numpy(row.astype(np.int64))[None])[0])
        for i, token in enumerate(row):
            logits, stats = engine.decode(int(token), i, controller.params)
            controller.update(stats.body_bits)
            got = log_probabilities(logits)
            kl.append((np.exp(want[i]) * (want[i] - got)).sum())
            if i + 1 < len(row):
                nll.append(-got[row[i + 1]])
                dense_nll.append(-want[i, row[i + 1]])
            body.append(stats.body_bits)
            total.append(stats.body_bits + stats.head_bits)
    specs = group_specs(artifact.config)
    all_weights = sum(s.weights for s in specs)
    body_weights_ = sum(s.weights for s in specs if s.is_body)
    return {
        "kl": np.mean(kl),
        "ppl": math.exp(np.mean(nll)),
        "dense_ppl": math.exp(np.mean(dense_nll)),
        "bits_read_body": np.mean(body) / body_weights_,
        "bits_read_total": np.mean(total) / all_weights,
    }


def test_figures_equal_those_by_hand(twins, text):
    result = run(twins, text, bits=[4.5, 5.5])
    artifact, source = open_artifact(twins[0]), twins[1]
    from lowtide.runtime.model import load_tokenizer

    ids = np.array(load_tokenizer(artifact).encode(TEXT, special=False)[: 2 * WINDOW]).reshape(2, WINDOW)
    for point, bits in zip(result["points"], (4.5, 5.5), strict=True):
        want = by_hand(artifact, source, ids, bits)
        assert point["bits"] == bits
        for key in ("kl", "ppl", "bits_read_body", "bits_read_total"):
            assert point[key] == pytest.approx(want[key], rel=1e-6), key
        assert result["dense_ppl"] == pytest.approx(want["dense_ppl"], rel=1e-6)
    assert result["points"][0]["kl"] > result["points"][1]["kl"] > 0


def test_the_json_of_the_issue(twins, text):
    result = json.loads(json.dumps(run(twins, text, bits=[5.5, "dense", None])))
    assert list(result) == ["windows", "window", "dense_ppl", "points", "file_bytes", "file_bits_per_weight"]
    for point in result["points"]:
        assert list(point) == ["bits", "bits_read_body", "bits_read_total", "kl", "ppl"]
    assert [p["bits"] for p in result["points"]] == [5.5, "dense", "dense"]
    assert result["points"][1] == result["points"][2]
    assert (result["windows"], result["window"]) == (2, WINDOW)
    size = sum(f.stat().st_size for f in twins[0].iterdir())
    weights = sum(s.weights for s in group_specs(twins[1].config))
    assert result["file_bytes"] == size
    assert result["file_bits_per_weight"] == pytest.approx(8 * size / weights)


def test_a_full_read_is_nearly_the_dense_model(twins, text):
    result = run(twins, text, bits=["dense"])
    (point,) = result["points"]
    assert 0 < point["kl"] < 1e-3
    assert point["ppl"] == pytest.approx(result["dense_ppl"], rel=0.01)


def test_a_head_read_twice_reads_less_in_all_and_costs_a_little(twins, text):
    once, twice = (run(twins, text, bits=[4.5], head=head)["points"][0] for head in ((0, 0), (1.5, 0.0)))
    assert twice["bits_read_total"] < once["bits_read_total"]
    assert twice["bits_read_body"] == once["bits_read_body"]
    assert twice["kl"] != once["kl"]


def test_points_do_not_disturb_each_other(twins, text):
    alone = run(twins, text, bits=[5.5])["points"][0]
    assert run(twins, text, bits=[4.2, 5.5, "dense"])["points"][1] == alone


def test_the_budget_is_kept_over_a_long_text(twins):
    ids = np.random.default_rng(0).integers(3, 130, (12, 48))
    for point in run(twins, ids, windows=12, window=48, bits=[4.3, 5.2])["points"]:
        assert point["bits_read_body"] == pytest.approx(point["bits"], rel=0.01)


def test_token_ids_and_bos(twins, text):
    from lowtide.runtime.model import load_tokenizer

    ids = load_tokenizer(open_artifact(twins[0])).encode(TEXT, special=False)
    assert run(twins, np.array(ids)) == run(twins, text)
    with_bos = run(twins, text, bos=True)
    rows = np.array(ids[: 2 * (WINDOW - 1)]).reshape(2, WINDOW - 1)
    assert with_bos == run(twins, np.concatenate([np.full((2, 1), 1), rows], axis=1))
    assert with_bos != run(twins, text)


def test_untied_models_count_head_and_embedding_apart(tmp_path, text):
    twins = make_twins(tmp_path / "odd.lowtide", ODD)
    (point,) = run(twins, text, bits=["dense"])["points"]
    artifact = open_artifact(twins[0])
    side = 8 * sum(g.side_bytes() for n, g in artifact.groups.items() if n != "embed")
    c, s = artifact.config, artifact.manifest.slices
    digits = sum(
        2 * s * (g.in_features - len(g.exact_channels)) * sum(m.out_features for m in g.linears)
        for n, g in artifact.groups.items()
        if n != "embed"
    )
    row = 2 * s * c.hidden_size + 16 * c.hidden_size + 16
    weights = sum(spec.weights for spec in group_specs(c))
    assert point["bits_read_total"] == pytest.approx((side + digits + row) / weights)


def test_an_engine_of_ones_own(twins, text):
    class Counting(ReferenceEngine):
        calls: list[tuple[int, int]] = []

        def decode(self, token, pos, policy, want_logits=True):
            self.calls.append((token, pos))
            return super().decode(token, pos, policy, want_logits)

    engine = Counting(open_artifact(twins[0]))
    result = run(twins, text, engine=engine)
    assert result == run(twins, text)
    assert [pos for _, pos in engine.calls] == [*range(WINDOW)] * 2  # every token is masked, none prefilled
    engine.decode(1, 0, policy_params(open_artifact(twins[0]), None, 5.0))  # still open


def other(source, **changes):
    import dataclasses

    return TwinSource(
        dataclasses.replace(source.config, **changes.pop("config", {})),
        changes.pop("tensors", source._tensors),
        changes.pop("files", source.tokenizer_files()),
    )


def test_another_model_is_refused(twins, text):
    path, source = twins
    with pytest.raises(LowtideError, match="another model than the artifact's: hidden_size is 44, not 48"):
        evaluate(path, other(source, config={"hidden_size": 44}), text, window=WINDOW)
    tensors = {k: v.copy() for k, v in source._tensors.items()}
    tensors["model.norm.weight"][3] += 1e-3
    with pytest.raises(LowtideError, match="other weights of this shape"):
        evaluate(path, other(source, tensors=tensors), text, window=WINDOW)


def test_another_tokenizer_is_refused(twins, text):
    path, source = twins
    files = source.tokenizer_files()
    spec = json.loads(files["tokenizer.json"])
    vocab = spec["model"]["vocab"]
    vocab["t"], vocab["e"] = vocab["e"], vocab["t"]
    swapped = files | {"tokenizer.json": json.dumps(spec).encode()}
    with pytest.raises(LowtideError, match="its tokenizer cuts the text differently"):
        run((path, other(source, files=swapped)), text)
    with pytest.raises(LowtideError, match="holds no tokenizer"):
        run((path, other(source, files={})), text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [3.0]}, "--bits 3"),
        ({"bits": [9.0]}, "--bits 9"),
        ({"bits": ["lots"]}, "--bits lots: give a positive number"),
        ({"bits": []}, "at least one budget"),
        ({"policy": "magic"}, "unknown mask rule"),
        ({"policy": "topk"}, "stores no thresholds"),
        ({"engine": "magic"}, "--engine magic: known are native, reference"),
        ({"window": 65}, "--window 65: the model's context holds 64"),
        ({"window": 1}, "--window 1"),
        ({"windows": 0}, "--windows 0"),
    ],
)
def test_wrong_options_are_refused(twins, text, options, message):
    with pytest.raises(LowtideError, match=message):
        run(twins, text, **options)


def test_a_text_shorter_than_one_window_is_refused(twins, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(LowtideError, match="short.txt: holds .* tokens, one window needs 24"):
        run(twins, path)
