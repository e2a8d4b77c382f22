"""`lowtide explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowtide.cli.options import Artifact, Bits, Json, Policy

if TYPE_CHECKING:
    from lowtide.runtime.explain_data import Explanation, Token


def explain(
    artifact: Artifact,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to run.")],
    bits: Bits = "3",
    policy: Policy = None,
    token: Annotated[
        int | None, typer.Option(help="Token to describe first, counted from 0. [default: the hardest]", metavar="N")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="The page. [default: ARTIFACT's name.explain.html, here]", metavar="FILE")
    ] = None,
    generate: Annotated[int, typer.Option(help="Tokens to add to the text, the likeliest each time.")] = 0,
    json: Json = False,
) -> None:
    """Show what was read for a text: a page with every token and layer.

    The page tells for each token and layer how many bits were read, which channels, neurons and single weights
    mattered, and which tokens were easy and hard. It needs no network. With --json it is written only if --html asks.

    \b
    Examples:
      lowtide explain smollm2.lowtide --prompt "The tide is high, and the harbour wall is wet."
      lowtide explain smollm2.lowtide -p "Once upon a time" --bits 2.5 --generate 32 --html tide.html
      lowtide explain smollm2.lowtide -p "Once upon a time" --token 3 --json
    """
    from lowtide.cli.output import print_json
    from lowtide.cli.progress import progress_bar
    from lowtide.runtime.budget import parse_bits
    from lowtide.runtime.explain import explain as run
    from lowtide.runtime.explain_page import check_target, write_page

    budget = parse_bits(bits)
    if html is None and not json:
        html = Path(f"{artifact.resolve().name.removesuffix('.lowtide')}.explain.html")
    if html is not None:
        check_target(html)
    with progress_bar() as progress:
        found = run(artifact, prompt, budget, policy, token, generate, progress)
    if html is not None:
        write_page(html, found)
    if json:
        print_json(found.data())
        return
    _print(found)
    print(f"page: {html}")


def _print(found: Explanation) -> None:
    """Header and a table of the hardest and easiest tokens."""
    from rich.markup import escape

    from lowtide.cli.output import bits_label, print_table
    from lowtide.runtime.explain_page import shown

    made = len(found.tokens) - found.prompt_tokens
    tokens = f"{found.prompt_tokens} tokens" + (f" and {made} generated" if made else "")
    asked = f"{found.policy} at {bits_label(found.budget)}"
    print(f"{found.source}: {tokens}, {asked}, {found.mean_bits:.3f} bits read per weight")
    columns = ["", "token", "text", "bits", "entropy", "margin", "expects"]
    if found.gains is not None:
        columns += ["lowered", "driven by features"]

    def cells(what: str, token: Token) -> list[object]:
        expects = f"{shown(token.expects)} {100 * token.expects_p:.1f} %"
        row: list[object] = [what, token.index, escape(shown(token.text)), f"{token.bits:.3f}", f"{token.entropy:.3f}"]
        row += [f"{token.margin:.3f}", escape(expects)]
        if token.offset is not None:
            drivers = " ".join(f"{int(feature)} {part:+.2f}" for feature, part in token.drivers[:3])
            row += [f"{token.offset:+.2f}", drivers]
        return row

    extremes = [("hard", i) for i in found.hardest] + [("easy", i) for i in found.easiest]
    print_table(columns, (cells(what, found.tokens[i]) for what, i in extremes))
