"""The tiny models, configs and helpers that test files share."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.decode import decode, decode_one_token, forward_chunk, prefill
from engine.engine import Engine, generate
from engine.sampling import Sampling
from engine.speculation.drafters import DraftModel, PromptLookup
from engine.speculation.speculative import Speculation
from model import ModelArgs, Transformer
from text.tokenizer import load_tokenizer
from weights.checkpoint import build, load_model, save_checkpoint
from weights.huggingface import HF_MODULES
from weights.layout import LEAVES

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
GREEDY_FLAGS = ("--temperature", 0, "--dtype", "float32")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_checkpoint(folder, context=512, seed=0, template=CHATML, **fields):
    """A checkpoint of ours that runs in no time: random float32 weights, a byte-level vocabulary, ChatML."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ate the hat, he said"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    sizes = dict(dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, intermediate_size=96)
    names = dict(vocab_size=tokenizer.get_vocab_size(), max_seq_length=context, tie_embeddings=True)
    args = ModelArgs(**{**sizes, **names, **fields})
    shapes = Transformer(args).state_dict()
    torch.manual_seed(seed)
    state = {name: torch.randn(t.shape) * 0.2 for name, t in shapes.items()}
    save_checkpoint(folder / "model.pth", args, {k: v for k, v in state.items() if k != "output.weight"})
    return folder / "model.pth"


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large, so that logits are far apart and every path matters
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def save_tiny(config, folder):
    """A tiny random model of transformers, saved to `folder`. Biases, norms and scales are random too."""
    torch.manual_seed(0)
    # of its ways to compute attention only this one has soft caps
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.ndim == 1:
                weight.copy_(torch.randn_like(weight) * 0.3 + (0 if name.endswith("bias") else 1))
    model.save_pretrained(folder)
    return model


def covering(strength, **choices):
    """For parametrize: few cases in which every so many choices for different names meet."""
    cases = list(product(*(range(len(values)) for values in choices.values())))
    meetings = {case: set(combinations(enumerate(case), strength)) for case in cases}
    left, taken = set().union(*meetings.values()), []
    while left:
        taken.append(max(cases, key=lambda case: len(meetings[case] & left)))
        left -= meetings[taken[-1]]
    values = [list(values) for values in choices.values()]
    return ",".join(choices), [[values[at][i] for at, i in enumerate(case)] for case in taken]


pairwise = partial(covering, 2)


def all_offline(cases, quick):
    """For parametrize: `quick` in every run, the others only with scripts/test.sh --cuda-offline."""
    assert all(each in cases for each in quick)
    return [pytest.param(*each, marks=() if each in quick else pytest.mark.cuda_offline) for each in cases]


def random_prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


HALF_GB = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
}


def hf_names(weights, args):
    """Our tensors, split as Hugging Face names them."""
    out = {}
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        layer = module.split(".")[1] if module.startswith("layers.") else ""
        theirs = HF_MODULES[module.replace(f"layers.{layer}.", "layers.#.") if layer else module]
        kv = args.n_kv_head * args.head_dim
        sizes = {1: [len(value)], 2: [len(value) // 2] * 2, 3: [len(value) - 2 * kv, kv, kv]}[len(theirs)]
        for part, rows in zip(theirs, value.split(sizes), strict=True):
            out[f"{part.replace('#', layer)}.{leaf}"] = rows.clone()
    return out


def dequantised(args, state, table):
    """A float model with the weights that `state` stores."""
    state = dict(state)
    for name, spec in table.items():
        tensors = {key: state.pop(f"{name}.{key}") for key in LEAVES if f"{name}.{key}" in state}
        state[f"{name}.weight"] = spec.layer(**tensors).dequantize()
    return build(replace(args, tie_embeddings=False), state)


def tiny_model(seed=0, **changes):
    """A float32 model on CPU with weights large enough that its greedy text varies."""
    sizes = dict(dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, intermediate_size=96)
    args = ModelArgs(**{**sizes, "vocab_size": 128, "max_seq_length": 1024, **changes})
    torch.manual_seed(seed)
    model = Transformer(args).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 1)
    return model


# layers of two head sizes, of which the last take keys and values of earlier ones, and inputs of their own
DIFFERING = {"n_layer": 6, "sliding_window": 9, "full_layers": (1, 3, 5), "full_head_dim": 32, "full_kv_head": 1}
DIFFERING |= {"keys_as_values": True, "value_norm": True, "n_reusing_layer": 3, "layer_input_size": 32}
DIFFERING |= {"layer_scales": True}


def random_ids(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(128, (length,), generator=generator).tolist() for length in lengths]


def continuation(model, cache, prompts, count, sampling=GREEDY, step=decode_one_token, forward=forward_chunk, start=0):
    """[B, count] tokens by prefill and decode."""
    token, pos = prefill(model, cache, prompts, sampling, start, forward)
    later = [tokens.clone() for tokens, _ in decode(model, cache, token, pos, count - 1, sampling, step)]
    return torch.cat([token, *later], 1)


def allocated(model):
    """Bytes of a model's tensors, those that layers share counted once."""
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def dead_process():
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


ENV = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


ENV |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start(*flags, python=(), **options):
    """generate.py as a process of its own group, as a terminal would start it."""
    command = [sys.executable, *python, "generate.py", *map(str, flags)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **{**pipes, **options})


def torchrun(n_rank, *args, **options):
    """The started command `torchrun --nproc_per_node N ARGS`."""
    launch = [sys.executable, "-m", "torch.distributed.run", *options.pop("how", ["--standalone"])]
    command = [*launch, "--nproc_per_node", n_rank, *args]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=ENV, text=True, **pipes, **options)


def outcome(process, input=None, timeout=900):  # a rank that compiles on a busy machine takes minutes
    """(exit code, standard output, standard error)"""
    try:
        out, err = process.communicate(input, timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def ran(n_rank, *args, **options):
    """Standard output of a run that must succeed."""
    input = options.pop("input", None)
    code, out, err = outcome(torchrun(n_rank, *args, **options), input)
    assert code == 0, err
    return out


def ids_of(engine, prompts, budget, start=0):
    """The new ids of each row; engine: or a model."""
    engine = engine if isinstance(engine, Engine) else Engine(engine)
    rows = [[] for _ in prompts]
    for chunk in generate(engine, prompts, budget, GREEDY, start):
        for row, ids in zip(rows, chunk, strict=True):
            assert ids
            row += ids
    return rows


def greedy_text(path, prompt, budget=12):
    """The answer by way of the library, whose own tests compare it with transformers."""
    model, tokenizer = load_model(path, dtype=torch.float32), load_tokenizer(path)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
    new = []
    for [token] in (chunk[0] for chunk in generate(Engine(model), [ids], budget, Sampling(temperature=0))):
        new.append(token)
        if token in tokenizer.eos_ids:
            break
    return tokenizer.decode(new)


SOURCES = ["ngram", "same", "near", "other"]  # the text itself; drafts that always, sometimes and never agree


def make_drafts(path, folder):
    """Draft models for the checkpoint in path, by the names in SOURCES."""
    other = make_tiny_checkpoint(folder, seed=1)
    paths = {"same": path, "near": path, "other": other}
    drafts = {name: load_model(path, dtype=torch.float32) for name, path in paths.items()}
    torch.manual_seed(0)
    for parameter in drafts["near"].parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return drafts


def speculation_of(drafts, source, k=5):
    return Speculation(PromptLookup() if source == "ngram" else DraftModel(drafts[source]), k)
