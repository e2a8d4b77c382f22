"""The trainable graded model against the masked reference, and its gradients against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.twin import TwinSource, write_folder

from lowtide.arch import norm_specs
from lowtide.compress import compress, products
from lowtide.compress.dense import DenseModel
from lowtide.compress.masked import MaskedModel
from lowtide.compress.sources import open_source
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.learn import head, slices
from lowtide.learn.always import Always
from lowtide.learn.graded import Code, GradedModel, budget_tables
from lowtide.learn.graded_group import GradedGroup, MaskedProduct
from lowtide.learn.head import head_kl
from lowtide.learn.ipn import At, Ipn
from lowtide.learn.ipn_export import write_weights
from lowtide.learn.slices import FloatSlices, IntegerSlices
from lowtide.rules import get_rule
from lowtide.runtime.budget import policy_params

BITS = 3.0


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """(artifact, dense model): the small model compressed."""
    folder = tmp_path_factory.mktemp("graded")
    write_folder(small.source, folder / "model")
    compress(folder / "model", folder / "artifact")
    return open_artifact(folder / "artifact"), DenseModel(open_source(folder / "model"))


@pytest.fixture
def exact(monkeypatch):
    """Products in float32, so that the same levels must come out."""
    monkeypatch.setattr(products, "_chosen", [products.EXACT])


def untrained(artifact):
    grid, tables = budget_tables(artifact)
    importance = {n: torch.from_numpy(g.importance.astype(np.float32)) for n, g in artifact.groups.items()}
    return Ipn(importance, grid, tables, features=4)


def test_an_untrained_network_reads_what_channel_norm_reads(made, small, exact):
    artifact, dense = made
    params = policy_params(artifact, "channel-norm", BITS)
    norms = {n: artifact.tensor(n) for n, _ in norm_specs(artifact.config)}
    masked = MaskedModel(artifact.config, artifact.groups, norms, quantise_coefficients=False)
    names = [n for n in artifact.groups if n != "embed"]
    thresholds = dict(zip(names, params.thresholds, strict=True))
    logits, bits = masked.logits(small.ids[:2], get_rule("channel-norm"), thresholds)
    model, at = GradedModel(artifact, dense), At(untrained(artifact), BITS)
    hidden, read = model.hidden(small.ids[:2], at)
    assert float(read.detach().mean()) == pytest.approx(bits, rel=1e-6)
    theirs = dense.hidden(small.ids[:2])
    loss = head_kl(model, hidden, theirs, dense.head_weight, at)
    logp, logq = F.linear(theirs, dense.head_weight).log_softmax(-1), logits.log_softmax(-1)
    assert float(loss) == pytest.approx(float((logp.exp() * (logp - logq)).sum(-1).mean()), rel=1e-3)


def test_a_jointly_trained_artifact_is_what_training_goes_on_from(made, small, exact, tmp_path):
    artifact, dense = made
    trained = GradedModel(artifact, dense, train_weights=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in trained.parameters().items():
            p += (0.1 if "log_" in name else 0.3) * p.std() * torch.randn(p.shape, generator=generator)
    trained.refresh()
    write_weights(artifact, trained, tmp_path / "joint", {"learned": {"joint": True}})
    again, ipn = open_artifact(tmp_path / "joint"), untrained(artifact)
    bits = ipn.grid[-1]
    with torch.no_grad():
        expected = trained.hidden(small.ids[:2], At(ipn, bits))[0]
        plain = GradedModel(again, dense)
        assert torch.allclose(plain.hidden(small.ids[:2], At(ipn, bits))[0], expected, atol=0.02)
        assert not torch.allclose(plain.hidden(small.ids[:2], At(ipn, bits))[0], dense.hidden(small.ids[:2]), atol=0.5)
        more = GradedModel(again, dense, train_weights=True)
        more.refresh()
    for name, code in more.codes.items():
        stored = torch.from_numpy(again.groups[name].codes())
        assert torch.equal(code.digits(more.groups[name].parameters()[0]), stored)
    assert all(torch.equal(t, more.norm_tensors()[n]) for n, t in trained.norm_tensors().items())


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_other_products_change_little(made, small, monkeypatch, kind):
    artifact, dense = made
    monkeypatch.setattr(products, "_chosen", [products.TYPES[kind]])
    model, ipn = GradedModel(artifact, dense), untrained(artifact)
    with torch.no_grad():
        hidden, read = model.hidden(small.ids, At(ipn, ipn.grid[-1]))  # read in full: no mask may tip over
        monkeypatch.setattr(products, "_chosen", [products.EXACT])
        precise, same = GradedModel(artifact, dense).hidden(small.ids, At(ipn, ipn.grid[-1]))
    assert isinstance(model.groups["layers.0.o"].slices, IntegerSlices if kind == "int8" else FloatSlices)
    assert hidden.dtype == torch.float32
    assert float(read.mean()) == pytest.approx(float(same.mean()), rel=0.01)
    assert 0 < float((hidden - precise).norm() / precise.norm()) < 0.05


def test_gradients_in_int8_are_near(made, small, monkeypatch):
    artifact, dense = made
    theirs = dense.hidden(small.ids[:1])
    found = []
    for kind in ("float32", "int8"):
        monkeypatch.setattr(products, "_chosen", [products.TYPES[kind]])
        model, generator = GradedModel(artifact, dense, train_weights=True), torch.Generator().manual_seed(2)
        model.refresh()
        group = model.groups["layers.0.gate_up"]
        a, score = (torch.randn(9, group.inputs, generator=generator, requires_grad=True) for _ in range(2))
        theta = torch.tensor([-0.5, 0.1, 0.6], requires_grad=True)
        y, count = MaskedProduct.apply(a, score, theta, *group.parameters(), group, 0.7)
        (y * torch.randn(y.shape, generator=generator)).sum().add(count.sum()).backward()
        ours = (theirs + 0.3 * torch.randn(theirs.shape, generator=generator)).requires_grad_(True)
        head_kl(model, ours, theirs, dense.head_weight, At(untrained(artifact), BITS)).backward()
        learned = {what: p.grad for what, p in group.learned.items() if what != "bias"}
        found.append(learned | {"a": a.grad, "score": score.grad, "theta": theta.grad, "head": ours.grad})
    precise, near = found
    for name, grad in precise.items():
        assert grad.any(), name
        assert 0.99 < float(F.cosine_similarity(near[name].flatten(), grad.flatten(), 0)), name
        assert float(near[name].norm()) == pytest.approx(float(grad.norm()), rel=0.05), name


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_are_those_of_the_text(exact, monkeypatch, apart):
    """Under thresholds of all rows, and of each of three layers."""
    generator = torch.Generator().manual_seed(0)
    units = [torch.randn(7, 5, generator=generator) for _ in range(3)]
    scales = [torch.rand(n, generator=generator) + 0.1 for n in (7, 5)]
    always = torch.randn(7, 5, generator=generator) * (torch.rand(7, 5, generator=generator) < 0.3)
    outs = [4, 1, 2]
    rest = Always(always), torch.zeros(7), torch.zeros(5), 0, outs
    group = GradedGroup("layers.0.o", FloatSlices(torch.cat(units, 1), 3), *scales, *rest)
    planes = [scales[0][:, None] * unit * scales[1] for unit in units]
    monkeypatch.setattr(slices, "CHUNK", 15)  # three tokens at a time
    a, score = (torch.randn(4, 5, generator=generator, requires_grad=True) for _ in range(2))
    cuts = torch.tensor([-0.5, 0.1, 0.6])
    theta = (cuts + torch.tensor([[-0.2], [0.3], [0.0]]) if apart else cuts).requires_grad_(True)
    tau = 0.7
    learned = [torch.zeros(s, requires_grad=True) for s in ((7, 5), 7, 5)]
    y, count = MaskedProduct.apply(a, score, theta, *learned, group, tau)
    g, h = torch.randn(4, 7, generator=generator), torch.randn(4, generator=generator)
    ((y * g).sum() + (count * h).sum()).backward()
    b, s, t, rows, cols = (v.detach().clone().requires_grad_(True) for v in (a, score, theta, *learned[1:]))
    of = t.repeat_interleave(torch.tensor(outs), 0) if apart else t.expand(7, 3)  # of each row, [7, 3]
    soft = torch.sigmoid((s - of[:, :, None, None]) / tau)
    masks = (s > of[:, :, None, None]).float() + soft - soft.detach()  # straight-through, [7, 3, 4, 5]
    scaled = torch.stack([plane * rows.exp()[:, None] * cols.exp() for plane in planes], 1)  # [7, 3, 5]
    reference = F.linear(b, always) + torch.einsum("ti,rkti,rki->tr", b, masks, scaled)
    opened = masks.sum((1, 3)).mean(0)
    ((reference * g).sum() + (opened * h).sum()).backward()
    assert torch.allclose(y, reference, atol=1e-5) and torch.allclose(count, opened, atol=1e-4)
    for ours, theirs in ((a, b), (score, s), (theta, t), (learned[1], rows), (learned[2], cols)):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
    read = (a * (score > of[:, 0, None, None])).detach()  # [7, 4, 5]
    wanted = scales[0][:, None] * scales[1] * torch.einsum("tr,rti->ri", g, read)
    assert torch.allclose(learned[0].grad, wanted, atol=1e-5)


def test_the_heads_gradient_is_autograds_masks_held(made, small, exact, monkeypatch):
    monkeypatch.setattr(head, "TOKENS", 5)
    artifact, dense = made
    model, at = GradedModel(artifact, dense), At(untrained(artifact), BITS)
    theirs = dense.hidden(small.ids[:1])
    ours = (theirs + 0.1 * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))).requires_grad_(True)
    loss = head_kl(model, ours, theirs, dense.head_weight, at)
    loss.backward()
    again, group = ours.detach().clone().requires_grad_(True), model.groups["head"]
    a = again - group.mean
    score, theta = (t.detach() for t in at.scores("head", a[0]))
    masks = (score > theta[:, None, None]).float()
    assert 0 < masks.mean() < 1
    planes = group.slices.planes.float().view(group.out, -1, group.inputs)
    weights = planes * group.rows[:, None, None] * group.cols
    logits = F.linear(a, group.always.dense()) + group.bias
    logits = logits + sum(F.linear(a * mask, weights[:, k]) for k, mask in enumerate(masks))
    logp, logq = F.linear(theirs, dense.head_weight).log_softmax(-1), logits.log_softmax(-1)
    wanted = (logp.exp() * (logp - logq)).sum(-1).mean()
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)
    assert torch.allclose(ours.grad, again.grad, atol=1e-6)


def test_the_head_may_be_read_in_full(made, small, exact):
    artifact, dense = made
    model, ipn = GradedModel(artifact, dense), untrained(artifact)
    theirs = dense.hidden(small.ids[:1])
    ours = theirs + 0.1 * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    group = model.groups["head"]
    weights = torch.from_numpy(artifact.groups["head"].dequantise(0, group.slices.count)).float()
    logq = (F.linear(ours - group.mean, weights + group.always.dense()) + group.bias).log_softmax(-1)
    logp = F.linear(theirs, dense.head_weight).log_softmax(-1)
    wanted = (logp.exp() * (logp - logq)).sum(-1).mean()
    full, once = (head_kl(model, ours, theirs, dense.head_weight, At(ipn, 2.0, full_head=f)) for f in (True, False))
    assert float(full) == pytest.approx(float(wanted), rel=1e-3) and float(once) > 1.1 * float(full)


@pytest.mark.parametrize("name", ["layers.0.qkv", "layers.1.down"])
def test_codes_are_those_of_the_file(made, name, exact, monkeypatch):
    group = made[0].groups[name]
    code = Code(group)
    whole = np.concatenate([group.dequantise(i, group.slices) for i in range(len(group.linears))])
    values = torch.from_numpy(whole / np.float32(group.shrink[-1]))
    assert torch.equal(code.digits(values / code.rows / code.cols), code.stored)
    planes = [code.rows * plane * code.cols for plane in code.coded(code.stored).planes.chunk(group.slices, 1)]
    for level in range(1, group.slices + 1):
        stored = np.concatenate([group.dequantise(i, level) for i in range(len(group.linears))])
        ours = sum(planes[:level]).numpy()
        exact_columns = group.exact_channels
        ours[:, exact_columns] = stored[:, exact_columns]  # their masks are closed, whatever their digits are
        np.testing.assert_allclose(ours, stored, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(slices, "CHUNK", 3 * group.in_features)
    zero = torch.zeros(len(values)), torch.zeros(group.in_features)
    assert torch.equal(code.of(values, *zero)[0].planes, code.coded(code.digits(values)).planes)
    far = torch.full_like(values, 1e6)
    kept = code.digits(far)
    assert torch.equal(kept[code.fixed], code.stored[code.fixed]) and (kept[~code.fixed] == 63).all()


def test_another_model_is_refused(made, small):
    tensors = {n: small.source.tensor(n).numpy() for n in small.source.names()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    other = DenseModel(TwinSource(small.source.config, tensors, small.source.tokenizer_files()))
    with pytest.raises(LowtideError, match="was made from other weights of this shape"):
        GradedModel(made[0], other)
