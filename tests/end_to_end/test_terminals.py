"""A whole run where the terminal and the locale know ASCII alone."""

import json
import os
import subprocess
import sys

import pytest

from tests.end_to_end.runs import ROOT

TINY = [
    "--config.pretrain.epochs=1",
    "--config.pretrain.warmup_epochs=0",
    "--config.prune.schedule.granularity=0.5",
    "--config.prune.schedule.stabilize=60",
    "--config.finetune.epochs=1",
    "--config.finetune.warmup_epochs=0",
]
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def launch(*arguments):
    """Runs launch.py in the plainest locale there is; returns what it printed."""
    environment = os.environ | ASCII | {"XLA_FLAGS": "", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "launch.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
    )


@pytest.mark.slow
def test_a_run_prints_ascii_and_names_its_folder_as_it_is(tmp_path):
    workdir = tmp_path / "[old] [b]größe"
    flag = f"--workdir={workdir}"
    prefix = str(workdir).partition("ö")[0]
    done = launch(flag, *TINY)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "layer2.0.conv1" in text and "32 > 16" in text and "fine-tuned" in text
    assert json.loads((workdir / "summary.json").read_text())["status"] == "done"
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "1.97× fewer FLOPs" in page

    again = launch(flag, *TINY)
    assert (again.returncode, again.stderr) == (0, b"")
    assert f"The run in {prefix}" in again.stdout.decode("ascii")
    for mode in ("inspect", "evaluate", "report"):
        done = launch(flag, f"--mode={mode}")
        assert (done.returncode, done.stderr) == (0, b""), mode
        done.stdout.decode("ascii")
    wrong = launch(flag, *TINY, "--config.seed=1")
    assert wrong.returncode == 1
    assert wrong.stderr.decode("ascii").startswith(f"error: {prefix}")
