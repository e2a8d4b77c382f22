"""Plain text for training from a dump of Wikipedia (enwik8), in the spelling of WikiText.

    python benchmarks/wiki_text.py enwik8 wiki.txt --megabytes 30 --leave-out test.txt

Articles of some length, in the dump's order, their markup taken away: templates, tables, references, links' targets.
WikiText's spelling (arXiv 1609.07843): words and punctuation apart, ` @-@ `, ` @,@ ` and ` @.@ ` inside of words and
numbers, words outside of a vocabulary replaced by <unk>. Articles that share a run of RUN words with a text of
--leave-out are left out, so that what is judged there is not trained on.
"""

from __future__ import annotations

import argparse
import html
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

VOCABULARY = 33_278
"""Words of WikiText-2."""
SHORTEST = 1_500
"""Characters of an article."""
PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
RUN = 13
"""Words in a row, but for punctuation and <unk>, that texts do not share by chance (GPT-3, arXiv 2005.14165)."""
NESTED = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
LISTED = re.compile(r"^[*#:;|!].*$", re.MULTILINE)
MARKUP = [
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"<[a-z]+\b[^<>]*/>", re.I), ""),
    (re.compile(r"<(ref|math|gallery|table|pre|code|div|small)\b[^<>]*>.*?</\1>", re.DOTALL | re.I), ""),
    (re.compile(r"</?[a-z][^<>\n]*>", re.I), ""),
    (re.compile(r"\[\[(?:image|file|category):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", re.I), ""),
    (re.compile(r"\[\[(?:simple|[a-z]{2,3}(?:-[a-z]+)*):[^\[\]|]*\]\]"), ""),
    (re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"), r"\1"),
    (re.compile(r"\[(?:https?|ftp):\S*\s*([^\]]*)\]"), r"\1"),
    (re.compile(r"'{2,}"), ""),
]
HEADING = re.compile(r"^(={2,5})\s*(.*?)\s*\1\s*$", re.MULTILINE)
SPELLING = [
    (re.compile(r"(?<=\w)-(?=\w)"), " @-@ "),
    (re.compile(r"(?<=\d),(?=\d)"), " @,@ "),
    (re.compile(r"(?<=\d)\.(?=\d)"), " @.@ "),
    (re.compile(r"(?<!@)([^\w\s@.'=&-])(?!@)"), r" \1 "),
    (re.compile(r"(?<=\w)('s|'t|'re|'ve|'ll|'d|n't)\b"), r" \1"),
    (re.compile(r"(?<=\w)\.(?=\s*$)", re.MULTILINE), " ."),
    (re.compile(r"(?<=[a-z0-9)\]\"])\.(?= [A-Z\"])"), " ."),
    (re.compile(r"[ \t]+"), " "),
]


def main() -> None:
    o = _arguments().parse_args()
    judged = set[int]().union(*(runs(path.read_text(encoding="utf-8")) for path in o.leave_out))
    parts, size, most, dropped = [], 0, int(o.megabytes * 1e6), 0
    with o.dump.open("rb") as file:
        dump = file.read(int(o.dump_megabytes * 1e6)).decode("utf-8", "ignore")
    for title, article in articles(dump):
        if judged and not judged.isdisjoint(runs(article)):
            dropped += 1
            continue
        parts.append(f" = {title} = \n \n{article}\n")
        size += len(parts[-1].encode())
        if size >= most:
            break
    o.out.write_text(known("\n".join(parts)), encoding="utf-8")
    print(f"{o.out}: {len(parts)} articles, {o.out.stat().st_size / 1e6:.1f} MB; {dropped} left out")


def runs(text: str) -> set[int]:
    """Hashes of all runs of RUN words."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("<unk>", " "))
    return {hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}


def articles(dump: str) -> Iterator[tuple[str, str]]:
    """Title and text of every article that is long enough."""
    for title, raw in PAGE.findall(dump):
        if raw[:9].upper() == "#REDIRECT" or ":" in title:
            continue
        text = plain(raw)
        if len(text) >= SHORTEST:
            yield spelled(html.unescape(title)).strip(), spelled(text)


def plain(raw: str) -> str:
    """Without markup; headings as WikiText has them."""
    text = html.unescape(html.unescape(raw))
    while (shorter := NESTED.sub("", text)) != text:
        text = shorter
    for pattern, instead in MARKUP:
        text = pattern.sub(instead, text)
    text = HEADING.sub(lambda m: f"\n{'= ' * len(m[1])}{m[2]} {'= ' * len(m[1])}\n", LISTED.sub("", text))
    return re.sub(r"\n\s*\n+", "\n \n", text).strip()


def spelled(text: str) -> str:
    """Words and punctuation apart; every line begins and ends with a space, as WikiText's do."""
    for pattern, instead in SPELLING:
        text = pattern.sub(instead, text)
    return "\n".join(f" {line.strip()} " for line in text.split("\n"))


def known(text: str) -> str:
    """Words outside of the most frequent VOCABULARY become <unk>."""
    counts = Counter(text.split())
    vocabulary = {word for word, _ in counts.most_common(VOCABULARY)}
    return re.sub(r"[^\s]+", lambda m: m[0] if m[0] in vocabulary else "<unk>", text)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=30.0, help="of the text, about")
    parser.add_argument("--dump-megabytes", type=float, default=90.0, help="of the dump that are read")
    parser.add_argument("--leave-out", type=Path, action="append", default=[], help="a text that is judged; repeat")
    return parser


if __name__ == "__main__":
    main()
