"""Two processes, two simulated devices each, train as one process of four does."""

import signal
import socket
import time

import numpy as np
import pytest

from tests.end_to_end.runs import (
    assert_same_end,
    history_of,
    last_saved,
    launch,
    summary_of,
)
from tests.end_to_end.starts import start
from tpp_jax.saving import load_model_info

TWO_DEVICES = "--xla_force_host_platform_device_count=2"
# At the paper's rate: at 0.1 rounding alone drives the two apart within twenty steps.
JOB = [
    "--config.pretrain.epochs=0",
    "--config.prune.schedule.granularity=0.1",
    "--config.prune.schedule.every=1",
    "--config.prune.schedule.stabilize=15",
    "--config.prune.schedule.zero_out_every=1",
    "--config.finetune.epochs=1",
    "--config.finetune.warmup_epochs=0.0",
    "--config.finetune.learning_rate=0.001",
    "--config.log_every=5",
    "--config.checkpoint_every=10",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def undisturbed(folder):
    """What two processes make of it together."""
    workdir = folder / "two"
    first, second = start_two(workdir, *JOB)
    output, errors = first.communicate()
    quiet, _ = second.communicate()
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert "fine-tuned" in output and "fine-tuned" not in quiet
    return workdir


def test_two_processes_train_like_one(folder, undisturbed):
    workdir = folder / "one"
    done = launch(f"--workdir={workdir}", *JOB, xla_flags=TWO_DEVICES.replace("2", "4"))
    assert done.returncode == 0, done.stderr
    ours, alone = history_of(undisturbed), history_of(workdir)
    assert len(ours) == len(alone)
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (ours, alone)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    plans = [load_model_info(run / "model")["plan"] for run in (undisturbed, workdir)]
    assert plans[0] == plans[1]
    # One set of results, written by the first process.
    assert {f.name for f in undisturbed.iterdir()} == {
        f.name for f in workdir.iterdir()
    }
    assert len(list((undisturbed / "tensorboard").iterdir())) == 1
    assert summary_of(undisturbed)["status"] == "done"


def test_when_one_is_killed_the_other_says_so_and_a_rerun_ends_as_undisturbed(
    folder, undisturbed
):
    workdir = folder / "killed"
    first, second = start_two(workdir, *JOB)
    while first.poll() is None and not last_saved(workdir):
        time.sleep(0.01)
    second.kill()
    _, errors = first.communicate(timeout=60)
    second.communicate()
    if first.returncode == -signal.SIGABRT:  # it was waiting for a checkpoint
        assert "another task died" in errors
    else:
        assert first.returncode == 1
        assert "error: another process of the run is lost" in errors
        assert "continue from the last checkpoint" in errors
    assert "Traceback" not in errors
    assert not (workdir / "summary.json").exists()
    again, other = start_two(workdir, *JOB)
    output, errors = again.communicate()
    other.communicate()
    assert (again.returncode, other.returncode) == (0, 0), errors
    assert "Continuing the run" in output
    assert_same_end(workdir, undisturbed)


def test_processes_that_do_not_find_each_other_say_so(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    process = start_one(address, 1, f"--workdir={tmp_path}", "--timeout=2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "DEADLINE_EXCEEDED" in errors or "did not find each other" in errors


def test_an_address_without_numbers_is_a_mistake(tmp_path):
    done = launch(f"--workdir={tmp_path}", "--coordinator=127.0.0.1:1")
    assert done.returncode == 1
    assert "needs --num_processes and --process_id too" in done.stderr


def start_two(workdir, *arguments):
    """Starts both processes of a run."""
    address = f"127.0.0.1:{free_port()}"
    return [start_one(address, i, f"--workdir={workdir}", *arguments) for i in (0, 1)]


def start_one(address, process_id, *arguments):
    return start(
        f"--coordinator={address}",
        "--num_processes=2",
        f"--process_id={process_id}",
        "--timeout=20",
        *arguments,
        program="tests/end_to_end/launch_one_of_several.py",
        pictures=False,
        XLA_FLAGS=TWO_DEVICES,
    )


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
