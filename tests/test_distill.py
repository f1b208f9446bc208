"""distill.py: what it writes serves as a draft and as a model, goes on where it was stopped, and refuses in words."""

import json
import shlex
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import distill as program
from compress.distillation import KEPT_BYTES, Training
from layers.quantized import QuantSpec, quantize_weight
from tests.tiny import GREEDY_FLAGS, greedy_text, make_tiny_checkpoint
from weights.checkpoint import load_model, new_table, open_model, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "The cat sat on the mat. The dog, who had seen all of it, went out into the garden and slept in the sun. " * 20
SHORT = ("--seq_length", 16, "--batch_size", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text("The cat sat.")
    make_tiny_checkpoint(folder / "deep", n_layer=4)
    make_tiny_checkpoint(folder / "foreign", n_layer=2)
    tokenizer = folder / "foreign" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|im_start|>", "<|start|>"))
    make_tiny_checkpoint(folder / "teacher", n_layer=3)
    return folder


@pytest.fixture
def teach(made, call, monkeypatch, tmp_path):
    """Run the command here, by default 4 steps of a student of 2 layers; what --output_json says."""

    for name, few in {"N_TEXT": 4, "N_PROMPT": 12, "N_NEW": 16}.items():
        monkeypatch.setattr(f"measure.acceptance.{name}", few)

    def teach(*flags, output=tmp_path / "student.pth", data=("--data", made / "text.txt")):
        flags = flags if {"--steps", "--minutes"} & set(flags) else ("--steps", 4, *flags)
        flags = flags if "--finetune" in flags else ("--layers", 2, *flags)
        where = ("--teacher", made / "teacher/model.pth", *data, "--output", output)
        facts = tmp_path / "facts.json"
        teach.printed = call("distill.py", *where, *SHORT, "--output_json", facts, *flags)
        return json.loads(facts.read_text())

    return teach


def tensors(path):
    return {name: read() for name, read in open_model(path).tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_student_is_a_draft_and_a_model(teach, call, made, tmp_path):
    facts = teach("--chart", tmp_path / "way.png")
    student, teacher = tmp_path / "student.pth", made / "teacher/model.pth"
    assert open_model(student).args.n_layer == 2 and not student.with_suffix(".state").exists()
    flags = ("--prompt", "the cat", "--num_samples", 1, "--max_new_tokens", 12, *GREEDY_FLAGS)
    alone = call("generate.py", "--checkpoint_path", student, *flags).out
    assert alone == greedy_text(student, "the cat") + "\n"  # the tokenizer's files were copied
    pair = ("--checkpoint_path", teacher, "--draft_checkpoint_path", student, "--speculate_k", 4)
    assert call("generate.py", *pair, *flags).out == greedy_text(teacher, "the cat") + "\n"
    assert (tmp_path / "way.png").read_bytes().startswith(b"\x89PNG")
    assert [point["step"] for point in facts["curve"]] == [0, 1, 2, 3, 4]
    assert 0 <= facts["accepted"] <= 4 and min(facts["perplexity"]) > 1
    assert "accepted of 4 guesses" in teach.printed.out


def test_the_curve_says_what_was_learned(teach):
    """Rows for half of the steps, then predictions."""
    curve = teach("--learning_rate", 1e-9)["curve"]
    rows, nats = ([point[name] for point in curve] for name in ("row_error", "loss"))
    assert [each is not None for each in rows] == [False, True, True, False, False]
    assert [each is not None for each in nats] == [False, False, False, True, True]
    assert "rows off by" in teach.printed.err and "loss" in teach.printed.err


@pytest.mark.parametrize("free, n_ranks, room", [(None, 1, KEPT_BYTES), (4096, 1, 256), (4096, 2, 0), (8192, 2, 256)])
def test_what_the_teacher_finds_has_a_quarter_of_what_is_left(monkeypatch, free, n_ranks, room):
    """256 parameters, whose gradients and moments will take 3,072 bytes."""
    monkeypatch.setattr(program, "free_memory", lambda device: free)
    ranks = None if n_ranks == 1 else SimpleNamespace(size=n_ranks)
    assert program.room_for_targets(torch.nn.Linear(16, 16, bias=False), torch.device("cpu"), ranks) == room


def test_a_student_of_all_layers_is_its_teacher(teach):
    facts = teach("--layers", 3, "--learning_rate", 1e-9)
    assert facts["accepted"] > 3.5 and facts["curve"][-1]["loss"] < 1e-6
    assert facts["perplexity"][1] == pytest.approx(facts["perplexity"][0], rel=0.05)  # rounded to bfloat16


def test_the_name_beside_the_teacher(call, made, tmp_path):
    path = make_tiny_checkpoint(tmp_path / "model")
    call("distill.py", "--teacher", path, "--layers", 1, "--data", made / "text.txt", "--steps", 1, *SHORT)
    assert open_model(path.parent / "model_student-1.pth").args.n_layer == 1


@pytest.mark.parametrize("kind", ["data", "self_data after data", "self_data"])
def test_an_interrupted_training_goes_on_bit_for_bit(teach, monkeypatch, capsys, tmp_path, kind):
    flags = ("--self_data", 2) if "self" in kind else ()
    run = partial(teach, *flags, **({"data": ()} if kind == "self_data" else {}))
    run(output=tmp_path / "whole.pth")
    backward = Training.backward

    def interrupted(training):
        if training.step == 2:
            raise KeyboardInterrupt
        return backward(training)

    monkeypatch.setattr(Training, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert f"step 2 is kept in {tmp_path}/student.state" in capsys.readouterr().err
    assert not (tmp_path / "student.pth").exists()
    monkeypatch.setattr(Training, "backward", backward)
    other = "student.jsonl has texts that were written with other flags" if flags else "another seed .1234, now 5"
    with pytest.raises(ValueError, match=other):
        run("--seed", 5)
    facts = run()
    assert "Going on after step 2" in teach.printed.err and "Writing" not in teach.printed.err
    assert [point["step"] for point in facts["curve"]] == [0, 1, 2, 3, 4]
    assert same(tensors(tmp_path / "whole.pth"), tensors(tmp_path / "student.pth"))


def test_a_loss_that_is_no_number_stops_and_spares_what_was_kept(teach, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "SAVE_S", 0)
    backward, kept = Training.backward, []

    def diverging(training):
        if training.step == 2:
            kept.append((tmp_path / "student.state").read_bytes())
            return backward(training) * float("nan")
        return backward(training)

    monkeypatch.setattr(Training, "backward", diverging)
    with pytest.raises(ValueError, match="the loss of step 3 is nan, .* smaller --learning_rate; step 2 is kept in"):
        teach()
    assert (tmp_path / "student.state").read_bytes() == kept[0]


def test_a_full_disk_at_a_checkpoint_spares_the_last(teach, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "SAVE_S", 0)
    backward = Training.backward

    def filling(training):
        if training.step == 2:
            monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
        return backward(training)

    monkeypatch.setattr(Training, "backward", filling)
    with pytest.raises(ValueError, match=r"cannot write .*student.state: .* are free; step 2 is kept in"):
        teach()
    assert [path.name for path in tmp_path.iterdir()] == ["student.state"]


def test_finetuning_keeps_the_pattern(teach, made, tmp_path):
    source = open_model(made / "teacher/model.pth")
    state = {name: read() for name, read in source.tensors.items()}
    for name in state:
        if name.startswith("layers.") and state[name].ndim == 2:
            state[name] = state[name] * (torch.rand(state[name].shape, generator=torch.Generator()) < 0.5)
    (tmp_path / "pruned").mkdir()
    save_checkpoint(tmp_path / "pruned/model.pth", source.args, state)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pruned" / name).write_text((made / "teacher" / name).read_text())
    facts = teach("--finetune", tmp_path / "pruned/model.pth", "--steps", 20)
    assert facts["curve"][-1]["loss"] < facts["curve"][1]["loss"]
    after = tensors(tmp_path / "student.pth")
    assert all(torch.equal(after[name] == 0, value == 0) for name, value in state.items() if name.startswith("layers."))


@pytest.mark.parametrize("others", [(), ("--quantize", "int8"), ("--quantize", "int4")], ids=str)
def test_a_two_of_four_student_keeps_its_pattern(teach, call, made, tmp_path, others):
    source, student = made / "teacher/2-4.pth", tmp_path / "student.pth"
    where = ("--checkpoint_path", made / "teacher/model.pth", "--calibration_file", made / "text.txt")
    how = ("--mode", "wanda", "--pattern", "2:4", "--calibration_seq_length", 32, "--dtype", "float32", *others)
    call("sparsify.py", *where, *how, "--output", source)
    facts = teach("--finetune", source, "--steps", 20)
    assert facts["curve"][-1]["loss"] < facts["curve"][1]["loss"]
    assert open_model(student).table == open_model(source).table
    before, after = tensors(source), tensors(student)
    learnt = "layers.1.attention.wqkv.scales" if others else "layers.1.attention.wqkv.weight"
    assert not before[learnt].bfloat16().equal(after[learnt].bfloat16())
    for name in before:
        if name.endswith((".positions", ".zeros")) and name != "output.zeros":
            assert before[name].equal(after[name])
    dense = {name: read() for name, read in open_model(student, dequantize=True).tensors.items()}
    pruned = [name for name in dense if name.startswith("layers.") and dense[name].ndim == 2]
    assert all((dense[name].unflatten(1, (-1, 4)) == 0).sum(-1).ge(2).all() for name in pruned)


def test_a_student_begins_without_the_blocks_that_change_least(teach, call, made, tmp_path):
    source = made / "teacher/model_drop-1.pth"
    where = ("--checkpoint_path", made / "teacher/model.pth", "--calibration_file", made / "text.txt")
    call("sparsify.py", *where, "--mode", "layers", "--drop", 1, "--calibration_seq_length", 32)
    facts = teach("--finetune", source, "--steps", 10)
    assert open_model(tmp_path / "student.pth").args.n_layer == 2
    assert facts["curve"][-1]["loss"] < facts["curve"][1]["loss"]


def test_an_int4_student_keeps_its_codes_and_runs(teach, made, tmp_path):
    source = open_model(made / "teacher/model.pth")
    table = new_table(source, QuantSpec(4, 32), "x")
    state = {name: read() for name, read in source.tensors.items()}
    for name, spec in table.items():
        weight = state["tok_embeddings.weight"] if name == "output" else state.pop(f"{name}.weight")
        state |= {f"{name}.{leaf}": value for leaf, value in quantize_weight(weight, spec, name).items()}
    path = made / "teacher/model_int4.pth"
    save_checkpoint(path, source.args, state, table)
    teach("--finetune", path)
    after = tensors(tmp_path / "student.pth")
    assert all(torch.equal(after[f"{name}.weight"], state[f"{name}.weight"]) for name in table)
    assert open_model(tmp_path / "student.pth").table == table
    assert load_model(tmp_path / "student.pth").args.n_layer == 3
    teach("--teacher", path, output=tmp_path / "of_int4.pth")  # such a teacher has a float student
    assert not open_model(tmp_path / "of_int4.pth").table


BAD = {
    "--layers 4": "--layers is 4; the teacher has 3, and a student has from 1 to all",
    "--layers 0": "--layers is 0; it must be at least 1",
    "--steps 0": "--steps is 0; it must be at least 1",
    "--steps 1 --minutes 1": "give either --steps or --minutes",
    "--minutes -1": "--minutes is -1.0; it must be above 0",
    "--finetune DEEP --steps 1": "the student has 4 layers, and its teacher 3; a student is no deeper",
    "--finetune FOREIGN --steps 1": "the student has another tokenizer: its token 1 is '<|start|>'",
    "--finetune FOREIGN --layers 2": "give either --layers or --finetune",
    "--data SHORT": "the data is too short for one step (tokens: ",
    "--data /no/such/file": "cannot read the text /no/such/file",
    "--batch_size -2": "--batch_size is -2; it must be at least 1",
    "--learning_rate nan": "--learning_rate is nan; it must be above 0",
    "--temperature 0": "--temperature is 0.0; it must be above 0",
    "--top_k 0": "--top_k is 0; it must be at least 1",
    "--seed -1": "--seed is -1; it must be from 0 to 2^63 - 1",
    "--seq_length 1": "--seq_length is 1; a window needs at least 2 tokens",
    "--seq_length 600": "--seq_length 600 is more than the model's context of 512",
    "--self_data 0": "--self_data is 0; it must be at least 1",
    "--dtype float16": "--dtype float16 is too narrow for gradients; use bfloat16 or float32",
    "--dtype int8": "dtype 'int8' is unknown",
    "--output TEACHER": "the model is read from it",
    "--output x.gguf": "its name must end in .pth",
    "--output /no/such/folder/x.pth": "there is no folder /no/such/folder",
    "--chart /no/such/folder/x.png": "there is no folder /no/such/folder",
}


@pytest.mark.parametrize("flags, message", BAD.items())
def test_bad_input_is_an_error_that_says_what_to_do(teach, made, tmp_path, flags, message):
    names = {"DEEP": "deep/model.pth", "FOREIGN": "foreign/model.pth", "SHORT": "short.txt"}
    names["TEACHER"] = "teacher/model.pth"
    with pytest.raises(ValueError) as error:
        teach(*(str(made / names[word]) if word in names else word for word in shlex.split(flags)))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
