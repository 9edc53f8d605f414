"""What is at the path of a saved model, and what a full disk or a kill leaves there."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tpp_jax as tpp
from tests.end_to_end.starts import ROOT, start
from tests.experiment.records.test_checkpoints import cut_short
from tests.small_net import Net, filled, number_of
from tpp_jax.errors import TPPError
from tpp_jax.storage import folders

OLD = pathlib.Path(__file__).parent / "saved_by_0_1"


# What is at the path


def there(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def a_project(folder):
    (folder / "data").mkdir(parents=True)
    (folder / "train.py").write_text("print('my work')")
    (folder / "data" / "a.txt").write_text("numbers")


def a_model_and_notes(folder):
    tpp.save_model(folder, Net())
    (folder / "notes.txt").write_text("mine")


def a_model_with_a_file_inside(folder):
    tpp.save_model(folder, Net())
    (folder / "arrays" / "notes.txt").write_text("mine")


def folders_of_the_same_names(folder):
    (folder / "arrays").mkdir(parents=True)
    (folder / "meta").mkdir()
    (folder / "arrays" / "a.npy").write_text("mine")
    (folder / "meta" / "metadata").write_text('{"author": "me"}')


def a_model_of_the_first_version_and_notes(folder):
    (folder / "meta").mkdir(parents=True)
    (folder / "arrays").mkdir()
    metadata = (OLD / "mlp" / "meta" / "metadata").read_text()
    (folder / "meta" / "metadata").write_text(metadata)
    (folder / "notes.txt").write_text("mine")


def a_file(folder):
    folder.write_text("my file")


@pytest.mark.parametrize(
    "make",
    [
        a_project,
        a_model_and_notes,
        a_model_with_a_file_inside,
        folders_of_the_same_names,
        a_model_of_the_first_version_and_notes,
        a_file,
    ],
)
def test_what_is_no_saved_model_is_not_replaced(tmp_path, make):
    make(tmp_path / "here")
    before = there(tmp_path)
    with pytest.raises(TPPError, match=r"here is (not replaced|a file)"):
        tpp.save_model(tmp_path / "here", Net())
    assert there(tmp_path) == before


def test_what_a_system_puts_into_a_folder_is_no_matter(tmp_path):
    tpp.save_model(tmp_path / "m", filled(1))
    (tmp_path / "m" / ".DS_Store").write_bytes(b"icons")
    tpp.save_model(tmp_path / "m", filled(2))
    assert number_of(tpp.load_model(tmp_path / "m", Net())) == 2


def test_a_damaged_model_can_be_saved_again(tmp_path):
    tpp.save_model(tmp_path / "m", filled(1))
    cut_short(tmp_path / "m" / "arrays")
    with pytest.raises(TPPError, match="cannot be read"):
        tpp.load_model(tmp_path / "m", Net())
    tpp.save_model(tmp_path / "m", filled(2))
    assert number_of(tpp.load_model(tmp_path / "m", Net())) == 2


def test_an_empty_folder_and_an_old_model_are_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    tpp.save_model(tmp_path / "m", filled(1))
    assert number_of(tpp.load_model(tmp_path / "m", Net())) == 1
    for name, content in there(OLD / "mlp").items():
        file = tmp_path / "old" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    tpp.save_model(tmp_path / "old", filled(2))
    assert number_of(tpp.load_model(tmp_path / "old", Net())) == 2


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    tpp.save_model(tmp_path / "disk" / "m", filled(1))
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "m")
    tpp.save_model(tmp_path / "link", filled(2))
    assert (tmp_path / "link").is_symlink()
    assert number_of(tpp.load_model(tmp_path / "disk" / "m", Net())) == 2
    (tmp_path / "new").symlink_to(tmp_path / "disk" / "none")
    tpp.save_model(tmp_path / "new", filled(3))
    assert number_of(tpp.load_model(tmp_path / "disk" / "none", Net())) == 3
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(TPPError, match="leads in a circle"):
        tpp.save_model(tmp_path / "circle", Net())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TPPError, match=r"could not be saved at .*file/m .File exists"):
        tpp.save_model(tmp_path / "file" / "m", Net())
    with pytest.raises(TPPError, match="could not be saved at /proc/m "):
        tpp.save_model("/proc/m", Net())
    if os.getuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(TPPError, match=r"could not be saved at .*Permission"):
            tpp.save_model(tmp_path / "m", Net())


# A full disk, a kill


# Orbax leaves its own tasks unfinished when it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_full_disk_leaves_the_old_model_and_nothing_else(tmp_path):
    tpp.save_model(tmp_path / "m", filled(1))
    before = there(tmp_path)
    large = Net(9000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            TPPError, match=r"could not be saved .*.File too large.; what"
        ):
            tpp.save_model(tmp_path / "m", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert there(tmp_path) == before
    tpp.save_model(tmp_path / "m", filled(3))
    assert number_of(tpp.load_model(tmp_path / "m", Net())) == 3


class Killed(BaseException):
    """Stands for a kill: nothing that would clean up is done."""


def of_a_process_that_is_gone():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("is_there", [True, False])
def test_killed_at_any_step_of_the_swap_one_of_both_is_there(
    tmp_path, monkeypatch, renames, is_there
):
    if is_there:
        tpp.save_model(tmp_path / "m", filled(1))
    pid, left = of_a_process_that_is_gone(), [renames]

    def rename(self, target, rename=pathlib.Path.rename):
        if self.name in ("m", folders.NEW):
            if not left[0]:
                raise Killed
            left[0] -= 1
        return rename(self, target)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(folders.os, "getpid", lambda: pid)
        patch.setattr(folders.shutil, "rmtree", lambda *args, **more: None)
        patch.setattr(pathlib.Path, "rename", rename)
        tpp.save_model(tmp_path / "m", filled(2))
    if is_there:
        expected = 2 if renames == 2 else 1
        assert number_of(tpp.load_model(tmp_path / "m", Net())) == expected
    elif renames:
        assert number_of(tpp.load_model(tmp_path / "m", Net())) == 2
    assert len(list(tmp_path.iterdir())) >= 1
    tpp.save_model(tmp_path / "m", filled(3))
    assert number_of(tpp.load_model(tmp_path / "m", Net())) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_model_that_was_removed_does_not_come_back(tmp_path, monkeypatch):
    """Not even if what it had replaced was left behind by a kill."""
    tpp.save_model(tmp_path / "m", filled(1))
    remove = folders.shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", lambda *args, **more: None)
        tpp.save_model(tmp_path / "m", filled(2))
    assert len(list(tmp_path.iterdir())) == 2
    remove(tmp_path / "m")
    with pytest.raises(TPPError, match="there is no saved model"):
        tpp.load_model(tmp_path / "m", Net())


def test_the_work_of_a_process_that_is_alive_is_left_alone(tmp_path):
    target = tmp_path / "m"
    with folders.work_folder(target) as first, folders.work_folder(target) as second:
        assert first != second and first.is_dir() and second.is_dir()
    assert not any(tmp_path.iterdir())
    elsewhere = tmp_path / ".m.saving-other-host-17-0123abcd"
    elsewhere.mkdir()
    with folders.work_folder(target):
        assert elsewhere.is_dir()
    os.utime(elsewhere, (0, time.time() - 2 * 86_400))
    with folders.work_folder(target):
        assert not elsewhere.exists()


SCRIPT = """
import sys
import tpp_jax as tpp
from tests.small_net import filled

for number in range(1, 10_000):
    tpp.save_model(sys.argv[1], filled(number, 64))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments_a_whole_model_is_there(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = tmp_path / "models"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for _ in range(4):
        process = start(str(folder / "m"), program=str(tmp_path / "script.py"))
        while process.poll() is None and not process.said():
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 1))
        process.kill()
        said, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        last = int(said.split()[-1])
        assert number_of(tpp.load_model(folder / "m", Net(64))) in (last, last + 1)
    tpp.save_model(folder / "m", filled(5, 64))
    assert [entry.name for entry in folder.iterdir()] == ["m"]


def test_the_manifest_lists_all_files(tmp_path):
    tpp.save_model(tmp_path / "m", Net())
    listed = json.loads((tmp_path / "m" / folders.MANIFEST).read_text())["files"]
    assert {*listed, folders.MANIFEST} == there(tmp_path / "m").keys()


def test_importing_the_library_does_not_import_orbax():
    code = "import sys, tpp_jax; print('orbax' in sys.modules, tpp_jax.save_model)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith("False <function save_model"), done.stderr


def test_what_is_known_of_a_model_is_read_without_its_arrays(tmp_path):
    tpp.save_model(tmp_path / "m", {"w": np.ones(3)}, metrics={"accuracy": 0.5})
    shutil.rmtree(tmp_path / "m" / "arrays")
    assert tpp.load_model_info(tmp_path / "m")["metrics"] == {"accuracy": 0.5}
    with pytest.raises(TPPError, match="cannot be read"):
        tpp.load_model(tmp_path / "m")
    # A changed digit is noticed all the same.
    file = tmp_path / "m" / "meta" / "metadata"
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(TPPError, match="is damaged"):
        tpp.load_model_info(tmp_path / "m")
