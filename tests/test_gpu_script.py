"""What runs where a GPU is, in small where there is none."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import gpu_recipe, packed_images
from tpp_jax.commands.sweep import cells_of

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*arguments, **variables):
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env=os.environ
        | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", **variables},
        text=True,
        capture_output=True,
    )


def test_a_stage_writes_its_record_and_is_not_repeated(tmp_path):
    stage = "--tiny", "--stages=e"
    done = run(*stage, OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.iterdir()
    assert file.name == "language_speed_cpu.json"
    speeds = json.loads(file.read_text())["tokens_per_second"]
    ours = [name for name in speeds if name.startswith("ours")]
    assert len(ours) == 6 and min(speeds.values()) > 0
    again = run(*stage, OUT=str(tmp_path))
    assert "language_speed_cpu.json is there" in again.stdout


def test_it_does_not_pretend_to_measure_a_gpu(tmp_path):
    done = run("--stages=e", OUT=str(tmp_path))
    assert done.returncode == 1 and "jax sees no GPU" in done.stderr
    assert not list(tmp_path.iterdir())
    done = run("--tinny")
    assert done.returncode == 1 and "unknown argument --tinny" in done.stderr


def test_packed_images_are_the_same_images(tmp_path):
    dataset = packed_images.synthetic(40, size=8)
    files = [tmp_path / "1.npz", tmp_path / "2.npz"]
    packed_images.write(dataset, files)
    again = packed_images.read(files)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(dataset, name))
    # About half of the images in each; the second has all for testing.
    with np.load(files[0]) as first:
        assert len(first["train_labels"]) == 24 and len(first["test_labels"]) == 0


@pytest.mark.parametrize("tiny", [False, True])
def test_the_recipe_is_the_papers(tmp_path, tiny):
    table = gpu_recipe.config(tmp_path / "images.npz", 2, "float32", tiny=tiny)
    dataset = packed_images.synthetic(64)
    parts = "train_images", "train_labels", "test_images", "test_labels"
    np.savez(tmp_path / "images.npz", **{x: getattr(dataset, x) for x in parts})
    cells = cells_of(table)
    assert len(cells) == 4 * 2 * (1 if tiny else 2)
    tpp = next(cell for cell in cells if cell.name == "tpp_0.9_0").config
    if not tiny:
        assert tpp.model.name == "cifar_resnet56" and tpp.data.batch_size == 128
        assert (tpp.pretrain.epochs, tpp.finetune.epochs) == (200, 120)
        assert table.replicas == 8
