"""What is built and installed is complete, and says the same everywhere."""

import io
import itertools
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv

import pytest

import tpp_jax as tpp

ROOT = pathlib.Path(__file__).parents[1]
# What is in a checkout and in no archive.
LEFT_OUT = (".git", ".venv", "runs", "build", "dist", "shared", "*.egg-info", ".*cache")
LEFT_OUT += ("__pycache__", ".hypothesis")


def project() -> dict:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]


def test_requirements_txt_lists_what_the_command_line_needs():
    extras = project()["optional-dependencies"]
    needed = project()["dependencies"] + extras["train"] + extras["plots"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert requirements == sorted(needed, key=str.lower)


def test_every_dependency_has_a_lower_bound():
    extras = project()["optional-dependencies"].values()
    for line in itertools.chain(project()["dependencies"], *extras):
        assert ">=" in line or line.startswith("tpp_jax["), line


def test_the_version_is_written_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", tpp.__version__)
    assert "version" in project()["dynamic"] and "version" not in project()


def run(*command, cwd):
    not_ours = "PYTHON", "XLA_", "GLIBC_"
    own = {k: v for k, v in os.environ.items() if not k.startswith(not_ours)}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=own | {"COLUMNS": "100"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The unpacked source archive, built from a copy of the checkout; and the copy."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("source")
    copy = shutil.copytree(
        ROOT, folder / "copy", ignore=shutil.ignore_patterns(*LEFT_OUT)
    )
    build = "from setuptools import build_meta; build_meta.build_sdist('../built')"
    run(sys.executable, "-c", build, cwd=copy)
    [built] = (folder / "built").iterdir()
    assert built.name == f"tpp_jax-{tpp.__version__}.tar.gz"
    with tarfile.open(built) as file:
        file.extractall(folder, filter="data")
    return folder / f"tpp_jax-{tpp.__version__}", copy


@pytest.fixture(scope="module")
def installed(archive, tmp_path_factory):
    """The ``bin`` of an environment that has the wheel, built from the archive.

    Its dependencies are those of the environment that runs the tests.
    """
    folder = tmp_path_factory.mktemp("installed")
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check"
    offline = "--no-deps", "--no-index", "--no-build-isolation"
    run(*pip, "wheel", *offline, "--wheel-dir", folder, archive[0], cwd=folder)
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "environment")
    python = folder / "environment" / "bin" / "python"
    run(*pip, "--python", python, "install", *offline[:2], wheel, cwd=folder)
    say = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = pathlib.Path(run(python, "-c", say, cwd=folder).strip())
    # As paths, so that an editable installation there is not found.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(ours))
    return python.parent


@pytest.mark.slow
def test_the_source_archive_is_complete(archive):
    unpacked, copy = archive

    def files(folder):
        found = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
        return {p for p in found if "tpp_jax.egg-info" not in p.parts}

    assert len(files(copy)) > 300
    assert files(copy) - files(unpacked) == set()
    assert files(unpacked) - files(copy) == {
        pathlib.Path("PKG-INFO"),
        pathlib.Path("setup.cfg"),
    }
    assert os.access(unpacked / ".ci" / "run", os.X_OK)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "config"),
    [
        (["tpp-jax"], "configs/digits_resnet8_tpp.py"),
        (["python", "-m", "tpp_jax"], "digits_resnet8_tpp"),
        (["tpp-jax"], "imagenet_resnet50_tpp:2.31"),
    ],
)
def test_an_installed_package_shows_what_its_configs_prune(
    installed, tmp_path, command, config
):
    command = [installed / command[0], *command[1:]]
    said = run(*command, "--mode=inspect", f"--config={config}", cwd=tmp_path)
    first, second, *_ = said.splitlines()
    assert "can be pruned" in second
    assert first.split(",")[0] == ("resnet50" if "50" in config else "cifar_resnet8")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_an_installed_package_runs_a_table_from_an_empty_folder(installed, tmp_path):
    where = run(
        installed / "python", "-c", "import tpp_jax; print(tpp_jax)", cwd=tmp_path
    )
    assert str(installed.parent) in where
    said = run(
        *(installed / "tpp-jax", "--mode=sweep", "--config=configs/tables/digits.py"),
        *("--workdir=table", "--config.only=tpp_0.5_0"),
        *("--config.base.pretrain.epochs=1", "--config.base.pretrain.warmup_epochs=0"),
        *("--config.base.finetune.epochs=1", "--config.base.finetune.warmup_epochs=0"),
        "--config.base.prune.schedule.granularity=0.5",
        "--config.base.prune.schedule.stabilize=60",
        cwd=tmp_path,
    )
    assert "The report is table/report.html" in said
    [summary] = tmp_path.glob("table/cells/*/summary.json")
    assert json.loads(summary.read_text())["status"] == "done"


def follow(lines, live):
    out = io.StringIO()
    kept = runpy.run_path(str(ROOT / ".ci" / "install.py"))["follow"](lines, out, live)
    assert kept == lines
    return out.getvalue()


def test_an_installation_says_what_it_does_in_lines_that_fit():
    names = ", ".join(f"package{i}" for i in range(90))
    pip = [
        "Looking in indexes: https://example.org/simple\n",
        "Collecting jax>=0.10 (from tpp_jax==0.1.0)\n",
        "  Downloading jax-0.10.2-py3-none-any.whl.metadata (13 kB)\n",
        "Requirement already satisfied: numpy in ./lib\n",
        "Downloading jaxlib-0.10.2-cp311-cp311-manylinux_2_27_x86_64.whl (85.3 MB)\n",
        f"Installing collected packages: {names}\n",
        f"Successfully installed {names}\n",
    ]
    assert follow(pip, live=False).splitlines() == [
        "  Downloading jaxlib-0.10.2 (85.3 MB)",
        "  Installing 90 packages",
    ]
    shown = follow(pip, live=True)
    assert "\n" not in shown and "Collecting jax>=0.10\r" in shown
    assert all(len(line.removeprefix("\033[K")) < 80 for line in shown.split("\r"))
