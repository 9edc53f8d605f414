"""Running launch.py as a user does, killing it, and reading what it leaves."""

import json
import pathlib
import subprocess
import time

import numpy as np
from flax import nnx

from tests.end_to_end.starts import start
from tpp_jax.graph.naming import named_leaves
from tpp_jax.saving import load_model


def launch(
    *arguments: str, xla_flags: str = "", folder: str | pathlib.Path = ""
) -> subprocess.CompletedProcess:
    """Runs launch.py, on one device unless told; returns what it printed."""
    process = start(*arguments, pictures=False, folder=folder, XLA_FLAGS=xla_flags)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(
        ["launch.py", *arguments], process.returncode, output, errors
    )


def kill_after(
    workdir: pathlib.Path, step: int, *arguments: str, folder: str | pathlib.Path = ""
) -> int:
    """Runs launch.py and kills it once a later step is saved; returns that step."""
    flags = f"--workdir={workdir}", *arguments
    process = start(*flags, pictures=False, folder=folder, XLA_FLAGS="")
    saved = 0
    while process.poll() is None and saved <= step:
        time.sleep(0.01)
        saved = last_saved(workdir)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.communicate()
    return saved


def last_saved(workdir: pathlib.Path) -> int:
    """The step of a run's last checkpoint, 0 if there is none."""
    names = [folder.name for folder in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def assert_same_end(
    workdir: pathlib.Path, other: pathlib.Path, unpruned: nnx.Module | None = None
) -> None:
    """Two runs ended with the same bits: networks, summary, all metrics."""
    for network in ("model", "best"):
        ours = arrays_of(workdir, network, unpruned)
        theirs = arrays_of(other, network, unpruned)
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert summary_of(workdir) == summary_of(other)
    assert history_of(workdir) == history_of(other)


def arrays_of(
    workdir: pathlib.Path, network: str = "model", unpruned: nnx.Module | None = None
) -> dict[str, np.ndarray]:
    """The pruned network's arrays by name, at the end of the run or at its best."""
    state = nnx.state(load_model(workdir / network, unpruned))
    return {name: np.asarray(array) for name, array in named_leaves(state).items()}


def summary_of(workdir: pathlib.Path) -> dict:
    """The summary without times."""
    summary = json.loads((workdir / "summary.json").read_text())
    for phase in summary["phases"]:
        del phase["seconds"]
    return summary


def history_of(workdir: pathlib.Path) -> list[dict]:
    """The metrics without speeds."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if "_per_second" not in k} for r in rows]
