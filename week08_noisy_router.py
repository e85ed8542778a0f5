# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "safetensors>=0.4.5", "pillow>=10.1"]
# ///
"""Week 8: digits on demand by guided diffusion, and a planner that loads the expert for a request.
Papers: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance"; Salimans & Ho 2022 for v; Song et al. 2021.
The idea: x = cos(phi) x_0 + sin(phi) eps turns digits into noise as phi goes from 0 to pi / 2. A network that
is told the digit guesses v = dx / dphi. Guidance extrapolates: v_none + w (v_y - v_none).

    python week08_noisy_router.py                                 # train, compare: out/week08/digits.png
    python week08_noisy_router.py --draw 0123456789 --guidance 2  # ten of each, by the saved experts
    torchrun --nproc_per_node=2 week08_noisy_router.py            # data-parallel, in two processes

Expected: 99.4 % of the experts' digits read as asked by its own judge (99.2 to 99.7, seeds 1337, 1, 2), 67 s
of training on two cores. Restored from noise of 0.5: by one generalist 20.71 dB, by experts 20.66.
"""
import argparse, copy, inspect, itertools, json, math, os, random, socket, sys, tempfile, time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args
import safetensors.torch, torch
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
    out: str = "out/week08"    # folder for everything that is written
    data: str = "data"         # folder with MNIST/raw; where there is none, MNIST is downloaded into it
    width: int = 64            # channels at a quarter of the image's size; 3/8 of it at half the size
    steps: int = 4800          # optimizer steps: 7/10 for all, 3/10 for the generalist, or for all experts
    batch: int = 32            # images per step, over all processes
    experts: Literal[1, 2, 5, 10] = 5      # specialists, for 10 / experts digits each
    guidance: float = 1.4      # w: 1 = none, more = clearer digits that differ less
    calls: int = 20            # of the network, for a digit
    sure: float = 0.8          # the planner abstains below this probability: then the generalist works
    budget: float = 3.0        # megabytes of networks that may be held at a time
    draw: str = ""             # do not train: draw ten of each of these digits
    resume: bool = False       # go on with a run that was stopped, after the last network that was finished
TINY = dict(width=16, steps=80, calls=4, experts=2, budget=0.2)
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # set by torchrun
NONE, LEVELS = 10, (0.1, 0.25, 0.5, 1.0, 2.0)    # the label of no digit; deviations of noise to measure at
# -------------------------------------------------------------------------------------- Diffusion as an angle
# N images x (N, 1, 28, 28), angles phi (N, 1, 1, 1): 0 is clean, pi / 2 noise; digits y (N), 10 = not told.
def mix(x0, eps, phi):
    """x_phi = cos(phi) x_0 + sin(phi) eps, and v = dx_phi / dphi = cos(phi) eps - sin(phi) x_0 (Salimans & Ho
    2022, section 4): week 5 with alpha_bar = cos(phi)^2. At pi / 2 no x_0 is left (cf. Lin et al. 2024)."""
    return phi.cos() * x0 + phi.sin() * eps, phi.cos() * eps - phi.sin() * x0
def unmix(x, v, phi):
    """x_0 and eps.   (x, v) is (x_0, eps) turned by phi: turn it back."""
    return phi.cos() * x - phi.sin() * v, phi.sin() * x + phi.cos() * v
def sample(net, x, y, w, calls, eta=1.0):
    """Noise x to x_0, phi from pi / 2 to 0: guess x_0 and eps, mix them with less noise. Of it eta is fresh,
    which washes out mistakes (Song et al. 2021, Eq. 12 and 16; eta = 1 is DDPM). Both guesses of v are one
    batch, and w overdoes their difference (Ho & Salimans 2022, whose w is this one less 1)."""
    for i in range(calls, 0, -1):
        phi, psi = (torch.full_like(x[:, :1, :1, :1], j / calls * math.pi / 2) for j in (i, i - 1))
        v, v_none = net(*(torch.cat(pair) for pair in ((x, x), (phi, phi), (y, y * 0 + NONE)))).chunk(2)
        x0, eps = unmix(x, v_none + w * (v - v_none), phi)
        fresh = eta * psi.sin() / phi.sin() * (1 - (phi.cos() / psi.cos()) ** 2).sqrt()
        x = psi.cos() * x0 + (psi.sin() ** 2 - fresh**2).clamp(0).sqrt() * eps + fresh * torch.randn_like(x)
    return x
def with_noise(x, noise):
    """Images whose pixels got noise of this deviation, as x_phi: tan(phi) = 1.6 noise.   -> x_phi, phi"""
    phi = torch.full_like(x[:, :1, :1, :1], math.atan(1.6 * noise))
    return mix(x, torch.randn(x.shape).to(x), phi)[0], phi
# Pixels from 0 to 1 get mean 0 and deviation 0.5: as -1 to 1 they are much harder to learn.
to_x, to_pixels = lambda pixels: 1.6 * (pixels - 0.13), lambda x: (x / 1.6 + 0.13).clamp(0, 1)
# --------------------------------------------------------------------------------------------------- Networks
class Block(nn.Module):
    """x + conv(silu(gain * conv(silu(x)) + bias)), gain and bias by what it is told (N, 64). Starts as x."""
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.told = nn.Linear(64, 2 * channels)
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="linear")
        for w in (*self.conv2.parameters(), *self.told.parameters()): nn.init.zeros_(w)
    def forward(self, x, told):
        gain, bias = self.told(told)[:, :, None, None].chunk(2, 1)
        return x + self.conv2(F.silu(self.conv1(F.silu(x)) * (1 + gain) + bias))
class ClassUNet(nn.Module):
    """A guess of v.   x_phi (N, 1, 28, 28), phi (N, 1, 1, 1), y (N) int64 -> (N, 1, 28, 28)
    As in week 6, but 2 x 2 pixels enter as four channels, at a quarter of the cost. The digit is told to each
    block and, as a learned picture of C x 7 x 7, to the deepest layers."""
    def __init__(self, width):
        super().__init__(); half = width * 3 // 8
        self.angle, self.digit = nn.Linear(32, 64), nn.Embedding(11, 64)
        self.picture, self.enter = nn.Embedding(11, width * 49), nn.Conv2d(4, half, 3, padding=1)
        self.down, self.up = nn.Conv2d(half, width, 2, stride=2), nn.ConvTranspose2d(width, half, 2, 2)
        self.encoder, self.decoder, self.leave = Block(half), Block(half), nn.Conv2d(half, 4, 3, padding=1)
        self.deep = nn.ModuleList(Block(width) for _ in range(3))
        for w in (*self.leave.parameters(), self.picture.weight): nn.init.zeros_(w)
        self.to(memory_format=torch.channels_last)                        # on CPUs, too: 1.6 times as fast
    def forward(self, x, phi, y):
        turns = phi.flatten(1) * torch.arange(1, 17, device=x.device)
        told = F.silu(self.angle(torch.cat([turns.sin(), turns.cos()], 1)) + self.digit(y))
        skip = self.encoder(self.enter(F.pixel_unshuffle(x, 2)), told)                       # (N, C', 14, 14)
        x = self.down(skip) + self.picture(y).view(len(x), 7, 7, -1).permute(0, 3, 1, 2)     # (N, C, 7, 7)
        for block in self.deep: x = block(x, told)
        return F.pixel_shuffle(self.leave(F.silu(self.decoder(self.up(x) + skip, told))), 2).float()
def reader():
    """x_phi, phi as channels (N, 2, 28, 28) -> ten scores.   Two are trained: a judge, a planner."""
    conv = lambda i, o, stride: [nn.Conv2d(i, o, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(nn.PixelUnshuffle(2), *conv(8, 32, 1), *conv(32, 64, 2), *conv(64, 64, 2),
                         nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))
read = lambda net, x, phi: net(torch.cat([x, phi.expand(x.shape)], 1)).float()
# ----------------------------------------------------------------------- The planner and its shelf of experts
class Shelf:
    """Networks in files, loaded when asked for: shelf(k) is expert k, shelf(-1) the generalist. If the budget
    would not hold one more, what was not used for longest goes first. log: bytes held, after each call."""
    def __init__(self, cfg, device):
        self.cfg, self.device, self.held, self.log, self.load_ms = cfg, device, {}, [], []
    def __call__(self, k):
        started, net = time.perf_counter(), self.held.pop(k, None)
        if net is None:
            net = ClassUNet(self.cfg.width).to(self.device).requires_grad_(False)
            size, room, name = size_of(net), 1e6 * self.cfg.budget, name_of(k, self.cfg)
            require(size <= room, f"--budget {self.cfg.budget}: one network has {size / 1e6:.2g} megabytes")
            while (len(self.held) + 1) * size > room: del self.held[next(iter(self.held))]
            try: net.load_state_dict(safetensors.torch.load_file(Path(self.cfg.out, name)))
            except (OSError, RuntimeError, safetensors.SafetensorError) as error:
                require(False, f"--out {self.cfg.out}: {name}: {' '.join(str(error).split())}")
            self.load_ms.append(1e3 * (time.perf_counter() - started))
        self.held[k] = net                                      # now the last: a dict keeps the order
        self.log.append(len(self.held) * size_of(net))
        return net
size_of = lambda net: sum(w.nbytes for w in net.parameters())
name_of = lambda k, cfg: f"{f'expert{k + 1}of{cfg.experts}' if k >= 0 else 'generalist'}.safetensors"
team_of = lambda y, cfg: y * cfg.experts // 10                               # neighbours share an expert
def plan(planner, x, phi, cfg):
    """Who restores x_phi, as which digit?   -> p (N, 10), expert (N), y (N), the likeliest of its digits
    Where p gives too little to the digits of any expert: the generalist, -1, and no digit."""
    p, teams = read(planner, x, phi).softmax(1), team_of(torch.arange(10, device=x.device), cfg)
    trust, expert = (p @ (teams[:, None] == torch.arange(cfg.experts, device=x.device)).to(p)).max(1)
    y, unsure = (p * (teams == expert[:, None])).argmax(1), trust < cfg.sure
    return p, expert.masked_fill(unsure, -1), y.masked_fill(unsure, NONE)
def each(shelf, expert, work, *inputs):
    """work(network, *inputs), each image by its expert (N).   -> pixels (N, 1, 28, 28)"""
    out = torch.empty_like(inputs[0])
    for k in expert.unique().cpu().tolist():
        for i in (expert == k).nonzero()[:, 0].split(100): out[i] = work(shelf(k), *(t[i] for t in inputs))
    return to_pixels(out)
see = lambda net, x, phi, y: unmix(x, net(x, phi, y), phi)[0]          # the x_0 that a network sees in x_phi
clean = lambda shelf, expert, y, x, phi: each(shelf, expert, see, x, phi, y)
paint = lambda shelf, expert, y, cfg: each(shelf, expert, lambda net, eps, y: sample(
    net, eps, y, cfg.guidance, cfg.calls), torch.randn(len(y), 1, 28, 28).to(y.device), y)
def frechet(a, b):
    """|m - n|^2 + tr(A + B - 2 (A B)^(1/2)), a (N, D) of mean m, covariance A (Heusel et al. 2017)"""
    (A, m), (B, n) = ((torch.cov(t.T), t.mean(0)) for t in (a.cpu().double(), b.cpu().double()))
    cross = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()           # the trace of a root of A B
    return ((m - n).square().sum() + A.trace() + B.trace() - 2 * cross).item()
# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """Hold the formulas against closed forms, in float64 on the CPU."""
    torch.manual_seed(0)
    x0, eps, phi = *torch.randn(2, 5, 1, 2, 3).double(), torch.rand(5, 1, 1, 1).double()
    x, v = mix(x0, eps, phi)
    check("x_0 and eps from x_phi and v", [*unmix(x, v, phi)], [x0, eps], 1e-12)
    check("v == dx_phi / dphi", [v], [(mix(x0, eps, phi + 1e-7)[0] - x) / 1e-7], 1e-6)
    means, s, y = torch.tensor([2.0, 2, 2, 5] + 7 * [2]).double(), 0.7, torch.full((5,), 3)
    def exact(x, phi, y):                  # E[v | x_phi], if pixels of digit y are N(means[y], s^2)
        c, n, m = phi.cos(), phi.sin(), means[y].view(-1, 1, 1, 1)
        return c * n * (1 - s**2) / (c**2 * s**2 + n**2) * (x - c * m) - n * m
    ends = [sample(exact, eps, y, w, 400, 0) for w in (0, 1, 3)]
    check("samples end at m + w (m_3 - m) + s noise", ends, [2 + 3 * w + s * eps for w in (0, 1, 3)], 1e-2)
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
# --------------------------------------------------------------------------------------------------- Training
# Dice for one purpose: they depend on --seed and the purpose, not on what was drawn before.
seed = lambda cfg, *what: torch.manual_seed(random.Random(f"{cfg.seed} {what}").getrandbits(63))
pack = lambda named, **run: safetensors.torch.save({k: t.cpu().contiguous() for k, t in named.items()}, run)
# E |v_guess - v|^2, where one in ten is not told its digit; and the cross-entropy of the digit that is read.
denoising = lambda net, x, v, phi, y, told: F.mse_loss(net(x, phi, told), v)
reading = lambda net, x, v, phi, y, told: F.cross_entropy(read(net, x, phi), y)
def train(name, net, loss, x, y, steps, lr, cool, cfg, top=math.pi / 2):
    """Train a copy of net at angles up to top.   -> average of its weights (Polyak & Juditsky 1992), seconds
    The learning rate rises for a tenth of the steps, and falls to 0 over the last `cool`, a share of them."""
    net, average = (copy.deepcopy(net).to(x.device).requires_grad_(learns) for learns in (True, False))
    run = " ".join(map(str, (cfg.seed, cfg.width, cfg.batch, cfg.steps, cfg.experts, steps, x.mean().item())))
    done, B, started, shown = Path(cfg.out, name), cfg.batch, time.perf_counter(), 0
    try:
        known = cfg.resume and done.exists() and safetensors.safe_open(done, "pt").metadata() == {"run": run}
        if known: average.load_state_dict(safetensors.torch.load_file(done))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        require(False, f"--resume: {done} is broken ({' '.join(str(error).split())}); delete it first")
    guess = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), lr, (0.9, 0.99), fused=True)
    for step in range(steps if known else 1, steps + 1):
        seed(cfg, name, step); share = ((torch.arange(B) + torch.rand(B)) / B).clamp(1e-4, 1 - 1e-4)  # evenly
        phi = top * (1.2 * torch.special.ndtri(share) + 0.4).sigmoid()[:, None, None, None]    # most of them
        i, untold, eps = torch.randint(len(x), (B,)), torch.rand(B) < 0.1, torch.randn(B, 1, 28, 28)
        if known: return average, 0.0       # with the dice as they were: the next network begins with them
        i, untold, eps, phi = (t[RANK::WORLD].to(x.device) for t in (i, untold, eps, phi))
        error = loss(guess, *mix(x[i], eps, phi), phi, y[i], y[i].masked_fill(untold, NONE))
        optimizer.param_groups[0]["lr"] = lr * min(10 * step / steps, 1, (steps + 1 - step) / steps / cool)
        optimizer.zero_grad(); error.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5); optimizer.step()      # one bad batch must not end it
        for kept, w in zip(average.parameters(), net.parameters()): kept.lerp_(w.data, 8 / (7 + step))
        if step % 10 == 0 and time.perf_counter() > shown + 1 or step == steps:
            shown, error, seconds = time.perf_counter(), error.item(), time.perf_counter() - started
            if not math.isfinite(error): sys.exit(f"{name} {step}: the loss is {error}; try another --seed")
            print(f"{name[:-12]:10} {step:5d}/{steps} | loss {error:.4f} | {B * step / seconds:,.0f} img/s | "
                  f"{seconds * (steps / step - 1):.0f} s left")
    if not RANK: save(cfg.out, name, lambda part: part.write_bytes(pack(average.state_dict(), run=run)))
    return average, time.perf_counter() - started
# ------------------------------------------------------------------------------------- Measuring and pictures
def evaluate(shelf, judge, planner, x, y, test, test_y, cfg):
    """1,000 digits drawn, 1,000 restored, by the generalist and by experts.   -> figures, table, samples"""
    asked, result, table = torch.arange(10, device=x.device).repeat_interleave(100), {}, {}
    features = lambda t: torch.cat([judge[:-1](torch.cat([part, part * 0], 1)) for part in t.split(1000)])
    real, seen = features(torch.cat([x[y == d][:100] for d in range(10)])), features(test)
    right = lambda scores, y: (scores.argmax(1) == y).float().mean().item()
    for who, expert in ("generalist_", asked * 0 - 1), ("", team_of(asked, cfg)):
        seed(cfg, "samples"); samples = dict(images=paint(shelf, expert, asked, cfg), labels=asked)
        f = features(to_x(samples["images"]))
        result |= {who + "sample_accuracy": right(judge[-1](f), asked), who + "frechet_distance":
                   frechet(f, seen), who + "frechet_ratio": frechet(f, seen) / frechet(real, seen)}
    x, y, nobody = test[:1000], test_y[:1000], test_y[:1000] * 0 - 1
    for level in LEVELS:
        seed(cfg, level); x_phi, phi = with_noise(x, level); p, expert, digit = plan(planner, x_phi, phi, cfg)
        row = table[level] = dict(planner_accuracy=right(p, y), abstained=(expert < 0).float().mean().item())
        for name, *route in (("alone", nobody, nobody * 0 + NONE), ("generalist", nobody, digit),
                             ("experts", expert, digit), ("oracle", team_of(y, cfg), y),
                             ("random", torch.randint(cfg.experts, y.shape).to(y), digit)):
            error = clean(shelf, *route, x_phi, phi) - to_pixels(x)
            row["psnr_" + name] = -10 * error.square().mean().log10().item()
        print(f"noise {level}", *(f"| {name} {value:.4g}" for name, value in row.items()))
    return result | table[0.5] | dict(judge_accuracy=right(judge[-1](seen), test_y)), table, samples
def draw(images, shelf, planner, test, cfg):
    """Ten of each digit; noisy digits, what the planner reads in them, what comes back."""
    pen, font = ImageDraw.Draw(page := Image.new("RGB", (960, 470), "white")), ImageFont.load_default
    pen.text((20, 14), "Drawn on request", "black", font(16))
    pen.text((450, 14), "Noise of 0.5, what the planner reads, restored, clean", "black", font(16))
    paste = lambda image, size, *place: page.paste(TF.to_pil_image(image.cpu()).resize((size, size)), place)
    for i in range(100): paste(images[10 * i], 40, 20 + 40 * (i % 10), 50 + 40 * (i // 10))
    x, phi = with_noise(test[:6], 0.5); p, *route = plan(planner, x, phi, cfg)
    rows = to_pixels(x / phi.cos()), clean(shelf, *route, x, phi), to_pixels(test[:6])
    for i, k in itertools.product(range(6), range(10)):
        if k < 3: paste(rows[k][i], 60, (450, 800, 870)[k], 50 + 68 * i)
        x, y = 525 + 20 * k, 95 + 68 * i
        pen.fill = "navy" if route[0][i].item() in (-1, team_of(k, cfg)) else "silver"
        pen.rectangle([x, y - 44 * p[i, k].item(), x + 15, y], pen.fill)
        pen.text((x + 8, y + 9), str(k), pen.fill, font(12), "mm")
    return page
def serve(cfg, device):
    """--draw, with the experts in --out."""
    shelf, started = Shelf(cfg, device), time.perf_counter()
    y = torch.tensor([int(c) for c in cfg.draw], device=device).repeat_interleave(10)
    rows = paint(shelf, team_of(y, cfg), y, cfg).view(-1, 10, 28, 28).transpose(1, 2).reshape(-1, 280).cpu()
    save(cfg.out, "drawn.png", TF.to_pil_image(rows).resize((1120, 4 * len(rows))).save)
    print(f"RESULT digits={len(y)} loads={len(shelf.load_ms)} seconds={time.perf_counter() - started:.2f}")
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
    """Check; then serve, or train, measure and draw.  Returns the figures of the RESULT line."""
    for flag, low in dict(seed=0, width=4, steps=20, batch=1, guidance=0, calls=1, sure=0, budget=0).items():
        require(low <= getattr(cfg, flag) < 2**40, f"--{flag} {getattr(cfg, flag)}: must be at least {low}")
    require(cfg.batch % WORLD == 0, f"--batch {cfg.batch}: must be a multiple of the {WORLD} processes")
    require(set(cfg.draw) <= set("0123456789"), f"--draw {cfg.draw}: must be digits")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    run_checks()
    if cfg.draw: return serve(cfg, device)
    if WORLD > 1 and device.type == "cuda": torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if WORLD > 1: torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK: sys.stdout = open(os.devnull, "w")
    *tensors, data = load_mnist(cfg.data, cfg.tiny)
    x, y, test, test_y = (t.to(device) if t.ndim == 1 else to_x(t[:, None].to(device) / 255) for t in tensors)
    print(f"week 8 | {device}, float32 | torch {torch.__version__} | data: {data} | weights: from scratch")
    seed(cfg, "weights"); early, short = cfg.steps * 7 // 10, 40 if cfg.tiny else 1600
    judge = train("judge.safetensors", reader(), reading, x, y, short, 3e-3, 0.9, cfg, top=0)[0]
    planner = train("planner.safetensors", reader(), reading, x, y, short, 3e-3, 0.9, cfg)[0]
    # Here the ways part: the rest of the steps goes to one generalist or, in equal shares, to the experts.
    trunk, seconds = train("trunk.safetensors", ClassUNet(cfg.width), denoising, x, y, early, 4e-3, 1e-9, cfg)
    train(name_of(-1, cfg), trunk, denoising, x, y, cfg.steps - early, 4e-3, 1, cfg)
    for k in range(cfg.experts):     # in a few steps little is learned at a high rate, but much forgotten
        own, steps = (t[team_of(y, cfg) == k] for t in (x, y)), (cfg.steps - early) // cfg.experts
        seconds += train(name_of(k, cfg), trunk, denoising, *own, steps, 2e-3, 1, cfg)[1]
    if RANK: return {}
    shelf = Shelf(cfg, device)
    result, table, samples = evaluate(shelf, judge, planner, x, y, test, test_y, cfg)
    save(cfg.out, "samples.safetensors", lambda part: part.write_bytes(pack(samples)))
    for i in range(100):                                    # requests, to draw and to restore by turns
        j = torch.randint(len(test), (1,)).to(device); x, phi = with_noise(test[j], LEVELS[i % 5])
        if i % 2: paint(shelf, team_of(test_y[j], cfg), test_y[j], cfg)
        else: clean(shelf, *plan(planner, x, phi, cfg)[1:], x, phi)
    save(cfg.out, "digits.png", draw(samples["images"], shelf, planner, test, cfg).save)
    result |= dict(train_seconds=seconds, load_ms=sorted(shelf.load_ms)[len(shelf.load_ms) // 2],
                   loads=len(shelf.load_ms), expert_bytes=size_of(trunk), parameters=size_of(trunk) // 4)
    return finish(cfg, device, result, data=data, weights="from scratch", table=table, held=shelf.log[-100:])
if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
