"""Time from a command to the first training step, with a cold and a warm cache.

    python -m benchmarks.startup

Each row is a process of its own, which creates a network with random weights, compiles
the library's training step and runs it once. *Cold* starts with an empty compilation
cache, *warm* with the cache of the cold start. launch.py keeps such a cache by default.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

_STARTED = time.perf_counter()

NETWORKS = {"cifar_resnet56": 128, "cifar_resnet110": 128, "resnet152": 2}
_PARTS = "import", "make", "trace", "compile", "step", "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--child", help="measure one network, print it as JSON")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(options.child)))
        return
    from benchmarks import machine

    print(f"{'seconds':<22}" + "".join(f"{part:>9}" for part in _PARTS))
    results = {}
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            for start in ("cold", "warm"):
                environment = os.environ | {"XDG_CACHE_HOME": folder}
                command = [sys.executable, "-m", "benchmarks.startup", "--child", name]
                done = subprocess.run(
                    command,
                    env=environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                found = json.loads(done.stdout.splitlines()[-1])
                results[f"{name}, {start}"] = found
                row = "".join(f"{found[part]:>9.2f}" for part in _PARTS)
                print(f"{name + ', ' + start:<22}{row}", flush=True)
    print(machine.write("startup", {"seconds": results}))


def _measure(name: str) -> dict[str, float]:
    import jax
    import numpy as np
    from flax import nnx

    import tpp_jax as tpp

    times = [_STARTED, time.perf_counter()]
    from tpp_jax.commands.compilation import keep_compiled_programs
    from tpp_jax.training import parallel
    from tpp_jax.training import step as steps
    from tpp_jax.training.classification import ImageClassification
    from tpp_jax.training.optimizers import sgd
    from tpp_jax.training.structure import structure_of

    keep_compiled_programs()
    model = tpp.models.create(name, rngs=nnx.Rngs(0))
    batch, shape = NETWORKS.get(name, 128), model.spec.image_shape
    pixels, labels = np.zeros((batch, *shape), np.uint8), np.zeros(batch, np.int32)
    classes, each = model.spec.num_classes, (0.5,) * shape[-1]
    images = tpp.data.Dataset(pixels, labels, pixels, labels, classes, each, each)
    task = ImageClassification(images, batch_size=batch, crop_padding=4, flip=True)
    feed = task.feed(jax.devices()[:1])
    feed.begin(jax.random.key(1), 0)
    tx = sgd(1e-3, momentum=0.9, weight_decay=5e-4)
    config = steps.StepConfig()
    graphdef = structure_of(model, training=True)
    step = steps.make_train_step(graphdef, tx, task.loss, config, feed.train_batch)
    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    state = steps.TrainState(jax.numpy.int32(0), params, stats, tx.init(params))
    arguments = state, jax.random.key(0), *feed.train_data(0)
    times.append(time.perf_counter())
    lowered = parallel.on_devices(step, jax.devices()[:1]).lower(*arguments)
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    jax.block_until_ready(compiled(*arguments))
    times.append(time.perf_counter())
    spans = [*np.diff(times), times[-1] - times[0]]
    return dict(zip(_PARTS, map(float, spans), strict=True))


if __name__ == "__main__":
    main()
