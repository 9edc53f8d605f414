"""Networks of third-party packages that are functions of a tree: Equinox and Haiku."""

import functools

import jax

from tests.third_party.networks import Network, images, network, tokens

KEY = jax.random.key(0)


def _equinox(model, *inputs, call=None):
    """The model as its own parameters, called on one example at a time."""
    import equinox as eqx

    call = call or (lambda model, *inputs: model(*inputs))

    def fn(model, *inputs):
        return jax.vmap(functools.partial(call, model))(*inputs)

    return Network(fn, inputs, eqx.nn.inference_mode(model))


@network("equinox", narrows=True)
def mlp(part=1):
    import equinox as eqx

    model = eqx.nn.MLP(6, 4, 32 // part, 2, key=KEY)
    return _equinox(model, images(3, 6))


@network("equimo", heads=("blocks.*.attn.qkv",))
def vision_transformer():
    from equimo.models import VisionTransformer

    model = VisionTransformer(
        img_size=16,
        in_channels=3,
        dim=32,
        patch_size=4,
        num_heads=4,
        depths=[2],
        num_classes=5,
        key=KEY,
    )
    return _equinox(model, images(2, 3, 16, 16))


@network("equimo", narrows=True)
def convnext(part=1):
    from equimo.models import ConvNeXt

    dims = [16 // part, 32 // part]
    model = ConvNeXt(3, depths=[1, 1], dims=dims, num_classes=5, key=KEY)
    return _equinox(model, images(2, 3, 16, 16))


# One attribute is the number of heads of two groups, ``in_proj`` and ``attn.qk``. They
# would have to be one group, but none of their axes are alike: the channels of ``qk``
# are pairs for its rotation.
@network("equimo", heads=("blocks.*.attn.qk",), refused="(attention.py:1347")
def mlla():
    from equimo.models import Mlla

    model = Mlla(
        img_size=32,
        in_channels=3,
        dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        num_classes=5,
        key=KEY,
    )
    return _equinox(model, images(2, 3, 32, 32))


@network("pdequinox", narrows=True)
def u_net(part=1):
    import pdequinox

    model = pdequinox.arch.ClassicUNet(
        2, 1, 1, hidden_channels=8 // part, num_levels=2, key=KEY
    )
    return _equinox(model, images(2, 1, 16, 16))


@network("pdequinox", narrows=True)
def modern_res_net(part=1):
    import pdequinox

    model = pdequinox.arch.ModernResNet(
        2, 1, 1, hidden_channels=8 // part, num_blocks=2, key=KEY
    )
    return _equinox(model, images(2, 1, 16, 16))


@network("pdequinox", narrows=True)
def fourier_operator(part=1):
    import pdequinox

    model = pdequinox.arch.ClassicFNO(
        1, 1, 1, hidden_channels=8 // part, num_modes=4, num_blocks=2, key=KEY
    )
    return _equinox(model, images(2, 1, 16))


@network("megalodon-jax", heads=("model.layers.*.attn.wz",))
def language_model():
    from megalodon_jax import MegalodonConfig, MegalodonForCausalLM

    config = MegalodonConfig(
        vocab_size=50,
        model_dim=32,
        num_layers=2,
        num_heads=2,
        z_dim=16,
        value_dim=32,
        ffn_hidden_dim=48,
        cema_ndim=4,
        chunk_size=8,
        norm_num_groups=4,
        swiglu=True,
    )
    model = MegalodonForCausalLM(config, key=KEY)
    return Network(lambda model, x: model(x)[0], (tokens(2, 16, vocabulary=50),), model)


@network("transformer-flows", heads=("*.query_proj",))
def flow():
    from transformer_flows import TransformerFlow

    model = TransformerFlow(
        n_channels=1,
        img_size=8,
        patch_size=2,
        channels=32,
        n_blocks=2,
        layers_per_block=1,
        head_dim=8,
        key=KEY,
    )
    return _equinox(
        model, images(2, 1, 8, 8), call=lambda model, x: model.forward(x, None)[0]
    )


def _memax(layer):
    from memax.equinox.train_utils import get_residual_memory_model

    model = get_residual_memory_model(
        input=6, hidden=32, output=4, num_layers=2, model_name=layer, key=KEY
    )
    starts = jax.numpy.zeros((2, 8), bool)

    def call(model, x, start):
        return model(model.initialize_carry(), (x, start))[1]

    return _equinox(model, images(2, 8, 6), starts, call=call)


@network("memax")
def gru():
    return _memax("GRU")


@network("memax")
def s6():
    return _memax("S6")


@network("memax")
def delta_net():
    return _memax("DeltaNet")


def _haiku(build, *inputs):
    import haiku as hk

    transformed = hk.without_apply_rng(hk.transform(lambda *x: build()(*x)))
    params = transformed.init(jax.random.PRNGKey(0), *inputs)
    return Network(transformed.apply, inputs, params)


def _haiku_with_state(build, *inputs):
    import haiku as hk

    transformed = hk.transform_with_state(
        lambda *inputs, is_training: build()(*inputs, is_training=is_training)
    )
    key = jax.random.PRNGKey(0)
    params, state = transformed.init(key, *inputs, is_training=True)
    _, state = transformed.apply(params, state, None, *inputs, is_training=True)

    def fn(tree, *inputs):
        params, state = tree["params"], tree["state"]
        return transformed.apply(params, state, None, *inputs, is_training=False)[0]

    return Network(fn, inputs, {"params": params, "state": state})


@network("dm-haiku", "haiku")
def res_net():
    import haiku as hk

    def build():
        return hk.nets.ResNet(
            (1, 1, 1, 1), 5, channels_per_group=(16, 16, 32, 32), bottleneck=False
        )

    return _haiku_with_state(build, images(2, 32, 32, 3))


@network("dm-haiku", "haiku")
def mobilenet():
    import haiku as hk

    def build():
        return hk.nets.MobileNetV1(
            strides=(1, 2, 1), channels=(16, 32, 32), num_classes=5
        )

    return _haiku_with_state(build, images(2, 16, 16, 3))


@network("dm-haiku", "haiku", heads=("layer/multi_head_attention/query",))
def transformer_layer():
    import haiku as hk

    class Layer(hk.Module):
        def __call__(self, x):
            w_init = hk.initializers.VarianceScaling(1.0)
            norm = functools.partial(hk.LayerNorm, -1, True, True)
            x = hk.Linear(32)(x)
            y = norm()(x)
            x += hk.MultiHeadAttention(4, 8, w_init=w_init, model_size=32)(y, y, y)
            x += hk.nets.MLP([64, 32])(norm()(x))
            return hk.Linear(5)(x)

    return _haiku(Layer, images(2, 8, 6))


@network("dm-haiku", "haiku")
def recurrent():
    import haiku as hk

    class Recurrent(hk.Module):
        def __call__(self, x):
            core = hk.DeepRNN([hk.LSTM(16), hk.GRU(24)])
            y, _ = hk.dynamic_unroll(core, x, core.initial_state(2), time_major=False)
            return hk.Linear(5)(y)

    return _haiku(Recurrent, images(2, 8, 6))


@network("x-mlps")
def mixer():
    import x_mlps

    def build():
        return x_mlps.XMLP(
            num_patches=16,
            dim=32,
            depth=2,
            block=x_mlps.mlpmixer_block_factory,
            num_classes=5,
        )

    return _haiku(
        lambda: functools.partial(build(), is_training=False), images(2, 16, 12)
    )
