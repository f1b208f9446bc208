"""Models and calls for the tests of the CUDA path."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.cache import prefix_length
from engine.compile import compile_step
from engine.decode import decode_one_token, forward_chunk
from engine.sampling import Sampling
from engine.speculation.drafters import draft_one_token
from engine.speculation.speculative import verify
from layers.quantized import QuantSpec
from mixers.recurrent.delta_net import DeltaSizes
from mixers.recurrent.short_conv import ConvSizes
from model import ModelArgs, Transformer
from ranks import Ranks
from serving.scheduler import step_rows
from tests.cuda_offline.imagined_gpu import CUDA, FAKE, allow_fake_tensors
from tp import rank_args
from weights.checkpoint import fill, new_table
from weights.layout import Layout, ModelFile

GREEDY, SAMPLED = Sampling(temperature=0), Sampling()
PLAIN = ModelArgs(
    dim=256,
    n_layer=2,
    n_head=8,
    n_kv_head=4,
    head_dim=32,
    intermediate_size=512,
    vocab_size=1024,
    max_seq_length=4096,
)
FAMILIES = {
    "plain": PLAIN,
    "experts": replace(PLAIN, n_expert=8, n_expert_used=2),
    "biased": replace(PLAIN, qkv_bias=True, qk_norm=True),
    "sinks": replace(
        PLAIN,
        attention_sinks=True,
        wo_bias=True,
        rope_dim=8,
        unrotated_layers=(1,),
        n_expert=6,
        n_expert_used=6,  # all, of which rounding can choose no others
        sigmoid_experts=True,
        n_expert_group=3,
        n_group_used=3,
        shared_size=320,
        shared_gate=False,
        dense_layers=(0,),
        dense_size=320,
    ),
    "capped": replace(
        PLAIN,
        sliding_window=128,
        full_layers=(1,),
        attention_softcap=50.0,
        logit_softcap=30.0,
        norm_offset=True,
        post_norm=True,
        activation="gelu_tanh",
        tie_embeddings=True,
    ),
}
# whose layers differ too much for counts of kernels and caches
OTHERS = {
    "latent": replace(PLAIN, n_kv_head=8, head_dim=48, kv_latent=128, q_latent=128, value_dim=32, rope_dim=16),
    "delta": replace(
        PLAIN,
        delta=DeltaSizes(layers=(0,), n_key_head=4, n_value_head=8, key_dim=32, value_dim=32, n_tap=4),
        attention_gate=True,
        qk_norm=True,
        rope_dim=8,
    ),
    "short convolutions": replace(PLAIN, short_conv=ConvSizes(layers=(0,), width=256, n_tap=3), qk_norm=True),
    "two head sizes": replace(
        PLAIN,
        n_layer=4,
        sliding_window=128,
        full_layers=(1, 3),
        full_head_dim=64,
        full_kv_head=2,
        keys_as_values=True,
        value_norm=True,
        qk_norm=True,
        n_reusing_layer=2,
        layer_input_size=32,
        layer_scales=True,
        post_norm=True,
        activation="gelu_tanh",
        n_expert=8,
        n_expert_used=2,
        separate_experts=True,
        shared_size=320,
        shared_gate=False,
    ),
    "biased experts": replace(
        PLAIN,
        attention_sinks=True,
        qkv_bias=True,
        wo_bias=True,
        ffn_bias=True,
        sliding_window=128,
        full_layers=(1,),
        n_expert=6,
        n_expert_used=2,
        activation="clamped_swiglu",
    ),
}
FORMATS = {"bf16": None, "int8": QuantSpec(8), "int4": QuantSpec(4, 32)}
SHIPPED = {  # which only files of other programs have
    "float8": QuantSpec(8, 128, "float8"),
    "int8.zeros": QuantSpec(8, 64, "int8.zeros"),
    "float4": QuantSpec(4, 32, "float4"),
    "nf4": QuantSpec(4, 64, "nf4"),
}
PRUNED = {"2:4": QuantSpec(pattern="2:4")}  # which experts do not have


def fake_model(
    args: ModelArgs,
    spec: QuantSpec | None,
    dtype: torch.dtype = torch.bfloat16,
    ranks: Ranks | None = None,
    head: str = "int8",
) -> Transformer:
    """The product's own model on fake CUDA tensors, packed for the device. head: of a quantised one, as `new_table`."""
    allow_fake_tensors()
    layout = Layout(args if ranks is None else rank_args(args, ranks.size))  # its meta tensors are real, and cached
    layout = layout.quantized(new_table(ModelFile(layout, {}), spec, "", head))
    with FAKE, mock.patch("model.has_finite_rope", lambda args: True):  # fake tables have no values
        state = {
            name: torch.empty(like.shape, dtype=like.dtype if layout.keeps_dtype(name) else dtype, device=CUDA)
            for name, like in layout.tensors.items()
        }
        return fill(layout, state, args, ranks)


@contextlib.contextmanager
def fake_ranks(size: int) -> Iterator[Ranks]:
    """The first of `size` ranks; the others are not there, and collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield Ranks(0, size, 0, size, None)
    finally:
        dist.destroy_process_group()


def zeros(*shape: int) -> torch.Tensor:
    with FAKE, torch.inference_mode():
        return torch.zeros(shape, dtype=torch.long, device=CUDA)


def call_of(name: str, model: Transformer, n_rows: int, sampling: Sampling = SAMPLED) -> tuple[Callable, tuple]:
    """A compiled function of the engine, and its arguments for n_rows rows of 300 tokens in a cache of 1024 slots."""
    with FAKE, torch.inference_mode():
        cache = model.new_cache(n_rows, 1024)
        view = cache.view(length=prefix_length(cache, 300))
    token, pos = zeros(n_rows, 1), zeros(n_rows, 1)
    calls = {
        "step": (decode_one_token, (token, pos, view, sampling)),
        "served step": (step_rows, (token, pos, view._replace(cache_rows=zeros(n_rows)))),
        "verification": (verify, (zeros(n_rows, 2 + 4), pos, view, zeros(n_rows, 1), None, sampling)),
        "long verification": (verify, (zeros(n_rows, 2 + 63), pos, view, zeros(n_rows, 1), None, sampling)),
        "draft": (draft_one_token, (zeros(n_rows, 2), zeros(n_rows, 2), view, None, sampling)),
        "prompt": (forward_chunk, (zeros(n_rows, 250), zeros(n_rows, 250), view)),
    }
    function, arguments = calls[name]
    return compile_step(function, CUDA, any_length=name == "prompt"), (model, *arguments)
