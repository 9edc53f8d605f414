"""A whole run, from one config: dense training, pruning by some method, fine-tuning.

The checkpoint is the run: it holds the position (phase and step), the plan, the config
and all state, so that the same command continues where a killed one was.
"""

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.experiment import choosing, lockstep, measures
from tpp_jax.experiment.config import differences
from tpp_jax.experiment.methods import Stage
from tpp_jax.experiment.phases import Phase, penalties_of
from tpp_jax.experiment.records import folders
from tpp_jax.experiment.records.checkpoints import Checkpoints
from tpp_jax.experiment.records.history import History, means
from tpp_jax.experiment.records.progress import Progress
from tpp_jax.experiment.records.stopping import Signals, Stopped, locked
from tpp_jax.experiment.records.summary import draw, finish, read_summary
from tpp_jax.experiment.records.terminal import say
from tpp_jax.experiment.setup import Setup, check
from tpp_jax.pruning.cutting import prune
from tpp_jax.pruning.plan import Plan
from tpp_jax.saving import save_model, with_arrays
from tpp_jax.storage import processes
from tpp_jax.training import parallel
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.state import arrays_of, initial_state, part, with_state
from tpp_jax.training.step import (
    TrainState,
    graphdef_of,
    make_train_step,
    make_train_steps,
)


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Runs all phases, or what is left of them, and returns the summary.

    Args:
      config: from a file in configs/; tpp_jax/experiment/config.py lists all fields.
      workdir: folder of the run; made if missing, continued if not empty.

    Returns:
      The content of ``workdir/summary.json``.

    Raises:
      TPPError: a config, data set or checkpoint is wrong; one clear
        message, before any training. A loss that is not finite stops the run.
      Stopped: SIGTERM or SIGINT (Ctrl-C) came; everything is saved.
    """
    [end] = train_together([config], [workdir])
    if isinstance(end, BaseException):
        raise end
    return end


def train_together(
    configs: Iterable[ml_collections.ConfigDict],
    workdirs: Iterable[str | pathlib.Path],
) -> list[dict | BaseException]:
    """Carries several runs to their ends, equal steps of them as one program.

    Runs share the steps of a phase if these differ in seeds and plans of equal counts
    alone, whatever else the runs do; each comes to what it would alone, up to rounding.
    A resumed run too, at whatever step the others are.

    Args:
      configs: of the runs.
      workdirs: their folders.

    Returns:
      The summary of each run, or what ended it, see :func:`train`. The first one is
      shown.

    Raises:
      Stopped: SIGTERM or SIGINT (Ctrl-C) came; all runs are saved.
    """
    with Signals() as signals:
        ends = lockstep.drive(
            [
                _work(config, pathlib.Path(workdir), signals, hidden=i > 0)
                for i, (config, workdir) in enumerate(
                    zip(configs, workdirs, strict=True)
                )
            ]
        )
    for end in ends:
        if isinstance(end, Stopped):
            raise end
    return ends


def _work(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    signals: Signals,
    hidden: bool,
) -> lockstep.Work:
    folders.check_kinds(workdir)
    if (workdir / "summary.json").exists():
        return _finished(config, workdir, hidden)
    setup = check(config)
    folders.make(workdir)
    with (
        folders.errors_told(workdir),
        locked(workdir) if processes.is_first() else contextlib.nullcontext(),
        Progress(
            workdir / "tensorboard", quiet=not processes.is_first(), hidden=hidden
        ) as progress,
    ):
        run = Run(setup, workdir, progress, signals)
        if processes.is_first():
            folders.write_config(workdir, config.to_dict())
        processes.check_alike(workdir, config.to_json())
        together = True
        try:
            with processes.losses_told():
                for stage in setup.stages:
                    yield from run.do(stage)
                return finish(run)
        except processes.LostProcess:
            together = False
            raise
        finally:
            run.close(wait=together)


def _finished(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, hidden: bool
) -> dict:
    """Returns the summary of a finished run, and draws its report if a kill kept it."""
    file = workdir / "summary.json"
    summary = read_summary(file)
    _same_config(summary["config"], config.to_dict(), workdir)
    if not hidden:
        say(f"The run in {workdir} is finished; see {file}.")
    if processes.is_first() and not (workdir / "report.html").exists():
        with folders.errors_told(workdir):
            page = draw(workdir)
        if not hidden:
            say(f"Its report was missing, and is drawn: {page}")
    return summary


class Run:
    """A run in progress: the network as it is now, and the position.

    Attributes:
      model: the network.
      plans: of each round what is, or was, pruned; later ones are plans of the network
        that the earlier ones left.
      meta: what the checkpoint says in JSON: ``config``, ``phase`` and ``step`` of the
        position, ``seconds`` and ``best`` accuracy of the phase so far, ``results`` of
        the finished phases, ``plans``, ``goal`` (the plan that several rounds lead to),
        ``dense_accuracy``, ``one_shot`` accuracy, ``recent`` metrics that were not
        logged yet: pairs of a number of steps and their means.
    """

    def __init__(
        self,
        setup: Setup,
        workdir: pathlib.Path,
        progress: Progress,
        signals: Signals,
    ) -> None:
        self.setup, self.workdir, self.progress = setup, workdir, progress
        self.signals = signals
        self.checkpoints = Checkpoints(
            workdir / "checkpoints", setup.config.keep_checkpoints
        )
        self.plans: list[Plan] = []
        self.phases = setup.phases(setup.plan)
        self.arrays: dict[str, Any] = {}
        self.meta: dict[str, Any] = {
            "config": setup.config.to_dict(),
            "phase": None,
            "step": 0,
            "seconds": 0.0,
            "best": 0.0,
            "results": [],
            "plans": [],
            "goal": None,
            "dense_accuracy": None,
            "one_shot": None,
            "recent": [],
        }
        self.model = setup.model
        self._program: tuple[Any, Any] = (None, None)
        if (found := self.checkpoints.restore()) is not None:
            self._restore(*found)
        config = setup.config
        self.task = setup.task()
        self.feed = self.task.feed(setup.devices, config.accumulate)
        self.evaluate = Evaluator(
            self.task, self.feed, setup.step_config(), setup.devices, config.parallel
        )
        self.history = History(
            workdir / "metrics.jsonl",
            self._global_step(),
            quiet=not processes.is_first(),
        )
        if odd := self.history.odd:
            self.progress.say(
                f"{workdir / 'metrics.jsonl'} has lines that are no rows of metrics "
                f"({', '.join(map(str, odd[:5]))}{'…' if odd[5:] else ''}); they are "
                "left where they are, and left out."
            )
        if config.jacobian_every:
            probes = self.task.probes(config.jacobian_images)
            self.jacobian = measures.JacobianMeter(*self.task.inputs(probes))

    def _restore(
        self, arrays: dict[str, Any], meta: dict[str, Any], damaged: list[str]
    ) -> None:
        for line in damaged:
            self.progress.say(line)
        _same_config(meta["config"], self.meta["config"], self.workdir)
        self.meta = meta | {"config": self.meta["config"]}
        self.arrays = arrays
        for i, kept in enumerate(meta["plans"], start=1):
            self.plans.append(Plan.from_dict(kept, choosing.groups_now(self)))
            if self.finished(Stage("slice", i).name):
                self.model = prune(self.model, self.plans[-1])
        if self.plans:
            self.phases = self.setup.phases(self.plans[-1])
        self.model = with_arrays(self.model, part(arrays, "model."))
        self.progress.say(
            f"Continuing the run in {self.workdir} from {meta['phase']}, step "
            f"{meta['step']}."
        )

    def close(self, *, wait: bool = True) -> None:
        """Stops what runs in the background; the last checkpoint is written first.

        Without ``wait`` it is left as it is: a process that is lost cannot finish it.
        """
        self.feed.close()
        if wait:
            self.checkpoints.close()

    def finished(self, name: str) -> bool:
        """Tells whether a phase is done."""
        return any(result["name"] == name for result in self.meta["results"])

    def do(self, stage: Stage) -> lockstep.Work:
        """Goes through a stage, or what is left of it; asks for its training steps."""
        match stage.kind:
            case "dense":
                choosing.keep_dense(self)
            case "choose":
                choosing.choose(self, stage)
            case "slice":
                choosing.cut(self, stage)
            case _:
                yield from self.train(stage, self.phases[stage.kind])

    def train(self, stage: Stage, phase: Phase) -> lockstep.Work:
        """Trains for one phase, from wherever the checkpoint left it."""
        config, devices, feed = self.setup.config, self.setup.devices, self.feed
        if self.finished(stage.name):
            return
        if self.meta["phase"] != stage.name:
            self.meta |= {"phase": stage.name, "step": 0, "seconds": 0.0, "best": 0.0}
            self.meta["recent"] = []
        ema = self.setup.step_config(phase.kind).ema > 0
        begun = self.meta["step"] > 0 or not phase.fresh
        state = initial_state(
            self.model, phase.tx, ema, self.meta["step"], self.arrays if begun else None
        )
        state = parallel.replicate(state, devices)
        on_cpu = jax.default_backend() == "cpu"
        at_once = config.steps_per_dispatch or (1 if on_cpu else feed.at_once)
        at_once = min(at_once, feed.at_once)
        if self._program[0] is not phase.tx:  # phases of one optimizer share a program
            self._program = phase.tx, self._compile(phase, loop=at_once > 1)
        ask = self._program[1]
        key = stage.key(config.seed)
        key_on_devices = parallel.replicate(key, devices)
        done = self.meta["step"]
        recent = list(self.meta["recent"])
        self.progress.phase(stage.name, phase.steps, done)
        started = time.monotonic() - self.meta["seconds"]
        feed.begin(key, done)
        while done < phase.steps:
            every = config.log_every, config.eval_every, config.checkpoint_every
            every += (config.jacobian_every,) if config.jacobian_every else ()
            stop = min(
                phase.steps,
                done + min(at_once, feed.steps_left(done)),
                *((done // k + 1) * k for k in every),
            )
            data = feed.train_data(done)
            arguments = state, key_on_devices, np.int32(stop - done), *data
            del state  # its buffers are given away
            state, metrics = yield ask._replace(
                arguments=arguments, left=self._steps_left()
            )
            del arguments
            recent.append((stop - done, metrics))
            jax.block_until_ready(recent[-2:-1])  # lest streamed batches pile up
            done = stop
            self.meta |= {"step": done, "seconds": time.monotonic() - started}
            if done % config.log_every == 0 or done == phase.steps:
                self._log(phase, done, state, recent)
                recent = []
            if done == phase.steps:
                break
            if done % config.eval_every == 0:
                self._measure(done, state)
            if config.jacobian_every and done % config.jacobian_every == 0:
                self._measure_jacobian(done, state)
            asked = self._asked(done)
            if done % config.checkpoint_every == 0 or asked:
                self._check_finite(done, recent)
                self.meta["recent"] = jax.tree.map(float, recent)
                self._save(state)
            if asked:
                self._stop(asked)
        state = parallel.local(state)
        accuracy = self._measure(done, state)
        more = {}
        if config.jacobian_every:
            more["jacobian"] = self._measure_jacobian(done, state)
        if stage.kind == "stabilize":
            choosing.save_gram(self, "regularized", with_state(self.model, state))
        self.record_result(
            name=stage.name,
            steps=phase.steps,
            seconds=time.monotonic() - started,
            accuracy=accuracy,
            best_accuracy=self.meta["best"],
            **more,
        )
        feed.close()
        # What is handed on are the averages, where they were kept.
        params, stats = state.network
        state = state._replace(params=params, stats=stats, average=None)
        self.meta["recent"] = []
        if phase.steps:  # otherwise the checkpoint of the phase before is as good
            self._save(state)
        self.arrays = arrays_of(state)
        self.model = with_state(self.model, state)
        if phase.steps and (asked := processes.largest(self.signals.asked)):
            self._stop(asked)

    def _asked(self, done: int) -> int:
        """Returns the signal that asks to stop here; processes agree now and then."""
        alone = jax.process_count() == 1
        if alone or done % self.setup.config.log_every == 0:
            return processes.largest(self.signals.asked)
        return 0

    def _stop(self, signum: int) -> None:
        self.progress.say("Stopped and saved: the same command continues here.")
        raise Stopped(signum)

    def _compile(self, phase: Phase, *, loop: bool) -> lockstep.Ask:
        """Returns what will be asked for in a phase, without the arguments."""
        config, devices, feed = self.setup.config, self.setup.devices, self.feed
        plan = self.plans[-1] if self.plans else self.setup.plan
        graphdef = graphdef_of(self.model, training=True)
        step_config = self.setup.step_config(phase.kind)
        loss = self.setup.task(phase.kind).loss

        def steps_of(tx: optax.GradientTransformation) -> Callable[..., Any]:
            axis = parallel.axis_name(devices)
            select = feed.train_batch
            step = make_train_step(graphdef, tx, loss, step_config, select, axis)
            return make_train_steps(step, loop=loop)

        on_devices = functools.partial(
            parallel.on_devices,
            devices=devices,
            accumulate=config.accumulate,
            kind=config.parallel,
        )
        return lockstep.Ask(
            steps=on_devices(
                steps_of(phase.tx), donate=0, split=3 if feed.split else None
            ),
            arguments=(),
            likeness=None if feed.split else self.setup.likeness(phase.kind),
            steps_of=lambda kept: steps_of(
                self.setup.phases(Plan(kept, plan.groups))[phase.kind].tx
            ),
            compile=on_devices,
            unroll=jax.default_backend() == "cpu",
            kept=plan.kept,
            left=0,
        )

    def accuracy(self, model: nnx.Module) -> float:
        """Measures a network on the test set, in percent."""
        params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        return self.evaluate(model, params, stats)["accuracy"]

    def _global_step(self) -> int:
        before = sum(result["steps"] for result in self.meta["results"])
        unfinished = not self.finished(self.meta["phase"])
        return before + (self.meta["step"] if unfinished else 0)

    def _steps_left(self) -> int:
        kinds = [stage.kind for stage in self.setup.stages]
        steps = (self.phases[kind].steps for kind in kinds if kind in self.phases)
        return sum(steps) - self._global_step()

    def _log(
        self, phase: Phase, done: int, state: TrainState, recent: list[Any]
    ) -> None:
        self._check_finite(done, recent)
        metrics = means(recent)
        metrics |= penalties_of(state.opt_state)
        if "gram" in metrics:
            norm = measures.pruned_norm(self.plans[-1], parallel.local(state.params))
            metrics["pruned_norm"] = float(norm)
        self.progress.step(done, metrics)
        images = self.progress.rate(done) * self.setup.config.data.batch_size
        metrics["learning_rate"] = float(phase.learning_rate(done - 1))
        self._record(done, {**metrics, "images_per_second": images})

    def _check_finite(self, done: int, recent: list[Any]) -> None:
        wrong = any(not math.isfinite(m["loss"]) for _, m in recent)
        skipped = bool(recent) and all(m.get("skipped", 0) == 1 for _, m in recent)
        if not wrong and not skipped:
            return
        saved = self.checkpoints.latest()
        kept = "" if saved is None else f" The checkpoint of step {saved} is kept."
        phase = self.meta["phase"]
        raise TPPError(
            f"the loss is no longer finite at step {done} of {phase}.{kept} Lower the "
            "learning rate or the penalties, and use a new --workdir"
        )

    def _measure(self, done: int, state: TrainState) -> float:
        result = self.evaluate(self.model, *state.network)
        self._check_finite(done, [(1, result)])
        if result["accuracy"] > self.meta["best"]:
            self.meta["best"] = result["accuracy"]
            if self.meta["phase"] == self.setup.stages[-1].name:
                self._keep_best(done, state)
        metrics = {f"test_{name}": value for name, value in result.items()}
        self._record(done, metrics)
        self.progress.line(done, metrics)
        return result["accuracy"]

    def _keep_best(self, done: int, state: TrainState) -> None:
        """Saves the network of the last phase's best test accuracy as ``best/``.

        What is killed in here goes on from an earlier checkpoint, and comes here again.
        """
        save_model(
            self.workdir / "best",
            self._network(state),
            functools.reduce(Plan.then, self.plans) if self.plans else None,
            config=self.meta["config"],
            metrics={"accuracy": self.meta["best"], "step": done},
        )

    def _network(self, state: TrainState) -> nnx.Module:
        params, stats = parallel.local(state.network)
        return with_state(self.model, state._replace(params=params, stats=stats))

    def _measure_jacobian(self, done: int, state: TrainState) -> dict[str, Any]:
        measured = self.jacobian(self._network(state))
        self._record(done, measures.jacobian_scalars(measured))
        return measured

    def _record(self, done: int, metrics: dict[str, float]) -> None:
        step = sum(result["steps"] for result in self.meta["results"]) + done
        self.progress.scalars(step, metrics)
        self.history.append({"step": step, "phase": self.meta["phase"], **metrics})

    def record_result(self, **result: Any) -> None:
        """Adds what came out of a stage that is finished."""
        self.meta["results"] = [*self.meta["results"], result]

    def _save(self, state: TrainState) -> None:
        self.checkpoints.save(self._global_step(), arrays_of(state), self.meta)


_MAY_CHANGE = ("num_devices", "parallel", "keep_checkpoints", "data.dir")
"""Fields in which the config of a run that goes on may differ from what it was."""


def _same_config(old: dict, new: dict, workdir: pathlib.Path) -> None:
    found = differences(old, new)
    if changed := [line for line in found if line.split()[0] not in _MAY_CHANGE]:
        raise TPPError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:5])}). Use "
            "another --workdir, or the same config to continue it"
        )
