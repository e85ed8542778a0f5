"""Week 9: LoRA against the definition, its files against the field's formats, on models made here; no network."""

import copy
import json
import math
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
import week09_lora as week
from conftest import call
from PIL import Image
from torch import nn

I, O, R, N = 11, 7, 3, 5  # noqa: E741
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


def shaken(loras):
    for lora in loras.values():
        nn.init.normal_(lora.lora_A.weight)
        nn.init.normal_(lora.lora_B.weight)
    return loras


def adapted(rank=R, alpha=6.0):
    torch.manual_seed(1)
    base = net()
    model = copy.deepcopy(base)
    return base, model, shaken(week.inject_lora(model, "0|2", rank, alpha)), torch.randn(N, 5, 6, 8, dtype=f64)


@pytest.fixture(scope="module")
def small():
    transformers.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(3)
    sd = week.small_model()
    for w in sd.unet.parameters():
        w.data.add_(0.02 * torch.randn_like(w))
    return sd


# ---------------------------------------------------------------------------------------------------- the layer


def test_a_fresh_lora_is_the_identity_and_a_is_drawn():
    base, model = net(), None
    model = copy.deepcopy(base)
    loras = week.inject_lora(model, "0|2", R, 6.0)
    x = torch.randn(N, 5, 6, 8, dtype=f64)
    assert torch.equal(model(x), base(x))
    for lora in loras.values():
        assert lora.lora_A.weight.std() > 0.05 and lora.lora_B.weight.abs().max() == 0
        assert lora.lora_A.weight.dtype == f64 and lora.lora_A.bias is None and lora.lora_B.bias is None
        assert len(lora.lora_A.weight) == R and lora.lora_B.weight.shape[1] == R


def test_output_is_the_definition():
    base, model, loras, x = adapted()
    conv, line = loras["0"], loras["2"]
    assert conv.lora_A.weight.shape == (R, 5, 3, 3) and conv.lora_B.weight.shape == (O, R, 1, 1)
    W = base[0].weight + 6 / R * torch.einsum("or,rikl->oikl", conv.lora_B.weight[..., 0, 0], conv.lora_A.weight)
    V = base[2].weight + 6 / R * line.lora_B.weight @ line.lora_A.weight
    y = F.linear(F.conv2d(x, W, base[0].bias, 2, 1).flatten(2), V, base[2].bias)
    assert torch.allclose(model(x), y, atol=1e-12)
    week.set_scale(loras, 0.5)
    W, V = (W + base[0].weight) / 2, (V + base[2].weight) / 2
    y = F.linear(F.conv2d(x, W, base[0].bias, 2, 1).flatten(2), V, base[2].bias)
    assert torch.allclose(model(x), y, atol=1e-12)
    assert torch.allclose(line.delta(), V - base[2].weight, atol=1e-12)


def test_scale_0_is_the_base_even_where_the_lora_is_broken():
    base, model, loras, x = adapted()
    loras["0"].lora_B.weight.data.fill_(math.inf)
    week.set_scale(loras, 0)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("scale", [1, 0.3])
def test_merge_and_unmerge(scale):
    base, model, loras, x = adapted()
    week.set_scale(loras, scale)
    y = model(x)
    for lora in loras.values():
        lora.merge()
    assert torch.allclose(model(x), y, atol=1e-12) and not torch.allclose(y, base(x))
    assert torch.allclose(loras["0"].base.weight, base[0].weight + loras["0"].delta())
    for lora in loras.values():
        lora.unmerge()
    assert torch.allclose(model(x), y, atol=1e-12)
    week.remove_lora(model, loras)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True))
    assert [type(layer) for layer in model] == [type(layer) for layer in base]


def test_unmerge_is_exact_in_16_bits():
    layer = nn.Linear(I, O).bfloat16()
    before, lora = layer.weight.clone(), week.LoRALayer(layer, R, 50.0)
    shaken({"": lora})
    for _ in range(5):
        lora.merge()
        lora.unmerge()
    assert lora.lora_A.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, before)


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_of_the_update(rank):
    loras = adapted(rank)[2]
    assert [torch.linalg.matrix_rank(lora.delta().flatten(1)).item() for lora in loras.values()] == [rank] * 2


def test_gradients_flow_to_a_and_b_only():
    base, model, loras, x = adapted()
    model(x).square().sum().backward()
    names = {name for name, w in model.named_parameters() if w.grad is not None}
    assert names == {f"{k}.lora_{half}.weight" for k in "02" for half in "AB"}
    assert names == {name for name, w in model.named_parameters() if w.requires_grad}
    fresh = copy.deepcopy(base)
    loras = week.inject_lora(fresh, "2", R, 6.0)
    fresh(x).square().sum().backward()
    assert loras["2"].lora_A.weight.grad.abs().max() == 0 < loras["2"].lora_B.weight.grad.abs().max()


def test_targets_by_name():
    model = net()
    assert [*week.inject_lora(model, "^2$", R, 1.0)] == ["2"]
    assert type(model[0]) is nn.Conv2d and type(model[2]) is week.LoRALayer
    assert not week.inject_lora(model, "^2$", R, 1.0), "what is adapted is not adapted again"


def test_true_stable_diffusion_counts():
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    total = sum(w.numel() for w in unet.parameters())
    loras = week.inject_lora(unet, week.ATTENTION, 8, 8.0)
    assert total == 859_520_964 and len(loras) == 128
    assert sum(w.numel() for w in unet.parameters() if w.requires_grad) == 199_296 * 8
    week.remove_lora(unet, loras)
    more = week.inject_lora(unet, week.EVERYTHING, 1, 1.0)
    assert not week.inject_lora(unet, week.EVERYTHING, 1, 1.0), "what is adapted is not adapted again"
    assert set(loras) < set(more)
    assert {"conv_in", "conv_out", "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv",
            "up_blocks.1.resnets.0.conv_shortcut", "mid_block.attentions.0.proj_in",
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"} <= set(more)  # fmt: skip
    assert not [name for name in more if "time" in name]


# --------------------------------------------------------------------------------------------------- the files


@pytest.fixture
def pair(small):
    """The small U-Net with a shaken LoRA on all its layers; what it says; what it needs to be asked."""
    unet = copy.deepcopy(small.unet).double()
    ask = torch.randn(2, 48, 8, 8, dtype=f64), torch.tensor([3, 700]), torch.randn(2, 12, 64, dtype=f64)
    loras = shaken(week.inject_lora(unet, week.EVERYTHING, 2, 5.0))
    for lora in loras.values():
        lora.lora_A.weight.data.mul_(0.1), lora.lora_B.weight.data.mul_(0.1)
    with torch.no_grad():
        return unet, loras, ask, unet(*ask).sample


def write(path, state, notes=None):
    safetensors.torch.save_file({k: w.contiguous() for k, w in state.items()}, path, notes)


def said(small, path, ask):
    unet = copy.deepcopy(small.unet).double()
    loras = week.load_lora(path, unet)
    with torch.no_grad():
        return unet(*ask).sample, loras


def test_our_file_has_the_field_s_names_and_keeps_alpha(pair, tmp_path):
    unet, loras, _, _ = pair
    week.save_lora("out", "one.safetensors", loras)
    with safetensors.safe_open("out/one.safetensors", "pt") as file:
        notes, keys = json.loads(file.metadata()["lora_adapter_metadata"]), set(file.keys())
        assert torch.equal(file.get_tensor("unet.conv_in.lora_A.weight"), loras["conv_in"].lora_A.weight.data)
    assert keys == {f"unet.{name}.lora_{half}.weight" for name in loras for half in "AB"}
    assert notes == {"unet.r": 2, "unet.lora_alpha": 5.0, "unet.target_modules": [*loras]}


def test_a_file_comes_back_as_it_went(pair, small):
    unet, loras, ask, y = pair
    week.save_lora("out", "one.safetensors", loras)
    found, again = said(small, "out/one.safetensors", ask)
    assert torch.equal(found, y) and {*again} == {*loras}
    assert {(lora.rank, lora.alpha, lora.scale) for lora in again.values()} == {(2, 5.0, 1.0)}


def spelled(loras, pattern):
    """The state in another tool's names: pattern(layer, "A" or "B")."""
    return {pattern(name, half): getattr(lora, f"lora_{half}").weight.data
            for name, lora in loras.items() for half in "AB"}  # fmt: skip


def test_files_of_other_tools(pair, small, tmp_path):
    unet, loras, ask, y = pair
    alpha = {f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(5.0) for name in loras}
    kohya = spelled(loras, lambda n, h: f"lora_unet_{n.replace('.', '_')}.lora_{'down' if h == 'A' else 'up'}.weight")
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 3),
            "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(2, 3)}  # fmt: skip
    write("kohya.safetensors", kohya | alpha | text)
    assert torch.equal(said(small, "kohya.safetensors", ask)[0], y)
    old = spelled(loras, lambda n, h: f"unet.{n}.lora.{'down' if h == 'A' else 'up'}.weight")
    write("old.safetensors", old, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 5.0})})
    assert torch.equal(said(small, "old.safetensors", ask)[0], y)
    write("bare.safetensors", old)  # no alpha anywhere: it is r, as in peft
    found, again = said(small, "bare.safetensors", ask)
    assert {lora.alpha for lora in again.values()} == {2.0} and not torch.allclose(found, y)


def broken(loras):
    good = spelled(loras, lambda n, h: f"unet.{n}.lora_{h}.weight")
    key, other = "unet.conv_in.lora_A.weight", "unet.conv_out.lora_B.weight"
    yield {k: w for k, w in good.items() if k != key}, "conv_in"
    yield good | {key: torch.zeros(2, 48, 3, 4)}, "conv_in"
    yield good | {key: torch.zeros(3, 48, 3, 3)}, "conv_in"
    yield good | {other: torch.zeros(48, 2)}, "conv_out"
    yield good | {other: torch.zeros(48, 2, 1, 1, dtype=torch.int64)}, "conv_out"
    yield good | {"unet.nowhere.lora_A.weight": torch.zeros(2, 3)}, "nowhere"
    yield good | {"unet.conv_in.lora_A.default.weight": torch.zeros(2, 48, 3, 3)}, "default"
    yield good | {"base_model.model.conv_in.lora_A.weight": torch.zeros(2, 48, 3, 3)}, "base_model"
    yield {"text_encoder.x.lora_A.weight": torch.zeros(2, 3)}, "U-Net"


def test_a_foreign_file_is_refused_by_name_and_changes_nothing(pair, small):
    state = copy.deepcopy(small.unet.state_dict())
    names = [name for name, _ in small.unet.named_modules()]
    for tensors, word in broken(pair[1]):
        write("bad.safetensors", tensors)
        with pytest.raises(ValueError, match=word):
            week.load_lora("bad.safetensors", small.unet)
        assert [name for name, _ in small.unet.named_modules()] == names
    assert all(torch.equal(w, state[k]) for k, w in small.unet.state_dict().items())


@pytest.mark.skipif(not diffusers.utils.is_peft_available(), reason="needs peft, which the scripts do not")
def test_diffusers_and_peft_read_our_file(pair, small):
    unet, loras, ask, y = pair
    week.save_lora("out", "one.safetensors", loras)
    pipe = copy.deepcopy(small)
    pipe.unet.double()
    pipe.load_lora_weights("out", weight_name="one.safetensors")
    with torch.no_grad():
        assert torch.allclose(pipe.unet(*ask).sample, y, atol=1e-6)


# ----------------------------------------------------------------------------------------- drawings and judge


def test_the_judge_reads_fresh_drawings():
    torch.manual_seed(5)
    labels = torch.stack([torch.randint(k, (600,)) for k in (6, 4, len(week.STYLES))], 1)
    found = week.judge(week.paint(labels, torch.rand(600, 3)) + 0.2 * torch.randn(600, 3, 32, 32)) == labels
    assert found.float().mean(0).min() >= 0.98


def test_a_drawing_pixel_by_pixel():
    middle = torch.tensor([[0.5, 0.5, 0.5]])
    red, paper = 2 * torch.tensor(week.COLORS["red"]) - 1, torch.full((3,), 0.9)
    circle, square, triangle, cross = (week.paint(torch.tensor([[0, k, 0]]), middle)[0] for k in range(4))
    for picture in (circle, square, triangle, cross):
        assert torch.allclose(picture[:, 16, 16], red) and torch.allclose(picture[:, 0, 0], paper)
    assert [round((p[1] < 0).sum().item(), -1) for p in (circle, square, triangle, cross)] == [260, 260, 140, 180]
    assert torch.allclose(square[:, 8, 8], red) and torch.allclose(circle[:, 8, 8], paper)
    assert torch.allclose(triangle[:, 21, 10], red) and torch.allclose(triangle[:, 9, 10], paper)
    assert torch.equal(square, square.flip(1)) and torch.equal(triangle, triangle.flip(2))
    striped, framed, outlined, shaded = (week.paint(torch.tensor([[0, 1, k]]), middle)[0] for k in (1, 2, 3, 4))
    stripe = striped[:, 10:22, 10:22].flatten(1)
    assert set(stripe[0].tolist()) == {red[0].item(), stripe.max().item()}
    assert 0.7 < (stripe[1] == red[1]).float().mean() < 0.8
    assert torch.allclose(framed[:, 1, 16], torch.tensor(-0.6)) and torch.allclose(framed[:, 16, 16], red)
    assert torch.allclose(framed[:, 2, 2], paper) and torch.allclose(framed[:, 29, 29], paper)
    assert torch.allclose(outlined[:, 16, 16], paper) and (outlined[1] < 0).sum() > 40
    assert torch.allclose(shaded[:, 16, 16], red) and torch.allclose(shaded[:, 1, 1], paper)
    assert (shaded[0, 16, 1:8].diff() <= 0).all() and shaded[0, 16, 5] < 0.6, "darkest beside the shape"


def test_six_pairs_are_never_shown():
    import random

    assert week.SEEN.sum() == 18 and {*week.PAIRS[~week.SEEN, 0].tolist()} == {*range(6)}
    hidden = {f"{[*week.COLORS][c]} {week.SHAPES[s]}" for c, s in week.PAIRS[~week.SEEN].tolist()}
    pictures, captions = week.drawings("plain", 900, random.Random(1))
    assert not [text for text in captions if any(pair in text for pair in hidden)]
    assert 0.05 < sum(not text for text in captions) / 900 < 0.17
    found = week.judge(pictures)
    pairs = {(c, s) for c, s in found[:, :2].tolist()}
    assert pairs == {(c, s) for c, s in week.PAIRS[week.SEEN].tolist()}
    assert (found[:, 2] == 0).float().mean() > 0.98
    assert (week.judge(week.drawings("framed", 50, random.Random(1))[0])[:, 2] == 2).all()


def test_captions_say_what_is_shown():
    import random

    torch.manual_seed(2)
    pictures, captions = week.drawings("striped", 300, random.Random(3))
    found = week.judge(pictures)
    for (color, shape, _), text in zip(found.tolist(), captions):
        words = text.replace(",", "").split()
        assert not ({*week.COLORS} & {*words}) - {[*week.COLORS][color]}, text
        assert not ({*week.SHAPES} & {*words}) - {week.SHAPES[shape]}, text


# ------------------------------------------------------------------------------------------- the small model


def test_words_are_whole_and_order_is_free(small):
    ids = small.tokenizer("a purple triangle").input_ids
    assert len(ids) == 5 and len(small.tokenizer) == small.text_encoder.config.vocab_size
    assert all(len(small.tokenizer(word).input_ids) == 3 for word in [*week.COLORS, *week.SHAPES])
    words = [word for word, _ in sorted(small.tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    assert words[:2] == ["<|startoftext|>", "<|endoftext|>"] and words[2:] == sorted(words[2:]), "the same on each run"
    assert ids[0] == 0 and ids[-1] == 1 == small.text_encoder.config.eos_token_id
    a, b = small.encode_prompt(["a red circle", "a blue circle"], "cpu", 1, False)[0]
    assert a.shape == (12, 64) and not torch.allclose(a[2], b[2])
    assert (
        small.text_encoder.get_parameter(
            next(name for name, _ in small.text_encoder.named_parameters() if "position_embedding" in name)
        )
        .abs()
        .max()
        == 0
    )


def test_latents_are_pixels_in_another_order(small):
    x = torch.randn(2, 3, 32, 32)
    z = week.encode(small, x)
    assert z.shape == (2, 48, 8, 8) and torch.equal(F.pixel_shuffle(z, 4), x)


def test_sampling_is_ddim_with_guidance(small):
    cfg, said = week.Config(calls=3, seed=4), ["a red circle", "a blue cross"]
    pictures = week.sample(small, said, cfg)
    assert pictures.shape == (2, 3, 32, 32) and pictures.abs().max() <= 1
    z, bars = torch.randn(2, 48, 8, 8, generator=torch.Generator().manual_seed(4)), small.scheduler.alphas_cumprod
    given, free = (small.encode_prompt(texts, "cpu", 1, False)[0] for texts in (said, ["", ""]))
    times = [999, 666, 332]
    with torch.no_grad():
        for t, after in zip(times, [*times[1:], None]):
            x = small.unet(z, t, free).sample
            x = x + 4 * (small.unet(z, t, given).sample - x)
            eps = (z - bars[t].sqrt() * x) / (1 - bars[t]).sqrt()
            bar = bars[after] if after else torch.tensor(1.0)
            z = bar.sqrt() * x + (1 - bar).sqrt() * eps
    assert torch.allclose(F.pixel_shuffle(z, 4).clamp(-1, 1), pictures, atol=5e-3)


def test_a_style_is_learned_and_the_rest_stays_bit_identical(small):
    sd = copy.deepcopy(small)
    before = copy.deepcopy(sd.unet.state_dict())
    sd.text_encoder.requires_grad_(False)
    loras = week.inject_lora(sd.unet, week.EVERYTHING, 2, 2.0)
    A = {name: lora.lora_A.weight.clone() for name, lora in loras.items()}
    learn = [w for w in sd.unet.parameters() if w.requires_grad]

    def loss():
        import random

        torch.manual_seed(9)
        pictures, captions = week.drawings("framed", 24, random.Random(2))
        z, t = week.encode(sd, pictures), torch.full((24,), 900)
        with torch.no_grad():
            noisy = sd.scheduler.add_noise(z, torch.randn(z.shape), t)
            return (sd.unet(noisy, t, sd.encode_prompt(captions, "cpu", 1, False)[0]).sample - z).square().mean().item()

    first = loss()
    week.train(sd, learn, "framed", 12, 5e-3, week.Config(batch=8))
    assert loss() < 0.9 * first
    assert all(not torch.equal(lora.lora_A.weight, A[k]) and lora.lora_B.weight.any() for k, lora in loras.items())
    week.remove_lora(sd.unet, loras)
    after = sd.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_the_loss_asks_for_what_the_scheduler_says(kind, small, monkeypatch, capsys):
    sd = copy.deepcopy(small)
    sd.scheduler.register_to_config(prediction_type=kind)
    asked = {}

    def unet(noisy, t, text):
        asked.update(noisy=noisy, t=t)
        return type("Output", (), {"sample": noisy * 0 + sum(weight.sum() * 0 for weight in weights) + 0.25})

    weights = [nn.Parameter(torch.ones(2))]
    unet.device = torch.device("cpu")
    parts = type("Parts", (), dict(unet=staticmethod(unet), scheduler=sd.scheduler, vae=None,
                                   encode_prompt=staticmethod(sd.encode_prompt)))  # fmt: skip
    kept = {}
    monkeypatch.setattr(week, "encode", lambda sd, x: kept.setdefault("clean", F.pixel_unshuffle(x, 4)))
    week.train(parts, weights, "plain", 1, 1e-9, week.Config(batch=6))
    clean, noisy, bar = kept["clean"], asked["noisy"], sd.scheduler.alphas_cumprod[asked["t"]][:, None, None, None]
    eps = (noisy - bar.sqrt() * clean) / (1 - bar).sqrt()
    goal = {"sample": clean, "epsilon": eps, "v_prediction": bar.sqrt() * eps - (1 - bar).sqrt() * clean}[kind]
    error = (goal - 0.25).square().mean((1, 2, 3))
    if kind == "sample":
        error = error / ((1 - bar.flatten()).sqrt() + 0.1)
    assert float(capsys.readouterr().out.split("loss ")[1].split()[0]) == pytest.approx(error.mean().item(), abs=1e-3)


# --------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def run(tiny):
    """The --tiny run, and another from the base that it saved."""
    first, a, _ = tiny
    folder = a.parent
    second = call(week, "--tiny", "--out", folder / "b", "--model", a / "base", "--rank", 1,
                  "--ablate", "convolutions")  # fmt: skip
    return a, folder / "b", first, second


def test_a_run_and_what_it_leaves(run):
    a, b, first, second = run
    metrics = json.loads((a / "metrics.json").read_text())
    assert [*metrics["table"]] == ["base"] + [f"{s} x {k}" for s in week.STYLES[1:] for k in (1,)]
    assert [*metrics["style_seconds"]] == week.STYLES[1:]
    for style in week.STYLES[1:]:
        with safetensors.safe_open(a / f"{style}.safetensors", "pt") as file:
            numbers = sum(file.get_tensor(key).numel() for key in file.keys())
        assert numbers == first["trained_parameters"]
    assert 0.03 < first["trained_fraction"] < 0.05 and first["base_seconds"] > 0 == second["base_seconds"]
    assert first["style_rate"] == pytest.approx(
        sum(metrics["table"][f"{style} x 1"]["style"] for style in week.STYLES[1:]) / 4)  # fmt: skip
    assert second["trained_parameters"] < first["trained_parameters"] / 3
    assert json.loads((b / "metrics.json").read_text())["table"]["base"] == metrics["table"]["base"]
    with Image.open(a / "lora.png") as page:
        assert page.size == (1000, 110 + 100 * 5)


def test_the_saved_base_is_a_pipeline_of_diffusers(run):
    sd = diffusers.StableDiffusionPipeline.from_pretrained(run[0] / "base", vae=None, low_cpu_mem_usage=False)
    assert sd.vae is None and sd.unet.config.in_channels == 48
    assert sd.encode_prompt(["a red circle", "cross"], "cpu", 1, False)[0].shape == (2, 12, 64)
    assert sd.tokenizer.get_vocab() == week.small_model().tokenizer.get_vocab()
    loras = week.load_lora(run[0] / "striped.safetensors", sd.unet)
    assert set(loras) == set(week.inject_lora(week.small_model().unet, week.EVERYTHING, 1, 1.0))


def tiny_sd(folder):
    """A Stable Diffusion of the true classes, with a VAE, that guesses noise; its latents are 8 x 8."""
    vocabulary = transformers.CLIPTokenizer(model_max_length=77).train_new_from_iterator(["a red circle"] * 9, 300)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1))  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        8, 4, 4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    noise = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                    skip_prk_steps=True, steps_offset=1)  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(vae, text, vocabulary, unet, noise, None, None, None, False)
    pipe.save_pretrained(folder)
    return pipe


def test_the_true_classes_from_a_folder(tmp_path, refused):
    pipe = tiny_sd(tmp_path / "sd")
    result = call(week, "--tiny", "--model", tmp_path / "sd", "--out", tmp_path / "out")
    assert result["base_seconds"] == 0 and result["trained_parameters"] > 0
    assert not (tmp_path / "out" / "base").exists()
    sd = week.load(str(tmp_path / "sd"), True)
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    z = week.encode(sd, x)
    same = pipe.vae.encode(F.interpolate(x, 16)).latent_dist.mean * pipe.vae.config.scaling_factor
    assert z.shape == (3, 4, 8, 8) and torch.allclose(z, same, atol=1e-6)
    assert sd.scheduler.config.prediction_type == "epsilon"
    assert torch.equal(sd.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert week.sample(sd, ["a red circle"], week.Config(calls=2)).shape == (1, 3, 16, 16)
    latents, pictures, decode = [], [], sd.vae.decode
    sd.vae.decode = lambda z, **kw: latents.append(z) or pictures.append(decode(z).sample) or (pictures[-1],)
    for scaling in (0.25, 0.5):
        sd.vae.register_to_config(scaling_factor=scaling)
        drawn = week.sample(sd, ["a red circle"], week.Config(calls=2))
        assert torch.allclose(drawn, pictures[-1].clamp(-1, 1), atol=1e-6)
    assert torch.equal(latents[0], 2 * latents[1]), "the decoder gets z / scaling_factor"
    for part in ("unet/diffusion_pytorch_model.safetensors", "unet/config.json", "text_encoder/config.json",
                 "tokenizer/tokenizer.json", "model_index.json"):  # fmt: skip
        file = tmp_path / "sd" / part
        kept = file.read_bytes()
        for junk in (kept[: len(kept) // 2], b"", b"{}"):
            file.write_bytes(junk)
            refused(call, week, "--tiny", "--model", tmp_path / "sd", "--out", tmp_path / "out", names=["--model"])
        file.write_bytes(kept)


def test_large_pictures_are_drawn_a_few_at_a_time_and_get_their_own_captions(tmp_path):
    """60 pictures of the true SD at once would need more memory than a GPU has."""
    sd, seen = tiny_sd(tmp_path / "sd"), []
    sd.set_progress_bar_config(disable=True)
    sd.unet.register_forward_pre_hook(lambda unet, args, kw: seen.append(len(args[0])), with_kwargs=True)
    captions = ["a red circle", "circle", "red", "a", "a red", "red circle"]
    drawn, n = week.sample(sd, captions, week.Config(calls=1)), len(captions)
    assert max(seen) == 2 * 4 and len(drawn) == n, "each with its prompt and without"
    one = week.sample(sd, [captions[0]] * 4 + [captions[5]] * 2, week.Config(calls=1))
    assert torch.allclose(drawn[[0, 5]], one[[0, 5]], atol=1e-5) and not torch.allclose(drawn[1:5], one[1:5], atol=1e-5)



@pytest.mark.parametrize(
    "flags", [("--rank", 0), ("--alpha", "nan"), ("--lr", 0), ("--steps", 10**12), ("--calls", 1001), ("--batch", 0),
              ("--seed", 2**63), ("--rank", 10**9), ("--draws", 0), ("--base-steps", 0), ("--lr", "inf")])  # fmt: skip
def test_numbers_out_of_range(flags, refused, tmp_path):
    refused(call, week, "--tiny", "--out", tmp_path / "out", *flags, names=[flags[0]])


def test_a_loss_that_is_not_finite_stops_the_run(small, monkeypatch):
    sd = copy.deepcopy(small)
    monkeypatch.setattr(week, "encode", lambda sd, x: F.pixel_unshuffle(x, 4) * math.nan)
    with pytest.raises(SystemExit, match="step 1: the loss is nan"):
        week.train(sd, [*sd.unet.parameters()], "plain", 3, 1e-3, week.Config(batch=2))


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


def test_seen_and_new_pairs_are_not_mixed_up(small, monkeypatch):
    """A sampler that draws the pairs of the training well and gets the shape of the others wrong."""
    shape = torch.where(week.SEEN, week.PAIRS[:, 1], (week.PAIRS[:, 1] + 1) % 4)
    said = torch.stack([week.PAIRS[:, 0], shape, torch.full((24,), 2)], 1)
    drawn = torch.randint(256, (72, 3, 32, 32)) / 127.5 - 1
    monkeypatch.setattr(week, "sample", lambda sd, captions, cfg: drawn)
    monkeypatch.setattr(week, "judge", lambda pictures: said.repeat(len(pictures) // 24, 1))
    rates, tiles = week.evaluate(small, week.STYLES[2], week.Config(draws=3), "")
    assert (rates["seen_shape"], rates["new_shape"], rates["shape"]) == (1, 0, 0.75)
    assert (rates["style"], rates["color"], rates["content"]) == (1, 1, 0.75)
    assert [tile.size for tile in tiles] == [(32, 32)] * 72
    assert tiles[71].getpixel((3, 5)) == tuple((127.5 * drawn[71, :, 5, 3] + 127.5).round().int().tolist())


def test_each_lora_is_judged_at_three_scales(tmp_path, monkeypatch):
    rates, judged = dict.fromkeys("style color shape content seen_shape new_shape".split(), 1.0), []

    def look(sd, style, cfg, name):
        scales = {m.scale for m in sd.unet.modules() if isinstance(m, week.LoRALayer)}
        judged.append((name, *scales))
        return rates, [Image.new("RGB", (32, 32))] * 24

    monkeypatch.setattr(week, "evaluate", look)
    monkeypatch.setattr(week, "run_checks", lambda: None)
    call(week, "--base-steps", 1, "--steps", 1, "--batch", 2, "--out", tmp_path / "out")
    assert judged[0] == ("base",)
    assert judged[1:] == [(f"{style} x {k}", k) for style in week.STYLES[1:] for k in (0.5, 1, 1.5)]


def test_a_vocabulary_of_another_size_is_refused(tmp_path, refused):
    words = tiny_sd(tmp_path / "sd").tokenizer
    words.add_tokens(["zebra"])
    words.save_pretrained(tmp_path / "sd" / "tokenizer")
    refused(week.load, str(tmp_path / "sd"), True, names=["--model", "unfit parts"])


@pytest.mark.filterwarnings("error::FutureWarning")  # of diffusers, where a configuration is a list
def test_a_tokenizer_with_a_wrong_field_is_refused(tmp_path, refused):
    tiny_sd(tmp_path / "sd")
    for part, field, value in (("tokenizer/tokenizer.json", "version", 3), ("tokenizer/tokenizer.json", "model", "x")):
        file = tmp_path / "sd" / part
        kept = file.read_text()
        file.write_text(json.dumps(json.loads(kept) | {field: value}))
        refused(week.load, str(tmp_path / "sd"), True, names=[f"--model {tmp_path}"])
        file.write_text(kept)
    (tmp_path / "sd" / "unet" / "config.json").write_text("[]")
    refused(week.load, str(tmp_path / "sd"), True, names=[f"--model {tmp_path}", "mapping"])


# --------------------------------------------------------------------------------------------- your own pictures


def picture(path, pixels, **how):
    """Write pixels (H, W, 3 or 4) as a picture."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.byte().numpy()).save(path, **how)
    return pixels


def test_pictures_of_a_folder_and_what_is_said_of_them(small, tmp_path):
    folder, junk = tmp_path / "mine", torch.zeros(32, 16, 3)
    middle = torch.randint(256, (32, 32, 3))
    wide = picture(folder / "a.png", torch.cat([junk, middle, junk], 1))
    picture(folder / "b.WebP", wide.transpose(0, 1), lossless=True)
    picture(folder / "c.JPEG", torch.full((90, 130, 3), 100.0))
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side, as cameras write
    picture(folder / "d.jpg", torch.cat([torch.zeros(32, 16, 3), torch.full((32, 16, 3), 255)], 1), exif=turned)
    picture(folder / "e.png", torch.tensor([9, 9, 9, 0]).expand(50, 50, 4))
    Image.new("L", (33, 40), 51).save(folder / "f.png")
    for name in ("._a.png", "notes.md", "g.gif", "h.png.bak"):
        (folder / name).write_text("no picture")
    (folder / "b.txt").write_text("\ufeffein roter Kreis, é\n", "utf-8")
    (folder / "c.txt").write_text("")
    album = week.read_pictures(small, folder, "in the style of X")
    said = ["in the style of X", "ein roter Kreis, é", "", *["in the style of X"] * 3]
    assert [text for _, text in album] == [text for told in said for text in [told] * 9 + [""]]
    a, b, c, d, e, f = (x for x, _ in album[::10])
    assert all(torch.equal(album[k][0], album[k - k % 10][0]) for k in range(60))
    goal = (middle / 127.5 - 1).permute(2, 0, 1)
    assert torch.allclose(a, goal, atol=1e-6), "the middle of it, every pixel as it was"
    assert torch.allclose(b, goal.transpose(1, 2), atol=1e-6)
    assert c.shape == (3, 32, 32) and torch.allclose(c, torch.tensor(100 / 127.5 - 1), atol=0.02)
    assert d[:, :12].max() < -0.8 and d[:, 20:].min() > 0.8, "upright"
    assert torch.equal(e, torch.ones(3, 32, 32)), "what is clear is white"
    assert f.shape == (3, 32, 32) and torch.allclose(f, torch.tensor(51 / 127.5 - 1), atol=1e-6)


def test_pictures_get_the_size_that_the_model_draws(tmp_path):
    picture(tmp_path / "mine" / "a.png", torch.arange(256).view(16, 16, 1).expand(16, 16, 3))
    sd = tiny_sd(tmp_path / "sd")
    ((x, _), *_) = week.read_pictures(sd, tmp_path / "mine", "")
    assert torch.allclose(x[0], torch.arange(256).view(16, 16) / 127.5 - 1, atol=1e-6)
    assert torch.equal(week.encode(sd, x[None]), sd.vae.encode(x[None]).latent_dist.mean * 0.18215)


def test_a_batch_is_of_the_pictures_with_their_captions(small, monkeypatch):
    album = [(torch.rand(3, 32, 32), text) for text in ("red", "green", "blue")]
    sd, seen, said = copy.deepcopy(small), [], []
    encode, prompt = week.encode, sd.encode_prompt
    monkeypatch.setattr(week, "encode", lambda sd, x: seen.extend(x) or encode(sd, x))
    sd.encode_prompt = lambda texts, *rest: said.extend(texts) or prompt(texts, *rest)
    week.train(sd, [*sd.unet.parameters()], "mine", 2, 1e-6, week.Config(batch=30), album)
    assert len(seen) == 60 and all(any(torch.equal(x, y) and text == told for y, told in album)
                                   for x, text in zip(seen, said, strict=True))  # fmt: skip
    assert {*said} == {"red", "green", "blue"} and said[:30] != said[30:]


def test_a_folder_s_style_is_learned(small, tmp_path):
    """By a LoRA, on a base that knows plain drawings a little: of its folder, and of plain drawings for comparison."""
    import random

    x, captions = week.drawings("framed", 24, random.Random(2))
    for k, told in enumerate(captions):
        picture(tmp_path / "mine" / f"{k:02}.png", (127.5 * x[k] + 127.5).round().permute(1, 2, 0))
        (tmp_path / "mine" / f"{k:02}.txt").write_text(told)
    album = week.read_pictures(small, tmp_path / "mine", "")
    assert torch.allclose(torch.stack([x for x, _ in album[::10]]), x, atol=1.01 / 255)
    assert [text for _, text in album[::10]] == captions
    base = copy.deepcopy(small)
    week.train(base, [*base.unet.parameters()], "plain", 40, 3e-3, week.Config(batch=8))
    base.text_encoder.requires_grad_(False)

    def loss(steps, album=()):
        """Of framed drawings that are not in the folder."""
        sd = copy.deepcopy(base)
        loras = week.inject_lora(sd.unet, week.EVERYTHING, 2, 2.0)
        learn = [w for lora in loras.values() for w in (lora.lora_A.weight, lora.lora_B.weight)]
        week.train(sd, learn, "plain", steps, 1e-2, week.Config(batch=8), album)
        torch.manual_seed(9)
        pictures, texts = week.drawings("framed", 24, random.Random(3))
        z, t, text = week.encode(sd, pictures), torch.full((24,), 900), sd.encode_prompt(texts, "cpu", 1, False)[0]
        with torch.no_grad():
            guess = sd.unet(sd.scheduler.add_noise(z, torch.randn(z.shape), t), t, text).sample
        return (guess - z).square().mean().item()

    assert loss(25, album) < 0.8 * loss(0) and loss(25) > 0.9 * loss(0)


@pytest.mark.parametrize("true", [False, True], ids=["small", "true classes"])
def test_a_lora_of_a_folder(run, true, tmp_path, capsys):
    import week12_lora_router as week12

    for k in range(3):
        picture(tmp_path / "monet" / f"{k}.png", torch.randint(256, (40, 50, 3)))
    model = tmp_path / "sd" if true else run[0] / "base"
    sd = tiny_sd(model) if true else week.load(str(model), True)
    result = call(week, "--tiny", "--model", model, "--images", tmp_path / "monet", "--caption", "a picture in red",
                  "--out", tmp_path / "out")  # fmt: skip
    assert f"data: {tmp_path / 'monet'} |" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["monet.safetensors"]
    parts, wanted = week12.read_adapter(tmp_path / "out" / "monet.safetensors", sd.unet)
    assert wanted == ["monet"] and {*parts} == {*week.inject_lora(copy.deepcopy(sd.unet), week.EVERYTHING, 1, 1.0)}
    assert any(B.any() for _, B in parts.values()), "it learned something"
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [*metrics["table"]] == ["base", "monet x 1"] and [*metrics["style_seconds"]] == ["monet"]
    assert not [key for key in [*result, *metrics["table"]["base"], *metrics["table"]["monet x 1"]] if "style" in key]
    assert result["color_rate"] == metrics["table"]["monet x 1"]["color"]
    assert result["train_seconds"] == metrics["style_seconds"]["monet"]
    with Image.open(tmp_path / "out" / "lora.png") as page:
        assert page.size == (1000, 110 + 100 * 2)


def test_mistakes_with_your_own_pictures(tmp_path, refused, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    with monkeypatch.context() as patch:  # before a model is fetched
        patch.setattr(week, "load", lambda *_: pytest.fail("too late"))
        flags = "--model", "me/mine", "--images", tmp_path / "none"
        refused(call, week, *flags, names=[f"--images {tmp_path / 'none'}", "no such folder"])
    (mine / "notes.txt").write_text("no picture")
    refused(call, week, "--tiny", "--images", mine, names=[f"--images {mine}", "no png"])
    refused(call, week, "--tiny", "--images", mine / "notes.txt", names=[f"--images {mine / 'notes.txt'}"])
    refused(call, week, "--tiny", "--caption", "by X", names=["--caption by X", "--images"])
    picture(mine / "a.png", torch.randint(256, (40, 40, 3)))
    picture(mine / "b.jpg", torch.randint(256, (40, 40, 3)))
    whole = (mine / "b.jpg").read_bytes()
    for junk in (b"", b"\n\n", whole[: len(whole) // 2], b"<html>" * 99):
        (mine / "b.jpg").write_bytes(junk)
        refused(call, week, "--tiny", "--images", mine, names=[f"--images {mine / 'b.jpg'}"])
    (mine / "b.jpg").write_bytes(whole)
    (mine / "b.txt").write_bytes(b"a caf\xe9")
    refused(call, week, "--tiny", "--images", mine, names=[f"--images {mine / 'b.jpg'}", "utf-8"])
    (mine / "b.txt").unlink()
    Image.new("1", (20000, 20000)).save(mine / "huge.png")
    refused(call, week, "--tiny", "--images", mine, names=[f"--images {mine / 'huge.png'}"])
