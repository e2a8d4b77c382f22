"""Text into windows, and the texts that are refused."""

import numpy as np
import pytest

from lowtide.errors import LowtideError
from lowtide.eval.text import token_windows


def codes(text):
    return [ord(c) for c in text]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    return path


def test_windows_do_not_overlap_and_start_at_the_beginning(file):
    got = token_windows(file, codes, 2, 4, 200)
    np.testing.assert_array_equal(got, [codes("abcd"), codes("efgh")])
    assert got.dtype == np.int32
    np.testing.assert_array_equal(token_windows(str(file), codes, 9, 4, 200), got)  # as many as there are
    np.testing.assert_array_equal(token_windows(file, codes, 1, 10, 200), [codes("abcdefghij")])


def test_bos_takes_the_first_place_of_every_window(file):
    np.testing.assert_array_equal(
        token_windows(file, codes, 2, 4, 200, bos=1), [[1, *codes("abc")], [1, *codes("def")]]
    )


def test_token_ids_as_a_stream_and_as_windows():
    np.testing.assert_array_equal(token_windows(list(range(7)), codes, 4, 3, 10), [[0, 1, 2], [3, 4, 5]])
    own = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(token_windows(own, codes, 2, 4, 20), own[:2])
    np.testing.assert_array_equal(token_windows(own, codes, 3, 2, 20), own[:, :2])  # each row keeps its start


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("file", {"window": 11}, r"text.txt: holds 10 tokens, one window needs 11"),
        ("file", {"window": 1}, "--window 1: must be 2 or more"),
        ("file", {"windows": 0}, "--windows 0: must be 1 or more"),
        ("file", {"vocab_size": 100}, "token id outside 0 to 99"),
        ([1, 2, -3], {"window": 3}, "outside 0 to"),
        (np.zeros((2, 3), int), {"window": 4}, "the token ids: holds 3 tokens, one window needs 4"),
        (np.zeros(8), {}, "must be integers"),
        (np.zeros((1, 2, 8), int), {}, "must be integers"),
        ([], {}, "must be integers|holds 0 tokens"),
        ("nowhere.txt", {}, "nowhere.txt: cannot read the text"),
        ("folder", {}, "cannot read the text"),
    ],
)
def test_refused(file, text, options, message):
    text = {"file": file, "folder": file.parent}.get(text, text) if isinstance(text, str) else text
    with pytest.raises(LowtideError, match=message):
        token_windows(text, codes, **({"windows": 4, "window": 4, "vocab_size": 200} | options))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(LowtideError, match=r"latin.txt: not UTF-8 text \(byte 3\)"):
        token_windows(path, codes, 1, 2, 300)
