"""benchmarks/rule_cost.py and where.py with a stand-in for perf: arithmetic, rows, and what they say without it."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
from support.tiny import make_artifact

from lowtide.errors import LowtideError
from lowtide.format.reader import open_artifact
from lowtide.kernels.native import available_isas

LISTING = """
        600;3;[.] lowtide_avx2::tiles
        100;2;[.] lowtide_avx2::select
         20;1;[.] lowtide::Engine::choose
         30;1;[.] lowtide_avx2::probe_rows<4>
         50;1;[.] __memmove_avx_unaligned_erms
         40;1;[.] lowtide::Engine::product
         10;1;[.] lowtide_avx2::largest
        150;1;[.] _PyEval_EvalFrameDefault
"""
PERF = """
    import os, sys
    if sys.argv[1] == "report":
        print({listing!r})
        sys.exit()
    if {refusal!r}:
        sys.exit({refusal!r})
    control = next(a for a in sys.argv if a.startswith("--control=fd:"))
    orders, answers = (int(n) for n in control.removeprefix("--control=fd:").split(","))
    for _ in range(2):
        with open({log!r}, "a") as log:
            log.write(os.read(orders, 16).decode())
        os.write(answers, b"ack\\n\\0")
"""


@pytest.fixture
def perf(tmp_path, monkeypatch):
    """Puts a perf on the path, and nothing else; the file it gives has a line for each order."""

    def make(listing=LISTING, refusal=""):
        folder = tmp_path / "bin"
        folder.mkdir()
        code = textwrap.dedent(PERF).format(listing=listing, refusal=refusal, log=str(folder / "log"))
        (folder / "perf").write_text(f"#!{sys.executable}\n{code}")
        (folder / "perf").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder / "log"

    return make


@pytest.fixture
def arguments(tmp_path):
    make_artifact(tmp_path / "tiny", policies=("channel-norm", "ipn"))
    (tmp_path / "text").write_text("the end of the tide is there and then another one in the hand")
    options = ["--text", str(tmp_path / "text"), "--tokens", "8", "--seconds", "0.01", "--rounds", "3"]
    return [str(tmp_path / "tiny"), "--policy", "channel-norm,ipn", "--bits", "4.5,5.5", *options]


def test_shares_are_those_of_all_periods(load):
    found, samples = load("rule_cost").shares(LISTING)
    assert found == {"masks": 0.13, "copies": 0.05, "network": 0.03, "addresses": 0.04}
    assert samples == 11


@pytest.mark.parametrize(
    ("symbol", "part"),
    [
        ("lowtide_avx512::select", "masks"),
        ("lowtide::Engine::thresholds_of", "masks"),
        ("lowtide_portable::scores", "masks"),
        ("lowtide_neon::probe", "network"),
        ("lowtide_avx512::waterline", "network"),
        ("__memset_avx512_unaligned_erms", "copies"),
        ("lowtide_avx2::emit_rest", "masks"),
        ("lowtide_avx2::offsets", "addresses"),
        ("lowtide_avx512::ask", "addresses"),
        ("lowtide::Engine::guess", "addresses"),
        ("lowtide_avx512::attend<3, unsigned short>", None),
        ("lowtide_avx512::softmax", None),
        ("_PyObject_SelectMemo", None),
    ],
)
def test_functions_and_their_parts(load, symbol, part):
    rule_cost = load("rule_cost")
    found, _ = rule_cost.shares(f"1;1;[.] lowtide_x::select\n999;1;[.] {symbol}")
    assert [name for name in rule_cost.PARTS if found[name] > 0.9] == ([part] if part else [])


@pytest.mark.parametrize(("listing", "message"), [("", "saw nothing"), ("5;1;[.] 0x00001234", "is stripped")])
def test_a_listing_that_says_nothing_is_refused(load, listing, message):
    with pytest.raises(LowtideError, match=message):
        load("rule_cost").shares(listing)


def test_rows_of_every_rule_budget_and_instruction_set(load, perf, arguments, tmp_path, capsys):
    log, isas = perf(), available_isas()[:2]
    assert load("rule_cost").main([*arguments, "--isa", ",".join(isas), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    wanted = [(isa, rule, bits) for isa in isas for rule in ("channel-norm", "ipn") for bits in (4.5, 5.5)]
    assert [(r["isa"], r["policy"], r["bits"]) for r in rows] == wanted
    for row in rows:
        assert row["share"] == row["share_low"] == row["share_high"] == pytest.approx(0.13 + 0.05 + 0.03)
        assert row["rule_us"] == pytest.approx(0.21 * row["token_us"]) and 0 < row["token_us"] < 1e6
        assert row["bits_read_body"] == pytest.approx(row["bits"], rel=0.1)
        assert (row["rounds"], row["samples"]) == (3, 33)
    assert log.read_text().splitlines() == ["enable", "disable"] * 3 * len(rows)
    saved = json.loads((tmp_path / "results" / "rule-cost-tiny.json").read_text())
    assert saved["rows"] == rows and saved["threads"] == 1 and saved["tokens"] == 8
    assert "21.0 %" in (tmp_path / "results" / "rule-cost-tiny.md").read_text()
    assert str(tmp_path) not in json.dumps(saved)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--isa", "abacus"], "abacus: not available"),
        (["--policy", "gate"], "stores no thresholds"),
        (["--tokens", "1000"], "--tokens 1000: "),
        (["--text", "nowhere"], "nowhere: No such file"),
    ],
)
def test_bad_input_is_one_line(load, perf, arguments, capsys, more, message):
    perf()
    assert load("rule_cost").main([*arguments, *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("rule_cost: error: ") and message in said


def test_without_perf_it_says_what_is_missing(load, perf, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load("rule_cost").main(arguments) == 2
    assert "perf: not found; install it" in capsys.readouterr().err
    perf(refusal="Access to performance monitoring is limited")
    assert load("rule_cost").main(arguments) == 2
    assert "perf: Access to performance monitoring is limited; install it" in capsys.readouterr().err


# ---- where.py, which samples the same way ----


@pytest.mark.parametrize(
    ("symbol", "part"),
    [
        ("lowtide_avx512::wide_tile", "product"),
        ("lowtide_avx2::tiles", "product"),
        ("lowtide_avx2::write_tiles", "scales, outliers"),
        ("lowtide_avx512::select", "masks"),
        ("lowtide::Engine::guess", "masks"),
        ("__memset_avx512_unaligned_erms", "masks"),
        ("lowtide_avx512::probe_rows<4>", "network"),
        ("lowtide_avx512::attend<3, signed char>", "attention"),
        ("lowtide_avx512::rmsnorm", "norms, gates"),
        ("lowtide::Pool::barrier", "waiting"),
        ("_PyEval_EvalFrameDefault", "other"),
    ],
)
def test_where_puts_a_function_where_it_belongs(load, symbol, part):
    found = load("where").parts_of(f"1;1;[.] lowtide_x::tiles\n999;1;[.] {symbol}")
    assert found[part] > 0.99 and sum(found.values()) == pytest.approx(1)


def test_where_divides_what_the_engine_counts(load, perf, arguments, capsys):
    perf()
    given = [
        arguments[0],
        "--bits",
        "4.5",
        "--policy",
        "ipn",
        "--contexts",
        "4,16",
        "--tokens",
        "6",
        "--seconds",
        "0.01",
    ]
    given += ["--text", arguments[arguments.index("--text") + 1]]
    found = {}
    for cache, threads in (("16", "1,2"), ("8", "1")):
        assert load("where").main([*given, "--cache-bits", cache, "--threads", threads]) == 0
        result = json.loads(Path(capsys.readouterr().out.strip().splitlines()[-1]).read_text())
        assert [(r["threads"], r["context"]) for r in result["rows"]] == [
            (int(t), c) for t in threads.split(",") for c in (4, 16)
        ]
        parts = found[cache] = result["bytes"]
        assert sum(parts.values()) == pytest.approx(result["rows"][-1]["bytes_per_token"], rel=0.1)
    config = open_artifact(arguments[0]).config
    row = config.num_layers * config.num_kv_heads * 2
    for cache, width in (("16", 2 * config.head_dim), ("8", config.head_dim + 4)):
        # positions 17 to 22, each reading all before it and itself
        assert found[cache]["keys and values"] == pytest.approx(19.5 * row * width, abs=1)
        assert found[cache]["outliers"] > 0 and min(found[cache].values()) >= 0


def test_where_tells_bad_input_in_one_line(load, arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no perf
    where = load("where")
    given = [arguments[0], "--bits", "4.5", "--contexts", "4", "--tokens", "4", "--threads", "1"]
    for more, said in (
        ([], "perf: not found"),
        (["--head", "twice"], "--head twice"),
        (["--text", "nowhere"], "nowhere"),
    ):
        assert where.main([*given, *more]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("where: error: ") and said in line
