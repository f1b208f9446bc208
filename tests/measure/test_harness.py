"""lm-evaluation-harness on our models against its own HFLM on the same weights."""

import json
import math
import os
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import processors

from tests.tiny import ROOT, dequantised, ids_of, make_tiny_checkpoint, save_tiny

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

import eval as program  # noqa: E402
import quantize  # noqa: E402
from compress.calibration import task_texts  # noqa: E402
from engine.cache import allocate  # noqa: E402
from engine.engine import Engine, build_engine  # noqa: E402
from engine.sampling import Sampling  # noqa: E402
from layers.quantized import QuantSpec, linear_table, quantize_weight  # noqa: E402
from measure.harness import Adapter  # noqa: E402
from measure.perplexity import perplexity  # noqa: E402
from measure.scoring import evenly, questions_of  # noqa: E402
from measure.tasks import load_tasks, task_manager  # noqa: E402
from text.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from weights.checkpoint import load_model, open_model, save_checkpoint  # noqa: E402
from weights.layout import Layout  # noqa: E402

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
    engine, tokenizer = Engine(load_model(folder, dtype=torch.float32)), load_tokenizer(folder)

    def adapter(batch_size=None, window=WINDOW, engine=engine):
        return Adapter(engine, tokenizer, "tiny", window, batch_size)

    return SimpleNamespace(theirs=hflm, engine=engine, tokenizer=tokenizer, adapter=adapter, ours=adapter())


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
        assert_close(pair.adapter(batch_size).loglikelihood(requests, disable_tqdm=True), truth)


def test_continuations_of_one_token_need_no_rows_of_their_own(pair):
    requests = asked("loglikelihood", *PAIRS[4:5], ("the cat sat on the mat,", "!"), ("the cat sat on the mat,", "?"))
    truth = pair.theirs.loglikelihood(requests, disable_tqdm=True)
    engine = Engine(pair.engine.model)
    assert_close(pair.adapter(2, engine=engine).loglikelihood(requests, disable_tqdm=True), truth)
    assert engine.cache.n_rows == 2
    more = asked("loglikelihood", *PAIRS[:5])
    truth = pair.theirs.loglikelihood(more, disable_tqdm=True)
    assert_close(pair.adapter(2, engine=engine).loglikelihood(more, disable_tqdm=True), truth)
    assert engine.cache.n_rows == 4


@pytest.fixture(scope="module")
def compiled(pair):
    return pair.adapter(engine=build_engine(pair.engine.model, compile=True, compile_prefill=True))


def test_compiled_log_likelihoods_and_no_compilation_per_request(pair, compiled, monkeypatch):
    """Of lengths that have come before, in batches of all three sizes."""
    monkeypatch.setattr(compiled, "tokens_at_once", 160)
    assert [compiled.size_for(length, 160) for length in (10, 40, WINDOW)] == [16, 4, 1]
    requests = asked("loglikelihood", *PAIRS, *[(context[:100], choice) for context, choice in PAIRS[-4:]])
    truth = pair.theirs.loglikelihood(requests, disable_tqdm=True)
    assert_close(compiled.loglikelihood(requests, disable_tqdm=True), truth)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for some in (slice(2), slice(2, 9), slice(None)):
            assert_close(compiled.loglikelihood(requests[some], True), truth[some])


def test_compiled_texts(pair, compiled):
    settings = {"until": ["e"], "max_gen_toks": 9}
    # HFLM adds BOS or not as the first of a batch wants it
    contexts = [context for context, _ in PAIRS if context and not context.startswith("<|im_start|>")]
    requests = asked("generate_until", *[(context, settings) for context in contexts])
    truth = pair.theirs.generate_until(requests, True)
    assert compiled.generate_until(requests, True) == truth
    with torch._dynamo.config.patch(error_on_recompile=True):
        for some in (slice(5), slice(2, None)):
            assert compiled.generate_until(requests[some], True) == truth[some]


@pytest.fixture(scope="module")
def wide(pair):
    """HFLM with the model's whole context."""
    return HFLM(pair.theirs.model, tokenizer=pair.theirs.tokenizer, max_length=128, batch_size=1, device="cpu")


def test_chunks_reach_what_the_longest_row_has_read(pair, wide, monkeypatch):
    """A long prompt and a long continuation in one batch, which goes through the cache in several chunks."""
    monkeypatch.setattr("measure.scoring.LOGIT_BYTES", 3 * 4 * 5 * pair.engine.model.args.vocab_size)
    text = "the cat sat on the mat and the dog ate the hat, he said, " * 3
    requests = asked("loglikelihood", (text * 3, " the mat, he said"), ("he", " " + text), ("he said", " the cat"))
    truth = wide.loglikelihood(requests, disable_tqdm=True)
    for batch_size in (None, 1, 2, 3):
        assert_close(pair.adapter(batch_size, 128).loglikelihood(requests, disable_tqdm=True), truth)


def test_short_and_long_answers(pair, wide):
    """Whose cache would be too small if they were decoded together."""
    long = "the cat sat on the mat and the dog ate the hat, he said, " * 8
    settings = [{"until": [], "max_gen_toks": n} for n in (8, 120)]
    requests = asked("generate_until", (long, settings[0]), ("he", settings[1]), ("the dog", settings[1]))
    assert pair.adapter(window=128).generate_until(requests, True) == wide.generate_until(requests, True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"repetition_penalty": 1.2}, "a task asks for generation with repetition_penalty 1.2, which is not supported"),
        ({"num_beams": 10}, "num_beams 10"),
        ({"max_gen_toks": 0}, "a task asks for 0 new tokens, and the window has 48; from 1 to 47 fit it"),
        ({"max_gen_toks": 48}, "a task asks for 48 new tokens"),
        ({"do_sample": True, "top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_generation_that_cannot_be_had(pair, arguments, message):
    with pytest.raises(ValueError, match=message):
        pair.ours.generate_until(asked("generate_until", ("he said", {"max_gen_toks": 4, **arguments})))


def test_settings_of_generation(pair):
    def sampling(**arguments):
        return pair.ours.request_of("he", {"max_gen_toks": 4, **arguments})[1]

    assert sampling() == sampling(do_sample=False, temperature=0.5, num_beams=1) == Sampling(temperature=0)
    assert sampling(do_sample=True, temperature=0.7) == Sampling(0.7, top_k=50)  # as transformers has it
    assert sampling(temperature=0.7, top_k=None, top_p=0.9, min_p=0.1) == Sampling(0.7, 50, 0.9, 0.1)
    request, _ = pair.ours.request_of("", {"until": [4, "\n", ""], "max_gen_toks": 4})
    assert request.prompt == [pair.ours.prefix_token_id] and list(request.stream.stop) == ["4", "\n"]


def test_a_context_without_tokens(pair):
    requests = [(("", " the cat"), [], pair.tokenizer.encode(" the cat", False))]
    whole = asked("loglikelihood", ("", " the cat"))
    assert_close(pair.ours._loglikelihood_tokens(requests, True), pair.theirs.loglikelihood(whole, True))


def test_logits_that_are_nan_are_refused(pair):
    model = deepcopy(pair.engine.model)
    (bad,) = pair.tokenizer.encode("x", add_special_tokens=False)
    model.tok_embeddings.weight.data[bad] = math.nan
    adapter = pair.adapter(engine=Engine(model))
    works = {
        "score": lambda text: adapter.loglikelihood(
            asked("loglikelihood", ("he", " said"), (text, " sat on the")), True
        ),
        "generate": lambda text: adapter.generate_until(asked("generate_until", (text, {"max_gen_toks": 2})), True),
        "perplexity": lambda text: perplexity(adapter.engine, pair.tokenizer.encode(text + " sat"), window=WINDOW),
    }
    for work in works.values():
        work("the cat")
        with pytest.raises(ValueError, match="logits are NaN or infinite in float32"):
            work("x")


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
        assert pair.adapter(batch_size).generate_until(requests, disable_tqdm=True) == truth


@pytest.mark.parametrize("last", ["The cat", "Answer: ", "Answer:\n", "", " ", ">", "im_end", "hi\n hi"])
def test_chat_template(pair, last):
    history = [{"role": "user", "content": "Who sat on the mat?"}, {"role": "assistant", "content": last}]
    for prompt in (True, False):
        assert pair.ours.apply_chat_template(history, prompt) == pair.theirs.apply_chat_template(history, prompt)
    assert pair.ours.chat_template(True) == pair.theirs.chat_template(True)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}|{% endfor %}",
    ],
    ids=["trims", "knows no system role"],
)
def test_other_chat_templates(pair, template, monkeypatch):
    monkeypatch.setattr(pair.tokenizer, "chat_template", template)
    monkeypatch.setattr(pair.theirs.tokenizer, "chat_template", template)
    history = [{"role": role, "content": f"{role} says "} for role in ("system", "user", "assistant")]
    for prompt in (True, False):
        assert pair.ours.apply_chat_template(history, prompt) == pair.theirs.apply_chat_template(history, prompt)


def test_a_tokenizer_with_neither_bos_nor_eos(pair):
    """HFLM takes no such tokenizer, but one whose prefix it never needs."""
    tokenizer = Tokenizer(pair.tokenizer.backend, {}, {"bos_token_id": None, "eos_token_id": []})
    adapter = Adapter(pair.engine, tokenizer, "tiny", WINDOW)
    requests = asked("loglikelihood", *[each for each in PAIRS if each[0] and not each[0].startswith("<")])
    truth = pair.theirs.loglikelihood(requests, disable_tqdm=True)
    assert_close(adapter.loglikelihood(requests, disable_tqdm=True), truth)
    for kind, arguments in (("loglikelihood", ("", " the cat")), ("loglikelihood_rolling", ("the cat",))):
        with pytest.raises(ValueError, match="neither a BOS nor an EOS token to stand before it; name one as"):
            getattr(adapter, kind)(asked(kind, arguments), disable_tqdm=True)


def test_a_special_token_may_end_a_text(pair):
    """It takes the place of a token that would have been drawn."""
    arguments = asked("generate_until", ("the cat sat on", {"until": ["<|endoftext|>"], "max_gen_toks": 9}))
    special, *_ = pair.tokenizer.encode("<|endoftext|>", False)
    context = pair.tokenizer.encode("the cat sat on")
    for at in (2, 4):
        model, theirs = deepcopy(pair.engine.model), deepcopy(pair.theirs.model)
        drawn = ids_of(model, [context], 5)[0][at]
        for head in (model.output, theirs.lm_head):
            head.weight.data[special] = 1.01 * head.weight.data[drawn]
        hflm = HFLM(theirs, tokenizer=pair.theirs.tokenizer, max_length=WINDOW, batch_size=1, device="cpu")
        (truth,) = hflm.generate_until(arguments, disable_tqdm=True)
        assert pair.adapter(engine=Engine(model)).generate_until(arguments, disable_tqdm=True) == [truth]
        assert 0 < len(truth) < len(pair.theirs.generate_until(arguments, disable_tqdm=True)[0])


def test_ids(pair):
    bos = pair.tokenizer.vocabulary().get(pair.tokenizer.bos_id)
    for text in ("the cat", "<|im_start|>the cat", "", " he"):
        for special in (None, True, False):
            # told to add one to a text that has one HFLM gives two, which no model was trained on
            theirs = None if special and bos and text.startswith(bos) else special
            assert pair.ours.tok_encode(text, special) == pair.theirs.tok_encode(text, theirs)
    assert pair.ours.eot_token_id == pair.theirs.eot_token_id
    assert pair.ours.prefix_token_id == pair.theirs.prefix_token_id


def test_grouping_by_hand():
    requests = [([1, 2], [3]), ([1], [2, 3, 4, 5]), ([1, 2], [4, 5]), ([9, 8, 7, 6], [5])]
    first, second, third = questions_of(requests, max_length=4)
    assert (first.prompt, first.continuations, first.numbers) == ([1, 2], [[3], [4, 5]], [0, 2])
    assert (second.prompt, second.continuations, second.numbers) == ([1], [[2, 3, 4, 5]], [1])
    assert (third.prompt, third.continuations, third.numbers) == ([9, 8, 7, 6], [[5]], [3])
    assert [each.length for each in (first, second, third)] == [3, 4, 4]
    (cut,) = questions_of([([9, 8, 7, 6, 5], [4, 3])], max_length=4)
    assert cut.prompt == [7, 6, 5]
    for continuation in ([], [1] * 5):
        with pytest.raises(ValueError, match=f"has {len(continuation)} tokens; from 1 to 4 fit"):
            questions_of([([1], continuation)], max_length=4)


@pytest.mark.parametrize("n_items, most", [(1, 4), (4, 4), (5, 4), (9, 4), (12, 4), (3, 64), (7, 1)])
def test_batches_are_few_and_even(n_items, most):
    parts = list(evenly(list(range(n_items)), most))
    assert sum(parts, []) == list(range(n_items)) and len(parts) == math.ceil(n_items / most)
    sizes = [len(part) for part in parts]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- tasks


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: {kind}
training_split: null
validation_split: validation
doc_to_text: "{question}"
doc_to_target: "{answer}"
{more}
"""


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
def test_metrics(pair, tasks, own_tasks_only, options, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = [
        lm_eval.simple_evaluate(
            lm,
            tasks=["mine_choice", "mine_rolling", "mine_open"],
            task_manager=task_manager(str(tasks)),
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


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def evaluate(tasks, checkpoint, own_tasks_only, monkeypatch, tmp_path):
    """eval.py in this process."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def run(*names, flags=(), path=checkpoint, folder=tasks):
        command = ["--checkpoint_path", path, "--include_path", folder, "--dtype", "float32", "--tasks", *names, *flags]
        program.main(**vars(program.build_parser().parse_args([str(each) for each in command])))

    return run


def test_the_report_of_a_quantised_model(evaluate, checkpoint, tmp_path, capsys):
    """Its metrics are those of a float model that holds the dequantised weights."""
    source = open_model(checkpoint)
    table = linear_table(Layout(source.args).model, QuantSpec(4, 32), QuantSpec(4, 32))
    state = {name: read() for name, read in source.tensors.items()}
    for name in table:
        weight = state.pop(f"{name}.weight", state["tok_embeddings.weight"])  # of a tied head
        state |= {f"{name}.{key}": tensor for key, tensor in quantize_weight(weight, table[name]).items()}
    floats = dequantised(source.args, state, table)
    files = {"int4": (source.args, state, table), "float": (floats.args, floats.state_dict(), None)}
    reports = {}
    for name, content in files.items():
        path, out = checkpoint.with_name(f"{name}.pth"), tmp_path / f"{name}.json"
        save_checkpoint(path, *content)
        evaluate("mine_choice", "mine_rolling", flags=["--output_json", out, "--num_fewshot", 1], path=path)
        reports[name] = json.loads(out.read_text())
    printed = capsys.readouterr()
    assert printed.out.count("|mine_choice ") == 2 and "Time for tasks: " in printed.err
    found, expected = (reports[name]["results"] for name in files)
    for task, metric in (("mine_choice", "acc_norm"), ("mine_rolling", "word_perplexity")):
        assert found[task][f"{metric},none"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-4)
    facts = reports["int4"]["gpt_faster"]
    assert facts["quantised"] == ["int4.g32"] and reports["float"]["gpt_faster"]["quantised"] == []
    assert facts["model"]["dim"] == 64 and facts["args"]["num_fewshot"] == 1 and facts["seconds"] > 0
    assert (facts["torch"], facts["lm_eval"]) == (torch.__version__, lm_eval.__version__)
    assert reports["int4"]["n-shot"] == {"mine_choice": 1, "mine_rolling": 1}


def test_a_limit_and_a_seed(evaluate, tmp_path):
    def samples(*flags):
        evaluate("mine_choice", flags=[*flags, "--output_json", tmp_path / "out.json"])
        return json.loads((tmp_path / "out.json").read_text())["n-samples"]["mine_choice"]["effective"]

    assert samples() == 16 and samples("--limit", 3) == 3 and samples("--limit", 0.25) == 4


def test_the_same_on_two_ranks(tasks, checkpoint, run_cli, evaluate, tmp_path):
    names, out = ("mine_choice", "mine_rolling", "mine_open"), tmp_path / "out.json"
    flags = ["--output_json", out, "--limit", 3]
    evaluate(*names, flags=flags)
    alone = json.loads(out.read_text())["results"]
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "eval.py", "--device", "cpu")
    flags += ["--checkpoint_path", checkpoint, "--dtype", "float32", "--include_path", tasks, "--tasks", *names]
    done = run_cli(*launch, *flags, env={"HF_HOME": tmp_path / "hf", "HF_DATASETS_OFFLINE": 1})
    assert done.returncode == 0, done.stderr
    shared = json.loads(out.read_text())
    assert done.stdout.count("|mine_choice") == 1 and shared["gpt_faster"]["ranks"] == 2
    for task, metrics in alone.items():
        for name, value in metrics.items():
            near = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert shared["results"][task][name] == near


# ---------------------------------------------------------------- text to calibrate with


def test_texts_of_tasks(tasks, own_tasks_only, tmp_path):
    lines = [json.loads(line) for line in (tasks / "data.json").read_text().splitlines()]
    assert task_texts(["mine_rolling", "mine_choice", "mine_open"], str(tasks)) == [
        *[line["text"] for line in lines],
        *[line["q"] + line["a"][0] for line in lines],
        *[line["q"] for line in lines],
    ]
    with pytest.raises(ValueError, match="lm-eval has no task 'mine_opne'; similar: mine_open"):
        task_texts(["mine_opne"], str(tasks))
    good, end = (tasks / "mine_open.yaml").read_text(), ", or a text with --calibration_file$"
    for old, new, message in (("data.json", "lost.json", "lost.json"), ("path: json", "path: no/data", "no/data")):
        (tmp_path / "mine_open.yaml").write_text(good.replace(old, new))
        with pytest.raises(ValueError, match=f"the task mine_open or its data cannot be loaded .*{message}.*{end}"):
            task_texts(["mine_open"], str(tmp_path))


@pytest.mark.parametrize("name", ["5", "true", "null"])
def test_a_task_whose_name_is_no_text(name, tmp_path, own_tasks_only):
    (tmp_path / "mine.yaml").write_text(TASK.format(name=name, data="x", kind="x", question="", answer="", more=""))
    with pytest.raises(ValueError, match=f"a task in {tmp_path} has the name .*; a name must be text"):
        task_manager(str(tmp_path))


def test_gptq_calibrates_with_a_task(tasks, own_tasks_only, tmp_path):
    path = make_tiny_checkpoint(tmp_path)
    flags = ["--calibration_tasks", "mine_rolling", "--include_path", tasks, "--calibration_seq_length", 32]
    flags += ["--mode", "int4-gptq", "--checkpoint_path", path]
    quantize.main(**vars(quantize.build_parser().parse_args([str(flag) for flag in flags])))
    assert {*open_model(tmp_path / "model_int4-gptq.g32.pth").table.values()} == {QuantSpec(4, 32), QuantSpec(8)}


# ---------------------------------------------------------------- bad input


def assert_refused(evaluate, message, capsys, *names, **options):
    with pytest.raises(ValueError) as error:
        evaluate(*names, **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--limit", 0], "--limit is 0; it must be a number of questions, or a part of them below 1"),
        (["--limit", -1], "--limit is -1"),
        (["--limit", 2.5], "--limit is 2.5"),
        (["--limit", "nan"], "--limit is nan"),
        (["--num_fewshot", -1], "--num_fewshot is -1; it must be 0 or above"),
        (["--batch_size", 0], "--batch_size is 0"),
        (["--include_path", "/no/such/folder"], "there is no folder /no/such/folder; --include_path needs"),
        (["--chat_template", "x"], "--chat_template needs --apply_chat_template"),
        (["--stride", 4], "--stride goes with --perplexity; leave it out"),
        (["--perplexity", "x.txt"], "give either --tasks NAME ... or a text with --perplexity FILE"),
        (["--output_json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_flags_are_checked_before_the_model_is_loaded(evaluate, tmp_path, capsys, flags, message):
    assert_refused(evaluate, message, capsys, "mine_choice", flags=flags, path=tmp_path / "none.pth")


def test_tasks_are_checked_before_the_model_is_loaded(evaluate, tmp_path, tasks, capsys):
    nowhere = tmp_path / "none.pth"
    near = "lm-eval has no task 'mine_chioce'; similar: mine_choice"
    assert_refused(evaluate, near, capsys, "mine_open", "mine_chioce", path=nowhere)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "broken.yaml").write_text("task: broken\noutput_type: [")
    assert_refused(evaluate, "has no task 'broken'", capsys, "broken", path=nowhere, folder=folder)
    good = (tasks / "mine_choice.yaml").read_text().replace("mine_choice", "mine")
    for old, new, message in [
        (str(tasks / "data.json"), str(tmp_path / "lost.json"), "lost.json"),
        ("{{q}}", "{{q", "the task mine or its data cannot be loaded (unexpected end of template"),
        ("dataset_path: json", "dataset_path: no/such_data", "no/such_data"),
        ("output_type: multiple_choice", "output_type: guessing", "guessing"),
        ("validation_split: validation", "validation_split: test", "the task mine or its data cannot be loaded"),
        ("task: mine", "task: mine\nrepeats: 2147483648", "the task mine has repeats 2147483648; from 1 to 1024"),
    ]:
        assert old in good
        (folder / "broken.yaml").write_text(good.replace(old, new))
        assert_refused(evaluate, message, capsys, "mine", path=nowhere, folder=folder)


def test_names_of_tasks_are_matched_as_the_harness_does(tasks, own_tasks_only):
    def names(*asked):
        return [task.task_name for task in load_tasks(list(asked), str(tasks)).leaves()]

    assert names("mine_open,mine_choice") == ["mine_open", "mine_choice"]
    assert names("mine_r*", "mine_*") == ["mine_rolling", "mine_choice", "mine_open"]
    with pytest.raises(ValueError, match=r"lm-eval has no task 'yours_\*'; --include_path"):
        names("mine_open,yours_*")


def test_numbers_among_the_choices(evaluate, tmp_path, tasks, capsys):
    task = (tasks / "mine_choice.yaml").read_text().replace("{{a}}", "{{ a if gold == 0 else [a[0], 5, 6] }}")
    (tmp_path / "numbers.yaml").write_text(task)
    assert_refused(evaluate, "the tasks cannot be run: TypeError: ", capsys, "mine_choice", folder=tmp_path)


def test_a_group_beside_its_member(evaluate, tmp_path, tasks, capsys):
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [mine_choice, mine_open]")
    for name in ("mine_choice", "mine_open"):
        (tmp_path / f"{name}.yaml").write_text((tasks / f"{name}.yaml").read_text())
    twice = (
        "Duplicate task 'mine_choice': found in both 'mine' and 'mine_choice'; name the group or its tasks, not both"
    )
    for names in (["mine", "mine_choice"], ["mine*"]):
        assert_refused(evaluate, twice, capsys, *names, folder=tmp_path, path=tmp_path / "none.pth")
    evaluate("mine", "mine", folder=tmp_path, flags=["--limit", 2])
    assert "| - mine_open" in capsys.readouterr().out


def test_mistakes_found_later(evaluate, tmp_path, tasks, capsys):
    assert_refused(
        evaluate,
        "--max_seq_length 513 is more than the model's context of 512",
        capsys,
        "mine_choice",
        flags=["--max_seq_length", 513],
    )
    too_small = "a task asks for 10 new tokens, and the window has 10; from 1 to 9 fit it (--max_seq_length)"
    assert_refused(evaluate, too_small, capsys, "mine_open", flags=["--max_seq_length", 10])
    assert_refused(evaluate, "from 1 to 2 fit the window", capsys, "mine_choice", flags=["--max_seq_length", 2])
    many = ["--num_fewshot", 100]
    assert_refused(evaluate, "the tasks cannot be run: ", capsys, "mine_choice", flags=many)
    plain = make_tiny_checkpoint(tmp_path / "plain", template=None)
    chat = ["--apply_chat_template"]
    assert_refused(evaluate, "no chat template", capsys, "mine_choice", flags=chat, path=plain)


def test_without_lm_eval_the_install_line_is_given(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    install = r" needs lm-eval: pip install -r requirements-eval.txt; or "
    with pytest.raises(ValueError, match=f"--tasks{install}measure a --perplexity FILE"):
        program.main(**vars(program.build_parser().parse_args(["--tasks", "x", "--checkpoint_path", str(tmp_path)])))
    with pytest.raises(ValueError, match=f"--calibration_tasks{install}give --calibration_file"):
        task_texts(["wikitext"], None)
    assert "lm-eval==" in (ROOT / "requirements-eval.txt").read_text()


def test_fewer_rows_where_memory_is_short(pair, monkeypatch):
    rows = []

    def only_eight(model, n_rows, n_slots, rewind):
        rows.append(n_rows)
        if n_rows > 8:
            raise ValueError("too large")
        return allocate(model, n_rows, n_slots, rewind)

    monkeypatch.setattr("engine.engine.allocate", only_eight)
    requests = asked("loglikelihood", *PAIRS)
    truth = pair.theirs.loglikelihood(requests, disable_tqdm=True)
    engine = Engine(pair.engine.model)
    assert_close(pair.adapter(engine=engine).loglikelihood(requests, disable_tqdm=True), truth)
    assert rows == [32, 8]
    with pytest.raises(ValueError, match="too large"):
        pair.adapter(7, engine=engine).loglikelihood(requests, disable_tqdm=True)
