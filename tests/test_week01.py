"""Week 1: every hand-written part against torch, in float64 and with a prime number of everything."""

import copy
import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import week01_mlp as week
from conftest import call
from PIL import Image, ImageOps
from torch import nn

N, I, H, O = 7, 5, 11, 3
f64 = torch.float64


def near(a, b, tol=1e-12):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol


def values_and_gradients(function, *inputs):
    """The output, and the gradients of a weighted sum of it; all weights differ, so that no swap can hide."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    y = function(*leaves)
    weights = torch.arange(1, y.numel() + 1, dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((weights * y).sum(), [x for x in leaves if x.requires_grad])]


def agree(ours, theirs, *inputs, tol=1e-12):
    for a, b in zip(values_and_gradients(ours, *inputs), values_and_gradients(theirs, *inputs), strict=True):
        near(a, b, tol)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------- autograd


def test_linear_is_torch_s():
    agree(
        week.linear, F.linear, torch.randn(N, I, dtype=f64), torch.randn(O, I, dtype=f64), torch.randn(O, dtype=f64)
    )


def test_linear_leaves_out_the_gradient_that_nobody_asks_for():
    x, w = torch.randn(N, I), torch.randn(O, I)
    for asked in (False, True):
        context = SimpleNamespace(saved_tensors=(x, w), needs_input_grad=(asked, True, True))
        grad_x, grad_w, _ = week.LinearFunction.backward(context, torch.ones(N, O))
        assert (grad_x is not None) == asked
        near(grad_w, x.sum(0).expand(O, I), 1e-5)


def test_relu_is_torch_s():
    x = torch.randn(N, I, dtype=f64)
    x[2, 3] = 0
    agree(week.relu, F.relu, x)


def test_cross_entropy_is_torch_s():
    agree(week.cross_entropy, F.cross_entropy, 3 * torch.randn(N, O, dtype=f64), torch.arange(N) % O)


def test_cross_entropy_does_not_overflow():
    z = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 5.0, 1e4]], requires_grad=True)
    loss = week.cross_entropy(z, torch.tensor([0, 1]))
    loss.backward()
    near(loss.detach(), F.cross_entropy(z.detach(), torch.tensor([0, 1])), 1e-2)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(
    "function, shapes",
    [
        (week.linear, [(N, I), (O, I), (O,)]),
        (week.relu, [(N, I)]),
        (lambda z: week.cross_entropy(z, torch.arange(N) % O), [(N, O)]),
    ],
    ids=["linear", "relu", "cross_entropy"],
)
def test_gradients_are_finite_differences(function, shapes):
    assert torch.autograd.gradcheck(function, [torch.randn(shape, dtype=f64, requires_grad=True) for shape in shapes])


# -------------------------------------------------------------------------------------------------- modules


def test_linear_starts_as_he_says():
    layer = week.Linear(1009, 211)
    assert layer.weight.shape == (211, 1009)
    assert layer.weight.var().item() == pytest.approx(2 / 1009, rel=0.02)  # Xavier: 2 / 1220; torch: 1 / 3027
    assert abs(layer.weight.mean()) < 1e-3
    assert layer.bias.shape == (211,) and not layer.bias.any()


def test_he_keeps_the_signal_through_twenty_layers():
    x = torch.randn(101, 499)
    for _ in range(20):
        x = week.relu(week.Linear(499, 499)(x))
    assert 0.3 < 2 * x.square().mean() / 2 < 3


def test_linear_under_autocast_multiplies_in_bfloat16_and_keeps_float32_weights():
    layer, x = week.Linear(I, O), torch.randn(N, I)
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = layer(x), F.linear(x, layer.weight, layer.bias)
    assert y.dtype == torch.bfloat16
    near(y, reference, 0.05)
    y.float().sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32
    near(layer.weight.grad, x.sum(0).expand(O, I), 0.05)


def twins(sizes=(I, H, 13, O)):
    """An MLP, and the same network made of torch's modules with the same weights."""
    ours = week.MLP(sizes).double()
    nn.init.normal_(ours.layers[-1].weight)
    layers = [nn.Linear(a, b).double() for a, b in zip(sizes, sizes[1:])]
    theirs = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))
    return ours, theirs


def test_mlp_is_torch_s():
    ours, theirs = twins()
    x, y = torch.randn(N, I, dtype=f64), torch.arange(N) % O
    near(ours(x), theirs(x))
    week.cross_entropy(ours(x), y).backward()
    F.cross_entropy(theirs(x), y).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        near(a.grad, b.grad)


def test_mlp_flattens_and_begins_uniform():
    model = week.MLP((6, H, O))
    images = torch.rand(N, 2, 3)
    assert torch.equal(model(images), model(images.view(N, 6)))
    assert week.cross_entropy(model(images), torch.arange(N) % O).item() == pytest.approx(math.log(O), abs=1e-6)


def test_without_relu_an_mlp_is_linear():
    model = week.MLP((I, H, O), nn.Identity()).double()
    nn.init.normal_(model.layers[-1].weight)
    a, b = torch.randn(2, N, I, dtype=f64)
    near(model((a + b) / 2), (model(a) + model(b)) / 2)


# ----------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize(
    "name, options",
    [
        ("SGD", dict(lr=0.1)),
        ("SGD", dict(lr=0.1, momentum=0.0)),
        ("SGD", dict(lr=0.05, momentum=0.8, weight_decay=0.1)),
        ("AdamW", dict(lr=0.01)),
        ("AdamW", dict(lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)),
    ],
)
def test_optimizer_is_torch_s_for_twenty_steps(name, options):
    ours, theirs = twins()
    reference = {"momentum": 0.9} if name == "SGD" else {"betas": (0.9, 0.99)}  # our defaults
    a = getattr(week, name)(ours.parameters(), **options)
    b = getattr(torch.optim, name)(theirs.parameters(), **{**reference, **options})
    for step in range(20):
        x = torch.randn(N, I, dtype=f64)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            near(p.detach(), q.detach(), 1e-11)


@pytest.mark.parametrize("optimizer", [week.SGD, week.AdamW])
def test_optimizer_obeys_groups_and_spares_what_has_no_gradient(optimizer):
    a, b, c = (nn.Parameter(torch.ones(I)) for _ in range(3))
    groups = optimizer([{"params": [a, c]}, {"params": [b], "lr": 0.0}], lr=0.1, weight_decay=0.5)
    (a.sum() + b.sum()).backward()
    groups.step()
    assert (a < 1).all() and (b == 1).all() and (c == 1).all()


@pytest.mark.parametrize("optimizer", [week.SGD, week.AdamW])
def test_optimizer_goes_on_from_its_saved_state(optimizer):
    def steps(w, opt, count):
        for _ in range(count):
            opt.zero_grad()
            (w - 3).square().sum().backward()
            opt.step()

    whole = nn.Parameter(torch.zeros(I, dtype=f64))
    first = optimizer([whole], lr=0.01)
    steps(whole, first, 3)
    half = nn.Parameter(whole.detach().clone())
    second = optimizer([half], lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(whole, first, 4)
    steps(half, second, 4)
    assert torch.equal(whole, half)


def test_decay_is_decoupled():
    w = nn.Parameter(torch.full((I,), 2.0))
    opt = week.AdamW([w], lr=0.1, weight_decay=0.3)
    w.grad = torch.zeros(I)
    opt.step()
    near(w.detach(), torch.full((I,), 2.0 * (1 - 0.03)), 1e-6)


def test_learning_rate_is_torch_s_cosine_after_a_linear_warmup():
    steps, peak = 50, 0.7
    ours = [week.learning_rate(step / steps, peak, 0.2) for step in range(1, steps + 1)]
    assert ours[:10] == pytest.approx([peak * k / 10 for k in range(1, 11)])
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=40)
    for rate in ours[10:]:
        opt.step()
        cosine.step()
        assert rate == pytest.approx(cosine.get_last_lr()[0], abs=1e-9)
    assert ours[-1] == pytest.approx(0, abs=1e-9)


# ----------------------------------------------------------------------------------------------------- data


def test_warp_of_strength_zero_changes_nothing():
    images = torch.rand(N, 1, 28, 28)
    near(week.warp(images, 0, 0, 0), images, 1e-5)


def test_warp_is_torch_s_affine_grid_plus_smoothed_noise():
    images = torch.rand(N, 1, 28, 28)
    torch.manual_seed(3)
    ours = week.warp(images, affine=0.3, shift=0.2, elastic=0.1)
    torch.manual_seed(3)
    c = torch.randn(N, 2, 28)
    theta = torch.eye(2, 3) + torch.cat([0.3 * c[:, :, :2], 0.2 * c[:, :, 2:3]], 2)
    bend = F.interpolate(0.1 * c[:, :, 3:].view(N, 2, 5, 5), (28, 28), mode="bicubic")
    grid = F.affine_grid(theta, (N, 1, 28, 28), align_corners=False) + bend.permute(0, 2, 3, 1)
    near(ours, F.grid_sample(images, grid, align_corners=False), 1e-5)
    assert not torch.allclose(week.warp(images[:1].expand(2, 1, 28, 28), 0.1, 0, 0)[0], ours[0])


def test_warp_gives_each_image_a_map_of_its_own():
    same = torch.rand(1, 1, 28, 28).expand(N, 1, 28, 28)
    for strength in ((0.1, 0, 0), (0, 0.1, 0), (0, 0, 0.1)):
        out = week.warp(same, *strength)
        assert len({image.numpy().tobytes() for image in out}) == N


def test_drawn_digits_are_the_same_for_every_seed_and_too_hard_for_a_linear_model():
    torch.manual_seed(99)
    images, labels = week.drawn_digits(3000)
    torch.manual_seed(7)
    again, labels_again = week.drawn_digits(3000)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert images.shape == (3000, 28, 28) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.bincount(minlength=10).min() > 200
    x = F.pad(images.flatten(1).double() / 255, (0, 1), value=1.0)
    train, test = x[:2500], x[2500:]
    w = torch.linalg.solve(
        train.T @ train + torch.eye(785, dtype=f64), train.T @ F.one_hot(labels[:2500], 10).double()
    )
    assert 0.4 < ((test @ w).argmax(1) == labels[2500:]).double().mean() < 0.75


def test_drawn_digits_show_their_labels():
    images, labels = week.drawn_digits(2000)
    means = torch.stack([images[labels == digit].float().mean(0) for digit in range(10)])
    for digit in range(10):  # the average of many is like the plain glyph, whatever the warps
        glyph = Image.new("L", (28, 28))
        week.ImageDraw.Draw(glyph).text((14, 14), str(digit), 255, week.ImageFont.load_default(20), "mm")
        glyph = torch.from_numpy(np.array(glyph)).float()
        alike = [torch.corrcoef(torch.stack([glyph.flatten(), mean.flatten()]))[0, 1] for mean in means]
        assert int(torch.tensor(alike).argmax()) == digit


def write_mnist(folder, n=13, n_test=11):
    """A small data set in the format and the folders of MNIST."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = []
    for part, count in (("train", n), ("t10k", n_test)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.randint(10, (count,))
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(labels.tolist()))
        arrays += [images, labels]
    return arrays


def test_mnist_is_read_as_it_was_written(tmp_path):
    written = write_mnist(tmp_path)
    *read, name = week.load_mnist(str(tmp_path), tiny=True)
    assert name == "MNIST"
    for a, b in zip(written, read, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize(
    "file, keep",
    [
        ("train-images-idx3-ubyte", 0.5),
        ("t10k-labels-idx1-ubyte", 0),
        ("train-labels-idx1-ubyte", None),
        ("train-images-idx3-ubyte", "another kind of file"),
    ],
)
def test_broken_mnist_is_refused(tmp_path, refused, file, keep):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    if keep is None:
        path.unlink()
    elif isinstance(keep, str):
        path.write_bytes(struct.pack(">I", 0x0F09) + path.read_bytes()[4:])  # torchvision's error has no words
    else:
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    err = refused(week.load_mnist, str(tmp_path), True, names=["--data", str(tmp_path), "is broken ("])
    assert "broken ()" not in err, "and why"


class Mirror:
    """Stands in for torchvision's MNIST: reads as the real one does, but downloads from nowhere."""

    error = timeout = None

    def __new__(cls, folder, train=True, download=False, real=week.datasets.MNIST):
        assert not download or cls.timeout <= 5, "a network that answers nothing would hang"
        if download and cls.error:
            raise cls.error
        if download:
            write_mnist(Path(folder))
        return real(folder, train=train)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(week.datasets, "MNIST", Mirror)
    monkeypatch.setattr(Mirror, "timeout", None)
    monkeypatch.setattr(week.socket, "setdefaulttimeout", lambda seconds: setattr(Mirror, "timeout", seconds))
    draw = week.drawn_digits
    monkeypatch.setattr(week, "drawn_digits", lambda n: draw(n // 1000))
    return tmp_path


def test_mnist_is_downloaded_whole(offline, monkeypatch):
    monkeypatch.setattr(Mirror, "error", None)
    assert week.load_mnist(str(offline), tiny=False)[-1] == "MNIST"
    assert [path.name for path in offline.iterdir()] == ["MNIST"]
    assert len(list((offline / "MNIST" / "raw").iterdir())) == 4


@pytest.mark.parametrize(
    "error", [OSError("unreachable"), TimeoutError("timed out"), RuntimeError("Error downloading x:\nno route")]
)
def test_no_network_means_drawn_digits_and_one_line_that_says_so(offline, monkeypatch, capsys, error):
    monkeypatch.setattr(Mirror, "error", error)
    *tensors, name = week.load_mnist(str(offline), tiny=False)
    assert name == "drawn digits" and [len(t) for t in tensors] == [60, 60, 10, 10]
    (line,) = capsys.readouterr().out.splitlines()
    assert "MNIST" in line and str(error).splitlines()[-1] in line and "Pillow" in line
    assert not list(offline.iterdir())


def test_other_errors_are_not_swallowed(offline, monkeypatch):
    monkeypatch.setattr(Mirror, "error", KeyError("a bug"))
    with pytest.raises(KeyError):
        week.load_mnist(str(offline), tiny=False)


# ------------------------------------------------------------------------------------------------- training


def small(**flags):
    """Arguments for train(): a small network, 200 drawn digits, no autocast."""
    images, labels = week.drawn_digits(260)
    cfg = week.Config(**{**dict(epochs=2, batch=50), **flags})
    torch.manual_seed(cfg.seed)
    return (
        week.MLP((784, 31, 10)),
        images[:200],
        labels[:200],
        images[200:],
        labels[200:],
        cfg,
        torch.autocast("cpu", torch.bfloat16, enabled=False),
    )


def test_the_kept_model_is_the_running_average(capsys):
    model, *rest = small(epochs=1, batch=200)
    _, answers, average = week.train(model, *rest)
    for a, w in zip(average.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, w)  # after one step the average of all weights so far is that one
    assert torch.equal(answers, average(rest[2] / 255).argmax(1))
    model, *rest = small(epochs=3)
    seen, step = [], week.AdamW.step

    def spy(self):
        step(self)
        seen.append([w.detach().clone() for w in self.param_groups[0]["params"]])

    week.AdamW.step = spy
    try:
        _, _, average = week.train(model, *rest)
    finally:
        week.AdamW.step = step
    mean = seen[0]
    for k, weights in enumerate(seen[1:], 2):
        mean = [m + (w - m) * max(0.02, 8 / (7 + k)) for m, w in zip(mean, weights)]
    for a, m in zip(average.parameters(), mean, strict=True):
        near(a.detach(), m, 1e-6)


def test_training_lowers_the_loss_and_learns():
    model, images, labels, *rest = small(epochs=60, ablate="distortion", decay=0.0)
    log, _, average = week.train(model, images, labels, *rest)
    assert len(log) == 60
    assert [seconds for seconds, _ in log] == sorted(seconds for seconds, _ in log)
    assert (average(images / 255).argmax(1) == labels).float().mean() > 0.95
    assert all(0 <= accuracy <= 1 for _, accuracy in log)


def test_the_test_digits_have_no_influence_on_training():
    weights = []
    for lie in (False, True):
        model, images, labels, test_images, test_labels, cfg, autocast = small()
        if lie:
            test_images, test_labels = 255 - test_images, (test_labels + 1) % 10
        week.train(model, images, labels, test_images, test_labels, cfg, autocast)
        weights.append([w.detach().clone() for w in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_each_flag_of_the_training_matters():
    def weights(**flags):
        model, *rest = small(**flags)
        week.train(model, *rest)
        return torch.cat([w.detach().flatten() for w in model.parameters()])

    base = weights()
    assert torch.equal(base, weights())
    for flags in (
        dict(seed=3),
        dict(lr=1e-3),
        dict(decay=0.0),
        dict(batch=40),
        dict(epochs=3),
        dict(optimizer="sgd"),
        dict(ablate="distortion"),
    ):
        assert not torch.equal(base, weights(**flags)), flags


def test_every_training_digit_is_seen_once_an_epoch(monkeypatch):
    model, images, *rest = small(epochs=2, batch=60)
    seen = []
    monkeypatch.setattr(week, "warp", lambda x, **strength: seen.append(x.sum((1, 2, 3))) or x)
    week.train(model, images, *rest)
    assert [len(part) for part in seen] == [60, 60, 60, 20] * 2
    brightness = (images / 255).sum((1, 2)).sort().values
    for epoch in (seen[:4], seen[4:]):
        near(torch.cat(epoch).sort().values, brightness, 1e-3)
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))


def test_a_loss_that_is_not_finite_stops_the_run():
    model, *rest = small(optimizer="sgd", lr=1e30)
    with pytest.raises(SystemExit) as stop:
        week.train(model, *rest)
        assert "step" in stop.value.code and "try a lower --lr" in stop.value.code


def test_bfloat16_learns_as_well(monkeypatch):
    *arguments, _ = small(epochs=60, ablate="distortion", decay=0.0)
    week.train(*arguments, torch.autocast("cpu", torch.bfloat16))
    model, images, labels = arguments[:3]
    assert all(w.dtype == torch.float32 for w in model.parameters())
    assert (model(images / 255).argmax(1) == labels).float().mean() > 0.9


# ------------------------------------------------------------------------------------- the whole, and its use


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished --tiny run in this process: (figures, folder)."""
    out = tmp_path_factory.mktemp("week01")
    return call(week, "--tiny", "--out", out), out


def test_the_whole_beats_its_baseline(trained):
    figures, out = trained
    assert figures["test_accuracy"] > figures["baseline_accuracy"] + 0.15
    assert 0.3 < figures["baseline_accuracy"] < 0.7
    found = json.loads((out / "metrics.json").read_text())
    assert {"test_accuracy", "train_seconds", "seconds_to_98", "baseline_accuracy"} <= found.keys()
    assert found["data"] == "drawn digits" and found["seconds_to_98"] is None


def test_the_seed_matters_and_what_is_saved_is_what_was_tested(trained, tmp_path, monkeypatch):
    kept, train = [], week.train
    monkeypatch.setattr(week, "train", lambda *args: kept.append(train(*args)) or kept[-1])
    figures = call(week, "--tiny", "--out", tmp_path, "--seed", 2, "--epochs", 1)
    other = call(week, "--tiny", "--out", tmp_path, "--seed", 3, "--epochs", 1)
    assert figures["test_accuracy"] != other["test_accuracy"]
    saved = week.safetensors.torch.load_file(tmp_path / "mlp.safetensors")
    for name, weight in kept[-1][2].state_dict().items():
        assert torch.equal(saved[name], weight)


def test_what_the_ideas_are_worth(trained, tmp_path):
    full = trained[0]["test_accuracy"]
    assert full > call(week, "--tiny", "--out", tmp_path / "a", "--ablate", "relu")["test_accuracy"] + 0.05
    assert full > call(week, "--tiny", "--out", tmp_path / "b", "--ablate", "distortion")["test_accuracy"] + 0.02


def test_seconds_to_98_is_the_first_time_at_98(tmp_path, monkeypatch):
    log = [(1.5, 0.91), (2.5, 0.981), (3.5, 0.979), (4.5, 0.985)]
    monkeypatch.setattr(
        week, "train", lambda model, images, labels, tests, answers, cfg, autocast: (log, answers, model)
    )
    figures = call(week, "--tiny", "--out", tmp_path)
    assert (figures["seconds_to_98"], figures["train_seconds"], figures["test_accuracy"]) == (2.5, 4.5, 0.985)


def probabilities(capsys, out, what):
    capsys.readouterr()
    call(week, "--tiny", "--out", out, "--predict", what)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[-11:-1]]
    assert [row[0] for row in table] == [str(digit) for digit in range(10)]
    p = [float(row[1].rstrip("%")) / 100 for row in table]
    assert sum(p) == pytest.approx(1, abs=1e-3)
    result = dict(word.split("=") for word in lines[-1].split()[1:])
    assert int(result["digit"]) == p.index(max(p)) and float(result["probability"]) == pytest.approx(max(p), abs=1e-3)
    return p


def test_predict_reads_test_digits_as_training_did(trained, capsys):
    figures, out = trained
    labels = week.load_mnist("data", True)[3]
    right = [labels[k] == torch.tensor(probabilities(capsys, out, k)).argmax() for k in range(12)]
    assert sum(right) >= 7
    assert (
        json.loads((out / "metrics.json").read_text())["test_accuracy"] == figures["test_accuracy"]
    ), "not overwritten"


def test_predict_reads_pictures_of_any_size_white_on_black_or_black_on_white(trained, capsys, tmp_path):
    model = week.MLP((784, 128, 128, 10))
    model.load_state_dict(week.safetensors.torch.load_file(trained[1] / "mlp.safetensors"))
    agreed = 0
    for digit in range(10):
        ink = Image.new("L", (200, 300))
        week.ImageDraw.Draw(ink).text(
            (60, 180), str(digit), 255, week.ImageFont.load_default(150), "mm", stroke_width=5
        )
        ink.save(tmp_path / "white.png")
        ImageOps.invert(ink).convert("RGB").save(tmp_path / "black.png")
        a = probabilities(capsys, trained[1], tmp_path / "white.png")
        assert a == pytest.approx(probabilities(capsys, trained[1], tmp_path / "black.png"), abs=0.02)
        agreed += a.index(max(a)) == digit
    assert agreed >= 7


def test_predict_refuses_what_is_not_there(trained, tmp_path, refused):
    (tmp_path / "text.png").write_text("not a picture")
    for what in ("500", "no/such.png", tmp_path / "text.png"):
        refused(call, week, "--tiny", "--out", trained[1], "--predict", what, names=["--predict", str(what)])
    refused(call, week, "--tiny", "--out", tmp_path / "new", "--predict", "3", names=["--predict 3"])
    refused(
        call,
        week,
        "--tiny",
        "--out",
        trained[1],
        "--width",
        32,
        "--predict",
        "3",
        names=["--predict 3", "layers.0.weight"],
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / ".week01_mlp").touch()
    (tmp_path / "broken" / "mlp.safetensors").write_bytes((trained[1] / "mlp.safetensors").read_bytes()[:1000])
    refused(call, week, "--tiny", "--out", tmp_path / "broken", "--predict", "3", names=["--predict 3"])


def test_the_picture_shows_each_mistake(trained):
    images, labels = week.drawn_digits(100)
    answers = labels.clone()
    log = [(1.0, 0.9), (2.0, 0.95), (3.0, 0.97)]
    model = week.MLP((784, 101, 10))
    clean = np.asarray(week.draw(model, log, images, labels, answers))
    answers[:3] += 1
    wrong = np.asarray(week.draw(model, log, images, labels, answers % 10))
    assert wrong.shape == clean.shape == (660, 1240, 3)
    changed = np.argwhere((clean != wrong).any(2))
    assert changed[:, 1].max() < 700, "only the left half may change"
    assert np.array_equal(wrong[50:104, 20:74, 0], np.asarray(Image.fromarray(images[0].numpy()).resize((54, 54))))
    assert (wrong[280:, 740:] == [0, 0, 128]).all(2).sum() > 300, "the curve"


# ------------------------------------------------------------------------------------------------- plumbing


@pytest.mark.parametrize(
    "ours, reference",
    [
        ([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.1])]),
        ([torch.tensor(math.nan)], [torch.tensor(0.0)]),
        ([torch.zeros(3), torch.tensor([0.0, math.nan])], [torch.zeros(3), torch.zeros(2)]),
        ([1.0], [math.inf]),
    ],
)
def test_check_fails_loudly(ours, reference, capsys):
    with pytest.raises(SystemExit) as stop:
        week.check("a claim", ours, reference, 0.05)
    assert stop.value.code == 1 and capsys.readouterr().out.startswith("FAIL")


def test_check_compares_all_that_it_is_given():
    week.check("a claim", [torch.zeros(3), 1.0], [torch.full((3,), 0.04), 1.04], 0.05)
    with pytest.raises(ValueError):
        week.check("a claim", [torch.zeros(3)], [torch.zeros(3), torch.zeros(3)], 1)


def without_max(ctx, logits, targets):
    p = logits.exp() / logits.exp().sum()
    ctx.save_for_backward(p.log(), targets)
    return -p.log().gather(1, targets[:, None]).mean()


@pytest.mark.parametrize(
    "where, name, broken",
    [
        (
            week.LinearFunction,
            "backward",
            staticmethod(lambda ctx, g: (g @ ctx.saved_tensors[1], -g.T @ ctx.saved_tensors[0], g.sum(0))),
        ),
        (
            week.LinearFunction,
            "forward",
            staticmethod(lambda ctx, x, w, b: ctx.save_for_backward(x, w) or x @ w.T - b),
        ),
        (week.ReLUFunction, "backward", staticmethod(lambda ctx, g: g)),
        (week.CrossEntropyFunction, "forward", staticmethod(without_max)),
        (week.CrossEntropyFunction, "backward", staticmethod(lambda ctx, g: (ctx.saved_tensors[0].exp() * g, None))),
        (
            week.SGD,
            "step",
            torch.no_grad()(lambda self: [w.sub_(w.grad, alpha=0.1) for w in self.param_groups[0]["params"]]),
        ),
        (
            week.AdamW,
            "step",
            torch.no_grad()(lambda self: [w.sub_(w.grad.sign(), alpha=0.01) for w in self.param_groups[0]["params"]]),
        ),
        (week.nn.init, "zeros_", nn.init.normal_),
    ],
    ids=["dW", "bias", "relu", "softmax", "p - y", "sgd", "adamw", "zero head"],
)
def test_the_checks_at_the_start_catch_broken_maths(where, name, broken, monkeypatch):
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(SystemExit) as stop:
        week.run_checks()
    assert stop.value.code == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path, refused):
    week.save(tmp_path, "a.json", lambda part: part.write_text("old"))

    def full_disk(part):
        part.write_text("half of the n")
        raise OSError(28, "No space left on device")

    def interrupted(part):
        part.write_text("half of the n")
        raise KeyboardInterrupt

    refused(week.save, tmp_path, "a.json", full_disk, names=["--out", "a.json", "No space left"])
    with pytest.raises(KeyboardInterrupt):
        week.save(tmp_path, "a.json", interrupted)
    assert (tmp_path / "a.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".week01_mlp", "a.json"]


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    assert week.pick_device("cpu").type == "cpu"
    assert week.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    assert week.pick_device("auto").type == "cuda"
