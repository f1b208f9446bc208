"""Folders as people have them: each gives the logits that transformers gets from it, or is refused in words."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig

from tests.tiny import SIZES, save_tiny
from weights.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(60)[None]
PLAIN, TIED = LlamaConfig(**SIZES), LlamaConfig(**SIZES, tie_word_embeddings=True)
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def config(**changes):
    """Changes config.json; ... removes a key."""

    def change(folder):
        values = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def tensors(change):
    """Changes the tensors of model.safetensors."""

    def of_folder(folder):
        state = {name: value.clone() for name, value in change(load_file(folder / "model.safetensors")).items()}
        save_file(state, folder / "model.safetensors")

    return of_folder


def renamed(pattern, name):
    return tensors(lambda state: {re.sub(pattern, name, key): value for key, value in state.items()})


def with_head(make):
    return tensors(lambda state: state | {HEAD: make(state[EMBEDDING])})


def file(name, content):
    return lambda folder: (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def sharded(weight_map=lambda listed: listed, also=None):
    """Two shards; weight_map: what the index makes of the true one; also: tensors that the second shard holds too."""

    def change(folder):
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, listed = sorted(state), {}
        for i, part in enumerate((names[::2], names[1::2])):
            path = f"model-{i + 1}.safetensors"
            save_file({name: state[name] for name in part} | (also or {} if i else {}), folder / path)
            listed |= dict.fromkeys(part, path)
        file("model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map(listed)})(folder)

    return change


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    save_file({"step": torch.ones(1)}, folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "trainer.safetensors")


def mixed(state):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    return {name: value.to(dtypes[i % 3]) for i, (name, value) in enumerate(state.items())}


OTHER = {"model-1.safetensors": "model-2.safetensors", "model-2.safetensors": "model-1.safetensors"}
SAME_AS_TRANSFORMERS = {
    "a trained head beside a tied config": (TIED, with_head(lambda weight: weight.flip(0))),
    "a head of another dtype beside a tied config": (TIED, with_head(lambda weight: weight.bfloat16())),
    "a copied head beside a tied config": (TIED, with_head(lambda weight: weight)),
    "the shared weight under the head's name": (TIED, renamed(re.escape(EMBEDDING), HEAD)),
    "an inner model": (TIED, renamed(r"^model\.", "")),
    "an inner model and its head": (PLAIN, renamed(r"^model\.", "")),
    "a wrapped model": (PLAIN, renamed("^", "model.")),
    "some names without a prefix": (PLAIN, renamed(r"^model\.(?=layers\.1|norm)", "")),
    "mixed dtypes": (PLAIN, tensors(mixed)),
    "an index left from another save": (PLAIN, file("model.safetensors.index.json", {"weight_map": {"a": "gone"}})),
    "an index that lists half of the tensors": (PLAIN, sharded(lambda listed: dict(list(listed.items())[::2]))),
    "an index that lists other shards": (PLAIN, sharded(lambda listed: {n: OTHER[at] for n, at in listed.items()})),
    "an index that lists what is nowhere": (PLAIN, sharded(lambda listed: listed | {"a": "model-1.safetensors"})),
    "a tensor in two shards": (PLAIN, sharded(also={NORM: torch.full((32,), 2.0), HEAD: torch.ones(96, 32)})),
    "a .bin file beside some .safetensors": (PLAIN, as_bin),
    "an adapter beside the model": (PLAIN, file("adapter_config.json", ADAPTER)),
    "yarn without its trained context": (PLAIN, config(rope_parameters=YARN)),
    "llama3 without its trained context": (PLAIN, config(rope_parameters=LLAMA3)),
    "yarn, its trained context one level up": (
        PLAIN,
        config(rope_parameters=YARN | {"original_max_position_embeddings": 64}, original_max_position_embeddings=32),
    ),
    "yarn, truncate null": (
        PLAIN,
        config(rope_parameters=YARN | {"truncate": None, "original_max_position_embeddings": 32}),
    ),
    "rope settings under both names": (
        PLAIN,
        config(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=500.0),
    ),
    "null where transformers works it out": (PLAIN, config(head_dim=None, rope_scaling=None)),
    "a window, of a family without": (PLAIN, config(sliding_window=8)),
    "a window's switch, of a family without": (
        MistralConfig(**SIZES, sliding_window=8),
        config(use_sliding_window=False, max_window_layers=1, layer_types=["full_attention"] * 2),
    ),
    "another family's activation": (PLAIN, config(hidden_activation="gelu_pytorch_tanh")),
    "mixtral without rope settings and eps, with a key of qwen's": (
        MixtralConfig(**SIZES, num_local_experts=4),
        config(rope_parameters=..., rms_norm_eps=..., norm_topk_prob=False),
    ),
}


def logits_of_transformers(folder):
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not info["missing_keys"]
    return model(IDS).logits


@pytest.mark.parametrize("name", SAME_AS_TRANSFORMERS)
@torch.inference_mode()
def test_a_folder_gives_the_logits_of_transformers(name, tmp_path):
    kind, change = SAME_AS_TRANSFORMERS[name]
    save_tiny(kind, tmp_path)
    change(tmp_path)
    ours = load_model(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(ours(IDS, IDS), logits_of_transformers(tmp_path), atol=1e-4, rtol=1e-4)


def without_weights(*changes):
    def change(folder):
        (folder / "model.safetensors").unlink()
        for each in changes:
            each(folder)

    return change


LORA = [file("adapter_config.json", ADAPTER), file("adapter_model.safetensors", "")]
BASE_1 = YARN | {"rope_theta": 1.0}
REFUSED = {
    "a method": (config(quantization_config={"quant_method": "hqq"}), ["quantised", "'hqq'", "awq", "float model"]),
    "MLX": (config(quantization={"group_size": 64, "bits": 4}), ["config.json, quantization", "quantised", "None"]),
    "AWQ of old": (file("quant_config.json", {"w_bit": 3}), ["quant_config.json", "bits is 3", "4"]),
    "GPTQ without codes": (config(quantization_config=GPTQ), ["no quantised layer", "config says"]),
    "LoRA": (without_weights(*LORA), ["adapter", "LORA of some/base", "--adapter"]),
    "LFS weights": (file("model.safetensors", POINTER), ["model.safetensors", "Git LFS pointer", "git lfs pull"]),
    "LFS .bin": (without_weights(file("pytorch_model.bin", POINTER)), ["pytorch_model.bin", "Git LFS pointer"]),
    "LFS .pth": (file("model.pth", POINTER), ["model.pth", "Git LFS pointer"]),
    "LFS config": (file("config.json", POINTER), ["config.json", "Git LFS pointer"]),
    "names with and without prefix": (tensors(lambda state: state | {"norm.weight": state[NORM]}), ["twice"]),
    "no head": (tensors(lambda state: {n: t for n, t in state.items() if n != HEAD}), ["lacks the tensor", HEAD]),
    "a tensor of no layer": (tensors(lambda state: state | {"score.weight": state[NORM]}), ["1 tensors", "score"]),
    "yarn of base 1": (config(rope_parameters=BASE_1), ["rope_base 1.0", "not finite"]),
    "eps null": (config(rms_norm_eps=None), ["rms_norm_eps"]),
    "an index of a name too long": (sharded(lambda listed: dict.fromkeys(listed, "x" * 300)), ["lacks xxx", "index"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_is_refused_in_words(name, tmp_path):
    change, words = REFUSED[name]
    save_tiny(PLAIN, tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_an_adapter_beside_a_model_is_said(tmp_path, capfd):
    save_tiny(PLAIN, tmp_path)
    for change in LORA:
        change(tmp_path)
    for _ in range(2):
        load_model(tmp_path)
    said = [line for line in capfd.readouterr().err.splitlines() if "adapter" in line]
    assert len(said) == 1 and "LORA of some/base" in said[0] and "only where --adapter" in said[0]
    with pytest.raises(ValueError, match="adapter_model.safetensors is an adapter .*some/base"):
        load_model(tmp_path / "adapter_model.safetensors")


@torch.inference_mode()
def test_the_named_file_is_read(tmp_path):
    theirs = save_tiny(PLAIN, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "tuned.safetensors")
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")  # neither read nor complete
    ours = load_model(tmp_path / "tuned.safetensors", dtype=torch.float32)
    torch.testing.assert_close(ours(IDS, IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"/model.safetensors lacks the tensor"):
        load_model(tmp_path / "model.safetensors")
    (tmp_path / "tuned.safetensors").rename(tmp_path / "model.safetensors")
    sharded()(tmp_path)
    for path in tmp_path.glob("model*.safetensors"):
        torch.save(load_file(path), tmp_path / f"pytorch_{path.stem}.bin")
    index = (tmp_path / "model.safetensors.index.json").read_text()
    index = index.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    for name in ("model-2.safetensors", "pytorch_model-2.bin"):  # one of a set, which is read whole
        ours = load_model(tmp_path / name, dtype=torch.float32)
        torch.testing.assert_close(ours(IDS, IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    torch.save(theirs.state_dict(), tmp_path / "some.pth")  # what it holds decides, not its name
    ours = load_model(tmp_path / "some.pth", dtype=torch.float32)
    torch.testing.assert_close(ours(IDS, IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
