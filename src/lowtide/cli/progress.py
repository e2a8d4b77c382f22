"""Progress bars on stderr for commands that take long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

STAGES = {
    "sample": "writing calibration text",
    "forward": "running the model",
    "quantise": "coding layers",
    "feedback": "feeding errors back",
    "calibrate": "calibrating",
    "cluster": "clustering inputs",
    "apart": "parting q, k and v",
    "allocate": "sharing out sparsity",
    "search": "searching",
    "prune": "pruning",
    "metric": "measuring outputs",
    "update": "updating weights",
    "warm": "training by blocks",
    "train": "training",
    "measure": "measuring",
    "inspect": "looking at layers",
    "write": "writing the artifact",
    "entropy": "entropy coding",
}


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; yields the function to call with (stage, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    tasks = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(STAGES.get(stage, stage), total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report
