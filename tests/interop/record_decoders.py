"""Small models of transformers, and the logits it computes, for test_hugging_face.py.

    python tests/interop/record_decoders.py

needs transformers (5.24 made the files that are there) and PyTorch.
"""

import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "decoders"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SETTINGS = {
    "smollm2": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": True, "rope_theta": 1e5, "rms_norm_eps": 1e-5},
    ),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama_biases": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 4}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 8}),
}


def main() -> None:
    for name, (kind, settings) in SETTINGS.items():
        torch.manual_seed(0)
        config = kind(**(SIZES | settings))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases begin as constants
                parameter.add_(0.2 * torch.randn_like(parameter))
            tokens = torch.randint(0, SIZES["vocab_size"], (2, 11))
            logits = model(tokens).logits
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
        np.savez(FOLDER / name / "logits.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
    main()
