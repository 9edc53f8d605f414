"""The two arguments of a stage: the run as it is, and the tools of all stages."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from flax import nnx

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
from tpp_jax.training.task import Feed, Task


@dataclasses.dataclass(frozen=True)
class Run:
    """A run at some moment. A stage takes one and returns the next.

    Attributes:
      position: Where the run is, as data.
      model: The network.
      plans: Plan of each round so far; later ones are plans of the network that the
        earlier ones left.
      phases: Phases of training by kind, which prune by the last plan.
      arrays: Arrays of the last checkpoint by name: the optimizer's state is in them.
      program: Program of the phase that was last trained; phases of one optimizer share
        it.
    """

    position: Position
    model: nnx.Module
    plans: tuple[Plan, ...]
    phases: Mapping[str, Phase]
    arrays: Mapping[str, Any]
    program: Program | None = None

    def but(self, **changes: Any) -> Self:
        """Returns the run with other attributes."""
        return dataclasses.replace(self, **changes)

    def at(self, **changes: Any) -> Self:
        """Returns the run at a position with other fields."""
        return self.but(position=dataclasses.replace(self.position, **changes))


@dataclasses.dataclass(frozen=True)
class Tools:
    """What the stages of a run use; none of it is part of the run's position.

    Attributes:
      setup: Setup of the run.
      task: Task by which networks are measured.
      workdir: Folder of the run.
      progress: Display of its progress.
      history: File of its metrics.
      checkpoints: Its checkpoints.
      feed: Source of its batches.
      evaluate: Function that measures a network on the test set.
      jacobian: Function that measures Jacobian singular values; None if the config does
        not ask for them.
      signals: Signals that ask the run to stop.
      take: Function that takes training steps.
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

    def score(self, model: nnx.Module) -> float:
        """Returns the task's headline of a network on the test set."""
        params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        return self.evaluate(model, params, stats)[self.task.headline.name]

    def record(self, position: Position, metrics: Mapping[str, float]) -> None:
        """Writes metrics to the history and to TensorBoard, at a position."""
        step = position.steps_before + position.step
        self.progress.scalars(step, metrics)
        self.history.append({"step": step, "phase": position.phase, **metrics})

    def keep_gram(self, run: Run, name: str, model: nnx.Module) -> None:
        """Keeps a Gram matrix for the report, in a first round that prunes the layer.

        Args:
          run: The run.
          name: Name of the matrix.
          model: The network that has it.
        """
        if len(run.plans) == 1 and processes.is_first():
            [plan] = run.plans
            layer = measures.find_report_layer(self.setup.config.report_layer, plan)
            if layer is not None:
                file = self.workdir / "gram.npz"
                measures.save_gram(file, name, model, layer, plan)
