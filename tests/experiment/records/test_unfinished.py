"""A run that was stopped has a report of what it did, and ends as if it had none."""

import pytest

from tests.experiment.test_errors import small_config
from tpp_jax.callbacks import Callback
from tpp_jax.commands.report import write_report
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.records import unfinished
from tpp_jax.experiment.setup import Given

pytestmark = pytest.mark.usefixtures("sketches")


class Stop(Callback):
    """Ends a run within its regularization."""

    def on_step(self, step, phase, metrics):
        del metrics
        if phase == "regularize" and step > 70:
            raise InterruptedError


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "stopped"
    fields = {"pretrain.epochs": 2, "prune.schedule.granularity": 0.05}
    with pytest.raises(InterruptedError):
        run.train(small_config(**fields), workdir, Given(callbacks=(Stop(),)))
    return workdir


def test_the_summary_of_a_stopped_run_has_what_is_known(stopped):
    summary = unfinished.summarize(stopped)
    first, second = summary["phases"]
    assert (first["name"], first["steps"]) == ("pretrain", 44)
    assert second["name"] == "regularize" and 0 < second["steps"] < 40
    assert first["accuracy"] == summary["dense"]["accuracy"] > 20
    assert summary["one_shot"]["accuracy_after"] < first["accuracy"]
    assert summary["status"] == "stopped" and summary["pruned"] is None


def test_the_report_of_a_stopped_run_shows_how_far_it_is(stopped):
    page = write_report(stopped).read_text()
    assert "This run is not finished" in page
    assert "Regularizing" in page and "Fine-tuning" not in page
    assert not (stopped / "summary.json").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 99}', b"\xff"])
def test_a_checkpoint_that_cannot_be_read_is_left_out(stopped, content):
    for file in stopped.glob("checkpoints/*/meta/metadata"):
        file.write_bytes(content)
    summary = unfinished.summarize(stopped)
    assert [phase["name"] for phase in summary["phases"]] == ["pretrain", "regularize"]
    assert summary["dense"]["accuracy"] is None


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(TPPError, match="is not the folder of a run"):
        unfinished.summarize(tmp_path)
