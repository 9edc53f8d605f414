"""Files that are written to exhaust memory or time are errors before they do."""

import json
import os
import subprocess
import sys

import pytest

from tests.end_to_end.starts import ROOT
from tests.interop.bombs import MIB


@pytest.fixture(scope="module")
def readings(tmp_path_factory):
    """What reading each file took, in a process that reads nothing else."""
    folder = tmp_path_factory.mktemp("bombs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.interop.bombs", folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_file_of_a_mebibyte_takes_a_gibibyte_or_ten_seconds(readings):
    assert len(readings) > 50
    for reading in readings:
        assert reading["bytes"] < 1.1 * MIB, reading
        assert reading["mebibytes"] < 1024, reading
        assert reading["seconds"] < 10, reading  # of the processor: others may work


def test_each_is_an_error_that_can_be_printed(readings):
    for reading in readings:
        assert reading["error"] == "TPPError", reading
        assert reading["said"].isprintable(), reading
        assert 20 < len(reading["said"]) < 1500, reading
