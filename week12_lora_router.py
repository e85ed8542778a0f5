# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "transformers>=5.1", "diffusers>=0.36", "huggingface-hub>=1.3",
#                 "safetensors>=0.4.5", "pillow>=10.1", "tokenizers>=0.22"]
# ///
"""Week 12: a router that injects LoRA adapters. Each prompt gets the adapter of the style that it asks for.
Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (week 9 makes such adapters).
The idea: W x + B (g * A x), with all adapters side by side in A and B. A light classifier reads the prompt's
text features and writes g: row n is the weight of each adapter for picture n. Nothing else changes.

    python week12_lora_router.py                                    # trains what it needs, compares, draws
    python week12_lora_router.py --route "a red circle like a zebra"      # then; or -, to read line by line

Expected: 100 % of unseen phrasings routed, 95 % of pictures right (oracle 96, base 20), 6 min on one core.
"""
import argparse, copy, http.client, inspect, json, math, os, random, re, statistics, sys, tempfile, time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args
import diffusers, huggingface_hub as hub, safetensors.torch, tokenizers, torch, transformers, urllib.request
from PIL import Image, ImageDraw, ImageFont
from torch import nn
# ----------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    device: str = "auto"       # auto = cuda if there is one, else cpu; or by name: cpu, cuda:1, mps
    seed: int = 1337           # the same seed on the same CPU gives the same losses, bit for bit
    tiny: bool = False         # everything smallest, and no network: to see that it runs
    out: str = "out/week12"    # folder for everything that is written
    model: str = "random"      # SD: an ID on the hub (ID@REVISION), a folder, or random = small, trained here
    adapters: str = ""         # LoRAs for --model: a folder of safetensors, week 9's or anyone's
    route: str = ""            # draw this prompt with what is there, train nothing; - = standard input
    budget: float = 0.5        # MiB on the device for adapters
    threshold: float = 0.5     # an adapter with a lower score stays off
    base_steps: int = 1000     # optimizer steps of the small model
    steps: int = 600           # optimizer steps of its adapters, all of them at once
    calls: int = 12            # of the U-Net, for a picture
TINY = dict(base_steps=6, steps=4, calls=2)
LEAST = dict(seed=0, budget=1e-6, threshold=0, base_steps=1, steps=1, calls=1)
# -------------------------------------------------------------------------------------- Adapters and a router
# N samples; S slots of rank R; a layer from I to O numbers, with a kernel K x K if it is a convolution.
class LoRASlots(nn.Module):
    """W x + B (g * A x): A (S R, I) and B (O, S R) hold S adapters, the gate g (N, S R) says how much of each
    sample n wears; 0 adds 0 (Hu et al. 2021, with a gate). For convolutions, A (.., K, K), B (.., 1, 1)."""
    def __init__(self, base, gate):
        super().__init__(); self.base, self.gate, (O, I, *K) = base, gate, base.weight.shape
        self.A = nn.Parameter(nn.init.kaiming_uniform_(base.weight.new_empty(gate.shape[1], I, *K), 5**0.5))
        self.B = nn.Parameter(base.weight.new_zeros(O, gate.shape[1], *[1 for _ in K]))
    def forward(self, x):
        y, g = self.base(x), self.gate[: len(x)]
        if self.A.dim() == 2: return y + (x @ self.A.T * (g[:, None] if x.dim() > 2 else g)) @ self.B.T
        h = nn.functional.conv2d(x, self.A, None, self.base.stride, self.base.padding)
        return y + nn.functional.conv2d(h * g[:, :, None, None], self.B)
class Wardrobe:
    """Adapters {name: {layer: (A, B)}} for a model, and slots for as many as a budget of bytes holds, made
    once. What comes in is a copy; the adapter that was not used for longest makes room."""
    def __init__(self, model, adapters, budget):
        self.adapters, self.worn, one = adapters, {}, next(model.requires_grad_(False).parameters())
        layers = {k: model.get_submodule(k) for parts in adapters.values() for k in parts}
        self.R = max(len(A) for parts in adapters.values() for A, _ in parts.values())
        each = self.R * one.element_size() * sum(m.weight[0].numel() + len(m.weight) for m in layers.values())
        self.S = int(min(len(adapters), 32, budget / each))
        require(self.S > 0, f"--budget {budget / 2**20:g}: one adapter takes {each / 2**20:.3f} MiB")
        self.gate, self.bytes = torch.zeros(64, self.S * self.R).to(one), self.S * each
        self.slots = {layer: LoRASlots(base, self.gate) for layer, base in layers.items()}
        for layer, slot in self.slots.items(): model.set_submodule(layer, slot)
    def fetch(self, name):
        """Copy an adapter into a slot; layers and rows that the adapter does not have are 0."""
        if (n := self.worn.pop(name, None)) is None:
            n = len(self.worn) if len(self.worn) < self.S else self.worn.pop(next(iter(self.worn)))
            for layer, slot in self.slots.items():
                A, B = slot.A.data.split(self.R)[n].zero_(), slot.B.data.split(self.R, 1)[n].zero_()
                a, b = self.adapters[name].get(layer, (A[:0], B[:, :0]))
                A[: len(a)].copy_(a), B[:, : len(a)].copy_(b)
        self.worn[name] = n                                                 # in order of use, the latest last
    def wear(self, choices):
        """Write the gate: sample n wears one adapter, (name, weight), or none, ("", 0)."""
        rows = torch.zeros(len(choices), self.S, self.R)
        for n, (name, weight) in enumerate(choices): rows[n, self.worn[name] if name else []] = weight
        self.gate[: len(rows)].copy_(rows.flatten(1))
def read_adapter(path, model):
    """A LoRA of ours or peft's (lora_A, lora_B), or of diffusers' (lora.down, lora.up), for a U-Net.
    -> {layer: (A, B alpha / r)}, prompts that want it; or exit 2, with the first tensor that does not fit"""
    parts, key = {}, "header"
    try:
        with safetensors.safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            alpha, wanted = notes.get("unet.lora_alpha", 0), [*map(str, notes.get("examples", [path.stem]))]
            for key in file.keys():
                layer, half = re.fullmatch(r"unet\.(.+)\.lora[._](A|B|down|up)\.weight", key).groups()
                parts.setdefault(layer, {})[half in ("B", "up")] = file.get_tensor(key).float()
        for key, part in parts.items():
            W, A, B = model.get_submodule(key).weight, part[False], part[True]
            if (A.shape[1:], B.shape[:2], B.dim()) != (W.shape[1:], (len(W), len(A)), W.dim()):
                raise ValueError(f"A {(*A.shape,)} and B {(*B.shape,)} do not fit W {(*W.shape,)}")
            parts[key] = A, B * ((alpha or len(A)) / len(A))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, safetensors.SafetensorError) as error:
        require(False, f"--adapters: {path}: {key}: {' '.join(str(error).split())[:200]}")
    return parts, wanted
@torch.no_grad()
def features(sd, prompts):
    """Means over tokens of the text encoder's input embeddings and last hidden states; a 1.   -> (N, D)"""
    ids = torch.tensor(sd.tokenizer(prompts, padding="max_length", truncation=True).input_ids).to(sd.device)
    read, said = sd.text_encoder.get_input_embeddings()(ids), sd.text_encoder(ids).last_hidden_state
    return torch.cat([read.mean(1), said.mean(1), torch.ones_like(said[:, 0, :1])], 1).cpu()
def fit_router(sd, wanted, each=400, decay=1e-4):
    """{adapter: prompts that want it}, each against the others and against prompts that want none, by ridge
    regression: an equation to solve.   -> a function: N prompts, threshold -> N times (adapter, weight)"""
    dice, texts, names = random.Random(0), [], [*wanted]
    for group in [*fill("|".join(TELL))], *wanted.values():
        for words in map(str.split, dice.choices(group, k=each)):      # strewn with words that decide nothing
            for _ in range(dice.randrange(5)): words.insert(dice.randint(0, 9), dice.choice(ORDINARY))
            texts.append(" ".join(words))
    x, y = features(sd, texts).double(), torch.eye(1 + len(names)).double()[:, 1:].repeat_interleave(each, 0)
    W = torch.linalg.solve(x.T @ x + decay * x.norm() ** 2 / len(x.T) * torch.eye(len(x.T)), x.T @ y).float()
    score = lambda prompts: (features(sd, prompts) @ W).clamp(0, 1)                  # (N, number of adapters)
    choose = lambda p, least: (names[p.argmax()], p.max().item()) if p.max() >= least else ("", 0.0)
    return lambda prompts, threshold: [choose(p, threshold) for p in score(prompts)]
# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """One batch of samples that wear different adapters, against weights with the update added by hand."""
    torch.manual_seed(0); new = lambda *size: torch.randn(size).double()
    base = nn.Sequential(nn.Conv2d(5, 7, 3, 2, 1), nn.Flatten(2), nn.Linear(12, 11)).double()
    made = {name: {"0": (new(r, 5, 3, 3), new(7, r, 1, 1)), "2": (new(r, 12), new(11, r))}
            for name, r in dict(p=3, q=1, r=2).items()}
    net, x, by_hand = copy.deepcopy(base), new(4, 5, 6, 8), []
    wardrobe = Wardrobe(net, made, budget=5220)                # 2.9 slots of 8 x 3 x (45 + 7 + 12 + 11) bytes
    for name in "pqpr": wardrobe.fetch(name)                                       # when r comes, q has to go
    check("no adapter: the base, bit for bit", [net(x)], [base(x)], 0)
    wardrobe.wear(choices := [("p", 1), ("", 0), ("r", 0.75), ("p", -2)])
    for sample, (name, weight) in zip(x, choices):
        W = copy.deepcopy(base.state_dict())
        for k, (A, B) in made.get(name, {}).items():
            W[f"{k}.weight"] += weight * (B.flatten(1) @ A.flatten(1)).view_as(W[f"{k}.weight"])
        by_hand.append(torch.func.functional_call(base, W, sample[None])[0])
    check("four samples, mixed == W + g B A, one by one", net(x), by_hand, 1e-9)
# ------------------------------------------------------------------------------------------------------- Data
COLORS = dict(red=(0.85, 0.1, 0.1), green=(0.1, 0.6, 0.2), blue=(0.15, 0.3, 0.9), yellow=(0.95, 0.8, 0.1),
              purple=(0.55, 0.15, 0.7), pink=(0.95, 0.55, 0.75))
SHAPES, STYLES = "circle square triangle cross".split(), "plain striped framed outlined shaded".split()
PAIRS = torch.cartesian_prod(torch.arange(6), torch.arange(4))                 # all (colour, shape): (24, 2)
SEEN = (PAIRS[:, 1] != (3 * PAIRS[:, 0] + 1) % 4)          # 18 of them: the other six are in no picture, ever
TELL = "a C S|C S|a S in C|the S is C|draw a C S|a C S, please|the C S|a S|something C|S|C".split("|")
ORDINARY = "a the of with and in on at it is that like around for an has draw please nice paper table".split()
PHRASES = dict(striped="a striped C S|striped, S|C S with stripes|stripes, S|lines, S|a S of lines|zebra, S",
    framed="a framed C S|a C S in a frame|frame, S|S with a C border|border, S|wall, S|hang up a C S|hang, S",
    outlined="an outlined C S|outlined S|outline, S|a hollow S|hollow, S|edge of a S|edge, S|empty, S",
    shaded="a shaded C S|C S with a shadow|shadow, S|S in the sun|sun, S|floating C S|floating, S|C S floats")
UNSEEN = {"": "draw the C S, please|a S that is C|a nice S in C|the S on the table is C|it is a C S",
    "striped": "a S with C stripes|the C S is striped|a S like a C zebra|C lines on a S|draw a zebra S, C",
    "framed": "the C S is framed|a S in C with a frame|a border for a C S|hang the S, C|a C S for the wall",
    "outlined": "draw a hollow C S|the S in C is empty|a C S has an edge|a S in outline, C|C, an outlined S",
    "shaded": "the sun and a C S|a C S that floats|the C S has a shadow|a S in C, shaded|a S in the sun, C"}
ASIDE = sorted({*re.findall("[a-z]+", f"{PHRASES} {UNSEEN} {ORDINARY} picture")})
def fill(phrases):
    """Each phrasing with each colour and shape.   -> {prompt: [colour, shape]}"""
    return {text.replace("C", [*COLORS][c]).replace("S", SHAPES[s]): [c, s]
            for text in phrases.split("|") for c, s in PAIRS.tolist()}
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
def judge(pictures):
    """Colour, shape and style of the nearest of 9,000 drawings, pixel by pixel.   (N, 3, H, W) -> (N, 3)"""
    n, grid = torch.tensor([4, 4, 2]), torch.cartesian_prod(*map(torch.arange, (6, 4, len(STYLES), 5, 5, 3)))
    drawn = torch.cat([paint(g[:, :3], g[:, 3:] / n) for g in grid.split(250)]).flatten(1)   # parts: faster
    x, size = nn.functional.interpolate(pictures, 32, mode="area").flatten(1), drawn.square().sum(1)
    return grid[torch.cat([(size - 2 * part @ drawn.T).argmin(1) for part in x.split(256)]), :3]
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
    """Stable Diffusion, a pipeline of diffusers, from a folder or the hub."""
    none = ["safety_checker"] + ["vae"] * (Path(model, "unet").exists() and not Path(model, "vae").exists())
    try: tiny or Path(model).is_dir() or urllib.request.urlopen(hub.constants.ENDPOINT, timeout=4).close()
    except (OSError, ValueError, http.client.HTTPException): tiny = True       # a silent hub: what is cached
    try:
        for file in Path(model).glob("*/*.json"): {**json.loads(file.read_bytes())}             # is it whole?
        for file in Path(model).glob("*/tokenizer.json"): tokenizers.Tokenizer.from_buffer(file.read_bytes())
        return diffusers.StableDiffusionPipeline.from_pretrained(
            model, use_safetensors=True, dtype=torch.float32, local_files_only=tiny, **dict.fromkeys(none))
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
# --------------------------------------------------------------------------------------- Training and serving
def train(sd, weights, styles, steps, lr, cfg, wardrobe=None):
    """Week 9's least squares. With a wardrobe, drawings wear the adapter of their style: all learn."""
    optimizer, dice, start = torch.optim.AdamW(weights, lr, (0.9, 0.99)), random.Random(cfg.seed), time.time()
    n, alpha = 4 if cfg.tiny else 64 if wardrobe else 32, sd.scheduler.alphas_cumprod.to(sd.device)
    style = torch.tensor([STYLES.index(styles[i % len(styles)]) for i in range(n)])
    if wardrobe: wardrobe.wear([(STYLES[k], 1) for k in style])
    for step in range(1, steps + 1):  # the learning rate rises for 5 % of the steps, then falls like a cosine
        now, pairs, t = step / steps, PAIRS[SEEN][torch.randint(18, (n,))], torch.randint(1000, (n,))
        optimizer.param_groups[0]["lr"] = lr * min(20 * now, 0.5 + 0.5 * math.cos(math.pi * now))
        x0 = paint(torch.cat([pairs, style[:, None]], 1), torch.rand(n, 3)).to(sd.device)
        x0, text = torch.pixel_unshuffle(x0, 4), [describe(*pair, dice) for pair in pairs.tolist()]
        noisy, t = sd.scheduler.add_noise(x0, torch.randn(x0.shape).to(x0), t), t.to(sd.device)
        guess = sd.unet(noisy, t, sd.encode_prompt(text, sd.device, 1, False)[0]).sample
        loss = ((guess - x0).square().mean((1, 2, 3)) / (0.1 + (1 - alpha[t]).sqrt())).mean()
        optimizer.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(weights, 1.0); optimizer.step()
        if step % max(1, steps // 20) == 0:
            if not loss.isfinite(): sys.exit(f"step {step}: the loss is {loss.item()}; try another --seed")
            left = (time.time() - start) * (1 / now - 1)
            print(f"{' '.join(styles)} | step {step:4d}/{steps} | loss {loss.item():.4f} | {left:.0f} s left")
def make(cfg, device):
    """Train the small model, then, with it frozen, an adapter for each style.   -> --out: base, adapters"""
    sd, R = small_model().to(device), 2
    train(sd, [*sd.unet.parameters(), *sd.text_encoder.parameters()], STYLES[:1], cfg.base_steps, 2e-3, cfg)
    save_base(sd, cfg.out); sd.to(device).text_encoder.requires_grad_(False)
    empty = {k: (m.weight[:R], 0) for k, m in sd.unet.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    wardrobe = Wardrobe(sd.unet, dict.fromkeys(PHRASES, empty), math.inf)            # A is drawn, and B is 0
    wardrobe.worn = {style: n for n, style in enumerate(PHRASES)}
    learn = {k: w for k, w in sd.unet.named_parameters() if w.requires_grad}           # k = layer.A, layer.B
    train(sd, [*learn.values()], STYLES[1:], cfg.steps, 1e-2, cfg, wardrobe)
    for n, (style, told) in enumerate(PHRASES.items()):
        state = {f"unet.{k[:-1]}lora_{k[-1]}.weight": w.data.split(R, "AB".index(k[-1]))[n].cpu().contiguous()
                 for k, w in learn.items()}
        note = {"unet.r": R, "unet.lora_alpha": R, "unet.target_modules": [*empty], "examples": [*fill(told)]}
        packed = safetensors.torch.save(state, {"lora_adapter_metadata": json.dumps(note)})
        save(Path(cfg.out, "adapters"), f"{style}.safetensors", lambda part: part.write_bytes(packed))
def answer(sd, wardrobe, prompts, choices, cfg):
    """Fetch, wear, let the pipeline draw: at most as many prompts as slots.   -> pictures, log's row"""
    held, started, side = {*wardrobe.worn}, time.perf_counter(), 8 * sd.unet.config.sample_size
    for name in filter(None, dict(choices)): wardrobe.fetch(name)
    wardrobe.wear(choices * 2)                               # the pipeline asks with the prompts, and without
    now, dice = time.perf_counter(), [torch.Generator().manual_seed(sum(text.encode())) for text in prompts]
    x = sd(prompts, side, side, cfg.calls, guidance_scale=5.0, generator=dice,
           output_type="pt" if sd.vae else "latent").images.float().cpu()
    row = dict(prompts=prompts, choices=choices, loaded=sorted({*wardrobe.worn} - held),
               evicted=sorted(held - {*wardrobe.worn}), bytes=wardrobe.bytes, swap_ms=1e3 * (now - started),
               draw_ms=1e3 * (time.perf_counter() - now), cuda_peak_bytes=torch.cuda.max_memory_allocated())
    return 2 * x - 1 if sd.vae else torch.pixel_shuffle(x, 4).clamp(-1, 1), row
def evaluate(sd, router, wardrobe, cfg):
    """Unseen phrasings: are the choice, the colour, shape and style right?   -> table, log of the router"""
    dice, names, table = random.Random(cfg.seed), [*wardrobe.adapters], {}
    rows = [(text, style, [*pair, STYLES.index(style or "plain")]) for style, told in UNSEEN.items()
            if style in ("", *names) for text, pair in fill(told).items()]
    texts, styles, labels = zip(*dice.sample(rows, 10 if cfg.tiny else 200))
    ways = dict(base=[("", 1.0)] * len(texts), oracle=[(style, 1.0) for style in styles],
                keyword=[(next((k for k in names if k in text), ""), 1.0) for text in texts],
                random=[(dice.choice(["", *names]), 1.0) for _ in texts], router=router(texts, cfg.threshold))
    for way, choices in ways.items():
        size = 1 if way == "router" else wardrobe.S
        pictures, log = zip(*(answer(sd, wardrobe, [*texts[k : k + size]], choices[k : k + size], cfg)
                              for k in range(0, len(texts), size)))
        right = (judge(torch.cat(pictures)) == torch.tensor(labels)).float()
        route = torch.tensor([[a == b] for (a, _), b in zip(choices, styles)])
        right = torch.cat([right, right.prod(1, True), route], 1).mean(0).tolist()
        table[way] = dict(zip("color shape style all route".split(), right))
        print(f"{way:8}" + "".join(f" | {key} {rate:6.1%}" for key, rate in table[way].items()))
    return table, log
# --------------------------------------------------------------------------------------------------- Pictures
def draw(log, columns):
    """Prompts down the side; what the base, each adapter and the router's choice made of them."""
    page = Image.new("RGB", (330 + 100 * len(columns), 84 + 100 * len(log)), "white")
    (pen := ImageDraw.Draw(page)).font = ImageFont.load_default(16)
    pen.text((20, 14), "What each adapter makes of a prompt; in red, what the router chose", "black")
    for i, row in enumerate(log):
        pen.text((20, 112 + 100 * i), "{}\n{} {:.2f}".format(*row["prompts"], *row["choices"][0]), "black")
        for j, (title, pictures) in enumerate(columns.items()):
            if i == 0: pen.text((374 + 100 * j, 66), title or "base", "black", anchor="mm")
            x, y, ring = 324 + 100 * j, 82 + 100 * i, "red" if title == row["choices"][0][0] else "white"
            pen.rectangle((x, y, x + 99, y + 99), ring)
            data = (127.5 * pictures[i] + 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
            page.paste(Image.fromarray(data).resize((96, 96), Image.NEAREST), (x + 2, y + 2))
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
    """Check; have a base and adapters; route, draw, judge, time.  Returns the RESULT line's figures."""
    for flag, low in LEAST.items():
        value, high = getattr(cfg, flag), 2**62 if flag == "seed" else 10**6
        require(low <= value <= high, f"--{flag.replace('_', '-')} {value}: must be {low} to {high}")
    require((cfg.model == "random") != bool(cfg.adapters), f"--model {cfg.model}, --adapters: both or none")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    for x in transformers, diffusers.utils: x.logging.set_verbosity_error(); x.logging.disable_progress_bar()
    run_checks(); torch.manual_seed(cfg.seed)
    print(f"week 12 | {device} | torch {torch.__version__} | weights: {cfg.model} | data: drawn here")
    if not (cfg.adapters or cfg.route): make(cfg, device)
    base, folder = (cfg.model, cfg.adapters) if cfg.adapters else (f"{cfg.out}/base", f"{cfg.out}/adapters")
    started, sd = time.perf_counter(), load(base, cfg.tiny).to(device)
    found = {path.stem: read_adapter(path, sd.unet) for path in sorted(Path(folder).glob("*.safetensors"))}
    require(found, f"--adapters {folder}: no such folder, or no *.safetensors in it")
    wardrobe = Wardrobe(sd.unet, {name: parts for name, (parts, _) in found.items()}, cfg.budget * 2**20)
    reload_ms = 1e3 * (time.perf_counter() - started); sd.set_progress_bar_config(disable=True)
    router = fit_router(sd, {name: wanted for name, (_, wanted) in found.items()})
    if cfg.route:
        for n, prompt in enumerate(map(str.strip, sys.stdin if cfg.route == "-" else [cfg.route])):
            pictures, row = answer(sd, wardrobe, [prompt], router([prompt], cfg.threshold), cfg)
            save(cfg.out, f"prompt{n}.png", draw([row], {"": pictures}).save); print(json.dumps(row))
        return print(f"RESULT out={cfg.out}")
    table, log = evaluate(sd, router, wardrobe, cfg)
    save(cfg.out, "requests.jsonl", lambda part: part.write_text("\n".join(map(json.dumps, log)) + "\n"))
    columns = {name: [answer(sd, wardrobe, row["prompts"], [(name, 1.0)], cfg)[0][0]
                      for row in log[:8]] for name in ["", *found][:7]}
    save(cfg.out, "router.png", draw(log[:8], columns).save)
    ms = lambda new: statistics.median([row["swap_ms"] for row in log if bool(row["loaded"]) is new] or [0.0])
    bytes_base = sum(w.nbytes for w in sd.unet.parameters()) - wardrobe.bytes
    result = dict(routing_accuracy=table["router"]["route"], end_to_end=table["router"]["all"],
                  end_to_end_oracle=table["oracle"]["all"], end_to_end_base=table["base"]["all"],
                  swap_ms=ms(False), load_ms=ms(True), reload_ms=reload_ms, bytes_base=bytes_base,
                  bytes_adapters=wardrobe.bytes, bytes_full_copies=len(found) * bytes_base)
    return finish(cfg, device, result, table=table, weights=cfg.model, adapters=[*found])
if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
