"""The peer of ``benchmarks.language_speed``: the same decoder in transformers.

Importing this file needs PyTorch and transformers, which the library never does.
"""

import numpy as np
import torch
import transformers

from tpp_jax.models.decoder import DecoderConfig


class Peer:
    """A decoder with random weights: its forward pass and its training step.

    Args:
      config: Sizes of the decoder.
      hidden: Number of units of each MLP, in place of the config's.
      tokens: Tokens of a batch, int ``[b, n]``.
      compiled: Whether to use ``torch.compile``.
      half: Whether to compute in bfloat16, by autocast.
    """

    def __init__(
        self,
        config: DecoderConfig,
        hidden: int,
        tokens: np.ndarray,
        *,
        compiled: bool,
        half: bool,
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        settings = transformers.LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=hidden,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            rms_norm_eps=config.epsilon,
            rope_theta=config.rope_base,
            tie_word_embeddings=config.tied,
            use_cache=False,
        )
        network = transformers.LlamaForCausalLM(settings).to(self._device)
        self._call = torch.compile(network) if compiled else network
        self._optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
        self._tokens = torch.as_tensor(tokens, device=self._device).long()
        self._half = half

    def forward(self) -> None:
        """Runs the forward pass to its end."""
        with torch.no_grad(), self._autocast():
            self._call(self._tokens)
        self._wait()

    def step(self) -> None:
        """Runs a training step to its end."""
        with self._autocast():
            logits = self._call(self._tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), self._tokens[:, 1:].flatten()
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._wait()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._half)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
