"""One command, started in three ways, finds configs from any folder."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from tpp_jax.commands import command_line, config_files
from tpp_jax.commands.export import FORMATS

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"

# This config prints how the memory of the process is allocated, and ends one that was
# started again before it imports all that a run needs.
CONFIG = """
import os, sys
from tpp_jax.experiment.config import default_config

def get_config():
    asked = os.environ.get("GLIBC_TUNABLES")
    print("GLIBC_TUNABLES is", asked, flush=True)
    if asked == "glibc.malloc.hugetlb=1":
        sys.exit("error: started again")
    return default_config()
"""
SCRIPT = "from tpp_jax.commands.command_line import main\nmain()\n"
ASKED = "GLIBC_TUNABLES is glibc.malloc.hugetlb=1"


def started(*command, **variables):
    """Runs a command; returns what it printed."""
    own = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**own, "PYTHONPATH": str(ROOT), **variables},
        text=True,
        capture_output=True,
    )


@pytest.fixture
def job(tmp_path):
    """Returns a command that fails after the flags are read."""
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "file").touch()
    return [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'file'}"]


def on_request():
    modes = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return modes.exists() and "[madvise]" in modes.read_text()


@pytest.mark.skipif(not on_request(), reason="huge pages are not given on request")
@pytest.mark.parametrize("entry", ["launch.py", "-m tpp_jax", "tpp-jax"])
def test_every_way_to_start_the_command_asks_for_huge_pages(entry, job, tmp_path):
    (tmp_path / "tpp-jax").write_text(SCRIPT)
    entries = {"launch.py": [ROOT / "launch.py"], "tpp-jax": [tmp_path / "tpp-jax"]}
    command = entries.get(entry, entry.split())
    done = started(*command, *job)
    assert (done.returncode, done.stderr) == (1, "error: started again\n")
    read = [line for line in done.stdout.splitlines() if line.startswith("GLIBC")]
    assert read[0] == "GLIBC_TUNABLES is None" and read[-1] == ASKED


def test_what_the_user_has_set_is_respected(job):
    done = started("-m", "tpp_jax", *job, GLIBC_TUNABLES="glibc.malloc.check=0")
    assert set(done.stdout.splitlines()) == {"GLIBC_TUNABLES is glibc.malloc.check=0"}


def test_a_program_that_calls_the_command_is_not_started_again(job):
    program = "import sys; from tpp_jax.commands.command_line import main; "
    program += f"sys.argv = ['launch.py', *{job}]; main()"
    done = started("-c", program)
    assert set(done.stdout.splitlines()) == {"GLIBC_TUNABLES is None"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("configs/digits_resnet8_tpp.py", "digits_resnet8_tpp.py"),
        ("digits_resnet8_tpp.py", "digits_resnet8_tpp.py"),
        ("digits_resnet8_tpp", "digits_resnet8_tpp.py"),
        ("configs/tables/digits.py", "tables/digits.py"),
        ("tables/digits", "tables/digits.py"),
        ("imagenet_resnet50_tpp:2.31", "imagenet_resnet50_tpp.py:2.31"),
    ],
)
def test_a_config_of_the_package_is_found_from_any_folder(
    tmp_path, monkeypatch, name, file
):
    monkeypatch.chdir(tmp_path)
    assert config_files.find(name) == f"{CONFIGS}/{file}"
    given = ["--mode=train", f"--config={name}", "--config.seed=1", "-config", name]
    path = f"{CONFIGS}/{file}"
    want = ["--mode=train", f"--config={path}", "--config.seed=1", "-config", path]
    assert config_files.found(given) == want


def test_a_file_of_the_user_comes_first_and_a_missing_one_keeps_its_name(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits_resnet8_tpp.py").touch()
    for name in ("configs/digits_resnet8_tpp.py", "configs/none.py", "none", "."):
        assert config_files.find(name) == name


def test_a_table_finds_its_configs_and_those_of_the_user(tmp_path):
    own = tmp_path / "configs"
    own.mkdir()
    (own / "mine.py").write_text("from configs import digits_resnet8_tpp\n")
    program = "from tpp_jax.commands import config_files; "
    program += "config_files.make_importable(); import configs.mine, configs.tables"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


HELP = (ROOT / "tpp_jax" / "commands" / "help.txt").read_text("ascii")


@pytest.mark.parametrize("asked", ["--help", "-h", "--mode=sweep --help"])
def test_the_help_is_printed_without_importing_the_package(asked):
    program = "import sys; sys.modules['jax'] = sys.modules['tpp_jax'] = None; "
    program += "from tpp_jax_command import main; "
    program += f"sys.argv = ['tpp-jax', *{asked.split()}]; main()"
    done = started("-c", program)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", HELP)


def test_every_way_to_start_prints_the_same_help():
    assert started(ROOT / "launch.py", "--help").stdout == HELP
    assert started("-m", "tpp_jax", "--help").stdout == HELP
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"tpp-jax": "tpp_jax_command:main"}


def test_the_help_names_every_mode_flag_and_format_and_fits_a_terminal():
    assert max(map(len, HELP.splitlines())) <= 80
    for mode in command_line.MODES:
        assert mode == "train" or f"--mode={mode}" in HELP
        assert mode in HELP.partition("--mode=MODE ")[2]
    for name in ("coordinator", "num_processes", "process_id", "timeout", "debug"):
        assert f"--{name}" in HELP
    for name in FORMATS:
        assert name in HELP.partition("--format=NAMES")[2]


def test_the_examples_of_the_help_name_configs_of_the_package():
    named = set(re.findall(r"--config=(\S+)", HELP)) - {"FILE]", "FILE[:ARGUMENT]"}
    named |= {"cifar10_resnet56_tpp", "imagenet_resnet50_tpp:2.31"}
    assert len(named) > 3
    for name in named - {"my_config.py"}:
        assert pathlib.Path(config_files.find(name).partition(":")[0]).is_file()
