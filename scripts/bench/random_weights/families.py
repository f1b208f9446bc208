"""The kinds of families: decoding with random weights, against the rate at which one large matrix is read.

Each has the widths of a real model, but fewer layers and experts and a vocabulary of 32,000, so that it takes at most
2 GB. Weights that a token uses, states and caches count as read. Wanted: 80 % of the rate in bf16, 70 % in 4 bits.
Prompts of gated DeltaNet, in bf16, stand beside those of a dense model of as many weights, and transformers'.
"""

import time
from functools import partial

import torch

from engine.cache import row_bytes
from engine.engine import Engine, build_engine
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
SPECS = {"bf16": None, "int8": QuantSpec(8), "int4": QuantSpec(4, 32)}
SPECS |= {"MXFP4": QuantSpec(4, 32, "float4"), "FP8": QuantSpec(8, 128, "float8")}
ROWS = [(family, precision) for family in FAMILIES for precision in ("bf16", "int4")]
ROWS += [("gpt-oss", "MXFP4"), ("Llama", "MXFP4"), ("Llama", "FP8"), ("Llama", "int8")]
PROMPT = 2048  # tokens
AS_LARGE = DENSE | {"num_hidden_layers": 9}  # as many weights as the model of gated DeltaNet has
SHIPPED = {"MXFP4": "int4", "FP8": "int8"}  # formats beside ours of about as many bytes
PARTS, SAME = ("found", "prompts", "formats"), ("threads", "new_tokens")


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
    if "Llama" in families and set(SHIPPED) <= set(precisions):
        report.once(report.result, "formats", partial(measure_formats, Case(1, 8, new_tokens), rounds))
    if "Qwen3.5" in families and "bf16" in precisions:
        report.once(report.result, "prompts", partial(measure_prompts, rounds))


def args_of(family: str) -> ModelArgs:
    return args_from_config(Config(FAMILIES[family] | SMALL))


def measure_formats(case: Case, rounds: int) -> dict:
    """Decoding of one model in each shipped format and in ours, in turn."""
    names = [name for pair in SHIPPED.items() for name in pair]
    engines = {name: build_engine(random_model(args_of("Llama"), quantize=SPECS[name]), compile=True) for name in names}

    def run(engine: Engine) -> dict[str, float]:
        rate = measure_case(engine, case)["decode_tok_s"]
        return {"decode_tok_s": rate, "weights_gb": weight_bytes(engine.model) / GB}

    return take_turns(rounds, {name: partial(run, engine) for name, engine in engines.items()})


@torch.inference_mode()
def measure_prompts(rounds: int) -> dict:
    """A prompt through gated DeltaNet, through attention in every layer, and through transformers' gated DeltaNet."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = torch.arange(PROMPT)[None] * 7 % SMALL["vocab_size"]
    config = AutoConfig.for_model(**DELTA | SMALL)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    delta = build_engine(random_model(args_of("Qwen3.5")))
    dense = build_engine(random_model(args_from_config(Config(AS_LARGE | SMALL))))

    def read(forward) -> dict[str, float]:
        began = time.perf_counter()
        forward()
        return {"prefill_tok_s": PROMPT / (time.perf_counter() - began)}

    def engine_reads(engine) -> dict[str, float]:
        return {"prefill_tok_s": measure_case(engine, Case(1, PROMPT, 2))["prefill_tok_s"]}

    sides = {"gated DeltaNet": partial(engine_reads, delta), "attention": partial(engine_reads, dense)}
    sides["transformers' gated DeltaNet"] = partial(read, lambda: theirs(tokens, use_cache=True, logits_to_keep=1))
    return take_turns(rounds, sides)


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
    parts = [markdown(["shape of", "decode", "weights a token", "state and cache", "of a large matrix's rate"], rows)]
    if result["formats"]:
        found = {name: facts["median"] for name, facts in result["formats"].items()}
        read = {name: facts["decode_tok_s"] * facts["weights_gb"] for name, facts in found.items()}
        rows = [[f"{a}, against {b}"] for a, b in SHIPPED.items()]
        for row, (a, b) in zip(rows, SHIPPED.items(), strict=True):
            row += [f"{found[name]['decode_tok_s']:.1f} tok/s" for name in (a, b)] + [f"x{read[a] / read[b]:.2f}"]
        parts.append(markdown(["shape of Llama", "decode", "ours", "bytes a second, to ours"], rows))
    if result["prompts"]:
        rates = {side: facts["median"]["prefill_tok_s"] for side, facts in result["prompts"].items()}
        rows = [[side, f"{rate:.0f} tok/s (x{rates['gated DeltaNet'] / rate:.2f})"] for side, rate in rates.items()]
        parts.append(markdown([f"prompt of {PROMPT}, as many weights, bf16", "prefill"], rows))
    return "\n\n".join(parts)
