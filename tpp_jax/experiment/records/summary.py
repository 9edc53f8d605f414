"""The results of a run: the summary as a JSON-ready dict, the network, the report."""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tpp_jax.errors import TPPError
from tpp_jax.experiment import measures
from tpp_jax.experiment.measures import trainability_accuracy
from tpp_jax.experiment.position import Position, Result
from tpp_jax.experiment.records.folders import write
from tpp_jax.experiment.records.history import read_history
from tpp_jax.experiment.setup import Setup
from tpp_jax.experiment.tools import Run, Tools
from tpp_jax.pruning.flops import Count, count
from tpp_jax.pruning.plan import Plan
from tpp_jax.reports import page, plots, tables
from tpp_jax.saving import save_model
from tpp_jax.storage import processes

# Keys of a summary.
_WRITTEN = {"method", "phases", "dense", "pruned", "one_shot", "best_accuracy"}
_WRITTEN |= {"last_accuracy", "trainability_accuracy", "speedup", "sparsity"}
_WRITTEN |= {"layers", "config"}


def finish(run: Run, tools: Tools) -> dict[str, Any]:
    """Saves the pruned network, writes summary and plots, prints the tables."""
    setup, workdir, say = tools.setup, tools.workdir, tools.progress.say
    example = setup.groups.inputs
    dense, small = count(setup.model, *example), count(run.model, *example)
    summary = summarize_run(setup, run.position, tools.history.read(), dense, small)
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
        missing = sorted(_WRITTEN - summary.keys())
        if missing:
            raise KeyError(f"it has no {missing[0]!r}")
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
    history: Sequence[Mapping[str, Any]],
    dense: Count,
    small: Count,
) -> dict[str, Any]:
    """Returns the summary of a run that is done.

    Args:
      setup: Setup of the run.
      position: Position at its end.
      history: Rows of metrics.
      dense: Parameters and FLOPs before.
      small: Parameters and FLOPs after.

    Returns:
      ``phases`` are the stages in which something was trained or cut. ``pruned`` is
      None if nothing was; ``dense.accuracy`` and ``one_shot.accuracy_after`` are if
      there was no trained network to prune. ``best_accuracy`` and ``last_accuracy`` are
      those of the last fine-tuning, ``trainability_accuracy`` its mean at the first
      learning rate. All accuracies are percent.
    """
    results = position.results
    return {
        "status": "done",
        "method": setup.config.prune.method,
        "phases": [result.to_json() for result in results],
        "dense": {
            "params": dense.params,
            "flops": dense.flops,
            "accuracy": position.dense_accuracy,
        },
        "pruned": None
        if not position.plans
        else {
            "params": small.params,
            "flops": small.flops,
            "accuracy": results[-1].accuracy,
        },
        "one_shot": {"accuracy_after": position.one_shot},
        **_of_fine_tuning(setup, results, history),
        "speedup": dense.flops / small.flops,
        "sparsity": 1 - small.params / dense.params,
        "layers": {
            name: {"kept": small.layers[name].channels, "total": layer.channels}
            for name, layer in dense.layers.items()
        },
        "config": position.config,
    }


def _of_fine_tuning(
    setup: Setup,
    results: Sequence[Result],
    history: Sequence[Mapping[str, Any]],
) -> dict[str, float | None]:
    last = setup.stages[-1]
    if last.kind != "finetune":
        names = "best_accuracy", "last_accuracy", "trainability_accuracy"
        return dict.fromkeys(names)
    return {
        "best_accuracy": results[-1].best_accuracy,
        "last_accuracy": results[-1].accuracy,
        "trainability_accuracy": trainability_accuracy(
            history,
            name=last.name,
            start=sum(result.steps for result in results[:-1]),
            phase=setup.phases(setup.plan)["finetune"],
            schedule=setup.config.finetune.schedule,
        ),
    }
