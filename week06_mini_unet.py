# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "safetensors>=0.4.5", "pillow>=10.1"]
# ///
"""Week 6: a mini U-Net that takes noise of any strength off small images, and what its parts are for.

Papers: Ronneberger et al. 2015 (the U), Wu & He 2018 (group norm), Karras et al. 2022 (one net, all levels).
The idea: y = x + sigma n, and the guess with the least squared error is E[x | y]. A network trained to give x
learns it. On the halved image it sees the whole digit; skips carry past the narrow part what does not fit.

    python week06_mini_unet.py                     # trains, compares, draws: out/week06/unet.png
    python week06_mini_unet.py --ablate skips      # and what is lost without the skip connections
    python week06_mini_unet.py --signal            # the same network with Conv1d, on waveforms

Expected: 19.25 dB PSNR on the test digits at sigma 0.5 (19.23 to 19.27, seeds 1337, 1, 2), trained for 55 s
on one core. Noisy: 9.35, best blur 15.19, best linear map 17.55; without skips 19.04, without depth 18.63.
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
    out: str = "out/week06"    # folder for everything that is written
    data: str = "data"         # folder with MNIST/raw; where there is none, MNIST is downloaded into it
    size: int = 16             # height and width of the images: a multiple of 4
    signal: bool = False       # waveforms of size * size samples instead of images
    width: int = 32            # channels at half resolution, twice as many at a quarter: a multiple of 4
    steps: int = 2600          # optimizer steps
    batch: int = 48            # images per step
    lr: float = 5e-3           # peak learning rate, reached after 5 % of the steps
    ablate: Literal["none", "skips", "residual", "depth", "skips+residual"] = "none"  # train one without, too
TINY = dict(width=8, steps=80, batch=32)
LEVELS = (0.05, 0.1, 0.25, 0.5, 1.0)   # deviations of the noise that are shown; pixels go from 0 to 1
# ------------------------------------------------------------------------------------------------------ Parts
# N images in a batch, C channels, H x W pixels (a waveform: T samples), sigma (N): a noise level for each.
def group_norm(x, groups, weight, bias):
    """(x - mean) / sqrt(variance + eps) over C / groups channels and all places of one image (Wu & He 2018,
    Eq. 1, 2, 7), then gain and bias per channel.   x (N, C, ...) -> same.   No image sees another, unlike in
    batch norm. To read and to check: with this, not torch's, a step takes half as long again."""
    y, channel = x.reshape(len(x), groups, -1), (-1,) + (1,) * (x.ndim - 2)
    y = (y - y.mean(-1, keepdim=True)) * (y.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    return y.reshape(x.shape) * weight.view(channel) + bias.view(channel)
class ResBlock(nn.Module):
    """x + conv(silu(gain * norm(conv(silu(norm(x)))) + bias)).   x (N, I, ...), level (N, 64) -> (N, O, ...)
    Residual: He et al. 2016, Eq. 1; it starts as its shortcut. The noise level sets gain and bias (Dhariwal &
    Nichol 2021, section 3.1), so that one network can sharpen at low noise and smooth at high."""
    def __init__(self, conv, inputs, outputs):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1, self.conv2 = conv(inputs, outputs, 3, padding=1), conv(outputs, outputs, 3, padding=1)
        self.level = nn.Linear(64, 2 * outputs)
        self.short = conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        for w in self.conv2.parameters(): nn.init.zeros_(w)
    def forward(self, x, level):
        gain, bias = self.level(level).view(len(x), -1, *[1] * (x.ndim - 2)).chunk(2, 1)
        y = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + gain) + bias
        return self.short(x) + self.conv2(F.silu(y))
# -------------------------------------------------------------------------------------------------- The U-Net
class MiniUNet(nn.Module):
    """D(y, sigma) = c_skip y + c_out F(c_in y, log sigma) (Karras et al. 2022, Eq. 7).   y (N, 1, H, W)
      y 16x16x1 ------------------------------ c_skip y: the residual ------------------------------ + -> D
        enter: 8x8x32 -> encoder ------------------- skip ------------------- cat -> decoder -> leave
                  down: 4x4x64 -> bottleneck -> up: 8x8x32
    dims = 1 or 2: Conv1d or Conv2d. H and W must divide by 4. mean and std: of the pixels of clean images.
    What --ablate takes away carries zeros: the same shapes, the same steps, the same time."""
    def __init__(self, width, dims, mean, std, ablate="none"):
        super().__init__()
        conv, up = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d))[dims - 1]
        self.keeps = {idea: idea not in ablate for idea in ("skips", "residual", "depth")}
        for key, v in (("mean", mean), ("std", std)): self.register_buffer(key, torch.tensor(float(v)))
        self.level = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        # At full resolution each convolution would cost four times as much: the first step halves at once.
        self.enter, self.encoder = conv(1, width, 6, stride=2, padding=2), ResBlock(conv, width, width)
        self.down, self.up = conv(width, 2 * width, 2, stride=2), up(2 * width, width, 2, stride=2)
        self.bottleneck, self.decoder = ResBlock(conv, 2 * width, 2 * width), ResBlock(conv, 2 * width, width)
        self.norm, self.leave = nn.GroupNorm(4, width), up(width, 1, 6, stride=2, padding=2)
        for w in self.leave.parameters(): nn.init.zeros_(w)
    def features(self, y, sigma, swap=False):
        """-> skip (N, C, H/2, W/2), deep (N, 2C, H/4, W/4), decoded (N, C, H/2, W/2).   swap: each image
        keeps its own skip but gets the bottleneck of the next."""
        level, c_in = self.level(sigma.log()[:, None]), (sigma**2 + self.std**2).rsqrt()
        skip = self.encoder(self.enter((y - self.mean) * c_in.view(-1, *[1] * (y.ndim - 1))), level)
        deep = self.bottleneck(self.down(skip), level)
        wide = self.up(deep.roll(-1, 0) if swap else deep)
        both = torch.cat([wide * self.keeps["depth"], skip * self.keeps["skips"]], 1)
        return skip, deep, self.decoder(both, level)
    def forward(self, y, sigma, swap=False):
        f = self.leave(F.silu(self.norm(self.features(y, sigma, swap)[2]))).float()
        if not self.keeps["residual"]: return self.mean + self.std * f
        # Table 1: what F must give has variance 1 too. At low noise it need not copy y, only find the noise.
        s = sigma.view(-1, *[1] * (y.ndim - 1))
        c_skip = self.std**2 / (s**2 + self.std**2)
        return self.mean + c_skip * (y - self.mean) + s * c_skip.sqrt() * f
# ------------------------------------------------------------------------------------------ What it must beat
def psnr(x, clean):
    """10 log10(1 / MSE) in dB, x clipped to [0, 1]; the mean goes over all pixels of all images."""
    return -10 * (x.clamp(0, 1) - clean).square().mean().log10().item()
def blur(y, s):
    """Gaussian of s pixels along each axis, as a matrix whose rows sum to 1.   y (N, 1, H, H) or (N, 1, T)"""
    places = torch.arange(y.shape[-1], device=y.device)
    B = (-(places[:, None] - places).square() / (2 * s**2)).softmax(-1)
    return y @ B.T if y.ndim == 3 else B @ y @ B.T
def patches(x, size, step):
    """All windows of `size` places per axis, `step` apart.   (N, 1, H, W) -> (N, 1, H', W', size^2)"""
    for axis in range(2, x.ndim): x = x.unfold(axis, size, step)
    return x.flatten(axis + 1)
def median(y):
    """The middle value of each pixel's 3 x 3, of each sample's 3."""
    return patches(F.pad(y, (1,) * 2 * (y.ndim - 2), mode="reflect"), 3, 1).median(-1).values
def wiener(x):
    """The best linear denoiser, m + C (C + sigma^2 I)^-1 (y - m), with mean m and covariance C of x (N, ...)
    (Wiener 1949).   As C = V diag(l) V^T, it keeps l / (l + sigma^2) of each principal component: nearly all
    of the strong ones, nearly nothing of the weak.   -> a function of y and sigma"""
    m, (l, V) = x.flatten(1).mean(0), torch.linalg.eigh(torch.cov(x.flatten(1).T, correction=0))
    return lambda y, sigma: (m + (y.flatten(1) - m) @ V * (l / (l + sigma**2)) @ V.T).view_as(y)
# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """Hold the parts against torch's own and against closed forms, on the CPU."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(size, dtype=torch.float64) + 2 for size in ((3, 12, 5, 7), 12, 12))
    check("group_norm == F.group_norm", [group_norm(x, 4, w, b)], [F.group_norm(x, 4, w, b)], 1e-12)
    z = torch.randn(99, 10, dtype=torch.float64)
    z = torch.linalg.qr(z - z.mean(0))[0] * 99**0.5         # 10 columns: mean 0, variance 1, uncorrelated
    x = z[:, :5] @ torch.randn(5, 5, dtype=torch.float64)
    y = x + 0.5 * z[:, 5:]
    check("Wiener == least squares from y to x", [wiener(x)(y, 0.5)], [y @ torch.linalg.lstsq(y, x)[0]], 1e-9)
    image, sigma, model = torch.rand(2, 1, 12, 20), torch.tensor([0.1, 0.7]), MiniUNet(8, 2, 0.2, 0.3)
    check("PSNR of an error of 0.1, clipped == 20 dB", [psnr(image + 9, image * 0 + 0.9)], [20], 1e-4)
    alone = 0.2 + 0.3**2 / (0.3**2 + sigma.view(2, 1, 1, 1) ** 2) * (image - 0.2)
    check("untrained MiniUNet == Wiener, pixel by pixel", [model(image, sigma)], [alone], 1e-6)
    shapes = [torch.tensor(t.shape) for t in model.features(image, sigma)]
    right = [torch.tensor(t) for t in ((2, 8, 6, 10), (2, 16, 3, 5), (2, 8, 6, 10))]
    check("features at half and quarter resolution", shapes, right, 0)
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
def load_images(cfg):
    """-> clean x (N, 1, size, size) in [0, 1], others to test on, labels of both, a name.   28 x 28 -> size:
    bilinear, antialiased.   --signal: (N, 1, size^2), three tones from some moment on; label: the octave."""
    if not cfg.signal:
        images, labels, test, test_labels, name = load_mnist(cfg.data, cfg.tiny)
        fit = lambda x: F.interpolate(x[:, None] / 255, (cfg.size,) * 2, mode="bilinear", antialias=True)
        return fit(images), fit(test), labels, test_labels, name
    torch.manual_seed(0)
    n, t = 3500 if cfg.tiny else 70_000, torch.arange(cfg.size**2) / cfg.size**2
    (amount, phase), label = torch.rand(2, 3, n, 1), torch.randint(4, (n,))
    pitch = 2 ** (2 + label[:, None] + torch.rand(n, 1))
    tones = (amount[k] * (2 * math.pi * ((k + 1) * pitch * t + phase[k])).sin() for k in range(3))
    x, cut = (0.5 + sum(tones) / 6 * (t > torch.rand(n, 1) / 2))[:, None], n * 6 // 7
    return x[:cut], x[cut:], label[:cut], label[cut:], "made waveforms"
# --------------------------------------------------------------------------------------------------- Training
def train(model, x, cfg, autocast):
    """Train on new noise in each step.   -> running average (Polyak & Juditsky 1992) of the model, seconds"""
    average, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    started = shown = time.perf_counter()
    for step in range(1, cfg.steps + 1):
        clean = x[torch.randint(len(x), (cfg.batch,), device=x.device)]
        sigma = LEVELS[0] ** torch.rand(cfg.batch, device=x.device)             # from 0.05 to 1, log-uniform
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        with autocast:
            guess = model(clean + s * torch.randn_like(clean), sigma)
        # The squared error grows with sigma: divided by it, no level dominates the loss.
        loss = ((guess - clean).square() / s).mean()
        optimizer.param_groups[0]["lr"] = cfg.lr * min(20 * step / cfg.steps, 1 - (step - 1) / cfg.steps)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        share = max(0.005, 8 / (7 + step))
        for kept, w in zip(average.parameters(), model.parameters()): kept.data.lerp_(w.data, share)
        if step % 20 == 0 and time.perf_counter() > shown + 1 or step == cfg.steps:
            shown, error = time.perf_counter(), loss.item()
            rate = step / (shown - started)
            if not math.isfinite(error): sys.exit(f"step {step}: the loss is {error}; try a lower --lr")
            print(f"step {step:5d}/{cfg.steps} | loss {error:.4f} | {rate * cfg.batch:,.0f} img/s | "
                  f"{(cfg.steps - step) / rate:.0f} s left")
    return average.eval(), time.perf_counter() - started
# -------------------------------------------------------------------------------------------------- Measuring
def noisy(x, sigma):
    """x + sigma n, with the same n for every method and every run."""
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
@torch.no_grad()
def denoise(model, y, sigma, swap=False):
    """The model's guess, clipped, in parts that fit into memory.   y (N, 1, ...), sigma a number -> same"""
    return torch.cat([model(part, torch.full((len(part),), sigma, device=y.device), swap)
                      for part in y.split(500)]).clamp(0, 1)
def evaluate(models, x, linear):
    """PSNR of each method, and of the swap, at each level.   x: clean images -> {method: [dB per level]}"""
    table, few = {"sigma": LEVELS}, x[:500]
    for sigma in LEVELS:
        y = noisy(x, sigma)
        guesses = {"noisy": y, "median": median(y), "wiener": linear(y, sigma),
                   **{name: denoise(model, y, sigma) for name, model in models.items()}}
        found = {name: psnr(guess, x) for name, guess in guesses.items()}
        found["blur"] = max(psnr(blur(y, 0.3 + 0.1 * i), x) for i in range(18))
        swapped = denoise(models["unet"], y[:500], sigma, swap=True)
        found["swap_to_skip"], found["swap_to_deep"] = psnr(swapped, few), psnr(swapped, few.roll(-1, 0))
        for name, value in found.items(): table.setdefault(name, []).append(value)
    for name, row in table.items(): print(f"{name:20}", *(f"{value:7.2f}" for value in row))
    return table
def ridge(a, b, test_a):
    """A linear map and a bias fitted from a (N, I) to b (N, O), slightly regularised, applied to test_a."""
    a, test_a = (F.pad(t, (0, 1), value=1.0) for t in (a, test_a))
    gram = a.T @ a
    gram.diagonal().mul_(1.001)
    return test_a @ torch.linalg.solve(gram, a.T @ b)
@torch.no_grad()
def probe(model, x, labels, test, test_labels, sigma=0.5):
    """What a linear map reads from the features of noisy images.   -> {features: (share of labels read right
    from the channels' means over the image, in which all places are lost; share R^2 of the variance of the
    clean pixels in a place's patch, read from the channels of that place)}"""
    onehot, ys, result = (labels[:, None] == labels.unique()).to(x), [noisy(t, sigma) for t in (x, test)], {}
    seen = [(y, *model.features(y, torch.full((len(y),), sigma, device=y.device))) for y in ys]
    for name, a, b in zip(("pixels", "skip", "bottleneck", "decoder"), *seen):
        answers = ridge(a.flatten(2).mean(2), onehot, b.flatten(2).mean(2)).argmax(1)
        size, flat = x.shape[-1] // a.shape[-1], lambda t: t.movedim(1, -1).flatten(0, -2)
        clean, true = (patches(t, size, size).flatten(0, -2) for t in (x, test))
        error, spread = ridge(flat(a), clean, flat(b)) - true, true - clean.mean(0)
        right = (answers == test_labels).float().mean().item()
        result[name] = right, 1 - (error.square().mean() / spread.square().mean()).item()
        print(f"{name:10} {tuple(a.shape[1:])}: label {right:.1%}, pixels {result[name][1]:.2f}")
    return result
# --------------------------------------------------------------------------------------------------- Pictures
@torch.no_grad()
def draw(model, linear, test, table):
    """Left, ten test images, two at each level; right, PSNR over level."""
    page = Image.new("RGB", (1240, 420), "white")
    pen = ImageDraw.Draw(page)
    pen.font = ImageFont.load_default(16)
    pen.text((20, 14), "Noise of five deviations; swapped: with the bottleneck of the next image", "black")
    pen.text((850, 14), "PSNR in dB by deviation of the noise, and at 0.5", "black")
    place = lambda i, v: (890 + 75 * i, 370 - 9 * (v - 5))
    for i, sigma in enumerate(LEVELS):
        pen.text((196 + 136 * i, 56), f"{sigma:g}", "firebrick", anchor="mm")
        pen.text((20, 102 + 68 * i), ("noisy", "wiener", "unet", "clean", "swapped")[i], "black", anchor="lm")
        pen.text(place(i, 2), f"{sigma:g}", "gray", anchor="mm")
        pen.text((850, place(0, 5 + 7 * i)[1]), f"{5 + 7 * i}", "gray", anchor="lm")
        clean = test[2 * i : 2 * i + 3]
        y = noisy(clean, sigma)
        rows = y, linear(y, sigma), denoise(model, y, sigma), clean, denoise(model, y, sigma, swap=True)
        for k, j in itertools.product(range(5), range(2)):
            image, corner = rows[k][j].clamp(0, 1).cpu(), (130 + 136 * i + 68 * j, 70 + 68 * k)
            x, wave = corner[0], (corner[1] + 64 - 64 * image.flatten()).tolist()
            if image.ndim == 2: pen.line([(x + 64 * t / len(wave), v) for t, v in enumerate(wave)], "navy")
            else: page.paste(TF.to_pil_image(image).resize((64, 64), Image.NEAREST), corner)
    shown = table.keys() - {"sigma", "swap_to_skip", "swap_to_deep"}
    for k, name in enumerate(sorted(shown, key=lambda name: -table[name][3])):
        colour = ("navy", "seagreen", "firebrick", "darkorange", "purple", "gray")[k]
        pen.line([place(i, v) for i, v in enumerate(table[name])], colour, 3)
        pen.text((1220, 44 + 24 * k), f"{name} {table[name][3]:.2f}", colour, anchor="ra")
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
    """Check, load, train, measure, draw.  Returns the figures of the RESULT line."""
    for flag, low, high, unit in (("seed", 0, 2**63 - 1, 1), ("size", 4, 64, 4), ("width", 4, 1024, 4),
                                  ("steps", 1, 10**9, 1), ("batch", 1, 10**6, 1), ("lr", 1e-9, 100, 1e-9)):
        value, what = getattr(cfg, flag), f"from {low} to {high}" + f" and a multiple of {unit}" * (unit == 4)
        require(low <= value <= high and (unit != 4 or value % 4 == 0), f"--{flag} {value}: must be {what}")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    run_checks()
    *tensors, data = load_images(cfg)
    x, test, labels, test_labels = (t.to(device) for t in tensors)
    # Not on CPUs: one with AVX-512 but without AMX took 1.7 times as long for a step in bfloat16.
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    models, seconds, autocast = {}, {}, torch.autocast(device.type, torch.bfloat16, fast)
    print(f"week 6 | {device}, {'bfloat16' if fast else 'float32'} | torch {torch.__version__} | data: {data}"
          f", {len(x):,} of {'x'.join(map(str, x.shape[2:]))} to train on | weights: from scratch")
    for idea in dict.fromkeys(("none", cfg.ablate)):
        torch.manual_seed(cfg.seed)
        name = "unet" if idea == "none" else f"no_{idea}"
        model = MiniUNet(cfg.width, x.ndim - 2, x.mean(), x.std(), idea)
        models[name], seconds[f"train_seconds_{name}".removesuffix("_unet")] = train(
            model.to(device, memory_format=torch.channels_last), x, cfg, autocast)
    model, linear = models["unet"], wiener(x)
    table = evaluate(models, test, linear)
    probes = probe(model, x[:5000], labels[:5000], test[:5000], test_labels[:5000])
    y = noisy(test[:1000], 0.5)
    save(cfg.out, "unet.png", draw(model, linear, test, table).save)
    tensors = dict(clean=test[:1000], noisy=y, denoised=denoise(model, y, 0.5))
    for name, group in ("denoised", tensors), ("unet", model.state_dict()):
        group = safetensors.torch.save({key: t.float().cpu().contiguous() for key, t in group.items()})
        save(cfg.out, f"{name}.safetensors", lambda part: part.write_bytes(group))
    result = {f"psnr_{name}".removesuffix("_unet"): row[3] for name, row in table.items() if name != "sigma"}
    result.update(seconds, parameters=sum(w.numel() for w in model.parameters()))
    return finish(cfg, device, result, data=data, weights="from scratch", table=table, probes=probes)
if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
