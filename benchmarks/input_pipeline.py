"""Reading, decoding and cropping of images, compared with PyTorch's DataLoader.

    python -m benchmarks.input_pipeline --images=<folder of JPEGs>

There are two jobs, *train* (a random crop to 224×224, flipped) and *test* (resize,
centre crop), from JPEG files to batches of bytes. The peer is torchvision's ImageFolder
and transforms in a DataLoader with one process per core. Our side decodes with one
thread per core, which is the default, and for comparison with one process per core.

Both sides use the same Pillow in the same environment and read the same files, which
are in the system's cache after the first turn. Each turn is a process of its own, which
starts counting after a few batches. The sides alternate in changing order, so that
other load of the machine affects all in the same way. Numbers are medians over the
turns; ratios to the peer, in parentheses, are medians of the ratios of the turns. A
core second is one second of work on one core, summed over all processes of a side:
other load changes it little, but changes images per second much. Memory is the peak of
the sum over all processes of a side, in which shared pages count once (PSS).

Without ``--images``, images of ImageNet's usual size are cut from scikit-learn's two
photographs. The peer needs PyTorch; without it only our side is measured.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.resources
import importlib.util
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

JOBS = ("train", "test")
UNITS = ("images_a_second", "images_a_core_second")
SIDES = {"ours": "threads", "ours, processes": "processes", "peer": "processes"}
BATCH, WARM_UP = 64, 4  # images; batches that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of JPEG files, at any depth")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--batches", type=int, default=24, help="counted batches of a turn"
    )
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", nargs=3, help="one turn: side, job, folder")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_turn(*options.child, options.batches, options.cores)))
        return

    sides = list(SIDES)
    if importlib.util.find_spec("torchvision") is None:
        print("Ours alone: to have the peer too, pip install torch torchvision\n")
        sides.remove("peer")
    with _class_folders(options.images, options.batches) as (folder, sizes):
        print(f"{sizes['files']} files of {sizes['median_kilobytes']:.0f} kB, median")
        load = os.getloadavg()[0]
        found = _in_turn(sides, folder, options)
        load = [round(x, 2) for x in (load, os.getloadavg()[0])]
    if "peer" not in sides:
        return
    from benchmarks import machine
    from benchmarks.peers import torch_input_pipeline

    versions = {name: importlib.metadata.version(name) for name in ("grain", "pillow")}
    record = {
        "repeats": options.repeats,
        "images_a_turn": options.batches * BATCH,
        "cores_used": options.cores,
        "load": load,
        "versions": versions | torch_input_pipeline.versions(),
        "images": {"source": _source(options.images), **sizes},
        "jobs": found,
    }
    print(machine.write("input_pipeline", record))


def _source(images: str | None) -> str:
    return pathlib.Path(images).resolve().name if images else "scikit-learn's two, cut"


def _in_turn(
    sides: list[str], folder: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Returns the medians of each job and side, and the ratios to the peer."""
    turns: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(options.repeats + 1):
        for job in JOBS:
            for side in sides if turn % 2 else reversed(sides):
                done = _measured_apart(side, job, folder, options)
                if turn:  # the first one fills the system's cache
                    turns.setdefault((job, side), []).append(done)
        print(f"turn {turn} of {options.repeats}", file=sys.stderr, flush=True)
    print(f"{'':<24} {'images a second':>17} {'a core second':>17}  MiB, peak")
    found: dict[str, Any] = {job: {} for job in JOBS}
    for (job, side), measured in turns.items():
        row: dict[str, Any] = {"by": SIDES[side]}
        shown = []
        for unit in UNITS:
            counted = [done[unit] for done in measured]
            row[unit] = {"median": float(np.median(counted))}
            ratio = ""
            if side != "peer" and "peer" in sides:
                ratios = np.divide(counted, [done[unit] for done in turns[job, "peer"]])
                low, middle, high = np.percentile(ratios, (25, 50, 75)).tolist()
                row[unit] |= {"ratio": middle, "ratio_quartiles": [low, high]}
                ratio = f"({middle:.2f})"
            shown.append(f"{row[unit]['median']:>10.1f} {ratio:>6}")
        row["peak_mebibytes"] = max(done["peak_mebibytes"] for done in measured)
        found[job][side] = row
        print(f"{job:<6} {side:<17}", *shown, f"{row['peak_mebibytes']:>10.0f}")
    return found


def _measured_apart(
    side: str, job: str, folder: str, options: argparse.Namespace
) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.input_pipeline"]
    command += ["--batches", str(options.batches), "--cores", str(options.cores)]
    command += ["--child", side, job, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _turn(side: str, job: str, folder: str, count: int, cores: int) -> dict[str, float]:
    """Reads and counts batches."""
    with _peak_memory() as peak:
        batches = _theirs(job, folder, cores) if side == "peer" else None
        if batches is None:
            batches = _ours(job, folder, cores, side == "ours, processes")
        sums = 0
        for images in itertools.islice(batches, WARM_UP):
            sums += int(images[0, 0, 0, 0])
        start, used = time.perf_counter(), _core_seconds()
        for images in itertools.islice(batches, count):
            sums += int(images[0, 0, 0, 0])
        seconds, used = time.perf_counter() - start, _core_seconds() - used
        batches.close()
    return {
        "images_a_second": count * BATCH / seconds,
        "images_a_core_second": count * BATCH / used,
        "peak_mebibytes": max(peak) / 1024,
        "sums": sums,
    }


def _ours(job: str, folder: str, cores: int, processes: bool) -> Iterator[np.ndarray]:
    from tpp_jax.data import open_stream

    workers = cores if processes else 0
    stream = open_stream("folder", folder, workers=workers, threads=cores)
    if job == "train":
        batches = stream.train_batches(BATCH, seed=0)
    else:
        batches = stream.test_batches(BATCH)
    with contextlib.closing(batches):
        for images, _ in batches:
            yield images


def _theirs(job: str, folder: str, cores: int) -> Iterator[Any]:
    from benchmarks.peers.torch_input_pipeline import batches

    split = "train" if job == "train" else "val"
    return batches(str(pathlib.Path(folder, split)), job, BATCH, cores)


@contextlib.contextmanager
def _class_folders(
    images: str | None, batches: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Makes class folders of links to the images, repeated to fill a turn."""
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        if images:
            endings = (".jpg", ".jpeg")
            paths = sorted(pathlib.Path(images).resolve().rglob("*"))
            paths = [path for path in paths if path.suffix.lower() in endings]
        else:
            paths = list(_cut(root / "cut"))
        wanted = (batches + 2 * WARM_UP) * BATCH
        for split in ("train", "val"):
            for i, path in zip(range(wanted), itertools.cycle(paths), strict=False):
                link = root / split / f"class{i % 10}" / f"{i:05}.jpg"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
        kilobytes = [path.stat().st_size / 1000 for path in paths]
        median = float(np.median(kilobytes))
        yield name, {"files": len(paths), "median_kilobytes": median}


def _cut(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Writes crops of 500×375 pixels of scikit-learn's photographs."""
    folder.mkdir()
    photographs = importlib.resources.files("sklearn.datasets") / "images"
    for name in ("china", "flower"):
        content = (photographs / f"{name}.jpg").read_bytes()
        image = Image.open(io.BytesIO(content)).convert("RGB")
        for left, top in itertools.product(range(0, 141, 20), (0, 25, 50)):
            path = folder / f"{name}_{left}_{top}.jpg"
            box = (left, top, left + 500, top + 375)
            image.crop(box).save(path, quality=95)  # about 110 kB, as in ImageNet
            yield path


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Samples the memory of this process and its children, in KiB, while open."""
    samples, stop = [0.0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.5):
            samples.append(sum(map(_kibibytes, _family())))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _family() -> list[int]:
    """Returns the process and all its descendants."""
    found = [os.getpid()]
    for process in found:
        for thread in pathlib.Path(f"/proc/{process}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, thread.read_text().split())
    return found


def _core_seconds() -> float:
    """Returns the processor time of this process and its children so far."""
    ticks = 0
    for process in _family():
        with contextlib.suppress(OSError):
            stat = pathlib.Path(f"/proc/{process}/stat").read_text()
            ticks += sum(map(int, stat.rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _kibibytes(process: int) -> float:
    """Returns the memory of a process, with its share of shared pages."""
    with contextlib.suppress(OSError):
        for line in (
            pathlib.Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        ):
            if line.startswith("Pss:"):
                return float(line.split()[1])
    return 0.0


if __name__ == "__main__":
    main()
