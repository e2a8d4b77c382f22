"""`lowtide keyed`: maps from features to weights, and n-gram models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from lowtide.cli.options import Json

if TYPE_CHECKING:
    from lowtide.fingerprint import CodeOptions

app = typer.Typer(
    help="Maps from text features to weights, and n-gram models, in a few bits for each.",
    epilog="lowtide keyed COMMAND --help tells more, with examples.",
    rich_markup_mode=None,
)

File: TypeAlias = Annotated[Path, typer.Argument(help="File made by `lowtide keyed build` or `ngram`.")]
Out: TypeAlias = Annotated[Path, typer.Argument(help="File to make.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]
HashSeed: TypeAlias = Annotated[int, typer.Option("--seed", help="Seed of the hashes.")]


@app.command()
def build(
    features: Annotated[Path, typer.Argument(help="UTF-8 lines: a feature, a tab, its weight.")],
    out: Out,
    table_size: Annotated[int, typer.Option(help="Different weights kept; others are rounded to them.")] = 16,
    error: Annotated[
        float, typer.Option(help="Mean squared weight of a feature that is not stored, over that of one that is.")
    ] = 0.001,
    constant: Annotated[
        float | None, typer.Option(help="Fingerprints of log2(weight^2) + this many bits instead of --error.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Fingerprints of this many bits instead of --error.")] = None,
    seed: HashSeed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a map from features to weights.

    Features may hold any character but tabs and ends of lines. They are not stored: one that is not in the map gets a
    weight all the same now and then, as seldom as --error says.

    \b
    Examples:
      lowtide keyed build weights.tsv weights.ltk
      lowtide keyed build weights.tsv weights.ltk --table-size 64 --bits 16 --json
    """
    from lowtide import keyed
    from lowtide.fingerprint import CodeOptions

    code: CodeOptions = CodeOptions(error=error, constant=constant, bits=bits, seed=seed)
    names, weights = read_features(features)
    _show(dict(keyed.build(names, weights, out, table_size=table_size, code=code, force=force)), json)


@app.command()
def query(
    file: File,
    features: Annotated[
        list[str] | None, typer.Argument(help="Features. [default: one for each line of stdin]")
    ] = None,
    json: Json = False,
) -> None:
    """Print the weights of features, 0 for those that are not stored.

    \b
    Examples:
      lowtide keyed query weights.ltk tide harbour "low tide"
      cut -f1 weights.tsv | lowtide keyed query weights.ltk
    """
    from lowtide import keyed
    from lowtide.cli.output import print_json
    from lowtide.fingerprint.hashing import utf8

    store = keyed.open(file)
    asked: list[str | bytes] = list(features) if features else [line.rstrip(b"\r\n") for line in sys.stdin.buffer]
    names = [utf8(name).decode() for name in asked]
    weights = store.get_many(names).tolist()
    if json:
        print_json({"weights": [{"feature": n, "weight": w} for n, w in zip(names, weights, strict=True)]})
        return
    for name, weight in zip(names, weights, strict=True):
        print(f"{name}\t{weight:.7g}")


@app.command()
def info(file: File, json: Json = False) -> None:
    """Show what a file holds: keys, bytes and where they go, fingerprints, chance of a false positive.

    \b
    Examples:
      lowtide keyed info weights.ltk
      lowtide keyed info english.ltk --json
    """
    from lowtide.keyed.bundle import open_bundle
    from lowtide.keyed.classifier import KIND as CLASSIFIER
    from lowtide.keyed.classifier import open_classifier
    from lowtide.keyed.ngram import KIND as NGRAM
    from lowtide.keyed.ngram import open_ngram
    from lowtide.keyed.store import open_store

    kind = open_bundle(file).meta["kind"]
    if kind == NGRAM:
        figures = open_ngram(file).info()
    elif kind == CLASSIFIER:
        figures = open_classifier(file).info()
    else:
        figures = open_store(file).info()
    _show(dict(figures), json)


@app.command()
def ngram(
    text: Annotated[Path, typer.Argument(help="UTF-8 text, a sentence on each line, words between white space.")],
    out: Out,
    order: Annotated[int, typer.Option(help="Words of the longest n-grams.")] = 3,
    smoothing: Annotated[str, typer.Option(help="kneser-ney or stupid-backoff.")] = "kneser-ney",
    false_mass: Annotated[
        float, typer.Option(help="Sum of the probabilities that false positives give to all words, on average.")
    ] = 0.02,
    bits: Annotated[int | None, typer.Option(help="Fingerprints of this many bits instead of --false-mass.")] = None,
    lower: Annotated[bool, typer.Option("--lower", help="Lower-case the text.")] = False,
    seed: HashSeed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make an n-gram language model of a text.

    \b
    Examples:
      lowtide keyed ngram english.txt english.ltk
      lowtide keyed ngram english.txt english.ltk --order 4 --false-mass 0.1 --lower
    """
    from lowtide.keyed.ngram import NgramOptions, build_ngram

    options = NgramOptions(order, smoothing, false_mass=false_mass, bits=bits, lower=lower, seed=seed)
    _show(dict(build_ngram(_lines(text), out, options, force)), json)


@app.command()
def perplexity(
    file: File, text: Annotated[Path, typer.Argument(help="UTF-8 text, a sentence on each line.")], json: Json = False
) -> None:
    """Measure an n-gram model on a text.

    \b
    Examples:
      lowtide keyed perplexity english.ltk held-out.txt
    """
    from lowtide.keyed.ngram import open_ngram

    model = open_ngram(file)
    score = model.score(line for line in _lines(text) if line.split())
    _show({"words": score.words, "unknown": score.unknown, "perplexity": score.perplexity}, json)


def read_features(path: Path) -> tuple[list[str], list[float]]:
    """Features and weights of a file of lines "feature<tab>weight".

    Raises:
        LowtideError: it cannot be read, is not UTF-8, or a line has another form.
    """
    from lowtide.errors import LowtideError

    names, weights = [], []
    for number, line in enumerate(_lines(path), 1):
        name, tab, weight = line.rpartition("\t")
        try:
            weights.append(float(weight))
        except ValueError:
            tab = ""
        if not tab:
            raise LowtideError(f"{path}: line {number} is not a feature, a tab and a number")
        names.append(name)
    return names, weights


def _lines(path: Path) -> Iterator[str]:
    from lowtide.errors import LowtideError

    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise LowtideError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise LowtideError(f"{path}: cannot be read ({error.strerror})") from None
    return iter(text.removesuffix("\n").split("\n") if text else [])


def _show(figures: dict[str, object], json: bool) -> None:
    from lowtide.cli.output import print_json

    if json:
        print_json(figures)
        return
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, dict))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            value = "; ".join(f"{v['keys']} keys in {v['bytes']} bytes" for v in value)
        print(f"{name.replace('_', ' ')}: {f'{value:.5g}' if isinstance(value, float) else value}")
