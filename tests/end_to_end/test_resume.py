"""A run that is killed at any moment ends, run again, as if nothing had happened."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx

from tests.end_to_end.test_digits import ROOT, launch
from tpp_jax.pruning.naming import named_leaves
from tpp_jax.training.checkpoints import load_model

SHORT = [
    "--config=configs/digits_resnet8_tpp.py",
    "--config.model.name=mlp7_relu",
    "--config.prune.ratios=*net*:0.5",
    "--config.prune.skip=net.12",
    "--config.pretrain.epochs=6",
    "--config.pretrain.learning_rate=0.02",
    "--config.prune.schedule.granularity=0.05",
    "--config.prune.schedule.stabilize=80",
    "--config.finetune.epochs=6",
    "--config.checkpoint_every=25",
    "--config.log_every=5",
]

STARTS = {"pretrain": 0, "stabilize": 132 + 100, "finetune": 132 + 100 + 81}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = launch(f"--workdir={workdir}", *SHORT)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize("phase", ["pretrain", "stabilize", "finetune"])
def test_a_killed_run_ends_bit_for_bit_like_an_undisturbed_one(
    tmp_path, undisturbed, phase
):
    _run_until(tmp_path, phase)
    assert not (tmp_path / "summary.json").exists()
    done = launch(f"--workdir={tmp_path}", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "Continuing the run" in done.stdout
    ours, theirs = _arrays(tmp_path), _arrays(undisturbed)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert _summary(tmp_path) == _summary(undisturbed)
    assert _history(tmp_path) == _history(undisturbed)


def _run_until(workdir: pathlib.Path, phase: str) -> None:
    """Runs launch.py and kills it once there is a checkpoint from within a phase."""
    command = [sys.executable, "launch.py", f"--workdir={workdir}", *SHORT]
    # Its output goes nowhere: a pipe that nobody reads would hold it up.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    start = STARTS[phase]
    saved = workdir / "checkpoints"
    while process.poll() is None:
        steps = [int(d.name) for d in saved.glob("*") if d.name.isdigit()]
        if any(step > start for step in steps):
            break
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def _arrays(workdir):
    return {k: np.asarray(v) for k, v in named_leaves(_state(workdir)).items()}


def _state(workdir):
    return nnx.state(load_model(workdir / "model"))


def _summary(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    for phase in summary["phases"]:
        del phase["seconds"]
    return summary


def _history(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in rows]
