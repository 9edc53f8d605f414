"""The file of metrics, whatever has become of its lines."""

import json
import math
import os

import pytest

from tpp_jax.errors import TPPError
from tpp_jax.experiment.records.history import History, is_number, read_history

ODD = [
    '{"loss": 1.5}',
    '{"step": null, "loss": 1}',
    '{"step": "3"}',
    '{"step": NaN}',
    '{"step": true}',
    '{"step": [1]}',
    "[1, 2]",
    "3",
    "null",
    "merged by hand",
    "<<<<<<< HEAD",
    '{"step": 3',
    "[" * 100_000,
    '{"step": 1' + "0" * 5000 + "}",
    "\x00\x00",
]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("odd", ODD, ids=lambda text: text[:20])
def test_a_line_that_is_no_row_is_left_out_and_left_in_the_file(file, odd):
    rows = [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    first, last = map(json.dumps, rows)
    file.write_text(f"{first}\n{odd}\n{last}\n")
    history = History(file, 3)
    assert history.odd == [2]
    assert history.read() == rows
    history.append({"step": 4})
    assert file.read_text().splitlines() == [first, odd, last, '{"step": 4}']


def test_bytes_that_are_no_text_hurt_their_own_line_only(file):
    file.write_bytes(b'{"step": 1}\n{"step": 2, "x": "\xff"}\n\xfe\n{"step": 3}\n')
    assert History(file, 9).odd == [2, 3]
    assert [row["step"] for row in read_history(file)] == [1, 3]


def test_a_last_line_that_a_kill_cut_short_is_dropped(file):
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    history = History(file, 9)
    history.append({"step": 2})
    assert (history.odd, [row["step"] for row in history.read()]) == ([], [1, 2])


def test_a_last_row_that_only_lacks_its_end_is_kept(file):
    file.write_text('{"step": 1}\n{"step": 2}')
    history = History(file, 9)
    history.append({"step": 3})
    assert [row["step"] for row in history.read()] == [1, 2, 3]


def test_what_a_resumed_run_does_again_is_forgotten(file):
    file.write_text("".join(f'{{"step": {i}}}\n' for i in (1, 2, 30, 10**30)))
    assert [row["step"] for row in History(file, 2).read()] == [1, 2]


def test_huge_rows_and_numbers_that_are_none_are_read(file):
    row = {"step": 1, "text": "x" * 1_000_000, "loss": math.nan, "top": math.inf}
    History(file, 0).append(row)
    [read] = History(file, 1).read()
    assert read["text"] == row["text"] and math.isnan(read["loss"])


def test_a_kill_while_it_is_opened_leaves_the_old_file(file, monkeypatch):
    before = '{"step": 1}\n{"step": 2}\n'
    file.write_text(before)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        History(file, 1)
    assert file.read_text() == before


@pytest.mark.parametrize("make", ["mkdir", "fifo"])
def test_something_that_is_no_file_in_its_place_is_named(file, make):
    file.mkdir() if make == "mkdir" else os.mkfifo(file)
    with pytest.raises(TPPError, match=r"metrics\.jsonl is no file.* move it"):
        History(file, 1)
    with pytest.raises(TPPError, match=r"metrics\.jsonl"):
        read_history(file)


def test_a_number_is_finite_and_no_truth_value():
    assert all(map(is_number, (0, -1.5, 10**300)))
    assert not any(map(is_number, (True, "1", None, math.nan, -math.inf, 10**400)))
