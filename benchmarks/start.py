"""One start of one engine, as a user starts it: the first bytes on stdout are the first token.

    python start.py FIGURES.json lowtide generate ARTIFACT --prompt TEXT -n 16 ...    the command line's arguments
    python start.py FIGURES.json llama MODEL.gguf THREADS CONTEXT TOKENS FLASH ID...  needs llama-cpp-python

The caller's clock runs from before the process began. FIGURES.json gets what only the process itself knows: the most
memory it has had resident, and, when all tokens are written, how much of it is its own and how much pages of files.
llama.cpp is given token ids, so it need not cut the text; lowtide cuts it.
"""

from __future__ import annotations

import json
import sys


def memory() -> dict[str, int]:
    """Peak and present resident memory of this process in bytes, from Linux' own account."""
    names = {
        "VmHWM": "peak_rss_bytes",
        "VmRSS": "rss_bytes",
        "RssAnon": "rss_own_bytes",
        "RssFile": "rss_file_bytes",
    }
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        lines = dict(line.split(":", 1) for line in status)
    return {ours: int(lines[theirs].split()[0]) * 1024 for theirs, ours in names.items() if theirs in lines}


def lowtide(arguments: list[str], figures: dict[str, int]) -> int:
    """The command line, in this process; looks at the memory when the model is about to be closed."""
    from lowtide.cli.app import run
    from lowtide.runtime.model import Model

    close = Model.close

    def look_and_close(model: Model) -> None:
        if not figures:
            figures.update(memory())
        close(model)

    Model.close = look_and_close  # type: ignore[assignment,method-assign]
    return run(arguments)


def llama(arguments: list[str], figures: dict[str, int]) -> int:
    """llama.cpp, greedy."""
    import llama_cpp  # type: ignore[import-not-found]

    path, (threads, context, tokens, flash, *ids) = arguments[0], map(int, arguments[1:])
    model = llama_cpp.Llama(
        path, n_ctx=context, n_threads=threads, n_threads_batch=threads, flash_attn=bool(flash), verbose=False
    )
    model.eval(ids)
    for _ in range(tokens):
        token = model.sample(temp=0.0)
        sys.stdout.buffer.write(model.detokenize([token]) or b" ")
        sys.stdout.flush()
        model.eval([token])
    figures.update(memory())
    return 0


def main() -> int:
    """Starts, writes the figures, and returns the engine's exit code."""
    path, engine, *arguments = sys.argv[1:]
    figures: dict[str, int] = {}
    code = {"lowtide": lowtide, "llama": llama}[engine](arguments, figures)
    with open(path, "w", encoding="ascii") as file:
        json.dump(figures, file)
    return code


if __name__ == "__main__":
    sys.exit(main())
