"""The kinds of families: decoding with random weights, against the rate at which one large matrix is read.

Each has the widths of a real model, but fewer layers and experts and a vocabulary of 32,000, so that it takes at most
2 GB. Weights that a token uses, states and caches count as read. Wanted: 80 % of the rate in bf16, 70 % in 4 bits.
"""

from functools import partial

import torch

from engine.cache import row_bytes
from engine.engine import build_engine
from layers.quantized import QuantSpec
from measure.machine import measured_bandwidth
from model import ModelArgs
from scripts.bench.peers.protocol import Case
from scripts.bench.report import Report, markdown, shared_flags, take_turns
from scripts.bench.sides import measure_case
from weights.checkpoint import random_model
from weights.families.table import args_from_config
from weights.files import GB, Config
from weights.layout import weight_bytes

SMALL = {"vocab_size": 32000, "max_position_embeddings": 8192}
DENSE = {"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4}
DENSE |= {"intermediate_size": 6144, "num_hidden_layers": 8}
DELTA = {"model_type": "qwen3_5_text", "hidden_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2}
DELTA |= {"head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128}
DELTA |= {"linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4}
DELTA |= {"intermediate_size": 6144, "num_hidden_layers": 8}
SHORT_CONV = {"model_type": "lfm2", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8}
SHORT_CONV |= {"conv_L_cache": 3, "block_auto_adjust_ff_dim": False, "intermediate_size": 8192, "num_hidden_layers": 8}
SHORT_CONV |= {"full_attn_idxs": [2, 5]}
GEMMA_4 = {"model_type": "gemma4_text", "hidden_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 1}
GEMMA_4 |= {"head_dim": 256, "global_head_dim": 512, "sliding_window": 512, "intermediate_size": 6144}
GEMMA_4 |= {"num_hidden_layers": 10, "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 256}
GEMMA_4 |= {"use_double_wide_mlp": True, "vocab_size_per_layer_input": 32000}
GPT_OSS = {"model_type": "gpt_oss", "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8}
GPT_OSS |= {"head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 2880}
GPT_OSS |= {"sliding_window": 128, "num_hidden_layers": 3}
LATENT = {"model_type": "deepseek_v2", "hidden_size": 2048, "num_attention_heads": 16, "kv_lora_rank": 512}
LATENT |= {"q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
LATENT |= {"num_key_value_heads": 16, "n_routed_experts": 16, "num_experts_per_tok": 6, "n_shared_experts": 2}
LATENT |= {"moe_intermediate_size": 1408, "intermediate_size": 10944, "num_hidden_layers": 5}
LATENT |= {"first_k_dense_replace": 1}
GLM = {"model_type": "glm4_moe", "hidden_size": 4096, "num_attention_heads": 96, "num_key_value_heads": 8}
GLM |= {"head_dim": 128, "n_routed_experts": 16, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 1}
GLM |= {"moe_intermediate_size": 1408, "intermediate_size": 10944, "num_hidden_layers": 2, "first_k_dense_replace": 1}
GLM |= {"topk_group": 1}
FAMILIES = {
    "Llama": DENSE,
    "Qwen3.5": DELTA,
    "LFM2": SHORT_CONV,
    "Gemma-4": GEMMA_4,
    "gpt-oss": GPT_OSS,
    "DeepSeek-V2-Lite": LATENT,
    "GLM-4.5-Air": GLM,
}
SPECS = {"bf16": None, "int4": QuantSpec(4, 32)}
SPECS |= {"MXFP4": QuantSpec(4, 32, "float4"), "FP8": QuantSpec(8, 128, "float8")}
ROWS = [(family, precision) for family in FAMILIES for precision in ("bf16", "int4")]
ROWS += [("gpt-oss", "MXFP4"), ("Llama", "MXFP4"), ("Llama", "FP8")]
PARTS, SAME = ("found",), ("threads", "new_tokens")


def add_flags(parser) -> None:
    shared_flags(parser, "benchmarks/families.json", rounds=3, model="")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    parser.add_argument("--precisions", nargs="+", choices=SPECS, default=list(SPECS), help="default: all")
    parser.add_argument("--new_tokens", type=int, default=40, help="tokens decoded (default: %(default)s)")


def fill(report: Report, *, families: list[str], precisions: list[str], rounds: int, new_tokens: int, **_) -> None:
    for family, precision in ROWS:
        if family in families and precision in precisions:
            args, case = args_of(family), Case(1, 8, new_tokens)
            report.once(
                report.result["found"], f"{family}, {precision}", partial(measure, args, SPECS[precision], case, rounds)
            )


def args_of(family: str) -> ModelArgs:
    return args_from_config(Config(FAMILIES[family] | SMALL))


def measure(args: ModelArgs, spec: QuantSpec | None, case: Case, rounds: int) -> dict:
    """Decoding, and its share of the rate of one large matrix."""
    engine = build_engine(random_model(args, quantize=spec), compile=True)
    read = {"weights_gb": weight_bytes(engine.model) / GB, "cache_gb": row_bytes(engine.model, case.length) / GB}
    cpu, size = torch.device("cpu"), sum(read.values())

    def run() -> dict[str, float]:
        rates = [measured_bandwidth(cpu)]
        decode = measure_case(engine, case)["decode_tok_s"]
        rates.append(measured_bandwidth(cpu))  # a machine that others use differs from second to second
        return {"decode_tok_s": decode, "share": decode * size / (sum(rates) / 2)}

    return take_turns(rounds, {"decode": run})["decode"] | read


def table(result: dict) -> str:
    rows = []
    for name, facts in result["found"].items():
        rate, share = facts["median"]["decode_tok_s"], facts["median"]["share"]
        rows.append([name, f"{rate:.1f} tok/s", f"{facts['weights_gb']:.3f} GB", f"{facts['cache_gb'] * 1e3:.1f} MB"])
        rows[-1].append(f"{share:.0%}")
    return markdown(["shape of", "decode", "weights a token", "state and cache", "of a large matrix's rate"], rows)
