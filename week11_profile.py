# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "diffusers>=0.36", "transformers>=5.1", "safetensors>=0.4.5", "pillow>=10.1"]
# ///
"""Week 11: where the memory of Stable Diffusion goes, and how to get it back.
Papers: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; Dao et al. 2022, "FlashAttention".
The idea: memory is taken when an operation makes a tensor, and freed when nothing refers to it. Watch both:
you know all live bytes, by kind; on the meta device, which has shapes but no numbers, before a model runs.

    python week11_profile.py                              # predicted at 512 x 512; run, smaller: --technique
    python week11_profile.py --model FOLDER               # your Stable Diffusion v1.5

Expected: 512 x 512 predicted at 106 MiB, not 5,626 (naive) or 4,236 (fused); 128 x 128 measured as predicted.
"""
import argparse, copy, gc, inspect, itertools, json, math, os, sys, tempfile, time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args
import diffusers, safetensors, torch, torch.nn.functional as F, torch.utils.checkpoint, transformers, weakref
from PIL import Image, ImageDraw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
# ----------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    device: str = "auto"       # auto = cuda if there is one, else cpu; or by name: cpu, cuda:1, mps
    seed: int = 1337           # the same seed on the same CPU gives the same weights, where they are random
    tiny: bool = False         # everything smallest, and no network: to see that it runs
    out: str = "out/week11"    # folder for everything that is written
    model: str = "random"      # true size, random weights; or a folder, or cached ID, of SD v1.5's kind
    size: int = 128            # side of the images that are made and measured; and tokens of GPT-2's text
    predict: int = 512         # side of those that are predicted
    batch: int = 1             # images at once
    steps: int = 1             # denoising steps
    technique: str = "all"     # only rows of the table with one of these words, such as fused,int8
    limit: float = 6.0         # what is predicted to need more GB than this is not run
TINY = dict(size=64, predict=64)
FULL = dict(unet=dict(sample_size=64, cross_attention_dim=768), gpt=dict(config=transformers.GPT2Config()),
            vae=dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                     down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4))
SMALL = dict(unet=dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), block_out_channels=(16, 32),
                       up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
                       layers_per_block=1, attention_head_dim=2, mid_block_type=None, cross_attention_dim=24),
             vae=FULL["vae"] | dict(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=0),
             gpt=dict(config=transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4)))
CLEAN = [*(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0).tolist(), 1]      # alpha-bar
ROWS = ("unet, unet sliced, unet sliced diffusers, unet fused, unet fused diffusers, unet cache, unet split, "
        "unet half, unet int8, unet fp8 diffusers, unet offload, vae, vae slices, vae slices diffusers, vae "
        "tiles, vae tiles diffusers, train, train checkpoint, train checkpoint diffusers, train adamw, train "
        "adamw checkpoint fused, gpt, gpt cache, gpt cache int8, image, image half turns, image fused cache "
        "split half int8 offload tiles")
# ------------------------------------------------------------------------------------------- The memory meter
class Meter(TorchDispatchMode):
    """The bytes alive on a device, by kind, after each operation: the trace. All that torch does, backward
    too, comes to __torch_dispatch__ with its results: views of storages, which live while they are needed."""
    running, unnamed, saved, peak = None, "activations", 0, 0
    def __init__(self, device, weights=()):
        super().__init__()
        self.device, self.storages, self.live, self.trace = torch.device(device).type, {}, Counter(), []
        self.note(weights, "weights")
    def note(self, tensors, kind=None):
        """Count the storages of tensors: those that are new, or of a new size or kind."""
        for tensor in tensors:
            if not torch.is_tensor(tensor) or tensor.device.type != self.device: continue
            storage, key = tensor.untyped_storage(), tensor.untyped_storage()._cdata
            ref, old, size = self.storages.get(key, (None, self.unnamed, 0))
            ref = ref or weakref.ref(storage, lambda _, key=key: self.free(key))       # tells us of its death
            self.storages[key] = ref, kind or old, storage.nbytes()
            self.live[old] -= size
            self.live[kind or old] += storage.nbytes()
        self.trace.append(dict(self.live))
        self.peak = max(self.peak, self.live.total())
    def free(self, key):
        _, kind, size = self.storages.pop(key)
        self.live[kind] -= size
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.note(out if isinstance(out, (tuple, list)) else [out])
        return out
def measure(weights, work, device):
    """work() under the meter, then once more without it, for the seconds.   -> Meter, seconds, its result"""
    real, whole = F.scaled_dot_product_attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # On meta, fused attention falls into the naive one's parts. The CPU's, called by its name, stays whole.
    if device.type == "meta": F.scaled_dot_product_attention = lambda q, k, v, **_: whole(q, k, v)[0]
    with Meter(device, weights) as Meter.running: result = work()
    meter, Meter.running, F.scaled_dot_product_attention = Meter.running, None, real
    started = time.perf_counter()
    if device.type != "meta": work().flatten()[0].item()                                   # waits for a GPU
    return meter, time.perf_counter() - started, result
# ------------------------------------------------------------------------------------------------- Techniques
# B images of n = height x width latent pixels, each a token; h heads of D numbers; C = h D channels.
def naive(q, k, v):
    """softmax(q k^T / sqrt(D)) v: at its peak, two tables of n^2 numbers for each head.   (B, h, n, D)"""
    return (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(-1) @ v
def sliced(q, k, v):
    """The same, one head at a time; its result goes where its queries were.   Not for training"""
    for b, i in itertools.product(*map(range, q.shape[:2])): q[b, i] = naive(q[b, i], k[b, i], v[b, i])
    return q
def fused(q, k, v):
    """The same in one kernel without a table (Dao et al. 2022): tile by tile, with a running softmax."""
    return F.scaled_dot_product_attention(q, k, v)
def attend(attention, kept=None):
    """In the place of diffusers' attention processor: one of the three above.   kept: a dict, where keys and
    values of the prompt stay from step to step. They are all that a U-Net can keep: its image changes."""
    def processor(attn, x, encoder_hidden_states=None, attention_mask=None, **_):
        prompt, split = encoder_hidden_states, lambda y: y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        kv = (kept or {}).get((attn, prompt))
        kv = kv or [split(layer(x if prompt is None else prompt)) for layer in (attn.to_k, attn.to_v)]
        if kept is not None and prompt is not None:
            kept[attn, prompt] = kv
            if Meter.running: Meter.running.note(kv, "cache")
        return attn.to_out[0](attention(split(attn.to_q(x)), *kv).transpose(1, 2).flatten(2))     # (B, n, C)
    return processor
def remember(attn, q, k, v, mask, kept=None, coarse=False, **_):
    """GPT-2's attention. No token sees those after it: keys and values of the past stay as they are. kept: a
    dict of them, 2 h D numbers for a token and layer; coarse: bytes, 2 h scales.   q, k, v (1, h, T, D)"""
    if kept is not None:
        kv = to_int8(torch.stack([k, v]), -1) if coarse else [torch.stack([k, v])]           # (2, 1, h, T, D)
        kept[attn] = [torch.cat(both, 3) for both in zip(kept[attn], kv)] if attn in kept else kv
        if Meter.running: Meter.running.note(kept[attn], "cache")
        k, v = kept[attn][0] * kept[attn][1] if coarse else kept[attn][0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape == k.shape).transpose(1, 2), None
class Checkpoint(torch.autograd.Function):
    """Keep a block's inputs only; compute the rest again for its gradient (Chen et al. 2016). No dropout!"""
    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.run = run; ctx.save_for_backward(*inputs)
        return run(*inputs)                                              # autograd is off: it saves nothing
    @staticmethod
    def backward(ctx, *gradients):
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.enable_grad(): outputs = ctx.run(*inputs)
        torch.autograd.backward(outputs, gradients)                      # fills the .grad of the weights too
        return None, *(x.grad for x in inputs)
def checkpoint(module):
    """Let a module run as a Checkpoint. What it takes by name, like the prompt, gets no gradient."""
    module.forward = lambda *args, run=module.forward, **kw: Checkpoint.apply(lambda *x: run(*x, **kw), *args)
def to_int8(w, dims):
    """w ~ scale * q, where q are bytes: one scale, max |w| / 127, for all along dims.   -> q, scale"""
    scale = (w.abs().amax(dims, True).float().clamp(1e-6) / 127).to(w.dtype)
    return (w.float() / scale).round().clamp(-127, 127).to(torch.int8), scale
def quantise(layer):
    """A layer keeps bytes, and a scale for each output channel. Its full weights exist only while it runs."""
    layer.q, layer.scale = map(nn.Buffer, to_int8(layer.weight.detach(), (*range(1, layer.weight.ndim),)))
    del layer.weight
    layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "weight", layer.scale * layer.q))
    layer.register_forward_hook(lambda layer, *_: delattr(layer, "weight"))
def offload(model, folder, device, whole=False):
    """Weights lie in a file: those of a layer come just before it runs, and go after it. whole: those of all
    layers at once, for models that take turns. Else they are on the meta device, where they need nothing."""
    disk, real = tempfile.TemporaryFile(dir=folder), device.type != "meta"
    for layer in model.modules():
        home = {}
        for name, w in [*layer.named_parameters("", False), *layer.named_buffers("", False)]:
            home[name] = nn.Parameter(w.detach().to("meta"), False), disk.tell()
            if real: disk.write(w.detach().cpu().flatten().view(torch.uint8).numpy())
        def come(*_, layer=layer, home=home):
            for name, (w, place) in home.items():
                here = torch.empty_like(w, device="cpu" if real else "meta")
                if real: disk.seek(place); disk.readinto(here.flatten().view(torch.uint8).numpy())
                setattr(layer, name, nn.Parameter(here.to(device), requires_grad=False))
                if Meter.running: Meter.running.note([getattr(layer, name)], "weights")
        def go(*_, layer=layer, home=home):
            for name, (w, _) in home.items(): setattr(layer, name, w)
        (model if whole else layer).register_forward_pre_hook(come, prepend=True)      # before those of int8
        (model if whole else layer).register_forward_hook(go); go()
def decode(vae, z, tile, margin):
    """One image after the other, in squares of `tile` latent pixels, with a margin that is cut off again.
    z (B, 4, h, w) -> (B, 3, 8h, 8w)   Where there are several, group norm sees one, not the whole."""
    wide, side = F.pad(z, [margin] * 4, mode="replicate"), tile + 2 * margin
    cut = slice(m := margin * 2 ** (len(vae.config.block_out_channels) - 1), -m or None)
    see = lambda b, y, x: vae.decode(wide[b : b + 1, :, y : y + side, x : x + side]).sample[:, :, cut, cut]
    down, across = (range(0, n, tile) for n in z.shape[2:])
    image = lambda b: torch.cat([torch.cat([see(b, y, x) for x in across], 3) for y in down], 2)
    return torch.cat([image(b) for b in range(len(z))])
# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """The meter against bytes counted by hand; in GPT-2's cache: 64 numbers, or 64 bytes and a scale of 4."""
    x = torch.zeros(1000)                # 4000 bytes; then 4000, and 4000, a view, in place, and 8000
    meter, *_ = measure([x], lambda: ((x + 1) * 2).view(10, 100).add_(1).double(), x.device)
    check("bytes at the peak and at the end, by hand", [meter.peak, meter.live.total()], [16000, 12000], 0)
    with torch.device("meta"): gpt = transformers.GPT2LMHeadModel(**FULL["gpt"])    # 2 x 12 layers x 12 heads
    told = run(dict(gpt=gpt), 16, Config(), gpt.device, ["gpt cache", "gpt cache int8"]).values()
    check("KV cache of GPT-2, bytes a token; in 8 bits", [f["cache"] / 16 for f in told], [73728, 19584], 0)
# ------------------------------------------------------------------------------------------------------- Data
def load(cfg, device):
    """-> {"unet": U-Net, "vae": VAE, "gpt": GPT-2} of the true size, random; or the first two from --model"""
    kinds = dict(unet=diffusers.UNet2DConditionModel, vae=diffusers.AutoencoderKL,
                 gpt=transformers.GPT2LMHeadModel)
    sizes, random = SMALL if cfg.tiny else FULL, kinds if cfg.model == "random" else ["gpt"]
    with torch.device(device): models = {part: kinds[part](**sizes[part]).eval() for part in random}
    ask = dict(use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True)
    cached = lambda: diffusers.DiffusionPipeline.download(cfg.model, local_files_only=True)
    try:
        for part in kinds.keys() - models.keys():
            folder = cfg.model if Path(cfg.model).is_dir() else cached()
            model, report = kinds[part].from_pretrained(Path(folder, part), **ask)
            for key in report["missing_keys"]: raise ValueError(f"{key} is missing")
            models[part] = model.float().to(device).eval()
        trial = lambda: prepare("image", models, 64, cfg, torch.device("meta"))[1]()     # do the parts fit?
        if cfg.model != "random" and trial().shape[2] != 64: raise ValueError("not a VAE that enlarges by 8")
        return models
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError,
            safetensors.SafetensorError) as error:
        require(False, f"--model {cfg.model}: {' '.join(str(error).split())[:200]}")
# -------------------------------------------------------------------------------------------------------- Run
def walk_back(unet, x, prompts, steps, split):
    """DDIM (Song et al. 2021) with guidance 7.5.   x (B, 4, h, w), prompts (2 B, 77, C): B empty ones, and B
    that are meant -> x, and the last noises (2 B, 4, h, w).   split: one half after the other"""
    parts, times = prompts.chunk(2 if split else 1), [1000 * i // steps - 1 for i in range(steps, -1, -1)]
    for now, after in itertools.pairwise(times):
        both = torch.cat([unet(x.repeat(len(part) // len(x), 1, 1, 1), now, part).sample for part in parts])
        a, b, noise = CLEAN[now], CLEAN[after], 7.5 * both[len(x) :] - 6.5 * both[: len(x)]
        x = b**0.5 * (x - (1 - a) ** 0.5 * noise) / a**0.5 + (1 - b) ** 0.5 * noise
    return x, both
def recite(gpt, tokens, kept, coarse):
    """The last eighth of the tokens (1, S) come one by one, as when GPT-2 writes. -> logits (S / 8, V)"""
    (_, S), logits, past = tokens.shape, [], 0
    for now in range(S - S // 8 + 1, S + 1):
        ask = dict(position_ids=torch.arange(past, now, device=tokens.device)[None], use_cache=False)
        logits.append(gpt(tokens[:, past:now], logits_to_keep=1, kept=kept, coarse=coarse, **ask).logits[0])
        past = now if kept else 0
    return torch.cat(logits)
def train(unet, x, prompts, adamw):
    """Two steps with AdamW; or one without, where gradients go as they come. -> that with the longest way"""
    optimizer = torch.optim.AdamW(unet.parameters(), foreach=False) if adamw else None
    def arrived(w):
        if Meter.running: Meter.running.note([w.grad], "gradients")
        if not adamw and w is not unet.conv_in.weight: w.grad = None             # as if it were used at once
    for w in unet.parameters(): w.register_post_accumulate_grad_hook(arrived)
    for _ in range(1 + adamw):
        unet.zero_grad(); loss = unet(x, 500, prompts).sample.square().mean()
        if Meter.running: Meter.running.saved = Meter.running.live["activations"]
        loss.backward()
        if adamw: Meter.unnamed = "optimizer"; optimizer.step(); Meter.unnamed = "activations"
    return unet.conv_in.weight.grad
def twin(model, change):
    """A copy of a model with changed weights; where they are the same, they are shared."""
    return copy.deepcopy(model, {id(w): nn.Parameter(change(w.detach())) for w in model.parameters()})
def prepare(row, models, size, cfg, device):
    """A row of the table -> the weights that are there before it starts, and its work, as a function."""
    gc.collect()                                                 # the models of the row before may go first
    has, side, dice = row.split().__contains__, size // 8, torch.Generator().manual_seed(cfg.seed)
    if has("gpt"):
        transformers.AttentionInterface.register("remember", remember)
        (gpt := twin(models["gpt"], lambda w: w.to(device))).set_attn_implementation("remember")
        tokens = torch.randint(97, (1, min(size, 1024)), generator=dice).to(device)
        return [*gpt.parameters()], lambda: recite(gpt, tokens, {} if has("cache") else None, has("int8"))
    dtype = (torch.float16 if device.type == "cuda" else torch.bfloat16) if has("half") else torch.float32
    unet = twin(models["unet"], lambda w: w.to(device, (dtype, torch.float8_e4m3fn)[has("fp8") * w.ndim > 1]))
    vae = twin(models["vae"], lambda w: w.to(device, dtype)) if has("vae") or has("image") else None
    unet.set_attn_processor(attend(fused if has("fused") else sliced if has("sliced") else naive,
                                   {} if has("cache") else None))
    unet.apply(lambda m: has("int8") and isinstance(m, (nn.Linear, nn.Conv2d)) and quantise(m))
    if has("checkpoint") > has("diffusers"):
        unet.apply(lambda m: type(m).__name__ in ("ResnetBlock2D", "Transformer2DModel") and checkpoint(m))
    if has("diffusers"):
        if vae:
            vae.use_slicing, vae.use_tiling = has("slices"), has("tiles")
            vae.tile_latent_min_size, vae.tile_sample_min_size = side // 2, size // 2       # 3 x 3, like ours
        elif has("checkpoint"): unet.train().enable_gradient_checkpointing()
        elif has("fp8"): unet.enable_layerwise_casting(torch.float8_e4m3fn, dtype)
        elif has("fused"): unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
        else: unet.set_attn_processor(diffusers.models.attention_processor.SlicedAttnProcessor(1))
    models, away = [unet][has("vae") :] + ([vae.decoder] if vae else []), has("turns") or has("offload")
    for model in models * away: offload(model, cfg.out, device, has("turns"))
    weights = [w for model in models * (not away) for w in (*model.parameters(), *model.buffers())]
    x, prompts = (torch.randn(shape, generator=dice).to(device, dtype) for shape in (
        (cfg.batch, 4, side, side), (2 * cfg.batch, 77, unet.config.cross_attention_dim)))
    tile, ours = (side * 3 // 8, side // 16) if has("tiles") else (side, 0), has("tiles") or has("slices")
    see = lambda z: decode(vae, z, *tile) if ours > has("diffusers") else vae.decode(z).sample
    if has("vae"): return weights, lambda z=torch.cat([x, -x]): see(z)
    if has("train"): return weights, lambda: train(unet, x, prompts[: len(x)], has("adamw"))
    work = lambda: walk_back(unet, x, prompts, cfg.steps, has("split"))
    return weights, (lambda: see(work()[0] / 0.18215)) if has("image") else lambda: work()[1]
def run(models, size, cfg, device, rows, expected=None):
    """The rows of the table -> {row: figures}.   expected: what the meta device says, to keep to --limit"""
    found, first = {}, {}
    for row in rows:
        if expected and (need := expected[row]["peak_bytes"] / 1e9) > cfg.limit:
            print(f"{row:47} | not run: needs {need:.1f} GB, more than --limit"); continue
        with torch.set_grad_enabled("train" in row):
            meter, seconds, out = measure(*prepare(row, models, size, cfg, device), device)
        found[row] = f = dict(peak_bytes=meter.peak, seconds=seconds, saved=meter.saved)
        f |= {kind: max(moment.get(kind, 0) for moment in meter.trace) for kind in meter.live}
        if not expected: f["trace"] = meter.trace; continue
        base, slow = first.setdefault(row.split()[0], (out.float(), seconds))
        f |= dict(slower=seconds / slow, max_abs_diff=(out - base).abs().max().item(),
                  relative_error=((out - base).norm() / base.norm()).item())
        if "gpt" in row: f["tokens_per_second"] = len(out) / seconds
        print(f"{row:47} | {meter.peak / 2**20:8.1f} MiB | {seconds:6.2f} s, {f['slower']:5.2f} x | "
              f"max|diff| {f['max_abs_diff']:.1e}, {f['relative_error']:.1e} of it"
              + (f" | {len(out) / seconds:.1f} tok/s" if "gpt" in row else ""))
    return found
# --------------------------------------------------------------------------------------------------- Pictures
COLORS = dict(weights="#36b", optimizer="#96c", gradients="#3a8", activations="#f93", cache="#c33")
def draw(predicted, cfg):
    """What is alive over the operations of an image, above, and of training: before, left, and after."""
    pen = ImageDraw.Draw(page := Image.new("RGB", (1600, 900), "white"))
    pen.text((24, 14), f"Memory over time, predicted, {cfg.predict} x {cfg.predict}", "black", font_size=26)
    for i, (kind, color) in enumerate(COLORS.items()): pen.text((24 + 150 * i, 58), kind, color, font_size=18)
    for i, j in itertools.product(range(2), range(2)):
        rows = [row for row in predicted if row.startswith(("image", "train adamw")[i])] or ["train"]
        trace, peak = (predicted[rows[-j]][key] for key in ("trace", "peak_bytes"))
        x, y, scale = 24 + 790 * j, 480 + 400 * i, 330 / predicted[rows[0]]["peak_bytes"]
        pen.text((x, y - 378), f"{rows[-j]}\n{peak / 2**20:,.0f} MiB at the peak", "black", font_size=17)
        for column in range(760):
            part = trace[column * len(trace) // 760 :][: 1 + len(trace) // 760]
            low, moment = y, max(part, key=lambda moment: sum(moment.values()))
            for kind, color in COLORS.items():
                pen.line([x + column, low, x + column, low := low - scale * moment.get(kind, 0)], color)
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
    """Check, load, predict, measure, compare, draw.  Returns the figures of the RESULT line."""
    for flag, low in dict(seed=0, batch=1, steps=1, limit=0, size=64, predict=64).items():
        value, high, unit = getattr(cfg, flag), 2**62 if flag == "seed" else 8192, 64 if low == 64 else 1e-9
        require(low <= value <= high and value % unit < 1e-9, f"--{flag} {value}: {low} to {high}, by {unit}")
    asked, words = {*cfg.technique.split(",")}, {"all", *ROWS.replace(",", "").split()}
    require(asked <= words, f"--technique {cfg.technique}: choose from {', '.join(sorted(words))}")
    rows = [row for row in ROWS.split(", ") if "all" in asked or " " not in row or asked & {*row.split()}]
    device, meta = pick_device(cfg.device), torch.device("meta")
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    diffusers.logging.set_verbosity_error(); diffusers.logging.disable_progress_bar(); gc.freeze()
    run_checks(); torch.manual_seed(cfg.seed); models = load(cfg, device); gc.freeze()  # no need to search it
    print(f"week 11 | {device}, float32 | torch {torch.__version__} | weights: {cfg.model}")
    predicted = run(models, cfg.predict, cfg, meta, rows)
    same = predicted if cfg.predict == cfg.size else run(models, cfg.size, cfg, meta, rows)
    try: measured = run(models, cfg.size, cfg, device, rows, same)         # "offload" puts gigabytes in --out
    except OSError as error: require(False, f"--out {cfg.out}: cannot write weights ({error.strerror})")
    if device.type == "cpu" and measured:            # where AdamW counts its steps, whatever the device
        peaks = [[f[row]["peak_bytes"] for row in measured if "adamw" not in row] for f in (measured, same)]
        check("peaks measured == peaks predicted on meta", *peaks, 0)
    save(cfg.out, "memory.png", draw(predicted, cfg).save)
    for f in [*predicted.values(), *measured.values()]: f.pop("trace", None)
    image = [f["peak_bytes"] for row, f in predicted.items() if row.startswith("image")]
    return finish(cfg, device, dict(peak_before=image[0], peak_after=min(image)), weights=cfg.model,
                  predicted_peaks=predicted, measured_peaks=measured)
if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
