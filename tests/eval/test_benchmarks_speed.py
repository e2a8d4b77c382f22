"""`benchmarks/speed.py`: which points are held against each other, and the whole run on a tiny model with a stand-in
for llama.cpp; `benchmarks/compress_speed.py`."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from support.twin import make_twins  # noqa: E402

from lowtide.errors import LowtideError  # noqa: E402
from lowtide.kernels.native import available_isas  # noqa: E402

FOLDER = Path(__file__).parents[2] / "benchmarks"


# ---- which points are held against each other ----


def row(engine, setting, kl, decode, prefill=100.0, **more):
    about = {"model": "m", "run": "2 threads, x", "prompt": "p", "context": 16, "of_memory_limit": 0.5}
    speeds = {"decode_tps": decode, "prefill_tps": prefill, "all_decode_tps": [decode - 1, decode, decode + 1]}
    return about | {"engine": engine, "setting": setting, "kl": kl} | speeds | more


def test_ratios_are_those_of_the_fastest_that_are_as_good(load):
    report = load("speed_report")
    theirs = [
        row("llama.cpp", "Q3", 0.2, 30),
        row("llama.cpp", "Q4", 0.05, 40, prefill=50),  # better and faster than Q3: the one to beat there, too
        row("llama.cpp", "Q4+fa", 0.05, 38, prefill=80),
    ]
    ours = [
        row("lowtide", "2 bits", 0.3, 90),
        row("lowtide", "2.5 bits", 0.2, 80),
        row("lowtide", "3 bits", 0.05, 60, prefill=40),
        row("lowtide", "4 bits", 0.01, 50, prefill=40),
    ]
    elsewhere = [row("lowtide", "9 bits", 0.0, 999, context=512), row("llama.cpp", "Q8", None, 1, context=512)]
    found = {e["at_kl_of"]: e for e in report.ratios(theirs + ours + elsewhere)}
    assert list(found) == ["Q3", "Q4"]
    assert (found["Q3"]["setting"], found["Q3"]["peer"], found["Q3"]["decode_ratio"]) == ("2.5 bits", "Q4", 80 / 40)
    assert (found["Q4"]["setting"], found["Q4"]["peer"], found["Q4"]["decode_ratio"]) == ("3 bits", "Q4", 60 / 40)
    assert found["Q4"]["prefill_ratio"] == 40 / 80  # flash attention is as good and prefills faster
    assert found["Q4"]["decode_ratio_middle_half"] == pytest.approx([(60 / 40 + 61 / 41) / 2, (59 / 39 + 60 / 40) / 2])


def test_a_type_that_ran_with_flash_attention_alone_sets_a_limit_too(load):
    rows = [row("llama.cpp", "Q4+fa", 0.05, 40), row("lowtide", "3 bits", 0.04, 60)]
    (found,) = load("speed_report").ratios(rows)
    assert (found["at_kl_of"], found["peer"], found["decode_ratio"]) == ("Q4", "Q4+fa", 1.5)


def test_no_ratio_without_quality(load):
    report = load("speed_report")
    assert report.ratios([row("llama.cpp", "Q4", None, 40), row("lowtide", "3 bits", 0.1, 60)]) == []
    assert report.ratios([row("llama.cpp", "Q4", 0.05, 40), row("lowtide", "3 bits", None, 60)]) == []
    assert report.ratios([row("llama.cpp", "Q4", 0.05, 40), row("lowtide", "3 bits", 0.051, 60)]) == []


@pytest.mark.parametrize("threshold", [0.0, 1.5, 1.52, 2.0, 3.37, 6.2, 6.21, 9.0])
def test_the_lowest_budget_is_found_with_few_measurements(load, threshold):
    """A model that is good enough from `threshold` bits on."""
    kl, asked = load("speed_kl"), []

    def kl_at(bits):
        asked.append(bits)
        return 0.05 if bits >= threshold else 0.06

    grid = [b / 100 for b in range(155, 621, 5)]
    found = kl.lowest_budget(kl_at, 0.05, 1.52, 6.2218)
    assert found == min((b for b in grid if b >= threshold), default=None)
    assert len(asked) <= 9 and all(1.52 <= b <= 6.2218 for b in asked)


def test_an_empty_range_has_no_budget(load):
    assert load("speed_kl").lowest_budget(lambda bits: 0.0, 1.0, 2.01, 2.04) is None


def quality_file(path, **kl):
    rows = [{"method": "lowtide channel-norm", "target": t, "kl": k} for t, k in ((4.5, 0.2), (5.0, 0.1), ("dense", 0))]
    rows.append({"method": "lowtide topk", "target": 4.0, "kl": 0.0})
    rows += [{"method": f"llama.cpp {kind}", "target": None, "kl": k} for kind, k in kl.items()]
    path.write_text(json.dumps({"rows": rows}))
    return str(path)


def test_quality_comes_from_a_file_of_the_right_rule(load, tmp_path):
    kl = load("speed_kl")
    source = kl.FromFile(quality_file(tmp_path / "q.json", Q4=0.15, Q8=-1, Q1=0.3), "channel-norm")
    bits, found = kl.quality_of(source, [5.5, "dense", 4.5], ["Q4", "Q4+fa", "Q8", "Q2"], match=True)
    assert bits == [4.5, 5.0, 5.5, "dense"]  # 5 is the lowest as good as Q4; nothing is as good as Q8
    assert found == {
        "Q4": 0.15,
        "Q8": -1,
        "Q2": None,
        "4.5 bits": 0.2,
        "5 bits": 0.1,
        "5.5 bits": None,
        "dense": 0,
    }
    assert kl.quality_of(source, [5.5], ["Q4"], match=False)[0] == [5.5]
    assert kl.quality_of(source, [5.5], ["Q1"], match=True)[0] == [4.5, 5.5]
    assert kl.quality_of(None, [5.5], ["Q4"], match=False) == ([5.5], {"Q4": None, "5.5 bits": None})
    for content in ("[]", "{", '{"rows": [{"method": 1}]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(LowtideError, match="bad.json: is no result of benchmarks/quality.py"):
            kl.FromFile(str(tmp_path / "bad.json"), "channel-norm")


# ---- the whole run ----


@pytest.fixture
def twins(tmp_path):
    path, source = make_twins(tmp_path / "smol-tiny.lowtide", max_position=256)
    return path, source


def run_speed(load, twins, tmp_path, *more):
    load("peers").write_f16_gguf(twins[1], tmp_path / "smol.gguf")
    quality = quality_file(tmp_path / "q.json", Q4_0=0.15)
    quick = ["--tokens", "4", "--rounds", "1", "--prefill", "24", "--prefill-rounds", "1", "--starts", "1"]
    quick += ["--cold-starts", "0", "--pause", "0", "--contexts", "8,16", "--work", str(tmp_path / "work")]
    model = f"{twins[0]}:{tmp_path / 'smol.gguf'}:Q4_0:{quality}"
    return load("speed").main([model, *quick, "--isas", "", "--threads", "1", *more])


def test_the_whole_run(load, twins, tmp_path, llama, capsys):
    assert run_speed(load, twins, tmp_path, "--bits", "5", "--match", "--halve", "6,5", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "results" / "speed-smol-tiny.json").read_text()) == result
    names = ["model", "engine", "setting", "kl", "decode_tps", "prefill_tps", "first_token_s", "peak_rss_bytes"]
    names += ["bytes_read_per_token", "gb_per_s", "threads", "isa"]
    cases = {("prose", 8), ("prose", 16), ("code", 8)}
    assert {(r["prompt"], r["context"], r["setting"]) for r in result["rows"]} == {
        (*case, setting) for case in cases for setting in ("5 bits", "Q4_0")
    }
    for r in result["rows"]:
        assert list(r)[: len(names)] == names and all(r[n] is not None for n in names)
        assert r["threads"] == 1 and r["kl"] == {"5 bits": 0.1, "Q4_0": 0.15}[r["setting"]]
        assert r["isa"] == ("avx2" if r["engine"] == "llama.cpp" else available_isas()[0])
        assert r["gb_per_s"] == pytest.approx(r["bytes_read_per_token"] * r["decode_tps"] / 1e9)
        assert r["of_memory_limit"] == pytest.approx(r["gb_per_s"] / r["probe_gb_per_s"])
    assert {(e["prompt"], e["context"]) for e in result["ratios"]} == cases
    assert result["blocks"][0]["halving"]["bits"] == [6, 5] and len(result["blocks"]) == 1
    assert result["versions"]["llama_cpp_python"] == "9.9"
    text = (tmp_path / "results" / "speed-smol-tiny.md").read_text()
    places = [text.index(t) for t in ("Ratios at equal quality", "All points", "Starts and memory", "Half the bits")]
    assert places == sorted(places) and str(tmp_path) not in text


def test_mistakes_are_found_before_anything_is_measured(load, twins, tmp_path, capsys):
    speed = load("speed")

    def refusal(*arguments):
        assert speed.main([*map(str, arguments)]) == 2
        return capsys.readouterr().err.strip()

    load("peers").write_f16_gguf(twins[1], tmp_path / "smol.gguf")
    good = f"{twins[0]}:{tmp_path / 'smol.gguf'}:Q4_0"
    assert "give ARTIFACT:GGUF:TYPES" in refusal(twins[0], "--isas", "")
    assert "none.gguf: no such file" in refusal(good, f"{twins[0]}:none.gguf:Q4_0", "--isas", "")
    assert "--match: needs the KL of every model" in refusal(good, "--match", "--isas", "")
    assert "--isas sse9: not available" in refusal(good, "--isas", "sse9")
    assert "--halve: give two budgets" in refusal(good, "--isas", "", "--halve", "4,dense")
    assert "--bits x" in refusal(good, "--isas", "", "--bits", "x")
    assert "the model holds 256" in refusal(good, "--isas", "", "--contexts", "300")


def test_the_command_leaves_folders_out_of_models(load, monkeypatch):
    common = load("common")
    monkeypatch.setattr(sys, "argv", ["speed.py", "/a/b.lowtide:/c/d.gguf:Q4_K_M", "demo:x", "--text", "/e/f.txt"])
    assert common.command() == "python benchmarks/speed.py b.lowtide:d.gguf:Q4_K_M demo:x --text f.txt"


def test_quick_takes_the_small_model(load):
    speed = load("speed")
    models = ["a/qwen.lowtide:q.gguf:Q4_K_M", "a/SmolLM2.lowtide:s.gguf:Q4_K_M"]
    assert speed.chosen(speed.arguments([*models, "--quick"])) == models[1:]
    assert speed.chosen(speed.arguments(models)) == models
    assert speed.chosen(speed.arguments([models[0], models[0], "--quick"])) == models[:1]


# ---- compression ----


def test_compression_is_timed_in_a_process_of_its_own(load, tmp_path, monkeypatch, capsys):
    compress_speed = load("compress_speed")
    sizes = {"large": 4_000_000, "small": 1_000_000}
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(compress_speed.time, "monotonic", lambda: float(next(clock)))

    def child(command, stderr, env):
        assert command[1:3] == [str(FOLDER / "compress_speed.py"), "--child"] and env["OMP_NUM_THREADS"] == "2"
        _, _, _, model, out, figures, settings = command
        assert json.loads(settings) == {"calibration": "c.txt", "bits_max": 6, "seed": 0}
        Path(out).mkdir()
        found = {"weights": sizes[model], "peak_rss_bytes": 5e9, "stages_s": {"open": 1.0, "quantise": 2.0}}
        Path(figures).write_text(json.dumps(found))
        return Namespace(returncode=0, stderr=b"")

    monkeypatch.setattr(compress_speed.subprocess, "run", child)
    arguments = ["large", "small", "--calibration", "c.txt", "--work", str(tmp_path / "work"), "--threads", "2"]
    assert compress_speed.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(r["model"], r["seconds"], r["us_per_parameter"]) for r in result["rows"]] == [
        ("small", 3, 3.0),
        ("large", 3, 0.75),
    ]
    assert result["highest_over_lowest"] == 4 and list((tmp_path / "work").iterdir()) == []
    assert "open 1.0, quantise 2.0" in (tmp_path / "results" / "compress-speed.md").read_text()


def test_stages_of_a_compression(load, monkeypatch):
    import lowtide

    compress_speed = load("compress_speed")
    now = [0.0]
    monkeypatch.setattr(compress_speed.time, "monotonic", lambda: now[0])

    def compress(model, out, progress, **settings):
        assert settings == {"seed": 1}
        for stage, begin in (("sample", 2), ("forward", 3), ("sample", 4), ("quantise", 7)):
            now[0] = begin
            progress(stage, 0, 1)
        now[0] = 17
        return {"weights": 10, "file_bytes": 20, "calibration_tokens": 30}

    monkeypatch.setattr(lowtide, "compress", compress, raising=False)
    found = compress_speed.compress_here("m", "out", {"seed": 1})
    assert found.pop("peak_rss_bytes") > 0
    assert found.pop("stages_s") == {"open": 2, "sample": 1, "forward": 4, "quantise": 10}
    assert found == {"weights": 10, "file_bytes": 20, "calibration_tokens": 30}


def test_a_compression_that_fails_says_why(load, tmp_path, capfd):
    missing = tmp_path / "none.gguf"
    assert load("compress_speed").main([str(missing), "--work", str(tmp_path / "work")]) == 2
    captured = capfd.readouterr()
    assert captured.err.splitlines()[-1].startswith("compress_speed: error: ") and "none.gguf" in captured.err
    assert captured.out == "" and list((tmp_path / "work").iterdir()) == []
