"""The networks of a finished run as files for other runtimes: --mode=export."""

import pathlib
from collections.abc import Sequence

import rich.table
from flax import nnx

from tpp_jax.commands.evaluate import finished_run, load_network
from tpp_jax.errors import TPPError
from tpp_jax.experiment.fields import Tree
from tpp_jax.experiment.records.summary import draw_again
from tpp_jax.experiment.records.terminal import Terminal
from tpp_jax.interop.exporting import Exported, export
from tpp_jax.interop.hugging_face import save_hf
from tpp_jax.interop.torch_weights import save_torch
from tpp_jax.models import Decoder

FORMATS = "stablehlo", "onnx", "tflite", "safetensors"
_EXAMPLES = 16  # number of examples that files and networks are compared on


def export_run(
    workdir: str | pathlib.Path,
    formats: Sequence[str] = FORMATS[:1],
    data_dir: str = "",
    given: Tree | None = None,
) -> list[Exported]:
    """Exports the dense and the pruned network of a finished run.

    They are compared with the files on examples of the run's evaluation data. Files of
    ``safetensors`` hold weights only, in the layout of PyTorch; for decoder language
    models, a folder of Hugging Face transformers.

    Args:
      workdir: Folder of the run. The files are written to ``export/`` in it.
      formats: Formats, of :data:`FORMATS`.
      data_dir: Folder of the data; "" if they have not moved.
      given: Config of the run; needed only if it names code of the user's own.

    Returns:
      What was checked, for each file that holds a program.

    Raises:
      TPPError: The run is not finished, a format is unknown, or a network cannot be
        exported.
    """
    for name in formats:
        if name not in FORMATS:
            raise TPPError(
                f"unknown format {name!r}: choose from {', '.join(FORMATS)}, separated "
                "by commas"
            )
    task, config = finished_run(workdir, data_dir, given)
    inputs = task.inputs(task.probes(_EXAMPLES))
    folder = pathlib.Path(workdir)
    checked, console = [], Terminal()
    console.print(f"Files in {folder / 'export'}:")
    for network, name in (("dense", "dense"), ("model", "pruned")):
        if not (folder / network).is_dir():
            continue  # a method that prunes before training has no dense network
        model = load_network(folder / network, task, config)
        for suffix in formats:
            path = folder / "export" / f"{name}.{suffix}"
            if suffix == "safetensors":
                console.print(f"{_save_weights(model, path).name}: weights only")
            else:
                checked.append(export(model, path, *inputs))
    if checked:
        console.print(table(checked))
        draw_again(folder)
    return checked


def _save_weights(model: nnx.Module, path: pathlib.Path) -> pathlib.Path:
    """Saves weights for PyTorch, and returns the path of what was written."""
    if not isinstance(model, Decoder):
        save_torch(model, path)
        return path
    save_hf(model, path.with_suffix(""))
    return path.with_suffix("")


def table(checked: Sequence[Exported]) -> rich.table.Table:
    """Returns a table of exported files.

    Args:
      checked: What was checked of each.
    """
    shown = rich.table.Table()
    shown.add_column("file", overflow="fold")
    for column in ("size, MB", "parameters", "MFLOPs", "runtime", "difference"):
        shown.add_column(column, justify="right")
    for one in checked:
        shown.add_row(
            one.path.name,
            f"{one.bytes / 1e6:.2f}",
            f"{one.params:,}",
            f"{one.flops / 1e6:,.1f}",
            one.runtime,
            f"{one.difference:.0e}",
        )
    return shown
