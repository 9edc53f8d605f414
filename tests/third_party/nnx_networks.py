"""Networks of third-party packages written in Flax NNX."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.third_party.networks import Network, images, network, tokens


class Output(nnx.Module):
    """One output of a model that also returns caches or losses."""

    def __init__(self, model, pick):
        self.model = model
        self.pick = pick

    def __call__(self, *inputs):
        return self.pick(self.model(*inputs))


@network("mamba2-jax", heads=("*.mixer.in_proj",), narrows=True)
def language_model(part=1):
    import mamba2_jax as m

    config = m.Mamba2Config(
        vocab_size=60,
        hidden_size=32 // part,
        state_size=8 // part,
        head_dim=16 // part,
        chunk_size=8,
        num_hidden_layers=2,
    )
    model = m.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    model = Output(model, lambda out: out["logits"])
    return Network(model, (tokens(2, 16, vocabulary=60),))


@network("mamba2-jax", heads=("*.mixer.in_proj",))
def forecaster():
    import mamba2_jax as m

    model = m.Mamba2Forecaster(
        5,
        d_model=32,
        n_layers=2,
        forecast_horizon=6,
        d_state=8,
        headdim=16,
        chunk_size=8,
        rngs=nnx.Rngs(0),
    )
    return Network(model, (images(2, 16, 5),))


def _mamba3(**settings):
    import mamba3_jax as m

    config = m.Mamba3Config(
        vocab_size=60,
        hidden_size=32,
        state_size=8,
        head_dim=16,
        chunk_size=8,
        num_hidden_layers=2,
        **settings,
    )
    model = m.Mamba3ForCausalLM(config, rngs=nnx.Rngs(0))
    model = Output(model, lambda out: out["logits"])
    return Network(model, (tokens(2, 16, vocabulary=60),))


@network("mamba3-jax", heads=("*.mixer.in_proj",))
def siso():
    return _mamba3()


@network("mamba3-jax", heads=("*.mixer.in_proj",))
def mimo():
    return _mamba3(is_mimo=True, mimo_rank=2)


def _graph():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(7, size=(2, 15)).astype(np.int32))


@network("jraphx", narrows=True)
def gcn(part=1):
    from jraphx.nn.models import GCN

    model = GCN(6, 16 // part, 3, 4, norm="batch_norm", rngs=nnx.Rngs(0))
    return Network(model, (images(7, 6), _graph()))


@network("jraphx", heads=("convs.*.lin",))
def gat():
    from jraphx.nn.models import GAT

    model = GAT(6, 16, 3, 4, heads=4, norm="layer_norm", rngs=nnx.Rngs(0))
    return Network(model, (images(7, 6), _graph()))


@network("jraphx", heads=("convs.*.lin_l",))
def gat_v2():
    from jraphx.nn.models import GAT

    model = GAT(6, 16, 3, 4, v2=True, heads=4, jk="cat", rngs=nnx.Rngs(0))
    return Network(model, (images(7, 6), _graph()))


@network("jraphx")
def graph_sage():
    from jraphx.nn.models import GraphSAGE

    model = GraphSAGE(6, 16, 3, 4, jk="lstm", rngs=nnx.Rngs(0))
    return Network(model, (images(7, 6), _graph()))


@network("jraphx")
def gin():
    from jraphx.nn.models import GIN

    model = GIN(6, 16, 3, 4, norm="graph_norm", residual=True, rngs=nnx.Rngs(0))
    return Network(model, (images(7, 6), _graph()))


def _dantinox(**settings):
    from core.config import Config
    from core.model import Transformer

    config = Config(
        dim=32,
        n_heads=4,
        head_size=8,
        num_blocks=2,
        vocab_size=50,
        max_context=16,
        gradient_checkpointing=False,
        dropout_rate=0.0,
        **settings,
    )
    model = Output(Transformer(config, nnx.Rngs(0)), lambda out: out.logits)
    return Network(model, (tokens(2, 8, vocabulary=50), False, None, 0, True))


@network("dantinox", heads=("model.blocks.*.attention.qkv",))
def grouped_queries():
    return _dantinox(kv_heads=2)


@network("dantinox", heads=("model.blocks.*.attention.up_q",))
def latent_attention():
    return _dantinox(mla=True, down_dim_q=16, down_dim_kv=16, rope_dim=4, kv_heads=4)


@network("dantinox", heads=("model.blocks.*.attention.qkv",))
def experts():
    return _dantinox(use_moe=True, norm_type="rmsnorm", kv_heads=2)


@network("dantinox", heads=("model.blocks.*.attention.qkv.base",))
def lora():
    return _dantinox(use_lora=True, lora_targets="all", lora_rank=4, kv_heads=4)


def _positions(batch, length):
    return jnp.broadcast_to(jnp.arange(length), (batch, length))


def _causal(batch, length):
    return jnp.broadcast_to(
        jnp.tril(jnp.ones((length, length), bool)), (batch, length, length)
    )


@network("google-tunix", "tunix", heads=("model.layers.*.attn.q_proj",), narrows=True)
def llama3(part=1):
    from tunix.models.llama3 import model as m

    # Half of the queries of each key-value head.
    config = m.ModelConfig(
        num_layers=2,
        vocab_size=50,
        embed_dim=32 // part,
        hidden_dim=48 // part,
        num_heads=4 // part,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10000,
        norm_eps=1e-6,
    )
    model = m.Llama3(config, rngs=nnx.Rngs(0))
    model = Output(model, lambda out: out[0])
    inputs = tokens(2, 8, vocabulary=50), _positions(2, 8), None, _causal(2, 8)
    return Network(model, inputs)


def _qwen3(**settings):
    from tunix.models.qwen3 import model as m

    config = m.ModelConfig(
        num_layers=2,
        vocab_size=50,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        **settings,
    )
    model = Output(m.Qwen3(config, rngs=nnx.Rngs(0)), lambda out: out[0])
    inputs = tokens(2, 8, vocabulary=50), _positions(2, 8), None, _causal(2, 8)
    return Network(model, inputs)


@network("google-tunix", "tunix", heads=("model.layers.*.attn.q_proj",))
def qwen3():
    return _qwen3()


@network("google-tunix", "tunix", heads=("model.layers.*.attn.q_proj",))
def qwen3_experts():
    return _qwen3(num_experts=4, num_experts_per_tok=2)


@network("google-tunix", "tunix", heads=("model.layers.*.attn.q_einsum",))
def gemma3():
    from tunix.models.gemma3 import model as m

    config = m.ModelConfig(
        num_layers=2,
        num_embed=50,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        sliding_window_size=4,
        param_dtype=jnp.float32,
    )
    model = Output(m.Gemma3(config, rngs=nnx.Rngs(0)), lambda out: out[0])
    inputs = tokens(2, 8, vocabulary=50), _positions(2, 8), None, _causal(2, 8)
    return Network(model, inputs)


def _attnax(**settings):
    import attnax

    config = attnax.TransformerConfig(
        vocab_size=50,
        d_model=32,
        num_heads=4,
        num_layers=2,
        d_ff=48,
        max_len=16,
        **settings,
    )
    model = attnax.TransformerDecoder(nnx.Rngs(0), config)
    return Network(model, (tokens(2, 8, vocabulary=50),))


@network("attnax", heads=("layers.*.self_attn.query_proj",))
def rotary_decoder():
    return _attnax(pos_emb_type="rope", ff_activation="swiglu", num_kv_heads=2)


@network("attnax", heads=("layers.*.self_attn.query_proj",))
def linear_attention():
    return _attnax(
        attention_type="linear", norm_type="rms", linear_attention_chunk_size=4
    )


@network("attnax", heads=("layers.*.self_attn.query_proj",))
def vision_transformer():
    import attnax

    config = attnax.VisionTransformerConfig(
        image_size=16,
        patch_size=4,
        num_classes=5,
        d_model=32,
        num_heads=4,
        num_layers=2,
        d_ff=48,
    )
    model = attnax.VisionTransformer(nnx.Rngs(0), config)
    return Network(model, (images(2, 16, 16, 3),))


@network("jax-image-models", "jimm", heads=("*.query",))
def vit():
    from jimm.models.vit import VisionTransformer

    # Its layers name shardings, so that it runs under a mesh only.
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"))
    with jax.set_mesh(mesh):
        model = VisionTransformer(
            num_classes=5,
            img_size=16,
            patch_size=4,
            num_layers=2,
            num_heads=4,
            mlp_dim=48,
            hidden_size=32,
            rngs=nnx.Rngs(0),
        )
    inputs = (images(2, 16, 16, 3),)
    return Network(model, inputs, context=lambda: jax.set_mesh(mesh))


@network("vitax", heads=("*.query",))
def vision_transformer_():
    from vitax import VisionTransformer

    with nnx.use_eager_sharding(False):
        model = VisionTransformer(
            num_classes=5,
            img_size=16,
            patch_size=4,
            num_layers=2,
            num_heads=4,
            mlp_dim=48,
            hidden_size=32,
            rngs=nnx.Rngs(0),
        )
    inputs = (images(2, 16, 16, 3),)
    return Network(model, inputs, context=lambda: nnx.use_eager_sharding(False))


@network("jaxkit", narrows=True)
def fully_connected(part=1):
    from jaxkit.fully_connected import FullyConnectedBlock

    model = FullyConnectedBlock(6, 32 // part, 4, rngs=nnx.Rngs(0))
    return Network(model, (images(3, 6),))


@network("maxtext", heads=("*.self_attention.query",))
def scanned_llama():
    from benchmarks.maxtext import made

    model = made()
    return Network(model, (tokens(1, 8, vocabulary=64), jnp.arange(8)[None]))
