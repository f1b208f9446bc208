"""Folders that other programs have quantised, as published descriptions and other libraries have them."""

import json
import re
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4Config,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kernels import cpu
from tests.tiny import SIZES, allocated, save_tiny
from tp import require_split, shard
from weights.checkpoint import load_model, open_model
from weights.layout import LEAVES

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(60)[None]
SMALL = SIZES | {"hidden_size": 128, "intermediate_size": 192}
PLAIN = LlamaConfig(**SMALL)
BIASES = Qwen2Config(**SMALL)
MOE = Qwen3MoeConfig(**SMALL, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
HALF_ROPE = Glm4Config(**SMALL, head_dim=32)  # neighbours turn in half of each head: its rows come in another order
CONFIGS = {"plain": PLAIN, "biases": BIASES, "experts": MOE, "half rope": HALF_ROPE}
GLM_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2}
CONFIGS["biased choice"] = Glm4MoeConfig(**SMALL, head_dim=32, moe_intermediate_size=64, **GLM_EXPERTS)
LATENT = {"kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 32}
LATENT |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 64}
CONFIGS["latent"] = DeepseekV3Config(**SMALL | LATENT | GLM_EXPERTS | {"num_key_value_heads": 4})
# with the shared expert's of one layer, and the five of latent attention; others have four in each of two
N_LAYERS = {"biased choice": 10, "latent": 16}
LAYER = re.compile(r"(.*(?:_proj|_proj_with_mqa|experts\.\d+\.\w+))\.weight")


# ---------------------------------------------------------------- files as other programs write them, written by hand


def random(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def parts(out, n_in, groupsize, bits, seed, symmetric=False):
    """Unsigned codes [out, in], points and float16 scales [out, groups], and w = (code - point) * scale in float64."""
    groups = n_in // groupsize
    codes = (random(out, n_in, seed=seed) * 2**bits).long()
    points = (random(out, groups, seed=seed + 1) * (2**bits - 1)).long() + 1
    points = torch.full_like(points, 2 ** (bits - 1)) if symmetric else points
    scales = ((0.5 + random(out, groups, seed=seed + 2)) / 2**bits).half()
    return codes, points, scales


def exact(codes, points, scales, group_of):
    return (codes - points[:, group_of]).double() * scales[:, group_of].double()


def words(codes, bits, places=None):
    """[..., n] codes as int32 [..., n * bits / 32]; places: of a word's nibble i is code places[i] of its run."""
    n = 32 // bits
    runs = codes.unflatten(-1, (-1, n)).tolist()

    def word(run):
        value = sum(run[place] << bits * i for i, place in enumerate(places or range(n)))
        return value - (1 << 32) if value >> 31 else value

    return torch.tensor([[word(run) for run in row] for row in runs], dtype=torch.int32)


def awq(groupsize):
    """AutoAWQ's GEMM: [in, out], the nibbles of a word are outputs 0 2 4 6 1 3 5 7."""

    def pack(out, n_in, seed):
        size = n_in if groupsize == -1 else groupsize
        codes, points, scales = parts(out, n_in, size, 4, seed)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        file = {"qweight": words(codes.T, 4, order), "qzeros": words(points.T, 4, order), "scales": scales.T}
        return file, exact(codes, points, scales, torch.arange(n_in) // size)

    return {"quant_method": "awq", "bits": 4, "group_size": groupsize, "version": "gemm", "zero_point": True}, pack


def gptq(bits, groupsize, sym, desc_act=False, version="gptq"):
    """AutoGPTQ: words of inputs; the points are one less in version 1, and in words of outputs."""

    def pack(out, n_in, seed):
        size = n_in if groupsize == -1 else groupsize
        codes, points, scales = parts(out, n_in, size, bits, seed, sym)
        group_of = torch.arange(n_in) // size
        if desc_act:  # one order for all layers of so many inputs, as one calibration makes it
            group_of = group_of[torch.randperm(n_in, generator=torch.Generator().manual_seed(n_in))]
        stored = points - 1 if version == "gptq" else points
        file = {"qweight": words(codes.T.T, bits).T, "qzeros": words(stored.T, bits), "scales": scales.T}
        return file | {"g_idx": group_of.int()}, exact(codes, points, scales, group_of)

    settings = {"bits": bits, "group_size": groupsize, "sym": sym, "desc_act": desc_act, "checkpoint_format": version}
    return {"quant_method": "gptq"} | settings, pack


def float8(block, leaf):
    """DeepSeek's, or one scale for a row or a tensor."""

    def pack(out, n_in, seed):
        codes = ((random(out, n_in, seed=seed) - 0.5) * 100).to(torch.float8_e4m3fn)
        rows, columns = block or (1, n_in)
        scales = 0.01 + random(-(-out // rows), -(-n_in // columns), seed=seed + 1) / 100
        scales = scales[:1, :1] if block is None and leaf == "weight_scale_inv" else scales
        each = scales.double().repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :n_in]
        scales = scales if block or len(scales) > 1 else scales[0, 0]
        file = {"weight": codes, leaf: scales, "input_scale": torch.tensor(0.5)}
        return file, codes.double() * each

    return {"quant_method": "fp8", "weight_block_size": block and list(block)}, pack


def bitsandbytes(out, n_in, seed):
    codes, _, scales = parts(out, n_in, n_in, 8, seed, symmetric=True)
    codes, scales = (codes - 128).to(torch.int8), scales.bfloat16().float()
    file = {"weight": codes, "SCB": 127 * scales[:, 0], "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return file, codes.double() * scales.double()


NF4 = (-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)  # as it is published
NF4 += (-0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634)
NF4 += (0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1)
TABLES = {"nf4": NF4, "fp4": [sign * each / 12 for sign in (1, -1) for each in (0, 0.0625, 8, 12, 4, 6, 2, 3)]}


def bitsandbytes4(kind, block, double):
    """Blocks of the flat weight, its even numbers in the high nibbles; double: the largest weights are rounded too."""

    def pack(out, n_in, seed):
        codes = (random(out * n_in // 2, 2, seed=seed) * 16).long()
        table, n = torch.tensor(TABLES[kind]), -(-out * n_in // block)
        state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [out, n_in]}
        file = {"weight": (codes[:, :1] * 16 + codes[:, 1:]).to(torch.uint8), "weight.quant_map": table}
        absmax = 0.5 + random(n, seed=seed + 1)
        file |= {"weight.absmax": absmax}
        if double:
            own, scales = (256 * random(n, seed=seed + 2)).to(torch.uint8), random(-(-n // 256), seed=seed + 3)
            file |= {"weight.absmax": own, "weight.nested_absmax": scales}
            file["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.25}
            absmax = torch.linspace(-1, 1, 256)[own.long()] * scales.repeat_interleave(256)[:n] + 1.25
        file[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor([*json.dumps(state).encode()]).to(torch.uint8)
        each = absmax.double().repeat_interleave(block)[: out * n_in]
        return file, (table[codes.flatten()].double() * each).view(out, n_in)

    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}, pack


def compressed(form, **weights):
    """By the library compressed-tensors itself."""

    def pack(out, n_in, seed):
        library = pytest.importorskip("compressed_tensors.quantization")
        from compressed_tensors.compressors import BaseCompressor

        args = library.QuantizationArgs(**weights)
        scheme = library.QuantizationScheme(targets=["Linear"], weights=args)
        rows, columns = weights.get("block_structure", (1, weights.get("group_size", n_in)))
        n_row, n_column = (1, 1) if weights["strategy"] == "tensor" else (-(-out // rows), -(-n_in // columns))
        is_float8 = args.type == "float" and args.num_bits == 8
        scale = (0.5 + random(n_row, n_column, seed=seed)) * (0.01 if is_float8 else 2.0**-args.num_bits)
        state = {"weight": (random(out, n_in, seed=seed + 1) - 0.5) * 4, "weight_scale": scale.bfloat16().float()}
        if not args.symmetric:
            state["weight_zero_point"] = (random(n_row, n_column, seed=seed + 2) * 9 - 4).to(torch.int8)
        if n_row == n_column == 1:
            state["weight_scale"] = state["weight_scale"].view(1)
        if weights["strategy"] == "tensor_group":
            state |= {"weight_global_scale": torch.tensor([64.0]), "weight_scale": 64 * scale}
        compressor = BaseCompressor.get_value_from_registry(form)
        file = compressor.compress(state, scheme)
        weight = compressor.decompress(file, scheme)["weight"]
        is_narrow = file["weight_scale"].itemsize == 1
        return file | ({} if is_narrow else {"weight_scale": file["weight_scale"].bfloat16()}), weight

    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}, pack


INT4, INT8 = {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
METHODS = {
    "awq g32": (*awq(32), "int4.g32"),
    "awq g64": (*awq(64), "int4.g64"),
    "awq of rows": (*awq(-1), "int4.g64 int4.g128"),
    "gptq int4": (*gptq(4, 32, sym=True), "int4.g32"),
    "gptq int4 asym": (*gptq(4, 64, sym=False), "int4.g64"),
    "gptq v2": (*gptq(4, 32, sym=False, version="gptq_v2"), "int4.g32"),
    "gptq int8": (*gptq(8, 64, sym=True), "int8.g64"),
    "gptq int8 of rows": (*gptq(8, -1, sym=True), "int8"),
    "gptq int8 asym": (*gptq(8, 32, sym=False), "int8.zeros.g32"),
    "gptq desc_act": (*gptq(4, 32, sym=False, desc_act=True), "int4.g32.ordered"),
    "gptq int8 desc_act": (*gptq(8, 32, sym=True, desc_act=True), "int8.g32.ordered"),
    "fp8 blocks": (*float8((128, 128), "weight_scale_inv"), "float8 float8.g64"),
    "fp8 blocks of rows": (*float8((64, 32), "weight_scale_inv"), "float8.g32"),
    "fp8 rows": (*float8(None, "weight_scale"), "float8"),
    "fp8": (*float8(None, "weight_scale_inv"), "float8"),
    "W4A16": (*compressed("pack-quantized", **INT4, symmetric=True, strategy="group", group_size=64), "int4.g64"),
    "W4A16 asym": (*compressed("pack-quantized", **INT4, symmetric=False, strategy="group", group_size=32), "int4.g32"),
    "W8A16": (*compressed("pack-quantized", **INT8, symmetric=True, strategy="channel"), "int8"),
    "W8A16 asym": (*compressed("pack-quantized", **INT8, symmetric=False, strategy="channel"), "int8.zeros"),
    "W8A8": (*compressed("int-quantized", **INT8, symmetric=True, strategy="channel"), "int8"),
    "W8A8 asym": (*compressed("int-quantized", **INT8, symmetric=False, strategy="channel"), "int8.zeros"),
    "FP8 of rows": (*compressed("float-quantized", **FP8, strategy="channel"), "float8"),
    "FP8 of tensors": (*compressed("float-quantized", **FP8, strategy="tensor"), "float8"),
    "FP8 of blocks": (*compressed("float-quantized", **FP8, strategy="block", block_structure=[64, 32]), "float8.g32"),
}


METHODS |= {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes, "int8"),
    "nf4": (*bitsandbytes4("nf4", 64, double=True), "nf4.g64"),
    "fp4, blocks over rows": (*bitsandbytes4("fp4", 128, double=False), "fp4.g64 fp4.g128"),
    "NVFP4": (*compressed("nvfp4-pack-quantized", **FP4, strategy="tensor_group", group_size=16), "float4.g16"),
    "MXFP4": (*compressed("mxfp4-pack-quantized", **FP4, strategy="group", group_size=32), "float4.g32"),
}


def quantise(folder, method, only=LAYER):
    """Quantise a folder's layers: their weights in float64 by name. In `float` lies the folder with float weights."""
    settings, pack, _ = METHODS[method]
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    weights, file = {}, dict(state)
    for i, (name, weight) in enumerate(state.items()):
        if only.fullmatch(name):
            tensors, weights[name] = pack(*weight.shape, seed=3 * i)
            layer = file.pop(name) is weight and name.removesuffix(".weight")
            file |= {f"{layer}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}
    (folder / "float").mkdir()
    save_file(state | {name: weight.float() for name, weight in weights.items()}, folder / "float/model.safetensors")
    (folder / "float/config.json").write_text(json.dumps(config))
    save_file(file, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return weights


def logits_of_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")(IDS).logits


@torch.inference_mode()
@pytest.mark.parametrize(
    "kind, method",
    [
        *(("plain", method) for method in METHODS),
        *(("experts", name) for name in ("awq g32", "gptq desc_act", "gptq int8 asym", "W8A16", "fp8 blocks")),
        *(("biases", name) for name in ("awq g32", "gptq desc_act")),
        *product(("half rope", "biased choice", "latent"), ("awq g32", "gptq desc_act", "fp8 blocks")),
    ],
)
def test_a_quantised_folder_is_the_model_of_its_weights(kind, method, tmp_path):
    save_tiny(CONFIGS[kind], tmp_path)
    quantise(tmp_path, method)
    opened = open_model(tmp_path)
    assert {str(spec) for spec in opened.table.values()} <= set(METHODS[method][2].split())
    assert len(opened.table) == N_LAYERS.get(kind, 8)
    floats, truth = (open_model(tmp_path / name, dequantize=True).tensors for name in (".", "float"))
    for module in opened.table:  # nothing is rounded again
        assert torch.equal(floats[f"{module}.weight"](), truth[f"{module}.weight"]()), module
        kept = opened.tensors
        if f"{module}.zeros" in kept:  # kernels read them together
            assert kept[f"{module}.zeros"]().dtype == kept[f"{module}.scales"]().dtype
    assert floats.keys() == truth.keys()
    ours, theirs = load_model(tmp_path, dtype=torch.float32), logits_of_transformers(tmp_path / "float")
    torch.testing.assert_close(ours(IDS, IDS), theirs, atol=1e-4 * theirs.abs().max().item(), rtol=1e-4)
    if cpu.available():  # else codes become floats
        near = 0.05 if method.startswith(("nf4", "fp4")) else 0.02  # 16 numbers a tile are much of layers so small
        assert opened.layout.loaded_bytes(torch.float32) == pytest.approx(allocated(ours), rel=near)


@torch.inference_mode()
def test_a_gate_that_is_quantised_becomes_float_and_an_old_key_is_read(tmp_path):
    save_tiny(MOE, tmp_path)
    quantise(tmp_path, "fp8 rows", re.compile(r"(.*(?:_proj|gate|experts\.\d+\.\w+))\.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(open_model(tmp_path).table) == 8
    ours, theirs = load_model(tmp_path, dtype=torch.float32), logits_of_transformers(tmp_path / "float")
    torch.testing.assert_close(ours(IDS, IDS), theirs, atol=1e-4 * theirs.abs().max().item(), rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("method", ["awq g32", "fp8 rows"])
def test_layers_left_float_stay_so_and_mixed_ones_become_float(method, tmp_path):
    save_tiny(PLAIN, tmp_path)
    quantise(tmp_path, method, re.compile(r"(.*layers\.0.*(?:v|down)_proj)\.weight"))
    assert open_model(tmp_path).table.keys() == {"layers.0.feed_forward.w2"}  # of q, k and v only v has codes
    ours, theirs = load_model(tmp_path, dtype=torch.float32), logits_of_transformers(tmp_path / "float")
    torch.testing.assert_close(ours(IDS, IDS), theirs, atol=1e-4 * theirs.abs().max().item(), rtol=1e-4)


@torch.inference_mode()
def test_fp8_equals_what_transformers_makes_of_the_folder(tmp_path):
    save_tiny(PLAIN, tmp_path)
    quantise(tmp_path, "fp8 blocks of rows")
    ours, theirs = load_model(tmp_path, dtype=torch.float32), logits_of_transformers(tmp_path)
    torch.testing.assert_close(ours(IDS, IDS), theirs, atol=1e-4 * theirs.abs().max().item(), rtol=1e-4)


GPT_OSS = GptOssConfig(**SMALL | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2})
EXPERTS = re.compile(r"(.*\.experts\.(?:gate_up|down)_proj)")


def quantise_experts(folder):
    """As gpt-oss is shipped, and in `float` what transformers makes of it."""
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    file, floats = {}, {}
    for i, (name, weight) in enumerate(state.items()):
        if EXPERTS.fullmatch(name):
            E, n_in, out = weight.shape
            file[f"{name}_blocks"] = (256 * random(E, out, n_in // 32, 16, seed=i)).to(torch.uint8)
            file[f"{name}_scales"] = (118 + 6 * random(E, out, n_in // 32, seed=i)).to(torch.uint8)
            parts = (file[f"{name}_{part}"].clone() for part in ("blocks", "scales"))
            floats[name] = convert_moe_packed_tensors(*parts, dtype=torch.float32).contiguous()
        else:
            file[name] = floats[name] = weight
    (folder / "float").mkdir()
    save_file(floats, folder / "float/model.safetensors")
    (folder / "float/config.json").write_text(json.dumps(config))
    save_file(file, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))


@torch.inference_mode()
def test_gpt_oss_as_it_is_shipped(tmp_path):
    save_tiny(GPT_OSS, tmp_path)
    quantise_experts(tmp_path)
    opened = open_model(tmp_path)
    experts = [f"layers.{i}.feed_forward.{part}" for i in (0, 1) for part in ("w13", "w2")]
    assert {name: str(spec) for name, spec in opened.table.items()} == dict.fromkeys(experts, "float4.g32")
    floats, truth = (open_model(tmp_path / name, dequantize=True).tensors for name in (".", "float"))
    for module in experts:
        assert torch.equal(floats[f"{module}.weight"](), truth[f"{module}.weight"]()), module
        assert opened.tensors[f"{module}.weight"]().numel() * 2 == truth[f"{module}.weight"]().numel()
    ours, theirs = load_model(tmp_path, dtype=torch.float32), logits_of_transformers(tmp_path / "float")
    torch.testing.assert_close(ours(IDS, IDS), theirs, atol=1e-4 * theirs.abs().max().item(), rtol=1e-4)
    require_split(opened.args, opened.table, 2)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    for leaf, change, words in (
        ("scales", lambda t: t.fill_(255), "down_proj.scales holds scales that are NaN"),
        ("blocks", lambda t: t[:, :, 1:], r"down_proj.blocks has shape \[4, 128, 5, 16\]; \[4, 128, 6, 16\] is needed"),
        ("blocks", lambda t: t.float(), "down_proj.blocks is a tensor of torch.float32; bytes"),
    ):
        changed = change(state[f"{name}_{leaf}"].clone()).contiguous()
        save_file(state | {f"{name}_{leaf}": changed}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=words):
            load_model(tmp_path)


def settings(**changes):
    """Changes quantization_config; ... removes a key."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        values = config["quantization_config"] | changes
        config["quantization_config"] = {key: value for key, value in values.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def tensor(leaf, change):
    """Changes a tensor of the first layer's v."""

    def of_folder(folder):
        state, name = load_file(folder / "model.safetensors"), f"model.layers.0.self_attn.v_proj.{leaf}"
        save_file(state | {name: change(state[name]).contiguous()}, folder / "model.safetensors")

    return of_folder


def without(leaf):
    """Removes a tensor of the first layer's v."""

    def of_folder(folder):
        state = load_file(folder / "model.safetensors")
        del state[f"model.layers.0.self_attn.v_proj.{leaf}"]
        save_file(state, folder / "model.safetensors")

    return of_folder


def first(value):
    return lambda t: t.index_fill(0, torch.tensor([0]), value)


REFUSED = {
    "a width": ("awq g32", settings(bits=3), "bits is 3.*supported: 4"),
    "a packing": ("awq g32", settings(version="gemv"), "version is 'gemv'.*supported: 'gemm'"),
    "small groups": ("awq g32", settings(group_size=8), "q_proj has groups of 8 of its 128 inputs; a multiple of 16"),
    "other groups": ("awq g32", settings(group_size=64), r"(the scales of|qzeros) .*has shape"),
    "short codes": ("awq g32", tensor("qweight", lambda t: t[:-1]), r"v_proj.qweight has shape \[127, 8\].*128, 8"),
    "narrow codes": ("awq g32", tensor("qweight", lambda t: t[:, :-1]), r"wqkv.weight has shape .*sizes need"),
    "codes of floats": (
        "awq g32",
        tensor("qweight", lambda t: t.float()),
        "v_proj.qweight is a tensor of torch.float32",
    ),
    "a scale of zero": ("awq g32", tensor("scales", first(0)), "scales of .*v_proj.*zero, NaN or infinite"),
    "a scale of NaN": ("gptq int4", tensor("scales", first(torch.nan)), "scales of .*v_proj.*zero, NaN or infinite"),
    "no zeros": ("awq g32", without("qzeros"), "lacks the tensor model.layers.0.self_attn.v_proj.qzeros"),
    "no sym": ("gptq int4 asym", settings(sym=True), "q_proj.qzeros are not symmetric, though the config says sym"),
    "uneven groups": ("gptq desc_act", tensor("g_idx", first(3)), "v_proj has groups that are not of 32 inputs each"),
    "a g_idx below 0": (
        "gptq desc_act",
        tensor("g_idx", first(-1)),
        "v_proj has groups that are not of 32 inputs each",
    ),
    "settings by layer": ("gptq int4", settings(dynamic={"-:.*v_proj": {}}), "dynamic.* not supported"),
    "no scales": ("gptq int4", settings(group_size=...), "group_size is missing"),
    "blocks": (
        "fp8 blocks of rows",
        settings(weight_block_size=[64, 64]),
        r"weight_scale_inv has shape \[2, 4\].*2, 2",
    ),
    "half a block": ("fp8 blocks of rows", settings(weight_block_size=[64]), r"weight_block_size is \[64\]; two sizes"),
    "an FP8 of NaN": (
        "fp8 rows",
        tensor("weight", lambda t: (t.float() * torch.nan).to(t.dtype)),
        "v_proj.weight holds NaN",
    ),
    "FP8 of e5m2": ("fp8 rows", tensor("weight", lambda t: t.float().to(torch.float8_e5m2)), "float8_e5m2; codes of"),
    "compressed": ("W8A8", settings(format="marlin-24"), "format 'marlin-24' of 8-bit int weights is not supported"),
    "sparse": ("W8A8", settings(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is set"),
    "FP4 in other groups": (
        "NVFP4",
        settings(config_groups={"a": {"targets": ["Linear"], "weights": FP4 | {"group_size": 32}}}),
        "group_size is 32, which is not supported; supported: 16",
    ),
    "a global scale of zero": ("NVFP4", tensor("weight_global_scale", first(0)), "weight_global_scale .*zero, NaN"),
    "neither 4 nor 8 bits": ("bitsandbytes", settings(load_in_8bit=False), "load_in_8bit is False, which is not"),
    "another table": (
        "nf4",
        tensor("weight.quant_map", first(-0.9)),
        "quant_map holds other numbers than those of nf4",
    ),
    "fp4 called nf4": ("nf4", settings(bnb_4bit_quant_type="fp4"), "lacks the tensor .*bitsandbytes__fp4"),
    "no state": (
        "nf4",
        tensor("weight.quant_state.bitsandbytes__nf4", first(0)),
        "bitsandbytes__nf4 does not tell the layer's shape",
    ),
    "blocks of NaN": (
        "fp4, blocks over rows",
        tensor("weight.absmax", first(torch.nan)),
        "weight.absmax holds scales that are NaN",
    ),
    "half the codes": ("nf4", tensor("weight", lambda t: t[1:]), r"v_proj.weight, in bytes, has shape .* is needed"),
    "tiles": ("bitsandbytes", tensor("weight_format", lambda t: t + 1), "v_proj has codes in tiles; rows"),
    "no target": (
        "W8A8",
        settings(config_groups={"a": {"targets": ["re:.*mlp"], "weights": INT8 | {"strategy": "channel"}}}),
        "q_proj is quantised, and no group",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_contradicts_itself_is_refused_in_words(name, tmp_path):
    method, change, words = REFUSED[name]
    save_tiny(PLAIN, tmp_path)
    quantise(tmp_path, method)
    change(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, method",
    [
        ("plain", "awq g32"),
        ("plain", "fp8 blocks of rows"),
        ("biases", "fp8 rows"),
        ("experts", "W8A16"),
        ("latent", "W8A16"),
        ("plain", "NVFP4"),
    ],
)
def test_a_rank_has_its_part_of_codes_scales_and_zeros(kind, method, tmp_path):
    save_tiny(CONFIGS[kind], tmp_path)
    quantise(tmp_path, method)
    opened, floats = open_model(tmp_path), open_model(tmp_path, dequantize=True)
    require_split(opened.args, opened.table, 2)
    for rank, (module, spec) in product(range(2), opened.table.items()):
        names = [f"{module}.{leaf}" for leaf in LEAVES if f"{module}.{leaf}" in opened.tensors]
        parts = {name: shard(name, opened.tensors[name](), opened.args, rank, 2) for name in names}
        weight = spec.layer(**{name.rpartition(".")[2]: part for name, part in parts.items()}).dequantize()
        name = f"{module}.weight"
        assert torch.equal(weight, shard(name, floats.tensors[name](), opened.args, rank, 2)), module


def test_ranks_refuse_an_order_of_inputs(tmp_path):
    save_tiny(PLAIN, tmp_path)
    quantise(tmp_path, "gptq desc_act")
    opened = open_model(tmp_path)
    with pytest.raises(ValueError, match="order of its own .*desc_act.*ranks cannot share; give --dequantize"):
        require_split(opened.args, opened.table, 2)
