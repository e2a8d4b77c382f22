"""Fixtures for the benchmarks' tests: the scripts as modules, and a stand-in for llama.cpp."""

import importlib
import os
import sys
import textwrap
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
OURS = {p.stem for p in FOLDER.glob("*.py")}

LLAMA = """
    import ctypes, shutil, sys
    __version__ = "9.9"
    llama_token = ctypes.c_int32
    cells, log = [], []
    class Llama:
        def __init__(self, path, **options):
            print("chatter", file=sys.stderr)
            self.ctx, self.options = self, options
            log.append(["open", options["flash_attn"]])
        def n_vocab(self): return 130
        def reset(self): cells.clear()
        def eval(self, ids):
            if ids == [65] and self.options["n_ctx"] == 13: raise ValueError("the context is full")
            cells.extend(ids)
            self.scores = [[float(i), 0.5] for i in ids]
        def sample(self, temp): return 65
        def detokenize(self, ids): return b"a"
    class Options(ctypes.Structure):
        _fields_ = [("ftype", ctypes.c_int), ("nthread", ctypes.c_int)]
    def llama_model_quantize_default_params(): return Options()
    def llama_model_quantize(source, path, options): shutil.copy(source, path)
    def llama_print_system_info(): return b"CPU : AVX = 1 | AVX2 = 1 | AVX512 = 0"
    def llama_get_memory(context): return context
    def llama_memory_clear(memory, data): cells.clear()
    def llama_memory_seq_rm(memory, sequence, begin, end):
        del cells[begin:]
        return True
    def llama_batch_get_one(tokens, n): return list(tokens[:n])
    def llama_decode(context, batch):
        log.append(len(batch))
        cells.extend(batch)
        return 0
    def llama_get_logits_ith(context, i): return None
"""


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Imports a benchmark by name; its results go to a temporary folder."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        module = importlib.import_module(name)
        monkeypatch.setattr(importlib.import_module("common").save, "__defaults__", (tmp_path / "results",))
        return module

    yield load
    for name in OURS:
        sys.modules.pop(name, None)


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A stand-in for llama_cpp that keeps a list of tokens as its cache; also for processes started from here."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    (folder / "llama_cpp.py").write_text(textwrap.dedent(LLAMA))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("llama_cpp", None)
