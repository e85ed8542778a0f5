"""Week 8: angles, guidance, the sampler, the planner and its shelf of experts; no network."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
import week05_ddpm_forward as week5
import week08_noisy_router as week
from conftest import ROOT, call
from PIL import Image
from torch import nn

f64 = torch.float64
N = 7
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def dice():
    torch.manual_seed(0)


def near(a, b, tol=1e-12):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol


def random_angles(n=N):
    return (torch.rand(n, 1, 1, 1, dtype=f64) * 0.98 + 0.01) * math.pi / 2


# ------------------------------------------------------------------------------------------------- angles


def test_angles_are_week_5_s_schedule():
    """mix and unmix against week 5's closed forms, with alpha_bar = cos(phi)^2."""
    x0, eps = torch.randn(2, N, 1, 28, 28, dtype=f64)
    phi = random_angles()
    other = week5.Schedule("cosine", N)
    other.alpha_bar = phi.flatten().cos() ** 2
    t = torch.arange(N)
    x, v = week.mix(x0, eps, phi)
    near(x, other.add_noise(x0, eps, t))
    near(v, other.target("v", x0, eps, t))
    for ours, theirs in zip(week.unmix(x, v, phi), other.to_x0_eps("v", v, x, t), strict=True):
        near(ours, theirs)


def test_at_the_ends_there_is_only_signal_or_only_noise():
    x0, eps = torch.randn(2, N, 1, 28, 28, dtype=f64)
    zero, end = torch.zeros(N, 1, 1, 1, dtype=f64), torch.full((N, 1, 1, 1), math.pi / 2, dtype=f64)
    near(week.mix(x0, eps, zero)[0], x0)
    near(week.mix(x0, eps, end)[0], eps)
    near(week.mix(x0, eps, end)[1], -x0)


class Spy(nn.Module):
    """Answers a fixed map of x and y, and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, phi, y):
        self.asked.append((phi.flatten(), y))
        return 0.1 * x + y.view(-1, 1, 1, 1) + phi


@pytest.mark.parametrize("w, eta", [(0.0, 0.0), (1.0, 0.5), (2.5, 0.0), (1.5, 1.0)])
def test_each_step_is_week_5_s_ddim_with_guidance(w, eta, monkeypatch):
    dice = torch.randn(3, 1, 28, 28, dtype=f64)
    monkeypatch.setattr(torch, "randn_like", lambda x: dice)
    calls, y = 5, torch.tensor([3, 9, 1])
    eps = torch.randn(3, 1, 28, 28, dtype=f64)
    spy, x = Spy(), eps
    out = week.sample(spy, eps, y, w, calls, eta)
    assert len(spy.asked) == calls
    angles = [math.pi / 2 * (calls - i) / calls for i in range(calls + 1)]
    other = week5.Schedule("cosine", calls)
    other.alpha_bar = torch.tensor(angles, dtype=f64).cos() ** 2
    other.alpha_bar[-1] = 1
    for i, (phi, told) in enumerate([*spy.asked]):
        near(phi, torch.full((6,), angles[i], dtype=f64))
        assert told.tolist() == [3, 9, 1, 10, 10, 10], "each image with its digit, then each without"
        a = torch.full((3, 1, 1, 1), angles[i], dtype=f64)
        guess = spy(x, a, y * 0 + 10) + w * (spy(x, a, y) - spy(x, a, y * 0 + 10))
        x0, e = week.unmix(x, guess, a)
        x = other.ddim(x, x0, e, i, i + 1, dice, eta)
    near(out, x, 1e-10)


def test_without_eta_no_dice_are_thrown(monkeypatch):
    eps, y = torch.randn(2, 1, 28, 28), torch.tensor([1, 2])
    first = week.sample(Spy(), eps, y, 1.5, 4, 0)
    torch.manual_seed(77)
    near(week.sample(Spy(), eps, y, 1.5, 4, 0), first, 0)
    assert (week.sample(Spy(), eps, y, 1.5, 4, 0.7) - first).abs().max() > 0.01


def test_fresh_noise_is_never_more_than_there_is(monkeypatch):
    """Of angles that a device rounds up, too: a root of less than 0 would be nan."""
    sin = torch.Tensor.sin
    monkeypatch.setattr(torch.Tensor, "sin", lambda t: sin(t) * (1 - 1e-6 * (t > 1.5)))
    for calls in (1, 2, 7, 20, 31, 50, 100):
        assert week.sample(Spy(), torch.randn(1, 1, 28, 28), torch.tensor([4]), 1.4, calls).isfinite().all()


def test_samples_do_not_depend_on_their_neighbours():
    net = week.ClassUNet(8).eval()
    for w in net.parameters():
        w.data = torch.randn_like(w) * 0.1
    eps, y = torch.randn(5, 1, 28, 28), torch.arange(5)
    whole = week.sample(net.requires_grad_(False), eps, y, 2, 3, 0)
    for i in range(5):
        near(week.sample(net, eps[i : i + 1], y[i : i + 1], 2, 3, 0), whole[i : i + 1], 1e-4)


def test_noise_of_pixels_is_an_angle():
    pixels = torch.rand(N, 1, 28, 28)
    x = week.to_x(pixels)
    near(week.to_pixels(x), pixels, 1e-6)
    assert week.to_pixels(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]
    for noise in (0.1, 0.5, 2.0):
        torch.manual_seed(5)
        x_phi, phi = week.with_noise(x, noise)
        assert phi.shape == (N, 1, 1, 1)
        torch.manual_seed(5)
        eps = torch.randn(x.shape)
        near(x_phi / phi.cos() / 1.6 + 0.13, pixels + noise * eps, 1e-5)


def test_the_digits_of_mnist_would_be_centred(monkeypatch):
    """What to_x is for: ink on 13 % of the page, a deviation of a half."""
    images, _ = week.drawn_digits(500)
    x = week.to_x(images / 255)
    assert abs(x.mean()) < 0.15 and 0.35 < x.std() < 0.65


# ----------------------------------------------------------------------------------------------- networks


def make_net(width=8):
    net = week.ClassUNet(width).requires_grad_(False)
    for w in net.parameters():
        w.copy_(torch.randn_like(w) * 0.2)
    return net


@pytest.mark.parametrize("width", [4, 8, 24])
def test_the_net_answers_zero_at_first_and_keeps_the_shape(width):
    net = week.ClassUNet(width)
    out = net(torch.randn(3, 1, 28, 28), torch.rand(3, 1, 1, 1), torch.tensor([0, 5, 10]))
    assert out.shape == (3, 1, 28, 28) and (out == 0).all() and out.dtype == torch.float32


def test_digit_angle_and_image_all_matter():
    net, x, phi, y = make_net(), torch.randn(3, 1, 28, 28), torch.rand(3, 1, 1, 1), torch.tensor([0, 5, 10])
    out = net(x, phi, y)
    for other in (net(x, phi + 0.1, y), net(x, phi, (y + 1) % 11), net(x + 0.1, phi, y)):
        assert ((out - other).flatten(1).abs().amax(1) > 1e-4).all()
    for i in range(3):
        near(net(x[i : i + 1], phi[i : i + 1], y[i : i + 1]), out[i : i + 1], 1e-4)
    net.picture.weight.zero_()
    assert (net(x, phi, y) - out).abs().max() > 1e-3
    parts = {name.split(".")[0] for name, _ in net.named_parameters()}
    assert parts == {"angle", "digit", "picture", "enter", "down", "up", "leave", "encoder", "decoder", "deep"}


def test_every_weight_learns():
    net = make_net().requires_grad_()
    net(torch.randn(22, 1, 28, 28), torch.rand(22, 1, 1, 1), torch.arange(22) % 11).square().mean().backward()
    assert not [name for name, w in net.named_parameters() if w.grad is None or (w.grad == 0).all()]


def test_blocks_start_as_the_identity_and_do_what_they_say():
    block, x, told = week.Block(6).double(), torch.randn(N, 6, 5, 3, dtype=f64), torch.randn(N, 64, dtype=f64)
    near(block(x, told), x)
    for w in block.parameters():
        w.data = torch.randn_like(w)
    gain, bias = block.told(told).view(N, 2, 6, 1, 1).unbind(1)
    inner = F.conv2d(F.silu(x), block.conv1.weight, block.conv1.bias, padding=1) * (1 + gain) + bias
    near(block(x, told), x + F.conv2d(F.silu(inner), block.conv2.weight, block.conv2.bias, padding=1), 1e-9)


def test_a_reader_sees_the_image_and_the_angle():
    net, x = week.reader(), torch.randn(3, 1, 28, 28)
    scores = week.read(net, x, torch.rand(3, 1, 1, 1))
    assert scores.shape == (3, 10)
    assert (week.read(net, x, torch.ones(3, 1, 1, 1) * 9) - scores).abs().max() > 1e-3


# ----------------------------------------------------------------------------------- the planner and the shelf


@pytest.fixture
def folder(tmp_path):
    """Six networks that answer differently, saved as a run would; and their Config."""
    cfg = replace(week.Config(), out=str(tmp_path), width=8, experts=5, sure=0.5, calls=2, budget=1.0)
    for k in range(-1, 5):
        (tmp_path / week.name_of(k, cfg)).write_bytes(week.pack(make_net().state_dict()))
    return cfg


def test_names_and_teams(folder):
    assert week.name_of(-1, folder) == "generalist.safetensors" and week.name_of(2, folder) == "expert3of5.safetensors"
    teams = lambda k: [week.team_of(d, replace(folder, experts=k)) for d in range(10)]  # noqa: E731
    assert teams(1) == [0] * 10 and teams(10) == list(range(10))
    assert teams(5) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and teams(2) == [0] * 5 + [1] * 5


def test_the_shelf_loads_only_what_is_asked_and_drops_the_oldest(folder):
    size = week.size_of(week.ClassUNet(8))
    assert size == sum(4 * w.numel() for w in week.ClassUNet(8).parameters())
    shelf = week.Shelf(replace(folder, budget=2.5 * size / 1e6), torch.device("cpu"))
    assert not shelf.held
    first = shelf(1)
    assert list(shelf.held) == [1] and not any(w.requires_grad for w in first.parameters())
    saved = safetensors.torch.load_file(Path(folder.out, "expert2of5.safetensors"))
    assert all(torch.equal(saved[name], w) for name, w in first.state_dict().items())
    shelf(3)
    assert shelf(1) is first and list(shelf.held) == [3, 1], "what was used last goes last"
    shelf(-1)
    assert list(shelf.held) == [1, -1], "3 was not used for longest"
    shelf(3), shelf(3)
    assert list(shelf.held) == [-1, 3] and len(shelf.load_ms) == 4 and min(shelf.load_ms) > 0
    assert shelf.log == [size, 2 * size, 2 * size, 2 * size, 2 * size, 2 * size]
    assert shelf(1) is not first


@pytest.mark.parametrize("room", [1, 2, 3, 6])
def test_the_shelf_never_holds_more_than_its_budget(folder, room, monkeypatch):
    size, held = week.size_of(week.ClassUNet(8)), []
    shelf = week.Shelf(replace(folder, budget=room * size / 1e6 + 1e-9), torch.device("cpu"))
    right = safetensors.torch.load_file
    monkeypatch.setattr(week.safetensors.torch, "load_file", lambda file: held.append(len(shelf.held)) or right(file))
    order = [0, 1, 2, 0, 3, 4, -1, 0, 0, 1, 2, 2, 3, -1, 4, 1]
    last = []
    for k in order:
        shelf(k)
        last = [*(i for i in last if i != k), k][-room:]
        assert list(shelf.held) == last
    assert max(shelf.log) == room * size and max(held) == room - 1, "room is made before the next is loaded"


def test_evicted_networks_are_gone(folder):
    import gc
    import weakref

    shelf = week.Shelf(replace(folder, budget=1.5 * week.size_of(week.ClassUNet(8)) / 1e6), torch.device("cpu"))
    ref = weakref.ref(shelf(0))
    gc.collect()
    assert ref() is not None
    shelf(1)
    gc.collect()
    assert ref() is None


def test_what_is_wrong_with_files_or_budget_is_said(folder, refused):
    shelf = week.Shelf(replace(folder, budget=0.001), torch.device("cpu"))
    refused(shelf, 0, names=["--budget 0.001", "megabytes"])
    shelf = week.Shelf(folder, torch.device("cpu"))
    Path(folder.out, "expert1of5.safetensors").unlink()
    refused(shelf, 0, names=["--out", "expert1of5.safetensors"])
    Path(folder.out, "expert2of5.safetensors").write_bytes(b"{broken")
    refused(shelf, 1, names=["expert2of5.safetensors"])
    Path(folder.out, "expert3of5.safetensors").write_bytes(week.pack(make_net(16).state_dict()))
    refused(shelf, 2, names=["expert3of5.safetensors", "size mismatch"])
    Path(folder.out, "expert4of5.safetensors").write_bytes(week.pack({"x": torch.zeros(2)}))
    refused(shelf, 3, names=["expert4of5.safetensors", "Missing"])


class Fixed(nn.Module):
    """A planner that says what it was told to, whatever it sees."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return self.p.log()


P = torch.tensor(
    [
        [0.02, 0.02, 0.5, 0.3, 0.02, 0.02, 0.04, 0.04, 0.02, 0.02],  # 2 or 3: together sure enough
        [0.02, 0.02, 0.02, 0.02, 0.04, 0.04, 0.02, 0.42, 0.3, 0.1],  # 7 is likeliest, but the team of 8 and 9 is not
        [0.02, 0.02, 0.02, 0.02, 0.04, 0.04, 0.24, 0.25, 0.21, 0.14],
        [0.01, 0.91, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01],
    ]
)


def test_the_planner_trusts_teams_and_abstains(folder):
    x, phi = torch.randn(4, 1, 28, 28), torch.rand(4, 1, 1, 1)
    p, expert, y = week.plan(Fixed(P), x, phi, replace(folder, sure=0.43))
    near(p, P, 1e-6)
    assert expert.tolist() == [1, 3, 3, 0] and y.tolist() == [2, 7, 7, 1]
    _, expert, y = week.plan(Fixed(P), x, phi, replace(folder, sure=0.6))
    assert expert.tolist() == [1, -1, -1, 0] and y.tolist() == [2, 10, 10, 1]
    _, expert, y = week.plan(Fixed(P), x, phi, replace(folder, experts=10, sure=0.0))
    assert expert.tolist() == y.tolist() == [2, 7, 7, 1]
    _, expert, y = week.plan(Fixed(P), x, phi, replace(folder, experts=2, sure=0.5))
    assert expert.tolist() == [0, 1, 1, 0] and y.tolist() == [2, 7, 7, 1]


def test_the_likeliest_team_may_not_have_the_likeliest_digit(folder):
    p = torch.tensor([[0.01, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.09, 0.31, 0.29]])
    _, expert, y = week.plan(Fixed(p), torch.randn(1, 1, 28, 28), torch.rand(1, 1, 1, 1), replace(folder, sure=0))
    assert expert.tolist() == [4] and y.tolist() == [8]
    p = torch.tensor([[0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.31, 0.29]])
    _, expert, y = week.plan(Fixed(p), torch.randn(1, 1, 28, 28), torch.rand(1, 1, 1, 1), replace(folder, sure=0))
    assert expert.tolist() == [4] and y.tolist() == [8], "the digit is one that the expert knows"


def test_each_image_goes_to_its_expert(folder, monkeypatch):
    shelf = week.Shelf(folder, torch.device("cpu"))
    x, phi = torch.randn(6, 1, 28, 28), torch.rand(6, 1, 1, 1)
    expert, y = torch.tensor([2, -1, 2, 0, 4, -1]), torch.tensor([4, 10, 5, 1, 9, 10])
    out = week.clean(shelf, expert, y, x, phi)
    for i in range(6):
        one = slice(i, i + 1)
        v = shelf(expert[i].item())(x[one], phi[one], y[one])
        near(out[one], week.to_pixels(week.unmix(x[one], v, phi[one])[0]), 1e-4)
    assert sorted(shelf.held) == [-1, 0, 2, 4], "nobody else was loaded"
    monkeypatch.setattr(torch, "randn_like", lambda x: x * 0 + 0.3)
    torch.manual_seed(3)
    drawn = week.paint(shelf, expert, y, replace(folder, guidance=2.0))
    torch.manual_seed(3)
    eps = torch.randn(6, 1, 28, 28)
    for i in range(6):
        one = slice(i, i + 1)
        alone = week.sample(shelf(expert[i].item()), eps[one], y[one], 2.0, folder.calls, 1)
        near(drawn[one], week.to_pixels(alone), 1e-4)


def test_many_images_in_parts_are_as_few(folder, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda x: x * 0 + 0.3)
    shelf, y = week.Shelf(folder, torch.device("cpu")), torch.arange(230) % 10
    torch.manual_seed(3)
    out = week.paint(shelf, y * 0 - 1, y, folder)
    torch.manual_seed(3)
    eps = torch.randn(230, 1, 28, 28)
    near(out, week.to_pixels(week.sample(shelf(-1), eps, y, folder.guidance, 2, 1)), 1e-4)


def test_frechet_of_gaussians():
    z = torch.randn(401, 5, dtype=f64)
    z = torch.linalg.qr(z - z.mean(0))[0] * 400**0.5  # mean 0, variance 1, uncorrelated
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=f64))[0]
    assert week.frechet(z @ turn, (z * torch.arange(1, 6) + 1) @ turn) == pytest.approx(5 + 0 + 1 + 4 + 9 + 16)
    a, b = torch.randn(50, 3, dtype=f64), torch.randn(90, 3, dtype=f64) @ torch.randn(3, 3, dtype=f64)
    product = torch.cov(a.T) @ torch.cov(b.T)
    root = torch.linalg.eigvals(product).sqrt().real.sum()
    by_hand = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * root
    assert week.frechet(a, b) == pytest.approx(by_hand.item(), abs=1e-9)
    assert week.frechet(b, a) == pytest.approx(week.frechet(a, b), abs=1e-9)
    assert week.frechet(a, a) == pytest.approx(0, abs=1e-9)
    wide = torch.randn(20, 64)  # fewer samples than features: some eigenvalues are 0, or just below
    assert week.frechet(wide, wide) == pytest.approx(0, abs=1e-3)


def test_each_row_of_the_table_asks_whom_it_names(folder, monkeypatch):
    """A planner that is sure of a digit in every image, right in half of them."""
    x, y, asked, drawn = torch.randn(1000, 1, 28, 28), torch.arange(1000) % 10, [], []
    seen = (y + torch.arange(1000) // 10 % 2) % 10
    p = F.one_hot(seen, 10).float() * 0.9 + 0.01
    restored = lambda shelf, expert, digit, x_phi, phi: asked.append((expert, digit)) or x_phi * 0 + 0.5  # noqa: E731
    painted = lambda shelf, expert, digit, cfg: drawn.append((expert, digit)) or torch.rand(1000, 1, 28, 28)  # noqa: E731
    monkeypatch.setattr(week, "clean", restored)
    monkeypatch.setattr(week, "paint", painted)
    with torch.no_grad():
        figures, table, _ = week.evaluate(None, week.reader(), Fixed(p), x, y, x, y, folder)
    everyone, nobody = torch.arange(10).repeat_interleave(100), torch.full((1000,), -1)
    for (expert, digit), whom in zip(drawn, (nobody, everyone // 2), strict=True):
        assert torch.equal(expert, whom) and torch.equal(digit, everyone)
    assert len(asked) == 5 * len(week.LEVELS)
    for i in range(len(week.LEVELS)):
        alone, generalist, experts, oracle, by_dice = asked[5 * i : 5 * i + 5]
        assert torch.equal(alone[0], nobody) and (alone[1] == 10).all(), "nobody says the digit"
        assert torch.equal(generalist[0], nobody) and torch.equal(generalist[1], seen)
        assert torch.equal(experts[0], seen // 2) and torch.equal(experts[1], seen)
        assert torch.equal(oracle[0], y // 2) and torch.equal(oracle[1], y)
        assert by_dice[0].unique().tolist() == [0, 1, 2, 3, 4] and torch.equal(by_dice[1], seen)
        assert 0.1 < (by_dice[0] == experts[0]).float().mean() < 0.3
    assert figures["planner_accuracy"] == 0.5 and figures["abstained"] == 0
    expected = -10 * (0.5 - week.to_pixels(x)).square().mean().log10().item()
    assert table[0.5]["psnr_generalist"] == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------------------------- training


class Record(nn.Module):
    """One weight; says what the training showed it."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))


def shown(tmp_path, steps=3, loss=None, **more):
    """Everything that train hands to the loss, and what it returns."""
    seen = []
    x, y = torch.randn(40, 1, 28, 28), torch.arange(40) % 10

    def remember(net, *batch):
        seen.append(batch)
        return (net.w - 1).square() if loss is None else loss(net)

    cfg = week.Config(out=str(tmp_path / "out"), batch=30)
    return seen, x, y, week.train("one.safetensors", Record(), remember, x, y, steps, 0.1, 0.5, cfg, **more)


def test_training_shows_consistent_noise(tmp_path):
    seen, x, y, _ = shown(tmp_path)
    assert len(seen) == 3
    for x_phi, v, phi, digit, told in seen:
        x0, eps = week.unmix(x_phi, v, phi)
        where = [next(i for i in range(40) if (x[i] - image).abs().max() < 1e-3) for image in x0]
        assert torch.equal(y[where], digit) and len({*where}) > 10
        assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
        assert ((told == digit) | (told == 10)).all()
    told = torch.cat([batch[4] for batch in seen])
    assert 2 <= (told == 10).sum() <= 20
    assert not torch.equal(seen[0][0], seen[1][0])


def test_angles_are_spread_and_lean_to_noise(tmp_path):
    seen, *_ = shown(tmp_path)
    phi = torch.cat([batch[2] for batch in seen]).flatten()
    assert (0 < phi).all() and (phi < math.pi / 2).all()
    assert 0.55 < (phi > math.pi / 4).float().mean() < 0.75
    share = torch.special.ndtr((torch.logit(seen[0][2].flatten() / (math.pi / 2)) - 0.4) / 1.2)
    assert torch.equal((share * 30).floor().sort().values, torch.arange(30.0)), "one in each thirtieth"
    seen, *_ = shown(tmp_path, top=0)
    assert (torch.cat([batch[2] for batch in seen]) == 0).all()


def test_the_rate_rises_and_falls_and_the_average_follows(tmp_path, monkeypatch):
    rates, real = [], torch.optim.AdamW.step

    def spy(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    _, _, _, (average, seconds) = shown(tmp_path, steps=20)
    assert rates[:2] == pytest.approx([0.05, 0.1]) and rates[9:11] == pytest.approx([0.1, 0.1])
    assert rates[-1] == pytest.approx(0.01) and rates[-5] == pytest.approx(0.05) and max(rates) == pytest.approx(0.1)
    assert 0.3 < average.w < 1.2 and seconds > 0 and not average.w.requires_grad
    saved = safetensors.torch.load_file(tmp_path / "out" / "one.safetensors")
    assert torch.equal(saved["w"], average.w)


def test_the_average_is_of_the_weights_it_passed(tmp_path, monkeypatch):
    path, real = [], torch.optim.AdamW.step

    def spy(self, *args):
        real(self, *args)
        path.append(self.param_groups[0]["params"][0].item())

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    _, _, _, (average, _) = shown(tmp_path, steps=30)
    expected = 0.0
    for step, w in enumerate(path, 1):
        expected += (w - expected) * 8 / (7 + step)
    assert average.w.item() == pytest.approx(expected, abs=1e-5)


def test_the_same_seed_shows_the_same_and_another_name_another(tmp_path):
    a, b = shown(tmp_path)[0], None
    torch.manual_seed(0)
    torch.randn(5)
    torch.manual_seed(0)
    b = shown(tmp_path)[0]
    assert all(torch.equal(s, t) for one, two in zip(a, b) for s, t in zip(one, two))
    draws = []
    for what in (("a", 1), ("a", 2), ("b", 1)):
        week.seed(week.Config(), *what)
        draws.append(torch.rand(1).item())
    week.seed(week.Config(seed=5), "a", 1)
    assert len({*draws, torch.rand(1).item()}) == 4
    week.seed(week.Config(), "a", 1)
    assert torch.rand(1).item() == draws[0]


def test_processes_wait_for_each_other_only_in_the_gradients(tmp_path, monkeypatch):
    """Lines are printed by the clock, and clocks differ: a process that waited there could wait for ever."""
    monkeypatch.setattr(week, "WORLD", 2)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda net: net)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args: pytest.fail("all_reduce"))
    seen, *_ = shown(tmp_path, steps=12)
    assert [len(batch[0]) for batch in seen] == [15] * 12


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(SystemExit) as stop:
        shown(tmp_path, loss=lambda net: net.w * math.nan)
    assert "the loss is nan" in str(stop.value) and not (tmp_path / "out" / "one.safetensors").exists()


def test_the_losses_are_what_they_say():
    net, x, v, phi = make_net(), *torch.randn(2, 3, 1, 28, 28), torch.rand(3, 1, 1, 1)
    y, told = torch.tensor([1, 2, 3]), torch.tensor([1, 10, 3])
    near(week.denoising(net, x, v, phi, y, told), (net(x, phi, told) - v).square().mean(), 1e-6)
    judge = week.reader()
    scores = week.read(judge, x, phi).log_softmax(1)
    near(week.reading(judge, x, v, phi, y, told), -(scores[0, 1] + scores[1, 2] + scores[2, 3]) / 3, 1e-6)


def test_a_few_steps_teach_it_something(tmp_path):
    images, labels = week.drawn_digits(400)
    x, cfg = week.to_x(images[:, None] / 255), week.Config(out=str(tmp_path / "out"))
    torch.manual_seed(0)
    net, _ = week.train("net.safetensors", week.ClassUNet(8), week.denoising, x, labels, 60, 6e-3, 1, cfg)
    phi = torch.full((400, 1, 1, 1), 0.8)
    x_phi, v = week.mix(x, torch.randn(x.shape), phi)
    assert F.mse_loss(net(x_phi, phi, labels), v) < 0.7 * v.square().mean()
    judge, _ = week.train("judge.safetensors", week.reader(), week.reading, x, labels, 60, 3e-3, 0.9, cfg, top=0)
    assert (week.read(judge, x, phi * 0).argmax(1) == labels).float().mean() > 0.5


# ------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("week08") / "out"
    result = call(week, "--tiny", "--out", str(out), "--steps", "20", "--experts", "2")
    return out, result


def test_a_run_writes_what_was_agreed(finished):
    out, result = finished
    samples = safetensors.torch.load_file(out / "samples.safetensors")
    assert samples["images"].shape == (1000, 1, 28, 28) and samples["images"].dtype == torch.float32
    assert samples["images"].min() >= 0 and samples["images"].max() <= 1 and samples["images"].std() > 0.01
    assert torch.equal(samples["labels"], torch.arange(10).repeat_interleave(100))
    found = json.loads((out / "metrics.json").read_text())
    agreed = {"sample_accuracy", "frechet_distance", "frechet_ratio", "train_seconds", "planner_accuracy"}
    assert agreed | {"expert_bytes", "load_ms", "parameters"} <= result.keys() <= found.keys()
    assert found["expert_bytes"] == 4 * found["parameters"] == week.size_of(week.ClassUNet(16))
    names = {"generalist", "expert1of2", "expert2of2", "judge", "planner", "trunk", "samples"}
    assert {path.stem for path in out.glob("*.safetensors")} == names
    assert sorted(found["table"]) == sorted(map(str, week.LEVELS)) and len(found["held"]) == 100
    assert max(found["held"]) <= 1e6 * week.TINY["budget"] and min(found["held"]) == found["expert_bytes"]
    for row in found["table"].values():
        assert 0 <= row["planner_accuracy"] <= 1 and 0 <= row["abstained"] <= 1
        assert all(5 < row[f"psnr_{who}"] < 40 for who in ("alone", "generalist", "experts", "oracle", "random"))
    levels = [found["table"][str(level)]["psnr_alone"] for level in week.LEVELS]
    assert levels[:4] == sorted(levels[:4], reverse=True), "more noise, less PSNR"
    assert found["psnr_experts"] == found["table"]["0.5"]["psnr_experts"]


def test_experts_come_from_the_trunk_and_see_only_their_digits(tmp_path, monkeypatch):
    calls, tops, real = [], {}, week.train

    def spy(name, net, loss, x, y, steps, *rest, **more):
        tops[name.split(".")[0]] = more.get("top")
        calls.append((name, net, y.unique().tolist(), steps, len(x)))
        return real(name, net, loss, x, y, steps, *rest, **more)

    monkeypatch.setattr(week, "train", spy)
    monkeypatch.setattr(week, "evaluate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call(week, "--tiny", "--out", str(tmp_path / "out"), "--steps", "40", "--experts", "5")
    by_name = {name.split(".")[0]: rest for name, *rest in calls}
    assert tops.pop("judge") == 0 and {*tops.values()} == {None}, "only the judge learns on clean digits alone"
    assert [*by_name][:4] == ["judge", "planner", "trunk", "generalist"]
    assert by_name["trunk"][2] == 28 and by_name["generalist"][2] == 12, (
        "equal training: 28 + 12 = 28 + 5 x 2 and a bit"
    )
    for k in range(5):
        net, digits, steps, count = by_name[f"expert{k + 1}of5"]
        assert digits == [2 * k, 2 * k + 1] and steps == 12 // 5 and net is by_name["generalist"][0]
    assert sum(by_name[f"expert{k + 1}of5"][3] for k in range(5)) == by_name["trunk"][3]


def test_a_run_that_was_stopped_goes_on_to_the_same_result(finished, tmp_path, monkeypatch, capsys):
    out, real, done = tmp_path / "out", torch.optim.AdamW.step, []
    flags = "--tiny", "--out", str(out), "--steps", "20", "--experts", "2"

    def step(self, *rest, stop=40 + 40 + 14 + 3):
        done.append(1)
        if len(done) > stop:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        call(week, *flags)
    assert {path.stem for path in out.glob("*.safetensors")} == {"judge", "planner", "trunk"}
    done.clear()
    result = call(week, *flags, "--resume")
    assert len(done) == 6 + 2 * 3, "the judge, the planner and the trunk are not trained again"
    for file in finished[0].glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name
    assert result["frechet_ratio"] == finished[1]["frechet_ratio"]
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        call(week, *flags, "--resume", "--seed", "5")
    assert len(done) > 90, "what another seed has trained is no part of this run"


def test_what_comes_after_a_resumed_network_starts_as_it_did(finished, tmp_path, monkeypatch):
    """Stopped in the planner, in the second of seven networks: the first weights of all later ones are the same."""
    out, real, done = tmp_path / "out", torch.optim.AdamW.step, []
    flags = "--tiny", "--out", str(out), "--steps", "20", "--experts", "2"

    def step(self, *rest):
        done.append(1)
        if len(done) > left:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for left, more in ((40 + 3, []), (40 + 14, ["--resume"])):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            call(week, *flags, *more)
    assert {path.stem for path in out.glob("*.safetensors")} == {"judge", "planner", "trunk"}
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (finished[0] / file.name).read_bytes(), file.name


def test_resume_says_which_network_is_broken(tmp_path, refused):
    """A file cut in half, no safetensors at all, other shapes, other names, a folder: one line, not a traceback."""
    cfg = week.Config(out=str(tmp_path / "out"), batch=4)
    x, y = torch.randn(8, 1, 28, 28), torch.arange(8)
    train = lambda cfg: week.train("judge.safetensors", week.reader(), week.reading, x, y, 2, 1e-3, 1, cfg)
    trained, seconds = train(cfg)
    cfg, file = replace(cfg, resume=True), tmp_path / "out" / "judge.safetensors"
    whole, weights = file.read_bytes(), safetensors.torch.load_file(file)
    again, no_time = train(cfg)
    assert seconds > 0 == no_time and all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.parameters()))
    assert train(replace(cfg, resume=False))[1] > 0, "without --resume all is trained anew"
    with safetensors.safe_open(file, "pt") as opened:
        run = opened.metadata()
    other = weights | {"8.weight": torch.zeros(64, 3)}
    for broken, names in (
        (whole[: len(whole) // 2], []),
        (whole[:5], []),
        (b"", []),
        (b"no network at all", []),
        (safetensors.torch.save(other, run), ["size mismatch"]),
        (safetensors.torch.save({"a": torch.zeros(2)}, run), ["Missing"]),
    ):
        file.write_bytes(broken)
        refused(train, cfg, names=["--resume", str(file), *names])
        assert file.read_bytes() == broken, "the user's to delete"
    file.unlink()
    file.mkdir()
    refused(train, cfg, names=["--resume", str(file)])
    file.rmdir()
    assert train(cfg)[1] > 0, "what is not there is trained"


def in_two_processes(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", week.__file__]
    flags = ["--tiny", "--out", "out", "--steps", "20", "--experts", "2"]
    return folder, subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120, cwd=folder)


@pytest.mark.early(by=in_two_processes)
def test_two_processes_train_the_same_networks(finished, early):
    folder, run = early
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("RESULT") == 1
    for name in ("trunk", "generalist", "expert1of2", "expert2of2"):
        ours, theirs = (
            safetensors.torch.load_file(out / f"{name}.safetensors") for out in (finished[0], folder / "out")
        )
        apart = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
        assert 0 < apart < 1e-3, "other sums in float32, but the same batches and steps"


def test_digits_on_demand(finished, capsys):
    out, _ = finished
    call(week, "--tiny", "--out", str(out), "--draw", "70")
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"RESULT digits=20 loads=2 seconds=", said)
    with Image.open(out / "drawn.png") as page:
        assert page.size == (1120, 224) and np.asarray(page).std() > 5
    call(week, "--tiny", "--out", str(out), "--draw", "777")
    assert "digits=30 loads=1" in capsys.readouterr().out
    with Image.open(out / "drawn.png") as page:
        assert page.size == (1120, 336)


def test_the_readme_restores_a_picture(finished, tmp_path, monkeypatch):
    """The lines that the README gives, on a file: near to the digit, and by the network that plan names."""
    (block,) = re.findall(r"```python\n(.*?week08_noisy_router.*?)```", README, re.S)
    clean = torch.zeros(1, 28, 28)
    clean[:, 4:24, 12:16] = 1  # a one
    torch.manual_seed(1)
    TF.to_pil_image((clean + 0.5 * torch.randn_like(clean)).clamp(0, 1)).save(tmp_path / "noisy.png")
    monkeypatch.chdir(tmp_path)
    config = f"week.Config(**{{**week.TINY, 'out': {str(finished[0])!r}, 'sure': 0.0}})"
    found = {}
    exec(block.replace("week.Config()", config), found)
    with Image.open("restored.png") as image:
        restored = TF.to_tensor(image)
    with Image.open("noisy.png") as image:
        noisy = TF.to_tensor(image)
    assert found["expert"].item() == week.team_of(found["digit"], found["cfg"]).item()
    assert (restored - clean).square().mean() < 0.7 * (noisy - clean).square().mean()


def test_what_the_user_may_get_wrong(finished, tmp_path, refused):
    out, _ = finished
    refused(call, week, "--tiny", "--out", str(out), "--draw", "7a", names=["--draw 7a", "digits"])
    refused(call, week, "--tiny", "--out", str(tmp_path / "new"), "--draw", "7", names=["expert2of2.safetensors"])
    refused(call, week, "--tiny", "--out", str(out), "--draw", "7", "--width", "8", names=["size mismatch"])
    refused(call, week, "--tiny", "--out", str(out), "--draw", "7", "--budget", "0.01", names=["--budget 0.01"])
    for flags in (("--experts", "3"), ("--guidance", "inf"), ("--steps", "3"), ("--width", "2"), ("--batch", "0")):
        refused(call, week, "--tiny", "--out", str(tmp_path / "x"), *flags, names=[flags[0]])


def test_the_judge_s_figures_are_true(finished):
    """sample_accuracy and frechet_ratio again, from the files of the run."""
    out, result = finished
    judge = week.reader()
    judge.load_state_dict(safetensors.torch.load_file(out / "judge.safetensors"))
    samples = safetensors.torch.load_file(out / "samples.safetensors")
    x, y, test, _, _ = week.load_mnist("data", True)
    scores = lambda x: week.read(judge.requires_grad_(False), x, torch.zeros(1, 1, 1, 1))  # noqa: E731
    right = (scores(week.to_x(samples["images"])).argmax(1) == samples["labels"]).float().mean().item()
    assert right == pytest.approx(result["sample_accuracy"], abs=2e-3)
    inner = lambda x: judge[:-1](torch.cat([x, torch.zeros_like(x)], 1))  # noqa: E731
    real = torch.cat([x[y == d][:100] for d in range(10)])[:, None] / 255
    seen = inner(week.to_x(test[:, None] / 255))
    ours = week.frechet(inner(week.to_x(samples["images"])), seen)
    assert ours == pytest.approx(result["frechet_distance"], rel=1e-3)
    assert ours / week.frechet(inner(week.to_x(real)), seen) == pytest.approx(result["frechet_ratio"], rel=1e-3)


def test_the_judges_find_real_digits_as_good_as_real_ones(tmp_path, monkeypatch, capsys):
    import judges

    x, y, *_ = week.load_mnist(str(tmp_path), True)
    x = x[:, None] / 255
    for name, pixels in ("same", x), ("dark", x / 2):
        images, labels = judges.thousand(pixels, y, 0), y.new_tensor(range(10)).repeat_interleave(100)
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(dict(images=images, labels=labels), tmp_path / name / "samples.safetensors")
    folders = [str(tmp_path / name) for name in ("same", "dark")]
    some = {name: judges.JUDGES[name] for name in ("two convolutions, dense", "normed, mean over places")}
    monkeypatch.setattr(judges, "JUDGES", some)
    monkeypatch.setattr("sys.argv", ["judges.py", "--tiny", "--data", str(tmp_path), *folders])
    judges.main()
    rows = capsys.readouterr().out.splitlines()[-2:]
    for row, name in zip(rows, some, strict=True):
        assert row.startswith(name)
        same, dark = (float(cell.split("right, ")[1].split("|")[0]) for cell in row.split(" | ")[3:5])
        assert same == 1 and dark > 1.1


def test_a_broken_formula_fails_its_check(monkeypatch, capsys):
    right = week.mix
    for wrong in (
        lambda x0, eps, phi: (right(x0, eps, phi)[0], -right(x0, eps, phi)[1]),
        lambda x0, eps, phi: right(eps, x0, phi),
    ):
        monkeypatch.setattr(week, "mix", wrong)
        with pytest.raises(SystemExit) as stop:
            week.run_checks()
        assert stop.value.code == 1 and "FAIL" in capsys.readouterr().out
    monkeypatch.setattr(week, "mix", right)
    monkeypatch.setattr(week, "sample", lambda net, x, y, w, calls, eta: x)
    with pytest.raises(SystemExit):
        week.run_checks()
