"""Chat templates: rendered as transformers does, in a sandbox, refused clearly."""

import pytest

from lowtide.errors import LowtideError
from lowtide.runtime.chat import find_template, render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def test_chatml():
    assert render(CHATML, HELLO, {}) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_special_tokens_are_visible_as_text_and_as_dict():
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    assert render("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", HELLO, config) == "<s>hello</s>"


def test_block_lines_leave_no_blank_lines():
    assert render("{% if true %}\nyes\n{% endif %}\n", HELLO, {}) == "yes\n"


@pytest.mark.parametrize(
    ("config", "file", "found"),
    [
        ({"chat_template": "a"}, None, "a"),
        ({"chat_template": "a"}, b"b", "b"),
        ({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}, None, "d"),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, None, None),
        ({}, None, None),
    ],
)
def test_where_the_template_is_found(config, file, found):
    assert find_template(config, file) == found


def test_no_template_is_refused_with_advice():
    with pytest.raises(LowtideError, match=r"no chat template.*lowtide generate"):
        render(None, HELLO, {})


def test_a_template_can_refuse():
    with pytest.raises(LowtideError, match="chat template: roles must alternate"):
        render("{{ raise_exception('roles must\nalternate') }}", HELLO, {})


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(hostile):
    with pytest.raises(LowtideError, match="chat template: "):
        render(hostile, HELLO, {})


@pytest.mark.parametrize("broken", ["{% if %}", "{{ messages[9]['content'].x }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}"])
def test_a_broken_template_is_one_line(broken):
    with pytest.raises(LowtideError, match="^chat template: ") as caught:
        render(broken, HELLO, {})
    assert "\n" not in str(caught.value)
