"""Week 2: attention, positions and blocks against torch, in float64 and with a prime number of everything."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import week02_transformer as week
from conftest import call
from PIL import Image
from torch import nn

B, T, S, H, D = 2, 7, 5, 3, 4
C = H * D
f64 = torch.float64


def near(a, b, tol=1e-12):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol


def shaken(module):
    """All weights drawn anew: a gain of 1 or a bias of 0 would hide a mistake."""
    with torch.no_grad():
        for w in module.parameters():
            w.add_(torch.randn_like(w) * 0.3)
    return module.double()


def in_torch_s_names(tensors):
    """{name: tensor} of our layers under the names of torch's, which keep query, key and value in one tensor."""
    parts = {}
    for name, tensor in tensors.items():
        parts.setdefault(re.sub(r"[qkv]_proj\.", "in_proj_", name), []).append(tensor)
    return {name: torch.cat(part) for name, part in parts.items()}


def agree(ours, theirs, ask_ours, ask_theirs, *inputs):
    """Same weights, same inputs: the same output, and the same gradient of each input and each weight."""
    theirs.load_state_dict(in_torch_s_names(ours.state_dict()))
    results = []
    for module, ask, names in ((ours, ask_ours, in_torch_s_names), (theirs, ask_theirs, dict)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = ask(module, *leaves)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        grads = names({name: w.grad for name, w in module.named_parameters()})
        results.append([y, *(x.grad for x in leaves), *(grads[name] for name in sorted(grads))])
    for a, b in zip(*results, strict=True):
        near(a, b, 1e-11)


def config(**flags):
    return week.Config(**{**dict(layers=2, heads=H, width=2 * C, context=11), **flags})


def gpt(**flags):
    """A small GPT in float64; its weights are shaken so that each part has something to say."""
    torch.manual_seed(1)
    return shaken(week.GPT(config(**flags), 13)).eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(B, T, C, dtype=f64)


@pytest.fixture
def memory():
    return torch.randn(B, S, C, dtype=f64)


causal = torch.ones(T, T, dtype=torch.bool).tril()
POSITIONS = ["rotary", "sinusoidal", "learned", "none"]
IDEAS = ["none", "prenorm", "relu2", "qknorm", "muon", "all"]

# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("mask", [None, torch.rand(T, S) < 0.7])
def test_attention_is_torch_s(mask):
    if mask is not None:
        mask[:, 0] = True
    q, k, v = torch.randn(B, H, T, D, dtype=f64), *torch.randn(2, B, H, S, D, dtype=f64)
    results = []
    for function in (lambda *a: week.attention(*a)[0], F.scaled_dot_product_attention):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        y = function(*leaves, mask)
        results.append([y, *torch.autograd.grad((y * torch.arange(1, y.numel() + 1).view_as(y)).sum(), leaves)])
    for a, b in zip(*results):
        near(a, b, 1e-10)
    weights = week.attention(q, k, v, mask)[1]
    near(weights.sum(-1), torch.ones(B, H, T, dtype=f64))
    if mask is not None:
        assert (weights[..., ~mask] == 0).all()


def test_multi_head_attention_is_torch_s(x, memory):
    mask = torch.rand(T, S) < 0.7
    mask[:, 1] = True
    agree(
        shaken(week.MultiHeadAttention(C, H)),
        nn.MultiheadAttention(C, H, batch_first=True).double(),
        lambda m, x, y: m(x, y, mask),
        lambda m, x, y: m(x, y, y, attn_mask=~mask)[0],
        x,
        memory,
    )


def test_multi_head_attention_keeps_its_weights_only_for_reading(x):
    attention = week.MultiHeadAttention(C, H).double()
    attention(x, x)
    assert attention.weights is None
    attention.eval()(x, x)
    assert attention.weights.shape == (B, H, T, T)


def test_query_key_normalisation_compares_directions(x):
    for qk_norm, longer in itertools.product((True, False), ("q_proj", "k_proj")):
        attention = shaken(week.MultiHeadAttention(C, H, qk_norm))
        before = attention(x, x)
        with torch.no_grad():
            for w in attention.get_submodule(longer).parameters():
                w.mul_(3)
        assert ((attention(x, x) - before).abs().max() < 1e-3) == qk_norm


# ------------------------------------------------------------------------------------------------ positions


def test_sinusoidal_encoding_is_the_formula_of_the_paper():
    pe = week.sinusoidal_encoding(17, 10)
    assert pe.shape == (17, 10)
    for position in range(17):
        for i in range(5):
            angle = position / 10000 ** (2 * i / 10)
            assert pe[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert pe[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_a_shift_of_the_sinusoids_is_one_linear_map():
    pe = week.sinusoidal_encoding(200, 8).double()
    here, there = pe[:-11], pe[11:]
    linear = torch.linalg.lstsq(here, there).solution
    near(here @ linear, there, 1e-4)
    near(linear.T @ linear, torch.eye(8, dtype=f64), 1e-3)


def test_rotate_turns_pairs():
    x, angle = torch.randn(B, H, T, D, dtype=f64), torch.randn(T, D // 2, dtype=f64)
    turned = week.rotate(x, angle)
    near(turned.norm(dim=-1), x.norm(dim=-1))
    as_complex = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    near(turned, torch.cat([as_complex.real, as_complex.imag], -1))


def test_rotary_scores_know_the_distance_and_nothing_else():
    q, k = torch.randn(2, D, dtype=f64)
    score = lambda m, n: (
        week.rotate(q[None], week.angles(torch.tensor([m]), D))
        @ week.rotate(k[None], week.angles(torch.tensor([n]), D)).T
    )  # noqa: E731
    near(score(3, 1), score(45, 43), 1e-5)
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3 and (score(3, 1) - score(1, 3)).abs() > 1e-3


@pytest.mark.parametrize("position", POSITIONS)
def test_only_without_positions_is_the_order_of_the_past_lost(position):
    model, tokens = gpt(position=position), torch.tensor([[1, 2, 3, 4, 5, 6]])
    swapped = torch.tensor([[2, 1, 4, 3, 5, 6]])
    first = model.blocks[0].self_attn
    model(tokens)
    a = first.weights[0, :, -1, [0, 1, 2, 3]]
    model(swapped)
    b = first.weights[0, :, -1, [1, 0, 3, 2]]
    assert ((a - b).abs().max() < 1e-9) == (position == "none")


# --------------------------------------------------------------------------------------------------- blocks


def test_layer_norm_is_torch_s(x):
    ours, theirs = shaken(week.LayerNorm(C)), nn.LayerNorm(C).double()
    agree(ours, theirs, lambda m, x: m(x), lambda m, x: m(x), x)
    near(week.unit_rms(x), F.rms_norm(x, (C,), eps=1e-5))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_block_is_torch_s_encoder_layer(x, pre_norm, activation):
    agree(
        shaken(week.TransformerBlock(C, H, 11, pre_norm=pre_norm, activation=getattr(F, activation))),
        nn.TransformerEncoderLayer(C, H, 11, 0, activation, batch_first=True, norm_first=pre_norm).double(),
        lambda m, x: m(x, mask=causal),
        lambda m, x: m(x, ~causal),
        x,
    )


@pytest.mark.parametrize("pre_norm", [False, True])
def test_block_is_torch_s_decoder_layer(x, memory, pre_norm):
    agree(
        shaken(week.TransformerBlock(C, H, 11, cross=True, pre_norm=pre_norm)),
        nn.TransformerDecoderLayer(C, H, 11, 0, batch_first=True, norm_first=pre_norm).double(),
        lambda m, x, y: m(x, y, causal),
        lambda m, x, y: m(x, y, ~causal),
        x,
        memory,
    )


@pytest.mark.parametrize("pre_norm", [False, True])
def test_dropout_acts_in_training_only(x, pre_norm):
    block = week.TransformerBlock(C, H, 11, pre_norm=pre_norm, dropout=0.5).double()
    assert not torch.equal(block(x), block(x))
    if pre_norm:
        block.dropout.p = 0.9
        untouched = sum((block(x) == x).double().mean().item() for _ in range(50)) / 50
        assert untouched == pytest.approx(0.81, abs=0.05), "what is dropped is the answer of a sub-layer, never x"
    block.eval()
    assert torch.equal(block(x), block(x))
    assert all(block.dropout.p == 0.3 for block in gpt(dropout=0.3).blocks)


# ------------------------------------------------------------------------------------------------------ GPT


def test_gpt_has_fewer_parameters_than_nanogpt_s():
    assert sum(w.numel() for w in week.GPT(week.Config(), 65).parameters()) == 801_664 < 804_096


@pytest.mark.parametrize("ablate", IDEAS)
@pytest.mark.parametrize("position", POSITIONS)
def test_a_future_token_cannot_change_the_past(position, ablate):
    model, tokens = gpt(position=position, ablate=ablate), torch.randint(13, (B, 11))
    for t in range(1, 11):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 1) % 13
        a, b = model(tokens), model(other)
        assert torch.equal(a[:, :t], b[:, :t])
        assert not torch.allclose(a[:, t], b[:, t]) and (t == 10 or not torch.allclose(a[:, t + 1 :], b[:, t + 1 :]))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("parts", [[11], [1] * 11, [4, 1, 6]])
def test_a_cache_changes_nothing(position, parts):
    model, tokens = gpt(position=position), torch.randint(13, (B, 11))
    cache = [[] for _ in model.blocks]
    near(torch.cat([model(part, cache) for part in tokens.split(parts, 1)], 1), model(tokens), 1e-6)
    assert cache[0][0].shape == (B, H, 11, 2 * D)


def test_embeddings_start_small_or_as_in_the_paper():
    for ablate, deviation in (("none", 0.02), ("all", 24**-0.5)):
        w = week.GPT(config(ablate=ablate), 997).embedding.weight
        assert w.std().item() == pytest.approx(deviation, rel=0.03) and abs(w.mean()) < 0.003


def test_the_embedding_is_the_output_layer():
    model, tokens = gpt(), torch.randint(13, (B, 11))
    seen = []
    model.norm.register_forward_hook(lambda module, given, y: seen.append(y))
    near(model(tokens), seen[0] @ model.embedding.weight.T)


def test_each_idea_can_be_taken_away():
    tokens = torch.randint(13, (B, 11))
    logits = {idea: gpt(ablate=idea)(tokens) for idea in IDEAS}
    assert torch.equal(logits.pop("muon"), logits["none"])
    assert len({y.sum().item() for y in logits.values()}) == len(logits)
    paper = gpt(ablate="all")
    assert isinstance(paper.norm, nn.Identity)
    for block in paper.blocks:
        assert block.activation is F.relu and not block.pre_norm and not block.self_attn.qk_norm
    y = torch.randn(9)
    near(gpt().blocks[0].activation(y), y.clamp(min=0) ** 2)


def test_embeddings_enter_with_variance_one():
    for ablate in ("none", "all"):
        model, seen = week.GPT(config(ablate=ablate, position="none", width=192), 13), []
        model.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        model(torch.arange(11)[None])
        assert seen[0].square().mean().item() == pytest.approx(1, abs=0.1)


# ----------------------------------------------------------------------------------------------------- data


def load(folder="data", **flags):
    return week.load_text(week.Config(data=str(folder), **flags))


def test_text_becomes_numbers_and_back(tmp_path):
    (tmp_path / "mine.txt").write_text("héllo 数\n", encoding="utf-8")
    chars, ids, name = load(text=str(tmp_path / "mine.txt"))
    assert chars == "".join(sorted(set("héllo 数\n"))) and name.endswith("mine.txt")
    assert ids.dtype == torch.int64 and "".join(chars[i] for i in ids) == "héllo 数\n"
    (tmp_path / "mine.txt").write_text("one line")
    assert "\n" in load(text=str(tmp_path / "mine.txt"))[0], "a sample starts with a new line"


def test_a_text_in_the_data_folder_is_used(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("to be\n")
    for tiny in (True, False):
        chars, ids, name = load(tmp_path, tiny=tiny)
        assert ("".join(chars[i] for i in ids), name) == ("to be\n", "tiny Shakespeare")


@pytest.fixture
def mirror(monkeypatch):
    """Stands in for the network: serves, or raises."""
    state = SimpleNamespace(error=None, asked=0, timeout=None)
    monkeypatch.setattr(week.socket, "setdefaulttimeout", lambda seconds: setattr(state, "timeout", seconds))

    def download(url, file, progress):
        state.asked += 1
        assert url.startswith("https://") and state.timeout <= 5, "a network that answers nothing would hang"
        if state.error:
            raise state.error
        file.write_text("from afar\n")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return state


def test_a_text_is_downloaded_once(tmp_path, mirror):
    for _ in range(2):
        chars, ids, name = load(tmp_path)
        assert ("".join(chars[i] for i in ids), name) == ("from afar\n", "tiny Shakespeare")
    assert mirror.asked == 1


@pytest.mark.parametrize("error", [OSError("unreachable"), TimeoutError("timed out")])
def test_no_network_means_python_s_own_source(tmp_path, mirror, capsys, error):
    mirror.error = error
    chars, ids, name = load(tmp_path)
    assert name == "Python's source" and len(ids) == 1_100_000 and 80 < len(chars) < 130
    assert "import" in "".join(chars[i] for i in ids[:5000])
    (line,) = capsys.readouterr().out.splitlines()
    assert str(error) in line and "Python's own library" in line and "tinyshakespeare.txt" in line


def test_tiny_never_asks_the_network(tmp_path, mirror):
    assert len(load(tmp_path, tiny=True)[1]) == 100_000 and mirror.asked == 0


def test_other_errors_are_not_swallowed(tmp_path, mirror):
    mirror.error = KeyError("a bug")
    with pytest.raises(KeyError):
        load(tmp_path)


def test_a_wrong_text_is_refused(tmp_path, refused):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("short\n")
    refused(lambda: load(text=str(tmp_path / "latin.txt")), names=["--text", "latin.txt"])
    refused(lambda: load(text=str(tmp_path / "none.txt")), names=["--text", "none.txt"])
    refused(call, week, "--tiny", "--text", tmp_path / "short.txt", names=["--context 32"])
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"\xff")
    refused(load, tmp_path, names=["--data", "tinyshakespeare.txt"])


# ------------------------------------------------------------------------------------------------- training


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = gpt(position="learned")
    adamw, muon = week.make_optimizers(model, config(lr=0.03))
    assert (type(adamw), type(muon)) == (torch.optim.AdamW, torch.optim.Muon)
    names = {id(w): name for name, w in model.named_parameters()}
    matrices = {names[id(w)] for w in muon.param_groups[0]["params"]}
    rest = {names[id(w)] for w in adamw.param_groups[0]["params"]}
    assert matrices == {
        name for name in names.values() if name.startswith("blocks") and "weight" in name and "norm" not in name
    }
    assert matrices | rest == set(names.values()) and not matrices & rest
    assert (adamw.defaults["lr"], muon.defaults["lr"]) == (0.015, 0.03)
    assert adamw.defaults["weight_decay"] == muon.defaults["weight_decay"] == 0
    assert adamw.defaults["betas"] == (0.9, 0.99)
    for ablate in ("muon", "all"):
        (only,) = week.make_optimizers(model, config(ablate=ablate))
        assert isinstance(only, torch.optim.AdamW) and len(only.param_groups[0]["params"]) == len(names)


def small(**flags):
    """Arguments for train(): text in which a character decides the next one."""
    cfg = config(**{**dict(batch=4, steps=60, tiny=True), **flags})
    torch.manual_seed(cfg.seed)
    ids = (torch.arange(500) * 3 + 1) % 13
    return week.GPT(cfg, 13), ids[:400], ids[400:], cfg, "\nabcdefghijkl", torch.autocast("cpu", enabled=False)


def test_training_learns_what_there_is_to_learn(capsys):
    model, ids, val, *rest = small(steps=150)
    before = week.evaluate(model, val)
    seconds, after = week.train(model, ids, val, *rest)
    assert before > 2 and after < 0.2 and seconds > 0
    assert after == pytest.approx(week.evaluate(model.eval(), val))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("validation loss") for line in lines) == 5
    assert any(re.match(r"step +100/150 \| loss \d+\.\d{4} \| [\d,]+ tok/s \| \d+ s left", line) for line in lines)


def test_each_flag_of_the_training_matters():
    def weights(**flags):
        model, *rest = small(**flags)
        week.train(model, *rest)
        return torch.cat([w.detach().flatten() for w in model.blocks.parameters()])

    base = weights(steps=7)
    assert torch.equal(base, weights(steps=7))
    for flags in (
        dict(seed=3),
        dict(lr=0.01),
        dict(batch=5),
        dict(dropout=0.1),
        dict(ablate="muon"),
        dict(context=10),
    ):
        assert not torch.equal(base, weights(**{"steps": 7, **flags})), flags


def test_the_validation_text_has_no_influence_on_training():
    model, ids, val, *rest = small(steps=7)
    week.train(model, ids, val, *rest)
    other, *_ = small(steps=7)
    week.train(other, ids, val.flip(0), *rest)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_the_learning_rate_rises_then_falls(monkeypatch):
    class Recorder:
        def __init__(self):
            self.param_groups, self.defaults, self.seen = [{"lr": 0.0}], {"lr": 2.0}, []

        def step(self):
            self.seen.append(self.param_groups[0]["lr"])

    recorder = Recorder()
    monkeypatch.setattr(week, "make_optimizers", lambda model, cfg: [recorder])
    week.train(*small(steps=50))
    assert recorder.seen[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert recorder.seen[5] == pytest.approx(2.0) and recorder.seen[-1] == pytest.approx(2 / 45)
    assert recorder.seen[27] == pytest.approx(2 * 23 / 45)


def test_windows_come_from_all_over_the_text(monkeypatch):
    model, ids, val, cfg, *rest = small(steps=200, batch=16)
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens, *a: model.training and seen.append(tokens) or forward(tokens, *a)
    )
    week.train(model, torch.arange(400) % 13, val, cfg, *rest)
    starts = torch.cat(seen)[:, 0].bincount(minlength=13)
    assert torch.cat(seen).shape == (200 * 16, 11) and starts.min() > 0.7 * starts.float().mean()
    assert ((torch.cat(seen)[:, 1:] - torch.cat(seen)[:, :-1]) % 13 == 1).all()


def test_the_shortest_text_is_one_window():
    model, ids, val, cfg, *rest = small(steps=1)
    week.train(model, ids[: cfg.context + 1], val, cfg, *rest)


def test_each_process_takes_its_share_of_the_batch(monkeypatch):
    seen = []
    monkeypatch.setattr(week.nn.parallel, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda loss: None)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(week, "RANK", rank)
        monkeypatch.setattr(week, "WORLD", world)
        model, *rest = small(steps=1)
        model.register_forward_pre_hook(lambda module, given: seen.append(given[0]) if module.training else None)
        week.train(model, *rest)
    whole, first, second = seen
    assert len(whole) == 4 and torch.equal(whole[0::2], first) and torch.equal(whole[1::2], second)


def test_a_loss_that_is_not_finite_stops_the_run():
    model, *rest = small()
    with torch.no_grad():
        model.embedding.weight[3] = math.nan
    with pytest.raises(SystemExit) as stop:
        week.train(model, *rest)
    assert "step" in stop.value.code and "--lr" in stop.value.code


def test_evaluate_reads_every_window_once():
    model, ids = gpt(), torch.randint(13, (11 * 300 + 1 + 7,))
    losses = [
        F.cross_entropy(model(ids[i : i + 11][None])[0], ids[i + 1 : i + 12], reduction="none")
        for i in range(0, 3300, 11)
    ]
    assert week.evaluate(model, ids) == pytest.approx(torch.cat(losses).mean().item(), abs=1e-9)


def in_two_processes(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", week.__file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--tiny", "--out", "out"], cwd=folder, env=env, text=True, capture_output=True, timeout=300
    )
    return folder, done


@pytest.mark.early(by=in_two_processes)
def test_two_processes_train_as_one(tiny, early):
    folder, done = early
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RESULT") == 1
    of_steps = lambda said: [float(loss) for loss in re.findall(r"^step .*?loss (\S+)", said, re.M)]  # noqa: E731
    one = of_steps(tiny[2]), tiny[0]["val_loss"]
    two = of_steps(done.stdout), json.loads((folder / "out" / "metrics.json").read_text())["val_loss"]
    assert len(one[0]) == 60 and one[0][:5] == pytest.approx(two[0][:5], abs=2e-3)
    assert one[0] == pytest.approx(two[0], abs=0.03) and one[1] == pytest.approx(two[1], abs=0.01)


# ---------------------------------------------------------------------------------- writing, and the whole


CHARS = "\nabcdefghijkl"


@pytest.mark.parametrize("position", POSITIONS)
def test_sampling_with_a_cache_writes_the_same_beyond_the_context_too(position):
    model, cfg = gpt(position=position), config(prompt="abc")
    texts = {week.sample(model, CHARS, cfg, 40, cached) for cached in (True, False)}
    assert len(texts) == 1 and len(texts.pop()) == 43


def test_a_cache_gives_each_token_to_the_model_once(monkeypatch):
    model, seen = gpt(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, *a: seen.append(tokens.shape[1]) or forward(tokens, *a))
    week.sample(model, CHARS, config(prompt="abc"), 14)
    assert seen == [3] + [1] * 8 + [5] + [1] * 4, "the whole prompt, then one by one; at 12 > 11, the later half afresh"


def test_sampling_obeys_its_flags():
    model, sample = gpt(), lambda **flags: week.sample(gpt(), CHARS, config(**flags), 30)  # noqa: E731
    assert sample().startswith("\n") and sample(prompt="fgh").startswith("fgh")
    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    greedy = sample(top_k=1)
    assert greedy == sample(top_k=1, seed=9) == sample(temperature=1e-3) != sample(temperature=3.0)
    tokens = [CHARS.index(c) for c in greedy]
    assert model(torch.tensor([tokens[:5]]))[0, -1].argmax() == tokens[5]
    assert sample(top_k=99, seed=4) == sample(seed=4)
    second = {week.sample(model, CHARS, config(top_k=3, seed=s, temperature=5.0), 1)[1] for s in range(60)}
    best = model(torch.tensor([[0]]))[0, -1].topk(3).indices
    assert second == {CHARS[i] for i in best}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished --tiny run in this process: (figures, folder)."""
    out = tmp_path_factory.mktemp("week02")
    return call(week, "--tiny", "--out", out, "--steps", 200), out


def test_the_whole_beats_its_baseline(trained):
    figures, out = trained
    assert figures["val_loss"] < figures["baseline_loss"] - 0.1
    found = json.loads((out / "metrics.json").read_text())
    keys = {"val_loss", "train_seconds", "parameters", "tokens", "tokens_per_second", "baseline_loss"}
    assert keys <= found.keys() and found["tokens"] == 200 * 16 * 32
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["train_seconds"])
    saved = week.safetensors.torch.load_file(out / "gpt.safetensors")
    assert found["parameters"] == sum(w.numel() for w in saved.values())


def test_the_baseline_is_a_table_of_pairs(tmp_path, monkeypatch):
    text = "abacabadabacabae" * 40
    (tmp_path / "t.txt").write_text(text)
    monkeypatch.setattr(week, "train", lambda *args: (1.0, 2.0))
    figures = call(week, "--tiny", "--out", tmp_path / "o", "--text", tmp_path / "t.txt")
    train, val = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    kinds = len(set(text) | {"\n"})
    losses = []
    for a, b in zip(val, val[1:]):
        follow = sum(train[i : i + 2] == a + b for i in range(len(train)))
        losses.append(-math.log((follow + 0.1) / (sum(c == a for c in train[:-1]) + 0.1 * kinds)))
    assert figures["baseline_loss"] == pytest.approx(np.mean(losses), abs=1e-4)


def test_the_weights_that_are_saved_are_those_that_were_tested(trained):
    figures, out = trained
    cfg = week.Config(**json.loads((out / "metrics.json").read_text())["config"])
    chars, ids, _ = week.load_text(cfg)
    model = week.GPT(cfg, len(chars))
    model.load_state_dict(week.safetensors.torch.load_file(out / "gpt.safetensors"))
    assert week.evaluate(model.eval(), ids[int(0.9 * len(ids)) :]) == pytest.approx(figures["val_loss"], abs=1e-5)


def test_ideas_and_positions_are_worth_something(trained, tmp_path):
    assert (
        trained[0]["val_loss"] < call(week, "--tiny", "--out", tmp_path, "--steps", 200, "--ablate", "muon")["val_loss"]
    )


def test_the_seed_matters(tmp_path):
    losses = {call(week, "--tiny", "--out", tmp_path, "--steps", 2, "--seed", seed)["val_loss"] for seed in (2, 3)}
    assert len(losses) == 2


def test_predict_goes_on_with_the_prompt(trained, capsys, refused, tmp_path):
    out = trained[1]
    before = (out / "metrics.json").read_bytes()
    capsys.readouterr()
    call(week, "--tiny", "--out", out, "--prompt", "import ")
    text = capsys.readouterr().out
    assert "\nimport " in text and text.splitlines()[-1] == "RESULT characters=500"
    assert (out / "metrics.json").read_bytes() == before
    cfg = week.Config(**{**json.loads(before)["config"], "prompt": "import "})
    chars, _, _ = week.load_text(cfg)
    model = week.GPT(cfg, len(chars))
    model.load_state_dict(week.safetensors.torch.load_file(out / "gpt.safetensors"))
    assert week.sample(model.eval(), chars, cfg, 500) in text
    refused(call, week, "--tiny", "--out", out, "--prompt", "数", names=["--prompt"])
    refused(
        call, week, "--tiny", "--out", out, "--prompt", "x", "--width", "64", names=["--prompt 'x'", "size mismatch"]
    )
    refused(call, week, "--tiny", "--out", tmp_path / "new", "--prompt", "x", names=["--prompt 'x'"])


def test_sizes_that_do_not_fit_are_refused(tmp_path, refused, monkeypatch):
    refused(call, week, "--tiny", "--out", tmp_path, "--width", 30, "--heads", 4, names=["--width 30", "2 x"])
    refused(call, week, "--tiny", "--out", tmp_path, "--dropout", 1, names=["--dropout 1"])
    refused(call, week, "--tiny", "--out", tmp_path, "--context", 50_000, names=["--context 50000"])
    monkeypatch.setattr(week, "WORLD", 3)
    refused(call, week, "--tiny", "--out", tmp_path, names=["--batch 16", "3 processes"])


def test_the_picture_shows_who_looks_at_whom(trained):
    with Image.open(trained[1] / "transformer.png") as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    assert pixels.shape == (80 + 260 * 2, 60 + 260 * 2)
    for i in range(2):
        for h in range(2):
            map = pixels[60 + 260 * i :, 50 + 260 * h :][:240, :240]
            cells = map[5::10, 5::10]
            assert cells.shape == (24, 24) and cells[0, 0] < 3, "the first token can look at itself only"
            assert (cells[np.triu_indices(24, 1)] == 255).all(), "nobody looks ahead"
            assert (cells[np.tril_indices(24)] < 255).mean() > 0.5


def test_the_checks_at_the_start_are_these(capsys):
    week.run_checks()
    shown = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [verdict for verdict, *_ in shown] == ["ok"] * 6
    claims = " ".join(claim for _, claim, *_ in shown)
    for word in (
        "scaled_dot_product_attention",
        "TransformerDecoderLayer",
        "reversed",
        "rotary",
        "future",
        "KV cache",
    ):
        assert word in claims


def no_scale(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize(
    "where, name, broken",
    [
        (week, "attention", no_scale),
        (week, "attention", lambda q, k, v, mask=None, right=week.attention: right(q, k, v, None)),
        (week, "unit_rms", lambda x: x * x.square().mean(-1, keepdim=True).sqrt()),
        (week, "rotate", lambda x, angle, right=week.rotate: right(x, angle.square())),
        (week.LayerNorm, "forward", lambda self, x: week.unit_rms(x) * self.weight + self.bias),
        (week.MultiHeadAttention, "forward", lambda self, x, *rest, **options: self.out_proj(self.v_proj(x))),
        (
            week.TransformerBlock,
            "forward",
            lambda self, x, *rest, **options: x + self.linear2(F.relu(self.linear1(x))),
        ),
    ],
    ids=["scale", "mask", "rms", "rotary", "mean", "heads", "attention"],
)
def test_the_checks_at_the_start_catch_broken_maths(where, name, broken, monkeypatch):
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(SystemExit) as stop:
        week.run_checks()
    assert stop.value.code == 1
