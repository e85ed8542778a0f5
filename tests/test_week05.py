"""Week 5: the schedule against diffusers' and against Bayes, the samplers against networks that know the answer."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import week05_ddpm_forward as week
from conftest import call
from PIL import Image

f64 = torch.float64
KINDS = ["linear", "scaled", "cosine"]
TARGETS = ["v", "eps", "x0"]
SAMPLERS = ["ddim", "ddpm", "ddpm-large"]
cpu = torch.device("cpu")


def near(a, b, tol=1e-12):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------- against diffusers


@pytest.fixture(scope="module")
def schedulers():
    """diffusers.schedulers: some seconds to import, so only here, and once."""
    import diffusers

    return diffusers


NAMES = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}
PREDICTION = {"v": "v_prediction", "eps": "epsilon", "x0": "sample"}


def theirs(schedulers, name, kind, **options):
    options = {**NAMES[kind], "clip_sample": False, **options}
    return getattr(schedulers, name)(**options)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_betas_are_those_of_diffusers(schedulers, kind, zero_snr):
    scheduler = theirs(schedulers, "DDPMScheduler", kind, rescale_betas_zero_snr=zero_snr)
    ours = week.Schedule(kind, 1000, zero_snr)
    assert len(ours.alpha_bar) == 1001 and ours.alpha_bar[0] == 1 and ours.beta[0] == 0
    near(ours.alpha_bar[1:].float().sqrt(), scheduler.alphas_cumprod.sqrt(), 3e-6)
    if not zero_snr:
        near(ours.beta[1:].float(), scheduler.betas, 2e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_snr_ends_in_nothing_and_leaves_the_first_step(kind):
    for T in (7, 1000):
        plain, bent = week.Schedule(kind, T), week.Schedule(kind, T, zero_snr=True)
        assert bent.alpha_bar[-1] == 0 and bent.snr(T) == -math.inf
        assert bent.alpha_bar[1].item() == pytest.approx(plain.alpha_bar[1].item(), abs=1e-12)
        assert (bent.alpha_bar.diff() < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_velocity_are_those_of_diffusers(schedulers, kind):
    scheduler, plan = theirs(schedulers, "DDPMScheduler", kind), week.Schedule(kind, 1000)
    x0, eps = torch.randn(2, 5, 3, 7, 11)
    t = torch.tensor([1, 2, 13, 500, 1000])
    near(plan.add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t - 1), 1e-5)
    near(plan.target("v", x0, eps, t), scheduler.get_velocity(x0, eps, t - 1), 1e-5)
    near(plan.add_noise(x0, eps, 13), scheduler.add_noise(x0, eps, torch.full((5,), 12)), 1e-5)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_steps_are_those_of_diffusers(schedulers, kind, target, large):
    scheduler = theirs(
        schedulers,
        "DDPMScheduler",
        kind,
        prediction_type=PREDICTION[target],
        variance_type="fixed_large" if large else "fixed_small",
    )
    plan, (x_t, answer) = week.Schedule(kind, 1000), torch.randn(2, 5, 3, dtype=f64)
    for t in (1, 2, 13, 500, 990):
        reference = scheduler.step(answer, t - 1, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        dice = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=f64)
        x0, _ = plan.to_x0_eps(target, answer, x_t, t)
        # diffusers computes beta_t in float32 as 1 - alpha_bar_t / alpha_bar_{t-1}
        near(plan.ddpm(x_t, x0, t, dice, large) / reference.abs().max(), reference / reference.abs().max(), 4e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_steps_are_those_of_diffusers(schedulers, kind, target, eta):
    scheduler = theirs(schedulers, "DDIMScheduler", kind, prediction_type=PREDICTION[target], set_alpha_to_one=True)
    plan, (x_t, answer) = week.Schedule(kind, 1000), torch.randn(2, 5, 3, dtype=f64)
    for steps in (1000, 50):
        scheduler.set_timesteps(steps)
        for t in (1, 13, 500, 990):
            s = max(0, t - 1000 // steps)
            reference = scheduler.step(
                answer, t - 1, x_t, eta=eta, generator=torch.Generator().manual_seed(1)
            ).prev_sample
            dice = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=f64)
            ours = plan.ddim(x_t, *plan.to_x0_eps(target, answer, x_t, t), t, s, dice, eta)
            near(ours / reference.abs().max(), reference / reference.abs().max(), 4e-4)


# ------------------------------------------------------------------------------------ against first principles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [10, 100, 999, 4000])
def test_a_chain_of_any_length_ends_in_noise(kind, T):
    plan = week.Schedule(kind, T)
    assert plan.alpha_bar[-1] < 0.01 and len(plan.alpha_bar) == T + 1
    assert (plan.alpha_bar.diff() < 0).all() and (plan.beta[1:] > 0).all() and (plan.beta <= 0.9991).all()
    half = {"linear": 0.0786, "scaled": 0.2763, "cosine": 0.4923}[kind]
    if T >= 100:
        assert plan.alpha_bar[T // 2].item() == pytest.approx(half, rel=0.1), "the same curve, whatever T"


def test_betas_that_are_not_rescaled_leave_a_third_of_the_signal():
    short = week.Schedule("linear", 100, rescale=False)
    assert short.alpha_bar[-1].item() == pytest.approx(0.3636, abs=1e-4)
    assert (short.beta[1].item(), short.beta[-1].item()) == (pytest.approx(1e-4), pytest.approx(0.02))
    assert week.Schedule("linear", 100).beta[1].item() == pytest.approx(1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_is_the_chain(kind):
    plan, signal, variance = week.Schedule(kind, 17), 1.0, 0.0
    for t in range(1, 18):
        beta = plan.beta[t].item()
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
        a, b = plan.levels(torch.zeros(3, 2, dtype=f64), t)
        assert (a.item(), b.item()) == (pytest.approx(signal), pytest.approx(math.sqrt(variance)))
        assert plan.snr(t).item() == pytest.approx(10 * math.log10(signal**2 / variance))


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_is_bayes_rule(kind):
    plan, (x_t, x0) = week.Schedule(kind, 1000), torch.randn(2, 7, 3, dtype=f64)
    for t in (2, 3, 13, 500, 999, 1000):
        a_bar, beta = plan.alpha_bar[t - 1], plan.beta[t]
        precision = 1 / (1 - a_bar) + (1 - beta) / beta
        mean = (a_bar.sqrt() / (1 - a_bar) * x0 + (1 - beta).sqrt() / beta * x_t) / precision
        near(plan.posterior_mean(x_t, x0, t), mean, 1e-9)
        assert plan.variance[t].item() == pytest.approx(1 / precision.item(), rel=1e-8)
        eps = (x_t - a_bar.mul(1 - beta).sqrt() * x0) / (1 - a_bar * (1 - beta)).sqrt()
        near(plan.mean_from_eps(x_t, eps, t), mean, 1e-7)
    assert plan.variance[1] == 0
    near(plan.posterior_mean(x_t, x0, 1), x0, 1e-12)
    assert week.Schedule("linear", 1000).variance[501].item() == pytest.approx(0.0100513, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_with_eta_1_is_ddpm(kind):
    plan, (x_t, x0, dice) = week.Schedule(kind, 23), torch.randn(3, 7, 3, dtype=f64)
    for t in range(1, 24):
        eps = plan.to_x0_eps("x0", x0, x_t, t)[1]
        near(plan.ddim(x_t, x0, eps, t, t - 1, dice, 1.0), plan.ddpm(x_t, x0, t, dice), 1e-9)
        near(plan.ddim(x_t, x0, eps, t, t - 1, dice), plan.ddim(x_t, x0, eps, t, t - 1, -dice), 0)
        large = plan.ddpm(x_t, x0, t, dice, large=True) - plan.posterior_mean(x_t, x0, t)
        near(large, plan.beta[t].sqrt() * dice * (t > 1), 1e-12)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_target_gives_the_others(kind, target):
    plan, (x0, eps) = week.Schedule(kind, 1000), torch.randn(2, 5, 3, 7, dtype=f64)
    t = torch.tensor([1, 2, 13, 500, 990])
    x_t = plan.add_noise(x0, eps, t)
    found = plan.to_x0_eps(target, plan.target(target, x0, eps, t), x_t, t)
    near(found[0], x0, 1e-9)
    near(found[1], eps, 1e-9)
    v = plan.target("v", x0, eps, t)
    near(v.square() + x_t.square(), x0.square() + eps.square(), 1e-9)  # (x_t, v) is (x_0, eps), turned
    assert plan.target("eps", x0, eps, t) is eps and plan.target("x0", x0, eps, t) is x0


@pytest.mark.parametrize("kind", KINDS)
def test_kl_is_torch_s(kind):
    plan, x0, normal = week.Schedule(kind, 1000), torch.randn(7, 3, dtype=f64), torch.distributions.Normal
    a = plan.alpha_bar[-1]
    kl = torch.distributions.kl_divergence(normal(a.sqrt() * x0, (1 - a).sqrt()), normal(a * 0, 1.0))
    near(plan.kl_to_normal(x0), kl, 1e-12)
    if kind == "linear":
        assert plan.kl_to_normal(torch.ones(1, dtype=f64)).item() == pytest.approx(2.018e-5, rel=1e-3)


# ------------------------------------------------------------------------------------------- energy distance


def test_energy_distance_in_one_dimension_is_its_integral():
    a, b = torch.randn(41, dtype=f64), torch.rand(31, dtype=f64)
    z = torch.cat([a, b]).sort().values
    gap = (a[:, None] <= z).double().mean(0) - (b[:, None] <= z).double().mean(0)
    integral = 2 * (gap[:-1].square() * z.diff()).sum().item()
    assert week.energy_distance([a[:, None]], [b[:, None]]) == pytest.approx(integral, abs=1e-6)


def test_energy_distance_is_its_definition():
    sets = [torch.randn(n, 2) for n in (701, 700, 703)]
    mean = lambda x, y: (x[:, None] - y).double().norm(dim=2).mean().item()  # noqa: E731
    pair = lambda x, y: 2 * mean(x, y) - mean(x, x) - mean(y, y)  # noqa: E731
    assert week.mean_distance(sets[0], sets[1]) == pytest.approx(mean(sets[0], sets[1]), abs=1e-6)
    assert week.energy_distance(sets[:1], sets[1:2]) == pytest.approx(pair(*sets[:2]), abs=2e-6)
    both = (pair(sets[0], sets[1]) + pair(sets[0], sets[2])) / 2
    assert week.energy_distance(sets[:1], sets[1:]) == pytest.approx(both, abs=2e-6)
    each = torch.cat([torch.cdist(part, sets[1][:1]) for part in sets[0].split(500)])
    assert week.mean_distance(sets[0], sets[1][:1]) == pytest.approx(each.double().mean().item(), rel=1e-12), "float64"
    point = torch.zeros(1, 2)
    assert week.energy_distance([point], [point + torch.tensor([3.0, 4.0])]) == pytest.approx(10)
    assert week.energy_distance([point], [point]) == 0


def test_the_floor_is_what_two_fresh_sets_have_on_average():
    cloud = week.make_cloud(week.Config(), cpu)
    sets = [cloud(100) for _ in range(60)]
    pairs = [week.energy_distance([a], [b]) for i, a in enumerate(sets) for b in sets[:i]]
    assert week.fresh_distance(sets) == pytest.approx(np.mean(pairs), rel=0.1)
    x = sets[0]
    assert week.fresh_distance([x]) == pytest.approx(2 * torch.pdist(x.double()).mean().item() / 100, rel=1e-5)
    other = [week.energy_distance([a], [1.2 * b]) for a in sets[:8] for b in sets[8:16]]
    assert np.mean(other) > 1.5 * np.mean(pairs)


# ------------------------------------------------------------------------------------------------- the clouds


def test_two_spirals_lie_on_their_arms():
    x = week.make_cloud(week.Config(), cpu)(20_000)
    assert x.shape == (20_000, 2) and x.mean(0).abs().max() < 0.03
    assert x.var(0).mean().item() == pytest.approx(1, abs=0.05)
    r = x.norm(dim=1)
    turn = (torch.atan2(x[:, 1], x[:, 0]) - 9.5 * r / 2) % math.pi
    off = torch.minimum(turn, math.pi - turn)[r > 0.5] * r[r > 0.5]
    assert 0.05 < off.std() < 0.25 and (r < 2.3).all()
    first = ((torch.atan2(x[:, 1], x[:, 0]) - 9.5 * r / 2) % (2 * math.pi) - math.pi).abs() > math.pi / 2
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.02), "as many on either arm"
    inner = (r < math.sqrt(2)).float().mean().item()
    assert inner == pytest.approx(0.5, abs=0.03), "spread by the root"


def test_a_text_is_drawn_upright_and_in_scale():
    x = week.make_cloud(week.Config(text="L"), cpu)(20_000)
    assert x.mean(0).abs().max() < 0.03 and x.var(0).mean().item() == pytest.approx(1, abs=0.03)
    assert len(x.unique(dim=0)) > 19_000, "anywhere in a pixel, not at its corner"
    low, high = x.amin(0), x.amax(0)
    middle = (low + high) / 2
    right, top = x[:, 0] > middle[0], x[:, 1] > middle[1]
    assert (right & ~top).float().mean() > 0.15 and (right & top).float().mean() < 0.01
    wide = week.make_cloud(week.Config(text="LLLL"), cpu)(5000).var(0)
    assert wide[0] > 4 * wide[1], "letters keep their proportions"
    blank = week.make_cloud(week.Config(text="  "), cpu)(1000)
    assert torch.isfinite(blank).all()


# ------------------------------------------------------------------------------------------- the way back


class Oracle(torch.nn.Module):
    """Knows that the data is N(point, spread^2), and so the best answer at each t."""

    def __init__(self, plan, target, point, spread=0.0):
        super().__init__()
        self.plan, self.target, self.point, self.spread, self.seen = plan, target, point, spread, []

    def forward(self, x, t):
        self.seen.append(t)
        a = self.plan.alpha_bar[int(t[0])].item()
        gain = self.spread**2 * math.sqrt(a) / (a * self.spread**2 + 1 - a)
        x0 = self.point + gain * (x - math.sqrt(a) * self.point)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        return self.plan.target(self.target, x0, eps, int(t[0]))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("target", TARGETS)
def test_whoever_knows_the_point_arrives_there(target, sampler):
    plan, point = week.Schedule("linear", 23), torch.tensor([1.0, -2.0])
    oracle = Oracle(plan, target, point)
    way = week.sample(oracle, plan, week.Config(target=target, sampler=sampler), 101, cpu)
    near(way[-1][1], point.expand(101, 2), 2e-5)
    assert [t for t, _ in way] == list(range(23, -1, -1))
    assert [t.unique().item() for t in oracle.seen] == list(range(23, 0, -1)), "T first, 1 last, none left out"
    assert all(t.shape == (101,) and t.dtype == torch.int64 for t in oracle.seen)
    assert way[0][1].std().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_gaussian_comes_out_as_it_is(sampler):
    plan, point = week.Schedule("cosine", 300), torch.tensor([1.0, -2.0])
    x = week.sample(Oracle(plan, "v", point, 0.5), plan, week.Config(sampler=sampler), 20_000, cpu)[-1][1]
    assert (x.mean(0) - point).abs().max() < 0.02 and (x.std(0) - 0.5).abs().max() < 0.02


def test_small_and_large_variances_err_to_either_side():
    plan = week.Schedule("linear", 20)
    spread = {}
    for sampler in SAMPLERS:
        oracle = Oracle(plan, "v", torch.zeros(2), 0.7)
        spread[sampler] = week.sample(oracle, plan, week.Config(sampler=sampler), 40_000, cpu)[-1][1].std().item()
    assert spread["ddpm"] < 0.7 < spread["ddpm-large"]


def test_without_dice_ddpm_shrinks_to_the_middle():
    plan = week.Schedule("linear", 100)
    config = lambda **flags: week.Config(sampler="ddpm", **flags)  # noqa: E731
    spread = lambda cfg: week.sample(  # noqa: E731
        Oracle(plan, "v", torch.zeros(2), 1.0), plan, cfg, 5000, cpu
    )[-1][1].std().item()
    assert spread(config()) == pytest.approx(1, abs=0.05) and spread(config(ablate="noise")) < 0.3


@pytest.mark.parametrize(
    "calls, times",
    [(1, [20, 0]), (3, [20, 13, 7, 0]), (4, [20, 15, 10, 5, 0]), (0, list(range(20, -1, -1)))],
)
def test_ddim_takes_the_calls_that_it_is_given(calls, times):
    plan = week.Schedule("cosine", 20)
    oracle = Oracle(plan, "v", torch.zeros(2), 0.5)
    way = week.sample(oracle, plan, week.Config(sampler="ddim", calls=calls), 7, cpu)
    assert [t for t, _ in way] == times and len(oracle.seen) == len(times) - 1
    way = week.sample(week.Denoiser(20, 8, 1), plan, week.Config(sampler="ddim", calls=calls), 7, cpu)
    assert not way[-1][1].requires_grad, "nothing is kept for a gradient"


def test_the_network_sees_the_time():
    model = week.Denoiser(23, 16, 3)
    x, t = torch.randn(5, 2), torch.tensor([1, 2, 3, 22, 23])
    assert model(x, t).shape == (5, 2)
    y = model(x[:1].expand(23, 2), torch.arange(1, 24))
    assert torch.pdist(y).min() > 1e-4
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    model(x, t).sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in model.parameters())


def test_the_clock_has_hands_of_many_speeds():
    """The slowest goes from 0 to half a radian over the whole chain, the fastest a thousand times as far."""
    clock = week.Denoiser(23, 16, 3).clock
    angle = 0.5 * 1000 ** torch.linspace(0, 1, 32)
    near(clock[23], torch.cat([angle.sin(), angle.cos()]), 1e-4)
    near(clock[0], torch.cat([torch.zeros(32), torch.ones(32)]))
    near(week.Denoiser(46, 16, 3).clock[::2], clock, 1e-4)  # what counts is the share of the chain


def test_each_layer_has_a_path_past_it():
    assert [len(week.Denoiser(23, 16, layers).layers) for layers in (1, 5)] == [1, 5]
    model, x, t = week.Denoiser(23, 16, 3), torch.randn(5, 2), torch.tensor([1, 2, 3, 22, 23])
    with torch.no_grad():
        for w in model.layers.parameters():
            w.zero_()
    near(model(x, t), model.out(torch.nn.functional.silu(model.of_x(x) + model.of_t(model.clock[t]))), 1e-6)


# ------------------------------------------------------------------------------------------------- training


def small(**flags):
    """Arguments for train()."""
    cfg = week.Config(**{**week.TINY, "tiny": True, **flags})
    torch.manual_seed(cfg.seed)
    plan = week.Schedule(cfg.schedule, cfg.timesteps)
    return week.Denoiser(cfg.timesteps, cfg.width, cfg.layers), plan, week.make_cloud(cfg, cpu), cfg, cpu


def flat(model):
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def error(model, plan, cloud, cfg):
    """The loss over many fresh points, each t as often."""
    torch.manual_seed(11)
    t = torch.arange(1, plan.T + 1).repeat(1000)
    x0 = cloud(len(t))
    eps = torch.randn_like(x0)
    with torch.no_grad():
        answer = model(plan.add_noise(x0, eps, t), t)
    return (answer - plan.target(cfg.target, x0, eps, t)).square().mean().item()


@pytest.mark.parametrize("target", TARGETS)
def test_training_learns_and_returns_the_average(target, capsys):
    model, plan, cloud, cfg, device = small(target=target, schedule="linear")
    before = error(model, plan, cloud, cfg)
    seconds, average = week.train(model, plan, cloud, cfg, device)
    assert error(average, plan, cloud, cfg) < {"v": 0.99, "eps": 0.55, "x0": 0.85}[target] * before and seconds > 0
    assert not torch.equal(flat(average), flat(model)) and (flat(average) - flat(model)).abs().max() < 0.2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and all(re.match(r"step +\d+/\d+ \| loss \d\.\d{4} \| \d+ s left", line) for line in lines)


@pytest.mark.parametrize("steps", [9, 260])
def test_the_average_is_a_running_one(steps, monkeypatch):
    """Of all steps at first; from step 200 on, each has a weight of 0.005."""
    seen = []
    step = torch.optim.AdamW.step
    model, *rest = small(steps=steps, batch=20)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (step(self), seen.append(flat(model)))[0])
    _, average = week.train(model, *rest)
    expected = torch.stack(seen[:200]).mean(0)
    for w in seen[200:]:
        expected = 0.995 * expected + 0.005 * w
    near(flat(average), expected, 2e-5)


def test_each_t_has_its_turn_and_its_own_point():
    model, plan, cloud, cfg, device = small(steps=30, batch=40)
    seen = []
    model.register_forward_pre_hook(lambda module, given: seen.append(given))
    week.train(model, plan, cloud, cfg, device)
    for x, t in seen:
        assert x.shape == (40, 2) and t.dtype == torch.int64
        assert t.bincount(minlength=21).tolist() == [0] + [2] * 20, "1 to T, both ends included"
    x = torch.cat([x[t == 20] for x, t in seen])
    assert x.std().item() == pytest.approx(1, abs=0.15) and x.unique(dim=0).shape == x.shape


def test_the_learning_rate_rises_then_falls(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(self.param_groups[0]["lr"]))
    week.train(*small(steps=100, lr=2.0))
    assert seen[:2] == pytest.approx([1.0, 2.0], abs=0.01) and max(seen) == seen[1]
    assert seen[49] == pytest.approx(1.0) and seen[-1] == pytest.approx(0, abs=1e-9)


def test_the_loss_is_the_mean_square(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: made.append(self.defaults))
    model, plan, _, cfg, device = small(steps=1, target="x0")
    torch.nn.init.zeros_(model.out.weight), torch.nn.init.zeros_(model.out.bias)
    week.train(model, plan, lambda n: torch.full((n, 2), 3.0), cfg, device)
    assert "loss 9.0000" in capsys.readouterr().out
    assert made[0]["betas"] == (0.9, 0.99) and made[0]["weight_decay"] == 0


def test_each_flag_of_the_training_matters():
    def weights(**flags):
        return flat(week.train(*small(**{"steps": 7, **flags}))[1])

    base = weights()
    assert torch.equal(base, weights())
    for flags in (
        dict(seed=3),
        dict(lr=0.01),
        dict(batch=20),
        dict(target="x0"),
        dict(schedule="linear"),
        dict(text="L"),
    ):
        assert not torch.equal(base, weights(**flags)), flags


def test_a_loss_that_is_not_finite_stops_the_run():
    model, *rest = small()
    with torch.no_grad():
        model.of_x.weight[3] = math.nan
    with pytest.raises(SystemExit) as stop:
        week.train(model, *rest)
    assert "step" in stop.value.code and "--lr" in stop.value.code


# ------------------------------------------------------------------------------------ pictures, and the whole


def test_a_panel_shows_where_points_lie():
    x = torch.tensor([[2.0, 2.0]] * 50 + [[-2.5, 0.0]] * 50 + [[9.0, 0.0], [0.0, -9.0]])
    pixels = np.asarray(week.panel(x, 60))
    assert pixels.shape == (60, 60)
    y, x = np.nonzero(pixels < 255)
    assert len(x) == 2 * 25, "blurred a little, and nothing from outside"
    for half, place in ((x > 30, (50, 10)), (x < 30, (5, 30))):
        assert (x[half].mean(), y[half].mean()) == place


def test_a_digit_dissolves_row_by_row():
    digit = torch.zeros(28, 28, dtype=torch.uint8)
    digit[:, :14] = 255
    pixels = np.asarray(week.draw_digit(digit, 100).convert("L")).astype(float)
    cell = lambda row, k: pixels[46 + 104 * row :, 120 + 100 * k :][:84, :84]  # noqa: E731
    left = lambda row, k: cell(row, k)[:, :42].mean() - cell(row, k)[:, 42:].mean()  # noqa: E731
    for row in range(5):
        assert left(row, 0) == 255
        assert left(row, 2) > left(row, 6) or row == 4
        assert (abs(left(row, 9)) < 15) == (row < 4), "only betas that are not rescaled leave something"
    assert left(2, 4) > left(0, 4) + 40, "the cosine keeps more of the data in the middle"


def test_the_numbers_under_the_digits_are_decibels(monkeypatch):
    said, write = [], week.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        week.ImageDraw.ImageDraw, "text", lambda pen, xy, text, *rest: (said.append(text), write(pen, xy, text, *rest))
    )
    week.draw_digit(torch.zeros(28, 28, dtype=torch.uint8), 100)
    found = [text for text in said if " dB at " in text]
    assert len(found) == 5 * 9 and said.count("clean") == 5
    plan = week.Schedule("linear", 100)
    assert found[:9] == [f"{plan.snr(t):.0f} dB at {t}" for t in (11, 22, 33, 44, 56, 67, 78, 89, 100)]
    assert found[-1] == f"{week.Schedule('linear', 100, rescale=False).snr(100):.0f} dB at 100"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished --tiny run in this process: (figures, folder, the model that train returned)."""
    out, train, kept = tmp_path_factory.mktemp("week05"), week.train, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(week, "train", lambda *args: kept.append(train(*args)) or kept[0])
        return call(week, "--tiny", "--out", out), out, kept[0][1]


def test_the_whole_beats_its_baseline(trained):
    figures, out, _ = trained
    assert figures["energy_distance"] < 0.8 * figures["baseline_distance"]
    assert figures["ratio"] == pytest.approx(figures["energy_distance"] / figures["floor_distance"])
    assert 0.5 < figures["ratio"] and figures["alpha_bar_T"] < 1e-4 and figures["kl_at_T"] < 1e-4
    found = json.loads((out / "metrics.json").read_text())
    keys = {"ratio", "energy_distance", "floor_distance", "baseline_distance", "train_seconds", "sample_seconds"}
    assert keys <= found.keys() and "two spirals" in found["data"] and "drawn digits" in found["data"]
    cloud = week.make_cloud(week.Config(), cpu)
    assert figures["floor_distance"] == pytest.approx(week.fresh_distance([cloud(1000) for _ in range(20)]), rel=0.03)


def test_the_baseline_is_a_gaussian_of_the_same_mean_and_covariance(tmp_path):
    figures = call(week, "--tiny", "--out", tmp_path, "--text", "LLLLL", "--steps", 2)
    fresh = [week.make_cloud(week.Config(text="LLLLL"), cpu)(1000) for _ in range(8)]
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.cov(torch.cat(fresh).T))
    gauss = week.energy_distance([normal.sample((1000,)) for _ in range(8)], fresh)
    assert figures["baseline_distance"] == pytest.approx(gauss, rel=0.3)
    assert figures["energy_distance"] > 2 * gauss, "two steps teach nothing"


def test_the_average_is_saved_and_measured(trained):
    figures, out, average = trained
    saved = week.safetensors.torch.load_file(out / "denoiser.safetensors")
    assert saved.keys() == average.state_dict().keys()
    assert all(torch.equal(saved[name], w) for name, w in average.state_dict().items())
    cfg = week.Config(**json.loads((out / "metrics.json").read_text())["config"])
    plan, cloud = week.Schedule(cfg.schedule, cfg.timesteps), week.make_cloud(cfg, cpu)
    made = [week.sample(average, plan, cfg, 1000, cpu)[-1][1] for _ in range(8)]
    again = week.energy_distance(made, [cloud(1000) for _ in range(8)])
    assert again == pytest.approx(figures["energy_distance"], abs=0.006)


def test_the_film_goes_from_noise_to_the_cloud(trained):
    with Image.open(trained[1] / "flow.gif") as film:
        assert film.is_animated and film.n_frames >= 15 and film.size == (320, 320)
        reach = []
        for k in (0, film.n_frames - 1):
            film.seek(k)
            y, x = np.nonzero(np.asarray(film.convert("L")) < 200)
            assert len(x) > 300
            reach.append(np.hypot(x - 160, y - 160).max())
    assert reach[0] > 140 > reach[1], "the spirals end at 2 of 3, the noise goes on"
    with Image.open(trained[1] / "reverse.png") as page:
        assert page.size == (1480, 270)
        for k, reaches in enumerate([True, None, None, None, None, False, False]):
            y, x = np.nonzero(np.asarray(page.convert("L"))[40:240, 20 + 208 * k :][:, :200] < 200)
            assert reaches is None or (np.hypot(x - 100, y - 100).max() > 87) == reaches, "noise first, data last"


def test_the_first_test_digit_is_drawn(tmp_path, monkeypatch):
    seen, draw_digit = [], week.draw_digit
    monkeypatch.setattr(week, "draw_digit", lambda digit, T: seen.append((digit, T)) or draw_digit(digit, T))
    call(week, "--tiny", "--out", tmp_path, "--steps", 2)
    assert torch.equal(seen[0][0], week.load_mnist("data", True)[2][0]) and seen[0][1] == week.TINY["timesteps"]


def test_ideas_are_worth_something(tmp_path):
    def run(*flags):
        return call(week, "--tiny", "--out", tmp_path, "--text", "DDPM", *flags)["energy_distance"]

    assert run("--ablate", "noise") > 2 * run()
    assert run("--schedule", "linear", "--ablate", "rescale") > 2 * run("--schedule", "linear")


def test_flags_reach_the_schedule(tmp_path):
    run = lambda *flags: call(week, "--tiny", "--out", tmp_path, "--steps", 2, *flags)["alpha_bar_T"]  # noqa: E731
    assert run("--zero-snr") == 0
    assert run("--schedule", "scaled") == week.Schedule("scaled", 20).alpha_bar[-1]
    assert run("--schedule", "scaled", "--timesteps", 31) == week.Schedule("scaled", 31).alpha_bar[-1]
    short = week.Schedule("linear", 20, rescale=False).alpha_bar[-1]
    assert run("--schedule", "linear", "--ablate", "rescale") == short


def test_sampling_is_timed_for_one_set_of_points(tmp_path, monkeypatch):
    clock, sample = [0.0], week.sample

    def tick(seconds=1e-3):
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr(week, "time", SimpleNamespace(perf_counter=tick))
    monkeypatch.setattr(week, "sample", lambda *args: (tick(10), sample(*args))[1])
    figures = call(week, "--tiny", "--out", tmp_path, "--steps", 2)
    assert figures["sample_seconds"] == pytest.approx(10, abs=0.1) and figures["train_seconds"] < 1


def test_flags_reach_the_network(tmp_path):
    call(week, "--tiny", "--out", tmp_path, "--steps", 2, "--width", 20, "--layers", 2)
    saved = week.safetensors.torch.load_file(tmp_path / "denoiser.safetensors")
    assert saved["of_x.weight"].shape == (20, 2) and {name[:8] for name in saved if "layers" in name} == {
        "layers.0",
        "layers.1",
    }


def test_flags_that_contradict_each_other_are_refused(tmp_path, refused):
    for flags in (
        ("--calls", 21, "--sampler", "ddim"),
        ("--calls", 5),
        ("--target", "eps", "--zero-snr"),
        ("--ablate", "rescale"),
        ("--text", "D" * 41),
        ("--text", "a\nb"),
        ("--ablate", "noise", "--sampler", "ddim"),
        ("--timesteps", 1),
        ("--lr", "inf"),
    ):
        refused(call, week, "--tiny", "--out", tmp_path, *flags, names=[flags[0]])


def test_the_seed_matters(tmp_path):
    ratios = {call(week, "--tiny", "--out", tmp_path, "--steps", 2, "--seed", seed)["ratio"] for seed in (2, 3)}
    assert len(ratios) == 2


def test_the_checks_at_the_start_are_these(capsys):
    week.run_checks()
    shown = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [verdict for verdict, *_ in shown] == ["ok"] * 5
    claims = " ".join(claim for _, claim, *_ in shown)
    for word in ("Table 1", "step by step", "Eq. 7 == Eq. 11", "eta = 1 == DDPM", "v, eps, x_0"):
        assert word in claims


S = week.Schedule


@pytest.mark.parametrize(
    "name, broken",
    [
        ("levels", lambda self, x, t: self.like(x, self.alpha_bar[t], 1 - self.alpha_bar[t])),
        ("add_noise", lambda self, x0, eps, t: x0 + eps),
        ("snr", lambda self, t: 20 * (self.alpha_bar[t] / self.rest[t]).log10()),
        ("posterior_mean", lambda self, x_t, x0, t, right=S.posterior_mean: right(self, x_t, x0, t - 1)),
        ("mean_from_eps", lambda self, x_t, eps, t, right=S.mean_from_eps: right(self, x_t, -eps, t)),
        ("ddpm", lambda self, x_t, x0, t, dice, right=S.ddpm: right(self, x_t, x0, t, dice, True)),
        ("ddim", lambda self, x_t, x0, eps, t, s, dice, eta, right=S.ddim: right(self, x_t, x0, eps, t, s, dice)),
        ("target", lambda self, kind, x0, eps, t, right=S.target: right(self, kind, eps, x0, t)),
        ("to_x0_eps", lambda self, kind, y, x_t, t, right=S.to_x0_eps: right(self, kind, -y, x_t, t)),
    ],
)
def test_the_checks_at_the_start_catch_broken_maths(name, broken, monkeypatch):
    monkeypatch.setattr(week.Schedule, name, broken)
    with pytest.raises(SystemExit) as stop:
        week.run_checks()
    assert stop.value.code == 1
