"""The page as text: whole, self-contained, harmless whatever the prompt says. In a browser: tests/cli."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from support.tiny import make_artifact

from lowtide.errors import LowtideError
from lowtide.runtime.explain import explain
from lowtide.runtime.explain_page import DARK, LIGHT, STEPS, _colours, check_target, number, page, shown, write_page

HOSTILE = "</script><script>alert(1)</script>\n&amp;<b>'\"{{ 1 }}"


class Elements(HTMLParser):
    """Every start tag with its attributes, and the data of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)

    def all(self, tag, **attrs):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attrs.items())]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return explain(make_artifact(tmp_path_factory.mktemp("page") / "a.lowtide"), HOSTILE, 5.0, generate=4)


@pytest.fixture(scope="module")
def parsed(found):
    return Elements(page(found))


def test_the_heat_map_has_a_row_for_every_token_and_a_cell_for_every_layer(found, parsed):
    rows = [a for a in parsed.all("tr") if "data-t" in a]
    assert [int(a["data-t"]) for a in rows] == list(range(len(found.tokens)))
    cells = [a["class"].split() for a in parsed.all("td") if a.get("class", "").startswith("a")]
    assert len(cells) == 2 * len(found.tokens)
    steps = np.array([[int(c[1:]) for c in cell] for cell in cells]).reshape(len(found.tokens), 2, 5)
    assert (steps.min(), steps.max()) == (0, STEPS - 1)
    bits = np.asarray(found.bits)
    for k in range(4):  # more bits, never a lower step
        order = np.argsort(bits[:, :, k].ravel())
        assert (np.diff(steps[:, :, k + 1].ravel()[order]) >= 0).all()


def test_the_data_in_the_page_are_those_of_json(found, parsed):
    data = json.loads(parsed.scripts[0])
    steps = data.pop("steps")
    assert data == json.loads(json.dumps(found.data()))
    assert np.asarray(steps).shape == (4, len(found.tokens), 2)


def test_nothing_in_the_page_comes_from_elsewhere(parsed):
    policy = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")
    for tag, attrs in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "srcset", "action"} & set(attrs)
        assert attrs.get("href", "#").startswith("#")
        assert not [name for name in attrs if name.startswith("on")]


def test_a_prompt_cannot_write_html(found, parsed):
    assert "".join(t.text for t in found.tokens[: found.prompt_tokens]) == HOSTILE
    assert [a.get("type") for a in parsed.all("script")] == ["application/json", None]
    assert not parsed.all("b", **{"data-evil": ""})
    assert page(found).count("<script") == 2
    assert "alert(1)" not in page(found).replace("\\u003e", ">")


def test_the_page_can_be_read_without_colours_and_a_pointer(found, parsed):
    assert parsed.all("html") == [{"lang": "en"}]
    buttons = [a for a in parsed.all("button") if "aria-label" in a]
    assert len(buttons) == len(found.tokens)
    assert [a["data-t"] for a in buttons if "aria-current" in a] == [str(found.chosen)]
    for attrs in parsed.all("input"):
        assert [label["for"] for label in parsed.all("label", **{"for": attrs["id"]})] == [attrs["id"]]
    ids = {a["id"] for _, a in parsed.tags if "id" in a}
    assert {a["aria-labelledby"] for a in parsed.all("section") if "aria-labelledby" in a} <= ids
    assert all(a.get("scope") for a in parsed.all("th"))


@pytest.mark.parametrize("anchors", [LIGHT, DARK])
def test_text_on_every_colour_of_the_map_has_enough_contrast(anchors):
    """WCAG 2.2, criterion 1.4.3: 4.5 to 1."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = re.findall(r"--c\d+: (#\w{6}); --t\d+: (#\w{3});", _colours(anchors))
    assert len(pairs) == STEPS
    for back, text in pairs:
        low, high = sorted((luminance(back), 0.0 if text == "#000" else 1.0))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_offsets_and_their_drivers_under_ipn(tmp_path):
    path = make_artifact(tmp_path / "a", policies=("ipn", "channel-norm"))
    text, plain = (
        page(explain(path, "the tide", 5.0, rule)).partition("<script>")[0] for rule in ("ipn", "channel-norm")
    )
    assert "waterline lowered by" in text
    assert text.count('<ol class="plain by">') == 2
    assert "waterline" not in plain


def test_a_dense_reading_has_one_colour_and_still_a_page(tmp_path):
    text = page(explain(make_artifact(tmp_path / "a"), "the tide", None))
    assert ">dense<" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345.0, "12345"),
        (3.625, "3.63"),
        (1e-9, "0.0000"),
        (99.94, "99.9"),
        (3.14159, "3.14"),
        (-0.5, "-0.500"),
        (0.01234, "0.0123"),
    ],
)
def test_numbers_have_no_exponent(value, text):
    assert number(value) == text


def test_white_space_and_control_characters_are_shown():
    assert shown(" a\n\t\x00\x7f") == "␣a↵⇥␀␡"


def test_a_page_that_cannot_be_written(found, tmp_path):
    with pytest.raises(LowtideError, match="is a folder"):
        check_target(tmp_path)
    with pytest.raises(LowtideError, match=f"there is no folder {tmp_path / 'no'}"):
        check_target(tmp_path / "no" / "x.html")
    check_target(tmp_path / "x.html")
    write_page(tmp_path / "x.html", found)
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == page(found)
