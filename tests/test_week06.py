"""Week 6: parts, U-Net and baselines against torch and closed forms, with a prime number of everything that may be."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import week06_mini_unet as week
from conftest import call
from PIL import Image
from torch import nn

f64 = torch.float64
IDEAS = ["none", "skips", "residual", "depth", "skips+residual"]
AUTOCAST = torch.autocast("cpu", enabled=False)


def near(a, b, tol=1e-12):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol


def shaken(module):
    """All weights drawn anew: a zero at the start would hide a mistake."""
    with torch.no_grad():
        for w in module.parameters():
            w.add_(torch.randn_like(w) * 0.2)
    return module.double()


def unet(dims=2, ablate="none", width=12):
    torch.manual_seed(1)
    return shaken(week.MiniUNet(width, dims, 0.2, 0.3, ablate)).eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (3, 12, 11)])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norm_is_torch_s(shape, groups):
    x, w, b = torch.randn(shape, dtype=f64) * 3 + 2, *torch.randn(2, 12, dtype=f64)
    near(week.group_norm(x, groups, w, b), F.group_norm(x, groups, w, b))
    near(week.group_norm(x[:1], groups, w, b), week.group_norm(x, groups, w, b)[:1])


@pytest.mark.parametrize("outputs", [8, 12])
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d])
def test_a_block_is_its_formula(conv, outputs):
    block, level = shaken(week.ResBlock(conv, 8, outputs)), torch.randn(3, 64, dtype=f64)
    x = torch.randn((3, 8, 7) if conv is nn.Conv1d else (3, 8, 5, 7), dtype=f64)
    gain, bias = block.level(level)[..., None].reshape(3, 2, outputs, *[1] * (x.ndim - 2)).unbind(1)
    norm = lambda m, y: week.group_norm(y, 4, m.weight, m.bias)  # noqa: E731
    y = block.conv1(F.silu(norm(block.norm1, x)))
    y = block.conv2(F.silu(norm(block.norm2, y) * (1 + gain) + bias))
    near(block(x, level), y + (x if outputs == 8 else block.short(x)), 1e-11)


def test_a_block_starts_as_the_identity():
    x = torch.randn(3, 8, 5, 7)
    assert torch.equal(week.ResBlock(nn.Conv2d, 8, 8)(x, torch.randn(3, 64)), x)


# ---------------------------------------------------------------------------------------------------- U-Net


@pytest.mark.parametrize("dims, shape", [(2, (3, 1, 12, 20)), (2, (2, 1, 28, 28)), (1, (3, 1, 44)), (2, (2, 1, 4, 4))])
def test_what_comes_out_has_the_shape_of_what_went_in(dims, shape):
    model, y, sigma = unet(dims), torch.randn(shape, dtype=f64), torch.linspace(0.1, 0.9, shape[0], dtype=f64)
    skip, deep, decoded = model.features(y, sigma)
    assert model(y, sigma).shape == shape
    assert skip.shape == decoded.shape == (shape[0], 12, *(n // 2 for n in shape[2:]))
    assert deep.shape == (shape[0], 24, *(n // 4 for n in shape[2:]))
    for at_once, one in zip(model(y, sigma), range(shape[0])):
        near(at_once[None], model(y[one : one + 1], sigma[one : one + 1]), 1e-10)


def test_going_up_is_the_transpose_of_going_down():
    model = unet()
    small, large = torch.randn(1, 24, 3, 5, dtype=f64), torch.randn(1, 12, 6, 10, dtype=f64)
    model.up.weight.data.copy_(model.down.weight.data)
    up, down = model.up(small) - model.up.bias.view(1, -1, 1, 1), model.down(large) - model.down.bias.view(1, -1, 1, 1)
    assert (up * large).sum().item() == pytest.approx((small * down).sum().item(), rel=1e-9)


def test_the_preconditioning_is_table_1_of_karras():
    model, y, sigma = unet(), torch.randn(2, 1, 8, 8, dtype=f64), torch.tensor([0.07, 0.8], dtype=f64)
    std, s, seen = 0.3, sigma.view(2, 1, 1, 1), []
    model.enter.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.leave.register_forward_hook(lambda module, given, out: seen.append(out))
    d = model(y, sigma)
    near(seen[0], (y - 0.2) / (s**2 + std**2).sqrt(), 1e-6)
    c_skip, c_out = std**2 / (s**2 + std**2), s * std / (s**2 + std**2).sqrt()
    near(d, 0.2 + c_skip * (y - 0.2) + c_out * seen[1].float().double(), 1e-6)
    x, n, a = std * torch.randn(10**6), sigma[0] * torch.randn(10**6), c_skip[0, 0]
    target = (x - a * (x + n)) / c_out[0, 0]
    assert target.var().item() == pytest.approx(1, abs=0.01), "what F must give has variance 1"


def test_each_part_that_is_taken_away_carries_nothing():
    y, sigma = torch.randn(2, 1, 8, 8, dtype=f64), torch.tensor([0.07, 0.8], dtype=f64)
    outputs = {idea: unet(ablate=idea)(y, sigma) for idea in IDEAS}
    assert len({round(d.sum().item(), 9) for d in outputs.values()}) == len(IDEAS)
    for idea in IDEAS:
        model, cut = unet(ablate=idea), []
        model.decoder.register_forward_pre_hook(lambda module, given: cut.append(given[0]))
        model(y, sigma)
        deep, skip = cut[0].chunk(2, 1)
        assert (skip.abs().sum() == 0) == ("skips" in idea) and (deep.abs().sum() == 0) == (idea == "depth")
        with torch.no_grad():
            for w in model.leave.parameters():
                w.zero_()
        assert (model(y, sigma).std() < 1e-6) == ("residual" in idea)


@pytest.mark.parametrize("dims", [1, 2])
def test_a_swap_takes_the_bottleneck_of_the_next(dims):
    model, y = unet(dims), torch.randn(3, 1, *[8] * dims, dtype=f64)
    sigma = torch.full((3,), 0.4, dtype=f64)
    skip, deep, _ = model.features(y, sigma)
    level = model.level(sigma.log()[:, None])
    mixed = torch.cat([model.up(torch.stack([deep[1], deep[2], deep[0]])), skip], 1)
    near(model.features(y, sigma, swap=True)[2], model.decoder(mixed, level))
    assert not torch.allclose(model(y, sigma), model(y, sigma, swap=True))
    same = y[:1].expand_as(y)
    near(model(same, sigma), model(same, sigma, swap=True))


def test_the_level_changes_what_the_network_does():
    model, y = unet(), torch.randn(1, 1, 8, 8, dtype=f64)
    near(model.level(torch.zeros(1, 1, dtype=f64)), model.level(torch.tensor([[1.0]], dtype=f64).log()))
    skips = [model.features(y * math.hypot(s, 0.3) + 0.2, torch.tensor([s], dtype=f64))[0] for s in (0.1, 0.9)]
    assert not torch.allclose(*skips), "the same scaled image, another level"


# ------------------------------------------------------------------------------------------------ baselines


def test_psnr_by_hand():
    clean = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    assert week.psnr(clean + 0.1, clean) == pytest.approx(10 * math.log10(1 / (3 * 0.01 / 4)), abs=1e-4)
    assert week.psnr(-clean - 5, clean) == pytest.approx(-10 * math.log10(clean.square().mean()), abs=1e-4)


def test_blur_is_a_gaussian_along_each_axis():
    for shape in ((2, 1, 13, 13), (2, 1, 13)):
        flat = torch.full(shape, 0.7)
        near(week.blur(flat, 1.3), flat, 1e-6)
        point = torch.zeros(shape)
        point[(0, 0) + (6,) * (len(shape) - 2)] = 1
        spread = week.blur(point, 1.0)[0, 0]
        line = spread if len(shape) == 3 else spread[6] / spread[6].sum()
        assert (line[6] / line[7]).item() == pytest.approx(math.exp(0.5), rel=1e-2)
        if len(shape) == 4:
            near(spread, spread.T, 1e-7)
    y = torch.rand(1, 1, 13, 13)
    near(week.blur(y, 0.05), y, 1e-6)


def test_median_is_the_middle_of_the_window():
    for shape in ((2, 1, 7, 7), (2, 1, 11)):
        y = torch.randn(shape)
        middle = week.median(y)
        assert middle.shape == shape
        window = y[1, 0, 3:6, 2:5] if len(shape) == 4 else y[1, 0, 3:6]
        assert middle[(1, 0) + ((4, 3) if len(shape) == 4 else (4,))] == window.median()


def test_patches_are_the_windows():
    x = torch.arange(2 * 4 * 6).view(2, 1, 4, 6)
    cut = week.patches(x, 2, 2)
    assert cut.shape == (2, 1, 2, 3, 4) and cut[1, 0, 1, 2].tolist() == x[1, 0, 2:4, 4:6].flatten().tolist()
    assert week.patches(x[:, 0], 3, 1).shape == (2, 4, 4, 3)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0])
def test_wiener_is_the_closed_form(sigma):
    x = torch.randn(97, 1, 2, 3, dtype=f64) @ torch.randn(3, 3, dtype=f64) + 0.3
    y, flat = torch.randn(5, 1, 2, 3, dtype=f64), x.flatten(1)
    m, C = flat.mean(0), torch.cov(flat.T, correction=0)
    best = m + (y.flatten(1) - m) @ torch.linalg.solve(C + sigma**2 * torch.eye(6, dtype=f64), C)
    near(week.wiener(x)(y, sigma), best.view_as(y), 1e-9)


def test_no_linear_map_beats_wiener():
    x = torch.randn(20_000, 5) @ torch.randn(5, 5)
    y = x + 0.7 * torch.randn_like(x)
    ours = (week.wiener(x)(y, 0.7) - x).square().mean()
    assert ours < (y - x).square().mean() and ours < x.var()
    best = (y @ torch.linalg.lstsq(y, x).solution - x).square().mean()
    assert ours.item() == pytest.approx(best.item(), rel=5e-3)


# ----------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("size", [8, 16, 28])
def test_digits_come_in_the_size_that_was_asked_for(size, monkeypatch):
    digits = torch.arange(256).repeat(28 * 28 * 6 // 256 + 1)[: 28 * 28 * 6].view(6, 28, 28).byte()
    found = digits, torch.arange(6), digits[:2], torch.arange(2), "n"
    monkeypatch.setattr(week, "load_mnist", lambda folder, tiny: found)
    x, test, labels, test_labels, name = week.load_images(week.Config(size=size))
    assert x.shape == (6, 1, size, size) and test.shape == (2, 1, size, size)
    assert (len(labels), len(test_labels)) == (6, 2)
    assert x.min() >= 0 and 0.5 < x.max() <= 1
    theirs = F.interpolate(digits[:, None].float() / 255, (size, size), mode="bilinear", antialias=True)
    near(x, theirs, 1e-6)


def test_waveforms_are_waveforms():
    x, test, labels, test_labels, name = week.load_images(week.Config(signal=True, tiny=True, size=8))
    assert x.shape == (3000, 1, 64) and test.shape == (500, 1, 64) and "wave" in name
    assert 0 <= x.min() < 0.2 and 0.8 < x.max() <= 1 and x.mean().item() == pytest.approx(0.5, abs=0.01)
    assert set(labels.tolist()) == {0, 1, 2, 3} and len(labels) == 3000 and len(test_labels) == 500
    assert torch.equal(x, week.load_images(week.Config(signal=True, tiny=True, size=8, seed=5))[0])
    assert (x[..., 0] == 0.5).float().mean() > 0.8 and (x[..., -1] == 0.5).float().mean() < 0.1


def test_noise_has_the_deviation_and_is_the_same_for_all():
    x = torch.rand(500, 1, 16, 16)
    for sigma in (0.1, 0.7):
        y = week.noisy(x, sigma)
        assert (y - x).std().item() == pytest.approx(sigma, rel=0.01) and abs((y - x).mean()) < 0.01
        assert torch.equal(y, week.noisy(x, sigma))
    state = torch.get_rng_state()
    week.noisy(x, 1.0)
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------- training


def small(**flags):
    """Arguments for train(): images that have one of two patterns."""
    cfg = week.Config(**{**dict(width=8, batch=16, steps=60), **flags})
    torch.manual_seed(cfg.seed)
    pattern = (torch.rand(2, 1, 8, 8) < 0.5).float()
    x = pattern[torch.arange(40) % 2]
    return week.MiniUNet(cfg.width, 2, x.mean(), x.std(), cfg.ablate), x, cfg, AUTOCAST


def test_training_learns_what_there_is_to_learn(capsys):
    model, x, *rest = small(steps=250)
    y = week.noisy(x, 0.5)
    before = week.psnr(week.denoise(model, y, 0.5), x)
    average, seconds = week.train(model, x, *rest)
    assert week.psnr(week.denoise(average, y, 0.5), x) > max(before + 8, 18) and seconds > 0
    assert not average.training and average is not model
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"step +250/250 \| loss \d+\.\d{4} \| [\d,]+ img/s \| 0 s left", last)


def test_each_flag_of_the_training_matters():
    def weights(**flags):
        average, _ = week.train(*small(**{"steps": 7, **flags}))
        return torch.cat([w.detach().flatten() for w in average.parameters()])

    base = weights()
    assert torch.equal(base, weights())
    for flags in (dict(seed=3), dict(lr=0.01), dict(batch=5), dict(steps=8)) + tuple(dict(ablate=i) for i in IDEAS[1:]):
        assert not torch.equal(base, weights(**flags)), flags


def test_noise_of_every_level_is_new_in_each_step():
    model, x, *rest = small(steps=40, batch=50)
    seen = []
    model.register_forward_pre_hook(lambda module, given: seen.append(given) if module.training else None)
    week.train(model, x * 0, *rest)
    y, sigma = (torch.cat(parts) for parts in zip(*seen))
    assert len(sigma) == 2000 and sigma.min() >= 0.05 and sigma.max() <= 1
    shares = [(sigma < edge).float().mean().item() for edge in (0.05 * 20**0.25, 0.05 * 20**0.5, 0.05 * 20**0.75)]
    assert shares == pytest.approx([0.25, 0.5, 0.75], abs=0.04), "log-uniform"
    assert (y.flatten(1).std(1) / sigma).mean().item() == pytest.approx(1, abs=0.02)
    assert len({image.sum().item() for image in y}) == len(y)


def test_the_loss_is_divided_by_the_level(capsys):
    model, x, *rest = small(steps=1, batch=4000)
    with torch.no_grad():
        model.std.fill_(1e6)  # then the untrained network gives y itself: its squared error is sigma^2 n^2
    week.train(model, x, *rest)
    loss = float(re.search(r"loss (\S+)", capsys.readouterr().out)[1])
    assert loss == pytest.approx(0.95 / math.log(20), rel=0.05), "the mean of sigma, log-uniform"


def test_the_learning_rate_rises_then_falls(monkeypatch):
    seen, right = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(self.param_groups[0]["lr"]) or right(self))
    week.train(*small(steps=100, lr=0.01))
    assert seen[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.0096], rel=1e-6) or seen[4] == pytest.approx(0.0096)
    assert max(seen) < 0.01 and seen[50] == pytest.approx(0.005) and seen[-1] == pytest.approx(0.0001)


def test_the_average_lags_behind_the_model():
    model, *rest = small(steps=60)
    start = [w.detach().clone() for w in model.parameters()]
    average, _ = week.train(model, *rest)
    far = lambda m: sum((w - s).norm().item() for w, s in zip(m.parameters(), start))  # noqa: E731
    assert 0.3 * far(model) < far(average) < far(model)


def test_a_loss_that_is_not_finite_stops_the_run():
    model, *rest = small(steps=20)
    with torch.no_grad():
        model.enter.weight[0] = math.nan
    with pytest.raises(SystemExit) as stop:
        week.train(model, *rest)
    assert "step 20" in stop.value.code and "--lr" in stop.value.code


# ------------------------------------------------------------------------------------------------ measuring


def test_denoise_goes_through_all_images_and_clips():
    model, y = unet().float(), torch.rand(503, 1, 8, 8) * 3 - 1
    with torch.no_grad():
        sigma = torch.full((3,), 0.4)
        last = model(y[500:], sigma).clamp(0, 1)
    out = week.denoise(model, y, 0.4)
    near(out[500:], last, 1e-5)
    assert len(out) == 503 and out.min() >= 0 and out.max() <= 1 and not out.requires_grad


def test_the_table_holds_each_method_at_each_level(capsys):
    x = torch.rand(40, 1, 8, 8)
    models = {"unet": unet().float(), "no_skips": unet(ablate="skips").float()}
    linear = week.wiener(x)
    table = week.evaluate(models, x, linear)
    assert list(table["sigma"]) == [0.05, 0.1, 0.25, 0.5, 1.0] and all(len(row) == 5 for row in table.values())
    y = week.noisy(x, 0.5)
    swapped = week.denoise(models["unet"], y, 0.5, swap=True)
    expected = {
        "noisy": y,
        "median": week.median(y),
        "wiener": linear(y, 0.5),
        "unet": week.denoise(models["unet"], y, 0.5),
        "no_skips": week.denoise(models["no_skips"], y, 0.5),
        "swap_to_skip": swapped,
    }
    for name, guess in expected.items():
        assert table[name][3] == pytest.approx(week.psnr(guess, x)), name
    assert table["swap_to_deep"][3] == pytest.approx(week.psnr(swapped, x.roll(-1, 0)))
    best = max(week.psnr(week.blur(y, s / 100), x) for s in range(30, 201))
    assert best - 0.05 <= table["blur"][3] <= best + 1e-6
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(expected) + 2


def test_ridge_finds_a_linear_map():
    a, test_a = torch.randn(300, 5, dtype=f64), torch.randn(7, 5, dtype=f64)
    W, c = torch.randn(5, 3, dtype=f64), torch.randn(3, dtype=f64)
    near(week.ridge(a, a @ W + c, test_a), test_a @ W + c, 0.02)


def test_the_probes_read_what_is_there():
    """Dark and bright images: their mean tells the label, and a pixel tells itself."""
    labels = torch.arange(400) % 2
    x = labels.view(-1, 1, 1, 1) + torch.rand(400, 1, 8, 8)
    read = week.probe(unet().float(), x, labels, x[1:101], labels[1:101], sigma=0.01)
    assert list(read) == ["pixels", "skip", "bottleneck", "decoder"]
    assert read["pixels"] == pytest.approx((1, 1), abs=0.01)
    noise = torch.rand(400, 1, 8, 8)
    read = week.probe(unet().float(), noise, labels[torch.randperm(400)], noise[:100], labels[:100], sigma=5.0)
    assert all(0.3 < label < 0.7 and pixels < 0.3 for label, pixels in read.values())


# ------------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in this process that is a little longer than --tiny: (figures, folder)."""
    out = tmp_path_factory.mktemp("week06")
    return call(week, "--tiny", "--out", out, "--steps", 250, "--width", 12, "--ablate", "skips"), out


def test_the_whole_denoises(trained):
    figures, out = trained
    found = json.loads((out / "metrics.json").read_text())
    keys = {"psnr", "train_seconds", "parameters"}
    keys |= {f"psnr_{name}" for name in ("noisy", "wiener", "no_skips", "blur", "median")}
    assert keys <= found.keys() and all(found[key] == figures[key] for key in keys)
    assert figures["psnr_noisy"] < figures["psnr_median"] < figures["psnr_blur"] < figures["psnr_wiener"]
    assert figures["psnr"] > figures["psnr_blur"] + 1
    assert figures["psnr"] == found["table"]["unet"][3] and figures["psnr_no_skips"] == found["table"]["no_skips"][3]
    assert all(ours > theirs for ours, theirs in zip(found["table"]["unet"], found["table"]["noisy"]))


def test_denoised_holds_the_first_test_images(trained):
    out = trained[1]
    tensors = week.safetensors.torch.load_file(out / "denoised.safetensors")
    assert set(tensors) == {"clean", "noisy", "denoised"}
    _, test, _, _, _ = week.load_images(week.Config(tiny=True))
    for name, tensor in tensors.items():
        assert tensor.shape == (500, 1, 16, 16) and tensor.dtype == torch.float32, name
    near(tensors["clean"], test[:1000])
    assert (tensors["noisy"] - tensors["clean"]).std().item() == pytest.approx(0.5, rel=0.01)
    assert tensors["denoised"].min() >= 0 and tensors["denoised"].max() <= 1
    assert week.psnr(tensors["denoised"], tensors["clean"]) == pytest.approx(trained[0]["psnr"], abs=1e-3)


def test_the_weights_that_are_saved_are_those_that_were_tested(trained):
    figures, out = trained
    saved = week.safetensors.torch.load_file(out / "unet.safetensors")
    model = week.MiniUNet(12, 2, 0, 1)
    model.load_state_dict(saved)
    tensors = week.safetensors.torch.load_file(out / "denoised.safetensors")
    near(week.denoise(model.eval(), tensors["noisy"], 0.5), tensors["denoised"], 1e-4)
    assert sum(w.numel() for w in model.parameters()) == figures["parameters"]


def test_signals_and_other_sizes_run_too(tmp_path):
    for k, flags in enumerate((["--signal"], ["--size", 4], ["--size", 20], ["--signal", "--size", 4])):
        figures = call(week, "--tiny", "--steps", 40, "--out", tmp_path / str(k), *flags)
        assert figures["psnr"] > figures["psnr_noisy"]
        shape = week.safetensors.torch.load_file(tmp_path / str(k) / "denoised.safetensors")["clean"].shape
        size = flags[-1] if "--size" in flags else 16
        assert shape == ((500, 1, size**2) if "--signal" in flags else (500, 1, size, size))


def test_the_seed_matters(tmp_path):
    psnr = {call(week, "--tiny", "--out", tmp_path, "--steps", 2, "--seed", seed)["psnr"] for seed in (2, 3)}
    assert len(psnr) == 2


def test_sizes_that_do_not_fit_are_refused(tmp_path, refused):
    for flags in (["--size", 18], ["--size", 0], ["--size", 68], ["--width", 10], ["--lr", "inf"], ["--steps", 0]):
        refused(call, week, "--tiny", "--out", tmp_path, *flags, names=[f"{flags[0]} {flags[1]}", "must be from"])
    assert "multiple of 4" in refused(call, week, "--tiny", "--out", tmp_path, "--size", 18)


def test_the_picture_shows_noisy_above_clean(trained):
    with Image.open(trained[1] / "unet.png") as image:
        assert image.size == (1240, 420)
        pixels = np.asarray(image.convert("L")).astype(float) / 255
    _, test, _, _, _ = week.load_images(week.Config(tiny=True))
    tile = lambda row, column: pixels[70 + 68 * row :, 130 + 68 * column :][:64, :64][2::4, 2::4]  # noqa: E731
    for column in range(10):
        clean = test[column, 0].numpy()
        assert np.abs(tile(3, column) - clean).max() < 0.01, "the fourth row is the clean image"
    noise = [np.abs(tile(0, column) - tile(3, column)).mean() for column in range(0, 10, 2)]
    assert noise == sorted(noise) and noise[-1] > 0.3
    errors = [[np.square(tile(row, column) - tile(3, column)).mean() for column in range(6, 10)] for row in (0, 2)]
    assert np.mean(errors[1]) < np.mean(errors[0]) / 2, "the third row is denoised"


def test_the_checks_at_the_start_are_these(capsys):
    week.run_checks()
    shown = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [verdict for verdict, *_ in shown] == ["ok"] * 5
    claims = " ".join(claim for _, claim, *_ in shown)
    for word in ("F.group_norm", "least squares", "PSNR", "untrained", "half and quarter"):
        assert word in claims


@pytest.mark.parametrize(
    "where, name, broken",
    [
        (week, "group_norm", lambda x, groups, w, b: F.group_norm(x, 1, w, b)),
        (week, "group_norm", lambda x, groups, w, b: F.group_norm(x, groups, w, b, eps=1e-2)),
        (week, "psnr", lambda x, clean: -10 * (x - clean).square().mean().log10().item()),
        (week, "psnr", lambda x, clean: -20 * (x.clamp(0, 1) - clean).square().mean().log10().item()),
        (week, "wiener", lambda x, right=week.wiener: lambda y, sigma: right(x)(y, sigma**2)),
        (week, "wiener", lambda x: lambda y, sigma: y / (1 + sigma**2)),
        (week.MiniUNet, "forward", lambda self, y, sigma: y),
        (week.MiniUNet, "features", lambda *given, right=week.MiniUNet.features: right(*given)[:1] * 3),
    ],
    ids=["groups", "eps", "clip", "decibel", "variance", "frame", "residual", "shapes"],
)
def test_the_checks_at_the_start_catch_broken_maths(where, name, broken, monkeypatch):
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(SystemExit) as stop:
        week.run_checks()
    assert stop.value.code == 1
