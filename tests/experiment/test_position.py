"""The position of a run is immutable data that is written and read again."""

import dataclasses
import json
import pathlib

import pytest

from tests.end_to_end.runs import assert_same_end, summary_of
from tests.experiment.test_errors import small_config
from tests.experiment.test_reliability import stop_at
from tpp_jax.errors import TPPError
from tpp_jax.experiment import run
from tpp_jax.experiment.position import FORMAT, Position, Result
from tpp_jax.experiment.records.checkpoints import Checkpoints

# As version 1 wrote it, whose format had no number.
FIRST_EDITION = """{
  "config": {"seed": 0, "prune": {"method": "iterative"}}, "phase": "finetune",
  "step": 4, "seconds": 0.25, "best": 61.5,
  "results": [
    {"name": "pretrain", "steps": 44, "seconds": 1.5, "accuracy": 59.5,
     "best_accuracy": 60.5},
    {"name": "slice", "steps": 0, "seconds": 0.5, "accuracy": 20.0,
     "best_accuracy": 20.0, "accuracy_before": 59.5, "accuracy_after": 20.0}
  ],
  "plans": [{"net.0": [1, 3]}], "goal": {"net.0": 1}, "dense_accuracy": 59.5,
  "one_shot": 10.5, "recent": [[4.0, {"loss": 2.25, "accuracy": 0.5}]]
}"""
CUT = {"before": 59.5, "after": 20.0}
POSITION = Position(
    config={"seed": 0, "prune": {"method": "iterative"}},
    phase="finetune",
    step=4,
    seconds=0.25,
    best=61.5,
    results=(
        Result("pretrain", 44, 1.5, 59.5, 60.5),
        Result("slice", 0, 0.5, 20.0, 20.0, CUT),
    ),
    plans=({"net.0": [1, 3]},),
    goal={"net.0": 1},
    dense=59.5,
    one_shot=10.5,
    recent=((4, {"loss": 2.25, "accuracy": 0.5}),),
)


def in_the_first_edition(content):
    """Returns the JSON of a position in version 1."""
    names = {"score": "accuracy", "best": "best_accuracy"}
    names |= {"before": "accuracy_before", "after": "accuracy_after"}
    results = [{names.get(x, x): y for x, y in r.items()} for r in content["results"]]
    first = {x: y for x, y in content.items() if x not in ("version", "dense")}
    best = content["best"] or 0.0
    dense = content["dense"]
    return first | {"results": results, "best": best, "dense_accuracy": dense}


def test_the_first_edition_s_format_is_written_in_these_tests_as_it_was():
    content = json.loads(json.dumps(in_the_first_edition(POSITION.to_json())))
    assert content == json.loads(FIRST_EDITION)


@pytest.mark.parametrize("position", [POSITION, Position({"seed": 1})])
def test_a_position_comes_back_from_its_json(position):
    content = json.loads(json.dumps(position.to_json()))
    assert content["version"] == FORMAT
    assert Position.from_json(content) == position


def test_a_position_of_the_first_edition_is_read():
    assert Position.from_json(json.loads(FIRST_EDITION)) == POSITION


def test_a_later_format_is_refused_in_one_sentence():
    content = POSITION.to_json() | {"version": FORMAT + 1}
    with pytest.raises(TPPError, match=f"have format {FORMAT + 1}, but .* up to"):
        Position.from_json(content)


@pytest.mark.parametrize("name", [x.name for x in dataclasses.fields(Position)])
def test_a_missing_field_is_named(name):
    content = POSITION.to_json()
    del content[name]
    with pytest.raises(TPPError, match=f"have a format .*KeyError: '{name}'"):
        Position.from_json(content)


@pytest.mark.parametrize("odd", [3, None, [3], [[3]]])
@pytest.mark.parametrize("name", ["results", "recent"])
def test_a_misshapen_field_is_refused(name, odd):
    with pytest.raises(TPPError, match="have a format"):
        Position.from_json(POSITION.to_json() | {name: odd})


def test_steps_are_counted_over_the_run():
    assert POSITION.steps_done == 48 and POSITION.steps_before == 44
    done = Result("finetune", 7, 1.0, 62.0, 62.5)
    ended = dataclasses.replace(POSITION, step=7, results=(*POSITION.results, done))
    assert ended.steps_done == 51  # its steps count once
    assert ended.finished("finetune") and not ended.finished("finetune_2")
    assert Position({}).steps_done == 0


def test_a_phase_is_entered_at_its_start_and_continued_where_it_is():
    assert POSITION.within("finetune") is POSITION
    entered = POSITION.within("finetune_2")
    assert (entered.phase, entered.step, entered.best) == ("finetune_2", 0, None)
    assert entered.recent == () and entered.results == POSITION.results


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_the_first_edition_began_is_continued(tmp_path, monkeypatch):
    config = small_config()
    run.train(config, tmp_path / "undisturbed")
    original = Checkpoints.save

    def save(self, step, arrays, meta):
        original(self, step, arrays, in_the_first_edition(meta))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        stop_at(patch, 48)
        with pytest.raises(SystemExit):
            run.train(config, tmp_path / "stopped")
    run.train(config, tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "undisturbed")
    assert summary_of(tmp_path / "stopped")["status"] == "done"


def test_a_run_of_a_later_format_is_left_as_it_is(tmp_path, monkeypatch):
    config, original = small_config(), Checkpoints.save

    def save(self, step, arrays, meta):
        original(self, step, arrays, dict(meta) | {"version": FORMAT + 1})

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        stop_at(patch, 12)
        with pytest.raises(SystemExit):
            run.train(config, tmp_path)
    saved = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(TPPError, match="use another --workdir"):
        run.train(config, tmp_path)
    assert saved == sorted(x.name for x in (tmp_path / "checkpoints").iterdir())


def test_fields_that_an_earlier_version_lacked_have_their_defaults():
    old, new = small_config().to_dict(), small_config().to_dict()
    del old["prune"]["compensate"], old["finetune"]["distillation"]
    run._same_config(old, new, pathlib.Path("w"))
    new["prune"]["compensate"] = True
    with pytest.raises(TPPError, match=r"prune.compensate was False, is True\)"):
        run._same_config(old, new, pathlib.Path("w"))
