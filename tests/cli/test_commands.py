"""Every command, run as users run it, on a tiny model from compress to chat."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

COMMANDS = ("compress", "eval", "generate", "chat", "bench", "inspect", "explain", "pack", "prune", "verify")


def budgets(artifact):
    grid = json.loads((artifact / "lowtide.json").read_text())["budgets"]
    return grid[0], grid[-2], grid[-1]


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("The sea went out and the sea came in again, and nobody thought it strange. " * 4)
    return path


def test_help_lists_every_command_with_examples(cli):
    overview = cli("--help").stdout
    assert overview == cli().stdout
    for command in COMMANDS:
        assert f"\n  {command} " in overview
        text = cli(command, "--help").stdout
        assert "Examples:" in text
        assert text.count(f"lowtide {command} ") >= 2  # the usage line does not count it alone


def test_version(cli):
    import lowtide

    assert cli("--version").stdout == f"lowtide {lowtide.__version__}\n"


def test_compress_says_what_it_made(cli, hf_model, tmp_path):
    done = cli("compress", hf_model, tmp_path / "out", "--bits-max", 4, "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    assert json.loads((tmp_path / "out" / "lowtide.json").read_text())["slices"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_eval_gives_the_promised_json(cli, compressed, hf_model, prose):
    low, high, _ = budgets(compressed)
    args = ["--reference", hf_model, "--text", prose, "--windows", 4, "--window", 64]
    done = cli("eval", compressed, *args, "--bits", f"{low},{high},dense", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"windows", "window", "dense_ppl", "points", "file_bytes", "file_bits_per_weight"}
    assert (result["windows"], result["window"]) == (4, 64)
    assert result["file_bytes"] == sum(f.stat().st_size for f in compressed.iterdir())
    for point, bits in zip(result["points"], (low, high, "dense"), strict=True):
        assert set(point) == {"bits", "bits_read_body", "bits_read_total", "kl", "ppl"}
        assert point["bits"] == bits
    first, _, dense = result["points"]
    assert first["kl"] > dense["kl"] >= 0
    assert first["bits_read_body"] == pytest.approx(low, rel=0.03)
    assert dense["bits_read_body"] > high
    table = cli("eval", compressed, *args, "--bits", low).stdout
    assert "KL (nats)" in table
    assert f"dense perplexity {result['dense_ppl']:.3f}" in table


def test_generate_streams_text_on_stdout_and_figures_on_stderr(cli, compressed):
    low, *_ = budgets(compressed)
    args = ["--prompt", "the", "-n", 8, "--bits", low, "--temperature", 1, "--seed", 5]
    done = cli("generate", compressed, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the")
    assert "bits read per weight" in done.stderr
    figures = json.loads(cli("generate", compressed, *args, "--json").stdout)
    assert done.stdout == f"the{figures['text']}\n"
    assert figures["bits"] == low
    assert figures["tokens"] <= 8
    assert set(figures) >= {"prompt_tokens", "decode_tps", "prefill_tps", "bits_read_body", "bytes_read", "finish"}


def test_generate_takes_several_prompts_at_once(cli, compressed, tmp_path):
    """Each as it comes alone, in order; with --json one object a line."""
    low, *_ = budgets(compressed)
    args = ["-n", 6, "--bits", low, "--temperature", 1, "--context", 32]
    (tmp_path / "p.jsonl").write_text('{"prompt": "c", "seed": 9}\n\n{"prompt": "the d"}\n')
    alone = [
        json.loads(cli("generate", compressed, "-p", prompt, *args, "--seed", seed, "--json").stdout)
        for prompt, seed in (("the", 5), ("a b", 5), ("c", 9), ("the d", 5))
    ]
    several = ["-p", "the", "-p", "a b", "--prompts", tmp_path / "p.jsonl", *args, "--seed", 5, "--parallel", 3]
    rows = [json.loads(line) for line in cli("generate", compressed, *several, "--json").stdout.splitlines()]
    assert [row.pop("prompt") for row in rows] == ["the", "a b", "c", "the d"]
    for row, wanted in zip(rows, alone, strict=True):
        assert row.keys() == wanted.keys()
        for name in ("text", "bits", "tokens", "bits_read_body", "bytes_read", "finish"):
            assert row[name] == wanted[name]
    done = cli("generate", compressed, *several)
    texts = [prompt + row["text"] for prompt, row in zip(("the", "a b", "c", "the d"), rows, strict=True)]
    assert done.stdout == "\n\n".join(texts) + "\n"
    assert f"[{sum(row['tokens'] for row in rows)} tokens, " in done.stderr


def test_generate_dense_and_other_policies(cli, compressed):
    low, high, _ = budgets(compressed)
    figures = json.loads(cli("generate", compressed, "-p", "the", "--bits", "dense", "--json").stdout)
    assert figures["bits"] == "dense"
    done = cli("generate", compressed, "-p", "the", "--bits", high, "--policy", "topk", "--json")
    assert json.loads(done.stdout)["bits"] == high


def test_chat_answers_each_line_and_forgets_on_clear(cli, compressed):
    low, *_ = budgets(compressed)
    args = ["chat", compressed, "--bits", low, "-n", 4, "--temperature", 0]
    one = cli(*args, stdin="hi\n")
    assert one.returncode == 0, one.stderr
    answer = one.stdout.splitlines()
    assert answer
    twice = cli(*args, stdin="hi\n\n/clear\nhi\n/exit\nnever\n")
    assert twice.stdout == one.stdout * 2
    assert cli(*args, "--system", "Be brief.", stdin="hi\n").returncode == 0


def test_bench_gives_the_promised_json(cli, compressed):
    low, _, _ = budgets(compressed)
    args = ["bench", compressed, "--bits", f"{low},dense", "-p", 16, "-n", 8, "-t", 1, "-r", 2]
    result = json.loads(cli(*args, "--json").stdout)
    assert set(result) >= {"points", "load_s", "peak_rss_bytes", "isa", "threads"}
    for point, bits in zip(result["points"], (low, "dense"), strict=True):
        assert point["bits"] == bits
        assert set(point) >= {"decode_tps", "decode_tps_sd", "prefill_tps", "bytes_read_per_token", "gb_per_s"}
    table = cli(*args).stdout
    assert table.count("±") == 4
    assert result["isa"] in table


def test_preload_changes_nothing_but_the_memory(cli, compressed):
    low, *_ = budgets(compressed)
    args = ["generate", compressed, "-p", "the", "-n", 5, "--bits", low]
    assert cli(*args, "--preload").stdout == cli(*args).stdout
    args = ["chat", compressed, "--bits", low, "-n", 4, "--temperature", 0]
    assert cli(*args, "--preload", stdin="hi\n").stdout == cli(*args, stdin="hi\n").stdout
    args = ["bench", compressed, "--bits", low, "-p", 4, "-n", 2, "-t", 1, "-r", 1]
    assert json.loads(cli(*args, "--preload", "--json").stdout)["preload_bytes"] > 0
    assert ", memory " in cli(*args).stdout


def test_bench_runs_on_the_instruction_set_that_is_asked_for(cli, compressed, monkeypatch):
    args = ["bench", compressed, "--bits", "dense", "-p", 4, "-n", 2, "-r", 1, "--json"]
    assert json.loads(cli(*args, "--isa", "portable").stdout)["isa"] == "portable"
    monkeypatch.setenv("LOWTIDE_ISA", "portable")
    assert json.loads(cli(*args).stdout)["isa"] == "portable"


def test_inspect_shows_every_group(cli, compressed):
    low, *_ = budgets(compressed)
    result = json.loads(cli("inspect", compressed, "--bits", low, "--json").stdout)
    names = [f"layers.0.{n}" for n in ("qkv", "o", "gate_up", "down")]
    assert [g["group"] for g in result["groups"]] == [*names, "head"]
    assert result["shown"] == {"bits": f"{low:g}", "rule": "channel-norm"}
    qkv = result["groups"][0]
    assert (qkv["in"], qkv["out"]) == (32, [32, 16, 16])
    assert len(qkv["thresholds"]) == result["slices"] == 3
    assert result["weights"] == sum(g["weights"] for g in result["groups"])
    assert qkv["stored_bits"] > 6 > qkv["side_bits"]
    table = cli("inspect", compressed).stdout
    assert table.count("layers.0.") == 4
    assert "32+16+16 x 32" in table


def test_inspect_writes_valid_json_for_slices_that_are_never_read(cli, compressed):
    text = cli("inspect", compressed, "--bits", budgets(compressed)[0], "--policy", "channel-norm:0,4", "--json").stdout
    groups = json.loads(text, parse_constant=pytest.fail)["groups"]
    assert groups[0]["thresholds"][2] is None


def test_verify(cli, compressed, tmp_path):
    done = cli("verify", compressed)
    assert done.returncode == 0
    assert done.stdout.startswith("ok: ")
    figures = json.loads(cli("verify", compressed, "--json").stdout)
    assert figures["ok"] is True
    assert figures["bytes"] == sum(f.stat().st_size for f in compressed.iterdir())


def test_a_reader_that_leaves_early_is_no_error(compressed):
    command = [sys.executable, "-m", "lowtide.cli", "inspect", str(compressed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def wait_until_idle(pid):
    """Until the process has loaded the library and used no processor time for half a second: it waits for a line.

    A signal that comes while Python is in a finaliser is lost, so it must not come while modules are loaded.
    """
    used, deadline = None, time.monotonic() + 60
    while time.monotonic() < deadline:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/stat") as stat:
            loaded, fields = "liblowtide" in maps.read(), stat.read().rpartition(")")[2].split()
        now = fields[11:13]  # utime and stime
        if loaded and fields[0] == "S" and now == used:
            return
        used = now
        time.sleep(0.5)
    raise AssertionError("the process does not come to rest")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_is_no_traceback(compressed, number, code):
    command = [sys.executable, "-m", "lowtide.cli", "chat", str(compressed)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # a test run in the background of a script inherits an interrupt that is ignored
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, preexec_fn=listen) as process:
        wait_until_idle(process.pid)
        os.kill(process.pid, number)
        assert process.wait(60) == code
        assert b"Traceback" not in process.stderr.read()
