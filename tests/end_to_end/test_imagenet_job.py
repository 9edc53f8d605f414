"""ImageNet's job on a small folder of real photographs: streamed, killed, resumed.

The recipe is a published one, from a config file, on a smaller network: bfloat16, mixup
and cutmix, smoothed labels, warm-up and cosine, averaged weights, a batch in two parts.
"""

import importlib.resources
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.runs import (
    arrays_of,
    assert_same_end,
    history_of,
    kill_after,
    launch,
)

JOB = [
    "--config=configs/imagenet_resnet50_advanced.py:2g",
    "--config.init.torch=",
    "--config.model.name=cifar_resnet8",
    "--config.data.name=folder",
    "--config.data.image_size=24",
    "--config.data.resize=28",
    "--config.data.batch_size=16",
    "--config.accumulate=2",
    "--config.pretrain.epochs=8",
    "--config.pretrain.learning_rate=0:0.05",
    "--config.prune.ratios=*layer*.conv1:0.45",
    "--config.prune.schedule.granularity=0.1",
    "--config.prune.schedule.every=2",
    "--config.prune.schedule.stabilize=20",
    "--config.prune.schedule.zero_out_every=2",
    "--config.finetune.epochs=8",
    "--config.finetune.warmup_epochs=1.0",
    "--config.checkpoint_every=3",
    "--config.eval_every=10",
    "--config.log_every=3",
]
# Where each phase begins, and the end, in steps of the whole run.
STARTS = {"pretrain": 0, "regularize": 24, "stabilize": 44, "finetune": 65, "end": 89}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of small photographs: pieces of scikit-learn's large ones."""
    root = tmp_path_factory.mktemp("photographs")
    folder = importlib.resources.files("sklearn.datasets") / "images"
    for name in ("china", "flower"):
        with (folder / f"{name}.jpg").open("rb") as file:
            image = Image.open(file).convert("RGB")
        for i, (x, y) in enumerate(
            itertools.product(range(0, 540, 60), range(0, 350, 90))
        ):
            split = "train" if i < 28 else "val"
            file = root / split / name / f"{i:02}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.crop((x, y, x + 80, y + 64)).save(file, quality=90)
    return root


@pytest.fixture(scope="module")
def job(photographs):
    return [*JOB, f"--config.data.dir={photographs}"]


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imagenet") / "run"
    done = launch(f"--workdir={workdir}", *job)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow
def test_killed_in_every_phase_the_job_ends_bit_for_bit_like_an_undisturbed_one(
    job, undisturbed, tmp_path
):
    for phase, after in itertools.pairwise(STARTS):
        assert kill_after(tmp_path, STARTS[phase], *job) < STARTS[after]
    done = launch(f"--workdir={tmp_path}", *job)
    assert done.returncode == 0, done.stderr
    assert "Continuing the run" in done.stdout
    assert_same_end(tmp_path, undisturbed)


def test_the_job_prunes_and_its_result_is_measured_again(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    steps = {phase["name"]: phase["steps"] for phase in summary["phases"]}
    starts = list(STARTS.values())
    assert [steps[name] for name in STARTS if name != "end"] == list(np.diff(starts))
    cut = next(phase for phase in summary["phases"] if phase["name"] == "slice")
    assert cut["accuracy_before"] == cut["accuracy_after"]
    assert summary["layers"]["layer3.0.conv1"] == {"kept": 35, "total": 64}
    again = launch("--mode=evaluate", f"--workdir={undisturbed}")
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["accuracy"] == summary["pruned"]["accuracy"]
    # Sixteen test images: every accuracy is a multiple of a sixteenth.
    assert all(p["accuracy"] % 6.25 == 0 for p in summary["phases"])


@pytest.mark.slow
def test_four_devices_do_the_job_like_one(job, undisturbed, tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    done = launch(f"--workdir={tmp_path}", *job, xla_flags=flags)
    assert done.returncode == 0, done.stderr
    ours, theirs = history_of(tmp_path), history_of(undisturbed)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    # bfloat16 rounds sums of other orders differently, which training soon magnifies.
    first = [[r["loss"] for r in rows if r["step"] <= 3] for rows in (ours, theirs)]
    np.testing.assert_allclose(*first, rtol=5e-3)
    ours, theirs = arrays_of(tmp_path), arrays_of(undisturbed)
    shapes = [{n: x.shape for n, x in tree.items()} for tree in (ours, theirs)]
    assert shapes[0] == shapes[1]
