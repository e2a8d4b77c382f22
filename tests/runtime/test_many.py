"""Several prompts in rounds: what each says alone, in order, and the figures of all."""

import json

import numpy as np
import pytest

import lowtide
from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels.reference import ReferenceEngine
from lowtide.runtime.course import Course, GenerationStats, run_rounds, total
from lowtide.runtime.model import Model, load_tokenizer
from lowtide.runtime.prompts import Prompt, read_prompts

PROMPTS = ["the", "a tide is a long prompt for one so small, is it not?", "x" * 40, "", "sea"]
OPTIONS = {"max_tokens": 30, "bits": 5.0, "temperature": 1.2, "top_p": 0.97}
TIMES = {"prefill_s", "decode_s"}


def figures(stats):
    return {name: value for name, value in vars(stats).items() if name not in TIMES}


@pytest.fixture(scope="module")
def alone(tiny_artifact):
    """Each prompt by itself, in an engine of its own, with a seed of its own."""
    found = []
    for seed, prompt in enumerate(PROMPTS):
        with lowtide.load(tiny_artifact, threads=1) as model:
            found.append(("".join(model.generate(prompt, seed=seed, **OPTIONS)), figures(model.stats)))
    return found


@pytest.mark.parametrize("parallel", [1, 2, 3, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_each_prompt_says_what_it_says_alone(tiny_artifact, alone, parallel, threads):
    with lowtide.load(tiny_artifact, threads=threads) as model:
        done = list(model.generate_many(PROMPTS, seed=list(range(len(PROMPTS))), parallel=parallel, **OPTIONS))
    assert [d.prompt for d in done] == PROMPTS
    assert [(d.text, figures(d.stats)) for d in done] == alone
    assert len({d.stats.tokens for d in done}) > 1  # they end at different times, so others took their places


def test_the_reference_engine_says_the_same(tiny_artifact, alone):
    artifact = open_artifact(tiny_artifact)
    model = Model(artifact, ReferenceEngine(artifact), load_tokenizer(artifact))
    done = list(model.generate_many(PROMPTS, seed=list(range(len(PROMPTS))), parallel=3, **OPTIONS))
    assert [(d.text, figures(d.stats)) for d in done] == alone


def test_one_seed_is_that_of_every_prompt(tiny_artifact):
    with lowtide.load(tiny_artifact, threads=1) as model:
        wanted = "".join(model.generate("the", seed=7, **OPTIONS))
        assert [d.text for d in model.generate_many(["the"] * 3, seed=7, **OPTIONS)] == [wanted] * 3


def test_a_chat_between_keeps_its_cache(tiny_artifact):
    """Prompts in rounds have caches of their own; the conversation's is still there."""
    messages = [{"role": "user", "content": "a?"}]
    with lowtide.load(tiny_artifact, threads=1) as model:
        wanted = "".join(model.chat(messages, max_tokens=8, bits=5.0))
        list(model.generate_many(["the", "sea"], max_tokens=5, bits=5.0))
        assert "".join(model.chat(messages, max_tokens=8, bits=5.0)) == wanted
        assert model.stats.reused_tokens == model.stats.prompt_tokens - 1


def test_the_models_figures_are_those_of_all_prompts(tiny_artifact):
    with lowtide.load(tiny_artifact, threads=1) as model:
        stats = [d.stats for d in model.generate_many(PROMPTS[:3], max_tokens=9, bits=5.0)]
        assert model.stats == total(stats)
    assert model.stats.tokens == sum(s.tokens for s in stats)


def test_means_are_over_the_tokens_decoded():
    """A text that reaches its length does not decode its last token, one that stops has decoded all of them."""
    one = GenerationStats(prompt_tokens=2, tokens=5, bits_read_body=3.0, bytes_read=100.0, finish="length")
    two = GenerationStats(prompt_tokens=1, tokens=1, bits_read_body=5.0, bytes_read=200.0, finish="stop")
    both = total([one, two])
    assert (both.prompt_tokens, both.tokens, both.finish) == (3, 6, "length")
    assert both.bits_read_body == pytest.approx((4 * 3.0 + 5.0) / 5)
    assert both.bytes_read == pytest.approx(120.0)
    assert total([]).bits_read_body == 0


class Slot:
    """A text in an engine that takes note."""

    def __init__(self, log):
        self.log, self.open = log, True

    def prefill(self, tokens, pos):
        self.log.append(("prefill", len(tokens)))
        return np.zeros(4, np.float32)

    def close(self):
        self.open = False


class Rounds:
    def __init__(self):
        self.log, self.slots = [], []

    def sequence(self):
        self.slots.append(Slot(self.log))
        return self.slots[-1]

    def decode_round(self, steps):
        self.log.append(("round", [step.pos for step in steps]))
        read = type("Read", (), {"body_bits": 8, "bytes_read": 1})
        return [(np.zeros(4, np.float32), read) for _ in steps]


class Steady:
    """A budget that stays as it is."""

    params, mean_bits, tokens = None, 3.0, 1

    def update(self, body_bits):
        pass


def courses(tiny_artifact, lengths):
    tokenizer = load_tokenizer(open_artifact(tiny_artifact))
    greedy = type("Greedy", (), {"sample": staticmethod(lambda logits: 3)})()
    return [Course([1] * n, n, greedy, Steady(), tokenizer, (2,), 99) for n in lengths]


def test_a_text_that_ends_makes_room_for_the_next(tiny_artifact):
    engine = Rounds()
    runs = courses(tiny_artifact, [3, 1, 2])
    assert [course for course, _ in run_rounds(engine, runs, 2)] == runs
    # the second text is done with its first token; the third takes its place
    assert engine.log == [
        *[("prefill", 3), ("prefill", 1), ("round", [3])],
        *[("prefill", 2), ("round", [4, 2])],
    ]
    assert len(engine.slots) == 2
    assert not any(slot.open for slot in engine.slots)


def test_leaving_early_frees_the_caches(tiny_artifact):
    engine = Rounds()
    runs = run_rounds(engine, courses(tiny_artifact, [1, 9, 9]), 3)
    next(runs)
    assert all(slot.open for slot in engine.slots)
    runs.close()
    assert not any(slot.open for slot in engine.slots)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": 0}, "--parallel 0: must be 1 to 256"),
        ({"parallel": 257}, "--parallel 257"),
        ({"seed": [1]}, "1 seeds for 2 prompts"),
        ({"max_tokens": 0}, "prompt 1: -n 0"),
        ({"prompts": ["a", "x" * 65]}, "prompt 2: the prompt has 65 tokens, the context holds 64"),
        ({"bits": 99.0}, "--bits 99"),
    ],
)
def test_bad_calls_are_refused_before_anything_runs(tiny_artifact, options, message):
    with lowtide.load(tiny_artifact, threads=1) as model, pytest.raises(LowtideError, match=message):
        model.generate_many(**{"prompts": ["a", "b"], "bits": 5.0} | options)


def test_another_generation_ends_the_rounds(tiny_artifact):
    with lowtide.load(tiny_artifact, threads=1) as model:
        many = model.generate_many(["a", "b"], max_tokens=4, bits=5.0, parallel=1)
        next(many)
        model.generate("c", bits=5.0)
        with pytest.raises(LowtideError, match="started another generation"):
            next(many)
        assert list(model.generate_many([], bits=5.0)) == []


def test_prompts_of_plain_text_are_lines(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text('one\n\n  two\u2028still two\n{"prompt": "three"}\n', encoding="utf-8")
    assert read_prompts(path) == [Prompt("one"), Prompt("  two\u2028still two"), Prompt('{"prompt": "three"}')]


def test_prompts_of_json_lines_may_have_seeds(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "a\nb", "seed": 4}, {"prompt": "c", "id": 9}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == [Prompt("a\nb", 4), Prompt("c")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "p.txt: holds no prompts"),
        ("p.txt", b"\xff\xfe", "p.txt: is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt"', r"p.jsonl: line 3: is not JSON"),
        ("p.jsonl", b'{"text": "a"}', 'line 1: must be an object with a text "prompt"'),
        ("p.jsonl", b'["a"]', "line 1: must be an object"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', 'line 1: "seed" must be a whole number'),
    ],
)
def test_bad_files_of_prompts_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LowtideError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_of_prompts(tmp_path):
    with pytest.raises(LowtideError, match="nowhere: cannot be read"):
        read_prompts(tmp_path / "nowhere")
