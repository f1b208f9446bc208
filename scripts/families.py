"""Write README's table of families, whose last column comes from the tables of families and of GGUF architectures."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.begin()

import re

import cli
from weights.architectures.table import ARCHITECTURES
from weights.families.table import FAMILIES

README = cli.ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- end -->)", re.DOTALL)
NAMES = {  # what the families of these model types are called, and what their mathematics has besides
    "llama": "Llama 1-3, CodeLlama, TinyLlama, SmolLM2, Llama 3.1-3.3 (scaled rope), with biases too",
    "smollm3": "SmolLM3 (layers without rope)",
    "mistral": "Mistral, Mistral Nemo (sliding window, head size)",
    "ministral3": "Ministral 3: the text part (queries scaled by position)",
    "qwen2 qwen3": "Qwen2, Qwen2.5 (biases), Qwen3 (q/k norms)",
    "mixtral": "Mixtral (experts)",
    "qwen2_moe qwen3_moe": "Qwen1.5-MoE, Qwen2-MoE (a shared expert), Qwen3-MoE, with experts in some layers too",
    "qwen3_next qwen3_5_text qwen3_5_moe_text": "Qwen3-Next, Qwen3.5 and 3.6, with and without experts: gated DeltaNet "
    "(the part for text)",
    "lfm2 lfm2_moe": "LFM2 and 2.5: short convolutions between gates, with and without experts",
    "gpt_oss": "gpt-oss (sinks, biases, clamped activation)",
    "gemma gemma2 gemma3_text": "Gemma 1, 2, 3: of a vision-language model, the text part (soft caps, windows in turn, "
    "four norms)",
    "gemma4_text": "Gemma 4: the text part of E2B, E4B, 12B, 31B and 26B-A4B (heads of two sizes, keys of earlier "
    "layers, inputs of each layer)",
    "phi3": "Phi-3, Phi-4, Phi-4-mini (fused weights, partial rope, longrope)",
    "glm4": "GLM-4 (partial rope, four norms)",
    "glm4_moe": "GLM-4.5, 4.6 (first layers dense, experts scored one by one)",
    "deepseek_v2 deepseek_v3 kimi_k2": "DeepSeek-V2, V2-Lite, V3, R1, Kimi K2 (latent attention, experts in groups)",
    "glm4_moe_lite youtu": "GLM-4.7-Flash, Youtu-LLM (latent attention)",
    "minicpm3": "MiniCPM3 (latent attention, scales)",
    "seed_oss hunyuan_v1_dense": "Seed-OSS (biases), Hunyuan dense (norms after rope)",
    "exaone4 cohere2": "EXAONE 4, Cohere 2 (rope in layers with a window only; layer norm, parallel blocks)",
    "nemotron": "Nemotron, Minitron (no gate, squared ReLU, layer norms with biases, partial rope)",
    "opt": "OPT (no gate, ReLU, learned positions), but for 350M",
    "olmo2 olmo3 olmoe": "OLMo 2 and 3 (norms after, YaRN), OLMoE",
    "granite granitemoe": "Granite 3 (scales), Granite MoE",
}
REMARKS = {"qwen2_moe qwen3_moe": " with experts in all"}  # of GGUF files
IN_GPT_FAST = ("llama", "mixtral")


def formats(types: str) -> str:
    """How the models of these types are read."""
    in_gguf = set().union(*(each.model_types for each in ARCHITECTURES.values()))
    found = ["safetensors"]
    if in_gguf.issuperset(types.split()):
        found.append(f"GGUF{REMARKS.get(types, '')}")
    elif types == "mistral":  # whose files are of the architecture llama
        found.append("GGUF without a window")
    return ", ".join(found + ["gpt-fast"] * (types in IN_GPT_FAST))


def table() -> str:
    """The table; an error if a family has no row, or a row no family."""
    named = [kind for types in NAMES for kind in types.split()]
    if sorted(named) != sorted(FAMILIES):
        raise ValueError(f"give a name in scripts/families.py to: {', '.join({*named} ^ {*FAMILIES})}")
    lines = ["| family | `model_type` | how it is read |", "|---|---|---|"]
    for types, names in NAMES.items():
        kinds = " ".join(f"`{kind}`" for kind in types.split())
        lines.append(f"| {names} | {kinds} | {formats(types)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    README.write_text(BLOCK.sub(lambda _: table(), text), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, cli.Parser(description="Write README's table of families."))
