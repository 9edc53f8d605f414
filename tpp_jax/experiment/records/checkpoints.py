"""The checkpoints of a run: named arrays and JSON, written by Orbax."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp

from tpp_jax.errors import TPPError
from tpp_jax.storage import items, processes
from tpp_jax.storage.items import Arrays
from tpp_jax.storage.paths import plain


class Checkpoints:
    """The checkpoints of a run in one folder, one per saved step."""

    def __init__(self, folder: str | pathlib.Path, keep: int = 2) -> None:
        """Opens the checkpoints in a folder.

        Args:
          folder: Folder of the checkpoints, which is created if it is missing.
          keep: Number of latest checkpoints to keep; 0 to write none.
        """
        self._keep = keep
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or 1, enable_async_checkpointing=True
        )
        self._folder = pathlib.Path(folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._link = contextlib.ExitStack()
        self._manager = ocp.CheckpointManager(
            self._link.enter_context(plain(self._folder)),
            options=options,
            item_names=("arrays", "meta"),
        )

    def save(self, step: int, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        """Saves arrays and JSON-ready content for a step, in the background.

        The arrays are copied from the device before this returns.

        Raises:
          TPPError: This or the previous checkpoint could not be written.
          LostProcess: Another process has ended.
        """
        if not self._keep:
            return
        with self._explained():
            self._manager.save(step, args=items.to_save(arrays, meta), force=True)

    def latest(self) -> int | None:
        """Returns the last saved step; None if there is no checkpoint."""
        return self._manager.latest_step()

    def restore(self) -> tuple[Arrays, dict[str, Any], list[str]] | None:
        """Reads the last checkpoint that is not damaged.

        Damaged checkpoints are renamed to ``damaged-<step>``.

        Returns:
          Arrays, JSON content and a message for each damaged checkpoint; None if there
          are no checkpoints.

        Raises:
          TPPError: All checkpoints are damaged.
        """
        damaged: list[tuple[int, Exception]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._manager.restore(step, args=items.to_restore())
                arrays = found["arrays"]
                meta = items.checked(found["meta"], arrays)
            except Exception as error:  # Orbax and TensorStore raise many types
                damaged.append((step, error))
                continue
            return arrays, meta, [self._put_aside(*one) for one in damaged]
        if damaged:
            raise TPPError(
                f"none of the checkpoints in {self._folder} can be read "
                f"({items.reason(damaged[0][1])}). Remove that folder to start again"
            ) from damaged[0][1]
        return None

    def _put_aside(self, step: int, error: Exception) -> str:
        aside = self._folder / f"damaged-{step}"
        processes.wait_for_all(f"damaged {step}")  # until all have read it
        if processes.is_first():
            shutil.rmtree(aside, ignore_errors=True)  # from an earlier command
            (self._folder / str(step)).rename(aside)
        processes.wait_for_all(f"aside {step}")
        self._manager.reload()
        what = items.reason(error)
        return f"The checkpoint of step {step} is damaged ({what}); it is now {aside}."

    def close(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
          TPPError: It could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()
        self._manager.close()
        self._link.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types
            if processes.is_loss(error):  # Orbax waits for the other processes
                raise processes.lost(error) from error
            latest = self.latest()
            kept = "There is no earlier one"
            if latest is not None:
                kept = f"That of step {latest} is intact"
            raise TPPError(
                f"a checkpoint could not be written to {self._folder} "
                f"({' '.join(str(error).split())[:200]}). {kept}: free disk space, and "
                "the same command continues from the last checkpoint"
            ) from error
