"""The scoreboard: this repository beside what one would otherwise run, on the same machine, in one run.

    python tests/bench.py --data data            # every week;  --only 1 for one;  --threads 1 for one core

Not a test. Every figure is the median of repeats in which the two sides take turns, so that a noisy machine is
noisy to both. A ratio above 1 is in our favour; a row that we lose is shown as lost.
"""

import argparse
import contextlib
import io
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def row(week, what, theirs, ours, ratio):
    print(
        f"{week:>4} | {what:<48} | {theirs:>30} | {ours:>22} | {ratio:7.2f}{'' if ratio >= 1 else '  lost'}",
        flush=True,
    )


def medians(theirs, ours, repeats=30, warmup=5):
    """Median seconds of two functions that take turns."""
    times = ([], [])
    for i in range(warmup + repeats):
        for function, kept in zip((theirs, ours), times):
            started = time.perf_counter()
            function()
            if i >= warmup:
                kept.append(time.perf_counter() - started)
    return [sorted(kept)[repeats // 2] for kept in times]


def race(week, what, theirs, ours, **options):
    a, b = medians(theirs, ours, **options)
    row(week, what, f"{1e3 * a:.3f} ms", f"{1e3 * b:.3f} ms", a / b)


def start_up(week, script, packages):
    """Seconds until --help is there, beside the bare imports that any such script has."""
    command = [sys.executable, "-c", f"import {packages}"], [sys.executable, str(ROOT / script), "--help"]
    a, b = medians(
        *(lambda c=c: subprocess.run(c, check=True, capture_output=True) for c in command), repeats=5, warmup=1
    )
    row(week, f"start-up (import {packages})", f"{a:.1f} s", f"{b:.1f} s", a / b)


def usual_mnist_script(folder, epochs=3):
    """What a learner usually runs: 784-256-128-10, DataLoader, Adam.   -> (test accuracy, seconds of training)"""
    from torchvision import datasets, transforms

    torch.manual_seed(0)
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    train, test = (datasets.MNIST(folder, train=part, transform=scale) for part in (True, False))
    batches = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer, seconds = torch.optim.Adam(model.parameters()), time.perf_counter()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    seconds = time.perf_counter() - seconds
    with torch.no_grad():
        right = sum(
            (model(x).argmax(1) == y).sum().item() for x, y in torch.utils.data.DataLoader(test, batch_size=1000)
        )
    return right / len(test), seconds


def week01(folder):
    import week01_mlp as week

    *data, name = week.load_mnist(folder, tiny=False)
    if name == "MNIST":
        accuracy, seconds = usual_mnist_script(folder)
        cfg = week.Config()
        torch.manual_seed(cfg.seed)
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model = week.MLP((784, cfg.width, cfg.width, 10))
        with contextlib.redirect_stdout(io.StringIO()):
            log, _, _ = week.train(model, *data, cfg, torch.autocast("cpu", torch.bfloat16, enabled="bf16" in cpu))
        same = next((t for t, reached in log if reached >= accuracy), float("inf"))
        row(
            1,
            "MNIST, seconds to the usual script's accuracy",
            f"{accuracy:.2%} in {seconds:.1f} s",
            f"{same:.1f} s",
            seconds / same,
        )
        row(
            1,
            "MNIST, errors at the end",
            f"{1 - accuracy:.2%} in {seconds:.0f} s",
            f"{1 - log[-1][1]:.2%} in {log[-1][0]:.0f} s",
            (1 - accuracy) / (1 - log[-1][1]),
        )
    week01_kernels(week)


def week01_kernels(week):
    x, y = torch.randn(512, 784), torch.randint(10, (512,))
    ours = week.MLP((784, 512, 512, 10))
    theirs = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    for dtype in (torch.float32, torch.bfloat16):

        def step(model, loss, dtype=dtype):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(x)
            loss(logits.float(), y).backward()

        race(
            1,
            f"MLP forward + backward, {dtype}"[:48].replace("torch.", ""),
            lambda: step(theirs, F.cross_entropy),
            lambda: step(ours, week.cross_entropy),
        )
    for name, options in (("SGD", dict(lr=1e-9, momentum=0.9)), ("AdamW", dict(lr=1e-9, betas=(0.9, 0.99)))):
        race(
            1,
            f"{name} step beside torch's default",
            getattr(torch.optim, name)(theirs.parameters(), **options).step,
            getattr(week, name)(ours.parameters(), **options).step,
        )
    images = torch.rand(512, 1, 28, 28)

    def one_by_one():
        theta = torch.eye(2, 3) + 0.1 * torch.randn(512, 2, 3)
        bend = F.interpolate(0.06 * torch.randn(512, 2, 5, 5), (28, 28), mode="bicubic")
        grid = F.affine_grid(theta, (512, 1, 28, 28), align_corners=False) + bend.permute(0, 2, 3, 1)
        return F.grid_sample(images, grid, align_corners=False)

    race(
        1,
        "warp of 512 digits beside affine_grid + interpolate",
        one_by_one,
        lambda: week.warp(images, 0.08, 0.07, 0.06),
    )
    start_up(1, "week01_mlp.py", "torch, torchvision")


class UsualGPT(nn.Module):
    """What one would write with torch's own layers, with the sizes and the recipe of nanoGPT's setting for a CPU."""

    def __init__(self, vocabulary, context=64, layers=4, heads=4, width=128):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.context = context
        for name, w in self.named_parameters():
            if w.ndim == 2:
                nn.init.normal_(w, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.blocks(x, mask, is_causal=True))


def usual_gpt(week, ids, val, vocabulary, steps=2000, batch=12):
    """-> (validation loss, seconds): AdamW, warm-up, cosine to a tenth, clipped gradients, float32."""
    torch.manual_seed(1337)
    model = UsualGPT(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1)
    started = time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = min(
            1e-3 * (step + 1) / 100, 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * step / steps))
        )
        text = ids[torch.randint(len(ids) - 64, (batch, 1)) + torch.arange(65)]
        optimizer.zero_grad()
        F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - started
    return week.evaluate(model.eval(), val), seconds


def week02(folder):
    import week02_transformer as week

    chars, ids, name = week.load_text(week.Config(data=folder))
    ids, val = ids.tensor_split([int(0.9 * len(ids))])
    loss, seconds = usual_gpt(week, ids, val, len(chars))
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    for steps in (600, 2000):
        cfg = week.Config(steps=steps)
        torch.manual_seed(cfg.seed)
        model = week.GPT(cfg, len(chars))
        with contextlib.redirect_stdout(io.StringIO()):
            autocast = torch.autocast("cpu", torch.bfloat16, enabled="bf16" in cpu)
            took, ours = week.train(model, ids, val, cfg, chars, autocast)
        what = f"{name}, validation loss, {steps} steps"
        row(
            2,
            f"{what}: perplexity",
            f"{loss:.3f} in {seconds:.0f} s",
            f"{ours:.3f} in {took:.0f} s",
            math.exp(loss - ours),
        )
        row(2, f"{what}: seconds", f"{seconds:.0f} s", f"{took:.0f} s", seconds / took)
    model.eval()
    without, cached = medians(
        lambda: week.sample(model, chars, cfg, 64, False),
        lambda: week.sample(model, chars, cfg, 64),
        repeats=9,
        warmup=1,
    )
    row(
        2, "sampling, characters/s, beside no KV cache", f"{64 / without:.0f}", f"{64 / cached:.0f}", without / cached
    )
    q, k, v = (torch.randn(12, 4, 64, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(64, 64, dtype=torch.bool).tril()
    race(
        2,
        "attention, bfloat16, forward + backward",
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward(),
        lambda: week.attention(q, k, v, mask)[0].sum().backward(),
    )
    start_up(2, "week02_transformer.py", "torch, torchvision")


def week03(folder):
    import transformers
    import week03_gpt2_inspect as week

    torch.manual_seed(1337)
    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    w, tokens = model.transformer.state_dict(), torch.randint(50257, (1, 13))
    options = dict(max_new_tokens=48, do_sample=False, pad_token_id=0, eos_token_id=None)
    theirs, ours = medians(
        lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **options),
        lambda: week.generate(w, model.config, tokens, 48),
        repeats=7,
        warmup=1,
    )
    row(3, "GPT-2 writes, tokens/s, beside generate", f"{48 / theirs:.1f}", f"{48 / ours:.1f}", theirs / ours)
    without, cached = medians(
        lambda: week.generate(w, model.config, tokens, 48, False),
        lambda: week.generate(w, model.config, tokens, 48),
        repeats=3,
        warmup=1,
    )
    row(3, "the same, beside no KV cache", f"{48 / without:.1f}", f"{48 / cached:.1f}", without / cached)
    text = "\n".join(week.topics.values())[:100_000]
    library = week.tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([text], 999, 2, show_progress=False)
    bpe = week.BPE.train(text, 1000)
    race(3, "100,000 characters -> ids, beside tokenizers (Rust)", lambda: library.encode(text).ids,
         lambda: bpe.encode(text), repeats=3, warmup=1)  # fmt: skip
    start_up(3, "week03_gpt2_inspect.py", "torch, transformers")


def week04(folder):
    import transformers
    import week04_router as week

    with contextlib.redirect_stdout(io.StringIO()):
        parts, labels = week.load_prompts(week.Config())
        texts = [*parts["test"]][:64]
        config = transformers.CLIPTextConfig(bos_token_id=0, eos_token_id=1)  # the text tower of ViT-B/32, noise
        notes = week.make_notes([*parts["train"]], labels, "random")
        tower = transformers.CLIPTextModelWithProjection(config).eval().requires_grad_(False)
        router = week.Router(notes, (week.tokenizers.Tokenizer.from_str(notes["tokenizer"]), tower)).eval()
    full = router.tokens([*texts, "a" + " b" * 99])[:-1]
    assert torch.allclose(tower(full).text_embeds, tower(router.tokens(texts)).text_embeds, atol=1e-4)
    race(4, "64 prompts through CLIP, beside padding to 77", lambda: tower(full), lambda: router.encode(texts),
         repeats=5, warmup=1)  # fmt: skip
    figures = {}
    for seed in (1337, 1, 2):
        with contextlib.redirect_stdout(io.StringIO()):
            out = f"{tempfile.mkdtemp()}/out"
            figures[seed] = week.main(week.Config(model="random", seed=seed, out=out))
    wrong, ours = (sum(1 - f[key] for f in figures.values()) / 3 for key in ("baseline_accuracy", "test_accuracy"))
    row(4, "wrong decisions, beside a bag of words", f"{wrong:.2%}", f"{ours:.2%}", wrong / max(ours, 1e-9))
    one = sum(f["route_ms"] for f in figures.values()) / 3
    bags = week.fit(nn.Linear(len(notes["idf"]), len(labels)), torch.rand(99, len(notes["idf"])), torch.arange(99) % 6)

    def bag(text):
        count = week.words(text)
        return bags(F.normalize(torch.tensor([[count[word] * idf for word, idf in notes["idf"].items()]])))

    alone = 1e3 * medians(lambda: bag(texts[0]).argmax().item(), lambda: None)[0]
    row(4, "ms for a decision, beside a bag of words", f"{alone:.2f} ms", f"{one:.2f} ms", alone / one)
    start_up(4, "week04_router.py", "torch, transformers")


class UsualDenoiser(nn.Module):
    """What tutorials on 2-D points use: three layers of 128, the time as one more set of sines, ReLU."""

    def __init__(self, width=128):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 + 32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width),
            nn.ReLU(), nn.Linear(width, 2))  # fmt: skip

    def forward(self, x, t):
        angle = t[:, None] * 10000 ** (-torch.arange(16) / 16)
        return self.net(torch.cat([x, angle.sin(), angle.cos()], 1))


def usual_ddpm(cloud, seconds, n=10_000):
    """eps, T = 1000, linear betas, Adam 1e-3, batch 128, t drawn at random, for as many seconds; then Algorithm 2.
    -> (steps, a function that samples n points)"""
    torch.manual_seed(1337)
    beta = torch.linspace(1e-4, 0.02, 1000)
    alpha_bar = (1 - beta).cumprod(0)
    model = UsualDenoiser()
    optimizer, started, steps = torch.optim.Adam(model.parameters(), 1e-3), time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        x0, t = cloud(128), torch.randint(1000, (128,))
        eps, a = torch.randn_like(x0), alpha_bar[t, None]
        loss = F.mse_loss(model(a.sqrt() * x0 + (1 - a).sqrt() * eps, t), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1

    @torch.no_grad()
    def sample():
        x = torch.randn(n, 2)
        for t in reversed(range(1000)):
            eps = model(x, torch.full((n,), t))
            x = (x - beta[t] / (1 - alpha_bar[t]).sqrt() * eps) / (1 - beta[t]).sqrt()
            x = x + beta[t].sqrt() * torch.randn_like(x) * (t > 0)
        return x

    return steps, sample


def week05(folder):
    import diffusers
    import week05_ddpm_forward as week

    cfg, cpu, runs = week.Config(), torch.device("cpu"), []
    cloud, plan = week.make_cloud(cfg, cpu), week.Schedule(cfg.schedule, cfg.timesteps)
    fresh = [cloud(10_000) for _ in range(8)]
    floor = week.fresh_distance(fresh)
    for steps in (cfg.steps // 16, cfg.steps // 8, cfg.steps // 4, cfg.steps // 2, cfg.steps):
        torch.manual_seed(cfg.seed)
        model = week.Denoiser(cfg.timesteps, cfg.width, cfg.layers)
        with contextlib.redirect_stdout(io.StringIO()):
            seconds, model = week.train(model, plan, cloud, week.Config(steps=steps), cpu)
        started = time.perf_counter()
        made = [week.sample(model, plan, cfg, 10_000, cpu)[-1][1] for _ in range(4)]
        sampling = (time.perf_counter() - started) / 4
        runs.append((seconds, week.energy_distance(made, fresh) / floor))
    seconds, ours = runs[-1]
    steps, usual = usual_ddpm(cloud, seconds)
    started = time.perf_counter()
    theirs = week.energy_distance([usual() for _ in range(2)], fresh) / floor
    usual_sampling = (time.perf_counter() - started) / 2
    same = next((took for took, reached in runs if reached <= theirs), math.inf)
    what = "two spirals, energy distance / that of fresh data"
    row(5, what, f"{theirs:.2f} in {seconds:.0f} s", f"{ours:.2f} in {seconds:.0f} s", theirs / ours)
    row(5, "seconds of training to the usual script's", f"{seconds:.0f} s", f"{same:.0f} s", seconds / same)
    row(5, "10,000 points drawn", f"{usual_sampling:.1f} s", f"{sampling:.1f} s", usual_sampling / sampling)
    x0, eps = torch.randn(2, 64, 3, 32, 32)
    t = torch.randint(1, 1001, (64,))
    scheduler, plan = diffusers.DDPMScheduler(clip_sample=False), week.Schedule("linear", 1000)
    race(5, "add_noise, 64 images, beside DDPMScheduler", lambda: scheduler.add_noise(x0, eps, t - 1),
         lambda: plan.add_noise(x0, eps, t))  # fmt: skip
    race(5, "a DDPM step, 64 images, beside DDPMScheduler", lambda: scheduler.step(eps, 499, x0).prev_sample,
         lambda: plan.ddpm(x0, plan.to_x0_eps("eps", eps, x0, 500)[0], 500, torch.randn_like(x0)))  # fmt: skip
    ddim = diffusers.DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(1000)
    race(5, "a DDIM step, 64 images, beside DDIMScheduler", lambda: ddim.step(eps, 499, x0).prev_sample,
         lambda: plan.ddim(x0, *plan.to_x0_eps("eps", eps, x0, 500), 500, 499, 0.0))  # fmt: skip
    start_up(5, "week05_ddpm_forward.py", "torch, torchvision")


class UsualUNet(nn.Module):
    """What one would write with torch's own layers: two 3x3 convolutions with batch norm per level, max-pooling,
    transposed convolutions, skips; at full resolution, the level as a second input channel."""

    def __init__(self, width=24):
        super().__init__()

        def block(i, o):
            halves = [nn.Sequential(nn.Conv2d(a, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()) for a in (i, o)]
            return nn.Sequential(*halves)

        w = width
        self.a, self.b, self.c = block(2, w), block(w, 2 * w), block(2 * w, 4 * w)
        self.up_b, self.up_a = nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.ConvTranspose2d(2 * w, w, 2, 2)
        self.d, self.e, self.out = block(4 * w, 2 * w), block(2 * w, w), nn.Conv2d(w, 1, 1)

    def forward(self, y, sigma, swap=False):
        a = self.a(torch.cat([y, sigma.view(-1, 1, 1, 1).expand_as(y)], 1))
        b = self.b(F.max_pool2d(a, 2))
        b = self.d(torch.cat([self.up_b(self.c(F.max_pool2d(b, 2))), b], 1))
        return self.out(self.e(torch.cat([self.up_a(b), a], 1)))


def usual_unet(model, x, seconds, batch=64):
    """Adam at 1e-3 on the mean squared error, noise of any level, for as long as the other side had."""
    optimizer, started, model = torch.optim.Adam(model.parameters(), 1e-3), time.perf_counter(), model.train()
    while time.perf_counter() - started < seconds:
        clean = x[torch.randint(len(x), (batch,))]
        sigma = 0.05 + 0.95 * torch.rand(batch)
        guess = model(clean + sigma.view(-1, 1, 1, 1) * torch.randn_like(clean), sigma)
        optimizer.zero_grad()
        F.mse_loss(guess, clean).backward()
        optimizer.step()
    return model.eval()


def week06(folder):
    import diffusers
    import week06_mini_unet as week

    cfg = week.Config(data=folder)
    x, test, *_, name = week.load_images(cfg)
    torch.manual_seed(cfg.seed)
    model = week.MiniUNet(cfg.width, 2, x.mean(), x.std()).to(memory_format=torch.channels_last)
    with contextlib.redirect_stdout(io.StringIO()):
        ours, took = week.train(model, x, cfg, torch.autocast("cpu", enabled=False))
    size = lambda m: sum(w.numel() for w in m.parameters()) / 1e6  # noqa: E731

    class Diffusers(nn.Module):
        """diffusers' UNet2DModel of about our size, with the level in its time embedding."""

        def __init__(self):
            super().__init__()
            down, up = ("DownBlock2D",) * 3, ("UpBlock2D",) * 3
            self.net = diffusers.UNet2DModel(
                16, 1, 1, down_block_types=down, up_block_types=up, block_out_channels=(8, 16, 32), layers_per_block=1,
                norm_num_groups=4, add_attention=False,
            )  # fmt: skip

        def forward(self, y, sigma, swap=False):
            return self.net(y, 1000 * sigma).sample

    linear, psnr = week.wiener(x), {}
    rivals = {"Wiener": None, "a usual U-Net": UsualUNet(), "diffusers' UNet2DModel": Diffusers()}
    for rival, net in rivals.items():
        net = net and usual_unet(net, x, took)
        for sigma in (0.05, 0.5):
            y = week.noisy(test, sigma)
            theirs = week.psnr(week.denoise(net, y, sigma) if net else linear(y, sigma), test)
            psnr.setdefault(sigma, week.psnr(week.denoise(ours, y, sigma), test))
            note = f", {size(net):.2f} M, {took:.0f} s" if net else ""
            row(6, f"{name}, noise {sigma}, beside {rival}: errors", f"{theirs:.2f} dB{note}",
                f"{psnr[sigma]:.2f} dB, {size(ours):.2f} M", 10 ** ((psnr[sigma] - theirs) / 10))  # fmt: skip
    h, w, b = torch.randn(48, 32, 8, 8).to(memory_format=torch.channels_last), torch.ones(32), torch.zeros(32)
    race(6, "group norm by hand, beside torch's", lambda: F.group_norm(h, 4, w, b), lambda: week.group_norm(h, 4, w, b))
    start_up(6, "week06_mini_unet.py", "torch, torchvision")
def week07(folder):
    import diffusers
    import week07_sd_hooks as week
    from diffusers.models.attention_processor import AttnProcessor
    from torch.utils.flop_counter import FlopCounterMode

    diffusers.logging.set_verbosity_error()
    make = lambda **size: week.make(diffusers.UNet2DConditionModel, week.UNET | size).eval()  # noqa: E731

    def count(unet, inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(*inputs)
        return counter.get_total_flops()

    with torch.device("meta"):
        unet, inputs = make(), (torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
    race(7, "profile of SD v1.5, beside torch's FlopCounterMode", lambda: count(unet, inputs),
         lambda: week.profile_modules(unet, *inputs), repeats=5, warmup=1)  # fmt: skip
    top = week.profile_modules(unet, *inputs)[1][0]
    theirs = 1 - top["attention"] / top["flops"]  # tests/test_week07.py holds this against it, on a smaller U-Net
    row(7, "operations of it seen on a CPU, beside the same", f"{theirs:.1%}", "100.0%", 1 / theirs)
    size = dict(block_out_channels=(32, 64, 128, 128))
    unet, inputs = make(**size), (torch.randn(1, 4, 48, 48), torch.zeros(1), torch.randn(1, 77, 768))

    @torch.no_grad()
    def run(unet):
        return unet(*inputs).sample

    usual, watched = make(**size), make(**size)
    usual.set_attn_processor(AttnProcessor())  # the way to maps that is described most: no fused kernel anywhere
    week.capture(watched, "up_blocks.1")
    race(7, "pass that keeps maps, beside AttnProcessor everywhere", lambda: run(usual), lambda: run(watched),
         repeats=3, warmup=1)  # fmt: skip
    race(7, "the same, beside a pass that keeps none", lambda: run(unet), lambda: run(watched), repeats=5, warmup=1)
    names = "torch; from diffusers import UNet2DConditionModel; from transformers import CLIPTextModel"
    start_up(7, "week07_sd_hooks.py", names)

class UsualSwitch(nn.Module):
    """What one usually finds: experts in a ModuleList, a mask for each, no capacity.   x (N, D) -> (N, D)"""

    def __init__(self, layer):
        super().__init__()
        self.router = nn.Linear(layer.router.shape[1], len(layer.router), bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(*u.shape, bias=False), nn.ReLU(), nn.Linear(*v.shape, bias=False))
            for u, v in zip(layer.w_in, layer.w_out)
        )

    def forward(self, x):
        gate, expert = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, f in enumerate(self.experts):
            here = expert == i
            y[here] = f(x[here]) * gate[here, None]
        return y


def week10(folder):
    import transformers
    import week10_switch as week
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    torch.manual_seed(1337)
    for experts, tokens in ((8, 4096), (32, 1024)):
        layer, x = week.SwitchFFN(128, 512, experts), torch.randn(tokens, 128, requires_grad=True)
        config = transformers.SwitchTransformersConfig(
            d_model=128, d_ff=512, num_experts=experts, expert_capacity=math.ceil(1.25 * tokens / experts),
            dropout_rate=0.0, router_jitter_noise=0.0)  # fmt: skip
        dense, theirs = week.SwitchFFN(128, 512, 1), SwitchTransformersSparseMLP(config)
        theirs.router.classifier.weight.data.copy_(layer.router)
        masks = week.SwitchFFN(128, 512, experts, dispatch=week.one_hot)
        masks.load_state_dict(layer.state_dict())

        def step(module, x=x, shape=None):
            x.grad = module.zero_grad()
            y = module(x if shape is None else (x * 1)[None])
            sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,))).backward()

        size = f"{experts} experts, {tokens} tokens, beside"
        race(10, f"{size} dense (the limit)", lambda: step(dense), lambda: step(layer))
        race(10, f"{size} transformers'", lambda: step(theirs, shape=3), lambda: step(layer))
        race(10, f"{size} a ModuleList", lambda m=UsualSwitch(layer): step(m), lambda: step(layer))
        race(10, f"{size} one-hot", lambda: step(masks), lambda: step(layer), repeats=5, warmup=1)
    chars, ids, name = week.load_text(week.Config(data=folder))
    ids, val = ids.tensor_split([int(0.9 * len(ids))])
    cfg, found = week.Config(), {}
    for experts in (1, cfg.experts):
        torch.manual_seed(cfg.seed)
        with contextlib.redirect_stdout(io.StringIO()):
            found[experts] = week.train(week.GPT(cfg, len(chars), experts), ids, val, cfg, "")
    (dense_seconds, dense), (seconds, loss) = found.values()
    what = f"{name}, {cfg.steps} steps"
    row(10, f"{what}: perplexity", f"{dense:.3f}", f"{loss:.3f}", math.exp(dense - loss))
    row(10, f"{what}: seconds", f"{dense_seconds:.0f} s", f"{seconds:.0f} s", dense_seconds / seconds)
    start_up(10, "week10_switch.py", "torch")
def week11(folder):
    """Memory on the meta device, at the true size; times on a U-Net of a tenth of the width."""
    import diffusers
    import transformers
    import week11_profile as week
    from torch.distributed._tools.mem_tracker import MemTracker

    out, meta, cpu = tempfile.mkdtemp(), torch.device("meta"), torch.device("cpu")
    cfg, MiB = week.Config(out=out), 2**20
    rows = ["image fused", week.ROWS.split(", ")[-1], "train checkpoint", "train checkpoint diffusers"]
    rows += ["vae tiles", "vae tiles diffusers", "vae slices", "vae slices diffusers", "unet sliced", "unet fused"]
    rows += ["unet sliced diffusers", "unet fused diffusers", "unet int8", "unet fp8 diffusers"]
    told = week.run(week.load(cfg, meta), 512, cfg, meta, rows)

    def beside(what, theirs, ours, kind):
        a, b = told[theirs][kind], told[ours][kind]
        row(11, what, f"{a / MiB:,.1f} MiB", f"{b / MiB:,.1f} MiB", a / b)

    beside("peak of a 512 x 512 image, beside the defaults", rows[0], rows[1], "peak_bytes")
    beside("saved for a training step, beside diffusers'", rows[3], rows[2], "saved")
    for name in ("vae tiles", "vae slices", "unet sliced", "unet fused"):
        beside(f"activations, {name}, beside diffusers'", name + " diffusers", name, "activations")
    beside("peak with 8-bit weights, beside fp8 casting", rows[-1], rows[-2], "peak_bytes")

    torch.manual_seed(0)
    size = dict(block_out_channels=(32, 64, 128, 128), cross_attention_dim=96, sample_size=32)
    models = dict(unet=diffusers.UNet2DConditionModel(**size).eval(), vae=None)
    for name in ("unet sliced", "unet fused", "train checkpoint"):
        sides = [week.prepare(name + end, models, 256, cfg, cpu)[1] for end in (" diffusers", "")]
        with torch.set_grad_enabled("train" in name):
            race(11, f"{name}, beside diffusers'", *sides, repeats=5, warmup=1)
    with torch.no_grad():
        sides = [week.prepare(name, models, 256, cfg, cpu)[1] for name in ("unet fp8 diffusers", "unet int8")]
        race(11, "8-bit weights, beside fp8 casting", *sides, repeats=5, warmup=1)
        exact, coarse, ours = (week.prepare(name, models, 256, cfg, cpu)[1]() for name in (
            "unet", "unet fp8 diffusers", "unet int8"))  # fmt: skip
        a, b = (((y - exact).norm() / exact.norm()).item() for y in (coarse, ours))
        row(11, "its relative error", f"{a:.2%}", f"{b:.2%}", a / b)
        work = week.prepare("unet", models, 256, cfg, cpu)[1]

        def tracked():
            with MemTracker() as tracker:
                tracker.track_external(models["unet"])
                work()

        def metered():
            with week.Meter("cpu", models["unet"].parameters()):
                work()

        gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
        none, kept, coarse = (week.prepare(name, dict(gpt=gpt), 128, cfg, cpu)[1] for name in (
            "gpt", "gpt cache", "gpt cache int8"))  # fmt: skip
        race(11, "16 tokens of GPT-2 after 112, beside no cache", none, kept, repeats=3, warmup=1)
        race(11, "the same in 8 bits, beside the whole cache", kept, coarse, repeats=3, warmup=1)
        ids = torch.randint(97, (1, 113))
        ask = dict(attention_mask=torch.ones_like(ids), min_new_tokens=16, max_new_tokens=16, do_sample=False)
        usual = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
        race(11, "16 tokens, beside transformers' generate", lambda: usual.generate(ids, pad_token_id=0, **ask), kept,
             repeats=3, warmup=1)  # fmt: skip
        race(11, "a pass under the meter, beside torch's MemTracker", tracked, metered, repeats=5, warmup=1)
        race(11, "a pass under the meter, beside none", work, metered, repeats=5, warmup=1)
    start_up(11, "week11_profile.py", "torch, diffusers")
def usual_diffusion(week, x, y, seconds, eps_steps=400):
    """The usual script's recipe on our network: linear betas, T = 400, eps, pixels from 0 to 1, Adam 1e-4."""
    torch.manual_seed(0)
    net = week.ClassUNet(64)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)
    bars = (1 - torch.linspace(1e-4, 0.02, eps_steps)).cumprod(0)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        i, t = torch.randint(len(x), (128,)), torch.randint(eps_steps, (128,))
        eps, bar = torch.randn(128, 1, 28, 28), bars[t].view(-1, 1, 1, 1)
        told = y[i].masked_fill(torch.rand(128) < 0.1, 10)
        guess = net(bar.sqrt() * x[i] + (1 - bar).sqrt() * eps, (t / eps_steps).view(-1, 1, 1, 1), told)
        optimizer.zero_grad()
        F.mse_loss(guess, eps).backward()
        optimizer.step()

    @torch.no_grad()
    def sample(digits, w):
        z, none = torch.randn(len(digits), 1, 28, 28), torch.full_like(digits, 10)
        for t in range(eps_steps - 1, -1, -1):
            at = torch.full((2 * len(z), 1, 1, 1), t / eps_steps)
            eps, without = net(torch.cat([z, z]), at, torch.cat([digits, none])).chunk(2)
            eps, bar, before = without + w * (eps - without), bars[t], bars[t - 1] if t else torch.ones(())
            beta = 1 - bar / before
            z = (z - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt() + (t > 0) * beta.sqrt() * torch.randn_like(z)
        return z.clamp(0, 1)

    return sample


def week08(folder):
    import week08_noisy_router as week

    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as out:
        images, y, test, test_y, name = week.load_mnist(folder, False)
        x = week.to_x(images[:, None] / 255)
        cfg = week.Config(out=f"{out}/out", guidance=2.0)
        judge, _ = week.train("judge.safetensors", week.reader(), week.reading, x, y, 1600, 3e-3, 0.9, cfg, top=0)
        net, seconds = week.train(week.name_of(-1, cfg), week.ClassUNet(64), week.denoising, x, y, 1000, 4e-3, 0.9, cfg)
        usual = usual_diffusion(week, images[:, None] / 255, y, seconds)
        shelf, digits = week.Shelf(cfg, torch.device("cpu")), torch.arange(100) // 10
        read = lambda pixels: (week.read(judge, week.to_x(pixels), torch.zeros(1, 1, 1, 1)).argmax(1) == digits).float()
        started = time.perf_counter()
        theirs = read(usual(digits, 2.0)).mean().item()
        slow, started = time.perf_counter() - started, time.perf_counter()
        ours = read(week.paint(shelf, digits * 0 - 1, digits, cfg)).mean().item()
        fast = time.perf_counter() - started
    what = f"{name}, {seconds:.0f} s of training: digits read as asked"
    row(8, what, f"{theirs:.0%}", f"{ours:.0%}", ours / theirs)
    row(8, "100 digits drawn, beside 400 steps", f"{slow:.1f} s", f"{fast:.2f} s", slow / fast)
    start_up(8, "week08_noisy_router.py", "torch, torchvision")


def week09(folder):
    import copy

    import diffusers
    import transformers
    import week09_lora as week

    for kit in (transformers, diffusers.utils):
        kit.logging.set_verbosity_error()
    cfg, right = week.Config(), {}
    torch.manual_seed(cfg.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        sd = week.small_model()
        sd.set_progress_bar_config(disable=True)
        learn = [w for part in (sd.unet, sd.text_encoder) for w in part.parameters() if w.requires_grad]
        week.train(sd, learn, "plain", cfg.base_steps, 2e-3, cfg)
        sd.text_encoder.requires_grad_(False)
        for style in week.STYLES[1:]:
            full = copy.deepcopy(sd)
            full.unet.requires_grad_(True)
            took = week.train(full, [*full.unet.parameters()], style, cfg.steps, 1e-3, cfg)
            loras = week.inject_lora(sd.unet, week.EVERYTHING, cfg.rank, cfg.alpha)
            learn = [w for w in sd.unet.parameters() if w.requires_grad]
            ours = week.train(sd, learn, style, cfg.steps, cfg.lr, cfg)
            right[style] = [week.evaluate(part, style, cfg, "")[0] for part in (full, sd)]
            week.remove_lora(sd.unet, loras)
    for style, (theirs, here) in right.items():
        for key in ("style", "shape"):
            a, b = 1 - theirs[key], 1 - here[key]
            row(9, f"{style}: wrong in {key}, beside all weights trained", f"{a:.1%}", f"{b:.1%}",
                max(a, 1e-3) / max(b, 1e-3))  # fmt: skip
    row(9, "seconds for a style, beside all weights trained", f"{took:.0f} s", f"{ours:.0f} s", took / ours)
    a, b = (4 * sum(w.numel() for w in part) for part in (full.unet.parameters(), learn))
    row(9, "bytes of a style, beside a copy of the U-Net", f"{a / 1e6:.2f} MB", f"{b / 1e6:.2f} MB", a / b)
    start_up(9, "week09_lora.py", "torch, transformers, diffusers")


def week12(folder):
    import copy

    import diffusers
    import transformers
    import week12_lora_router as week

    for kit in (transformers, diffusers.utils):
        kit.logging.set_verbosity_error()
        kit.logging.disable_progress_bar()

    def adapter(unet, r, attention=False):
        """Random LoRAs for all layers, or for the attention."""
        return {
            k: (torch.randn(r, *m.weight.shape[1:]) / 9, torch.zeros(len(m.weight), r, *[1] * (m.weight.dim() - 2)))
            for k, m in unet.named_modules()
            if type(m) in (nn.Linear, nn.Conv2d) and (not attention or ".to_" in k)
        }

    def ms(work, n):
        took = []
        for _ in range(n):
            started = time.perf_counter()
            work()
            took.append(1e3 * (time.perf_counter() - started))
        return statistics.median(took)

    torch.manual_seed(0)
    sd = week.small_model()
    bare = copy.deepcopy(sd.unet)
    adapters = {name: adapter(bare, 2) for name in "pqrs"}
    closet = week.Wardrobe(sd.unet, adapters, math.inf)
    z, text, t = torch.randn(2, 48, 8, 8), torch.randn(2, 12, 64), torch.tensor(500)
    for name in "pqrs":
        closet.fetch(name)
    closet.wear([("p", 1.0)] * 2)

    def rebuild():
        week.Wardrobe(copy.deepcopy(bare), {"p": adapters["p"]}, math.inf).fetch("p")

    names = iter("pqrs" * 999)
    swap = ms(lambda: (closet.fetch(name := next(names)), closet.wear([(name, 1.0)] * 2)), 400)
    again = ms(rebuild, 10)
    row(12, "small model: another adapter that is resident, beside building it in", f"{again:.1f} ms", f"{swap:.3f} ms", again / swap)  # noqa: E501
    two = week.Wardrobe(copy.deepcopy(bare), adapters, 2.5 * closet.bytes / 4)
    load = ms(lambda: two.fetch(next(names)), 200)
    row(12, "small model: one from host memory, beside building it in", f"{again:.1f} ms", f"{load:.2f} ms", again / load)
    with torch.no_grad():
        a, b = ms(lambda: bare(z, t, text), 60), ms(lambda: sd.unet(z, t, text), 60)
        row(12, "small model: a step with four slots, beside the bare base", f"{a:.1f} ms", f"{b:.1f} ms", a / b)
        z, text = torch.randn(32, 48, 8, 8), torch.randn(32, 12, 64)
        closet.wear([("pqrs"[k % 4], 1.0) for k in range(32)])
        b = ms(lambda: sd.unet(z, t, text), 20)
        a = ms(lambda: [sd.unet(z[k::4], t, text[k::4]) for k in range(4)], 20)
        row(12, "32 pictures of four styles in one batch, beside a batch for each style", f"{a:.0f} ms", f"{b:.0f} ms", a / b)
    a, b = 4 * sum(w.nbytes for w in bare.parameters()), closet.bytes
    row(12, "bytes of four styles, beside four U-Nets", f"{a / 1e6:.1f} MB", f"{b / 1e6:.2f} MB", a / b)
    del sd, closet, two
    true = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).requires_grad_(False)
    adapters = {name: adapter(true, 4, attention=True) for name in "pqr"}
    closet = week.Wardrobe(true, adapters, 2.5 * 797_184 * 4)
    closet.fetch("p"), closet.fetch("q")
    with torch.no_grad():
        step = ms(lambda: true(torch.randn(2, 4, 64, 64), t, torch.randn(2, 77, 768)), 2)
    names = iter("pq" * 999)
    swap = ms(lambda: (closet.fetch(name := next(names)), closet.wear([(name, 1.0)] * 2)), 100)
    names = iter("pqr" * 999)
    load = ms(lambda: closet.fetch(next(names)), 30)
    row(12, "SD v1.5 in true size, rank 4: a step, beside a swap between residents", f"{step:.0f} ms", f"{swap:.3f} ms", step / swap)  # noqa: E501
    row(12, "SD v1.5 in true size, rank 4: a step, beside a load from host memory", f"{step:.0f} ms", f"{load:.1f} ms", step / load)  # noqa: E501
    start_up(12, "week12_lora_router.py", "torch, transformers, diffusers")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder of the data sets")
    parser.add_argument("--only", type=int, default=0, help="one week instead of all")
    parser.add_argument("--threads", type=int, default=0, help="cores to use, 0 = all")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"python {' '.join(sys.argv)}    torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(f"week | {'what':<48} | {'otherwise':>30} | {'here':>22} | ratio")
    for name, function in sorted(globals().items()):
        if re.fullmatch(r"week\d\d", name) and args.only in (0, int(name[4:])):
            function(args.data)


if __name__ == "__main__":
    main()
