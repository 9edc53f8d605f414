"""The display of a run: a live line, log lines and TensorBoard."""

import contextlib
import pathlib
import time
from collections.abc import Mapping

import rich.progress
from tensorboardX import SummaryWriter

from tpp_jax.errors import TPPError
from tpp_jax.experiment.records.terminal import Terminal


class Progress:
    """Display of the steps of one phase after another; a context manager.

    On a terminal, a live line shows the phase, steps, steps/s, the remaining time and
    the last metrics. :meth:`line` and :meth:`say` print permanent lines. TensorBoard's
    files count the steps of the run.
    """

    def __init__(
        self, folder: pathlib.Path, *, quiet: bool = False, hidden: bool = False
    ) -> None:
        """Opens TensorBoard's files.

        Args:
          folder: Folder of TensorBoard's files.
          quiet: Whether to print and write nothing.
          hidden: Whether to print nothing.

        Raises:
          TPPError: TensorBoard's folder cannot be created.
        """
        hidden |= quiet
        self._console = Terminal(soft_wrap=True, quiet=hidden)
        try:
            self._writer = SummaryWriter(str(folder), write_to_disk=not quiet)
        except (FileExistsError, NotADirectoryError) as error:
            raise TPPError(
                f"{folder} cannot be the folder of TensorBoard's files, since a file "
                f"is in the way ({error.strerror}): move it away"
            ) from error
        self._live = rich.progress.Progress(
            rich.progress.TextColumn(
                "{task.description:<10}", style="bold", markup=False
            ),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[rate]:.3g} step/s  left"),
            rich.progress.TextColumn("{task.fields[left]}"),
            rich.progress.TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            transient=True,
            disable=hidden or not self._console.is_terminal,
        )

    def __enter__(self) -> "Progress":
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()
        # A full disk is reported by the checkpoint or file that does not fit.
        with contextlib.suppress(OSError):
            self._writer.close()

    def phase(self, name: str, steps: int, done: int) -> None:
        """Starts the display of a phase.

        Args:
          name: Name of the phase.
          steps: Number of steps of the phase.
          done: Number of steps that are already done.
        """
        for task in self._live.task_ids:
            self._live.remove_task(task)
        self._name, self._steps = name, steps
        self._start, self._done_before = time.monotonic(), done
        self._task = self._live.add_task(
            name, total=steps, completed=done, note="", rate=0.0, left="?"
        )

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of the last steps."""
        rate = self.rate(done)
        left = duration((self._steps - done) / rate)
        self._live.update(
            self._task, completed=done, note=_note(metrics), rate=rate, left=left
        )

    def rate(self, done: int) -> float:
        """Returns the mean steps/s of the phase in this process, with compilation."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        return max(done - self._done_before, 1) / elapsed

    def line(self, done: int, metrics: Mapping[str, float]) -> None:
        """Prints a line with phase, step, speed, remaining time and metrics."""
        rate = self.rate(done)
        left = duration((self._steps - done) / rate)
        digits = ".2f" if rate >= 0.1 else ".2g"
        self.say(
            f"{self._name:<10} {done:>7}/{self._steps}  {rate:6{digits}} step/s  "
            f"left {left}  {_note(metrics)}"
        )

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes metrics to TensorBoard at a step of the run."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def say(self, text: object) -> None:
        """Prints text or a table above the live line."""
        self._console.print(text)


def duration(seconds: float) -> str:
    """Returns a duration in hours, minutes and seconds, after the days if any.

    Example:
      >>> duration(3661), duration(86400 * 2 + 5)
      ('01:01:01', '2 d 00:00:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02}:{minute:02}:{second:02}"
    return f"{days} d {clock}" if days else clock


def _note(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
