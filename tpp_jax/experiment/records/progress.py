"""The display of a run: a live line, log lines and TensorBoard."""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence

import rich.progress
import rich.text
from tensorboardX import SummaryWriter

from tpp_jax.errors import TPPError
from tpp_jax.experiment.records.terminal import Terminal


class Progress:
    """Display of the steps of one phase after another; a context manager.

    On a terminal, a live line shows the phase, steps, steps/s, the remaining time and
    those of the last metrics for which there is space. :meth:`line` and :meth:`say`
    print permanent lines. TensorBoard's files count the steps of the run.
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
            _LiveLine(self._console),
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
        self._begun, self._measured, self._done_before = time.monotonic(), False, done
        self._paused, self._pause_start = 0.0, None
        self._task = self._live.add_task(
            name, total=steps, completed=done, facts=["compiling"], metrics=[]
        )

    def compiled(self, done: int) -> None:
        """Starts to measure speed: the first steps, with compilation, are done."""
        self._begun, self._measured, self._done_before = time.monotonic(), True, done
        self._live.update(self._task, completed=done, facts=[])

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time of evaluations and checkpoints out of the steps/s."""
        self._pause_start = start = time.monotonic()
        yield
        self._paused += time.monotonic() - start
        self._pause_start = None

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of the last steps."""
        self._live.update(
            self._task, completed=done, facts=self._facts(done), metrics=_notes(metrics)
        )

    def rate(self, done: int) -> float | None:
        """Returns the mean steps/s of the phase in this process.

        Returns:
          The rate without compilation, evaluations and checkpoints; None before any
          step was measured.
        """
        if not self._measured or done <= self._done_before:
            return None
        now = self._pause_start or time.monotonic()
        elapsed = now - self._begun - self._paused
        return (done - self._done_before) / max(elapsed, 1e-9)

    def line(self, done: int, metrics: Mapping[str, float]) -> None:
        """Prints phase, step, speed and metrics, and the remaining time.

        On a terminal, the remaining time is left to the live line, and metrics that do
        not fit in a line are on further lines.
        """
        first, facts = f"{self._name:<10} {done:>7}/{self._steps}", self._facts(done)
        live, width = self._console.is_terminal, self._console.width
        parts = [first, *(facts[:1] if live else facts), *_notes(metrics)]
        self.say("\n".join(_lines(parts, width if live else None)))

    def _facts(self, done: int) -> list[str]:
        """Returns the steps/s and the remaining time, if they are known."""
        if done <= self._done_before:
            return []
        # What is left includes evaluations and checkpoints, as the time so far does.
        elapsed = time.monotonic() - self._begun
        left = (self._steps - done) * elapsed / (done - self._done_before)
        rate = self.rate(done)
        speed = [] if rate is None else [f"{rate:.3g} step/s"]
        return [*speed, f"left {duration(left)}"]

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


class _LiveLine(rich.progress.ProgressColumn):
    """The live line: as much of a phase's state as one line of the terminal holds."""

    def __init__(self, console: Terminal) -> None:
        super().__init__()
        self._console = console

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        """Returns the line of a phase, for the width that the terminal has now."""
        first = f"{task.description:<10} {task.completed:.0f}/{task.total:.0f}"
        parts = [first, *task.fields["facts"], *task.fields["metrics"]]
        line = _lines(parts, self._console.width - 1)[0]
        return rich.text.Text(line, no_wrap=True, overflow="crop")


def _lines(parts: Sequence[str], width: int | None) -> list[str]:
    """Returns parts, two spaces apart, in lines of a width; None for a single line."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}  {part}"
        if width is None or len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(f"{'':<10} {part}")
    return lines


def _notes(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in metrics.items()]
