"""The results of a run: the summary as a JSON-ready dict, the network, the report."""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tpp_jax.errors import TPPError
from tpp_jax.experiment import measures
from tpp_jax.experiment.measures import trainability_score
from tpp_jax.experiment.position import Position, Result
from tpp_jax.experiment.records.folders import write
from tpp_jax.experiment.records.history import read_history
from tpp_jax.experiment.setup import Setup
from tpp_jax.experiment.tools import Run, Tools
from tpp_jax.pruning.flops import Count, count
from tpp_jax.pruning.plan import Plan
from tpp_jax.reports import page, plots, tables
from tpp_jax.reports.headline import Headline, headline_of
from tpp_jax.saving import save_model
from tpp_jax.storage import processes

# Keys of every summary. Those of scores have the name of the task's headline in them.
_WRITTEN = {"method", "phases", "dense", "pruned", "one_shot", "speedup", "sparsity"}
_WRITTEN |= {"layers", "config"}
_SCORES = "best_{}", "last_{}", "trainability_{}"


def finish(run: Run, tools: Tools) -> dict[str, Any]:
    """Saves the pruned network, writes summary and plots, prints the tables."""
    setup, workdir, say = tools.setup, tools.workdir, tools.progress.say
    example = setup.groups.inputs
    dense, small = count(setup.model, *example), count(run.model, *example)
    rows, headline = tools.history.read(), tools.task.headline
    summary = summarize_run(setup, run.position, headline, rows, dense, small)
    network = ""
    if run.plans:
        network = f"The pruned network is in {workdir / 'model'}; "
        save_model(
            workdir / "model",
            run.model,
            functools.reduce(Plan.then, run.plans),
            config=run.position.config,
            metrics={key: summary[key] for key in ("pruned", "speedup", "sparsity")},
        )
        say(tables.layer_table(dense, small))
    if processes.is_first():
        write(workdir / "summary.json", json.dumps(summary, indent=2))
        draw(workdir)
    processes.wait_for_all("summary")
    say(tables.result_table(summary))
    say(f"{network}{workdir / 'report.html'} shows the run.")
    return summary


def read_summary(file: pathlib.Path) -> dict[str, Any]:
    """Reads the summary of a finished run.

    Raises:
      TPPError: The file is damaged.
    """
    try:
        summary = json.loads(file.read_bytes())
        name = headline_of(summary).name
        missing = {*_WRITTEN, *(key.format(name) for key in _SCORES)} - summary.keys()
        if missing:
            raise KeyError(f"it has no {min(missing)!r}")
        summary["config"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = error.args[0] if isinstance(error, KeyError) else error
        raise TPPError(
            f"{file} cannot be read ({what}). Remove it, and the same command makes "
            "it again from the last checkpoint"
        ) from error
    return summary


def draw(workdir: pathlib.Path) -> pathlib.Path:
    """Draws the pictures and the page of a finished run; returns the page's path.

    Raises:
      TPPError: The summary or the metrics cannot be read.
    """
    summary = read_summary(workdir / "summary.json")
    rows = read_history(workdir / "metrics.jsonl")
    drawings = plots.of_run(rows, summary, measures.read_grams(workdir / "gram.npz"))
    file = workdir / "report.html"
    write(file, page.of_run(summary, plots.save(drawings, workdir)))
    return file


def summarize_run(
    setup: Setup,
    position: Position,
    headline: Headline,
    history: Sequence[Mapping[str, Any]],
    dense: Count,
    small: Count,
) -> dict[str, Any]:
    """Returns the summary of a run that is done.

    Args:
      setup: Setup of the run.
      position: Position at its end.
      headline: Metric that the scores are of.
      history: Rows of metrics.
      dense: Parameters and FLOPs before.
      small: Parameters and FLOPs after.

    Returns:
      ``phases`` are the stages in which something was trained or cut. ``pruned`` is
      None if nothing was; ``dense.accuracy`` and ``one_shot.accuracy_after`` are if
      there was no trained network to prune. ``best_accuracy`` and ``last_accuracy`` are
      those of the last fine-tuning, ``trainability_accuracy`` its mean at the first
      learning rate. Accuracies are percent; they are called after the headline.
    """
    results, name = position.results, headline.name
    return {
        "status": "done",
        "method": setup.config.prune.method,
        "headline": headline.to_dict(),
        "phases": [_phase(result, name) for result in results],
        "dense": {
            "params": dense.params,
            "flops": dense.flops,
            name: position.dense,
        },
        "pruned": None
        if not position.plans
        else {
            "params": small.params,
            "flops": small.flops,
            name: results[-1].score,
        },
        "one_shot": {f"{name}_after": position.one_shot},
        **_of_fine_tuning(setup, results, history, name),
        "speedup": dense.flops / small.flops,
        "sparsity": 1 - small.params / dense.params,
        "layers": {
            name: {"kept": small.layers[name].channels, "total": layer.channels}
            for name, layer in dense.layers.items()
        },
        "config": position.config,
    }


def _phase(result: Result, name: str) -> dict[str, Any]:
    """Returns what a summary says of a stage."""
    called = {"score": name, "best": f"best_{name}"}
    called |= {"before": f"{name}_before", "after": f"{name}_after"}
    return {called.get(key, key): x for key, x in result.to_json().items()}


def _of_fine_tuning(
    setup: Setup,
    results: Sequence[Result],
    history: Sequence[Mapping[str, Any]],
    name: str,
) -> dict[str, float | None]:
    last, keys = setup.stages[-1], [key.format(name) for key in _SCORES]
    if last.kind != "finetune":
        return dict.fromkeys(keys)
    trainability = trainability_score(
        history,
        name=last.name,
        metric=f"test_{name}",
        start=sum(result.steps for result in results[:-1]),
        phase=setup.phases(setup.plan)["finetune"],
        schedule=setup.config.finetune.schedule,
    )
    scores = results[-1].best, results[-1].score, trainability
    return dict(zip(keys, scores, strict=True))
