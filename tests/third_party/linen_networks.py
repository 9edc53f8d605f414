"""Networks of third-party packages written in Flax Linen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from tests.third_party.networks import Network, images, network, tokens


class Output(linen.Module):
    """One output of a module that also returns what it carries on."""

    module: linen.Module
    index: int

    def __call__(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)[self.index]


def _linen(module, *inputs, **kwargs):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(functools.partial(module.init, **kwargs))(keys, *inputs)
    return Network(module, inputs, variables, kwargs)


@network("nano-moe-jax", "nano_moe")
def mixture_of_experts():
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(
        vocab_size=50, n_layers=2, n_heads=4, d_model=32, d_ff=48, block_size=16
    )
    return _linen(NanoMoE(config), tokens(2, 8, vocabulary=50))


def _sequence(layer):
    from long_range_models import S4Module, SequenceModel

    module = SequenceModel(S4Module(16, 2, layer), num_tokens=20, pool=True, out_dim=4)
    return _linen(module, tokens(2, 12, vocabulary=20))


@network("long-range-models")
def s5():
    from long_range_models import S5Layer

    return _sequence(functools.partial(S5Layer, state_dim=8))


@network("long-range-models")
def lru():
    from long_range_models import LRULayer

    return _sequence(functools.partial(LRULayer, state_dim=8))


@network("bidirectional-cross-attention-jax", heads=("Dense_0",))
def cross_attention():
    from bidirectional_cross_attention_jax import bidirectional_cross_attention_jax as m

    module = m.BidirectionalCrossAttention(dim=32, heads=4, dim_head=8, context_dim=24)
    return _linen(module, images(2, 7, 32), images(2, 5, 24))


def _memorax(torso, part=1):
    from memorax import networks as m

    module = m.Network(
        m.FeatureExtractor(
            observation_extractor=m.MLP(features=(16 // part, 32 // part))
        ),
        torso,
        m.heads.VNetwork(),
    )
    batch = 2, 6
    return _linen(
        Output(module, 1),
        images(*batch, 8),
        jnp.zeros(batch),
        tokens(*batch, vocabulary=5),
        images(*batch),
        jnp.zeros(batch),
    )


@network("memorax", narrows=True)
def min_gru(part=1):
    from memorax import networks as m

    return _memorax(m.Memoroid(cell=m.MinGRUCell(features=32 // part)), part)


@network("memorax")
def lstm():
    from memorax import networks as m

    return _memorax(m.RNN(cell=linen.OptimizedLSTMCell(32)))


# ``features`` of the attention is the width of the stream, of which its empty memory is
# made, and the number of heads times their size: neither can be cut without the other.
@network("memorax", heads=("*.query",), refused="concatenate arrays with shapes")
def gated_transformer():
    from memorax import networks as m

    def attention():
        return m.SelfAttention(
            features=32,
            num_heads=4,
            context_length=6,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            kernel_init=linen.initializers.lecun_normal(),
            bias_init=linen.initializers.zeros_init(),
        )

    blocks = []
    for _ in range(2):
        blocks += [
            m.GatedResidual(m.PreNorm(attention())),
            m.Residual(m.PreNorm(m.GatedFFN(features=32))),
        ]
    return _memorax(m.Stack(blocks=tuple(blocks)))


@network("memorax", heads=("*.cell.q",))
def mlstm():
    from memorax import networks as m

    return _memorax(m.Memoroid(cell=m.mLSTMCell(features=32, hidden_dim=32)))


@network("memorax")
def mamba():
    from memorax import networks as m

    return _memorax(m.Memoroid(cell=m.MambaCell(features=32)))


@network("memorax", heads=("*.query",))
def vision_transformer():
    from memorax import networks as m

    module = m.ViT(patch_size=4, features=32, num_layers=2, num_heads=4)
    return _linen(module, images(2, 16, 16, 3))


def _transformers(name, config_name, *inputs, **settings):
    import transformers

    config = getattr(transformers, config_name)(**settings)
    model = getattr(transformers, name)
    module = model.module_class(config=config)
    return _linen(module, *inputs)


_TEXT = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=16,
)


def _text_inputs(*names):
    ones = jnp.ones((2, 8), "i4")
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    made = {
        "ids": tokens(2, 8, vocabulary=50),
        "mask": ones,
        "types": 0 * ones,
        "positions": positions,
        "none": None,
    }
    return [made[name] for name in names]


@network("transformers", heads=("*.self.query",))
def bert():
    inputs = _text_inputs("ids", "mask", "types", "positions", "none")
    return _transformers(
        "FlaxBertForSequenceClassification", "BertConfig", *inputs, **_TEXT
    )


@network("transformers", heads=("*.attn.c_attn",))
def gpt2():
    inputs = _text_inputs("ids", "mask", "positions")
    return _transformers(
        "FlaxGPT2LMHeadModel",
        "GPT2Config",
        *inputs,
        vocab_size=50,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
    )


@network("transformers", heads=("*.self_attn.q_proj",))
def llama():
    inputs = _text_inputs("ids", "mask", "positions")
    settings = _TEXT | {"num_key_value_heads": 2}
    return _transformers("FlaxLlamaForCausalLM", "LlamaConfig", *inputs, **settings)


@network("transformers", heads=("*.query",))
def vit():
    return _transformers(
        "FlaxViTForImageClassification",
        "ViTConfig",
        images(2, 16, 16, 3),
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )


@network("transformers", narrows=True)
def resnet(part=1):
    return _transformers(
        "FlaxResNetForImageClassification",
        "ResNetConfig",
        images(2, 32, 32, 3),
        embedding_size=16 // part,
        hidden_sizes=[16 // part, 32 // part],
        depths=[1, 1],
        layer_type="basic",
    )


@network("transformers", heads=("*.attention.q_proj",))
def wav2vec2():
    return _transformers(
        "FlaxWav2Vec2ForCTC",
        "Wav2Vec2Config",
        images(2, 400),
        vocab_size=12,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )


@network("diffusers")
def autoencoder():
    from diffusers.models.vae_flax import FlaxAutoencoderKL

    module = FlaxAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=2,
        norm_num_groups=8,
        sample_size=16,
    )
    image = images(1, 3, 16, 16)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)
    return Network(module, (image,), _drawn(shapes))


def _drawn(shapes):
    """Draws weights of large modules, which takes minutes to compile."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        value = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        return jnp.asarray(value + (path[-1].key == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@network("flaxmodels")
def resnet18():
    from flaxmodels import ResNet18

    module = ResNet18(output="logits", pretrained=None, num_classes=5, normalize=False)
    return _linen(module, images(1, 32, 32, 3), train=False)
