# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "safetensors>=0.4.5", "pillow>=10.1"]
# ///
"""Week 5: diffusion. The formulas of the way into noise and back, proved; then the way back, learned.

Paper: Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models".
The idea: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps turns data into noise as t goes from 0 to T.
A network that says which part of x_t is noise, trained by least squares, is all it takes to walk back.

    python week05_ddpm_forward.py                                  # two spirals: watch out/week05/flow.gif
    python week05_ddpm_forward.py --text DDPM                      # learn to write a text in points
    python week05_ddpm_forward.py --sampler ddim --calls 20        # fewer calls, no fresh noise
    python week05_ddpm_forward.py --schedule linear --ablate rescale    # a chain too short to end in noise

Expected: 1.03 times the energy distance of two fresh sets of 10,000 points (0.86 to 1.17, seeds 1337, 1, 2),
after 31 s of training on one core; a Gaussian of the same mean and covariance: 34 times.
"""
import argparse, copy, inspect, itertools, json, math, os, socket, sys, tempfile, time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision import datasets

# ----------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    device: str = "auto"       # auto = cuda if there is one, else cpu; or by name: cpu, cuda:1, mps
    seed: int = 1337           # the same seed on the same CPU gives the same losses, bit for bit
    tiny: bool = False         # everything smallest, and no network: to see that it runs
    out: str = "out/week05"    # folder for everything that is written
    data: str = "data"         # folder with MNIST/raw; where there is none, MNIST is downloaded into it
    text: str = ""             # learn the points of this text instead of two spirals
    schedule: Literal["linear", "scaled", "cosine"] = "cosine"       # how the noise grows with t
    timesteps: int = 200       # T, the length of the chain; the papers take 1000
    zero_snr: bool = False     # bend the schedule so that nothing at all of the data is left at T
    target: Literal["v", "eps", "x0"] = "v"                          # what the network is asked for
    sampler: Literal["ddpm", "ddpm-large", "ddim"] = "ddpm"          # large: sigma^2 = beta; ddim: sigma = 0
    calls: int = 0             # of the network, per sample, with ddim; 0 = T
    width: int = 64            # units per layer
    layers: int = 6            # hidden layers, each with a residual path past it
    batch: int = 512           # points per step
    steps: int = 12000         # optimizer steps
    lr: float = 6e-3           # peak learning rate, reached after the warm-up
    ablate: Literal["none", "rescale", "noise"] = "none"   # take one idea away
TINY = dict(timesteps=20, width=32, layers=3, batch=256, steps=1500)

# ----------------------------------------------------------------------------------------------- The schedule
# t counts as the papers do: 0 is clean data, T the end of the chain.   x (N, ...): N points or pictures.
class Schedule:
    """beta_t, the variance that step t adds, and what follows from it, in float64, each table (T + 1) long:
    alpha_t = 1 - beta_t,  alpha_bar_t = alpha_1 ... alpha_t,  alpha_bar_0 = 1 (Ho et al. 2020, section 2).
    The papers' betas are made for T = 1000: a shorter chain must add 1000 / T times as much per step."""
    def __init__(self, kind, T, zero_snr=False, rescale=True):
        t, per_step = torch.arange(T + 1, dtype=torch.float64), 1000 / T if rescale else 1
        f = ((t / T + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        beta = {"linear": torch.linspace(1e-4, 0.02, T, dtype=t.dtype) * per_step,     # Ho et al., section 4
                "scaled": torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=t.dtype) ** 2 * per_step,   # SD's
                "cosine": 1 - f[1:] / f[:-1]}[kind]                         # Nichol & Dhariwal 2021, Eq. 17
        root = (1 - beta.clamp(max=0.999)).cumprod(0).sqrt()
        if zero_snr: root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # Lin et al. 2024, Algorithm 1
        self.T, self.alpha_bar = T, torch.cat([t[:1] + 1, root**2])
        self.before = torch.cat([t[:1] + 1, self.alpha_bar[:-1]])                            # alpha_bar_{t-1}
        self.beta, self.rest = 1 - self.alpha_bar / self.before, (1 - self.alpha_bar).clamp(min=1e-20)
        self.variance = (1 - self.before) / self.rest * self.beta            # of q(x_{t-1} | x_t, x_0), Eq. 7
    def like(self, x, *values):
        """Numbers, one or N, in the precision and on the device of x (N, ...), shaped to multiply it."""
        return [v.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1)) for v in values]
    def levels(self, x, t):
        """How much signal and how much noise there is at t: sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)."""
        return self.like(x, self.alpha_bar[t].sqrt(), (1 - self.alpha_bar[t]).sqrt())
    def snr(self, t):
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), in decibels: 10 dB are a factor of ten."""
        return 10 * (self.alpha_bar[t] / self.rest[t]).log10()
    def add_noise(self, x0, eps, t):
        """x_t of q(x_t | x_0) without the steps between (Eq. 4): a sum of Gaussians is Gaussian."""
        signal, noise = self.levels(x0, t)
        return signal * x0 + noise * eps
    def kl_to_normal(self, x0):
        """KL(q(x_T | x_0) || N(0, I)) in nats per number, L_T of Eq. 5: the way back starts from N(0, I)."""
        return 0.5 * (self.alpha_bar[-1] * (x0.square() - 1) - torch.log1p(-self.alpha_bar[-1]))
    def posterior_mean(self, x_t, x0, t):
        """Mean of q(x_{t-1} | x_t, x_0), where x_t came from if the data was x_0 (Eq. 7)."""
        a, b = self.like(x_t, self.before[t].sqrt() * self.beta[t] / self.rest[t],
                         (1 - self.beta[t]).sqrt() * (1 - self.before[t]) / self.rest[t])
        return a * x0 + b * x_t
    def mean_from_eps(self, x_t, eps, t):
        """The same mean, if the noise in x_t was eps (Eq. 11)."""
        a, b = self.like(x_t, (1 - self.beta[t]).rsqrt(), self.beta[t] / self.rest[t].sqrt())
        return a * (x_t - b * eps)
    def ddpm(self, x_t, x0, t, dice, large=False):
        """A step of Algorithm 2, from t to t - 1: the mean, and sigma_t times dice ~ N(0, I).   sigma_t^2 is
        self.variance if the data is one point, beta_t (large) if it is itself N(0, I) (section 3.2)."""
        sigma = (self.beta if large else self.variance)[t].sqrt() * (t > 1)        # no dice in the last step
        return self.posterior_mean(x_t, x0, t) + self.like(x_t, sigma)[0] * dice
    def ddim(self, x_t, x0, eps, t, s, dice, eta=0.0):
        """From t to any s < t (Song et al. 2021, Eq. 12 and 16); eta = 1 and s = t - 1 is the step above."""
        a, b = self.alpha_bar[t], self.alpha_bar[s]
        variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        a, b, c = self.like(x_t, b.sqrt(), (1 - b - variance).clamp(min=0).sqrt(), variance.sqrt())
        return a * x0 + b * eps + c * dice
    def target(self, kind, x0, eps, t):
        """What the network is asked for: eps (Eq. 14), x_0, or v (Salimans & Ho 2022, section 4)."""
        signal, noise = self.levels(x0, t)
        return {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[kind]
    def to_x0_eps(self, kind, answer, x_t, t):
        """x_0 and eps from any of the three: x_t and v are (x_0, eps), turned by an angle.   Both (N, ...)"""
        signal, noise = self.levels(x_t, t)
        if kind == "v": return signal * x_t - noise * answer, noise * x_t + signal * answer
        if kind == "x0": return answer, (x_t - signal * answer) / noise
        return (x_t - noise * answer) / signal, answer

# ----------------------------------------------------------------------------------------------- The way back
class Denoiser(nn.Module):
    """A multi-layer perceptron.   x (N, 2), t (N) int64 -> eps, x_0 or v, as it was trained (N, 2)
    t enters as sines and cosines of many speeds, like the positions of week 2 (Ho et al., appendix B)."""
    def __init__(self, T, width, layers):
        super().__init__()
        angle = torch.arange(T + 1)[:, None] / T * 0.5 * 1000 ** torch.linspace(0, 1, 32)
        self.register_buffer("clock", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)
        self.of_x, self.of_t, self.out = nn.Linear(2, width), nn.Linear(64, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
    def forward(self, x, t):
        h = F.silu(self.of_x(x) + self.of_t(self.clock)[t])
        for layer in self.layers: h = h + F.silu(layer(h))
        return self.out(h)
@torch.no_grad()
def sample(model, schedule, cfg, n, device):
    """Noise to n points, by Algorithm 2 or by DDIM.   Returns [(t, x_t (n, 2))] of the whole way, T to 0."""
    x, way = torch.randn(n, 2, device=device), []
    times = torch.linspace(schedule.T, 0, 1 + (cfg.calls or schedule.T)).round().long().tolist()
    for t, s in zip(times, times[1:]):
        way.append((t, x))
        x0, eps = schedule.to_x0_eps(cfg.target, model(x, torch.full((n,), t, device=device)), x, t)
        dice = torch.randn_like(x) * (cfg.ablate != "noise")
        if cfg.sampler == "ddim": x = schedule.ddim(x, x0, eps, t, s, dice)
        else: x = schedule.ddpm(x, x0, t, dice, large=cfg.sampler == "ddpm-large")
    return [*way, (0, x)]

# -------------------------------------------------------------------------------------------- How good is it?
def mean_distance(x, y):
    """Mean of |x_i - y_j| over all pairs, added up in float64.   x (N, D), y (M, D) -> float"""
    rows = (torch.cdist(part, y).sum(1).cpu().double().sum() for part in x.split(500))
    return sum(rows).item() / len(x) / len(y)
def energy_distance(xs, ys):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs (Szekely & Rizzo 2013; no root is taken): 0
    only for equal distributions.   xs, ys: lists of sets (N, D); each of xs meets each of ys -> their mean"""
    across = [mean_distance(x, y) for x in xs for y in ys]
    return 2 * sum(across) / len(across) - sum(mean_distance(x, x) / len(s) for s in (xs, ys) for x in s)
def fresh_distance(xs):
    """The same for two fresh sets of one distribution, on average. It is not 0, as in N of its N^2 pairs a
    set (N, D) meets itself: 2 m - 2 m (N - 1) / N = 2 m / N, where m = E|X - X'|."""
    return sum(2 * mean_distance(x, x) / (len(x) - 1) for x in xs) / len(xs)

# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """Hold the formulas against each other, and against what the papers print, in float64 on the CPU."""
    torch.manual_seed(0)
    x0, eps, x, dice = torch.randn(4, 5, 7, dtype=torch.float64)
    plans = [Schedule(kind, T) for T in (1000, 11) for kind in ("linear", "scaled", "cosine")]
    check("SNR at T == Lin et al. 2024, Table 1, in dB", [plan.snr(-1) for plan in plans[:3]],
          [10 * math.log10(snr) for snr in (4.035993e-5, 4.681913e-3, 2.428735e-9)], 1e-3)
    chain, at_once = [], []
    for plan in plans:
        signal, variance = 1.0, 0.0                        # of x_0 in x_t, and of the noise in it
        for t, beta in enumerate(plan.beta.tolist()):      # Eq. 2: x_t ~ N(sqrt(1 - beta_t) x_{t-1}, beta_t)
            signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
            chain.append(signal * x0 + math.sqrt(variance) * eps)
            at_once.append(plan.add_noise(x0, eps, t))
    check("x_t at once (Eq. 4) == step by step (Eq. 2)", at_once, chain, 1e-9)
    q, t = plans[0], torch.tensor([2, 3, 500, 999, 1000])
    eps = q.to_x0_eps("x0", x0, x, t)[1]                                # the noise that made this x of x0
    check("posterior mean: Eq. 7 == Eq. 11", [q.posterior_mean(x, x0, t)], [q.mean_from_eps(x, eps, t)], 1e-9)
    check("DDIM, eta = 1 == DDPM", [q.ddim(x, x0, eps, t, t - 1, dice, 1.0)], [q.ddpm(x, x0, t, dice)], 1e-9)
    pairs = [q.to_x0_eps(kind, q.target(kind, x0, eps, t), x, t) for kind in ("v", "eps", "x0")]
    check("v, eps, x_0: each gives the others", sum(map(list, pairs), []), [x0, eps] * 3, 1e-9)

# ------------------------------------------------------------------------------------------------------- Data
def warp(images, affine, shift, elastic):
    """Redraw each image through a smooth random map of its own.   (N, 1, H, W) float -> (N, 1, 28, 28)
    Pixel (x, y), from -1 to 1, is read at (x, y) + sum_k c_k f_k(x, y), c_k normal with the deviation given:
    f = x and y turn, scale and slant, f = 1 shifts, 25 smooth bumps bend (Simard et al. 2003, section 2).
    All N maps are one matrix product; building them one by one takes eight times as long."""
    xy = F.affine_grid(torch.eye(2, 3)[None], (1, 1, 28, 28), align_corners=False).view(784, 2).T
    bumps = F.interpolate(torch.eye(25).view(25, 1, 5, 5), (28, 28), mode="bicubic").view(25, 784)
    f = torch.cat([xy, torch.ones(1, 784), bumps]).to(images.device)                             # (28, 784)
    deviation = torch.tensor([affine] * 2 + [shift] + [elastic] * 25, device=images.device)
    c = deviation * torch.randn(len(images), 2, 28, device=images.device)
    c[:, [0, 1], [0, 1]] += 1
    return F.grid_sample(images, (c @ f).view(-1, 2, 28, 28).permute(0, 2, 3, 1), align_corners=False)
def drawn_digits(n):
    """n digits in Pillow's own font: three weights, warped, dimmed, noised.   (n, 28, 28) uint8, (n) int64"""
    torch.manual_seed(0)                                                    # the same digits for any --seed
    glyphs, images, labels = torch.empty(30, 1, 56, 56), [], torch.randint(10, (n,))
    for i in range(30):
        image, font = Image.new("L", (56, 56)), ImageFont.load_default(40)
        ImageDraw.Draw(image).text((28, 28), str(i % 10), 255, font, "mm", stroke_width=i // 10)
        glyphs[i] = TF.pil_to_tensor(image) / 255
    for part in labels.split(4096):
        ink = warp(glyphs[part + 10 * torch.randint(3, part.shape)], affine=0.15, shift=0.08, elastic=0.06)
        ink = ink * (0.6 + 0.4 * torch.rand(len(part), 1, 1, 1)) + 0.1 * torch.randn_like(ink)
        images.append((255 * ink[:, 0].clamp(0, 1)).byte())
    return torch.cat(images), labels
def load_mnist(folder, tiny):
    """MNIST from `folder`, else downloaded into it, else drawn digits; with --tiny never the network.
    Returns images (N, 28, 28) uint8 and labels (N) int64 to train on, the same to test on, and their name."""
    raw = Path(folder, "MNIST", "raw")
    require(folder == "data" or Path(folder).is_dir(), f"--data {folder}: there is no such folder")
    try:
        if not raw.is_dir() and not tiny:
            socket.setdefaulttimeout(4)                  # a network that swallows packets must not hold us up
            Path(folder).mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as part:
                datasets.MNIST(part, download=True)
                Path(part, "MNIST").replace(raw.parent)
        train, test = datasets.MNIST(folder, train=True), datasets.MNIST(folder, train=False)
        return train.data, train.targets, test.data, test.targets, "MNIST"
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().rpartition("\n")[2] or "no idx file"
        require(not raw.is_dir(), f"--data {folder}: {raw} is broken ({reason}); delete it to download again")
        print(f"no MNIST in {raw} ({reason}). Instead, digits drawn with Pillow's font: another accuracy.")
    images, labels = drawn_digits(3500 if tiny else 70_000)
    n = len(images) * 6 // 7
    return images[:n], labels[:n], images[n:], labels[n:], "drawn digits"
def make_cloud(cfg, device):
    """Returns a function n -> n fresh points (n, 2) of two spirals or of --text, of variance about 1."""
    def spirals(n):
        r, arm = torch.rand(n, 1, device=device).sqrt(), torch.randint(2, (n, 1), device=device) * 4 - 2
        x = arm * r * torch.cat([(9.5 * r).cos(), (9.5 * r).sin()], 1)       # the root spreads them evenly
        return x + 0.04 * torch.randn_like(x)
    if not cfg.text.strip(): return spirals
    page = Image.new("L", (20 + 100 * len(cfg.text), 160))
    ImageDraw.Draw(page).text((10, 80), cfg.text, 255, ImageFont.load_default(100), "lm")
    ink = TF.pil_to_tensor(page)[0].nonzero().flip(1) * torch.tensor([1.0, -1.0])              # (pixels, 2)
    unit = ink.var(0).mean().sqrt().item()                                   # so that the variance is 1
    ink = ((ink - ink.mean(0)) / unit).to(device)
    return lambda n: ink[torch.randint(len(ink), (n,))] + (torch.rand(n, 2, device=device) - 0.5) / unit

# --------------------------------------------------------------------------------------------------- Training
def train(model, schedule, cloud, cfg, device):
    """Algorithm 1: least squares at random t.   Returns (seconds, a running average of the model)."""
    average, started = copy.deepcopy(model), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0, fused=True)
    for step in range(1, cfg.steps + 1):
        done = step / cfg.steps                        # the learning rate rises, then falls as a cosine does
        optimizer.param_groups[0]["lr"] = cfg.lr * min(done / 0.02, 0.5 + 0.5 * math.cos(math.pi * done))
        x0, place = cloud(cfg.batch), (torch.arange(cfg.batch) + torch.rand(cfg.batch)) / cfg.batch
        t = 1 + (place * schedule.T).long().clamp(max=schedule.T - 1)     # 1 ... T, stratified: less variance
        eps = torch.randn_like(x0)
        answer = model(schedule.add_noise(x0, eps, t), t.to(device))
        loss = F.mse_loss(answer, schedule.target(cfg.target, x0, eps, t))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        for kept, w in zip(average.parameters(), model.parameters()):
            kept.data.lerp_(w.data, max(0.005, 1 / step))
        if step % max(1, cfg.steps // 20) == 0:
            loss, rate = loss.item(), step / (time.perf_counter() - started)
            if not math.isfinite(loss): sys.exit(f"step {step}: the loss is {loss}; try a lower --lr")
            print(f"step {step:5d}/{cfg.steps} | loss {loss:.4f} | {(cfg.steps - step) / rate:.0f} s left")
    return time.perf_counter() - started, average

# --------------------------------------------------------------------------------------------------- Pictures
def draw_digit(digit, T):
    """A digit (28, 28) uint8 at ten times under each schedule, always with the same noise; the SNR below."""
    page, font, x0 = Image.new("RGB", (1130, 570), "white"), ImageFont.load_default(14), digit / 127.5 - 1
    pen, eps = ImageDraw.Draw(page), torch.randn_like(x0)
    pen.text((20, 12), f"A digit on its way into noise: signal to noise at t, T = {T}", "black", font)
    plans = [(kind, Schedule(kind, T)) for kind in ("linear", "scaled", "cosine")]
    plans += [("scaled,\nzero SNR", Schedule("scaled", T, zero_snr=True)),
              ("linear, not\nrescaled to T", Schedule("linear", T, rescale=False))]
    for (row, (name, plan)), k in itertools.product(enumerate(plans), range(10)):
        t, x, y = round(T * k / 9), 120 + 100 * k, 46 + 104 * row
        image = TF.to_pil_image((plan.add_noise(x0, eps, t) / 2 + 0.5).clamp(0, 1))
        page.paste(image.resize((84, 84), Image.NEAREST), (x, y))
        pen.text((x + 42, y + 92), f"{plan.snr(t):.0f} dB at {t}" if t else "clean", "firebrick", font, "mm")
        if k == 0: pen.text((20, y + 30), name, "black", font)
    return page
def panel(points, size):
    """Where points (N, 2) between -3 and 3 lie: the darker, the more of them.   -> picture, size x size"""
    place = ((points.cpu() * torch.tensor([1, -1]) + 3) / 6 * size).long()
    place = place[((place >= 0) & (place < size)).all(1)] @ torch.tensor([1, size])
    count = place.bincount(minlength=size**2).view(1, size, size) * size**2 / len(points)
    blurred = F.avg_pool2d(F.avg_pool2d(count, 3, 1, 1), 3, 1, 1)
    return TF.to_pil_image((-blurred / 8).exp())
def draw(way, fresh, shape, ratio):
    """The cloud at six times of its way back, and the true one."""
    page, font = Image.new("RGB", (1480, 270), "white"), ImageFont.load_default(15)
    pen = ImageDraw.Draw(page)
    pen.text((20, 12), f"From noise to {shape}: {ratio:.2f} x the distance of two fresh sets", "black", font)
    stills = [way[-1 - round(share * (len(way) - 1))] for share in (1, 0.4, 0.2, 0.1, 0.05, 0)]
    for k, (t, x) in enumerate([*((f"t = {t}", x) for t, x in stills), ("fresh data", fresh)]):
        page.paste(panel(x, 200), (20 + 208 * k, 40))
        pen.text((120 + 208 * k, 254), t, "firebrick", font, "mm")
    return page

# ---------------------------------------------------------------- Plumbing, the same wherever a week needs it
def require(ok, message):
    """For what the user can put right: one line on stderr, and exit code 2."""
    if not ok: argparse.ArgumentParser().exit(2, f"error: {message}\n")
def parse_config(config, tiny, argv=None):
    """Flags from the fields of a dataclass, --help from its source; --tiny sets `tiny`, other flags win."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.format_help = lambda: f"{__doc__}\n{inspect.getsource(config)}"
    parser.error = lambda message: require(False, f"{message} (--help lists all flags)")
    for f in fields(config):
        kind = dict(type=type(f.default), choices=get_args(f.type) or None)
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else kind
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    return config(**{**(tiny if given.get("tiny") else {}), **given})
def pick_device(name):
    """auto = cuda if there is one, else cpu.  mps only by name: it can be wrong without an error."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError) as error:
        require(False, f"--device {name}: {str(error).splitlines()[0]}; try auto, cpu, cuda, cuda:1, mps")
def check(claim, ours, reference, tol):
    """Print the largest difference between two lists of tensors; where it is too large, exit with code 1."""
    pairs = zip(ours, reference, strict=True)
    worst = max((torch.as_tensor(a) - b).abs().max().nan_to_num(math.inf).item() for a, b in pairs)
    print(f"{'ok' if worst <= tol else 'FAIL':4} {claim:51} max|diff| {worst:.1e}  (tol {tol:.0e})")
    if worst > tol: sys.exit(1)
def save(folder, name, write):
    """write(temporary), then rename, into a folder that is new or this script's own: never half a file."""
    out, part = Path(folder), Path(folder, f".{os.getpid()}-{name}")
    mark = out / f".{Path(__file__).stem}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        require(mark.exists() or not any(out.glob("[!.]*")), f"--out {folder}: holds files of something else")
        mark.touch()
        write(part)
        part.replace(out / name)
    except OSError as error:
        require(False, f"--out {folder}: cannot write {name} ({error.strerror})")
    finally:
        if part.exists(): part.unlink()
def finish(cfg, device, result, **context):
    """Write metrics.json, print the RESULT line, return the result."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if peak is None and os.name == "posix":
        import resource                                                      # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    context.update(config=asdict(cfg), device=str(device), torch=torch.__version__, peak_bytes=peak)
    save(cfg.out, "metrics.json", lambda part: part.write_text(json.dumps({**result, **context}, indent=1)))
    print("RESULT", *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items()))
    return result
# ------------------------------------------------------------------------------------------------------- Main
def main(cfg):
    """Check, dissolve a digit, learn the way back, walk it, measure, draw.  Returns the figures of RESULT."""
    for flag, low in dict(seed=0, timesteps=2, calls=0, width=1, layers=1, batch=1, steps=1, lr=1e-9).items():
        require(low <= getattr(cfg, flag) < 2**40, f"--{flag} {getattr(cfg, flag)}: must be at least {low}")
    require(cfg.calls <= cfg.timesteps * (cfg.sampler == "ddim"),
            f"--calls {cfg.calls}: must be at most --timesteps {cfg.timesteps}, and needs --sampler ddim")
    require(len(cfg.text) <= 40 and cfg.text.isprintable(), f"--text {cfg.text[:40]!r}: 40 letters at most")
    require(not cfg.zero_snr or cfg.target != "eps", "--target eps: no use where --zero-snr makes x_T = eps")
    clash = dict(rescale=cfg.schedule == "cosine", noise=cfg.sampler == "ddim").get(cfg.ablate)
    require(not clash, f"--ablate {cfg.ablate}: --schedule cosine has no rescaling, --sampler ddim no noise")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    run_checks()
    cloud, shape = make_cloud(cfg, device), cfg.text or "two spirals"
    *_, digits, _, name = load_mnist(cfg.data, cfg.tiny)
    torch.manual_seed(cfg.seed)
    save(cfg.out, "forward.png", draw_digit(digits[0], cfg.timesteps).save)
    schedule = Schedule(cfg.schedule, cfg.timesteps, cfg.zero_snr, cfg.ablate != "rescale")
    model = Denoiser(cfg.timesteps, cfg.width, cfg.layers).to(device)
    print(f"week 5 | {device} | torch {torch.__version__} | data: {shape}, {name} | weights: from scratch")
    seconds, model = train(model, schedule, cloud, cfg, device)
    n, started = 1000 if cfg.tiny else 10_000, time.perf_counter()
    ways = [sample(model, schedule, cfg, n, device) for _ in range(4)]
    per_set, fresh = (time.perf_counter() - started) / len(ways), [cloud(n) for _ in range(8)]
    normal = torch.distributions.MultivariateNormal(fresh[0].mean(0), torch.cov(fresh[0].T))
    floor, ours = fresh_distance(fresh), energy_distance([way[-1][1] for way in ways], fresh)
    result = dict(ratio=ours / floor, energy_distance=ours, floor_distance=floor,
                  baseline_distance=energy_distance([normal.sample((n,)) for _ in ways], fresh),
                  train_seconds=seconds, sample_seconds=per_set, alpha_bar_T=schedule.alpha_bar[-1].item(),
                  kl_at_T=schedule.kl_to_normal(fresh[0].cpu()).mean().item())
    save(cfg.out, "reverse.png", draw(ways[0], fresh[0], shape, ours / floor).save)
    film = [panel(x, 320) for _, x in ways[0][:: 1 + len(ways[0]) // 50] + ways[0][-1:]]
    save(cfg.out, "flow.gif", lambda part: film[0].save(
        part, save_all=True, append_images=film[1:], duration=[60] * (len(film) - 1) + [2000], loop=0))
    weights = safetensors.torch.save(model.cpu().state_dict())
    save(cfg.out, "denoiser.safetensors", lambda part: part.write_bytes(weights))
    return finish(cfg, device, result, data=f"{shape}, {name}", weights="from scratch")

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
