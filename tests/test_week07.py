"""Week 7: the profile of any model against counts by hand and by torch, and Stable Diffusion on models made here."""

import json
import math
import shutil

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import week07_sd_hooks as week
from conftest import call
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTokenizer


@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0)
    for log in (diffusers.logging, transformers.logging):
        log.set_verbosity_error()
        log.disable_progress_bar()


def near(a, b, tol=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tol


def torch_count(model, *inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def by_path(rows):
    return {row["path"]: row for row in rows}


@pytest.fixture(scope="module")
def true():
    """The true U-Net on the meta device, profiled at 64 x 64."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = week.make(UNet2DConditionModel, week.UNET)
        inputs = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
    return unet, inputs, week.profile_modules(unet, *inputs)[1]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    unet = week.make(UNet2DConditionModel, week.UNET | week.SMALL).eval()
    return unet, (torch.randn(2, 4, 8, 16), torch.tensor(7), torch.randn(2, 5, 24))


# ------------------------------------------------------------------------------------------------- the profile


class Mixed(nn.Module):
    """Products of all kinds, some in no module, one module called twice, outputs in a dict, inputs by name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 10, (3, 5), stride=2, groups=2)
        self.back = nn.ConvTranspose2d(10, 4, 3, stride=2)
        self.linear, self.bare = nn.Linear(7, 11), nn.Linear(11, 7, bias=False)
        self.inner = nn.Sequential(nn.Linear(11, 11), nn.ReLU())

    def forward(self, image, *, words):
        y = self.back(self.conv(image))
        x = self.inner(self.inner(self.linear(words)))
        z = self.bare(x)
        w = torch.nn.functional.scaled_dot_product_attention(
            x[:, None], z[:, None, :2] @ torch.ones(7, 11), x[:, None, :2]
        )
        return {"y": y, "more": [(x, z), w], "none": None}


def mixed_rows(device="cpu"):
    with torch.device(device):
        return week.profile_modules(Mixed(), torch.randn(3, 6, 17, 19), words=torch.randn(3, 5, 7))


CONV = 2 * 3 * 10 * 8 * 8 * 3 * 3 * 5
BACK = 2 * 3 * 10 * 8 * 8 * 4 * 3 * 3
LINEAR = [2 * 3 * 5 * 7 * 11, 2 * 3 * 5 * 11 * 11, 2 * 3 * 5 * 11 * 7]
LOOSE = 2 * 3 * 2 * 7 * 11
ATTENTION = 2 * 3 * 5 * 2 * (11 + 11)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_costs_are_those_done_by_hand(device):
    output, rows = mixed_rows(device)
    assert set(output) == {"y", "more", "none"} and output["y"].device.type == device
    assert [(row["path"], row["kind"], row["depth"]) for row in rows] == [
        ("", "Mixed", 0),
        ("conv", "Conv2d", 1),
        ("back", "ConvTranspose2d", 1),
        ("linear", "Linear", 1),
        ("inner", "Sequential", 1),
        ("inner.0", "Linear", 2),
        ("inner.1", "ReLU", 2),
        ("inner", "Sequential", 1),
        ("inner.0", "Linear", 2),
        ("inner.1", "ReLU", 2),
        ("bare", "Linear", 1),
    ]
    costs = [row["flops"] for row in rows]
    assert costs[1:] == [CONV, BACK, LINEAR[0], LINEAR[1], LINEAR[1], 0, LINEAR[1], LINEAR[1], 0, LINEAR[2]]
    top = rows[0]
    assert top["conv"] == CONV + BACK and top["conv"] + top["linear"] + top["attention"] == top["flops"]
    assert top["flops"] == CONV + BACK + LINEAR[0] + 2 * LINEAR[1] + LINEAR[2] + LOOSE + ATTENTION
    assert top["attention"] in (ATTENTION, ATTENTION + LOOSE)
    assert all(row["seconds"] > 0 for row in rows)


def test_operations_that_no_device_here_has():
    q, k, v, out = (torch.zeros(2, 3, *size) for size in ((5, 7), (11, 7), (11, 13), (5, 13)))
    for name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"):
        assert week.count_flops(name, (q, k, v, None), (out, None)) == ("attention", 2 * 6 * 5 * 11 * (7 + 13))
    assert week.count_flops("linear", (q, torch.zeros(19, 7)), torch.zeros(2, 3, 5, 19)) == ("linear", 2 * 30 * 7 * 19)
    assert week.count_flops("relu", (q,), q) == (None, 0)


def test_shapes_makers_parameters_and_bytes():
    _, rows = mixed_rows()
    top, conv, back, linear, first, *_ = rows
    assert top["ins"] == [[3, 6, 17, 19], [3, 5, 7]]
    assert top["outs"] == [[3, 4, 17, 17], [3, 5, 11], [3, 5, 7], [3, 1, 5, 11]]
    assert (conv["ins"], conv["outs"]) == ([[3, 6, 17, 19]], [[3, 10, 8, 8]])
    assert conv["makers"] == [["input"]] and back["makers"] == [["conv"]] and first["makers"] == [["linear"]]
    assert rows[7]["makers"] == [["inner.1"]] and rows[-1]["makers"] == [["inner.1"]]
    assert top["parameters"] == sum(w.numel() for w in Mixed().parameters())
    assert conv["parameters"] == 10 * 3 * 15 + 10 and rows[6]["parameters"] == 0
    assert conv["bytes"] == 4 * 3 * 10 * 64 and first["bytes"] == 2 * 4 * 3 * 5 * 11
    loose = 4 * 3 * 5 * 11
    assert top["bytes"] == sum(row["bytes"] for row in rows if row["depth"] == 1) + loose
    assert top["seconds"] > sum(row["seconds"] for row in rows if row["depth"] == 1)


def test_what_is_handed_on_is_counted_once():
    _, rows = week.profile_modules(
        nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Identity(), nn.Identity())), torch.ones(2, 3)
    )
    assert [row["bytes"] for row in rows] == [40, 40, 0, 0, 0]
    assert rows[-1]["makers"] == [["0"]]


def test_half_precision_takes_half_the_bytes():
    _, rows = week.profile_modules(nn.Linear(3, 5).bfloat16(), torch.ones(2, 3).bfloat16())
    assert rows[0]["bytes"] == 20 and rows[0]["flops"] == 60


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        self.grad = torch.is_grad_enabled()
        if self.inner(x).sum() > 0:
            return x
        raise KeyError("inside")


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_is_left_behind_whatever_happens():
    model = Fails()
    model.inner.bias.data.fill_(9)
    week.profile_modules(model, torch.zeros(1, 3))
    assert hooks(model) == 0 and model.grad is False and torch.is_grad_enabled()
    model.inner.bias.data.fill_(-9)
    with pytest.raises(KeyError, match="inside"):
        week.profile_modules(model, torch.zeros(1, 3))
    assert hooks(model) == 0
    before = model.inner(torch.ones(3))
    assert before.requires_grad


MODELS = {
    "transformer": (lambda: nn.TransformerEncoderLayer(12, 3, 29, batch_first=True).train(), [(2, 5, 12)]),
    "multihead": (lambda: nn.MultiheadAttention(12, 3, batch_first=True).train(), [(2, 5, 12)] * 3),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 5, dilation=2), nn.ReLU(), nn.Conv1d(6, 6, 3, groups=3)),
        [(2, 3, 23)],
    ),
    "conv3d": (lambda: nn.ConvTranspose3d(3, 5, 2, stride=2), [(2, 3, 4, 5, 3)]),
    "bilinear": (lambda: nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False)), [(7,)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_any_model_of_torch_costs_what_torch_counts(name):
    make, shapes = MODELS[name]
    with torch.device("meta"):
        model, inputs = make(), [torch.zeros(shape) for shape in shapes]
    output, rows = week.profile_modules(model, *inputs)
    assert rows[0]["flops"] == torch_count(model, *inputs) > 0


@pytest.mark.parametrize("size, batch", [((64, 64), 1), ((64, 64), 2), ((32, 48), 1), ((65, 33), 3)])
def test_the_true_unet_costs_what_torch_counts(true, size, batch):
    unet = true[0]
    with torch.device("meta"):
        inputs = torch.zeros(batch, 4, *size), torch.zeros(1), torch.zeros(batch, 77, 768)
    _, rows = week.profile_modules(unet, *inputs)
    assert rows[0]["flops"] == torch_count(unet, *inputs)
    if size == (64, 64):
        assert rows[0]["flops"] == batch * 803_273_441_280


def test_the_known_costs_by_kind_and_block(true):
    rows = by_path(true[2])
    giga = lambda path: round(rows[path]["flops"] / 1e9, 2)  # noqa: E731
    assert [giga(f"down_blocks.{i}") for i in range(4)] == [109.55, 68.36, 63.77, 7.56]
    assert giga("mid_block") == 12.10
    assert [giga(f"up_blocks.{i}") for i in range(4)] == [25.80, 151.54, 166.82, 197.57]
    assert [round(rows[""][kind] / 1e9, 2) for kind in ("conv", "linear", "attention")] == [443.95, 233.28, 126.05]
    counted = [rows[f"{part}_block{s}"]["parameters"] for part, s in (("mid", ""), ("down", "s.0"), ("up", "s.1"))]
    assert counted == [97_038_080, 10_524_480, 258_330_880]
    attention = [row for row in true[2] if row["kind"] == "Attention"]
    assert [len(row["ins"]) for row in attention] == [1, 2] * 16
    assert sorted(row["ins"][0][1] for row in attention[::2]) == [64] + [256] * 5 + [1024] * 5 + [4096] * 5
    assert all(row["ins"][1] == [1, 77, 768] for row in attention[1::2])
    for row in attention:
        tokens, words = row["ins"][0][1], row["ins"][-1][1]
        assert row["attention"] == 4 * tokens * words * row["ins"][0][2]


def test_vae_and_text_encoder_cost_what_is_known():
    with torch.device("meta"):
        text, vae, _ = (week.make(*part) for part in week.PARTS.values())
        words, seen = week.profile_modules(text, torch.zeros(1, 77, dtype=torch.long))
        _, encoder = week.profile_modules(vae.encoder, torch.zeros(1, 3, 512, 512))
        _, decoder = week.profile_modules(vae.decoder, torch.zeros(1, 4, 64, 64))
    assert words[0].shape == (1, 77, 768)
    assert [round(rows[0]["flops"] / 1e9, 1) for rows in (seen, encoder, decoder)] == [13.3, 1116.7, 2514.5]
    assert [rows[0]["parameters"] for rows in (encoder, decoder)] == [34_163_592, 49_490_179]
    assert decoder[0]["outs"] == [[1, 3, 512, 512]] and encoder[0]["outs"] == [[1, 8, 64, 64]]


def test_a_cpu_counts_what_meta_foretells(small):
    unet, inputs = small
    output, rows = week.profile_modules(unet, *inputs)
    with torch.device("meta"):
        shadow = week.make(UNet2DConditionModel, week.UNET | week.SMALL)
        _, foretold = week.profile_modules(shadow, *(torch.zeros(x.shape) for x in inputs))
    keys = ("path", "kind", "depth", "outs", "makers", "parameters", "flops", "conv", "attention", "bytes")
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in foretold]
    assert torch_count(unet, *inputs) == rows[0]["flops"] - rows[0]["attention"], "torch counts fused attention now"
    with torch.no_grad():
        assert torch.equal(output.sample, unet(*inputs).sample), "to be watched changes nothing"


# ------------------------------------------------------------------------------------------------------- skips

TRUE_SKIPS = {
    ("conv_in", "up_blocks.3.resnets.2"),
    ("down_blocks.0.attentions.0", "up_blocks.3.resnets.1"),
    ("down_blocks.0.attentions.1", "up_blocks.3.resnets.0"),
    ("down_blocks.0.downsamplers.0.conv", "up_blocks.2.resnets.2"),
    ("down_blocks.1.attentions.0", "up_blocks.2.resnets.1"),
    ("down_blocks.1.attentions.1", "up_blocks.2.resnets.0"),
    ("down_blocks.1.downsamplers.0.conv", "up_blocks.1.resnets.2"),
    ("down_blocks.2.attentions.0", "up_blocks.1.resnets.1"),
    ("down_blocks.2.attentions.1", "up_blocks.1.resnets.0"),
    ("down_blocks.2.downsamplers.0.conv", "up_blocks.0.resnets.2"),
    ("down_blocks.3.resnets.0", "up_blocks.0.resnets.1"),
    ("down_blocks.3.resnets.1", "up_blocks.0.resnets.0"),
}


def test_skips_are_found_where_they_leave_and_return(true, small):
    found = week.find_skips(true[2])
    assert len(found) == 12 and set(found) == TRUE_SKIPS
    assert set(week.find_skips(week.profile_modules(small[0], *small[1])[1])) == TRUE_SKIPS


class Net(nn.Module):
    """A net of one's own, whose skip is before or after the stream in the cat; the input is nobody's output."""

    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Sequential(nn.Conv2d(12, 6, 1))
        self.first = first

    def forward(self, x):
        y = self.a(x)
        z = self.b(y)
        return self.c(torch.cat([x, y, z] if self.first else [z, y, x], 1))


@pytest.mark.parametrize("first", [True, False])
def test_skips_of_other_nets(first):
    _, rows = week.profile_modules(Net(first), torch.randn(2, 3, 7, 5))
    assert week.find_skips(rows) == [("a", "c")]
    assert week.find_skips(week.profile_modules(nn.Linear(3, 3), torch.ones(3))[1]) == []


def test_boxes_are_the_modules_that_work_on_images(true):
    found = week.find_boxes(true[2])
    paths = [row["path"] for _, row in found]
    assert len(paths) == 46
    assert paths[0] == "conv_in" and paths[-1] == "conv_out" and not any("time" in path for path in paths)
    assert all(row["path"].startswith(block["path"]) for block, row in found)
    assert {block["path"] for block, _ in found} == {
        "conv_in", "mid_block", "conv_out", *(f"{side}_blocks.{i}" for side in ("down", "up") for i in range(4))
    }  # fmt: skip
    total = sum(row["flops"] for _, row in found)
    embedding = by_path(true[2])["time_embedding"]["flops"]
    assert total + embedding == true[2][0]["flops"]


def test_the_table_says_what_is_in_the_rows(true, capsys):
    week.print_table(true[2], False)
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("up_blocks.3.resnets.2")).split()
    assert line[1:6] == ["ResnetBlock2D", "640x64x64", "320x64x64", "3,382,400", "24.33"] and line[6] == "3.0%"
    assert line[-2:] == ["<", "conv_in"] and line[7] == "50.0"
    line = next(line for line in lines if line.startswith("down_blocks.0.downsamplers.0")).split()
    assert line[-2:] == [">", "up_blocks.2.resnets.2"]
    line = next(line for line in lines if line.startswith("conv_in ")).split()
    assert line[-2:] == [">", "up_blocks.3.resnets.2"]
    assert sum(">" in line for line in lines) == sum("<" in line for line in lines) == 12
    levels = [line for line in lines if line.endswith("%") and "pixels" in line]
    assert [line.split(" pixels")[0] for line in levels] == [f"{n} x {n}" for n in (64, 32, 16, 8, 16, 32, 64)]
    assert levels[0] == levels[-1] and abs(sum(float(x.split()[-1][:-1]) for x in levels[:4]) - 100) < 0.3
    timed = [dict(row, seconds=0.0123) for row in true[2][:9]]
    week.print_table(timed, True)
    assert all("12.3" in line for line in capsys.readouterr().out.splitlines() if "pixels" not in line)


# --------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("tokens, channels", [(4096, 320), (1024, 640), (256, 1280), (64, 1280)])
def test_attention_of_true_size_by_hand(true, tokens, channels):
    path = next(
        r["path"] for r in true[2] if r["kind"] == "Attention" and r["ins"] == [[1, tokens, channels], [1, 77, 768]]
    )
    model = true[0].get_submodule(path)
    layer = type(model)(channels, 768, heads=8, dim_head=channels // 8).requires_grad_(False)
    assert [w.shape for w in layer.parameters()] == [w.shape for w in model.parameters()]
    x, words = torch.randn(1, tokens, channels), torch.randn(1, 77, 768)
    output, maps = week.attention_by_hand(layer, x, words)
    near(output, layer(x, words))
    assert maps.shape == (1, 8, tokens, 77)
    near(maps.sum(-1), torch.ones(1, 8, tokens))


def test_attention_by_hand_from_hooked_inputs(small):
    unet, inputs = small
    seen = []

    def hook(layer, args, named, output):
        seen.append((layer, args[0], named["encoder_hidden_states"], output))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in unet.modules() if hasattr(m, "to_q")]
    with torch.no_grad():
        unet(*inputs)
        for handle in handles:
            handle.remove()
        assert len(seen) == 32 and sum(words is None for _, _, words, _ in seen) == 16
        for layer, x, words, output in seen:
            y = x if words is None else words
            q, k, v = (f(z).view(2, -1, 8, f.out_features // 8).transpose(1, 2)
                       for f, z in ((layer.to_q, x), (layer.to_k, y), (layer.to_v, y)))  # fmt: skip
            weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), -1)
            ours, maps = week.attention_by_hand(layer, x, words)
            near(ours, output)
            near(maps, weights)


@pytest.mark.parametrize("part, count", [("up_blocks.1", 3), ("mid_block", 1), ("attn2", 16), ("", 16), ("attn1", 0)])
def test_only_chosen_layers_give_up_the_fused_kernel(small, part, count, monkeypatch):
    inputs = small[1]
    torch.manual_seed(1)
    unet = week.make(UNet2DConditionModel, week.UNET | week.SMALL).eval()
    fused, right = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        fused.append(args[0].shape)
        return right(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        before = unet(*inputs).sample
        assert len(fused) == 32
        maps, layers = week.capture(unet, part)
        assert len(maps) == count and len(layers) == 16
        assert all(part in path for path in maps) and all(path.endswith("attn2") for path in layers)
        fused.clear()
        near(unet(*inputs).sample, before)
    assert len(fused) == 32 - count
    for path, m in maps.items():
        assert m.shape[:2] == (2, 8) and m.shape[3] == 5 and layers[path].heads == 8
        near(m.sum(-1), torch.ones(m.shape[:3]))
    if part == "up_blocks.1":
        assert all(m.shape[2] == 2 * 4 for m in maps.values())
        assert not torch.allclose(*list(maps.values())[:2])


# -------------------------------------------------------------------------------------------------- the models


def config(**flags):
    return week.Config(**{**dict(tiny=True, model="tiny", run=True, size="64x96"), **flags})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Stable Diffusion as others save it; copied by the tests that break it."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("a folder é")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-:;+/()&%$#@=<>[]"]
    vocab = [*letters, *(f"{c}</w>" for c in letters), "do", "dog</w>", "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(vocab)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[("d", "o"), ("do", "g</w>")], model_max_length=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    for part, (kind, config) in week.PARTS.items():
        extra = dict(vocab_size=len(vocab), num_hidden_layers=2) if part == "text_encoder" else {}
        week.make(kind, config | week.SMALL | extra).save_pretrained(folder / part)
    return folder


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_folder_is_loaded_whole(folder):
    *models, tokenizer, weights = week.load(config(model=str(folder)), torch.device("cpu"))
    assert weights == str(folder) and tokenizer("dog").input_ids[1:-1] == [tokenizer.get_vocab()["dog</w>"]]
    for model, (part, (kind, _)) in zip(models, week.PARTS.items()):
        assert type(model) is kind and not model.training and same(model, kind.from_pretrained(folder / part))
        assert next(model.parameters()).dtype == torch.float32


def test_without_run_only_configurations_are_read(folder, tmp_path):
    for part in week.PARTS:
        (tmp_path / part).mkdir()
        shutil.copy(folder / part / "config.json", tmp_path / part)
    *models, tokenizer, weights = week.load(config(model=str(tmp_path), run=False), torch.device("meta"))
    assert weights == "none" and tokenizer is None
    assert all(w.device.type == "meta" for model in models for w in model.parameters())
    assert models[2].config.block_out_channels == [8, 16, 24, 24] and models[0].config.num_hidden_layers == 2


def test_the_embedded_models_need_no_folder_and_no_network(monkeypatch):
    monkeypatch.setattr(week, "locate", lambda *args: pytest.fail("nobody is asked"))
    text, vae, unet, tokenizer, weights = week.load(week.Config(), torch.device("meta"))
    assert (weights, tokenizer, unet.config.block_out_channels) == ("none", None, (320, 640, 1280, 1280))
    assert vae.config.scaling_factor == 0.18215 and text.config.vocab_size == 49408
    *models, tokenizer, weights = week.load(config(), torch.device("cpu"))
    assert weights == "random" and models[2].config.block_out_channels == (8, 16, 24, 24)


@pytest.mark.parametrize("run", [True, False])
def test_the_hub_is_asked_for_all_that_is_needed(monkeypatch, folder, run, capsys):
    asked = []

    def locate(cfg, files, instead):
        asked.extend(files)
        print(instead)
        return str(folder)

    monkeypatch.setattr(week, "locate", locate)
    *_, weights = week.load(week.Config(model="some/one", run=run), torch.device("cpu" if run else "meta"))
    assert asked[0] == "model_index.json" and len(asked) == len(set(asked)) == (9 if run else 4)
    assert {f"{part}/config.json" for part in week.PARTS} <= set(asked)
    if run:
        assert {"text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"} <= set(asked)
        assert {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")} <= set(asked)
    assert weights == ("some/one" if run else "none") and "random weights" in capsys.readouterr().out


def no_part(folder):
    shutil.rmtree(folder / "vae")


def no_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def truncated(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def pickled(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save({}, path.with_suffix(".bin"))
    path.unlink()


def no_json(folder):
    (folder / "unet" / "config.json").write_text('{"sample_size": ')


def change(folder, part, **new):
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


def other_width(folder):
    change(folder, "unet", block_out_channels=[16, 32, 48, 48])


def other_depth(folder):
    change(folder, "text_encoder", num_hidden_layers=3)


def other_words(folder):
    torch.manual_seed(0)
    week.make(UNet2DConditionModel, week.UNET | week.SMALL | dict(cross_attention_dim=40)).save_pretrained(
        folder / "unet"
    )


def other_latent(folder):
    week.make(AutoencoderKL, week.VAE | week.SMALL | dict(latent_channels=3)).save_pretrained(folder / "vae")


def no_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


def empty_tokenizer(folder):
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')


def large_tokenizer(folder):
    size = dict(vocab_size=99, num_hidden_layers=2)
    week.make(CLIPTextModel, week.TEXT | week.SMALL | size).save_pretrained(folder / "text_encoder")


def no_json_in_the_tokenizer(folder):
    for path in (folder / "tokenizer").glob("*.json"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def heads_by_name(folder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(num_attention_heads="two")))


def wrong_field_in_the_tokenizer(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(version=3)))


def list_for_a_config(folder):
    (folder / "unet" / "config.json").write_text("[]")


BROKEN = [wrong_field_in_the_tokenizer, list_for_a_config, no_json_in_the_tokenizer, heads_by_name, no_part,
          no_weights, truncated, pickled, no_json, other_width, other_depth, other_words, other_latent,
          no_tokenizer, empty_tokenizer, large_tokenizer]  # fmt: skip


@pytest.mark.filterwarnings("error::FutureWarning")  # of diffusers, where a configuration is a list
@pytest.mark.parametrize("how", BROKEN, ids=lambda how: how.__name__)
def test_a_broken_folder_is_refused(folder, tmp_path, refused, how):
    shutil.copytree(folder, tmp_path / "copy")
    how(tmp_path / "copy")
    refused(week.load, config(model=str(tmp_path / "copy")), torch.device("cpu"), names=["--model", str(tmp_path)])


# ----------------------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def parts(folder):
    for log in (diffusers.logging, transformers.logging):
        log.set_verbosity_error()
        log.disable_progress_bar()
    return week.load(config(model=str(folder)), torch.device("cpu"))


def test_files_of_older_libraries_are_read(folder, tmp_path, parts):
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old" / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name}": w for name, w in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(state, path, {"format": "pt"})
    path = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    state, names = (
        safetensors.torch.load_file(path),
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
    )
    for new, old in names.items():
        state = {name.replace(f".{new}.", f".{old}."): w for name, w in state.items()}
    assert sum("proj_attn" in name for name in state) == 4
    safetensors.torch.save_file(state, path, {"format": "pt"})
    tokens = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    shutil.rmtree(tmp_path / "old" / "tokenizer")
    (tmp_path / "old" / "tokenizer").mkdir()
    (tmp_path / "old" / "tokenizer" / "vocab.json").write_text(json.dumps(tokens["vocab"]))
    (tmp_path / "old" / "tokenizer" / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    *models, tokenizer, _ = week.load(config(model=str(tmp_path / "old")), torch.device("cpu"))
    assert all(same(ours, theirs) for ours, theirs in zip(models, parts[:3]))
    assert tokenizer("a dog").input_ids == parts[3]("a dog").input_ids


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_are_those_of_diffusers(parts, steps, capsys):
    text, vae, unet, *_ = parts
    ids = torch.randint(100, (2, 77))
    torch.manual_seed(5)
    rows, image, mean, logvar = week.run(config(steps=steps), text, vae, unet, ids)
    assert [name for name in rows] == ["text encoder", "U-Net", "VAE decoder", "VAE encoder"]
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        clip_sample=False, set_alpha_to_one=True)  # fmt: skip
    torch.manual_seed(5)
    x, words = torch.randn(2, 4, 8, 12), text(ids)[0]
    times = [999 * (steps - i) // steps for i in range(steps)]
    with torch.no_grad():
        for t, after in zip(times, [*times[1:], -1]):
            a = scheduler.alphas_cumprod[t].item()
            b = scheduler.alphas_cumprod[after].item() if after >= 0 else 1.0
            noise = unet(x, t, words).sample
            start = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
            x = math.sqrt(b) * start + math.sqrt(1 - b) * noise
        expected = vae.decode(x / 0.18215).sample
        code = vae.encode(expected).latent_dist
    scale = expected.abs().max()
    near(image / scale, expected / scale, 1e-4)
    near(mean / code.mean.abs().max(), code.mean / code.mean.abs().max(), 1e-3)
    assert logvar.shape == mean.shape == (2, 4, 8, 12) and image.shape == (2, 3, 64, 96)
    near(logvar.clamp(-30, 20), code.logvar, 1e-2 * code.logvar.abs().max())
    assert sum(line.startswith("step ") for line in capsys.readouterr().out.splitlines()) == steps
    assert rows["VAE decoder"][0]["ins"] == [[2, 4, 8, 12]] and rows["U-Net"][0]["ins"][-1] == [2, 77, 24]


def test_on_meta_the_same_lines_tell_the_same_costs(parts, folder, capsys):
    shadow = week.load(config(model=str(folder), run=False), torch.device("meta"))
    ids = torch.zeros(2, 77, dtype=torch.long)
    there, image, *_ = week.run(config(run=False, steps=9), *shadow[:3], ids.to("meta"))
    assert image.device.type == "meta" and capsys.readouterr().out == ""
    here, *_ = week.run(config(), *parts[:3], ids)
    for name in here:
        assert [(r["path"], r["outs"], r["flops"]) for r in here[name]] == [
            (r["path"], r["outs"], r["flops"]) for r in there[name]
        ]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    prompt = "dog & dog " * 2
    return call(week, "--tiny", "--model", folder, "--out", out, "--json", "--prompt", prompt, "--steps", 2), out


def test_the_whole_runs_with_a_folder(finished, folder):
    result, out = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert {path.name for path in out.iterdir()} >= {"metrics.json", "unet.png", "maps.png", "table.json"}
    rows = json.loads((out / "table.json").read_text())
    assert metrics["weights"] == str(folder) and result["gflop"] == rows["U-Net"][0]["flops"] / 1e9
    assert result["compression"] == 48 and metrics["parameters"] == rows["U-Net"][0]["parameters"]
    assert result["baseline_gflop"] * 1e9 == pytest.approx(rows["U-Net"][0]["flops"] - rows["U-Net"][0]["attention"])
    assert result["pass_seconds"] == rows["U-Net"][0]["seconds"] > 0
    with Image.open(out / "maps.png") as page:  # image, 4 latents, start, four words, end: 3 rows of 5
        assert page.size == (1220, 10 + 3 * (40 + 220 * 8 // 12))
        pixels = np.asarray(page)
    tall = 40 + 220 * 8 // 12
    for k in range(11):
        tile = pixels[10 + tall * (k // 5) + 28 :, 20 + 240 * (k % 5) :][: tall - 40, :220]
        assert tile.std() > 3, "a tile shows nothing"


def test_one_seed_one_result_and_another_another(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(week, "run_checks", lambda: None)
    pages = []
    for i, seed in enumerate((7, 7, 8)):
        call(week, "--tiny", "--seed", seed, "--out", tmp_path / str(i))
        pages.append((tmp_path / str(i) / "maps.png").read_bytes())
    assert pages[0] == pages[1] != pages[2]


@pytest.mark.parametrize("prompt", ["", "a", "dog " * 200, "漢字 <|endoftext|> é"])
@pytest.mark.parametrize("model", ["tiny", "folder"])
def test_prompts_of_any_length(folder, tmp_path, monkeypatch, prompt, model):
    seen = []

    def spy(cfg, text, vae, unet, ids):
        seen.append(ids)
        raise KeyboardInterrupt

    monkeypatch.setattr(week, "run_checks", lambda: None)
    monkeypatch.setattr(week, "run", spy)
    where = folder if model == "folder" else model
    with pytest.raises(KeyboardInterrupt):
        call(week, "--tiny", "--model", where, "--out", tmp_path / "out", "--prompt", prompt, "--batch", 3)
    (ids,) = seen
    assert ids.shape == (3, 77) and (ids == ids[0]).all()
    if model == "folder":
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        theirs = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert ids[0].tolist() == theirs


def test_the_default_is_the_true_model_without_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(week, "run_checks", lambda: None)
    result = week.main(week.Config(out=str(tmp_path / "out"), size="512x768", batch=2))
    assert result["compression"] == 48 and result["gflop"] == 2590.5545216
    out = capsys.readouterr().out
    assert "week 7 | meta" in out and "weights: none" in out and "96 pixels" in out
    assert not (tmp_path / "out" / "maps.png").exists() and not (tmp_path / "out" / "table.json").exists()


def test_bad_values_are_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(week, "run_checks", lambda: None)
    monkeypatch.setattr(week, "run", lambda *args: pytest.fail("too late"))
    for flag, values in dict(
        size=["64", "64x", "x64", "64x60", "56x64", "64x64x64", "0x64", "64.0x64", "nan", "99999x64", "64 x 64"],
        steps=["0", "-1", "1000"], batch=["0", "1000"], seed=["-1", str(2**63)], watch=["nowhere", "attn1"],
    ).items():  # fmt: skip
        for value in values:
            refused(call, week, "--tiny", "--out", tmp_path / "out", f"--{flag}", value, names=[f"--{flag} {value}"])


# ------------------------------------------------------------------------------------------------ the pictures


def at(page, x, y):
    return page.getpixel((round(x / 2), round(y / 2)))


def close(color, name):
    wanted = tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))
    return max(abs(a - b) for a, b in zip(color, wanted)) <= 24


def test_the_picture_is_the_trace(true):
    rows = true[2]
    page, boxes = week.draw(rows), week.find_boxes(rows)
    assert page.size == (1600, (630 + 4 * 380) // 2)
    pitch, top = 2920 // 46, rows[0]
    most = max(row["flops"] for _, row in boxes)
    for i, (_, row) in enumerate(boxes):
        x, level = 230 + pitch * i + 0.3 * pitch, {64: 0, 32: 1, 16: 2, 8: 3}[row["ins"][0][2]]
        base, tall = 90 + 380 * (level + 1), 40 + 130 * math.sqrt(row["ins"][0][2] / 64)
        y = base
        for kind, (color, _) in week.COLORS.items():
            high = tall * row[kind] / row["flops"]
            if high > 16:
                assert close(at(page, x, y - high / 2), color), (row["path"], kind)
            y -= high
        assert at(page, x, base - tall - 30) != (0, 0, 0)
        bar = 200 * row["flops"] / most
        if bar > 16:
            assert min(at(page, x, page.height * 2 - 40 - bar - 6)) > 250
            assert min(at(page, x, page.height * 2 - 40 - bar + 6)) < 220
        text = close(at(page, x, base + 34), "#d0218a")
        assert text == (row["kind"] == "Transformer2DModel"), row["path"]
    assert top["kind"] == "UNet2DConditionModel"


def test_each_skip_is_an_arrow_of_its_own(true):
    page = week.draw(true[2])
    for level, x in enumerate((1300, 1300, 1300, 1300)):
        base, tall = 90 + 380 * (level + 1), 40 + 130 * math.sqrt(0.5**level)
        x = 1560 if level == 3 else x
        column = [close(at(page, x, y), "#9b59b6") for y in range(int(base - tall - 130), int(base - tall - 20), 2)]
        runs = sum(a and not b for a, b in zip(column, [*column[1:], False]))
        assert runs == (3 if level < 3 else 1) or level == 3 and runs in (2, 3)


def test_other_nets_draw_themselves():
    net = nn.Sequential(Net(True))
    _, rows = week.profile_modules(net, torch.randn(1, 3, 16, 24))
    rows = [dict(row) for row in rows]
    assert [row["path"] for _, row in week.find_boxes(rows)] == ["0.a", "0.b", "0.c"]


def test_maps_are_where_they_belong():
    image, mean = torch.zeros(3, 64, 96), torch.randn(4, 8, 12)
    m = torch.zeros(2, 4 * 6, 5)
    m[:, 2 * 6 + 4, 1] = 1  # word 1 is found in row 2 of 4, column 4 of 6
    page = np.asarray(week.draw_maps(image, mean, [m, m], ["start", "b", "c"]))
    tall = 40 + 220 * 8 // 12
    tile = page[10 + tall + 28 :, 20 + 240 :][: tall - 40, :220].astype(int)
    hot = tile[..., 0] - tile[..., 2]
    y, x = np.unravel_index(hot.argmax(), hot.shape)
    assert hot.max() > 100 and int(y / (tall - 40) * 4) == 2 and int(x / 220 * 6) == 4
    assert (hot > 0).mean() == pytest.approx(1 / 24, rel=0.2)
    flat = page[10 + tall + 28 :, 20 + 480 :][: tall - 40, :220].astype(int)
    assert flat.std(axis=(0, 1)).max() < 1
