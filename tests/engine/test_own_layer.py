"""The layer of guesses that a model brings: against transformers' own block in float64, and guesses that are known."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, Glm4MoeConfig, Qwen3_5TextConfig, Qwen3NextConfig

from engine.engine import Engine, chunks
from engine.sampling import Sampling
from engine.speculation.guess_length import LENGTHS, Costs
from engine.speculation.own_layer import OwnLayer, load_guesses
from engine.speculation.speculative import Speculation
from layers.quantized import QuantSpec
from tests.tiny import GREEDY, SIZES, ids_of, random_prompts, save_tiny
from weights.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

DELTA = {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
DELTA |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
EXPERTS |= {"shared_expert_intermediate_size": 32, "norm_topk_prob": True}
SIGMOID = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1}
SIGMOID |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16}
LATENT |= {"qk_rope_head_dim": 8, "v_head_dim": 24}
FAMILIES = {
    "qwen3_5": (Qwen3_5TextConfig, DELTA | {"tie_word_embeddings": True}),
    "qwen3_next": (Qwen3NextConfig, DELTA | EXPERTS),
    "deepseek_v3": (DeepseekV3Config, LATENT | SIGMOID),
    "glm4_moe": (Glm4MoeConfig, SIGMOID | {"head_dim": 16}),
}
N_LAYER = 2
CHEAP = Costs({k: 1 + 0.01 * k for k in (0, *LENGTHS)})


def with_guesses(folder, family):
    """A model of three layers saved as one of two, the third of which makes the guesses. Returns that of three."""
    kind, extra = FAMILIES[family]
    model = save_tiny(kind(**{**SIZES, **extra, "num_hidden_layers": N_LAYER + 1}), folder)
    path, dim = folder / "model.safetensors", SIZES["hidden_size"]
    model.config._experts_implementation = "eager"  # others take no float64
    tensors, own, generator = load_file(path), f"model.layers.{N_LAYER}.", torch.Generator().manual_seed(3)
    names = ("eh_proj", "enorm", "hnorm", "shared_head.norm")
    if "qwen" in family:
        names = ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        tensors = {name.replace(own, "mtp.layers.0."): tensor for name, tensor in tensors.items()}
    sizes = [(dim, 2 * dim), (dim,), (dim,), (dim,)]
    front = [torch.randn(size, generator=generator) * (0.2 if len(size) == 2 else 0.3) for size in sizes]
    front = [part if part.ndim == 2 or "qwen" in family else part + 1 for part in front]
    prefix = "mtp." if "qwen" in family else own
    tensors |= {f"{prefix}{name}.weight": part for name, part in zip(names, front, strict=True)}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": N_LAYER, "num_nextn_predict_layers": 0 if "qwen" in family else 1}
    config |= {"layer_types": config["layer_types"][:N_LAYER]} if "layer_types" in config else {}
    (folder / "config.json").write_text(json.dumps(config))
    return SimpleNamespace(model=model.double(), front=front, offset=float("qwen" in family))


def normed(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@torch.inference_mode()
def slow_logits(made, tokens):
    """What the layer of guesses says [S - 1, V] after each pair of the text, in float64."""
    model, config, (joined, *norms) = made.model, made.model.config, (part.double() for part in made.front)
    of_embedding, of_hidden, last = (norm + made.offset for norm in norms)
    layers, norm = model.model.layers, model.model.norm

    def run(layers, n_layer, types, **inputs):
        model.model.layers, config.num_hidden_layers = layers, n_layer
        if hasattr(config, "layer_types"):
            config.layer_types = types
        return model.model(**inputs, use_cache=False).last_hidden_state

    types, ids = getattr(config, "layer_types", None), torch.tensor([tokens])
    hidden = run(layers[:N_LAYER], N_LAYER, types and types[:N_LAYER], input_ids=ids)[:, :-1]
    embedded = normed(model.model.embed_tokens(ids[:, 1:]), of_embedding, config.rms_norm_eps)
    pairs = torch.cat((embedded, normed(hidden, of_hidden, config.rms_norm_eps)), -1) @ joined.T
    kept, norm.weight.data = norm.weight.data, last - made.offset
    out = run(layers[N_LAYER:], 1, ["full_attention"], inputs_embeds=pairs)
    norm.weight.data = kept
    run(layers, N_LAYER + 1, types, input_ids=ids)
    return model.lm_head(out)[0]


class Noting(OwnLayer):
    """Notes the position and the first guess of each row in each round."""

    def __init__(self, layer):
        super().__init__(layer)
        self.notes = []

    def propose(self, recent, pos, *others):
        draft, probs = super().propose(recent, pos, *others)
        self.notes.append(list(zip(pos.flatten().tolist(), draft[:, 0].tolist(), strict=True)))
        return draft, probs


def speculated(engine, prompts, budget, start=0, sampling=GREEDY, seeds=None):
    """The new ids of each row, and the numbers of new ids in each round."""
    rows, rounds = [[] for _ in prompts], []
    for tokens, counts in chunks(engine, prompts, budget, sampling, start, seeds):
        rows = [row + ids[:n] for row, ids, n in zip(rows, tokens, counts, strict=True)]
        rounds.append(counts)
    return rows, rounds


@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_are_those_of_transformers_block_and_the_text_stays(family, tmp_path, monkeypatch):
    """Over prompts that are read in chunks, of rows of which each accepts another number of guesses."""
    monkeypatch.setattr("engine.decode.PREFILL_CHUNK", 16)
    monkeypatch.setattr("engine.decode.least_chunk", lambda device: 2)
    made = with_guesses(tmp_path, family)
    model = load_model(tmp_path, dtype=torch.float32)
    prompts, source = random_prompts(37, 3, 21), Noting(load_guesses(tmp_path, model))
    plain = ids_of(model, prompts, 24)
    assert speculated(Engine(model, speculation=Speculation(source, 2)), prompts, 24)[0] == plain
    texts = [prompt + new for prompt, new in zip(prompts, plain, strict=True)]
    truth = [slow_logits(made, text).topk(2) for text in texts]
    compared = 0
    for row, (values, best) in enumerate(truth):
        for notes in source.notes:
            pos, guess = notes[row]
            if pos < len(texts[row]) - 1 and values[pos - 1][0] - values[pos - 1][1] > 1e-3:  # no tie
                assert guess == int(best[pos - 1][0]), (row, pos)
                compared += 1
    assert compared > 30


@pytest.mark.parametrize("k", [1, 4, "auto"])
def test_guesses_that_are_always_right_are_all_accepted(k, tmp_path):
    """Each token follows from the one before alone, in the model and in its layer."""
    with_guesses(tmp_path, "glm4_moe")
    path, dim = tmp_path / "model.safetensors", SIZES["hidden_size"]
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    own = f"model.layers.{N_LAYER}."
    tensors[f"{own}eh_proj.weight"] = torch.cat((torch.eye(dim), torch.zeros(dim, dim)), 1)
    tensors[f"{own}enorm.weight"] = torch.ones(dim)
    tensors[f"{own}shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    model = load_model(tmp_path, dtype=torch.float32)
    layer = load_guesses(tmp_path, model)
    prompts = random_prompts(9, 4)
    speculation = Speculation(OwnLayer(layer), k, costs={2: CHEAP})
    rows, rounds = speculated(Engine(model, speculation=speculation), prompts, 61)
    assert rows == ids_of(model, prompts, 61)
    if k == "auto":  # which begins with short ones
        assert max(rounds[-2]) == 9 and len(rounds) < 20
    else:
        assert rounds[1:-1] == [[k + 1] * 2] * (-(-60 // (k + 1)) - 1)


def test_a_text_that_is_drawn_and_one_that_goes_on(tmp_path):
    """With guesses of a layer that is rounded."""
    with_guesses(tmp_path, "qwen3_5")
    model = load_model(tmp_path, dtype=torch.float32)
    layer = load_guesses(tmp_path, model, QuantSpec(8))
    engine = Engine(model, speculation=Speculation(OwnLayer(layer), 3))
    (prompt,) = random_prompts(12)
    [drawn], _ = speculated(engine, [prompt], 30, sampling=Sampling(top_k=20), seeds=[5])
    assert len(drawn) == 30 and set(drawn) <= set(range(SIZES["vocab_size"]))
    first = ids_of(engine, [prompt], 10)[0]
    longer = prompt + first[:-1]
    assert first == ids_of(model, [prompt], 10)[0]
    again, _ = speculated(engine, [[*longer, 7, 8]], 12, start=len(longer))
    assert again == ids_of(model, [[*longer, 7, 8]], 12)


def test_a_model_without_one_is_refused_by_name(tmp_path):
    kind, extra = FAMILIES["qwen3_5"]
    save_tiny(kind(**{**SIZES, **extra, "num_hidden_layers": 3}), tmp_path)
    with pytest.raises(ValueError, match="has no layer of guesses, which --speculate mtp needs .tensors mtp"):
        load_guesses(tmp_path, load_model(tmp_path))


def test_a_layer_with_a_tensor_missing_is_refused(tmp_path):
    with_guesses(tmp_path, "deepseek_v3")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.hnorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the tensor hidden_norm.weight"):
        load_guesses(tmp_path, load_model(tmp_path))
