"""Week 12: slots, the wardrobe, files and the router against definitions, on models made here; no network."""

import copy
import gc
import io
import json
import math
import shutil
import statistics
import weakref
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
import week09_lora as week9
import week12_lora_router as week
from conftest import call
from PIL import Image
from torch import nn

I, O, N = 11, 7, 5  # noqa: E741
f64 = torch.float64


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    for kit in (transformers, diffusers.utils):
        kit.logging.set_verbosity_error()
        kit.logging.disable_progress_bar()


def net():
    """A convolution with a stride and padding, and a linear layer, in float64."""
    return nn.Sequential(nn.Conv2d(5, O, 3, 2, 1), nn.Flatten(2), nn.Linear(12, I)).double()


def adapter(r, seed, layers="02"):
    """{layer: (A, B)} of rank r for net()."""
    dice = torch.Generator().manual_seed(seed)
    new = lambda *size: torch.randn(size, generator=dice, dtype=f64)  # noqa: E731
    parts = {"0": (new(r, 5, 3, 3), new(O, r, 1, 1)), "2": (new(r, 12), new(I, r))}
    return {layer: parts[layer] for layer in layers}


EACH = 8 * (45 + O + 12 + I)  # bytes of one adapter of rank 1


def wardrobe(slots, **adapters):
    base = net()
    rank = max(len(A) for parts in adapters.values() for A, _ in parts.values())
    model = copy.deepcopy(base)
    return base, model, week.Wardrobe(model, adapters, (slots + 0.5) * rank * EACH)


def by_hand(base, parts, weight, x):
    W = [base[0].weight, base[2].weight]
    if "0" in parts:
        A, B = parts["0"]
        W[0] = W[0] + weight * torch.einsum("or,rikl->oikl", B[..., 0, 0], A)
    if "2" in parts:
        A, B = parts["2"]
        W[1] = W[1] + weight * B @ A
    return F.linear(F.conv2d(x, W[0], base[0].bias, 2, 1).flatten(2), W[1], base[2].bias)


@pytest.fixture(scope="module")
def small():
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(3)
    sd = week.small_model()
    for w in sd.unet.parameters():
        w.data.add_(0.02 * torch.randn_like(w))
    sd.set_progress_bar_config(disable=True)
    return sd


def for_unet(unet, r, seed, keep=lambda name: True):
    """An adapter for every layer of a U-Net."""
    torch.manual_seed(seed)
    return {
        k: (torch.randn(r, *m.weight.shape[1:]) / 9, torch.randn(len(m.weight), r, *[1] * (m.weight.dim() - 2)) / 9)
        for k, m in unet.named_modules()
        if type(m) in (nn.Linear, nn.Conv2d) and keep(k)
    }


# ------------------------------------------------------------------------------------------------ slots and gate


def test_one_batch_of_different_adapters_is_the_definition():
    p, q, r = adapter(3, 1), adapter(1, 2), adapter(2, 3)
    base, model, closet = wardrobe(3, p=p, q=q, r=r)
    for name in "pqr":
        closet.fetch(name)
    x = torch.randn(N, 5, 6, 8, dtype=f64)
    choices = [("q", 1.0), ("", 0.0), ("p", 0.25), ("r", -2.0), ("q", 0.5)]
    closet.wear(choices)
    known = dict(p=p, q=q, r=r)
    for y, sample, (name, weight) in zip(model(x), x, choices, strict=True):
        assert torch.allclose(y, by_hand(base, known.get(name, {}), weight, sample[None])[0], atol=1e-11)


def test_without_an_adapter_the_base_bit_for_bit():
    base, model, closet = wardrobe(2, p=adapter(3, 1), q=adapter(3, 2))
    x = torch.randn(N, 5, 6, 8, dtype=f64)
    for name in "pq":
        closet.fetch(name)
    closet.wear([("p", 1.0)] * N)
    assert not torch.allclose(model(x), base(x))
    closet.wear([("", 1.0)] * N)
    assert torch.equal(model(x), base(x)), "no adapter has no weight"


def test_no_more_slots_than_half_the_rows_of_the_gate():
    """The pipeline asks with the prompts and without them: 32 prompts, each with an adapter of its own, fill it."""
    _, _, closet = wardrobe(40, **{f"p{n}": adapter(1, n) for n in range(40)})
    assert closet.S == 32 and len(closet.gate) == 64
    closet.wear([("", 0.0)] * 64)
    _, _, closet = wardrobe(40, p=adapter(1, 1), q=adapter(1, 2))
    assert closet.S == 2


def test_two_dimensions_three_and_four():
    layer = nn.Linear(I, O).double()
    model = nn.Sequential(layer)
    A, B = torch.randn(2, I, dtype=f64), torch.randn(O, 2, dtype=f64)
    closet = week.Wardrobe(model, {"p": {"0": (A, B)}}, math.inf)
    closet.fetch("p")
    closet.wear([("p", 0.5), ("", 0.0), ("p", 1.0)])
    g = torch.tensor([0.5, 0, 1.0], dtype=f64)
    for x in (torch.randn(3, I, dtype=f64), torch.randn(3, 4, I, dtype=f64)):
        want = F.linear(x, layer.weight, layer.bias) + g.view(3, *[1] * (x.dim() - 1)) * (x @ A.T @ B.T)
        assert torch.allclose(model(x), want, atol=1e-12)


def test_fresh_slots_are_drawn_and_change_nothing():
    base, model, closet = wardrobe(2, p=adapter(2, 1), q=adapter(2, 2))
    closet.gate.fill_(1)
    x = torch.randn(N, 5, 6, 8, dtype=f64)
    assert torch.equal(model(x), base(x))
    assert all(slot.A.std() > 0.02 and slot.B.abs().max() == 0 for slot in closet.slots.values())
    names = {name for name, w in model.named_parameters() if w.requires_grad}
    assert names == {f"{layer}.{half}" for layer in "02" for half in "AB"}, "the base is frozen, the slots learn"


def test_only_the_adapter_that_is_worn_learns():
    _, model, closet = wardrobe(2, p=adapter(2, 1), q=adapter(2, 2))
    for name in "pq":
        closet.fetch(name)
    closet.wear([("q", 1.0)] * N)
    model(torch.randn(N, 5, 6, 8, dtype=f64)).square().sum().backward()
    for slot in closet.slots.values():
        p, q = slot.A.grad.split(2)
        assert p.abs().max() == 0 < q.abs().max()
        p, q = slot.B.grad.split(2, 1)
        assert p.abs().max() == 0 < q.abs().max()


# -------------------------------------------------------------------------------------------------- the wardrobe


def test_the_least_recently_used_makes_room():
    _, _, closet = wardrobe(2, p=adapter(1, 1), q=adapter(1, 2), r=adapter(1, 3))
    for name, held in [("p", "p"), ("q", "pq"), ("p", "qp"), ("r", "pr"), ("r", "pr"), ("q", "rq")]:
        closet.fetch(name)
        assert [*closet.worn] == [*held], name
        assert sorted(closet.worn.values()) == [*range(len(held))], "no slot is used twice"


def test_nothing_of_the_last_adapter_is_left_in_a_slot():
    p, q = adapter(3, 1), adapter(1, 2, "2")  # q has fewer rows, and nothing for the convolution
    base, model, closet = wardrobe(1, p=p, q=q)
    x = torch.randn(N, 5, 6, 8, dtype=f64)
    for name in "pq":
        closet.fetch(name)
    closet.wear([("q", 1.0)] * N)
    assert torch.allclose(model(x), by_hand(base, q, 1.0, x), atol=1e-11)
    assert closet.slots["0"].A.abs().max() == 0 == closet.slots["0"].B.abs().max()
    assert closet.slots["2"].A[1:].abs().max() == 0 and torch.equal(closet.slots["2"].A[:1].data, q["2"][0])


def test_what_comes_in_is_a_copy():
    p = adapter(2, 1)
    before = {k: (A.clone(), B.clone()) for k, (A, B) in p.items()}
    _, _, closet = wardrobe(1, p=p, q=adapter(2, 2))
    for name in "pqp":
        closet.fetch(name)
    assert all(torch.equal(a, b) for k in p for a, b in zip(p[k], before[k], strict=True))


def test_budget_in_bytes():
    p = adapter(3, 1)
    for budget, slots in [(3 * EACH, 1), (6 * EACH - 1, 1), (6 * EACH, 2), (math.inf, 2)]:
        closet = week.Wardrobe(net(), {"p": p, "q": adapter(2, 2)}, budget)
        assert closet.S == slots
        held = sum(w.nbytes for slot in closet.slots.values() for w in (slot.A, slot.B))
        assert closet.bytes == held == 3 * slots * EACH <= budget


def test_too_small_a_budget_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        week.Wardrobe(net(), {"p": adapter(3, 1)}, 3 * EACH - 1)
    assert stop.value.code == 2 and "--budget" in capsys.readouterr().err


def storages(model, closet):
    return {w.data_ptr() for w in [*model.state_dict().values(), closet.gate]}


def test_a_hundred_requests_allocate_and_replace_nothing(small):
    unet = copy.deepcopy(small.unet)
    adapters = {name: for_unet(unet, 2, seed) for seed, name in enumerate("pqrs")}
    size = sum(w.nbytes for pair in adapters["p"].values() for w in pair)
    closet = week.Wardrobe(unet, adapters, 2.5 * size)
    assert (closet.S, closet.bytes) == (2, 2 * size)
    assert closet.gate.nbytes < 0.01 * 4 * size, "memory for N adapters: N times their bytes, and 1 %"
    before, modules = storages(unet, closet), [*unet.modules()]
    dice = torch.Generator().manual_seed(0)
    for _ in range(100):
        name = "pqrs"[torch.randint(4, (), generator=dice)]
        closet.fetch(name)
        closet.wear([(name, 1.0), ("", 0.0)])
    assert storages(unet, closet) == before
    assert all(a is b for a, b in zip(unet.modules(), modules, strict=True))


def test_an_adapter_that_is_given_up_is_gone():
    p, q = adapter(2, 1), adapter(2, 2)
    refs = [weakref.ref(w) for pair in p.values() for w in pair]
    _, _, closet = wardrobe(1, p=p, q=q)
    for name in "pq":
        closet.fetch(name)
    del closet.adapters["p"], p
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_a_swap_does_not_compile_again(small):
    unet, count = copy.deepcopy(small.unet), []
    adapters = {name: for_unet(unet, 2, seed, lambda k: "attn" in k) for seed, name in enumerate("pqr")}
    closet = week.Wardrobe(unet, adapters, 2.5 * sum(w.nbytes for pair in adapters["p"].values() for w in pair))
    z, text, t = torch.randn(4, 48, 8, 8), torch.randn(4, 12, 64), torch.tensor(500)

    def backend(graph, _):
        count.append(1)
        return graph.forward

    torch._dynamo.reset()
    compiled, outputs = torch.compile(unet, backend=backend), []
    with torch.no_grad():
        for a, b in ["pq", "qr", "rp"]:
            closet.fetch(a), closet.fetch(b)
            closet.wear([(a, 1.0), (b, 0.5), ("", 0.0), (a, 0.3)])
            outputs.append(compiled(z, t, text).sample)
            first = first if len(outputs) > 1 else len(count)
            assert torch.allclose(outputs[-1], unet(z, t, text).sample, atol=1e-5)
    torch._dynamo.reset()
    assert len(count) == first > 0, "the graph of the first call is the graph of all"
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


# ------------------------------------------------------------------------------------------------------ files


def write(path, state, **notes):
    safetensors.torch.save_file(state, path, {"lora_adapter_metadata": json.dumps(notes)} if notes else None)
    return path


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def shape(small):
    return small.unet.get_submodule(LAYER).weight.shape


@pytest.mark.parametrize("a, b", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (6.0, 2.0)])
def test_reads_the_formats_of_the_field(small, tmp_path, a, b, alpha, scale):
    O, I = shape(small)  # noqa: E741
    A, B = torch.randn(3, I), torch.randn(O, 3)
    notes = {} if alpha is None else {"unet.lora_alpha": alpha, "unet.r": 3}
    path = write(tmp_path / "mine.safetensors", {f"unet.{LAYER}.{a}.weight": A, f"unet.{LAYER}.{b}.weight": B}, **notes)
    parts, wanted = week.read_adapter(path, small.unet)
    assert [*parts] == [LAYER] and wanted == ["mine"], "no examples: its name"
    half = {f"unet.{LAYER}.{a}.weight": A.half(), f"unet.{LAYER}.{b}.weight": B.half()}
    halves, wanted = week.read_adapter(write(tmp_path / "half.safetensors", half, examples=[]), small.unet)
    assert halves[LAYER][0].dtype == torch.float32 and torch.equal(halves[LAYER][0], A.half().float())
    assert wanted == ["half"]
    assert torch.equal(parts[LAYER][0], A) and torch.allclose(parts[LAYER][1], scale * B)


def test_reads_the_file_of_week_9(small, tmp_path):
    unet = copy.deepcopy(small.unet)
    loras = week9.inject_lora(unet, week9.EVERYTHING, 2, 3.0)
    for lora in loras.values():
        nn.init.normal_(lora.lora_B.weight, std=0.05)
    z, text, t = torch.randn(2, 48, 8, 8), torch.randn(2, 12, 64), torch.tensor(500)
    with torch.no_grad():
        want = unet(z, t, text).sample
    week9.save_lora(str(tmp_path / "out"), "striped.safetensors", loras)
    week9.remove_lora(unet, loras)
    unet = copy.deepcopy(small.unet)
    parts, _ = week.read_adapter(tmp_path / "out" / "striped.safetensors", unet)
    closet = week.Wardrobe(unet, {"striped": parts}, math.inf)
    closet.fetch("striped")
    closet.wear([("striped", 1.0), ("", 0.0)])
    with torch.no_grad():
        got = unet(z, t, text).sample
        base = small.unet(z, t, text).sample
    assert torch.allclose(got[0], want[0], atol=1e-5) and not torch.allclose(got[0], base[0], atol=1e-3)
    assert torch.equal(got[1], base[1])


def test_the_same_small_model_as_week_9():
    a, b = week.small_model(), week9.small_model()
    assert a.tokenizer.get_vocab() == b.tokenizer.get_vocab(), "week 12 uses what week 9 trained"
    assert [w.shape for w in a.unet.parameters()] == [w.shape for w in b.unet.parameters()]
    assert week.STYLES == week9.STYLES and [*week.PHRASES] == week.STYLES[1:]


def test_foreign_files_are_refused_before_anything_changes(small, tmp_path, capsys):
    O, I = shape(small)  # noqa: E741
    a, b = f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"
    good = {a: torch.zeros(3, I), b: torch.zeros(O, 3)}
    bad = {
        "header": b"no safetensors",
        "other_layer": {**good, "unet.mid_block.other.lora_A.weight": torch.zeros(3, I)},
        "sdxl": {"text_encoder_2.lora_A.weight": torch.zeros(3, I)},
        "half": {a: torch.zeros(3, I)},
        "wide": {**good, a: torch.zeros(3, I + 1)},
        "rank": {**good, b: torch.zeros(O, 4)},
        "nothing": {},
        "integers": {key: w.int() for key, w in good.items()},
        "nan": {**good, a: torch.full((3, I), math.nan)},
        "no_rank": {a: torch.zeros(0, I), b: torch.zeros(O, 0)},
        "cube": {**good, b: torch.zeros(O, 3, 1)},
    }
    before = [w.clone() for w in small.unet.parameters()]
    for name, state in bad.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(state) if isinstance(state, bytes) else write(path, state)
        with pytest.raises(SystemExit) as stop:
            week.read_adapter(path, small.unet)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and path.name in err, name
    assert LAYER in err, "the layer that does not fit is named"
    path = tmp_path / "notes.safetensors"
    safetensors.torch.save_file(good, path, {"lora_adapter_metadata": "[1]"})
    whole = path.read_bytes()
    for change in (lambda: None, lambda: path.write_bytes(whole[:-9]), path.unlink, path.mkdir):
        change()
        with pytest.raises(SystemExit):
            week.read_adapter(path, small.unet)
    assert all(torch.equal(w, old) for w, old in zip(small.unet.parameters(), before, strict=True))


# ----------------------------------------------------------------------------------------------------- router


def prompts(style):
    return [text for text in week.fill(week.PHRASES[style])]


def test_unseen_phrasings_are_unseen_and_their_words_known():
    told = "|".join([*week.PHRASES.values(), *week.TELL]).split("|")
    asked = "|".join(week.UNSEEN.values()).split("|")
    assert not {*told} & {*asked} and len(asked) == len({*asked}) == 25
    assert [*week.UNSEEN] == ["", *week.STYLES[1:]]


def test_fill():
    filled = week.fill("a C S|S")
    assert len(filled) == 24 + 4
    assert filled["a red circle"] == [0, 0] and filled["a pink cross"] == [5, 3]


def test_text_features(small):
    texts = ["a red circle", "zebra", "a red circle"]
    x = week.features(small, texts)
    ids = small.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        said = small.text_encoder(ids).last_hidden_state.mean(1)
        read = (
            small.text_encoder.text_model.embeddings.token_embedding(ids)
            if hasattr(small.text_encoder, "text_model")
            else small.text_encoder.embeddings.token_embedding(ids)
        )
    assert torch.allclose(x, torch.cat([read.mean(1), said, torch.ones(3, 1)], 1), atol=1e-5)
    assert torch.allclose(x[0], x[2], atol=1e-6) and not torch.allclose(x[0], x[1], atol=0.1)


def test_the_router_solves_the_ridge_equation(small, monkeypatch):
    seen = {}
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: seen.update(a=a, b=b) or solve(a, b))
    made = week.features
    monkeypatch.setattr(week, "features", lambda sd, texts: seen.setdefault("x", made(sd, texts)))
    week.fit_router(small, {"striped": prompts("striped"), "framed": prompts("framed")}, each=50)
    x = seen["x"].double()
    y = torch.zeros(150, 2, dtype=f64)
    y[50:100, 0] = y[100:, 1] = 1
    assert torch.allclose(seen["b"], x.T @ y)
    extra = seen["a"] - x.T @ x
    assert torch.allclose(extra, 1e-4 * x.square().sum() / x.shape[1] * torch.eye(x.shape[1], dtype=f64), atol=1e-6)


def test_unseen_phrasings_are_routed(small):
    router = week.fit_router(small, {style: prompts(style) for style in week.PHRASES})
    asked = [(text, style) for style, told in week.UNSEEN.items() for text in week.fill(told)]
    chosen = router([text for text, _ in asked], 0.5)
    assert sum(name == style for (name, _), (_, style) in zip(chosen, asked, strict=True)) >= 0.97 * len(asked)
    assert all(0.5 <= weight <= 1 if name else weight == 0 for name, weight in chosen)
    assert all(name for name, _ in router([text for text, _ in asked], 0.0)), "threshold 0: always one of them"
    assert not any(name for name, _ in router([text for text, _ in asked], 1.1)), "threshold above 1: the bare base"


def test_a_new_file_is_a_new_route(small):
    router = week.fit_router(
        small, {"striped": prompts("striped"), "beach": ["in the sun", "sun", "a square in the sun"]}
    )
    assert router(["the sun and a red circle"], 0.5)[0][0] == "beach"
    assert router(["zebra stripes on a square"], 0.5)[0][0] == "striped"
    assert router(["draw a blue square"], 0.5) == [("", 0.0)]


# --------------------------------------------------------------------------------------------------- training


def test_training_weighs_seen_pairs_by_their_noise_at_a_rate_that_rises_and_falls(small, monkeypatch, capsys):
    sd, rates, shown, noised, guessed = copy.deepcopy(small), [], [], [], []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]))
    paint, add_noise = week.paint, sd.scheduler.add_noise
    monkeypatch.setattr(week, "paint", lambda labels, place: shown.append(labels) or paint(labels, place))
    monkeypatch.setattr(sd.scheduler, "add_noise", lambda *args: noised.append(args) or add_noise(*args))
    clipped, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda ws, top: clipped.append((len(ws), top)) or clip(ws, top))
    sd.unet.register_forward_hook(lambda module, given, out: guessed.append(out.sample.detach()))
    week.train(sd, [*sd.unet.parameters()], ["framed", "plain"], 40, 1.0, week.Config(tiny=True))
    assert rates[:2] == pytest.approx([0.5, 0.994], abs=1e-3) and max(rates) == rates[1]
    assert rates[19] == pytest.approx(0.5) and rates[-1] == pytest.approx(0)
    assert clipped == [(len([*sd.unet.parameters()]), 1.0)] * 40
    seen = {(c, s) for c, s in week.PAIRS[week.SEEN].tolist()}
    assert {(c, s) for c, s, _ in torch.cat(shown).tolist()} <= seen and len(seen) == 18
    assert [labels[:, 2].tolist() for labels in shown] == [[2, 0, 2, 0]] * 40
    (x0, _, t), guess, bars = noised[1], guessed[1], sd.scheduler.alphas_cumprod
    loss = ((guess - x0).square().mean((1, 2, 3)) / (0.1 + (1 - bars[t]).sqrt())).mean().item()
    assert f"step    2/40 | loss {loss:.4f}" in capsys.readouterr().out


def test_each_style_is_saved_under_its_own_name(tmp_path, monkeypatch):
    """As if the adapter of a style had learned its style's number everywhere."""

    trained = []

    def train(sd, weights, styles, steps, lr, cfg, closet=None):
        trained.append((styles, steps))
        for style in styles if closet else ():
            for slot in closet.slots.values():
                for half, axis in ((slot.A, 0), (slot.B, 1)):
                    half.data.split(closet.R, axis)[closet.worn[style]].fill_(week.STYLES.index(style))

    monkeypatch.setattr(week, "train", train)
    week.make(week.Config(tiny=True, out=str(tmp_path), base_steps=7, steps=3), torch.device("cpu"))
    assert trained == [(["plain"], 7), (week.STYLES[1:], 3)]
    for style in week.PHRASES:
        state = safetensors.torch.load_file(tmp_path / "adapters" / f"{style}.safetensors")
        assert all((w == week.STYLES.index(style)).all() for w in state.values()), style


def test_a_picture_is_right_if_all_of_it_is(monkeypatch):
    """Whoever draws here takes the style from the choice, and gives red things the wrong shape."""
    asked = {text: pair for told in week.UNSEEN.values() for text, pair in week.fill(told).items()}
    given = []

    def answer(sd, wardrobe, prompts, choices, cfg):
        labels = [[*asked[text], week.STYLES.index(name or "plain")] for text, (name, _) in zip(prompts, choices)]
        labels = torch.tensor([[c, (s + (c == 0)) % 4, style] for c, s, style in labels])
        return week.paint(labels, torch.full((len(labels), 3), 0.5)), labels

    monkeypatch.setattr(week, "answer", answer)
    router = lambda texts, threshold: given.append((texts, threshold)) or [("", 0.0)] * len(texts)  # noqa: E731
    closet = SimpleNamespace(adapters=dict.fromkeys(week.PHRASES), S=3)
    table, log = week.evaluate(None, router, closet, week.Config(threshold=0.37))
    ((texts, threshold),) = given
    red = sum(asked[text][0] == 0 for text in texts) / 200
    assert threshold == 0.37 and len(texts) == len(log) == 200 and 0 < red < 1
    assert table["oracle"] == pytest.approx(dict(color=1, shape=1 - red, style=1, all=1 - red, route=1))
    assert table["base"] == table["router"] and table["base"]["route"] == table["base"]["style"] < 1


def test_the_router_s_choice_has_a_red_frame():
    rows = [dict(prompts=["a"], choices=[("q", 0.9)]), dict(prompts=["b"], choices=[("", 0.0)])]
    grey = [torch.zeros(3, 32, 32)] * 2
    page = week.draw(rows, {"": grey, "p": grey, "q": grey})
    frames = [[page.getpixel((324 + 100 * j, 82 + 100 * i)) for j in range(3)] for i in range(2)]
    red, white = (255, 0, 0), (255, 255, 255)
    assert frames == [[white, white, red], [red, white, white]]


def test_what_weeks_9_and_12_draw_and_say_is_the_same():
    assert torch.equal(week.SEEN, week9.SEEN) and torch.equal(week.PAIRS, week9.PAIRS)
    assert week.COLORS == week9.COLORS and week.SHAPES == week9.SHAPES and week.TELL == week9.TELL


# ---------------------------------------------------------------------------------------------------- serving


@pytest.fixture
def served(small):
    sd = copy.deepcopy(small)
    adapters = {name: for_unet(sd.unet, 2, seed) for seed, name in enumerate(["p", "q", "r"])}
    size = sum(w.nbytes for pair in adapters["p"].values() for w in pair)
    return sd, week.Wardrobe(sd.unet, adapters, 2.5 * size), week.Config(calls=3)


def test_a_mixed_batch_is_drawn_as_one_by_one(served):
    sd, closet, cfg = served
    texts, choices = ["a red circle", "blue square"], [("p", 0.7), ("q", 1.0)]
    both, row = week.answer(sd, closet, texts, choices, cfg)
    assert row["loaded"] == ["p", "q"] and not row["evicted"] and row["bytes"] == closet.bytes
    for k in (0, 1):
        (one,), _ = week.answer(sd, closet, texts[k : k + 1], choices[k : k + 1], cfg)
        assert torch.allclose(one, both[k], atol=1e-4)
    (bare,), _ = week.answer(sd, closet, texts[:1], [("", 0.0)], cfg)
    assert not torch.allclose(bare, both[0], atol=1e-2)


def test_the_bare_base_is_bit_equal_to_no_lora_at_all(served, small):
    sd, closet, cfg = served
    week.answer(sd, closet, ["a red circle"], [("p", 1.0)], cfg)
    (bare,), row = week.answer(sd, closet, ["a red circle"], [("", 0.0)], cfg)
    dice = torch.Generator().manual_seed(sum(b"a red circle"))
    z = small(["a red circle"], 64, 64, 3, guidance_scale=5.0, generator=[dice], output_type="latent").images
    assert torch.equal(bare, torch.pixel_shuffle(z, 4).clamp(-1, 1)[0]) and not row["loaded"]


def test_the_log_tells_what_came_and_went(served):
    sd, closet, cfg = served
    log = [week.answer(sd, closet, ["a red circle"], [(name, 1.0)], cfg)[1] for name in "pqpr"]
    assert [(row["loaded"], row["evicted"]) for row in log] == [(["p"], []), (["q"], []), ([], []), (["r"], ["q"])]
    assert all(row["swap_ms"] > 0 and row["draw_ms"] > 0 and row["prompts"] == ["a red circle"] for row in log)
    json.dumps(log)


# ------------------------------------------------------------------------------------------------- the whole script


@pytest.fixture(scope="module")
def made(tiny):
    return tiny[1]


def test_adapters_keep_their_examples_and_learn(made):
    for style in week.PHRASES:
        path = made / "adapters" / f"{style}.safetensors"
        with safetensors.safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["lora_adapter_metadata"])
            names = [*file.keys()]
        assert notes["examples"] == prompts(style) and (notes["unet.r"], notes["unet.lora_alpha"]) == (2, 2)
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
        sd = week.load(str(made / "base"), True)
        parts, _ = week.read_adapter(path, sd.unet)
        assert any(B.abs().max() > 0 for _, B in parts.values())
    a, b = (safetensors.torch.load_file(made / "adapters" / f"{style}.safetensors") for style in week.STYLES[1:3])
    key = f"unet.{LAYER}.lora_B.weight"
    assert not torch.equal(a[key], b[key]), "each learned from the drawings of its own style"


def test_metrics_and_log(made):
    found = json.loads((made / "metrics.json").read_text())
    table = found["table"]
    assert table["oracle"]["route"] == 1 and [*table] == ["base", "oracle", "keyword", "random", "router"]
    assert found["routing_accuracy"] == table["router"]["route"] and found["end_to_end"] == table["router"]["all"]
    assert found["bytes_full_copies"] == 4 * found["bytes_base"] == 4 * 3314368
    assert found["bytes_adapters"] <= 0.5 * 2**20 and found["swap_ms"] < found["reload_ms"]
    rows = [json.loads(line) for line in (made / "requests.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and {row["bytes"] for row in rows} == {found["bytes_adapters"]}
    for key, loads in (("swap_ms", False), ("load_ms", True)):
        times = [row["swap_ms"] for row in rows if bool(row["loaded"]) is loads]
        assert found[key] == (statistics.median(times) if times else 0) and (times or key == "swap_ms")
    with Image.open(made / "router.png") as page:
        assert page.size == (330 + 500, 84 + 800)


def test_route(made, capsys):
    week.main(week.parse_config(week.Config, week.TINY, ["--tiny", "--out", str(made), "--route", "a zebra cross"]))
    row = next(json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert row["choices"][0][0] == "striped" and (made / "prompt0.png").exists()


def test_route_reads_line_by_line(made, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a red square\na hollow pink cross\n"))
    week.main(week.parse_config(week.Config, week.TINY, ["--tiny", "--out", str(made), "--route", "-"]))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["choices"][0][0] for row in rows] == ["", "outlined"]


def test_somebody_else_s_folder(made, tmp_path, capsys):
    flags = ["--model", str(made / "base"), "--adapters", str(made / "adapters"), "--route", "frame a circle"]
    week.main(week.parse_config(week.Config, week.TINY, ["--tiny", "--out", str(tmp_path / "x"), *flags]))
    assert '"framed"' in capsys.readouterr().out and not (tmp_path / "x" / "base").exists()


def test_a_folder_of_unknown_styles_is_judged_on_what_wants_none(served, monkeypatch):
    sd, closet, _ = served
    asked = []

    def answer(sd, wardrobe, texts, choices, cfg):
        asked.extend(texts)
        return torch.zeros(len(texts), 3, 32, 32), {}

    monkeypatch.setattr(week, "answer", answer)
    table, log = week.evaluate(sd, lambda texts, threshold: [("", 0.0)] * len(texts), closet, week.Config())
    assert {*asked} == {*week.fill(week.UNSEEN[""])} and len(log) == len({*asked}) == 120
    assert table["router"]["route"] == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--adapters", "no/such/folder"),
        ("--model", "x/y", "--adapters", "no/such/folder"),
        ("--route", "a red circle"),
        ("--budget", "0.001"),
    ],
)
def test_mistakes(flags, made, refused, tmp_path):
    if flags[0] == "--budget":
        flags = ("--model", str(made / "base"), "--adapters", str(made / "adapters"), *flags)
    refused(call, week, "--tiny", *flags, names=())


@pytest.mark.filterwarnings("error::FutureWarning")  # of diffusers, where a configuration is a list
def test_a_base_with_a_wrong_field_is_refused(made, refused, tmp_path):
    for part, junk in (("tokenizer/tokenizer.json", dict(version=3)), ("unet/config.json", None)):
        base = shutil.copytree(made / "base", tmp_path / part / "base")
        told = json.loads((base / part).read_text())
        (base / part).write_text(json.dumps(told | junk if junk else [*told]))
        refused(week.load, str(base), True, names=(f"--model {base}: ",))


def test_broken_base_and_empty_folder(made, refused, tmp_path):
    (tmp_path / "none").mkdir()
    refused(call, week, "--tiny", "--model", str(made / "base"), "--adapters", "none", names=("--adapters", "none"))
    (tmp_path / "b" / "unet").mkdir(parents=True)
    refused(call, week, "--tiny", "--model", "b", "--adapters", str(made / "adapters"), names=("--model b",))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), safetensors.SafetensorError("no space")])
def test_a_base_is_written_whole_or_not_at_all(error, tmp_path, refused):
    class Parts:
        def to(self, device):
            return self

        def save_pretrained(self, folder):
            Path(folder, "unet").mkdir(parents=True)
            Path(folder, "unet", "new").touch()
            if self.error:
                raise self.error

    sd = Parts()
    for sd.error in (None, error):
        if sd.error:
            (tmp_path / "base" / "mine").touch()
            refused(week.save_base, sd, tmp_path, names=[f"--out {tmp_path}", "base", "o space"])
            assert (tmp_path / "base" / "mine").exists(), "what was there stays"
        else:
            week.save_base(sd, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["base"]
        assert (tmp_path / "base" / "unet" / "new").exists()
    sd.error = None
    week.save_base(sd, tmp_path)
    assert not (tmp_path / "base" / "mine").exists(), "a new base takes the place of the old one"
