"""The page of `lowtide explain` in a real browser: Chromium, headless.

A script that acts as a reader would (clicks, keys) is put at the end of the page; what it notes comes back in the DOM.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser

import pytest
from support.tiny import make_artifact

from lowtide.runtime.explain import explain
from lowtide.runtime.explain_page import page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
TEXT = "the <i>tide</i>\nwent out"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install chromium to run these")


class Outline(HTMLParser):
    """What a reader sees in an element: for each element with an id its texts, styles and titles in order."""

    def __init__(self, text):
        super().__init__()
        self.parts, self._open = {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("br", "input", "meta"):
            self._open.append((tag, attrs.get("id")))
        for key in ("style", "title", "class"):
            if attrs.get(key):
                self._note(attrs[key].rstrip(";").replace(": ", ":").strip())

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if data.strip():
            self._note(data.strip())

    def _note(self, text):
        for _, name in self._open:
            if name:
                self.parts.setdefault(name, []).append(text)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """An explanation and its page, and another token with the page that shows it first."""
    path = make_artifact(tmp_path_factory.mktemp("browser") / "a.lowtide", policies=("ipn", "channel-norm"))
    found = explain(path, TEXT, 5.0, generate=3)
    other = explain(path, TEXT, 5.0, token=(found.chosen + 5) % len(found.tokens), generate=3)
    return found, page(found), other.chosen, page(other)


def dump_dom(options):
    """Runs Chromium; its stdout and stderr. On a busy machine it sometimes never starts up: then once more."""
    command = [CHROMIUM, "--headless", "--disable-gpu", "--enable-logging=stderr", "--disable-background-networking"]
    if os.geteuid() == 0:
        command += ["--no-sandbox", "--no-zygote"]  # the sandbox refuses to run as root
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for _ in range(3):
        with subprocess.Popen([*command, *options], text=True, start_new_session=True, **pipes) as process:
            try:
                return process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the group is its own: helpers go with it
    raise AssertionError("Chromium did not answer within a minute, three times")


@pytest.fixture
def browse(tmp_path):
    """Opens a page in Chromium, runs a script in it, gives the DOM as text and what the script handed to `note`."""

    def run(text, script="", *options, at=""):
        path = tmp_path / "page.html"
        note = (
            "const note = (x) => { document.body.append(Object.assign(document.createElement('pre'), {id: 'note'})); "
        )
        note += "document.getElementById('note').textContent = JSON.stringify(x); };\n"
        path.write_text(text.replace("</body>", f"<script>{note}{script}</script></body>"), encoding="utf-8")
        out, err = dump_dom([*options, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", path.as_uri() + at])
        assert "<html" in out, err[-2000:]
        errors = [line for line in err.splitlines() if "CONSOLE" in line]
        assert errors == []
        noted = re.search(r'<pre id="note">(.*?)</pre>', out)
        return out, json.loads(noted[1].replace("&lt;", "<").replace("&amp;", "&")) if noted else None

    return run


def test_every_token_has_its_cells(browse, pages):
    found, text, *_ = pages
    script = """
      const rows = [...document.querySelectorAll("#map tbody tr")];
      const colour = (cell) => getComputedStyle(cell).backgroundColor;
      const colours = rows.map((r) => [...r.querySelectorAll("td:not(.n)")].map(colour));
      note({tokens: document.querySelectorAll("#text button").length, colours,
            sizes: rows.map((r) => r.cells[1].getBoundingClientRect().width)});
    """
    _, seen = browse(text, script)
    assert seen["tokens"] == len(found.tokens) == len(seen["colours"])
    assert all(len(row) == 2 for row in seen["colours"])
    assert len({c for row in seen["colours"] for c in row}) > 5
    assert "rgba(0, 0, 0, 0)" not in {c for row in seen["colours"] for c in row}
    assert min(seen["sizes"]) >= 12


def test_choosing_another_token_changes_the_details(browse, pages):
    _, text, there, other = pages
    before = Outline(text).parts
    dom, seen = browse(
        text,
        f"""document.querySelector('#text [data-t="{there}"]').click();
      note([...document.querySelectorAll("[aria-current], #map tr.on")].map((x) => x.dataset.t));""",
    )
    after = Outline(dom).parts
    assert seen == [str(there), str(there)]
    for part in ("layers", "facts", "residual", "h-token"):
        assert after[part] != before[part]
        assert after[part] == Outline(other).parts[part], "the script and the template draw the same"
    assert str(there) in after["h-token"]


def test_the_row_of_the_map_the_keys_and_the_buttons_choose_too(browse, pages):
    found, text, *_ = pages
    script = """
      const now = () => Number(document.querySelector(".which").textContent), seen = [];
      const key = (k) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true}));
      document.querySelector('#map tr[data-t="4"] .pick').click(); seen.push(now());
      document.querySelector('#text [data-t="4"]').focus(); key("ArrowRight"); seen.push(now());
      seen.push(Number(document.activeElement.dataset.t));
      key("ArrowLeft"); key("ArrowLeft"); seen.push(now());
      document.getElementById("next").click(); seen.push(now());
      document.getElementById("back").click(); seen.push(now());
      document.querySelector('#text [data-t="0"]').click(); seen.push(document.getElementById("back").disabled);
      seen.push(location.hash);
      note(seen);
    """
    _, seen = browse(text, script)
    assert seen == [4, 5, 5, 3, 4, 3, True, "#token=0"]


def test_a_kind_of_group_has_figures_and_colours_of_its_own(browse, pages):
    found, text, *_ = pages
    script = """
      const cell = document.querySelector("#map tbody td");
      const legend = (k) => getComputedStyle(document.querySelector(".legend." + k)).display;
      const seen = [[cell.textContent, legend("a"), legend("d")]];
      document.getElementById("v-d").click();
      seen.push([cell.textContent, legend("a"), legend("d")]);
      cell.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
      seen.push(document.getElementById("where").textContent);
      note(seen);
    """
    _, (whole, down, where) = browse(text, script)
    weights, bits = found.kind_weights, found.bits[0][0]
    mean = sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)
    assert whole == [f"{mean:.2f}", "flex", "none"]
    assert down[1:] == ["none", "flex"]
    assert float(down[0]) == pytest.approx(bits[3], abs=0.006)
    assert where.startswith(f"token 0 {found.tokens[0].text}, layer 0: {mean:.2f} bits per weight (qkv ")


def test_without_its_script_the_map_and_the_kinds_are_there(browse, pages):
    found, text, *_ = pages
    bare = re.sub("<script>.*?</script>", "", text, flags=re.S)
    assert bare.count("<script") == 1, "the data alone"
    script = """
      const cells = [...document.querySelectorAll("#map td:not(.n)")];
      const colours = () => cells.map((c) => getComputedStyle(c).backgroundColor);
      const all = colours();
      document.getElementById("v-q").checked = true;
      note([all, colours(), document.querySelectorAll("#layers tr").length]);
    """
    _, (whole, qkv, layers) = browse(bare, script)
    assert len(whole) == 2 * len(found.tokens)
    assert len(set(whole)) > 5
    assert whole != qkv
    assert layers == 2


def test_dark_and_light_differ_and_the_address_may_name_a_token(browse, pages):
    text = pages[1]
    script = """note([getComputedStyle(document.body).backgroundColor, document.querySelector(".which").textContent,
                     document.documentElement.scrollWidth - innerWidth]);"""
    light = browse(text, script, "--window-size=500,900", at="#token=2")[1]
    assert light[2] <= 0, "only tables scroll sideways"
    dark = browse(text, script, "--blink-settings=preferredColorScheme=0", at="#token=99")[1]
    assert light[0] != dark[0]
    assert (light[1], dark[1]) == ("2", str(pages[0].chosen))
