"""`benchmarks/wiki_text.py`: text in WikiText's spelling from a dump of Wikipedia."""

import sys

PAGE = """<page><title>{}</title><revision><text xml:space="preserve">{}</text></revision></page>
"""
RAW = """{{Infobox|a={{nested}}|b}}'''Tide''' is the well-known rise of
[[sea level|the sea]]&lt;ref&gt;gone&lt;/ref&gt;,
by 1,500.5 m (it's so).
First &lt;ref name="a"/&gt; stays &lt;ref&gt;gone&lt;/ref&gt; here. If a &lt; b then [[War: a story|War]], c &gt; d.

== The [[Moon]] ==
[[Image:a.png|thumb|a [[linked]] caption]]
* a list
{| class="table"
| gone
|}
It pulls [http://example.org here] &amp;quot;twice&amp;quot;.
[[de:Gezeiten]]
"""


def test_markup_goes_and_words_stand_apart(load):
    wiki = load("wiki_text")
    text = wiki.spelled(wiki.plain(RAW))
    assert " Tide is the well @-@ known rise of \n the sea , " in text
    assert " by 1 @,@ 500 @.@ 5 m ( it 's so ) . " in text
    assert " First stays here . If a < b then War , c > d . " in text
    assert " = = The Moon = = " in text
    assert ' It pulls here " twice " . ' in text
    for gone in ("Infobox", "gone", "caption", "list", "Gezeiten", "[", "|"):
        assert gone not in text


def test_short_pages_redirects_and_judged_texts_are_left_out(load, tmp_path, monkeypatch, capsys):
    wiki = load("wiki_text")
    long = "The sea rises and falls again. " * 100
    pages = [("Tide", long), ("Ebb", "#REDIRECT [[Tide]]" + long), ("Flood", "short"), ("Talk:Tide", long)]
    pages.append(("Sea wall", long + "Nobody knows how many stones there are in the old wall by the harbour mouth. "))
    (tmp_path / "dump").write_text("".join(PAGE.format(*page) for page in pages))
    judged = "Nobody knows how many stones there are in the <unk> old wall by the harbour ."
    (tmp_path / "judged").write_text(f" \n = <unk> Wall = \n \n It is said that {judged} \n")
    paths = [str(tmp_path / name) for name in ("dump", "out", "judged")]
    monkeypatch.setattr(sys, "argv", ["wiki_text.py", *paths[:2], "--leave-out", paths[2]])
    wiki.main()
    told = capsys.readouterr().out
    assert "1 articles" in told and "1 left out" in told
    assert (tmp_path / "out").read_text().startswith(" = Tide = \n \n The sea rises and falls again . ")


def test_rare_words_are_unknown(load, monkeypatch):
    wiki = load("wiki_text")
    monkeypatch.setattr(wiki, "VOCABULARY", 2)
    assert wiki.known("sea sea tide tide ebb\n sea") == "sea sea tide tide <unk>\n sea"
