"""The whole recipe of ResNet-56 on CIFAR-10, at 0.9 and 0.95, within a time.

    python -m benchmarks.gpu_recipe --workdir=runs/recipe --data=cifar10_1.npz,…

Four rows of the paper's table: TPP, L1, L1 with as many steps as TPP, and the small
network from scratch. The runs of a ratio train as one program (``replicas`` of
``configs/tables/table1.py``), with the images on the device and many steps per
dispatch. After ``--seconds`` the runs are saved and stopped; the same command
continues. What was reached is written in any case to ``results/recipe_*.json``.

Without ``--data`` the images are noise around one image per class: this measures speed,
and the record says so. ``--tiny`` trains a ResNet-8 for a few steps. Needs the extras
``train`` and ``plots``, but none of the packages that read other data sets.
"""

import argparse
import json
import os
import pathlib
import signal
import threading
from typing import Any

import ml_collections
import numpy as np

from benchmarks import machine, packed_images
from tpp_jax.commands import config_files, sweep
from tpp_jax.commands.compilation import keep_compiled_programs
from tpp_jax.errors import TPPError
from tpp_jax.experiment.records.stopping import Stopped

config_files.make_importable()
from configs.tables import table1  # noqa: E402

ROWS = "TPP", "L1", "L1, equal epochs", "Scratch"
RATIOS = "0.9", "0.95"
NOISE = "synthetic: noise around one image per class, not CIFAR-10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--data", default="", help="files of benchmarks.packed_images")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    keep_compiled_programs()
    options.workdir.mkdir(parents=True, exist_ok=True)
    file = options.workdir / "images.npz"
    data = _store(options.data, file, 128 if options.tiny else 50_000)
    table = config(file, options.seeds, options.dtype, tiny=options.tiny)
    # As a signal from outside does: runs end at a checkpoint.
    end = threading.Timer(options.seconds, os.kill, (os.getpid(), signal.SIGTERM))
    end.daemon = True
    end.start()
    try:
        sweep.sweep(table, options.workdir)
        state = "done"
    except Stopped:
        state = "stopped after its time; the same command continues"
    except TPPError as error:  # the other cells are finished
        state = str(error)
    finally:
        end.cancel()
    settings = {"seeds": options.seeds, "dtype": options.dtype, "tiny": options.tiny}
    runs = {path.parent.name: found(path) for path in _histories(options.workdir)}
    result = {"data": data, "state": state, **settings, "runs": runs}
    print(machine.write("recipe", result))
    for name, run in runs.items():
        print(f"{name:<28} {json.dumps(run)}")


def config(
    images: pathlib.Path, seeds: int, dtype: str, *, tiny: bool = False
) -> ml_collections.ConfigDict:
    """Returns the config of the table.

    Args:
      images: File of the images.
      seeds: Number of seeds.
      dtype: Type in which the networks compute.
      tiny: Whether a small network takes few steps.
    """
    table = table1.get_config()
    table.title = "ResNet-56 on CIFAR-10, the whole recipe"
    base = table.base
    base.data.name, base.model.dtype, base.keep_checkpoints = str(images), dtype, 1
    rows, columns = dict(table.rows), dict(table.columns)
    if tiny:
        base.model.name, base.data.batch_size = "cifar_resnet8", 32
        base.log_every, base.eval_every, base.checkpoint_every = 4, 100, 100
        schedule = base.prune.schedule
        schedule.granularity, schedule.every, schedule.stabilize = 0.5, 2, 16
        schedule.zero_out_every = 2
        for phase in (base.pretrain, base.finetune):
            phase.epochs, phase.learning_rate = 1, "0.01"
        rows["Scratch"]["finetune"] = dict(base.pretrain)
    table.rows = tuple((name, rows[name]) for name in ROWS)
    shown = RATIOS[:1] if tiny else RATIOS
    table.columns = tuple((name, columns[name]) for name in shown)
    table.seeds = tuple(range(seeds))
    table.replicas = 0 if tiny else len(ROWS) * seeds
    table.paper = tuple(x for x in table.paper if x[0] in ROWS and x[1] in shown)
    return table


def found(history: pathlib.Path) -> dict[str, Any]:
    """Returns what a run has reached: phases, steps, accuracies, images per second."""
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    result: dict[str, Any] = {"steps": rows[-1]["step"], "phase": rows[-1]["phase"]}
    for name, wanted in (("test_accuracy", np.max), ("images_per_second", np.median)):
        values: dict[str, list[float]] = {}
        for row in rows:
            if name in row:
                values.setdefault(row["phase"], []).append(row[name])
        result[name] = {phase: float(wanted(x)) for phase, x in values.items()}
    summary = history.with_name("summary.json")
    if summary.exists():
        content = json.loads(summary.read_text())
        result |= {k: content[k] for k in content if k.endswith("_accuracy")}
    return result


def _histories(workdir: pathlib.Path) -> list[pathlib.Path]:
    return [x for x in sorted(workdir.glob("*/*/metrics.jsonl")) if x.stat().st_size]


def _store(files: str, file: pathlib.Path, number: int) -> str:
    """Writes the images as runs read them; returns a description."""
    parts = [pathlib.Path(part) for part in files.split(",") if part]
    dataset = packed_images.read(parts) if parts else packed_images.synthetic(number)
    np.savez(
        file,
        train_images=dataset.train_images,
        train_labels=dataset.train_labels,
        test_images=dataset.test_images,
        test_labels=dataset.test_labels,
    )
    return f"{', '.join(part.name for part in parts)}" if parts else NOISE


if __name__ == "__main__":
    main()
