"""Smaller vocabularies: rows of a decoder's embedding, and the tokenizer cut with them.

Byte-pair encoding merges pairs of tokens in a fixed order. If all tokens on the way to
each kept token are kept, together with all bytes, then any text can still be encoded,
and a text of kept tokens is encoded as before: at each step the first merge of the
original tokenizer is among those that are left.
"""

import collections
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpp_jax.errors import TPPError
from tpp_jax.models.decoder import Decoder

Json = dict[str, Any]


def frequent_tokens(
    tokenizer: Any, texts: str | Iterable[str], at_least: int = 1
) -> list[int]:
    """Returns the tokens that occur in texts, and those that they need.

    Args:
      tokenizer: A ``tokenizers.Tokenizer`` with byte-pair encoding.
      texts: Texts that are like those of the smaller model's use.
      at_least: Number of times that a token must occur.

    Returns:
      The numbers of the tokens, ascending, for :func:`keep_tokens`: those that occur
      often enough, all bytes and special tokens, and all that is merged on the way to
      one of them.

    Raises:
      TPPError: The tokenizer is of another kind.

    Example:
      >>> import tokenizers
      >>> from tokenizers import models, pre_tokenizers
      >>> letters = sorted(pre_tokenizers.ByteLevel.alphabet())
      >>> words = [*letters, "th", "the", "an"]
      >>> tokenizer = tokenizers.Tokenizer(
      ...     models.BPE({w: i for i, w in enumerate(words)}, [
      ...         ("t", "h"), ("th", "e"), ("a", "n")])
      ... )
      >>> kept = frequent_tokens(tokenizer, "the")
      >>> [words[i] for i in kept[256:]]
      ['th', 'the']
    """
    given = [texts] if isinstance(texts, str) else texts
    seen = collections.Counter(i for text in given for i in tokenizer.encode(text).ids)
    return _closed(_content(tokenizer), {i for i, n in seen.items() if n >= at_least})


def keep_tokens(
    model: Decoder, tokens: Sequence[int], tokenizer: Any = None
) -> tuple[Decoder, Any]:
    """Returns a decoder that knows some tokens only, and its tokenizer.

    The logits of the kept tokens are those of the given model. Token i of the new model
    is the i-th smallest number in ``tokens``.

    Args:
      model: Decoder, pruned or not; not modified.
      tokens: Numbers of the tokens to keep; with a tokenizer those of
        :func:`frequent_tokens`, or a list that is closed in the same sense.
      tokenizer: The ``tokenizers.Tokenizer`` of the model; None for none.

    Returns:
      The model and the tokenizer, None if there was none.

    Raises:
      TPPError: A number is no token of the model; the tokenizer is not one of byte-pair
        encoding; or it needs tokens that are not in the list.

    Example:
      >>> from tpp_jax.models import DecoderConfig
      >>> config = DecoderConfig(
      ...     vocabulary=50, width=16, depth=1, heads=2, kv_heads=1, head_size=8,
      ...     hidden=32,
      ... )
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> small, _ = keep_tokens(model, [3, 7, 9])
      >>> small(jnp.array([[0, 2]])).shape
      (1, 2, 3)
    """
    if not isinstance(model, Decoder):
        raise TPPError(
            f"this {type(model).__name__} is no tpp_jax.models.Decoder: its tokens are "
            "not known"
        )
    size = model.embed_tokens.embedding.shape[0]
    kept = sorted({int(token) for token in tokens})
    if not kept or not 0 <= kept[0] <= kept[-1] < size:
        raise TPPError(
            f"the tokens to keep must be numbers from 0 to {size - 1}, at least one"
        )
    small = None if tokenizer is None else _cut(tokenizer, kept)
    rows, new = np.array(kept), nnx.clone(model)
    fields: Json = vars(model.config) | {"vocabulary": len(kept)}
    new.config = type(model.config)(**fields)
    embedding = new.embed_tokens.embedding
    embedding.set_value(jnp.take(embedding.get_value(), rows, axis=0))
    new.embed_tokens.num_embeddings = len(kept)
    if hasattr(new, "lm_head"):
        kernel = new.lm_head.kernel
        kernel.set_value(jnp.take(kernel.get_value(), rows, axis=1))
        new.lm_head.out_features = len(kept)
    return new, small


def _content(tokenizer: Any) -> Json:
    """Returns a tokenizer's JSON, if it is of byte-pair encoding on bytes."""
    try:
        content: Json = json.loads(tokenizer.to_str())
        kind = content["model"]["type"]
    except (AttributeError, KeyError) as error:
        raise TPPError(
            f"this {type(tokenizer).__name__} is no tokenizers.Tokenizer: pass that of "
            "load_hf or load_gguf"
        ) from error
    vocabulary = content["model"].get("vocab")
    if kind != "BPE" or len(_bytes(vocabulary)) < 256:
        raise TPPError(
            f"the tokenizer is of the kind {kind} and has no token for each byte: only "
            "those of byte-pair encoding on bytes can be cut"
        )
    return content


def _bytes(vocabulary: dict[str, int]) -> list[str]:
    """Returns the tokens of single bytes, in either of the usual spellings."""
    written = [f"<0x{i:02X}>" for i in range(256)]
    if all(token in vocabulary for token in written):
        return written
    return [token for token in map(chr, _BYTES) if token in vocabulary]


# Bytes as printable characters, as GPT-2 writes them: those that are not printable
# follow 255 in order.
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = [*_PRINTED, *range(256, 512 - len(_PRINTED))]


def _merges(content: Json) -> list[tuple[str, str]]:
    pairs = [
        m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]
    ]
    return [(first, second) for first, second in pairs]


def _closed(content: Json, tokens: Iterable[int]) -> list[int]:
    """Returns tokens with all that the tokenizer needs to make them."""
    vocabulary: dict[str, int] = content["model"]["vocab"]
    token_of = {i: token for token, i in vocabulary.items()}
    made_of: dict[str, list[str]] = {}
    for first, second in _merges(content):
        made_of.setdefault(first + second, []).extend((first, second))
    queue = [token_of[i] for i in tokens if i in token_of] + _bytes(vocabulary)
    unknown = content["model"].get("unk_token")
    queue += [] if unknown is None else [unknown]
    found: set[str] = set()
    while queue:
        token = queue.pop()
        if token not in found:
            found.add(token)
            queue += made_of.get(token, ())
    special = {int(token["id"]) for token in content["added_tokens"]}
    named: set[int] = set()
    _renumbered(content["post_processor"], named.add)
    return sorted({vocabulary[token] for token in found} | special | named)


def _cut(tokenizer: Any, kept: Sequence[int]) -> Any:
    """Returns a tokenizer with some tokens only, renumbered in order."""
    content = _content(tokenizer)
    number = {token: i for i, token in enumerate(kept)}
    missing = [i for i in _closed(content, kept) if i not in number]
    if missing:
        names = ", ".join(repr(tokenizer.id_to_token(i)) for i in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise TPPError(
            f"the tokenizer needs {names}{more}, which are not kept: take the list of "
            "tpp_jax.models.frequent_tokens"
        )
    model = content["model"]
    vocabulary = {t: number[i] for t, i in model["vocab"].items() if i in number}
    model["merges"] = [
        list(pair)
        for pair in _merges(content)
        if {*pair, "".join(pair)} <= vocabulary.keys()
    ]
    model["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    for token in content["added_tokens"]:
        token["id"] = number[token["id"]]
    content["post_processor"] = _renumbered(
        content["post_processor"], lambda token: number[token]
    )
    if content.get("padding"):
        content["padding"]["pad_id"] = number.get(content["padding"]["pad_id"], 0)
    return type(tokenizer).from_str(json.dumps(content))


def _renumbered(processor: Any, number: Any) -> Any:
    """Returns a post-processor with other numbers of its special tokens."""
    if not processor:
        return processor
    new = dict(processor)
    match new["type"]:
        case "Sequence":
            new["processors"] = [_renumbered(p, number) for p in new["processors"]]
        case "TemplateProcessing":
            new["special_tokens"] = {
                name: token | {"ids": [number(i) for i in token["ids"]]}
                for name, token in new["special_tokens"].items()
            }
        case "RobertaProcessing" | "BertProcessing":
            for name in ("sep", "cls"):
                token, i = new[name]
                new[name] = [token, number(i)]
    return new
