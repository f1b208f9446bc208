"""The model against itself taken the slow way, against published sizes and against transformers' rope."""

import json
import math
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.compile import compile_step
from engine.decode import decode_one_token
from engine.sampling import Sampling
from mixers.rope import RopeScaling, rope_table
from model import ModelArgs, Transformer
from tests.tiny import continuation
from weights.checkpoint import build
from weights.layout import Layout
from weights.registry import REGISTRY, args_from_name

TINY = ModelArgs(
    dim=32, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, intermediate_size=48, vocab_size=64, max_seq_length=512
)
LLAMA3 = RopeScaling("llama3", 4.0, 1.0, 4.0, 16)
VARIANTS = {
    "plain": TINY,
    "multi-head": replace(TINY, n_kv_head=4),
    "multi-query": replace(TINY, n_kv_head=1),
    "window": replace(TINY, sliding_window=5),
    "llama3 rope": replace(TINY, rope_scaling=LLAMA3),
    "linear rope": replace(TINY, rope_scaling=RopeScaling("linear", 3.0)),
    "yarn rope": replace(TINY, rope_scaling=RopeScaling("yarn", 4.0, 1.0, 8.0, 16, attention_factor=1.2)),
    "windows in turn": replace(TINY, sliding_window=5, full_layers=(1,), window_rope_base=100.0, rope_scaling=LLAMA3),
    "scales and caps": replace(
        TINY,
        attention_scale=0.2,
        attention_softcap=4.0,
        embedding_scale=3.0,
        residual_scale=0.6,
        logit_scale=0.7,
        logit_softcap=9.0,
    ),
    "four norms, gelu": replace(TINY, norm_offset=True, post_norm=True, activation="gelu_tanh"),
    "experts": replace(TINY, n_expert=5, n_expert_used=2, normalize_experts=False),
    "a shared expert": replace(TINY, n_expert=3, n_expert_used=1, shared_size=16),
    "part of rope": replace(
        TINY,
        rope_dim=4,
        unrotated_layers=(1,),
        rope_scaling=RopeScaling("yarn", 4.0, 1.0, 8.0, 4, attention_factor=1.2),
        late_query_scale=0.3,
    ),
    "longrope": replace(
        TINY, rope_scaling=RopeScaling("longrope", 1.0, 1.0, 4.0, 16, (1.0,) * 4, (1.0, 1.5, 2.0, 3.0))
    ),
    "norms last": replace(TINY, qk_norm=True, qk_norm_last=True, mean_norm=True, parallel=True),
    "no gate, learned positions": replace(
        TINY,
        gated=False,
        activation="relu2",
        mean_norm=True,
        norm_bias=True,
        ffn_bias=True,
        learned_positions=True,
        unrotated_layers=(0, 1),
    ),
    "sinks and biases": replace(TINY, attention_sinks=True, wo_bias=True, ffn_bias=True, n_expert=3, n_expert_used=2),
    "latent attention": replace(TINY, n_kv_head=4, kv_latent=28, q_latent=12, value_dim=6, rope_dim=4),
    "experts scored alone": replace(
        TINY,
        n_expert=6,
        n_expert_used=2,
        sigmoid_experts=True,
        n_expert_group=3,
        n_group_used=2,
        expert_scale=1.5,
        shared_size=16,
        shared_gate=False,
        dense_layers=(0,),
        dense_size=24,
    ),
    "layers that differ": replace(
        TINY,
        n_layer=6,
        sliding_window=5,
        full_layers=(1, 3, 5),
        full_head_dim=12,
        full_kv_head=1,
        rope_scaling=RopeScaling("proportional", part=0.5),
        window_rope_base=100.0,
        qk_norm=True,
        value_norm=True,
        keys_as_values=True,
        n_reusing_layer=3,
        reusing_size=64,
        layer_input_size=6,
        layer_scales=True,
    ),
    "separate experts": replace(
        TINY, n_expert=5, n_expert_used=2, shared_size=16, shared_gate=False, separate_experts=True, layer_scales=True
    ),
    "joint norms": replace(TINY, pre_norm=False, post_norm=True, joint_qk_norm=True),
    "bias, norms, tied": replace(TINY, qkv_bias=True, qk_norm=True, tie_embeddings=True, head_dim=12),
}
GREEDY = Sampling(temperature=0)
pytestmark = pytest.mark.usefixtures("one_thread")


def random_tiny(args, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = Layout(args).tensors
    return build(
        args, {n: (0.3 * torch.randn(meta.shape, generator=generator)).to(dtype) for n, meta in shapes.items()}
    )


def random_tokens(batch_size, length):
    return torch.randint(TINY.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(1))


def full_forward(model, tokens):
    """Logits [B, S, V] of one forward without a cache."""
    return model(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape))


@pytest.mark.parametrize("prefix", [False, True], ids=["whole cache", "slots prefix"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_prefill_and_steps_equal_one_forward(variant, prefix):
    model, tokens = random_tiny(VARIANTS[variant]), random_tokens(2, 24)
    expected = full_forward(model, tokens)
    cache = model.new_cache(2, 64).view(length=24 if prefix else None)
    pos = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(model(tokens[:, :9], pos[:, :9], cache), expected[:, :9])
    for i in range(9, 24):
        step = model(tokens[:, i : i + 1], pos[:, i : i + 1], cache)
        torch.testing.assert_close(step[:, 0], expected[:, i])


@pytest.mark.parametrize(
    "variant", ["plain", "window", "part of rope", "windows in turn", "sinks and biases", "layers that differ"]
)
@torch.inference_mode()
def test_ragged_rows_equal_each_row_alone(variant):
    model, lengths, n_new = random_tiny(VARIANTS[variant]), [3, 17, 9], 8
    tokens = random_tokens(3, max(lengths) + n_new)
    alone = [full_forward(model, row[None])[0] for row in tokens]

    cache = model.new_cache(3, 64).view()
    padded = tokens[:, : max(lengths)].clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 0
    last = torch.tensor(lengths)[:, None] - 1
    logits = model(padded, torch.arange(max(lengths)).expand(3, -1), cache, last)[:, 0]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(logits[row], alone[row][length - 1])
    for i in range(1, n_new + 1):
        pos = last + i
        logits = model(tokens.gather(1, pos), pos, cache)[:, 0]
        for row in range(3):
            torch.testing.assert_close(logits[row], alone[row][pos[row, 0]])


@torch.inference_mode()
def test_rows_picks_the_positions_whose_logits_are_wanted():
    model, tokens = random_tiny(TINY), random_tokens(2, 12)
    expected = full_forward(model, tokens)
    rows = torch.tensor([[0, 11, 4], [7, 7, 2]])
    got = model(tokens, torch.arange(12).expand(2, -1), rows=rows)
    torch.testing.assert_close(got, torch.stack([expected[row, rows[row]] for row in range(2)]))


@pytest.mark.parametrize(
    "variant",
    ["plain", "multi-query", "windows in turn", "scales and caps", "sinks and biases", "layers that differ"],
)
def test_gradients_of_a_forward_without_a_cache_are_its_slopes(variant):
    """Of layers as model.py has them: the packed forms are for inference."""
    model, tokens = Transformer(VARIANTS[variant]), random_tokens(2, 12)
    model.load_state_dict(random_tiny(VARIANTS[variant]).state_dict())
    weights = [block.attention.wqkv.weight for block in model.layers]
    loss = full_forward(model, tokens).square().mean()
    loss.backward()
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(weight.shape, generator=generator) for weight in weights]
    slope = sum((weight.grad * way).sum() for weight, way in zip(weights, directions, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for weight, way in zip(weights, directions, strict=True):
                weight += step * way
            ends.append(full_forward(model, tokens).square().mean())
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-3, rtol=1e-2, atol=1e-3)


@torch.inference_mode()
def test_a_window_hides_what_lies_before_it():
    model, tokens = random_tiny(replace(TINY, n_layer=1, sliding_window=5)), random_tokens(1, 12)
    expected = full_forward(model, tokens)[0, -1]
    tokens[:, :7] = 0  # the last position sees itself and the four before it
    torch.testing.assert_close(full_forward(model, tokens)[0, -1], expected)
    tokens[:, 7] = (tokens[:, 7] + 1) % TINY.vocab_size
    assert not torch.allclose(full_forward(model, tokens)[0, -1], expected)


def greedy(model, prompts, n_new, step):
    cache = model.new_cache(len(prompts), 1024)
    return continuation(model, cache, prompts, n_new + 1, step=step).T.tolist()


@pytest.mark.parametrize(
    "variant",
    ["windows in turn", "scales and caps", "joint norms", "part of rope", "sinks and biases"]
    + ["layers that differ", "separate experts", "latent attention"],
)
def test_compiled_step_equals_plain_step_and_serves_every_length(variant):
    torch._dynamo.reset()
    model = random_tiny(VARIANTS[variant])
    prompts = random_tokens(2, 247).tolist()
    prompts[1] = prompts[1][:30]
    expected = greedy(model, prompts, 20, decode_one_token)
    step = compile_step(decode_one_token, torch.device("cpu"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert greedy(model, prompts, 20, step) == expected  # slot 256 is crossed on the way
        assert greedy(model, [prompt * 2 for prompt in prompts], 5, step)  # and 512


# Published parameter counts, of the models' pages or of transformers' num_parameters().
PUBLISHED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B": 7_241_732_096,
    "TinyLlama-1.1B": 1_100_048_384,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen3-30B-A3B": 30_532_122_624,
    "SmolLM2-135M": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_registry_sizes_add_up_to_the_published_count(name):
    assert sum(meta.numel() for meta in Layout(args_from_name(name)).tensors.values()) == PUBLISHED[name]


def test_from_name_is_exact():
    assert args_from_name("Llama-3.1-8B") is REGISTRY["Llama-3.1-8B"]
    for name in ("llama-2-7b", "Llama-2-7B-chat", "7B", ""):
        with pytest.raises(ValueError, match="Llama-2-7B, .*SmolLM2-135M"):
            args_from_name(name)


@pytest.mark.parametrize("args", [*REGISTRY.values(), *VARIANTS.values()])
def test_args_survive_json(args):
    assert ModelArgs.from_dict(json.loads(json.dumps(args.to_dict()))) == args


def test_frequency_factors_survive_json():
    args = replace(TINY, rope_scaling=RopeScaling("factors", factors=(1.0, 1.0, 2.5, 8.0)))
    assert ModelArgs.from_dict(json.loads(json.dumps(args.to_dict()))) == args


HOSTILE = ["x", "7", None, True, -1, 0, 2.5, math.nan, math.inf, 10**9, 10**400, [1], {}]


@pytest.mark.parametrize("field", [field.name for field in fields(ModelArgs)])
def test_no_field_takes_what_is_no_size(field):
    for value in HOSTILE:
        try:
            args = ModelArgs.from_dict(replace(TINY, sliding_window=5).to_dict() | {field: value})
        except ValueError as error:
            assert field in str(error) or field in ("rope_scaling", "delta", "short_conv"), error
        else:  # what was taken is what the field is for
            kept = getattr(args, field)
            assert type(kept) in (bool, int, float, type(None), tuple) and kept not in (-1, math.inf), (field, value)
            assert type(kept) is not tuple or (field.endswith("_layers") and kept == (1,))
            Layout(args)


@pytest.mark.parametrize("field", [field.name for field in fields(RopeScaling)])
def test_no_rope_field_takes_what_is_no_factor(field):
    for value in ["x", None, True, -1, 0, math.nan, math.inf, 10**400, [[1.0]], ["x"], {"a": 1}]:
        if field == "whole_pairs" and value is True:
            continue
        scaling = {"type": "llama3", "factor": 2.0, field: value}
        with pytest.raises(ValueError):
            ModelArgs.from_dict(TINY.to_dict() | {"rope_scaling": scaling})


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_angles_of_rope_are_finite_or_refused(kind):
    extremes, refused = (1e-30, 0.5, 1.0, math.nextafter(1, 2), 1e30), 0
    for base, factor, low, high in product(extremes, repeat=4):
        try:
            args = replace(TINY, rope_base=base, rope_scaling=RopeScaling(kind, factor, low, high, 1 << 24))
        except ValueError:
            refused += 1
        else:
            assert all(table.isfinite().all() for table in rope_table(args, torch.arange(TINY.max_seq_length)))
    assert 0 < refused < len(extremes) ** 4


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ValueError, match="n_planet"):
        ModelArgs.from_dict(TINY.to_dict() | {"n_planet": 8})
    with pytest.raises(ValueError, match="vocab_size"):
        ModelArgs.from_dict({k: v for k, v in TINY.to_dict().items() if k != "vocab_size"})
    with pytest.raises(ValueError, match="3 frequency factors"):
        replace(TINY, rope_scaling=RopeScaling("factors", factors=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.2-1B"])
def test_llama3_rope_frequencies_equal_those_of_transformers(name):
    args = args_from_name(name)
    scaling = args.rope_scaling
    config = LlamaConfig(
        hidden_size=args.dim,
        num_attention_heads=args.n_head,
        head_dim=args.head_dim,
        max_position_embeddings=args.max_seq_length,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": args.rope_base,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert attention_factor == 1.0
    plain = 1.0 / args.rope_base ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    found = scaling.apply(plain, args.rope_base)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    assert not torch.equal(found, plain)


def test_models_with_different_eps_compile_in_one_process():
    for eps in (1e-5, 1e-6, 1e-4):
        model = random_tiny(replace(TINY, norm_eps=eps))
        cache = model.new_cache(1, 512)
        token, pos = torch.tensor([[7]]), torch.tensor([[0]])
        steps = (decode_one_token, compile_step(decode_one_token, model.device))
        with torch.inference_mode():
            answers = [step(model, token, pos, cache.view(length=256), GREEDY)[0] for step in steps]
        assert torch.equal(*answers)
