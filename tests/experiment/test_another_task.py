"""A run of another task than classification: the same stages, records and report."""

import json

import jax.numpy as jnp
import pytest
from flax import nnx

from tests.experiment.test_errors import small_config
from tests.training.test_task import Regression
from tpp_jax.experiment import run, setup
from tpp_jax.saving import load_model_info


class Stream(nnx.Module):
    """A residual stream that root mean squares read; their epsilon is large."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 16, rngs=rngs)
        self.norm1 = nnx.RMSNorm(16, epsilon=0.1, rngs=rngs)
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)
        self.norm2 = nnx.RMSNorm(16, epsilon=0.1, rngs=rngs)
        self.last = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, place, time):
        x = self.first(jnp.concatenate([place, time[:, None]], axis=1))
        x = x + self.down(nnx.gelu(self.up(self.norm1(x))))
        return self.last(self.norm2(x))[:, 0]


class Streams(Regression):
    """The same task for another model."""

    def model(self, rngs):
        return Stream(rngs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Summary, metrics and folder of a run whose task is a regression."""
    workdir = tmp_path_factory.mktemp("runs") / "waves"
    fields = {"prune.ratios": "*:0.5", "prune.skip": "", "finetune.epochs": 2}
    config = small_config(**fields, eval_every=5)
    with pytest.MonkeyPatch.context() as patch:
        tasks = {"": Streams()}
        patch.setattr(setup, "make_tasks", lambda *_: tasks)
        patch.setattr(
            setup, "initial_model", lambda *_: tasks[""].model(nnx.Rngs(config.seed))
        )
        summary = run.train(config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in lines], workdir


def test_a_summary_names_the_task_s_own_metric(finished):
    summary, _, workdir = finished
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary["headline"] == {"name": "rms", "unit": "m", "better": "lower"}
    assert summary["dense"]["rms"] > 0 and summary["pruned"]["rms"] > 0
    assert summary["one_shot"]["rms_after"] > summary["dense"]["rms"]
    cut = next(phase for phase in summary["phases"] if phase["name"] == "slice")
    # The norms over the stream are rescaled at the cut.
    assert cut["rms_after"] == pytest.approx(cut["rms_before"], rel=1e-5)
    assert "accuracy" not in json.dumps({**summary, "config": None})


def test_the_best_is_the_lowest_where_lower_is_better(finished):
    summary, rows, workdir = finished
    tested = [
        x["test_rms"] for x in rows if x["phase"] == "finetune" and "test_rms" in x
    ]
    assert len(tested) > 1
    assert summary["best_rms"] == min(tested) and summary["last_rms"] == tested[-1]
    assert load_model_info(workdir / "best")["metrics"]["rms"] == min(tested)


def test_metrics_and_report_speak_of_the_task(finished):
    _, rows, workdir = finished
    training = next(row for row in rows if "loss" in row)
    assert {"loss", "bias", "waves_per_second", "learning_rate"} <= training.keys()
    assert {"test_square", "test_bias", "test_rms"} <= {x for row in rows for x in row}
    page = (workdir / "report.html").read_text()
    assert "test rms" in page and "test accuracy" not in page
