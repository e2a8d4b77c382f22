"""The command table, and the one place where errors become a line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lowtide import __version__
from lowtide.cli import bench, chat, compress, evaluate, explain, generate, inspect, keyed, learn, pack, prune, verify
from lowtide.errors import LowtideError

BAD_INPUT = 2
INTERRUPTED = 130

app = typer.Typer(
    name="lowtide",
    help="Compress a language model once, run it natively at any byte budget.",
    epilog="lowtide COMMAND --help tells more, with examples.",
    rich_markup_mode=None,  # plain help: rich would cost a third of the start-up time
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command()(compress.compress)
app.command("eval")(evaluate.evaluate)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(bench.bench)
app.command()(inspect.inspect)
app.command()(explain.explain)
app.command()(pack.pack)
app.command()(prune.prune)
app.add_typer(learn.app)
app.add_typer(keyed.app, name="keyed")
app.command()(verify.verify)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lowtide {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def run(args: list[str]) -> int:
    """Run one command; returns the exit code. Never raises for bad input, a full disk or an interrupt."""
    try:
        code = app(args or ["--help"], prog_name="lowtide", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except LowtideError as error:
        return _fail(str(error))
    except typer.TyperException as error:  # wrong usage
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "lowtide"
        return _fail(f"{error.format_message().rstrip('.')} (see `{path} --help`)")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("torch", "gguf", "huggingface_hub", "matplotlib"):
            raise
        return _fail(f"this command needs {package}: pip install 'lowtide[compress]'")
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        _discard_output()
        return 1
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except MemoryError:
        return _fail("not enough memory for this model")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def _discard_output() -> None:
    """What is still buffered goes nowhere: the interpreter would try once more to write it on the way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    print(f"lowtide: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT
