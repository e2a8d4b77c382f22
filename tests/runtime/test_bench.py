"""bench: the figures it returns are those of its definition."""

import pytest

import lowtide
from lowtide.errors import LowtideError
from lowtide.runtime.bench import peak_rss_bytes


@pytest.fixture(scope="module")
def result(tiny_artifact):
    return lowtide.bench(tiny_artifact, (4.0, None), prompt_tokens=16, max_tokens=12, threads=1, repetitions=3)


def test_the_result_has_the_shape_the_command_promises(result):
    assert set(result) >= {"points", "load_s", "peak_rss_bytes", "isa", "threads"}
    assert [p["bits"] for p in result["points"]] == [4.0, "dense"]
    assert result["threads"] == 1
    assert 0 < result["load_s"] < 60
    for point in result["points"]:
        assert set(point) >= {"bits", "decode_tps", "decode_tps_sd", "prefill_tps", "bytes_read_per_token", "gb_per_s"}
        assert point["decode_tps"] > 0
        assert point["prefill_tps"] > 0
        assert point["gb_per_s"] == pytest.approx(point["bytes_read_per_token"] * point["decode_tps"] / 1e9)


def test_dense_reads_more(result):
    low, dense = result["points"]
    assert low["bits_read_body"] < dense["bits_read_body"]
    assert low["bytes_read_per_token"] < dense["bytes_read_per_token"]


def test_deviation_is_that_of_the_repetitions(result, tiny_artifact):
    assert all(p["decode_tps_sd"] > 0 and p["prefill_tps_sd"] > 0 for p in result["points"])
    once = lowtide.bench(tiny_artifact, (4.0,), 4, 4, threads=1, repetitions=1)
    assert once["points"][0]["decode_tps_sd"] == 0


def test_the_prompt_defaults_to_the_context_where_that_is_smaller(tiny_artifact):
    assert lowtide.bench(tiny_artifact, (5.0,), max_tokens=2, threads=1, repetitions=1)["prompt_tokens"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 65}, "-p 65 .*context holds 64"),
        ({"max_tokens": 64}, "-n 64.*context holds 64"),
        ({"prompt_tokens": 0}, "-p 0"),
        ({"repetitions": 0}, "-r 0"),
        ({"bits": (1.0,)}, "--bits 1"),
        ({"threads": 0}, "--threads 0"),
    ],
)
def test_bad_options_are_named(tiny_artifact, options, message):
    with pytest.raises(LowtideError, match=message):
        lowtide.bench(tiny_artifact, **{"bits": (5.0,), "max_tokens": 4} | options)


def test_peak_memory_counts_what_this_process_touched():
    before = peak_rss_bytes()
    block = bytearray(b"x") * (before + (64 << 20))
    assert peak_rss_bytes() >= before + len(block) // 2
