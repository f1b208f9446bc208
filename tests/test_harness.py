"""lm-evaluation-harness on our models against its own HFLM on the same weights."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_families import save_tiny
from test_generate import make_tiny_checkpoint
from test_quantize import TASK
from tokenizers import processors

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from checkpoint import load_model  # noqa: E402
from harness import Adapter, grouped  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 48


def make_pair(folder, bos):
    """Our adapter and HFLM on one tiny model, whose tokenizer begins a text with BOS or not."""
    make_tiny_checkpoint(folder)  # for its tokenizer
    (folder / "model.pth").unlink()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=json.loads((folder / "tokenizer_config.json").read_text())["chat_template"],
        **({"bos_token": "<|im_start|>"} if bos else {}),
    )
    if bos:
        start = ("<|im_start|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [start])
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    theirs = save_tiny(config, folder)
    with torch.no_grad():  # surer of itself
        theirs.lm_head.weight.mul_(8)
    theirs.save_pretrained(folder)
    hflm = HFLM(theirs, tokenizer=tokenizer, max_length=WINDOW, batch_size=3, device="cpu")
    ours = load_model(folder, dtype=torch.float32)
    return SimpleNamespace(
        theirs=hflm,
        model=ours,
        words=load_tokenizer(folder),
        ours=Adapter(ours, load_tokenizer(folder), "tiny", WINDOW),
    )


@pytest.fixture(scope="module", params=[False, True], ids=["without BOS", "with BOS"])
def pair(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), request.param)


def asked(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for (found, is_greedy), (truth, was_greedy) in zip(ours, theirs, strict=True):
        assert math.isclose(found, truth, rel_tol=1e-4, abs_tol=1e-4)
        assert is_greedy == was_greedy


PAIRS = [
    ("the cat sat on", " the mat"),
    ("the cat sat on", " the hat, and the dog ate it"),
    ("the cat sat on", " a"),
    ("the dog ate ", "the hat"),  # the space moves over
    ("he said", "!"),
    ("", " the cat"),
    ("the cat sat on the mat and the dog ate the hat, he said, " * 4, " and the cat"),  # longer than the window
    ("the cat sat on the mat and the dog ate the hat, he said, " * 4, " and the dog, he said"),
    ("<|im_start|>user", " the cat"),  # begins with what may be BOS
    ("he said", " the mat" * 5),
]


def test_loglikelihood(pair):
    requests = asked("loglikelihood", *PAIRS)
    truth = pair.theirs.loglikelihood(requests, disable_tqdm=True)
    for batch_size in (None, 1, 2, 7):
        adapter = Adapter(pair.model, pair.words, "tiny", WINDOW, batch_size)
        assert_close(adapter.loglikelihood(requests, disable_tqdm=True), truth)


def test_what_greedy_decoding_writes_is_greedy(pair):
    written = pair.ours.generate_until(asked("generate_until", ("the cat", {"until": [], "max_gen_toks": 5})))
    requests = asked("loglikelihood", ("the cat", written[0]), ("the cat", " the mat"))
    truth = pair.theirs.loglikelihood(requests, disable_tqdm=True)
    assert_close(pair.ours.loglikelihood(requests, disable_tqdm=True), truth)


def test_rolling(pair):
    texts = ["the cat sat on the mat", "he said " * 40, "x", "the dog ate the hat and the cat sat on it. " * 9]
    requests = asked("loglikelihood_rolling", *[(text,) for text in texts])
    found = pair.ours.loglikelihood_rolling(requests, disable_tqdm=True)
    truth = pair.theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(truth, rel=1e-4, abs=1e-4)


def test_generate_until(pair):
    greedy = {"until": ["e", "\n\n"], "max_gen_toks": 12}
    requests = asked(
        "generate_until",
        ("the cat sat on", greedy),
        ("the dog", greedy),
        ("he", {"until": " ", "max_gen_toks": 20, "do_sample": False}),
        ("the cat sat on the mat and the dog ate the hat " * 6, greedy),  # cut from the left
        ("<|im_start|>user\nhello<|im_end|>\n", {"until": [], "max_gen_toks": 8}),
        ("he said the dog", {"max_gen_toks": 9}),
    )
    truth = pair.theirs.generate_until(requests, disable_tqdm=True)
    assert any(truth)
    for batch_size in (None, 1, 2):
        adapter = Adapter(pair.model, pair.words, "tiny", WINDOW, batch_size)
        assert adapter.generate_until(requests, disable_tqdm=True) == truth


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template(pair, prompt):
    history = [{"role": "user", "content": "the cat "}, {"role": "assistant", "content": " sat on"}]
    history = history[:1] if prompt else history
    assert pair.ours.apply_chat_template(history, prompt) == pair.theirs.apply_chat_template(history, prompt)
    assert pair.ours.chat_template(True) == pair.theirs.chat_template(True)


def test_ids(pair):
    for text in ("the cat", "<|im_start|>the cat", "", " he"):
        for special in (None, True, False):
            assert pair.ours.tok_encode(text, special) == pair.theirs.tok_encode(text, special)
    assert pair.ours.eot_token_id == pair.theirs.eot_token_id
    assert pair.ours.prefix_token_id == pair.theirs.prefix_token_id


def test_grouping_by_hand():
    requests = [([1, 2], [3]), ([1], [2, 3, 4, 5]), ([1, 2], [4, 5]), ([9, 8, 7, 6], [5])]
    first, second, third = grouped(requests, max_length=4)
    assert (first.context, first.continuations, first.numbers) == ([1], [[2, 3, 4, 5]], [1])
    assert (second.context, second.continuations, second.numbers) == ([9, 8, 7, 6], [[5]], [3])
    assert (third.context, third.continuations, third.numbers) == ([1, 2], [[3], [4, 5]], [0, 2])
    assert [each.length for each in (first, second, third)] == [4, 4, 3]
    (cut,) = grouped([([9, 8, 7, 6, 5], [4, 3])], max_length=4)
    assert cut.context == [7, 6, 5]
    for continuation in ([], [1] * 5):
        with pytest.raises(ValueError, match=f"has {len(continuation)} tokens; from 1 to 4 fit"):
            grouped([([1], continuation)], max_length=4)


# ---------------------------------------------------------------- tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files over one data file, as a user writes them."""
    folder = tmp_path_factory.mktemp("tasks")
    nouns = ["cat", "dog", "hat", "mat"]
    lines = [
        {
            "q": f"the {a} sat on",
            "a": [f" the {b}", f" the {a}, he said", " he"],
            "gold": i % 3,
            "text": f"the {a} " * 30,
        }
        for i, (a, b) in enumerate((a, b) for a in nouns for b in nouns)
    ]
    (folder / "data.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    choice = 'target_delimiter: ""\ndoc_to_choice: "{{a}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
    kinds = {
        "mine_choice": ("multiple_choice", "{{q}}", "{{gold}}", choice),
        "mine_rolling": ("loglikelihood_rolling", "", "{{text}}", "metric_list: [{metric: word_perplexity}]"),
        "mine_open": (
            "generate_until",
            "{{q}}",
            "{{a[0]}}",
            'generation_kwargs: {until: ["."], max_gen_toks: 10}\nmetric_list: [{metric: exact_match}]',
        ),
    }
    for name, (kind, question, answer, more) in kinds.items():
        more += "\nfewshot_split: validation"
        yaml = TASK.format(name=name, data=folder / "data.json", kind=kind, question=question, answer=answer, more=more)
        (folder / f"{name}.yaml").write_text(yaml)
    return folder


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2}, {"apply_chat_template": True}], ids=str)
def test_metrics(pair, tasks, options, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = [
        lm_eval.simple_evaluate(
            lm,
            tasks=["mine_choice", "mine_rolling", "mine_open"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=10,
            log_samples=True,
            **options,
        )
        for lm in (pair.ours, pair.theirs)
    ]
    ours, theirs = found
    for name, results in theirs["results"].items():
        for metric, value in results.items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    for name, samples in theirs["samples"].items():
        for sample, other in zip(ours["samples"][name], samples, strict=True):
            if name != "mine_choice":
                continue
            assert_close([each[0] for each in sample["resps"]], [each[0] for each in other["resps"]])
