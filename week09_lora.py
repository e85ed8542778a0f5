# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "transformers>=5.1", "diffusers>=0.36", "huggingface-hub>=1.3",
#                 "safetensors>=0.4.5", "pillow>=10.1", "tokenizers>=0.22"]
# ///
"""Week 9: LoRA. A style for Stable Diffusion in a small file, and what it costs the content.
Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
The idea: leave the weights W as they are; learn W + (alpha / r) B A, where A has r rows and B r columns.

    python week09_lora.py                                    # trains a small SD, then four styles for it
    python week09_lora.py --model out/week09/base --rank 1 --out out/rank1        # on a base that is there
    python week09_lora.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --lr 1e-4 --batch 4 --images me

Expected: 97 % of the pictures in the new style, 100 % in the right colour, 97 % in the right shape (base 100)
with 4.3 % as many parameters as the U-Net; means of three seeds; 8 min on one core.
"""
import argparse, copy, http.client, inspect, json, math, os, random, re, sys, tempfile, time, urllib.request
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args
import diffusers, huggingface_hub as hub, safetensors.torch, tokenizers, torch, transformers
from PIL import Image, ImageDraw, ImageFont
from torch import nn
# ----------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    device: str = "auto"       # auto = cuda if there is one, else cpu; or by name: cpu, cuda:1, mps
    seed: int = 1337           # the same seed on the same CPU gives the same losses, bit for bit
    tiny: bool = False         # everything smallest, and no network: to see that it runs
    out: str = "out/week09"    # folder for everything that is written
    model: str = "random"      # SD: an ID on the hub (ID@REVISION), a folder, or random = small, trained here
    images: str = ""           # a folder of pictures: one LoRA of them, with its name, in place of four
    caption: str = ""          # of those that have no text of their own beside them: of a.jpg, that is a.txt
    rank: int = 2              # r: the rows of A, the columns of B
    alpha: float = 2.0         # the update of W is alpha / r times B A
    base_steps: int = 1000     # optimizer steps of the small model
    steps: int = 400           # optimizer steps of each LoRA
    batch: int = 32            # pictures per step
    lr: float = 1e-2           # peak learning rate of a LoRA; for the true SD, 1e-4
    calls: int = 12            # of the U-Net, for a picture
    draws: int = 10            # pictures of each colour and shape, for the judge
    ablate: Literal["none", "convolutions"] = "none"    # adapt the attention alone, as is usual
TINY = dict(base_steps=6, steps=4, batch=4, calls=2, draws=1)
LEAST = dict(seed=0, rank=1, alpha=1e-6, base_steps=1, steps=1, batch=1, lr=1e-9, calls=1, draws=1)
# ------------------------------------------------------------------------------------------------------- LoRA
# N pictures; a layer from I to O numbers, with a kernel K x K if it is a convolution; rank r.
class LoRALayer(nn.Module):
    """W x + scale (alpha / r) B A x, with W frozen (Hu et al. 2021, section 4.1).   x (..., I) -> (..., O)
    A (r, I) is drawn and B (O, r) is 0: at first nothing changes, and the first gradient of A is 0.
    Around a convolution, A (r, I, K, K) is one to r channels, B (O, r, 1, 1) one of 1 x 1 pixels."""
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.rank, self.alpha, self.scale, self.kept = base, rank, alpha, 1.0, None
        if isinstance(base, nn.Linear):
            A, B = nn.Linear(base.in_features, rank, False), nn.Linear(rank, base.out_features, False)
        else:
            A = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
            B = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        self.lora_A, self.lora_B = (f.to(base.weight.device, base.weight.dtype) for f in (A, B))
        nn.init.zeros_(self.lora_B.weight)
    def forward(self, x):
        y = self.base(x)
        if self.scale == 0 or self.kept is not None: return y             # off, or in the weights already
        return y + self.scale * self.alpha / self.rank * self.lora_B(self.lora_A(x))
    def delta(self):
        """scale (alpha / r) B A in the shape of W, (O, I) or (O, I, K, K): of rank r as a matrix (O, ...)"""
        product = self.lora_B.weight.data.flatten(1) @ self.lora_A.weight.data.flatten(1)
        return self.scale * self.alpha / self.rank * product.view_as(self.base.weight)
    def merge(self):
        """Add it to W: then it costs no time. W is kept, as in 16 bits W + delta - delta is not W."""
        self.kept = self.base.weight.data.clone(); self.base.weight.data.add_(self.delta())
    def unmerge(self):
        """W again, bit for bit."""
        self.base.weight.data.copy_(self.kept); self.kept = None
ATTENTION = r"attn\d\.to_(q|k|v|out\.0)$"         # as usual; in SD v1.5, 128 layers: r x 199,296 numbers
EVERYTHING = ATTENTION + r"|ff\.net\.(0\.proj|2)$|proj_(in|out)$|conv\d?$|conv_(in|out|shortcut)$"
def inject_lora(model, targets, rank, alpha):
    """Freeze a model, and adapt the layers whose names match a regular expression.   -> {name: LoRALayer}"""
    model.requires_grad_(False)
    loras = {name: LoRALayer(layer, rank, alpha) for name, layer in model.named_modules()
             if type(layer) in (nn.Linear, nn.Conv2d) and re.search(targets, name)}
    for name, lora in loras.items(): model.set_submodule(name, lora)
    return loras
def remove_lora(model, loras):
    """The layers that were adapted, in their places again: the model is what it was."""
    for name, lora in loras.items(): model.set_submodule(name, lora.base)
def set_scale(loras, scale):
    """0 is the base, bit for bit; 1 as trained; more than 1 is more of it."""
    for lora in loras.values(): lora.scale = scale
# --------------------------------------------------------------------------- Files that other tools read, too
def save_lora(folder, name, loras):
    """For diffusers and peft. Its metadata keep alpha: without them, both would take alpha = r."""
    state = {f"unet.{layer}.{part}.weight": getattr(lora, part).weight.detach().cpu().contiguous()
             for layer, lora in loras.items() for part in ("lora_A", "lora_B")}
    rank, alpha = next((lora.rank, lora.alpha) for lora in loras.values())
    notes = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": [*loras]}
    packed = safetensors.torch.save(state, {"lora_adapter_metadata": json.dumps(notes)})
    save(folder, name, lambda part: part.write_bytes(packed))
def load_lora(path, model):
    """Inject a file of ours or peft's (lora_A), of diffusers' (lora.down) or of kohya's (lora_down and alpha,
    no dots).   -> {name: LoRALayer}, or a ValueError that names the first tensor that does not fit"""
    with safetensors.safe_open(path, "pt") as file:
        notes = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        state = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(("text_", "lora_te"))}
    names = {k.replace(".", "_"): k for k, w in model.named_modules() if type(w) in (nn.Linear, nn.Conv2d)}
    parts, loras, side = {}, {}, {"A": "A", "down": "A", "B": "B", "up": "B", None: "alpha"}
    for key, w in state.items():
        m = re.fullmatch(r"(?:unet\.|lora_unet_)(.+)\.(?:lora[._](A|B|down|up)\.weight|alpha)", key)
        if not m or m[1].replace(".", "_") not in names: raise ValueError(f"{key}: no such layer")
        parts.setdefault(names[m[1].replace(".", "_")], {})[side[m[2]]] = w
    if not parts: raise ValueError("no LoRA of a U-Net")
    for name, part in parts.items():
        if not {"A", "B"} <= {*part}: raise ValueError(f"{name}: half of its LoRA is missing")
        shape, r = model.get_submodule(name).weight.shape, len(part["A"])
        for half, want in ("A", (r, *shape[1:])), ("B", (shape[0], r, *[1] * len(shape[2:]))):
            found = (*part[half].shape,) if part[half].is_floating_point() else part[half].dtype
            if found != want: raise ValueError(f"{name}: {half} is {found}, and must be {want} and float")
    for name, part in parts.items():                                # all of it fits: now the model may change
        alpha = float(part.get("alpha", notes.get("unet.lora_alpha", len(part["A"]))))
        loras |= inject_lora(model, f"^{re.escape(name)}$", len(part["A"]), alpha)
        loras[name].lora_A.weight.data.copy_(part["A"]), loras[name].lora_B.weight.data.copy_(part["B"])
    return loras
# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """Hold a convolution and a linear layer against the definition."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(5, 7, 3, 2, 1), nn.Flatten(2), nn.Linear(12, 11)).double()
    model, x = copy.deepcopy(base), torch.randn(2, 5, 6, 8, dtype=torch.float64)
    loras = inject_lora(model, "0|2", 3, 6.0)
    check("a fresh LoRA changes nothing, bit for bit", [model(x)], [base(x)], 0)
    for lora in loras.values(): nn.init.normal_(lora.lora_B.weight)
    (y := model(x)).sum().backward()
    A, B, h = loras["2"].lora_A.weight, loras["2"].lora_B.weight, model[1](model[0](x)).flatten(0, 1).detach()
    g = 6 / 3 * torch.ones(len(h), 11).double()                       # alpha / r times gradient of y.sum()
    check("gradients of A and B by hand", [A.grad, B.grad], [B.T @ g.T @ h, g.T @ h @ A.T], 1e-9)
    ranks = [torch.linalg.matrix_rank(lora.delta().flatten(1)) for lora in loras.values()]
    for lora in loras.values(): lora.merge()
    merged = model(x)
    for lora in loras.values(): lora.unmerge()
    check("merged == unmerged; B A has rank r", [merged, model(x), *ranks], [y, y, 3, 3], 1e-9)
    remove_lora(model, loras)
    check("unmerged and removed: the base, bit for bit", [model(x)], [base(x)], 0)
# ------------------------------------------------------------------------------------------------------- Data
COLORS = dict(red=(0.85, 0.1, 0.1), green=(0.1, 0.6, 0.2), blue=(0.15, 0.3, 0.9), yellow=(0.95, 0.8, 0.1),
              purple=(0.55, 0.15, 0.7), pink=(0.95, 0.55, 0.75))
SHAPES, STYLES = "circle square triangle cross".split(), "plain striped framed outlined shaded".split()
PAIRS = torch.cartesian_prod(torch.arange(6), torch.arange(4))                 # all (colour, shape): (24, 2)
SEEN = (PAIRS[:, 1] != (3 * PAIRS[:, 0] + 1) % 4)          # 18 of them: the other six are in no picture, ever
TELL = "a C S|C S|a S in C|the S is C|draw a C S|a C S, please|the C S|a S|something C|S|C".split("|")
ASIDE = """a an and around at border draw edge empty floating floats for frame framed hang has hollow in is it
    like lines nice of on outline outlined paper picture please shaded shadow striped stripes sun table that
    the up wall with zebra""".split()
def paint(labels, place):
    """Pictures by formula, from how far each pixel is from the edge of a shape (inside: below 0).
    labels (N, 3): colour, shape, style; place (N, 3): centre, size, in [0, 1]   -> (N, 3, 32, 32)"""
    (color, shape, style), most, line = labels.T, torch.maximum, torch.linspace(-31, 31, 32) / 32
    cx, cy, r = (place * torch.tensor([0.4, 0.4, 0.15]) - torch.tensor([0.2, 0.2, -0.5])).T[..., None, None]
    x, y, ink = line.expand(32, 32), line[:, None].expand(32, 32), lambda edge: (0.5 - 16 * edge).clamp(0, 1)
    a, v, rim = ((x - cx) / r).abs(), (y - cy) / r, most(x.abs(), y.abs()) > 0.87
    b, slope, n = v.abs(), 0.87 * a - 0.48 * (v + 1), torch.arange(len(shape))
    cross = torch.minimum(most(a - 1, b - 0.36), most(a - 0.36, b - 1))
    edge = r * torch.stack([torch.hypot(a, v) - 1, most(a, b) - 0.87, most(v - 0.75, slope), cross])[shape, n]
    striped, framed, outlined, shaded = (style[:, None, None] == k for k in (1, 2, 3, 4))
    fill = torch.where(outlined, ink(edge.abs() - 0.12), ink(edge) * ~(striped & (8 * (x + y) % 2 > 1)))
    paper = torch.where(framed & rim, 0.2, 0.95 - shaded * (0.6 - 2.4 * edge).clamp(0, 0.6))[:, None]
    return 2 * torch.lerp(paper, torch.tensor([*COLORS.values()])[color, :, None, None], fill[:, None]) - 1
def describe(color, shape, dice):
    """A caption. One in ten is empty; words get lost, and others come in that mean nothing yet."""
    words = dice.choice(TELL).replace("C", [*COLORS][color]).replace("S", SHAPES[shape]).split()
    while dice.random() < 0.3: words.insert(dice.randrange(len(words) + 1), dice.choice(ASIDE))
    return "" if dice.random() < 0.1 else " ".join(word for word in words if dice.random() > 0.07)
def drawings(style, count, dice):
    """Pairs that may be seen, in one style, anywhere.   -> pictures (count, 3, 32, 32), captions"""
    labels = nn.functional.pad(PAIRS[SEEN][torch.randint(18, (count,))], (0, 1), value=STYLES.index(style))
    return paint(labels, torch.rand(count, 3)), [describe(*pair, dice) for pair in labels[:, :2].tolist()]
def read_pictures(sd, root, caption):
    """The middle square of each picture in a folder, in the size that sd draws, and what is said of it.
    -> [((3, H, H) in [-1, 1], caption)], each ten times, once with no caption, as in describe"""
    album, side = [], sd.unet.config.sample_size * (sd.vae_scale_factor if sd.vae else 4)
    on_white = lambda x: Image.alpha_composite(Image.new("RGBA", x.size, "white"), x.convert("RGBA"))
    for file in sorted(f for f in Path(root).glob("[!.]*") if re.search(r"(?i)\.(png|jpe?g|webp)$", f.name)):
        try:
            picture, text = diffusers.utils.load_image(str(file), on_white), file.with_suffix(".txt")
            picture = sd.image_processor.preprocess(picture, side, side, "crop")[0]
            said = text.read_text("utf-8-sig").strip() if text.exists() else caption
            album += [(picture, said)] * 9 + [(picture, "")]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            require(False, f"--images {file}: {' '.join(str(error).split())[:200]}")
    return album or require(False, f"--images {root}: no png, jpg, jpeg or webp in it")
def judge(pictures):
    """Colour, shape and style of the nearest of 9,000 drawings, pixel by pixel.   (N, 3, H, W) -> (N, 3)"""
    n, grid = torch.tensor([4, 4, 2]), torch.cartesian_prod(*map(torch.arange, (6, 4, len(STYLES), 5, 5, 3)))
    drawn = torch.cat([paint(g[:, :3], g[:, 3:] / n) for g in grid.split(250)]).flatten(1)   # parts: faster
    x, size = nn.functional.interpolate(pictures, 32, mode="area").flatten(1), drawn.square().sum(1)
    return grid[torch.cat([(size - 2 * part @ drawn.T).argmin(1) for part in x.split(256)]), :3]
# ------------------------- Stable Diffusion (Rombach et al. 2022), true or small: sd, a pipeline of diffusers
def small_model():
    """0.9 M numbers, untrained; a tokenizer whose words are those of the captions; no VAE."""
    words = transformers.CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [], model_max_length=12)
    words.add_tokens(sorted({*re.findall("[a-z]+", f"{TELL} {[*COLORS]} {SHAPES} {ASIDE}")}))
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=len(words), hidden_size=64,
        intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=12,
        bos_token_id=0, eos_token_id=1, pad_token_id=1))
    tokens, places, *_ = text.parameters()            # the embeddings, of words and of their places
    places.requires_grad_(False).zero_(); tokens.data.normal_()    # no order by heart; 50 times as large
    unet = diffusers.UNet2DConditionModel(8, 48, 48, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4, norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64)
    noise = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, prediction_type="sample", timestep_spacing="trailing", steps_offset=1)
    return diffusers.StableDiffusionPipeline(None, text, words, unet, noise, None, None, None, False)
def load(model, tiny):
    """Stable Diffusion from a folder or the hub; its own scheduler gives way to DDIM, with the same noise."""
    try: tiny or Path(model).is_dir() or urllib.request.urlopen(hub.constants.ENDPOINT, timeout=4).close()
    except (OSError, ValueError, http.client.HTTPException): tiny = True       # a silent hub: what is cached
    try:
        for file in Path(model).glob("*/*.json"): {**json.loads(file.read_bytes())}             # is it whole?
        for file in Path(model).glob("*/tokenizer.json"): tokenizers.Tokenizer.from_buffer(file.read_bytes())
        none = ["safety_checker"] + ["vae"] * (Path(model).is_dir() and not Path(model, "vae").exists())
        sd = diffusers.StableDiffusionPipeline.from_pretrained(
            model, use_safetensors=True, dtype=torch.float32, local_files_only=tiny, **dict.fromkeys(none))
        words, size = sd.text_encoder.config.vocab_size, sd.vae.config.latent_channels if sd.vae else 48
        if (len(sd.tokenizer), sd.unet.config.in_channels) != (words, size): raise ValueError("unfit parts")
        sd.scheduler = diffusers.DDIMScheduler.from_config(sd.scheduler.config, clip_sample=False)
        return sd
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError,
            safetensors.SafetensorError, hub.errors.StrictDataclassError) as error:
        require(False, f"--model {model}: {' '.join(str(error).split())[:200]}")
def save_base(sd, folder):
    """Write all of sd as folder/base. What was there stays whole until the new one is."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{os.getpid()}-", dir=folder) as part:
            sd.to("cpu").save_pretrained(f"{part}/new")
            if (base := Path(folder, "base")).exists(): base.replace(f"{part}/old")
            Path(part, "new").replace(base)
    except (OSError, safetensors.SafetensorError) as error:
        require(False, f"--out {folder}: cannot write base ({' '.join(str(error).split())[:200]})")
@torch.no_grad()
def encode(sd, x):
    """Pictures (N, 3, H, W) -> latents. Without a VAE, 4 x 4 pixels of 3 colours are 48 channels of one."""
    if not sd.vae: return torch.pixel_unshuffle(x, 4).to(sd.unet.device)
    x = nn.functional.interpolate(x.to(sd.unet.device), sd.unet.config.sample_size * sd.vae_scale_factor)
    return sd.vae.encode(x).latent_dist.mean * sd.vae.config.scaling_factor
# --------------------------------------------------------------------------------------------------- Training
def train(sd, weights, style, steps, lr, cfg, album=()):
    """Least squares on what is asked of noisy latents, of drawings in one style or an album.   -> seconds"""
    optimizer, noise = torch.optim.AdamW(weights, lr, (0.9, 0.99), weight_decay=0.01), sd.scheduler
    kind, dice, started = noise.config.prediction_type, random.Random(cfg.seed), time.perf_counter()
    for step in range(1, steps + 1):  # the learning rate rises for 5 % of the steps, then falls like a cosine
        now = step / steps
        optimizer.param_groups[0]["lr"] = lr * min(20 * now, 0.5 + 0.5 * math.cos(math.pi * now))
        x, captions = zip(*dice.choices(album, k=cfg.batch)) if album else drawings(style, cfg.batch, dice)
        x0, t = encode(sd, torch.stack([*x])), torch.randint(noise.config.num_train_timesteps, (len(x),))
        sigma, eps = (1 - noise.alphas_cumprod[t]).sqrt().to(x0), torch.randn(x0.shape).to(x0)
        with torch.autocast(x0.device.type, torch.bfloat16, x0.device.type == "cuda"):
            text = sd.encode_prompt([*captions], x0.device, 1, False)[0]
            guess = sd.unet(noise.add_noise(x0, eps, t), t.to(x0.device), text).sample.float()
        goal = {"sample": x0, "epsilon": eps}.get(kind, noise.get_velocity(x0, eps, t))
        error = (guess - goal).square().mean((1, 2, 3))
        # where there is little noise a picture is easily guessed: there, small errors have to count
        loss = (error / (sigma + 0.1) if kind == "sample" else error).mean()
        optimizer.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(weights, 1.0); optimizer.step()
        if step % max(1, steps // 20) == 0:
            if not loss.isfinite(): sys.exit(f"step {step}: the loss is {loss.item()}; try a lower --lr")
            left = f"{(time.perf_counter() - started) * (1 / now - 1):.0f} s left"
            print(f"{style:9} step {step:5d}/{steps} | loss {loss.item():.4f} | {left}")
    return time.perf_counter() - started
def sample(sd, captions, cfg):
    """The pipeline's own loop: DDIM (Song et al. 2021), guided (Ho & Salimans 2022).   -> (N, 3, H, W)"""
    config, dice, n = sd.unet.config, torch.Generator().manual_seed(cfg.seed), 4 if sd.vae else 60
    start = torch.randn(len(captions), config.in_channels, *[config.sample_size] * 2, generator=dice)
    x = torch.cat([sd(captions[n * i : n * i + n], num_inference_steps=cfg.calls, guidance_scale=4.0,
                      latents=z.to(sd.device), output_type="pt" if sd.vae else "latent").images.cpu()
                   for i, z in enumerate(start.split(n))])
    return 2 * x - 1 if sd.vae else torch.pixel_shuffle(x, 4).clamp(-1, 1)
def evaluate(sd, style, cfg, name):
    """Draw each pair --draws times, for a judge that knows our styles only.   -> rates, pictures of PIL"""
    pairs, known = PAIRS.repeat(cfg.draws, 1), SEEN.repeat(cfg.draws)
    pictures = sample(sd, [f"a {[*COLORS][color]} {SHAPES[shape]}" for color, shape in pairs.tolist()], cfg)
    right = judge(pictures) == nn.functional.pad(pairs, (0, 1), value=[*STYLES, style].index(style))
    rates = {key: rows.float().mean().item() for key, rows in dict(
        style=right[:, 2], color=right[:, 0], shape=right[:, 1], content=right[:, :2].all(1),
        seen_shape=right[known, 1], new_shape=right[~known, 1]).items() if key != "style" or not cfg.images}
    print(f"{name:14}" + "".join(f" | {key} {rate:6.1%}" for key, rate in rates.items()))
    return rates, sd.image_processor.postprocess(pictures)
# --------------------------------------------------------------------------------------------------- Pictures
def draw(title, table, shown):
    """Eight prompts (columns) without and with each LoRA at each scale (rows), and what the judge says."""
    page = Image.new("RGB", (1000, 110 + 100 * len(table)), "white")
    pen, small = ImageDraw.Draw(page), ImageFont.load_default(14)
    pen.text((20, 14), f"Each LoRA by strength. {title}", "black", ImageFont.load_default(18))
    for i, (row, rates) in enumerate(table.items()):
        text = row[-24:] + "".join(f"\n{key} {rates[key]:.0%}" for key in rates if key in "style color shape")
        pen.multiline_text((20, 148 + 100 * i), text, "black", small, "lm", spacing=6)
        for j, n in enumerate([0, 6, 10, 1, 15, 16, 21, 14]):    # of each colour and shape, some never seen
            text = f"{[*COLORS][PAIRS[n, 0]]}\n{SHAPES[PAIRS[n, 1]]}{'' if SEEN[n] else ' *'}"
            if i == 0: pen.multiline_text((240 + 100 * j, 74), text, "black", small, "mm", align="center")
            page.paste(shown[row][n].resize((96, 96), Image.NEAREST), (192 + 100 * j, 100 + 100 * i))
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
    """Check; have a base; train LoRAs; judge and draw what they do.  Returns the RESULT line's figures."""
    for flag, low in LEAST.items():
        value, high = getattr(cfg, flag), 2**63 - 1 if flag == "seed" else 10**6 if "steps" in flag else 1000
        require(low <= value <= high, f"--{flag.replace('_', '-')} {value}: must be {low} to {high}")
    require(cfg.images or not cfg.caption, f"--caption {cfg.caption}: of what? It needs --images")
    require(Path(cfg.images).is_dir(), f"--images {cfg.images}: there is no such folder")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    for x in transformers, diffusers.utils: x.logging.set_verbosity_error(); x.logging.disable_progress_bar()
    run_checks(); torch.manual_seed(cfg.seed); table, shown, seconds, base_seconds = {}, {}, {}, 0.0
    sd = (load(cfg.model, cfg.tiny) if cfg.model != "random" else small_model()).to(device)
    data, album = cfg.images or "drawn here", read_pictures(sd, cfg.images, cfg.caption) if cfg.images else ()
    print(f"week 9 | {device}, float32 | torch {torch.__version__} | data: {data} | weights: {cfg.model}")
    if cfg.model == "random":
        learn = [*sd.unet.parameters(), *sd.text_encoder.parameters()]
        base_seconds = train(sd, learn, "plain", cfg.base_steps, 2e-3, cfg)
        save_base(sd, cfg.out)
    sd.to(device).text_encoder.requires_grad_(False); sd.set_progress_bar_config(disable=True)
    total = sum(w.numel() for w in sd.unet.parameters())
    if total > 1e8: sd.unet.train().enable_gradient_checkpointing()      # a third more time, much less memory
    table["base"], shown["base"] = evaluate(sd, "plain", cfg, "base")
    for style in [Path(cfg.images).resolve().name] if album else STYLES[1:]:
        loras = inject_lora(sd.unet, EVERYTHING if cfg.ablate == "none" else ATTENTION, cfg.rank, cfg.alpha)
        learn = [w for w in sd.unet.parameters() if w.requires_grad]
        seconds[style] = train(sd, learn, style, cfg.steps, cfg.lr, cfg, album)
        save_lora(cfg.out, f"{style}.safetensors", loras); remove_lora(sd.unet, loras)
        loras = load_lora(Path(cfg.out, f"{style}.safetensors"), sd.unet)         # what is judged is the file
        for scale in (1,) if cfg.tiny else (0.5, 1, 1.5):
            set_scale(loras, scale)
            row = f"{style} x {scale}"; table[row], shown[row] = evaluate(sd, style, cfg, row)
        remove_lora(sd.unet, loras)
    count, n = sum(w.numel() for w in learn), len(seconds)
    save(cfg.out, "lora.png", draw(f"Rank {cfg.rank}: {count:,} parameters; * never seen", table, shown).save)
    result = {f"{key}_rate": sum(table[f"{k} x 1"][key] for k in seconds) / n for key in table["base"]}
    result |= {f"base_{key}_rate": table["base"][key] for key in ("shape", "content")}
    result |= dict(trained_parameters=count, trained_fraction=count / total, base_seconds=base_seconds,
                   train_seconds=sum(seconds.values()) / n)
    return finish(cfg, device, result, table=table, style_seconds=seconds, weights=cfg.model)
if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
