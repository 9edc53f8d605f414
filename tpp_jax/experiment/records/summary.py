"""The results of a run: the summary, the pruned network and the report."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tpp_jax.errors import TPPError
from tpp_jax.experiment import measures
from tpp_jax.experiment.measures import trainability_score
from tpp_jax.experiment.position import Position, Result
from tpp_jax.experiment.records import origin, report_files, unfinished
from tpp_jax.experiment.records.folders import write
from tpp_jax.experiment.setup import Setup
from tpp_jax.experiment.tools import Run, Tools
from tpp_jax.headline import Headline, headline_of
from tpp_jax.pruning.flops import Count, count
from tpp_jax.pruning.plan import Plan
from tpp_jax.reports import page, plots, tables
from tpp_jax.saving import save_model
from tpp_jax.storage import processes

# Keys of every summary. The name of the task's headline is part of the scores' keys.
_WRITTEN = {"method", "phases", "dense", "pruned", "one_shot", "speedup", "sparsity"}
_WRITTEN |= {"layers", "config"}
_SCORES = "best_{}", "last_{}", "trainability_{}"


def finish(run: Run, tools: Tools) -> dict[str, Any]:
    """Saves the pruned network, writes summary and report, prints the tables."""
    setup, workdir, say = tools.setup, tools.workdir, tools.progress.say
    example = setup.groups.inputs
    dense, small = count(setup.model, *example), count(run.model, *example)
    rows, headline = tools.history.read(), tools.task.headline
    summary = summarize_run(setup, run.position, headline, rows, dense, small)
    summary["dense"]["bytes"] = origin.bytes_of(setup.model)
    if summary["pruned"] is not None:
        summary["pruned"]["bytes"] = origin.bytes_of(run.model)
    if run.plans:
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
        origin.record(workdir, headline)
        if run.plans:
            report_files.draw_groups(workdir, setup.groups, run.plans)
        draw(workdir)
    processes.wait_for_all("summary")
    say(tables.result_table(summary))
    if tools.kept:
        say(f"Report of the run: {workdir / 'report.html'}")
        if run.plans:
            say(f"Pruned network:    {workdir / 'model'}")
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
            f"{file} cannot be read ({what}). Remove it, and the same command writes "
            "it again from the last checkpoint"
        ) from error
    return summary


def draw(workdir: pathlib.Path) -> pathlib.Path:
    """Draws the plots and the report of a run and returns the report's path.

    The report of a run that is not finished shows how far it is.

    Raises:
      TPPError: The summary or the metrics cannot be read.
    """
    if (workdir / "summary.json").exists():
        summary = read_summary(workdir / "summary.json")
    else:
        summary = unfinished.summarize(workdir)
    files = report_files.read(workdir)
    grams = measures.read_grams(workdir / "gram.npz")
    drawings = plots.of_run(files.history, summary, grams, files.profile)
    file = workdir / "report.html"
    write(file, page.of_run(summary, plots.save(drawings, workdir), files))
    return file


def draw_again(workdir: pathlib.Path) -> None:
    """Draws the report of a finished run with what another mode has added.

    Nothing is drawn where there is no finished run, or where drawing is impossible,
    since that mode has written its result.
    """
    if not (workdir / "summary.json").exists():
        return
    with contextlib.suppress(TPPError, OSError):
        draw(workdir)


def summarize_run(
    setup: Setup,
    position: Position,
    headline: Headline,
    history: Sequence[Mapping[str, Any]],
    dense: Count,
    small: Count,
) -> dict[str, Any]:
    """Returns the summary of a finished run, a JSON-ready dict.

    Args:
      setup: Setup of the run.
      position: Position at the end.
      headline: Metric of the scores.
      history: Rows of metrics.
      dense: Parameters and FLOPs before the cut.
      small: Parameters and FLOPs after the cut.

    Returns:
      ``phases`` are the stages that trained or cut. ``pruned`` is None if nothing was
      cut; ``dense.accuracy`` and ``one_shot.accuracy_after`` are None if there was no
      trained dense network. ``best_accuracy`` and ``last_accuracy`` belong to the last
      fine-tuning; ``trainability_accuracy`` is its mean at the first learning rate. The
      keys of scores contain the name of the headline, here ``accuracy`` in percent.
    """
    results, name = position.results, headline.name
    return {
        "status": "done",
        "method": setup.config.prune.method,
        "headline": headline.to_dict(),
        "phases": [unfinished.renamed(result, name) for result in results],
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
