"""Generation: the loop against a scripted engine, and against the numpy reference step by step."""

import subprocess
import sys

import numpy as np
import pytest
from support.tiny import make_artifact

import lowtide
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels.reference import ReferenceEngine
from lowtide.kernels.types import DecodeStats
from lowtide.runtime.model import Model, load_tokenizer
from lowtide.runtime.tokenizer import Tokenizer

EOS, VOCAB = 2, 130


class Script:
    """An engine that says what it is told to, and remembers what it was asked."""

    isa, threads, vocab_size = "script", 1, VOCAB
    body_bits = 10**5

    def __init__(self, tokens, max_context=64):
        self.tokens, self.max_context = iter(tokens), max_context
        self.calls = []
        self.closed = 0

    def _logits(self):
        return np.eye(1, VOCAB, next(self.tokens), dtype=np.float32)[0]

    def prefill(self, tokens, pos, all_logits=False):
        self.calls.append(("prefill", list(tokens), pos))
        return self._logits()

    def decode(self, token, pos, policy, want_logits=True):
        self.calls.append(("decode", token, pos))
        self.offsets = [*getattr(self, "offsets", []), policy.log2_offset]
        return self._logits(), DecodeStats(body_bits=self.body_bits, head_bits=8, bytes_read=500)

    def close(self):
        self.closed += 1


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return open_artifact(make_artifact(tmp_path_factory.mktemp("model") / "a"))


@pytest.fixture
def scripted(artifact):
    tokenizer = load_tokenizer(artifact)

    def make(text, max_context=64, ends=True):
        return Model(artifact, Script([*tokenizer.encode(text), *[EOS] * ends], max_context), tokenizer)

    return make


def test_generation_streams_until_the_end_of_sequence(scripted):
    model = scripted("the tide")
    assert "".join(model.generate("hi", bits=5)) == "the tide"
    ids = model.tokenizer.encode("hi")
    written = model.tokenizer.encode("the tide")
    assert model.engine.calls == [("prefill", ids, 0)] + [("decode", t, len(ids) + i) for i, t in enumerate(written)]
    assert model.stats.finish == "stop"
    assert (model.stats.prompt_tokens, model.stats.tokens) == (len(ids), len(written))
    assert model.stats.bytes_read == 500
    assert model.stats.bits_read_body == pytest.approx(model.controller(5.0).per_weight(10**5))


def test_the_controller_moves_between_tokens(scripted):
    model = scripted("the tide")
    model.engine.body_bits = int(5.2 / model.controller(5.0).per_weight(1))
    list(model.generate("hi", bits=5))
    assert model.engine.offsets[0] == 0
    offsets = model.engine.offsets
    assert all(b > a for a, b in zip(offsets, offsets[1:], strict=False))  # every token reads too much
    model = scripted("the tide")
    list(model.generate("hi", bits=None))
    assert set(model.engine.offsets) == {0}


def test_generation_stops_at_max_tokens_without_a_wasted_decode(scripted):
    model = scripted("abcdefgh")
    assert "".join(model.generate("hi", max_tokens=3, bits=5)) == "abc"
    assert model.stats.finish == "length"
    assert [call[0] for call in model.engine.calls] == ["prefill", "decode", "decode"]


def test_generation_stops_where_the_context_ends(scripted):
    model = scripted("abcdefgh", max_context=5)
    assert "".join(model.generate("123", bits=5)) == "abc"  # 3 + 2 decoded; the last one needs no place
    assert model.stats.finish == "length"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "x" * 65}, r"the prompt has 65 tokens, the context holds 64"),
        ({"prompt": "x", "max_tokens": 0}, r"-n 0"),
        ({"prompt": "x", "bits": 99.0}, r"--bits 99"),
        ({"prompt": "x", "policy": "nope"}, r"unknown mask rule"),
        ({"prompt": "x", "top_p": 2.0}, r"--top-p"),
    ],
)
def test_bad_arguments_are_refused_by_the_call_itself(scripted, arguments, message):
    model = scripted("abc")
    with pytest.raises(LowtideError, match=message):
        model.generate(**{"bits": 5.0} | arguments)
    assert model.engine.calls == []


def test_an_empty_prompt_needs_a_begin_of_sequence_token(artifact, scripted):
    model = scripted("ab")
    assert "".join(model.generate("", bits=5)) == "ab"
    assert model.engine.calls[0] == ("prefill", [1], 0)
    without = Model(artifact, Script([EOS]), Tokenizer(artifact.file("tokenizer.json")))
    with pytest.raises(LowtideError, match="the prompt is empty"):
        without.generate("", bits=5)


def test_a_tokenizer_of_another_model_is_noticed(artifact):
    engine = Script([EOS])
    engine.vocab_size = 50
    with pytest.raises(LowtideError, match="belongs to another model"):
        Model(artifact, engine, load_tokenizer(artifact)).generate("~", bits=5)


def test_chat_applies_the_template_and_reads_only_what_is_new(artifact):
    tokenizer = load_tokenizer(artifact)
    engine = Script([*tokenizer.encode("yes"), EOS, *tokenizer.encode("no"), EOS])
    model = Model(artifact, engine, tokenizer)
    messages = [{"role": "user", "content": "a?"}]
    assert "".join(model.chat(messages, bits=5)) == "yes"
    first = tokenizer.encode("user: a?\nassistant: ")
    assert engine.calls[0] == ("prefill", first, 0)
    messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "b?"}]
    assert "".join(model.chat(messages, bits=5)) == "no"
    second = tokenizer.encode("user: a?\nassistant: yes\nuser: b?\nassistant: ")
    known = len(first) + len(tokenizer.encode("yes"))
    assert second[:known] == first + tokenizer.encode("yes")
    prefills = [call for call in engine.calls if call[0] == "prefill"]
    assert prefills[1] == ("prefill", second[known:], known)
    assert model.stats.reused_tokens == known


def test_the_same_conversation_twice_still_reads_its_last_token(artifact):
    engine = Script([EOS, EOS])
    model = Model(artifact, engine, load_tokenizer(artifact))
    for _ in range(2):
        list(model.chat([{"role": "user", "content": "a?"}], bits=5))
    assert len(engine.calls[1][1]) == 1
    assert engine.calls[1][2] == len(engine.calls[0][1]) - 1


def test_a_generation_that_was_overtaken_does_not_go_on(scripted):
    model = scripted("abcdefgh", ends=False)
    first = model.generate("hi", bits=5)
    assert next(first) == "a"
    second = model.generate("ho", bits=5)
    with pytest.raises(LowtideError, match="started another generation"):
        next(first)
    assert next(second) == "b"


def test_closing_twice_is_fine_and_using_it_after_is_not(scripted):
    with scripted("abc") as model:
        running = model.generate("hi", bits=5)
        next(running)
    model.close()
    assert model.engine.closed == 1
    with pytest.raises(LowtideError, match="closed"):
        next(running)
    with pytest.raises(LowtideError, match="closed"):
        model.generate("hi", bits=5)


@pytest.mark.parametrize("bits", [4.0, 5.0, None])
def test_greedy_generation_is_the_reference_decoded_by_hand(artifact, bits):
    tokenizer = load_tokenizer(artifact)
    model = Model(artifact, ReferenceEngine(artifact), tokenizer)
    text = "".join(model.generate("the", max_tokens=12, bits=bits))
    engine, control = ReferenceEngine(artifact), model.controller(bits)
    ids = tokenizer.encode("the")
    token = int(np.argmax(engine.prefill(np.asarray(ids, np.int32), 0)))
    out = []
    while token != EOS and len(out) < 12:
        out.append(token)
        logits, read = engine.decode(token, len(ids) + len(out) - 1, control.params)
        control.update(read.body_bits)
        token = int(np.argmax(logits))
    assert text == tokenizer.decode(out)
    assert model.stats.tokens == len(out)


def test_load_runs_the_native_engine(tiny_artifact):
    with lowtide.load(tiny_artifact, threads=1, context=32) as model:
        assert (model.engine.threads, model.engine.max_context) == (1, 32)
        seeded = {"max_tokens": 12, "bits": 5.0, "temperature": 1.0, "seed": 3}
        text = "".join(model.generate("the", **seeded))
        assert text == "".join(model.generate("the", **seeded))
        assert model.stats.decode_tps > 0
        assert 0 < model.stats.bits_read_body < 100
        with pytest.raises(LowtideError, match="context holds 32"):
            model.generate("x" * 33, bits=5)


def test_an_artifact_without_tokenizer_is_refused(tmp_path):
    path = make_artifact(tmp_path / "a", tokenizer=False)
    with pytest.raises(LowtideError, match=r"no tokenizer\.json"):
        lowtide.load(path)


def test_importing_lowtide_imports_nothing_heavy():
    code = "import sys, lowtide; print(sorted({'numpy', 'torch', 'typer', 'rich', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_public_names_exist_and_others_do_not():
    for name in lowtide.__all__:
        assert callable(getattr(lowtide, name)) or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        lowtide.lode  # noqa: B018
