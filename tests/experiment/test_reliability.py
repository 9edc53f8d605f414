"""A run that is disturbed loses nothing and reports the problem."""

import errno
import fcntl
import functools
import json
import os
import signal

import pytest

from tests.end_to_end.runs import assert_same_end, history_of
from tests.end_to_end.starts import start
from tests.experiment.records.test_checkpoints import cut_short
from tests.experiment.test_errors import small_config
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.records import stopping
from tpp_jax.experiment.records.stopping import Signals, locked
from tpp_jax.training import feeds

pytestmark = pytest.mark.usefixtures("sketches")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Returns the folder of a run on some number of devices."""

    @functools.cache
    def of(num_devices):
        workdir = tmp_path_factory.mktemp("undisturbed")
        run.train(small_config(num_devices=num_devices), workdir)
        return workdir

    return of


def stop_at(monkeypatch, step):
    """Sends this process a SIGTERM in the given step of the run."""
    original, seen = feeds.Resident.train_data, []

    def train_data(self, *args):
        seen.append(None)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(feeds.Resident, "train_data", train_data)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("step", "num_devices"), [(7, 1), (44, 1), (48, 2), (71, 1), (80, 1)]
)
def test_a_run_that_is_asked_to_end_saves_where_it_is(
    tmp_path, monkeypatch, undisturbed, step, num_devices
):
    config = small_config(num_devices=num_devices)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(SystemExit) as stopped:
            run.train(config, tmp_path)
    assert stopped.value.code == 143
    saved = [d.name for d in (tmp_path / "checkpoints").iterdir() if d.name.isdigit()]
    assert max(map(int, saved)) == step  # not only at a multiple of twenty
    run.train(config, tmp_path)
    assert_same_end(tmp_path, undisturbed(num_devices))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_run_of_eight_devices_goes_on_with_fewer(
    tmp_path, monkeypatch, undisturbed, num_devices
):
    with monkeypatch.context() as patch:
        stop_at(patch, 48)
        with pytest.raises(SystemExit):
            run.train(small_config(num_devices=8), tmp_path)
    run.train(small_config(num_devices=num_devices), tmp_path)
    ours, theirs = history_of(tmp_path), history_of(undisturbed(1))
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        if "loss" in row:  # the same batches, with other rounding
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["config"]["num_devices"] == num_devices


def test_a_second_signal_is_not_waited_for():
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path, monkeypatch, undisturbed, capsys
):
    with monkeypatch.context() as patch:
        stop_at(patch, 48)
        with pytest.raises(SystemExit):
            run.train(small_config(), tmp_path)
    steps = [d for d in (tmp_path / "checkpoints").iterdir() if d.name.isdigit()]
    cut_short(max(steps, key=lambda folder: int(folder.name)))
    run.train(small_config(), tmp_path)
    assert "is damaged" in capsys.readouterr().out
    assert_same_end(tmp_path, undisturbed(1))


def test_two_runs_cannot_be_at_work_in_one_folder(tmp_path):
    other = f"another run .*process {os.getpid()} on"
    with locked(tmp_path), pytest.raises(TPPError, match=other):
        run.train(small_config(), tmp_path)
    with locked(tmp_path):  # it is available again
        pass


@pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO]
)
def test_a_file_system_without_locks_is_said_once_and_used(
    tmp_path, monkeypatch, capsys, number
):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(stopping, "_said", set())
    for _ in range(3):  # like the cells of a sweep
        with locked(tmp_path):
            pass
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"no locks ({os.strerror(number)})" in said
    assert str(tmp_path) in said


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_is_held_is_not_taken_for_none(tmp_path, monkeypatch, number):
    def held(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", held)
    with pytest.raises(TPPError, match="another run is using"), locked(tmp_path):
        pass


def test_what_is_raised_in_a_folder_without_locks_is_handed_on(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(PermissionError, match="mine"), locked(tmp_path):
        raise PermissionError("mine")


def test_rounds_that_remove_nothing_are_said_and_trained(tmp_path, capsys):
    fields = {
        "prune.method": "iterative",
        "prune.rounds": 4,
        "prune.ratios": "net.0:0.02",  # 2 of 100 channels in 4 rounds
        "pretrain.epochs": 1,
        "finetune.epochs": 1,
    }
    summary = run.train(small_config(**fields), tmp_path)
    assert summary["layers"]["net.0"] == {"kept": 98, "total": 100}
    steps = {phase["name"]: phase["steps"] for phase in summary["phases"]}
    names = ["finetune", "finetune_2", "finetune_3", "finetune_4"]
    assert [steps[name] for name in names] == [22 // 4] * 4
    said = capsys.readouterr().out
    assert said.count("removes nothing") == 2
    assert (tmp_path / "report.html").exists()


def test_a_report_layer_that_the_first_round_leaves_whole_is_no_mistake(tmp_path):
    fields = {
        "prune.method": "iterative",
        "prune.rounds": 2,
        "prune.ratios": "net.0:0.5,net.2:0.005",  # one channel, in the second round
        "report_layer": "net.2",
        "pretrain.epochs": 1,
        "finetune.epochs": 1,
    }
    summary = run.train(small_config(**fields), tmp_path)
    assert summary["layers"]["net.2"] == {"kept": 99, "total": 100}


@pytest.mark.usefixtures("no_pictures")
def test_a_full_disk_is_told_and_the_last_checkpoint_survives(tmp_path):
    """A limit on the size of a file simulates a full disk."""
    code = """
import resource, sys
from tests.experiment.test_errors import small_config
from tpp_jax.experiment import run
from tpp_jax.experiment.records.checkpoints import Checkpoints
original = Checkpoints.save
def save(self, step, arrays, meta):
    original(self, step, arrays, meta)
    self._manager.wait_until_finished()
    if meta["phase"] == "finetune":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
Checkpoints.save = save
try:
    run.train(small_config(checkpoint_every=5), sys.argv[1])
except run.TPPError as error:
    sys.exit(f"error: {error}")
"""
    (tmp_path / "script.py").write_text(code)
    workdir = tmp_path / "run"
    process = start(str(workdir), program=str(tmp_path / "script.py"))
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "error: " in errors and "free disk space" in errors
    summary = run.train(small_config(checkpoint_every=5), workdir)
    assert summary["status"] == "done"
