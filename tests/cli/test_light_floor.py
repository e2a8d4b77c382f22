"""The ground floor is light: artifacts run without torch, and `lowtide --help` answers at once.

`make test` names the interpreter of an environment that holds the base install alone; there torch is not merely
unused but absent. Run by hand, the same tests use the interpreter of the tests.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

PYTHON = os.environ.get("LOWTIDE_LIGHT_PYTHON") or sys.executable
IN_LIGHT_ENVIRONMENT = PYTHON != sys.executable
HEAVY = ("torch", "gguf", "matplotlib", "transformers")
HELP_LIMIT_S = 0.3

RUN_AND_LIST = """
import sys
from lowtide.cli.app import run
code = run(sys.argv[1:])
print("modules:", *sorted({name.partition(".")[0] for name in sys.modules}))
sys.exit(code)
"""


def light(*arguments, **options):
    dropped = {"PYTHONDONTWRITEBYTECODE"} | ({"PYTHONPATH", "PYTHONHOME"} if IN_LIGHT_ENVIRONMENT else set())
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    command = [PYTHON, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **options)


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "{}", "--prompt", "the", "-n", "6", "--bits", "5"),
        ("chat", "{}", "-n", "4", "--bits", "5"),
        ("bench", "{}", "--bits", "5", "-p", "8", "-n", "4", "-r", "1"),
        ("inspect", "{}"),
        ("explain", "{}", "--prompt", "the", "--bits", "5", "--json"),
        ("verify", "{}"),
    ],
    ids=lambda command: command[0],
)
def test_running_an_artifact_imports_no_torch(tiny_artifact, command):
    done = light("-c", RUN_AND_LIST, *(part.format(tiny_artifact) for part in command), input="hi\n")
    assert done.returncode == 0, done.stderr
    modules = done.stdout.rpartition("modules: ")[2].split()
    assert {"numpy", "lowtide"} <= set(modules)
    assert not set(HEAVY) & set(modules)


@pytest.mark.skipif(not IN_LIGHT_ENVIRONMENT, reason="needs LOWTIDE_LIGHT_PYTHON, which `make test` sets")
def test_the_light_environment_has_no_torch_at_all(tiny_artifact):
    code = f"import importlib.util as u; print([m for m in {HEAVY!r} if u.find_spec(m)])"
    assert light("-c", code).stdout == "[]\n"
    done = light("-m", "lowtide.cli", "compress", "demo:smollm2", "nowhere")
    assert done.returncode == 2
    assert "pip install 'lowtide[compress]'" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]])
def test_help_answers_at_once(arguments):
    """Processor time is what the clock shows on an idle machine; on a busy one only the best of the clock counts."""
    script = Path(PYTHON).with_name("lowtide")
    command = [script] if script.exists() else ["-m", "lowtide.cli"]
    clock, processor = [], []
    for _ in range(9):
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = light(*command, *arguments)
        clock.append(time.perf_counter() - started)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
        assert done.stdout.startswith("Usage: lowtide")
    assert statistics.median(processor) < HELP_LIMIT_S, processor
    assert min(clock) < 2 * HELP_LIMIT_S, clock


def test_help_imports_nothing_it_does_not_need():
    done = light("-c", RUN_AND_LIST, "--help")
    assert not {*HEAVY, "numpy", "tokenizers", "rich", "jinja2", "safetensors"} & set(done.stdout.split())
