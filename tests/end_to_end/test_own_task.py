"""The example project outside the package, and text, run like a user's."""

import json
import pathlib
import shutil

import pytest
from flax import nnx

from tests.end_to_end.runs import assert_same_end, kill_after, launch
from tests.end_to_end.starts import ROOT
from tpp_jax.models import small_decoder

EXAMPLE = ROOT / "examples" / "own_task"
SHORT = [
    "--config=config.py",
    "--config.task.kwargs={'width': 4}",
    "--config.data.batch_size=48",
    "--config.pretrain.epochs=1",
    "--config.finetune.epochs=1",
    "--config.prune.schedule.every=1",
    "--config.prune.schedule.granularity=10.0",
    "--config.prune.schedule.stabilize=24",
    "--config.checkpoint_every=5",
    "--config.log_every=5",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Copy of the example with a finished run in it."""
    folder = tmp_path_factory.mktemp("project") / "own_task"
    shutil.copytree(EXAMPLE, folder)
    done = launch("--workdir=undisturbed", *SHORT, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_the_run_prunes_and_reports_in_the_task_s_own_words(project):
    summary = summary_of(project / "undisturbed")
    assert summary["headline"] == {"name": "rmse", "unit": "", "better": "lower"}
    cut = next(phase for phase in summary["phases"] if phase["name"] == "slice")
    assert cut["rmse_after"] == pytest.approx(cut["rmse_before"], rel=1e-4)
    assert summary["layers"]["stem"] == {"kept": 2, "total": 4}
    page = (project / "undisturbed" / "report.html").read_text()
    assert "<title>Denoise" in page and "accuracy" not in page


def test_a_killed_run_ends_bit_for_bit_like_an_undisturbed_one(
    project, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(project)
    import denoise

    kill_after(tmp_path, 30, *SHORT, folder=project)
    done = launch(f"--workdir={tmp_path}", *SHORT, folder=project)
    assert done.returncode == 0, done.stderr
    assert "Continuing the run" in done.stdout
    unpruned = nnx.eval_shape(lambda: denoise.UNet(nnx.Rngs(0), 4))
    assert_same_end(tmp_path, project / "undisturbed", unpruned)


def test_a_finished_run_is_measured_again_with_its_config_only(project):
    flags = "--mode=evaluate", "--workdir=undisturbed"
    done = launch(*flags, *SHORT, folder=project)
    assert done.returncode == 0, done.stderr
    found, summary = json.loads(done.stdout), summary_of(project / "undisturbed")
    assert found["rmse"] == pytest.approx(summary["last_rmse"], rel=1e-5)
    assert found["params"] == summary["pruned"]["params"]
    for mode in ("evaluate", "profile", "inspect"):
        done = launch(f"--mode={mode}", "--workdir=undisturbed", folder=project)
        assert done.returncode == 1
        assert "uses code of its own, denoise:Denoise: pass its config" in done.stderr


def test_a_sweep_of_the_user_s_task(project):
    table = """
from config import get_config as base
from tpp_jax.commands.sweep import default_table


def get_config():
    table = default_table()
    table.title, table.base, table.seeds = "patches", base(), (0,)
    table.base.task.kwargs.width = 4
    table.base.pretrain.epochs = table.base.finetune.epochs = 1
    table.metrics = ("last_rmse", "cut_rmse", "dense_rmse")
    table.rows = (("one-shot", {"prune": {"method": "oneshot"}}),)
    ratios = [{"prune": {"ratios": f"stem:{x}"}} for x in (0.5, 0.25)]
    table.columns = tuple(zip(("half", "quarter"), ratios))
    return table
"""
    (project / "table.py").write_text(table)
    flags = "--mode=sweep", "--workdir=sweep", "--config=table.py"
    done = launch(*flags, folder=project)
    assert done.returncode == 0, done.stderr
    assert len(list((project / "sweep" / "dense").iterdir())) == 1
    shown = (project / "sweep" / "table.md").read_text()
    assert "Test rmse at the end" in shown
    half = summary_of(project / "sweep" / "cells" / "one-shot_half_0")
    assert f"{half['last_rmse']:.4f}" in shown


TEXT = [
    "--config=configs/chars_transformer_tpp.py",
    "--config.model.kwargs={'width': 16, 'depth': 1, 'heads': 2, 'hidden': 24}",
    "--config.data.length=16",
    "--config.prune.schedule.every=1",
    "--config.prune.schedule.granularity=5.0",
    "--config.prune.schedule.stabilize=30",
    "--config.checkpoint_every=20",
]


def test_text_is_learned_killed_and_resumed(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i, page in enumerate(sorted(pathlib.Path(ROOT, "docs").glob("*.md"))[:6]):
        (text / f"{i}.md").write_text(page.read_text()[:4000])
    flags = [*TEXT, f"--config.data.name={text}", "--config.data.held_out=0.2"]
    workdirs = tmp_path / "undisturbed", tmp_path / "killed"
    done = launch(f"--workdir={workdirs[0]}", *flags)
    assert done.returncode == 0, done.stderr
    summary = summary_of(workdirs[0])
    cut = next(phase for phase in summary["phases"] if phase["name"] == "slice")
    assert cut["perplexity_after"] == pytest.approx(cut["perplexity_before"], rel=1e-4)
    assert summary["layers"]["layers.0.mlp.gate_proj"] == {"kept": 12, "total": 24}
    kill_after(workdirs[1], 80, *flags)
    done = launch(f"--workdir={workdirs[1]}", *flags)
    assert done.returncode == 0, done.stderr
    sizes = {"width": 16, "depth": 1, "heads": 2, "hidden": 24}
    unpruned = nnx.eval_shape(lambda: small_decoder(nnx.Rngs(0), **sizes))
    assert_same_end(*workdirs, unpruned)
    done = launch("--mode=evaluate", f"--workdir={workdirs[0]}")
    found = json.loads(done.stdout)
    assert found["perplexity"] == pytest.approx(summary["last_perplexity"], rel=1e-5)
