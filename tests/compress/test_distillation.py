"""Distillation: the loss against PyTorch's own in float64, students, a training that goes on, guesses, two ranks."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from compress import distillation
from compress.distillation import Watched, class_logprobs, distillation_loss, rate_at, row_error
from compress.student import freeze_ends_, keep_zeros_, kept_layers, stood_for, stored_tensors, student_of, trainable
from compress.training_data import batch_of, full_windows, split_off
from engine.engine import Engine, generate
from engine.speculation.drafters import DraftModel
from engine.speculation.speculative import Speculation
from layers.quantized import QuantSpec, linear_table, quantize_weight
from measure.acceptance import greedy_texts, mean_accepted
from mixers.layer_kinds import args_of_layers
from model import Transformer
from tests.compress.distillation_cases import ARGS, CPU, PLAN, opened, training
from tests.tiny import GREEDY, ran, random_ids, tiny_model
from weights.layout import Layout, ModelFile

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("at_once", [distillation.AT_ONCE, 150])
@pytest.mark.parametrize("top_k", [1, 8, 49])
def test_loss_and_gradient_are_those_of_kl_div_in_float64(top_k, at_once, monkeypatch):
    """With 49 of 50 tokens each class is one token, and the loss is that of the whole distributions.

    With 150 logits at once the ten tokens are three parts of three and one of one.
    """
    monkeypatch.setattr(distillation, "AT_ONCE", at_once)
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 2, 5, 50, dtype=torch.float64) * 3
    student.requires_grad_()
    p, q = (each.div(2.0).softmax(-1).flatten(0, 1) for each in (teacher, student))
    if top_k < 49:
        top = p.topk(top_k).indices
        p, q = (torch.cat((each.gather(1, top), 1 - each.gather(1, top).sum(1, keepdim=True)), 1) for each in (p, q))
    expected = F.kl_div(q.log(), p, reduction="batchmean") * 4
    (gradient,) = torch.autograd.grad(expected, student)
    logits = student.detach().float().requires_grad_()
    ids = teacher.topk(top_k).indices
    loss = distillation_loss(logits, ids, class_logprobs(teacher, ids, 2.0), 2.0)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_loss_is_finite_where_the_tail_has_no_chance():
    logits = torch.tensor([[[200.0, 0.0, -200.0]]], requires_grad=True)
    ids = torch.tensor([[[0]]])
    loss = distillation_loss(logits, ids, class_logprobs(-logits.detach(), ids, 1.0), 1.0)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(200.0))  # the teacher is sure of what the student thinks impossible
    assert logits.grad.isfinite().all()


def test_rate_rises_then_falls():
    assert [round(rate_at(p), 4) for p in (0.0, 0.025, 0.05, 0.5, 1.0)] == [0.1, 0.55, 0.9945, 0.55, 0.1]


# ---------------------------------------------------------------- the teacher's rows


def test_rows_are_those_of_the_model_that_ends_there():
    """Without the blocks behind it, a model makes a block's rows; its head makes logits of the last."""
    model, tokens = trainable(opened(), CPU), torch.tensor(random_ids(20))
    rows = Watched(model, [0, 1])(tokens, True)
    assert torch.equal(model.output(rows[-1]), Watched(model, [0, 1])(tokens, False))
    for n in (2, 1):
        del model.layers[n]
        assert torch.equal(rows[n - 1], model.hidden(tokens, torch.arange(20)[None]))


def test_error_of_rows_and_gradient_are_those_of_float64():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 2, 5, 8, dtype=torch.float64)
    theirs[0, 0, 0] *= 1000
    ours.requires_grad_()
    expected = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).square().mean((1, 2)).sum()
    (gradient,) = torch.autograd.grad(expected, ours)
    rows = ours.detach().float().requires_grad_()
    error = row_error(rows, theirs.float())
    error.backward()
    torch.testing.assert_close(error.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(rows.grad.double(), gradient, rtol=1e-4, atol=1e-8)


def test_what_a_student_stands_for():
    assert stood_for(30, 6) == [5, 11, 16, 22, 28, 29]
    assert stood_for(12, 12) == list(range(12)) and stood_for(12, 1) == [11]


def test_rows_are_learned_first_without_a_head():
    run, heads = training(plan=replace(PLAN, steps=40), rows=True), []
    for model in (run.student, run.targets.teacher.model):
        model.output.register_forward_hook(lambda *_: heads.append(1))
    steps = []
    for step in run.run():
        steps.append((step.of_rows, bool(heads), step.loss))
        heads.clear()
    assert [step[:2] for step in steps] == [(True, False)] * 20 + [(False, True)] * 20
    assert steps[19][2] < 0.7 * steps[0][2] and steps[20][2] < 0.1 * training().backward()


def test_predictions_from_kept_rows_are_the_teachers(monkeypatch):
    fresh, kept = (training(rows=True).targets for _ in range(2))
    kept.of([0, 1, 2], True)
    first = kept.of([2, 1], False)
    monkeypatch.setattr(kept.teacher, "forward", None)
    for again in (first, kept.of([2, 1], False)):
        assert all(map(torch.equal, again, fresh.of([2, 1], False)))


def test_predictions_take_the_last_rows_of_windows_that_were_too_many_to_keep(monkeypatch):
    targets, fresh = (training(rows=True).targets for _ in range(2))
    size = targets.of([0], True)[1][-1].nbytes
    targets.kept.clear(), targets.last.clear()
    targets.room = 2 * size
    targets.of([0, 1, 2, 3], True)
    assert not targets.kept and [*targets.last] == [0, 1]
    assert all(map(torch.equal, targets.of([2], False), fresh.of([2], False)))
    monkeypatch.setattr(targets.teacher, "forward", None)
    assert all(map(torch.equal, targets.of([1, 0], False), fresh.of([1, 0], False)))
    assert not targets.last


@pytest.mark.parametrize("of_rows", [False, True])
def test_what_a_teacher_finds_is_kept_where_there_is_room(of_rows, monkeypatch):
    targets, computed = training(rows=True).targets, []
    found = targets.of([0], of_rows)[1:]
    targets.room = 3 * sum(each.nbytes for each in found) + 1  # ids become twice as long
    if of_rows:  # the last rows of every window come first
        targets.room += len(targets.windows) * found[0][-1].nbytes
    targets.kept.clear(), targets.last.clear()
    predict = targets.predict
    monkeypatch.setattr(targets, "predict", lambda window: computed.append(window) or predict(window))
    first = [targets.of([window, 0], of_rows) for window in range(6)]
    again = [targets.of([window, 0], of_rows) for window in range(6)]
    assert 0 < len(targets.kept) < 6 and len(computed) < 18 and len(targets.last) == 6 * of_rows
    for ours, theirs in zip(chain(*first), chain(*again), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- data


def test_every_window_comes_once_an_epoch_and_the_step_alone_decides():
    first = [batch_of(step, 3, 7, seed=5) for step in range(14)]
    assert [sorted(sum(first, [])[i : i + 7]) for i in range(0, 42, 7)] == [list(range(7))] * 6
    assert first == [batch_of(step, 3, 7, seed=5) for step in range(14)] != [batch_of(s, 3, 7, 6) for s in range(14)]


def test_windows_are_full_and_the_end_is_held_out():
    ids, held_out = split_off(list(range(100)), None)
    assert held_out == list(range(90, 100))
    assert full_windows(ids, 16, 5).tolist() == [ids[i : i + 16] for i in range(0, 80, 16)]
    with pytest.raises(ValueError, match=r"too short for one step \(tokens: 90\): it takes 6 windows of 16"):
        full_windows(ids, 16, 6)


# ---------------------------------------------------------------- students


def test_kept_layers_are_evenly_spread_from_the_first_to_the_last():
    assert kept_layers(30, 6) == [0, 6, 12, 17, 23, 29]
    assert kept_layers(12, 12) == list(range(12)) and kept_layers(12, 1) == [0]
    assert all(len(set(kept_layers(n, m))) == m for n in range(1, 40) for m in range(1, n + 1))


def test_layers_are_numbered_anew():
    args = replace(ARGS, n_layer=6, sliding_window=4, full_layers=(0, 3, 5), unrotated_layers=(4,))
    cut = args_of_layers(args, [0, 2, 3, 5])
    assert (cut.n_layer, cut.full_layers, cut.unrotated_layers) == (4, (0, 2, 3), ())


def test_a_student_is_its_teacher_without_some_blocks():
    """As skipping them does."""
    teacher, student = trainable(opened(), CPU), trainable(student_of(opened(), 2), CPU)
    del teacher.layers[1]
    tokens = torch.tensor(random_ids(20))
    pos = torch.arange(20)[None]
    assert torch.equal(student(tokens, pos), teacher(tokens, pos))


@pytest.mark.parametrize("rows", [False, True])
def test_a_student_of_all_layers_has_nothing_to_learn(rows):
    run = training(n_layer=3, rows=rows)
    assert run.backward() == pytest.approx(0, abs=1e-6)
    assert max(each.grad.abs().max() for each in run.parameters.values()) < 1e-6


def test_embeddings_and_head_stay_the_teachers():
    student = trainable(student_of(opened(), 2), CPU)
    freeze_ends_(student)
    before = {name: weight.detach().clone() for name, weight in student.state_dict().items()}
    [*training(student=student).run()]
    kept = {name for name, weight in student.state_dict().items() if torch.equal(weight, before[name])}
    assert kept == {"tok_embeddings.weight", "output.weight"}


def test_what_ties_layers_together_is_refused_by_name():
    args = replace(ARGS, n_reusing_layer=1)
    with pytest.raises(ValueError, match="models with n_reusing_layer; give a student with --finetune"):
        student_of(opened(args), 2)


# ---------------------------------------------------------------- training


def test_training_lowers_the_loss():
    losses = [step.loss for step in training(plan=replace(PLAN, steps=30)).run()]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_bfloat16_arithmetic_has_nearly_the_gradient_of_float32():
    exact, rough = training(), training(plan=replace(PLAN, dtype=torch.bfloat16))
    assert rough.backward() == pytest.approx(exact.backward(), rel=0.03)
    assert {each.dtype for each in rough.parameters.values()} == {torch.float32}
    ours, theirs = (torch.cat([each.grad.flatten() for each in run.parameters.values()]) for run in (exact, rough))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.99


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("micro_batch", [2, 3, 4])
def test_accumulated_gradients_are_those_of_one_batch(micro_batch, rows):
    runs = training(rows=rows), training(plan=replace(PLAN, micro_batch=micro_batch), rows=rows)
    assert runs[0].backward() == pytest.approx(runs[1].backward(), rel=1e-5)
    for ours, theirs in zip(*(run.parameters.values() for run in runs), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [False, True])
def test_a_training_that_goes_on_is_the_same_bit_for_bit(rows):
    whole, first, second = (training(rows=rows) for _ in range(3))
    [*whole.run()]
    run = first.run()
    next(run), next(run)
    second.resume(first.state())
    assert [step.number for step in second.run()] == [3, 4]
    for ours, theirs in zip(whole.parameters.values(), second.parameters.values(), strict=True):
        assert torch.equal(ours, theirs)


def test_zeros_stay_and_others_learn():
    student = trainable(student_of(opened(), 2), CPU)
    weight = student.layers[0].feed_forward.w13.weight
    weight.data[:, ::2] = 0
    before = weight.detach().clone()
    keep_zeros_(student)
    [*training(student=student).run()]
    assert torch.equal(weight == 0, before == 0) and not torch.equal(weight, before)


@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4, 32)], ids=str)
def test_of_a_quantised_student_scales_learn_and_codes_stay(spec):
    source = student_of(opened(), 2)
    state = {name: read() for name, read in source.tensors.items()}
    table = linear_table(Transformer(source.args), spec, QuantSpec(8))
    for name in table:
        rounded = quantize_weight(state.pop(f"{name}.weight"), table[name], name)
        state |= {f"{name}.{leaf}": value for leaf, value in rounded.items()}
    layout = Layout(source.args, table)
    student = trainable(ModelFile(layout, {name: lambda t=state[name]: t for name in layout.tensors}), CPU)
    run = training(student=student, plan=replace(PLAN, steps=10))
    losses = [step.loss for step in run.run()]
    assert losses[-1] < losses[0]
    after = stored_tensors(student, layout, torch.float32)
    for name in table:
        assert torch.equal(after[f"{name}.weight"], state[f"{name}.weight"])
        assert not torch.equal(after[f"{name}.scales"], state[f"{name}.scales"])
    assert {name: t.dtype for name, t in after.items()} == {name: state[name].dtype for name in after}


# ---------------------------------------------------------------- guesses


def test_accepted_guesses_are_counted_as_speculation_accepts_them():
    model, draft = tiny_model(), tiny_model()
    for parameter in draft.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    k, texts = 3, greedy_texts(model, random_ids(300)[0], frozenset())[:3]
    rounds = []
    for prompt, new in texts:
        speculation, place = Speculation(DraftModel(draft), k), 1
        stream = generate(Engine(model, speculation=speculation), [prompt], len(new), GREEDY)
        assert next(stream) == [new[:1]]
        for [ids] in stream:
            if place + k <= len(new):
                rounds.append(min(len(ids) - 1, k))
            assert ids == new[place : place + len(ids)]
            place += len(ids)
    assert mean_accepted(draft, texts, k) == pytest.approx(sum(rounds) / len(rounds))
    assert 0.2 < mean_accepted(draft, texts, k) < k == mean_accepted(model, texts, k)


def test_texts_end_where_the_model_ends_them():
    model = tiny_model()
    [(_, new)] = greedy_texts(model, random_ids(40)[0], frozenset())
    [(prompt, short)] = greedy_texts(model, random_ids(40)[0], frozenset({new[2]}))
    assert short == new[: new.index(new[2])] and len(prompt) == 40
    assert mean_accepted(model, [(prompt, short)], 4) is None


# ---------------------------------------------------------------- ranks


def test_two_ranks_have_the_gradient_of_one_process_with_all_windows(tmp_path):
    ran(2, Path(__file__).with_name("distillation_cases.py"), tmp_path / "found.pt")
    for rows, (loss, gradients, weights) in enumerate(torch.load(tmp_path / "found.pt")):
        alone = training(rows=bool(rows))
        assert loss == pytest.approx(alone.backward(), rel=1e-5)
        for name, each in alone.parameters.items():
            torch.testing.assert_close(gradients[name], each.grad, rtol=1e-4, atol=1e-6)
        [*alone.run()]
        for name, each in alone.parameters.items():  # after four steps
            torch.testing.assert_close(weights[name], each.detach(), rtol=1e-2, atol=1e-3)
