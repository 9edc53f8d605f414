"""--mode=inspect through launch.py, as a user runs it before any training."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from tests.end_to_end.runs import launch
from tests.end_to_end.starts import ROOT
from tpp_jax.experiment.config import default_config


def test_the_groups_of_the_demo_are_shown_and_drawn(tmp_path):
    workdir = tmp_path / "new" / "folder"
    config = "--config=configs/digits_resnet8_tpp.py"
    done = launch("--mode=inspect", config, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "cifar_resnet8, images 8×8×1, 10 classes",
        "7 groups of coupled channels, 4 can be pruned",
    ]
    [block] = [line for line in lines if line.startswith("layer2.0.conv1")]
    assert block.split()[1:5] == ["32", "→", "16", "yes"]
    # What the demo's own summary says after training.
    assert "params 75,002 → 38,026" in lines[-2]
    assert lines[-1] == f"drawn in {workdir / 'groups.svg'}"
    assert "\x1b" not in done.stdout
    drawn = ElementTree.parse(workdir / "groups.svg").getroot()
    assert "layer2.0.conv1  32 → 16" in {text.text for text in drawn.iter()}
    assert [file.name for file in workdir.iterdir()] == ["groups.svg"]


def test_a_folder_is_not_needed_and_a_mistake_is_told_in_one_line():
    done = launch("--mode=inspect", "--config.prune.ratios=*xyz*:0.5")
    assert done.returncode == 1
    assert "'*xyz*' matches no layer" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_mistake():
    inspect = f"{sys.executable} launch.py --mode=inspect"
    command = f"{inspect} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, text=True, capture_output=True
    )
    assert done.stdout == "cifar_resnet8, images 8×8×1, 10 classes\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_a_config_is_not_asked_for_where_a_run_has_one(tmp_path):
    given = "--config.prune.ratios=layer3.0.conv1:0.25"
    config = default_config().to_dict() | {"seed": 5}
    config["model"]["name"], config["data"]["name"] = "lenet5_linear", "digits"
    config["data"]["pad_to"], config["prune"]["ratios"] = 32, "conv1:0.5"
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = launch("--mode=inspect", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lenet5_linear, images 32×32×1, 10 classes\n")
    other = launch("--mode=inspect", f"--workdir={tmp_path}", given)
    said, _, rest = other.stdout.partition("\n")
    assert "is used and not the given one" in said
    assert rest == done.stdout


def test_training_does_need_a_folder():
    done = launch()
    assert done.returncode == 1
    assert done.stderr == "error: --workdir is missing: set a folder for the run\n"
