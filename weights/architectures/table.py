"""The architectures of GGUF files that are read."""

from weights.architectures.architecture import Architecture
from weights.architectures.delta import SPLIT, delta_layers, joined_rows, tiled_rows, untiled_outputs
from weights.architectures.gemma_4 import gemma_4_layers
from weights.architectures.latent import glm_experts, joined_latents, latent_layers
from weights.architectures.short_conv import short_conv_layers
from weights.huggingface import EXPERTS

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
TILED = {"by_layer": delta_layers, "rows": tiled_rows, "tensors": untiled_outputs}

ARCHITECTURES = {
    "llama": Architecture("llama", with_experts="mixtral", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture("qwen2_moe"),
    "qwen3moe": Architecture("qwen3_moe", config={"norm_topk_prob": True}),
    "qwen3next": Architecture("qwen3_next", modules=SPLIT, by_layer=delta_layers, rows=joined_rows),
    "qwen35": Architecture("qwen3_5_text", **TILED),
    "qwen35moe": Architecture("qwen3_5_moe_text", **TILED),
    "deepseek2": Architecture(
        "deepseek_v2",
        others=("deepseek_v3", "kimi_k2", "glm4_moe_lite", "youtu"),
        interleaved=True,
        by_layer=latent_layers,
        tensors=joined_latents,
    ),
    "glm4moe": Architecture("glm4_moe", by_layer=glm_experts),
    "lfm2": Architecture("lfm2", by_layer=short_conv_layers),
    "lfm2moe": Architecture("lfm2_moe", by_layer=short_conv_layers, modules=EXPERTS),
    "phi3": Architecture("phi3"),
    "smollm3": Architecture("smollm3", interleaved=True),
    "glm4": Architecture("glm4", interleaved=True),
    "seed_oss": Architecture("seed_oss"),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "exaone4": Architecture("exaone4"),
    "cohere2": Architecture("cohere2", interleaved=True, required=("logit_scale",)),
    "olmoe": Architecture("olmoe"),
    "granite": Architecture("granite", interleaved=True, required=("attention_multiplier",)),
    "granitemoe": Architecture("granitemoe", interleaved=True, required=("attention_multiplier",), modules=EXPERTS),
    "olmo2": Architecture("olmo2", with_window="olmo3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", required=CAPS, layers_scaled_by_dim=46),
    "gemma3": Architecture("gemma3_text", layers_scaled_by_dim=62),
    "gemma4": Architecture("gemma4_text", by_layer=gemma_4_layers),
}
