"""Week 10: the Switch layer against a layer of loops, against transformers', and what it must and must not do."""

import contextlib
import io
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import week10_switch as week
from conftest import call
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

N, D, H, E = 41, 8, 12, 5  # tokens, numbers per token, hidden units, experts
f64 = torch.float64
WAYS = [week.in_a_loop, week.padded, week.one_hot, week.grouped]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def near(a, b, tol=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol


def make(experts=E, k=1, capacity=0.8, **options):
    """A layer whose router is sure of what it does."""
    torch.manual_seed(1)
    layer = week.SwitchFFN(D, H, experts, capacity, k, **{**dict(alpha=0.5, z=0.25), **options})
    layer.router.data.mul_(20)
    return layer


def by_hand(layer, x):
    """Everything in loops and sums, from the paper's text.   -> y, the second loss, who was dropped"""
    n, e, k = len(x), len(layer.router), layer.top_k
    seats = min(n * k, math.ceil(n * k / e * layer.capacity_factor)) if layer.capacity_factor < math.inf else n * k
    p, z, taken, rows, dropped = [], 0, [0] * e, [], []
    for t in range(n):
        logits = [(layer.router[i] * x[t]).sum() for i in range(e)]
        total = sum(v.exp() for v in logits)
        p.append([v.exp() / total for v in logits])
        z = z + total.log() ** 2 / n
        best = sorted(range(e), key=lambda i: -p[t][i].item())[:k]
        norm = sum(p[t][i] for i in best) if k > 1 else 1
        row = torch.zeros_like(x[t])
        for i in best:
            taken[i] += 1
            if taken[i] <= seats:
                hidden = layer.act((x[t][:, None] * layer.w_in[i]).sum(0))
                row = row + p[t][i] / norm * (hidden[:, None] * layer.w_out[i]).sum(0)
            else:
                dropped.append((t, i))
        rows.append(row)
    balance = e * sum(taken[i] / (n * k) * sum(p[t][i] for t in range(n)) / n for i in range(e))
    return torch.stack(rows), layer.alpha * balance + layer.z * z, dropped


def with_gradients(layer, x, f):
    x = x.clone().requires_grad_()
    y, aux = f(x)[:2]
    weigh = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, aux, *torch.autograd.grad((y * weigh).sum() + aux, [x, *layer.parameters()])]


# ------------------------------------------------------------------------------------------- the four ways


@each_way
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [0.5, 0.8, 1.25, math.inf])
def test_the_layer_is_the_paper_s_token_by_token(way, k, capacity):
    single = way is week.grouped  # knows no float64
    layer, x = make(k=k, capacity=capacity, dispatch=way), torch.randn(N, D)
    ours = with_gradients(layer if single else layer.double(), x if single else x.double(), layer)
    layer.double()
    theirs = with_gradients(layer, x.double(), lambda x: by_hand(layer, x))
    assert by_hand(layer, x.double())[2] or capacity > 1
    for a, b in zip(ours, theirs, strict=True):
        near(a.double(), b, 2e-5 if single else 1e-7)


@pytest.mark.parametrize("k", [1, 2])
def test_the_slow_version_of_the_script_is_right_too(k):
    layer, x = make(k=k).double(), torch.randn(N, D, dtype=f64)
    for a, b in zip(with_gradients(layer, x, lambda x: week.token_by_token(layer, x)),
                    with_gradients(layer, x, lambda x: by_hand(layer, x)), strict=True):  # fmt: skip
        near(a, b, 1e-7)


@each_way
def test_experts_without_a_token_do_no_harm(way):
    layer, x = make(capacity=math.inf, dispatch=way, alpha=0, z=0), torch.randn(N, D).abs()
    layer.router.data.zero_()[3] = 9
    y, _, *grads = with_gradients(layer, x, layer)
    assert layer.load.tolist() == [0, 0, 0, N, 0]
    near(y, layer.act(x @ layer.w_in[3]) @ layer.w_out[3], 1e-5)
    for grad in grads[2:]:
        assert (grad[[0, 1, 2, 4]] == 0).all() and (grad[3] != 0).any()


def test_seats_of():
    expert, seat = week.seats_of(torch.tensor([2, 0, 3]))
    assert (expert.tolist(), seat.tolist()) == ([0, 0, 2, 2, 2], [0, 1, 0, 1, 2])


def test_transformers_layer_with_the_same_weights():
    import transformers
    from transformers.models.switch_transformers import modeling_switch_transformers as theirs

    seats = math.ceil(N / E * 0.8)
    config = transformers.SwitchTransformersConfig(
        d_model=D, d_ff=H, num_experts=E, expert_capacity=seats, dropout_rate=0.0, router_jitter_noise=0.0
    )
    layer, other = make(dispatch=week.in_a_loop), theirs.SwitchTransformersSparseMLP(config)
    other.router.classifier.weight.data.copy_(layer.router)
    for i in range(E):
        expert = other.experts[f"expert_{i}"]
        expert.wi.weight.data.copy_(layer.w_in[i].T)
        expert.wo.weight.data.copy_(layer.w_out[i].T)
    x = torch.randn(N, D)
    mask, _, logits = other.router(x[None])
    near(layer(x)[0], other(x[None])[0], 1e-6)
    assert (mask[0].sum(0) == layer.load.clamp(max=seats)).all() and layer.dropped > 0
    choice = F.one_hot(logits.argmax(-1), E)  # before any is dropped
    z = theirs.router_z_loss_func(logits)
    # theirs makes the choices anew from p
    balance = E * (choice.float().mean(1) * logits.softmax(-1).mean(1)).sum()
    assert layer(x)[1].item() == pytest.approx((0.5 * balance + 0.25 * z).item(), rel=1e-5)
    grads = torch.autograd.grad(layer(x)[0].square().sum(), [layer.router, layer.w_in, layer.w_out])
    other.zero_grad()
    other(x[None])[0].square().sum().backward()
    near(grads[0], other.router.classifier.weight.grad, 1e-4)
    for i in range(E):
        near(grads[1][i], other.experts[f"expert_{i}"].wi.weight.grad.T, 1e-4)
        near(grads[2][i], other.experts[f"expert_{i}"].wo.weight.grad.T, 1e-4)


def test_the_default_takes_the_way_that_fits(monkeypatch):
    for way in ("in_a_loop", "padded", "grouped"):
        monkeypatch.setattr(week, way, lambda *args, way=way: way)

    def pick(rows, dtype=torch.float32, width=8, device="cpu"):
        x, counts = torch.zeros(rows, width, dtype=dtype, device=device), torch.zeros(4, dtype=torch.int64)
        return week.fastest(x, x[:, :1], torch.zeros(4, width, 12), torch.zeros(4, 12, width), counts, F.relu)

    assert pick(1024) == pick(1024, f64) == "in_a_loop" and pick(1023) == "grouped"
    assert pick(100, f64) == pick(100, width=6) == pick(5000, device="meta") == pick(100, torch.bfloat16) == "padded"


def test_work_per_token_does_not_grow_with_the_experts():
    flops, sizes = {}, {}
    for experts in (1, 4, 16):
        layer = week.SwitchFFN(D, H, experts, math.inf, dispatch=week.in_a_loop)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(64, D))
        flops[experts] = counter.get_total_flops() - 2 * 64 * D * experts * (experts > 1)  # less the router's
        sizes[experts] = layer.w_in.numel() + layer.w_out.numel()
    assert flops[1] == flops[4] == flops[16] == 2 * 64 * 2 * D * H
    assert sizes == {e: e * 2 * D * H for e in sizes}


# ---------------------------------------------------------------------------------------------- the layer


def test_the_parameters_start_as_they_should():
    layer = week.SwitchFFN(64, 256, 32)
    for w, deviation in ((layer.router, 0.1 / 8), (layer.w_in, 1 / 8), (layer.w_out, 1 / 16)):
        assert w.std().item() == pytest.approx(deviation, rel=0.05)
    assert (layer.capacity_factor, layer.top_k, layer.alpha, layer.z, layer.rule) == (1.25, 1, 0.01, 0.001, "loss")
    assert layer.dispatch is week.fastest and layer.act is F.relu


def test_who_comes_too_late_gets_exactly_zero():
    layer, x = make(capacity=0.5), torch.randn(N, D)
    y, _ = layer(x)
    dropped = [t for t, _ in by_hand(layer, x)[2]]
    assert len(dropped) > 5 and (y[dropped] == 0).all()
    assert (y[[t for t in range(N) if t not in dropped]] != 0).any(1).all()
    assert layer.dropped == pytest.approx(len(dropped) / N)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_())[0].sum(), x)
    assert (grad[dropped] == 0).all()


def test_seats_are_those_of_equation_3():
    layer = make(capacity=1.1)
    seated, load, served = layer.seat(torch.tensor([4, 0, 0, 0, 0, 4, 0, 2, 0]))  # 9 choices: 2 seats each
    assert load.tolist() == [6, 0, 1, 0, 2] and served.tolist() == [2, 0, 1, 0, 2]
    assert seated.tolist() == [1, 2, 7, 0, 5]
    layer.capacity_factor = math.inf
    assert len(layer.seat(torch.zeros(9, dtype=torch.int64))[0]) == 9
    layer.capacity_factor = 1e-3
    assert len(layer.seat(torch.zeros(9, dtype=torch.int64))[0]) == 1


def test_shapes_of_any_rank():
    layer, x = make(), torch.randn(2, 3, 7, D)
    near(layer(x)[0], layer(x.view(-1, D))[0].view(2, 3, 7, D), 1e-6)
    assert layer.expert.shape == (42, 1)


@pytest.mark.parametrize("k", [1, 2])
def test_who_comes_later_displaces_nobody(k):
    layer, x = make(k=k, capacity=0.6), torch.randn(N, D)
    before = layer(x)[0]
    x[20:] = torch.randn(N - 20, D)
    near(layer(x)[0][:20], before[:20], 1e-6)


def test_the_gate_is_the_only_way_to_the_router():
    layer, x = make(alpha=0, z=0), torch.randn(N, D)
    layer(x)[0].sum().backward()
    assert (layer.router.grad != 0).any()
    _, p, expert, gate = layer.route(x)
    assert torch.equal(gate, p.max(1, keepdim=True)[0]) and torch.equal(expert, p.argmax(1, keepdim=True))
    _, _, expert, gate = make(k=3).route(x)
    near(gate.sum(1), torch.ones(N), 1e-6)
    assert torch.equal(expert, p.topk(3)[1])


def test_all_experts_asked_is_the_soft_mixture():
    layer, x = make(k=E, capacity=math.inf).double(), torch.randn(N, D, dtype=f64)
    p = layer.route(x)[1]
    answers = torch.stack([layer.act(x @ u) @ v for u, v in zip(layer.w_in, layer.w_out)], 1)
    near(layer(x)[0], (p[:, :, None] * answers).sum(1), 1e-12)


def test_one_expert_is_the_dense_layer():
    layer, x = make(experts=1).double(), torch.randn(3, 7, D, dtype=f64)
    y, aux = layer(x)
    near(y, F.relu(x @ layer.w_in[0]) @ layer.w_out[0])
    assert aux == 0
    twin = make(experts=2, capacity=math.inf).double()  # both experts the same: y is the gate times the dense one
    for w, own in ((twin.w_in, layer.w_in), (twin.w_out, layer.w_out)):
        w.data.copy_(own.expand_as(w))
    near(twin(x)[0], y * twin.route(x.view(-1, D))[3].view(3, 7, 1), 1e-12)


# ---------------------------------------------------------------------------------------- the second losses


def test_balance_loss_is_alpha_where_all_get_the_same():
    p = torch.randn(45, E, dtype=f64).softmax(1)
    assert week.balance_loss(p, torch.full((E,), 9)).item() == pytest.approx(1)
    assert week.balance_loss(torch.full((45, E), 1 / E), torch.tensor([40, 1, 1, 1, 2])).item() == pytest.approx(1)
    one = torch.eye(E)[[2] * 45]
    assert week.balance_loss(one, one.sum(0)).item() == E
    layer = make(alpha=0.03, z=0)
    layer.router.data.zero_()
    assert layer(torch.randn(N, D))[1].item() == pytest.approx(0.03)


def test_balance_loss_pushes_the_busiest_down():
    logits = torch.zeros(45, E, requires_grad=True)
    load = torch.tensor([30, 3, 4, 5, 3])
    (grad,) = torch.autograd.grad(week.balance_loss(logits.softmax(1), load), logits)
    assert (grad[:, 0] > 0).all() and (grad[:, 1:] < 0).all()


def test_z_loss_is_the_square_of_the_log_of_the_sum():
    layer, x = make(alpha=0, z=0.7), torch.randn(N, D)
    logits = x @ layer.router.T
    assert layer(x)[1].item() == pytest.approx(0.7 * (logits.exp().sum(1).log() ** 2).mean().item(), rel=1e-5)


def test_biases_move_against_the_load_and_change_only_the_choice():
    layer, x = make(rule="bias", z=0), torch.randn(N, D)
    y, aux = layer(x)
    assert aux == 0
    mean = N / E
    assert layer.bias.tolist() == pytest.approx([0.001 * np.sign(mean - n) for n in layer.load.tolist()])
    layer.eval()
    before = layer.bias.clone()
    layer(x)
    assert torch.equal(before, layer.bias) and "bias" in layer.state_dict()
    layer.bias[3] = 2.0
    _, p, expert, gate = layer.route(x)
    assert (expert == 3).all() and torch.equal(gate[:, 0], p[:, 3])
    even = make(rule="bias", experts=2).train()
    even(torch.cat([x[:6], -x[:6]]))  # mirrored points: both experts get the same
    assert even.load.tolist() == [6, 6] and (even.bias == 0).all()
    for rule in ("loss", "none"):
        other = make(rule=rule)
        other(x)
        assert (other.bias == 0).all()
    assert make(rule="none", z=0)(x)[1] == 0


# --------------------------------------------------------------------------------------- precision, jitter


def test_the_router_is_in_float32_whatever_comes_in():
    layer, x = week.SwitchFFN(64, 16, 16), torch.randn(4000, 64)
    expert = layer.route(x)[2]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.route(x)[2], expert) and layer.route(x)[0].dtype == torch.float32
        y, aux = layer(x)
        flipped = (F.linear(x, layer.router).argmax(1) != expert[:, 0]).float().mean().item()
    assert 0.001 < flipped < 0.2, "what a router in bfloat16 would send elsewhere"
    near(y, layer(x)[0], 0.05)
    assert aux.dtype == torch.float32
    half = x.bfloat16()
    assert layer.route(half)[0].dtype == torch.float32
    assert torch.equal(layer.route(half)[2], layer.route(half.float())[2])
    assert layer.bfloat16()(half)[0].dtype == torch.bfloat16
    assert layer.double().route(x.double())[0].dtype == f64


def test_jitter_in_training_only_and_only_for_the_router():
    layer, x = make(jitter=0.1, alpha=0, z=0, capacity=math.inf), torch.randn(N, D)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])
    layer.train().router.data.copy_(torch.eye(D)[:E])
    seen = torch.stack([layer.route(torch.ones(N, D))[0] for _ in range(50)])
    assert 0.9 <= seen.min() < 0.903 and 1.097 < seen.max() <= 1.1 and abs(seen.mean() - 1) < 0.002
    layer.router.data.zero_()[2, 0] = 50
    x[:, 0] = 3.0  # sure of expert 2, gate 1, whatever the jitter
    near(layer(x)[0], layer.act(x @ layer.w_in[2]) @ layer.w_out[2], 1e-5)
    assert make(jitter=0.0)(x)[0].equal(make(jitter=0.0)(x)[0])


# ---------------------------------------------------------------------------------------- the Transformer


def config(**flags):
    return week.Config(**{**dict(experts=3, layers=2, width=32, context=11, batch=4, steps=6), **flags})


def test_the_recipe_of_week_2():
    import week02_transformer as week02

    model, x = week.GPT(config(), 13, 1).eval(), torch.randn(2, 5, 7, 32)
    angle = week02.angles(torch.arange(7), 32)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given))
    logits, aux = model(torch.randint(13, (2, 7)))
    near(seen[0][1], angle, 1e-6)
    assert seen[0][0].square().mean().item() == pytest.approx(1, abs=0.05) and logits.shape == (2, 7, 13) and aux == 0
    near(week.rotate(x, angle), week02.rotate(x, angle))
    block, x = model.blocks[0], torch.randn(2, 7, 32)
    q, k, v = block.qkv_proj(block.norm1(x)).chunk(3, -1)
    q, k = (week02.rotate(week02.unit_rms(y), angle) for y in (q, k))
    y = x + block.out_proj(week02.attention(q, k, v, torch.ones(7, 7, dtype=torch.bool).tril())[0])
    hidden = F.relu(block.norm2(y) @ block.ffn.w_in[0]) ** 2
    near(block(x, angle, 0)[0], y + hidden @ block.ffn.w_out[0], 1e-5)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_heads_are_side_by_side():
    block = week.Block(config(width=64), 1)
    seen = []
    original = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = lambda q, k, v, **options: (
            seen.append((q, options)) or original(q, k, v, **options)
        )
        block(torch.randn(2, 7, 64), torch.zeros(7, 16), 0)
    finally:
        F.scaled_dot_product_attention = original
    assert seen[0][0].shape == (2, 2, 7, 32) and seen[0][1] == dict(is_causal=True)


def test_flags_reach_the_layer():
    ffn = lambda **flags: week.Block(config(**flags), flags.get("experts", 3)).ffn  # noqa: E731
    plain = ffn(capacity=1.5, alpha=0.07)
    assert (plain.capacity_factor, plain.alpha, plain.rule, plain.top_k, plain.jitter) == (1.5, 0.07, "loss", 1, 0.01)
    assert plain.w_in.shape == (3, 32, 128) and ffn(top_k=2).top_k == 2 and ffn(experts=1, top_k=2).top_k == 1
    assert ffn(balance="bias").rule == "bias" and ffn(ablate="balance").rule == "none"
    assert ffn(ablate="balance", balance="bias").rule == "none"
    assert ffn(ablate="capacity").capacity_factor == math.inf and ffn(ablate="capacity").rule == "loss"
    near(plain.act(torch.tensor([-2.0, 3.0])), torch.tensor([0.0, 9.0]))


@pytest.mark.parametrize("k", [1, 2])
def test_a_future_token_cannot_change_the_past(k):
    model, tokens = week.GPT(config(top_k=k, capacity=0.8), 13, 3).eval(), torch.randint(13, (1, 11))
    for t in range(1, 11):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1) % 13
        a, b = model(tokens)[0], model(other)[0]
        near(a[:, :t], b[:, :t], 1e-6)
        assert (a[:, t] - b[:, t]).abs().max() > 1e-4


def test_the_second_losses_of_all_blocks_are_added():
    model, tokens, seen = week.GPT(config(), 13, 3).eval(), torch.randint(13, (2, 11)), []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda module, given, result: seen.append(result[1]))
    assert model(tokens)[1].item() == pytest.approx(sum(seen).item()) and len(seen) == 2 and seen[0] != seen[1]


# --------------------------------------------------------------------------------------------- training


def small(experts=3, **flags):
    torch.manual_seed(3)
    ids = torch.arange(400) % 13
    return week.GPT(config(**flags), 13, experts), ids[:300], ids[300:], config(**flags)


def quietly(function, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        result = function(*args)
    return result, out.getvalue()


def test_training_learns_and_reports():
    model, *rest = small(steps=60, batch=8)
    before = {name: w.clone() for name, w in model.named_parameters()}
    first = F.cross_entropy(model.eval()(rest[1][:99].view(9, 11))[0].flatten(0, 1), rest[1][1:100]).item()
    (seconds, loss), out = quietly(week.train, model.train(), *rest, "sparse")
    assert loss < first - 0.5 and seconds > 0 and out.count("sparse step") == 20 and "dropped" in out
    assert not model.training
    assert all((w != before[name]).any() for name, w in model.named_parameters())
    want = F.cross_entropy(model(rest[1][:99].view(9, 11))[0].flatten(0, 1), rest[1][1:100])
    assert loss == pytest.approx(want.item(), abs=1e-5)


def test_dense_and_sparse_see_the_same_batches():
    seen = {1: [], 3: []}
    for experts in seen:
        model, *rest = small(experts)
        model.register_forward_pre_hook(
            lambda module, given, e=experts: seen[e].append(given[0]) if module.training else None
        )
        quietly(week.train, model, *rest, "x")
    assert len(seen[1]) == 6 and all(torch.equal(a, b) for a, b in zip(seen[1], seen[3]))
    assert seen[1][0].shape == (4, 11) and not torch.equal(seen[1][0], seen[1][1])


def test_muon_takes_each_expert_by_itself(monkeypatch):
    made = []
    for name in ("Muon", "AdamW"):
        original = getattr(torch.optim, name)

        def make_it(parameters, *args, original=original, **options):
            made.append(original(parameters, *args, **options))
            return made[-1]

        monkeypatch.setattr(torch.optim, name, make_it)
    model, *rest = small(steps=1, lr=0.03)
    before = model.blocks[0].ffn.w_in.clone()
    quietly(week.train, model, *rest, "x")
    muon, adamw = sorted(made, key=lambda optimizer: type(optimizer).__name__, reverse=True)
    matrices = muon.param_groups[0]["params"]
    assert (muon.defaults["lr"], adamw.defaults["lr"]) == (0.03, 0.015)
    assert len(matrices) == 2 * (2 + 2 * 3) and all(w.ndim == 2 for w in matrices)
    own = {w.data_ptr() for w in matrices}
    for block in model.blocks:
        assert {e.data_ptr() for w in (block.ffn.w_in, block.ffn.w_out) for e in w} <= own
        assert {block.qkv_proj.weight.data_ptr(), block.out_proj.weight.data_ptr()} <= own
    others = {w.data_ptr() for w in adamw.param_groups[0]["params"]}
    assert not own & others and {model.embedding.weight.data_ptr(), model.blocks[1].ffn.router.data_ptr()} <= others
    grads = {w.data_ptr(): w.grad for w in matrices}
    for w in (model.blocks[0].ffn.w_in, model.blocks[1].ffn.w_out):
        assert all(torch.equal(grads[w[i].data_ptr()], w.grad[i]) for i in range(3))
    changes = model.blocks[0].ffn.w_in - before
    for i in range(3):  # singular values near one another: Newton-Schulz was done on each matrix
        values = torch.linalg.svdvals(changes[i])
        assert values[5] > 0.4 * values[0] > 0


def test_the_learning_rate_rises_and_falls():
    rates, original = [], torch.optim.Muon.step
    try:
        torch.optim.Muon.step = lambda self: rates.append(self.param_groups[0]["lr"]) or original(self)
        model, *rest = small(steps=20, lr=0.01)
        quietly(week.train, model, *rest, "x")
    finally:
        torch.optim.Muon.step = original
    want = [min(t / 2, 1, (21 - t) / 18) * 0.01 for t in range(1, 21)]
    assert rates == pytest.approx(want)


def test_a_loss_that_is_not_finite_stops_the_run():
    model, *rest = small()
    with torch.no_grad():
        model.embedding.weight[3] = math.nan
    with pytest.raises(SystemExit) as stop:
        quietly(week.train, model, *rest, "x")
    assert "step" in stop.value.code and "--lr" in stop.value.code


# ---------------------------------------------------------------------------------------------- studies


def test_bits_of_mutual_information():
    rows, columns = torch.randint(4, (5000,)), torch.randint(7, (5000,))
    assert week.bits(rows, columns) < 0.01
    assert week.bits(rows, (rows * 5 + 2) % 7) == pytest.approx(2, abs=0.01)
    assert week.bits(rows, rows // 2) == pytest.approx(1, abs=0.01)
    joint = torch.tensor([[4, 1], [2, 3]])
    a, b = [t.repeat_interleave(joint.flatten()) for t in (torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))]
    p = joint / 10
    want = (p * (p / (p.sum(1, keepdim=True) * p.sum(0))).log2()).sum().item()
    assert week.bits(a, b) == pytest.approx(want, abs=1e-6)


def test_experts_specialise_if_the_load_is_balanced():
    figures = {rule: week.specialise(rule, 8, 1337) for rule in ("none", "loss", "bias")}
    dense = week.specialise("dense", 1, 1337)
    assert dense[1:] == (0.0, [])
    for rule in ("loss", "bias"):
        assert figures[rule][0] < 0.25 * dense[0] and figures[rule][1] > 2.5
    assert figures["none"][0] > 5 * figures["loss"][0] and figures["none"][1] < figures["loss"][1] - 0.5
    loads = {rule: torch.stack(found[2]) for rule, found in figures.items()}
    assert loads["loss"].shape == (301, 8) and torch.allclose(loads["loss"].sum(1), torch.ones(301))
    assert loads["none"][-1].max() > 1.5 * loads["loss"][-1].max()
    assert week.specialise("loss", 8, 1, 3)[0] != week.specialise("loss", 8, 2, 3)[0]


def test_what_is_rotated():
    """With the true rotations in the experts and the centres in the router the error would be near none."""
    torch.manual_seed(5)
    turns, centres = torch.linalg.qr(torch.randn(8, 16, 16)).Q, 1.5 * torch.randn(8, 16)
    near(turns @ turns.mT, torch.eye(16).expand(8, 16, 16), 1e-5)
    assert centres.std().item() == pytest.approx(1.5, abs=0.2)
    assert 0.9 < week.specialise("none", 8, 5, 1)[0] < 1.6, "a layer that learned nothing has all of the error"


def test_the_rotations_are_learned_at_a_rate_that_falls(monkeypatch):
    seen, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: seen.append(self.param_groups[0]["lr"]) or step(self))
    week.specialise("loss", 8, 5, 40)
    assert seen[0] == seen[20] == 0.01 and seen[30] == pytest.approx(0.005) and seen[40] == 0 and len(seen) == 41


def test_time_layers_compares_with_the_dense_layer(monkeypatch):
    clock, seen = [0.0], []
    cost = {1: 2.0, 4: 6.0}

    def forward(self, x):
        clock[0] += cost[len(self.router)] * (1 + (self.dispatch is week.padded)) / (2 if len(seen) < 3 else 1)
        seen.append((len(self.router), self.dispatch, x.shape, self.w_in.grad))
        return (x * self.w_in.sum(), x.sum())

    monkeypatch.setattr(week.SwitchFFN, "forward", forward)
    monkeypatch.setattr(week.time, "perf_counter", lambda: clock[0])
    assert week.time_layers(4, 10, "cpu", [week.grouped, week.padded], 3, 8) == pytest.approx([2000, 6000, 12000])
    assert seen[:3] == [(1, None, (10, 8), None), (4, week.grouped, (10, 8), None), (4, week.padded, (10, 8), None)]
    assert len(seen) == 12 and all(grad is None for *_, grad in seen)
    seen.clear()
    once = week.time_layers(4, 10, "cpu", [week.grouped, week.padded], 1, 8)
    assert once == pytest.approx([2000, 6000, 12000]), "the first, which warms up and is quicker here, does not count"


# ---------------------------------------------------------------------------------------------- the whole


def test_the_figures_of_a_run(tiny):
    found, _, text = tiny
    keys = "val_loss dense_val_loss max_over_mean_load dropped_fraction slowdown_vs_dense speedup_vs_onehot"
    assert set(keys.split()) <= found.keys() and found["weights"] == "from scratch" and "Python" in found["data"]
    assert found["slowdown_32_experts"] > 0 and 1 <= found["max_over_mean_load"] <= 4
    assert 0 <= found["dropped_fraction"] < 0.5 and 0 < found["bits"] <= 2
    assert found["loss_error"] < 0.05 < found["dense_error"] and found["dense_bits"] == 0
    assert text.count("% of the characters") == 8 and text.count("times the dense layer") == 7
    shares = [float(part) for part in re.findall(r"expert \d+: +([\d.]+)%", text)]
    assert sum(shares) == pytest.approx(200, abs=0.5)


def test_load_and_drops_are_those_of_the_whole_validation_text(tmp_path, monkeypatch):
    kept, starts, original = [], [], week.train

    def train(model, ids, val, *rest):
        kept.append(model)
        starts.append((model.blocks[0].qkv_proj.weight.detach().clone(), val))
        return original(model, ids, val, *rest)

    monkeypatch.setattr(week, "train", train)
    monkeypatch.setattr(week, "time_layers", lambda *args: [1.0, 2.0, 30.0])
    monkeypatch.setattr(week, "specialise", lambda *args: (0.5, 1.0, [torch.ones(8) / 8] * 3))
    flags = "--tiny", "--steps", 3, "--out", tmp_path
    figures, text = quietly(call, week, *flags, "--top-k", 2)
    dense, sparse = kept
    assert len(dense.blocks[0].ffn.router) == 1 and len(sparse.blocks[0].ffn.router) == 4
    layers = [block.ffn for block in sparse.blocks]
    assert layers[0].expert.shape == (9984, 2), "312 windows of 32 characters"
    loads = [layer.expert.flatten().bincount(minlength=4) for layer in layers]
    assert figures["max_over_mean_load"] == pytest.approx(max((n.max() / n.float().mean()).item() for n in loads))
    assert figures["bits"] == week.bits(starts[0][1][:9984], layers[-1].expert[:, 0]), "of the last block"
    assert torch.equal(starts[0][0], starts[1][0]), "dense and sparse start alike"
    seats = math.ceil(2 * 9984 / 4 * 1.25)
    lost = sum((n - seats).clamp(min=0).sum().item() for n in loads) / (2 * 2 * 9984)
    assert figures["dropped_fraction"] == pytest.approx(lost)
    assert (figures["slowdown_vs_dense"], figures["speedup_vs_onehot"]) == (2.0, 15.0)
    assert quietly(call, week, *flags, "--ablate", "capacity")[0]["dropped_fraction"] == 0
    alone = {flag: quietly(call, week, *flags, "--seed", flag)[0]["val_loss"] for flag in (1, 2)}
    assert alone[1] != alone[2] and not torch.equal(starts[-4][0], starts[-1][0])


def test_balance_is_worth_something():
    loads = []
    for flags in (dict(), dict(ablate="balance")):
        model, *rest = small(experts=8, steps=60, alpha=0.1, capacity=9, **flags)
        quietly(week.train, model, *rest, "x")
        loads.append(max((b.ffn.load.max() / b.ffn.load.float().mean()).item() for b in model.blocks))
    assert loads[0] < loads[1] - 0.3


def test_sizes_that_do_not_fit_are_refused(tmp_path, refused):
    refused(call, week, "--tiny", "--out", tmp_path, "--width", 48, names=["--width 48", "32"])
    refused(call, week, "--tiny", "--out", tmp_path, "--width", 0, names=["--width 0"])
    refused(call, week, "--tiny", "--out", tmp_path, "--experts", 1, names=["--experts 1", "2"])
    refused(call, week, "--tiny", "--out", tmp_path, "--top-k", 5, names=["--top-k 5", "--experts 4"])
    refused(call, week, "--tiny", "--out", tmp_path, "--capacity", 0, names=["--capacity 0"])
    refused(call, week, "--tiny", "--out", tmp_path, "--capacity", "inf", names=["--capacity inf"])
    refused(call, week, "--tiny", "--out", tmp_path, "--context", 50_000, names=["--context 50000"])


def test_a_text_of_one_s_own(tmp_path, refused):
    (tmp_path / "mine.txt").write_text("to be or not to be\n" * 20)
    chars, ids, name = week.load_text(week.Config(text=str(tmp_path / "mine.txt")))
    assert "".join(chars[i] for i in ids).startswith("to be or") and name.endswith("mine.txt")
    (tmp_path / "tinyshakespeare.txt").write_text("thou\n")
    assert week.load_text(week.Config(data=str(tmp_path)))[2] == "tiny Shakespeare"
    refused(week.load_text, week.Config(text=str(tmp_path / "none.txt")), names=["--text"])


def test_the_picture():
    loads = [torch.eye(8)[2] * 0.75 + torch.eye(8)[5] * 0.25] * 9
    asked = torch.tensor([[0, 1, 1, 2], [7, 7, 7, 12]])
    page = week.draw({"a": loads, "b": loads[:1] * 500, "c": loads}, "a\nb ", asked)
    pixels = np.asarray(page).astype(int)
    hue = lambda i: list(week.ImageColor.getrgb(f"hsl({137 * i % 360},70%,70%)"))  # noqa: E731
    assert page.size == (1180, 282 + 34 * 2)
    for left in (20, 410, 800):
        assert (pixels[45:174, left + 2 : left + 358] == hue(2)).all(), "three quarters, from the top"
        assert (pixels[180:220, left + 2 : left + 358] == hue(5)).all()
    for row, k in ((0, 0), (0, 3), (1, 1), (1, 3)):
        assert pixels[270 + 34 * row, 30 + 285 * k].tolist() == hue(asked[row, k].item())
    assert (pixels[266:296, 20:1160] == 0).all(2).sum() > 20, "the letters"


def test_the_picture_of_a_run_is_written(tiny):
    with Image.open(tiny[1] / "switch.png") as image:
        assert image.size == (1180, 350)


def test_the_checks_at_the_start_are_these(capsys):
    week.run_checks()
    shown = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [verdict for verdict, *_ in shown] == ["ok"] * 12
    claims = " ".join(claim for _, claim, *_ in shown)
    for word in ("in_a_loop", "padded", "one_hot", "grouped", "k = 2", "no seat", "balance", "float32", "future"):
        assert word in claims


def renamed(function, like):
    function.__name__ = like
    return function


@pytest.mark.parametrize(
    "where, name, broken",
    [
        (week, "in_a_loop", lambda x, gate, u, v, n, act, right=week.in_a_loop: right(x, gate / gate, u, v, n, act)),
        (week, "padded", lambda x, gate, u, v, n, act, right=week.padded: right(x, gate, u, v, n.flip(0), act)),
        (week, "grouped", lambda x, gate, u, v, n, act, right=week.grouped: right(x, gate.detach(), u, v, n, act)),
        (week, "balance_loss", lambda p, load: len(load) * (p.mean(0) ** 2).sum()),
        (week, "balance_loss", lambda p, load: (load / load.sum() * p.mean(0)).sum()),
        (week.SwitchFFN, "seat", lambda self, c: (c.argsort(), *[c.bincount(minlength=len(self.router))] * 2)),
        (week.Block, "forward", lambda self, x, angle, total: (x + x.mean(1, keepdim=True), total)),
    ],
    ids=["gate", "counts", "detached gate", "f", "N", "seats", "future"],
)
def test_the_checks_at_the_start_catch_broken_maths(where, name, broken, monkeypatch):
    monkeypatch.setattr(where, name, renamed(broken, name))
    with pytest.raises(SystemExit) as stop:
        week.run_checks()
    assert stop.value.code == 1
