"""One of two processes that hold a model together.

    python -m tests.sharded.one_of_two ADDRESS NUMBER FOLDER KIND

Groups, statistics, plan, steps with penalties, cut, and a saved model that is loaded
again: what they give is written to FOLDER.
"""

import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import optax
from jax._src import compiler
from jax.sharding import AxisType, NamedSharding

import tpp_jax as tpp
from tests.sharded.mlp import RATIOS, divided, spec_of
from tpp_jax.commands.compilation import keep_compiled_programs

SCHEDULE = tpp.growing_schedule(
    granularity=0.5, every=1, stabilize=20, zero_out_every=1
)


def penalised(plan, case, steps=2):
    """Trains with penalties; returns parameters, the optimizer's state, and its HLO."""
    tx = optax.chain(
        optax.scale_by_adam(),
        tpp.add_tpp_penalties(plan, SCHEDULE, gram_weight=1.0, target="relative"),
        optax.scale(-0.01),
        tpp.zero_pruned(plan, SCHEDULE),
    )

    def step(params, state, tokens):
        gradients = jax.grad(case.loss)(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = case.params, case.placed(tx.init(case.params))
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    program = jax.jit(step, out_shardings=places)
    program = program.lower(params, state, case.tokens).compile()
    for _ in range(steps):
        params, state = program(params, state, case.tokens)
    return params, state, program.as_text()


def work(case):
    """Returns what a model in any number of processes gives, and its cut form."""
    groups = tpp.channel_groups(case.fn, case.tokens, params=case.params)
    gradient = tpp.loss_gradient(case.loss, case.params, [case.tokens])
    plans = {
        criterion: tpp.make_plan(
            groups,
            case.params,
            RATIOS,
            criterion=criterion,
            statistics=gradient if criterion == "taylor" else None,
        )
        for criterion in ("l1", "random", "taylor")
    }
    moments = tpp.input_moments(case.fn, [case.tokens], case.params)
    plans["wanda"] = tpp.make_plan(
        groups, case.params, RATIOS, criterion="wanda", statistics=moments
    )
    plan = plans["taylor"]
    params, state, _ = penalised(plan, case)
    status = tpp.status(state, plan, params)
    small, state = tpp.slice_tree(plan, (params, state))
    refit = tpp.compensate(case.fn, plan, params=case.params, moments=moments)
    found = {
        "plans": {name: each.to_dict() for name, each in plans.items()},
        "gram": status.gram,
        "norm": status.pruned_norm,
        "moment": norm(state[0].mu),
        "refit": norm(refit),
    }
    return found, small


def norm(tree):
    return float(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def main(address, number, folder, kind):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Programs that wait for each other at the same time may wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(address, 2, int(number))
    # As in launch_one_of_several.py: each process keeps what it compiles.
    first = types.SimpleNamespace(process_id=0, client=None)
    compiler.distributed = types.SimpleNamespace(global_state=first)
    keep_compiled_programs()
    axes = (getattr(AxisType, kind),) * 2
    # The processes divide the channels.
    mesh = jax.make_mesh((2, 2), ("model", "data"), axis_types=axes)
    folder = pathlib.Path(folder)
    found, small = work(divided(mesh))
    tpp.save_model(folder / "model", small)

    def sharding(name, shape):
        assert small[name].shape == shape
        return NamedSharding(mesh, spec_of(name))

    loaded = tpp.load_model(folder / "model", sharding=sharding)
    for leaf, saved in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(small), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(saved.sharding, leaf.ndim)
        for mine, other in zip(
            leaf.addressable_shards, saved.addressable_shards, strict=True
        ):
            assert (mine.data == other.data).all()
    (folder / f"{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
