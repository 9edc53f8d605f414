"""The whole job through launch.py, as a user runs it, on real handwritten digits."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

import tpp_jax as tpp
from tests.browser import check, look_at, needs_browser
from tests.end_to_end.runs import launch
from tests.end_to_end.starts import ROOT
from tpp_jax.saving import load_model, load_model_info

SHORTER = [
    "--config.pretrain.epochs=10",
    "--config.prune.schedule.granularity=0.01",
    "--config.finetune.epochs=8",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the default config, somewhat shortened: (folder, output)."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    # This run is started as users start it, and not by `launch`.
    done = subprocess.run(
        [sys.executable, "launch.py", f"--workdir={workdir}", *SHORTER],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "COLUMNS": "100"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


@pytest.fixture(scope="module")
def summary(run):
    return json.loads((run[0] / "summary.json").read_text())


def test_summary_holds_every_phase_in_order(summary):
    assert summary["status"] == "done"
    names = [phase["name"] for phase in summary["phases"]]
    assert names == ["pretrain", "regularize", "stabilize", "slice", "finetune"]
    steps = [phase["steps"] for phase in summary["phases"]]
    assert steps == [10 * 22, 500, 201, 0, 8 * 22]
    for phase in summary["phases"]:
        assert 0 <= phase["accuracy"] <= phase["best_accuracy"] <= 100
        assert phase["seconds"] > 0


def test_half_of_the_filters_of_the_pruned_layers_are_gone(summary):
    layers = summary["layers"]
    assert layers["layer1.0.conv1"] == {"kept": 8, "total": 16}
    assert layers["layer3.0.conv1"] == {"kept": 32, "total": 64}
    assert layers["layer3.0.conv2"] == {"kept": 64, "total": 64}
    dense, pruned = summary["dense"], summary["pruned"]
    assert dense["params"] == 75002 and pruned["params"] == 38026
    assert summary["speedup"] == pytest.approx(dense["flops"] / pruned["flops"])
    assert summary["sparsity"] == pytest.approx(1 - pruned["params"] / dense["params"])


def test_the_cut_costs_nothing_after_regularizing_and_much_without(summary):
    cut = next(phase for phase in summary["phases"] if phase["name"] == "slice")
    drop = cut["accuracy_before"] - cut["accuracy_after"]
    one_shot = summary["dense"]["accuracy"] - summary["one_shot"]["accuracy_after"]
    assert abs(drop) < 0.5
    assert one_shot > 5


def test_the_small_network_is_about_as_good_as_the_dense_one(summary):
    # The full config is within 1 point; 360 test images weigh 0.28 points each.
    assert summary["pruned"]["accuracy"] > summary["dense"]["accuracy"] - 2
    assert summary["dense"]["accuracy"] > 97


def test_the_best_network_of_the_fine_tuning_is_kept(run, summary):
    folder = run[0] / "best"
    kept = load_model_info(folder)["metrics"]
    assert kept["accuracy"] == summary["best_accuracy"]
    digits = tpp.data.load("digits")
    model = load_model(folder)
    model.eval()
    logits = model(tpp.data.normalize(digits.test_images, digits.mean, digits.std))
    right = np.mean(np.argmax(logits, -1) == digits.test_labels)
    assert 100 * right == pytest.approx(kept["accuracy"])


def test_tables_pictures_and_logs_are_left(run):
    workdir, output = run
    assert "layer2.0.conv1" in output and "32 → 16" in output
    assert "fine-tuned" in output
    for picture in ("curves.png", "channels.png"):
        assert (workdir / picture).stat().st_size > 10_000
    [events] = (workdir / "tensorboard").glob("events.out.tfevents.*")
    assert b"strength" in events.read_bytes()
    rows = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    strengths = [row["strength"] for row in rows if "strength" in row]
    assert strengths == sorted(strengths) and strengths[-1] == 1.0


@needs_browser
def test_a_browser_shows_the_whole_report(run):
    looks = look_at({"run": (run[0] / "report.html").read_text()})
    check(looks)
    for seen in looks.values():  # curves, channels, groups, Gram matrices
        assert len(seen.pictures) == 4


def test_the_report_says_how_it_was_made(run):
    page = (run[0] / "report.html").read_text()
    for told in ("python launch.py --workdir=", "UTC", tpp.__version__, "32 → 16"):
        assert told in page
    assert "size of the arrays" in page and "No such" not in page


def test_running_again_says_that_it_is_finished(run):
    again = launch(f"--workdir={run[0]}", *SHORTER)
    assert again.returncode == 0
    assert "is finished" in again.stdout


def test_another_config_in_the_same_folder_is_refused(run):
    other = launch(f"--workdir={run[0]}", *SHORTER, "--config.seed=5")
    assert other.returncode == 1
    assert "seed was 0, is 5" in other.stderr


def test_evaluation_needs_nothing_but_the_folder(run, summary, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(run[0], moved)
    result = launch("--mode=evaluate", f"--workdir={moved}")
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["accuracy"] == pytest.approx(summary["pruned"]["accuracy"])
    assert measured["params"] == summary["pruned"]["params"]
    assert measured["flops"] == summary["pruned"]["flops"]
    assert 0 < measured["loss"] < 1


def test_the_exported_network_classifies_as_well_in_another_runtime(run, summary):
    flags = f"--workdir={run[0]}", "--format=stablehlo,onnx,safetensors"
    done = launch("--mode=export", *flags)
    assert done.returncode == 0, done.stderr
    folder = run[0] / "export"
    sizes = {}
    for name in ("dense", "pruned"):
        for suffix in ("stablehlo", "onnx"):
            checked = json.loads((folder / f"{name}.{suffix}.json").read_text())
            assert checked["difference"] < 1e-5 and checked["batch_sizes"] == [16, 1]
            assert checked["params"] == summary[name]["params"]
        sizes[name] = checked["bytes"]
        assert (folder / f"{name}.safetensors").is_file()
    assert sizes["pruned"] < 0.75 * sizes["dense"]
    digits = tpp.data.load("digits")
    images = (digits.test_images / np.float32(255) - digits.mean) / digits.std
    session = onnxruntime.InferenceSession((folder / "pruned.onnx").read_bytes())
    [logits] = session.run(None, {"x": images.astype(np.float32)})
    accuracy = 100 * np.mean(logits.argmax(-1) == digits.test_labels)
    assert accuracy == pytest.approx(summary["pruned"]["accuracy"])


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of Linux and glibc")
def test_memory_is_asked_for_in_huge_pages(tmp_path):
    config = tmp_path / "config.py"
    config.write_text('import os, sys\nsys.exit(os.environ["GLIBC_TUNABLES"])')
    done = launch(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    own = os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert done.stderr == f"{own}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.prune.ratois=x"], "no field 'ratois'; did you mean prune.ratios?"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config.prune.ratios=*xyz*:0.5"], "'*xyz*' matches no layer"),
        (["--mode=evaluate"], "no finished run"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, arguments, message):
    done = launch(f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
