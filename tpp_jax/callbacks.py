"""What a run calls while it goes on: the hook for a user's logging and plots."""

from collections.abc import Mapping
from typing import Any

from flax import nnx


class Callback:
    """Functions that a run calls; subclasses replace those that they need.

    An exception in one of them ends the run as a signal would not: what was saved
    before is kept, and the same call continues from there.

    Example:
      >>> class Printer(Callback):
      ...     def on_phase(self, phase, model, result):
      ...         print(phase, result["score"])
    """

    def on_step(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Called when metrics are recorded.

        Args:
          step: Number of steps of the run so far.
          phase: Name of the phase.
          metrics: Means since the last record, every ``log_every`` steps; or the
            metrics of an evaluation, whose names begin with ``test_``.
        """

    def on_phase(
        self, phase: str, model: nnx.Module, result: Mapping[str, Any]
    ) -> None:
        """Called at the end of a phase.

        Args:
          phase: Name of the phase, ``"slice"`` for the cut.
          model: Network at its end.
          result: Entry of the summary: ``score``, ``steps``, ``seconds`` and more.
        """

    def on_checkpoint(self, step: int) -> None:
        """Called when a checkpoint is being written.

        Args:
          step: Number of steps of the run so far.
        """
