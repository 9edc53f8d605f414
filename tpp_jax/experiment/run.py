"""A run from one config: dense training, pruning, fine-tuning.

A checkpoint contains the position of a run (phase, step, plans, config, results) and
all arrays, so that the same command continues a run that was killed.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from tpp_jax import data
from tpp_jax.callbacks import Callback
from tpp_jax.errors import TPPError
from tpp_jax.experiment import choosing, lockstep, loop, measures
from tpp_jax.experiment.config import default_config, differences
from tpp_jax.experiment.fields import flat
from tpp_jax.experiment.methods import Stage
from tpp_jax.experiment.own import callbacks_of
from tpp_jax.experiment.position import Position
from tpp_jax.experiment.program import Take, alone
from tpp_jax.experiment.records import folders, origin
from tpp_jax.experiment.records.checkpoints import Checkpoints
from tpp_jax.experiment.records.history import History
from tpp_jax.experiment.records.progress import Progress
from tpp_jax.experiment.records.stopping import Signals, Stopped, locked
from tpp_jax.experiment.records.summary import draw, finish, read_summary
from tpp_jax.experiment.records.terminal import say
from tpp_jax.experiment.setup import Given, Setup, make_setup
from tpp_jax.experiment.tasks import Load
from tpp_jax.experiment.tools import Run, Tools
from tpp_jax.pruning.cutting import prune
from tpp_jax.pruning.plan import Plan
from tpp_jax.saving import with_arrays
from tpp_jax.storage import processes
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.state import unprefixed


def train(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    given: Given = Given(),  # noqa: B008 (it cannot be changed)
) -> dict:
    """Runs all remaining stages of a run and returns its summary.

    Args:
      config: Config from a file in configs/; docs/config.md lists all fields.
      workdir: Folder of the run, which is created if it is missing. A run in it is
        continued.
      given: Objects of the caller's own.

    Returns:
      The content of ``workdir/summary.json``.

    Raises:
      TPPError: The config, the data or a checkpoint is unusable, which is found before
        any training, or the loss is no longer finite.
      Stopped: SIGTERM or SIGINT (Ctrl-C) arrived; everything is saved.
    """
    with Signals() as signals:
        return _complete(alone, config, pathlib.Path(workdir), signals, given=given)


def train_together(
    configs: Iterable[ml_collections.ConfigDict],
    workdirs: Iterable[str | pathlib.Path],
    load: Load = data.load,
) -> list[dict | BaseException]:
    """Completes several runs, with equal steps of them in one program.

    Runs share the steps of a phase if these differ only in seeds and in plans of equal
    counts, whatever else the runs do. The result of each equals that of a single run up
    to rounding. Runs that are resumed at different steps are joined too. Only the
    progress of the first run is shown.

    Args:
      configs: Configs of the runs.
      workdirs: Folders of the runs.
      load: Function that loads data into memory, which may cache them for all runs.

    Returns:
      The summary of each run, or the exception that ended it, see :func:`train`.

    Raises:
      Stopped: SIGTERM or SIGINT (Ctrl-C) arrived; all runs are saved.
    """
    pairs = zip(configs, workdirs, strict=True)
    with Signals() as signals:
        ends = lockstep.drive(
            [
                functools.partial(
                    _complete,
                    config=config,
                    workdir=pathlib.Path(workdir),
                    signals=signals,
                    load=load,
                    hidden=i > 0,
                )
                for i, (config, workdir) in enumerate(pairs)
            ]
        )
    for end in ends:
        if isinstance(end, Stopped):
            raise end
    return ends


def _complete(
    take: Take,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    signals: Signals,
    load: Load = data.load,
    hidden: bool = False,
    given: Given = Given(),  # noqa: B008 (it cannot be changed)
) -> dict[str, Any]:
    """Completes a run whose training steps are run by ``take``."""
    folders.check_layout(workdir)
    if (workdir / "summary.json").exists():
        return _finished(config, workdir, hidden)
    setup = make_setup(config, load, given.task)
    own = callbacks_of(setup.config) if processes.is_first() else ()
    given = dataclasses.replace(given, callbacks=(*given.callbacks, *own))
    folders.make(workdir)
    first = processes.is_first()
    with (
        folders.errors_explained(workdir),
        locked(workdir) if first else contextlib.nullcontext(),
        Progress(workdir / "tensorboard", quiet=not first, hidden=hidden) as progress,
        _opened(setup, workdir, progress, signals, take, given) as (run, tools),
    ):
        if first:
            folders.write_config(workdir, config.to_dict())
            origin.record(workdir, tools.task.headline)
        processes.check_shared(workdir, config.to_json())
        with processes.explained_losses():
            for stage in setup.stages:
                before, run = run, _perform(run, stage, tools)
                _report(before, run, tools.callbacks)
            return finish(run, tools)


def _report(before: Run, after: Run, callbacks: Sequence[Callback]) -> None:
    """Calls back at the end of a stage that has a result."""
    for result in after.position.results[len(before.position.results) :]:
        for callback in callbacks:
            callback.on_phase(result.name, after.model, result.to_json())


def _perform(run: Run, stage: Stage, tools: Tools) -> Run:
    """Performs the rest of a stage."""
    match stage.kind:
        case "dense":
            return choosing.keep_dense(run, stage, tools)
        case "choose":
            return choosing.choose(run, stage, tools)
        case "refit":
            return choosing.refit(run, stage, tools)
        case "slice":
            return choosing.cut(run, stage, tools)
        case _:
            return loop.train(run, stage, tools)


def _finished(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, hidden: bool
) -> dict:
    """Returns the summary of a finished run, whose report is drawn if missing."""
    file = workdir / "summary.json"
    summary = read_summary(file)
    _same_config(summary["config"], config.to_dict(), workdir)
    if not hidden:
        say(f"The run in {workdir} is finished; see {file}.")
    if processes.is_first() and not (workdir / "report.html").exists():
        with folders.errors_explained(workdir):
            page = draw(workdir)
        if not hidden:
            say(f"Its report was missing and is drawn again: {page}")
    return summary


@contextlib.contextmanager
def _opened(
    setup: Setup,
    workdir: pathlib.Path,
    progress: Progress,
    signals: Signals,
    take: Take,
    given: Given,
) -> Iterator[tuple[Run, Tools]]:
    """Yields a run at the position of its last checkpoint, and its tools.

    At the end the last checkpoint is completed, unless another process is lost, without
    which that is impossible.
    """
    config, devices = setup.config, setup.devices
    keep = config.keep_checkpoints if given.checkpoints else 0
    checkpoints = Checkpoints(workdir / "checkpoints", keep)
    together = True
    try:
        run = _resumed(setup, workdir, checkpoints, progress)
        task = setup.task()
        feed = task.feed(devices, config.accumulate)
        evaluate = Evaluator(task, feed, setup.step_config(), devices, config.parallel)
        meter = None
        if config.jacobian_every:
            probes = task.probes(config.jacobian_images)
            meter = measures.JacobianMeter(*task.inputs(probes))
            meter.check(run.model)
        tools = Tools(
            setup=setup,
            task=task,
            workdir=workdir,
            progress=progress,
            history=_history(workdir / "metrics.jsonl", run.position, progress),
            checkpoints=checkpoints,
            feed=feed,
            evaluate=evaluate,
            jacobian=meter,
            signals=signals,
            take=take,
            callbacks=given.callbacks if processes.is_first() else (),
            kept=given.checkpoints,
        )
        with contextlib.closing(feed):
            yield run, tools
    except processes.LostProcess:
        together = False
        raise
    finally:
        if together:
            checkpoints.close()


def _history(file: pathlib.Path, position: Position, progress: Progress) -> History:
    """Opens the metrics of a run and reports invalid lines in the file."""
    quiet = not processes.is_first()
    history = History(file, position.steps_done, quiet=quiet)
    if odd := history.odd:
        progress.say(
            f"{file} has lines that are not rows of metrics "
            f"({', '.join(map(str, odd[:5]))}{'…' if odd[5:] else ''}); they are "
            "kept in the file and ignored."
        )
    return history


def _resumed(
    setup: Setup, workdir: pathlib.Path, checkpoints: Checkpoints, progress: Progress
) -> Run:
    """Returns the run at the position of its last checkpoint, or at its start."""
    config = dataclasses.asdict(setup.config)
    run = Run(Position(config), setup.model, (), setup.phases(setup.plan), {})
    if (found := checkpoints.restore()) is None:
        return run
    arrays, content, damaged = found
    for line in damaged:
        progress.say(line)
    position = Position.from_json(content)
    _same_config(position.config, config, workdir)
    model, plans = setup.model, []
    for i, kept in enumerate(position.plans, start=1):
        plans.append(Plan.from_dict(kept, setup.groups_of(model, plans)))
        if position.finished(Stage("slice", i).name):
            model = prune(model, plans[-1])
    progress.say(
        f"Continuing the run in {workdir} from {position.phase}, step {position.step}."
    )
    taught = unprefixed(arrays, "teacher.")
    return Run(
        dataclasses.replace(position, config=config),
        with_arrays(model, unprefixed(arrays, "model.")),
        tuple(plans),
        setup.phases(plans[-1]) if plans else run.phases,
        arrays,
        teacher=with_arrays(setup.model, taught) if taught else None,
    )


_MAY_CHANGE = ("num_devices", "parallel", "keep_checkpoints", "data.dir")
"""Fields of the config that may change when a run is resumed."""


def _same_config(
    old: Mapping[str, Any], new: Mapping[str, Any], workdir: pathlib.Path
) -> None:
    # An earlier version had fewer fields, and did what the others do by default.
    found = differences(flat(default_config()) | flat(old), flat(new))
    if changed := [line for line in found if line.split()[0] not in _MAY_CHANGE]:
        raise TPPError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:5])}). Use "
            "another --workdir, or the same config to continue it"
        )
