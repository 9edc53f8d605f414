"""Kills a run at random moments and compares its results with an uninterrupted run.

    python -m benchmarks.chaos --kills=50

A small network is trained, pruned and fine-tuned on digits through launch.py. The
process is killed (SIGKILL) at a random moment, mostly during training and sometimes
during its start, and started again until it finishes. Then the next run begins. At the
end of each run, parameters, summary and metrics must be those of an uninterrupted run,
bit for bit.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from tpp_jax.graph.naming import named_leaves

_EVERY = 10  # steps from one checkpoint to the next
_JOB = [
    "--config=configs/digits_resnet8_tpp.py",
    "--config.model.name=mlp7_relu",
    "--config.prune.ratios=*net*:0.5",
    "--config.prune.skip=net.12",
    "--config.pretrain.epochs=12",
    "--config.pretrain.learning_rate=0.02",
    "--config.prune.schedule.granularity=0.02",
    "--config.prune.schedule.stabilize=200",
    "--config.finetune.epochs=12",
    "--config.eval_every=100",
    "--config.log_every=7",
    f"--config.checkpoint_every={_EVERY}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws = np.random.default_rng(options.seed)
    kills: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = pathlib.Path(folder, "undisturbed")
        _start(undisturbed).wait()
        ends = []
        for number in itertools.count():
            workdir = pathlib.Path(folder, str(number))
            while len(kills) < options.kills and (kill := _killed(workdir, draws)):
                kills.append(kill)
                print(len(kills), kill, flush=True)
            _start(workdir).wait()
            ends.append(_end(workdir) == _end(undisturbed))
            if len(kills) == options.kills:
                break
    result = {
        "kills": options.kills,
        "seed": options.seed,
        "during_a_save": sum(k["saving"] for k in kills),
        "by_phase": collections.Counter(kill["phase"] for kill in kills),
        "checkpoint_every": _EVERY,
        "most_logged_steps_lost": max(kill["lost"] for kill in kills),
        "runs": len(ends),
        "same_end": ends.count(True),
    }
    print(json.dumps(result, indent=1))
    print(machine.write("chaos", result))
    sys.exit(not all(ends))


def _start(workdir: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "launch.py", f"--workdir={workdir}", *_JOB],
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.DEVNULL,
    )


def _killed(workdir: pathlib.Path, draws: np.random.Generator) -> dict | None:
    """Starts the run, kills it, and returns where it was; None if it ended before."""
    folder = workdir / "checkpoints"
    process, before = _start(workdir), _logged(workdir)
    if draws.random() < 0.1:
        time.sleep(draws.uniform(0, 6))  # while it starts
    else:
        while _logged(workdir) in (before, []) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draws.uniform(0, 1.6))
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = list(folder.iterdir()) if folder.exists() else []
    names = [d.name for d in found]
    saved = max((int(name) for name in names if name.isdigit()), default=0)
    rows = _logged(workdir)
    step = rows[-1]["step"] if rows else 0
    return {
        "phase": rows[-1]["phase"] if rows else "start",
        "step": step,
        "lost": max(step - saved, 0),
        # An unfinished save that does not stem from an earlier kill.
        "saving": any(
            "tmp" in d.name and time.time() - d.stat().st_mtime < 1 for d in found
        ),
    }


def _logged(workdir: pathlib.Path) -> list[dict]:
    file, rows = workdir / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # half written
            break
    return rows


def _end(workdir: pathlib.Path) -> tuple:
    """Returns all results of a finished run except times, to be compared."""
    model = named_leaves(nnx.state(tpp.load_model(workdir / "model")))
    arrays = {name: np.asarray(array).tobytes() for name, array in model.items()}
    summary = json.loads((workdir / "summary.json").read_text())
    for phase in summary["phases"]:
        del phase["seconds"]
    rows = _logged(workdir)
    for row in rows:
        row.pop("images_per_second", None)
    return arrays, summary, rows


if __name__ == "__main__":
    main()
