"""Networks of third-party packages written in Flax Linen."""

import functools

import jax
import jax.numpy as jnp
from flax import linen

from tests.third_party.networks import Network, images, network, tokens


def _linen(module, *inputs, **kwargs):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(functools.partial(module.init, **kwargs))(keys, *inputs)
    return Network(module, inputs, variables, kwargs)


@network("nano-moe-jax", "nano_moe", heads=2)
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


@network("bidirectional-cross-attention-jax", heads=1)
def cross_attention():
    from bidirectional_cross_attention_jax import bidirectional_cross_attention_jax as m

    module = m.BidirectionalCrossAttention(dim=32, heads=4, dim_head=8, context_dim=24)
    return _linen(module, images(2, 7, 32), images(2, 5, 24))


@network("perceiver-jax", heads=4)
def perceiver():
    from perceiver_jax.perceiver_jax import Perceiver

    module = Perceiver(
        n_fourier_features=2,
        n_latents=8,
        latent_n_heads=4,
        latent_head_features=8,
        cross_n_heads=2,
        cross_head_features=8,
        ff_mult=2,
    )
    return _linen(module, images(2, 10, 8))


@network("vanilla-transformer-jax", "vtransformer")
def encoder_decoder():
    from vtransformer.model import Transformer

    module = Transformer(
        output_dim=40,
        src_vocab_size=40,
        trg_vocab_size=40,
        max_length=16,
        n_enc_layers=1,
        n_dec_layers=1,
    )
    mask = jnp.tril(jnp.ones((8, 8)))
    return _linen(
        module, tokens(2, 8, vocabulary=40), tokens(2, 8, vocabulary=40), mask
    )


def _memorax(torso, head=None):
    from memorax import networks as m

    module = m.Network(
        m.FeatureExtractor(observation_extractor=m.MLP(features=(16, 32))),
        torso,
        head or m.heads.DiscreteQNetwork(action_dim=5),
    )
    batch = 2, 6
    return _linen(
        module,
        images(*batch, 8),
        jnp.zeros(batch),
        tokens(*batch, vocabulary=5),
        images(*batch),
        jnp.zeros(batch),
    )


@network("memorax")
def min_gru():
    from memorax import networks as m

    return _memorax(m.Memoroid(cell=m.MinGRUCell(features=32)))


@network("memorax")
def lstm():
    from memorax import networks as m

    return _memorax(m.RNN(cell=linen.OptimizedLSTMCell(32)))


@network("memorax", heads=2)
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


@network("memorax")
def mlstm():
    from memorax import networks as m

    return _memorax(m.Memoroid(cell=m.mLSTMCell(features=32, hidden_dim=32)))


@network("memorax")
def mamba():
    from memorax import networks as m

    return _memorax(m.Memoroid(cell=m.MambaCell(features=32)))


@network("memorax", heads=2)
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


@network("transformers", heads=2)
def bert():
    inputs = _text_inputs("ids", "mask", "types", "positions", "none")
    return _transformers(
        "FlaxBertForSequenceClassification", "BertConfig", *inputs, **_TEXT
    )


@network("transformers", heads=2)
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


@network("transformers", heads=2)
def llama():
    inputs = _text_inputs("ids", "mask", "positions")
    settings = _TEXT | {"num_key_value_heads": 2}
    return _transformers("FlaxLlamaForCausalLM", "LlamaConfig", *inputs, **settings)


@network("transformers", heads=2)
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


@network("transformers")
def resnet():
    return _transformers(
        "FlaxResNetForImageClassification",
        "ResNetConfig",
        images(2, 32, 32, 3),
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
    )


@network("transformers", heads=6)
def t5():
    ids = tokens(2, 8, vocabulary=50)
    ones = jnp.ones((2, 8), "i4")
    return _transformers(
        "FlaxT5ForConditionalGeneration",
        "T5Config",
        ids,
        ones,
        ids,
        ones,
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
    )


@network("transformers", heads=2)
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
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=16,
    )
    return _linen(module, images(1, 3, 16, 16))


@network("flaxmodels")
def resnet18():
    from flaxmodels import ResNet18

    module = ResNet18(output="logits", pretrained=None, num_classes=5, normalize=False)
    return _linen(module, images(1, 32, 32, 3), train=False)
