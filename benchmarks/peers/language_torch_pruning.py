"""The peer of ``benchmarks.language_recovery``: Torch-Pruning on the same model.

    pip install torch transformers torch-pruning
    python -m benchmarks.peers.language_torch_pruning --model runs/smollm2/dense \
        --test persuasion.txt,opticks.txt

``--model`` is a folder with the unpruned model and its tokenizer, written by
``tpp_jax.save_hf(model, folder, tokenizer)``. The settings are those of
Torch-Pruning's example for language models, ``examples/LLMs/prune_llm.py``: the L2 norm
of a group, its mean, locally, rounded to multiples of 4; the width of the residual
stream, heads and units are pruned by one ratio, and the logits are not. Two rows prune
the units alone. Nothing is trained. Results are written after every row to
``results/language_torch_pruning_cpu.json``. Importing this file needs PyTorch, which
the library itself never does.
"""

import argparse
import copy
import importlib.metadata
import json
import pathlib
import pydoc_data.topics
import warnings
from typing import Any

import tokenizers
import torch
import torch_pruning
import transformers

from benchmarks import machine

NAME = "language_torch_pruning"
FILE = machine.RESULTS / f"{NAME}_cpu.json"
LENGTH, SEQUENCES, FIRST = 256, 64, 4096
ROWS = {"nothing": (0.0, 0.0)} | {
    f"{ratio:.0%} of {what}": (ratio, ratio if what == "all widths" else 0.0)
    for what in ("the units", "all widths")
    for ratio in (0.25, 0.5)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder")
    parser.add_argument("--test", required=True, help="files, separated by commas")
    options = parser.parse_args()
    packages = ("torch", "transformers", "torch-pruning")
    record = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    record["packages"] = {name: importlib.metadata.version(name) for name in packages}
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(options.model / "tokenizer.json"))
    # With the cache of keys and values, the search for groups does not end.
    dense.config.use_cache = False
    prompt = torch.tensor([tokenizer.encode("Hello world.").ids])
    texts = {pathlib.Path(f).stem: f for f in options.test.split(",")}
    texts = {name: pathlib.Path(file).read_text() for name, file in texts.items()}
    texts["python"] = "\n".join(pydoc_data.topics.topics.values())
    tests = {name: sequences(tokenizer, text) for name, text in texts.items()}
    for row, (units, others) in ROWS.items():
        if row not in record["rows"]:
            model = copy.deepcopy(dense)
            if units:
                prune(model, units, others, prompt)
            found = perplexities(model, tests)
            unique = {id(p): p.numel() for p in model.parameters()}
            record["rows"][row] = {"parameters": sum(unique.values()), **found}
            machine.write(NAME, record)
            print(row, json.dumps(record["rows"][row]), flush=True)


def sequences(tokenizer: tokenizers.Tokenizer, text: str) -> torch.Tensor:
    """Returns the first tokens of a text, [sequences, length]."""
    n = LENGTH * SEQUENCES
    ids = tokenizer.encode(text[: 20 * n]).ids[:n]
    return torch.tensor(ids).reshape(SEQUENCES, LENGTH)


def prune(model: Any, units: float, others: float, tokens: torch.Tensor) -> None:
    """Prunes a model in place.

    Args:
      model: Model of transformers.
      units: Share of the units of the MLPs to remove.
      others: Share of the heads and of the width of the residual stream to remove.
      tokens: Tokens to trace the model with.
    """
    # Pruned layer by layer, a shared matrix would be cut twice.
    model.config.tie_word_embeddings = False
    weight = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(weight)
    heads, gates = {}, {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = model.config.num_attention_heads
        heads[attention.k_proj] = model.config.num_key_value_heads
        heads[attention.v_proj] = model.config.num_key_value_heads
        gates[layer.mlp.gate_proj] = units
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of scales of norms
        pruner = torch_pruning.pruner.BasePruner(
            model,
            tokens,
            importance=torch_pruning.importance.GroupMagnitudeImportance(
                p=2, group_reduction="mean"
            ),
            output_transform=lambda outputs: outputs.logits,
            pruning_ratio=others,
            pruning_ratio_dict=gates,
            ignored_layers=[model.lm_head],
            num_heads=heads,
            prune_num_heads=bool(others),
            prune_head_dims=False,
            head_pruning_ratio=others,
            round_to=4,
        )
        pruner.step()
    for layer in model.model.layers:
        attention = layer.self_attn
        queries, keys = (
            projection.out_features // attention.head_dim
            for projection in (attention.q_proj, attention.k_proj)
        )
        attention.num_key_value_groups = queries // keys


@torch.no_grad()
def perplexities(
    model: Any, tests: dict[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    """Returns the perplexity of each text, and of its first tokens."""
    found: dict[str, dict[str, float]] = {"perplexity": {}, "of the first": {}}
    for name, tokens in tests.items():
        nats = torch.stack([_nats(model, row[None]) for row in tokens])
        found["perplexity"][name] = float(nats.mean().exp())
        found["of the first"][name] = float(nats[: FIRST // LENGTH].mean().exp())
    return found


def _nats(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten()
    )


if __name__ == "__main__":
    main()
