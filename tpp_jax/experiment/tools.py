"""The arguments of a stage: the run and the tools of all stages."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from flax import nnx

from tpp_jax.callbacks import Callback
from tpp_jax.experiment import measures
from tpp_jax.experiment.phases import Phase
from tpp_jax.experiment.position import Position
from tpp_jax.experiment.program import Program, Take
from tpp_jax.experiment.records.checkpoints import Checkpoints
from tpp_jax.experiment.records.history import History
from tpp_jax.experiment.records.progress import Progress
from tpp_jax.experiment.records.stopping import Signals
from tpp_jax.experiment.setup import Setup
from tpp_jax.pruning.plan import Plan
from tpp_jax.storage import processes
from tpp_jax.training.evaluation import Evaluator
from tpp_jax.training.structure import split
from tpp_jax.training.task import Feed, Task


@dataclasses.dataclass(frozen=True)
class Run:
    """State of a run. A stage takes one and returns the next.

    Attributes:
      position: Progress and results of the run, as data.
      model: Current network.
      plans: Plan of each round so far; later plans prune the network that the earlier
        ones left.
      phases: Phases of training by kind; they use the last plan.
      arrays: Arrays of the last checkpoint by name, including the optimizer's state.
      program: Program of the last trained phase, which phases with the same optimizer
        share.
      teacher: Dense network to distil, kept from its training on; None if the run does
        not distil.
    """

    position: Position
    model: nnx.Module
    plans: tuple[Plan, ...]
    phases: Mapping[str, Phase]
    arrays: Mapping[str, Any]
    program: Program | None = None
    teacher: nnx.Module | None = None

    def but(self, **changes: Any) -> Self:
        """Returns the run with some attributes replaced."""
        return dataclasses.replace(self, **changes)

    def at(self, **changes: Any) -> Self:
        """Returns the run with some fields of its position replaced."""
        return self.but(position=dataclasses.replace(self.position, **changes))


@dataclasses.dataclass(frozen=True)
class Tools:
    """Objects that the stages of a run use and that are not part of its state.

    Attributes:
      setup: Setup of the run.
      task: Task whose metrics are measured.
      workdir: Folder of the run.
      progress: Display of the progress.
      history: File of the metrics.
      checkpoints: Checkpoints of the run.
      feed: Source of the batches.
      evaluate: Function that measures a network on the test set.
      jacobian: Function that measures Jacobian singular values; None if they are not
        measured.
      signals: Signals that stop the run.
      take: Function that runs training steps.
      callbacks: Objects that are called during the run.
      kept: Whether the folder is the user's, and not removed at the end.
    """

    setup: Setup
    task: Task
    workdir: pathlib.Path
    progress: Progress
    history: History
    checkpoints: Checkpoints
    feed: Feed
    evaluate: Evaluator
    jacobian: measures.JacobianMeter | None
    signals: Signals
    take: Take
    callbacks: tuple[Callback, ...] = ()
    kept: bool = True

    def score(self, model: nnx.Module) -> float:
        """Returns a network's score: the task's headline metric on the test set."""
        params, stats = split(model)
        return self.evaluate(model, params, stats)[self.task.headline.name]

    def record(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Writes metrics to the history and to TensorBoard, at a position."""
        step = position.steps_before + position.step
        self.progress.scalars(step, metrics)
        self.history.append({"step": step, "phase": position.phase, **metrics})
        for callback in self.callbacks:
            callback.on_step(step, position.phase or "", metrics)

    def keep_gram(self, run: Run, name: str, model: nnx.Module) -> None:
        """Saves a Gram matrix for the report, if the first round prunes the layer.

        Args:
          run: Run in any round; nothing is saved after the first.
          name: Name of the matrix.
          model: Network with the layer.
        """
        if len(run.plans) == 1 and processes.is_first():
            [plan] = run.plans
            layer = measures.find_report_layer(self.setup.config.report_layer, plan)
            if layer is not None:
                file = self.workdir / "gram.npz"
                measures.save_gram(file, name, model, layer, plan)
