# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "diffusers>=0.36", "transformers>=5.1", "huggingface-hub>=1.3",
#                 "safetensors>=0.4.5", "pillow>=10.1", "tokenizers>=0.22"]
# ///
"""Week 7: Stable Diffusion opened up. Hooks on every module: what goes in, what comes out, what it costs.
Paper: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models".
The idea: a latent has 48 times fewer numbers than its image. A U-Net takes the noise out of it, and a text
says what to see: places of the latent ask (query), words answer (key, value). That is cross-attention.

    python week07_sd_hooks.py                        # all shapes and costs, no weights: out/week07/unet.png
    python week07_sd_hooks.py --run --size 512x768   # with numbers: time per module, attention maps
    python week07_sd_hooks.py --model FOLDER         # or an ID on the hub, or tiny: each draws itself

Expected: 803.3 GFLOP for one pass of the U-Net, as torch's own counter has it on the meta device, 8 s on one
core in all. On a CPU that counter says 677.2: it does not see what happens in fused attention.
"""
import argparse, http.client, inspect, json, math, os, re, sys, time, urllib.request
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args
import diffusers, safetensors, tokenizers, torch, torch.utils.flop_counter, torch.utils.weak, transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import errors, hf_hub_download, hf_hub_url
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# ----------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    device: str = "auto"       # auto = cuda if there is one, else cpu; or by name: cpu, cuda:1, mps
    seed: int = 1337           # the same seed on the same CPU gives the same numbers, bit for bit
    tiny: bool = False         # everything smallest, and no network: to see that it runs
    out: str = "out/week07"    # folder for everything that is written
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"   # ID on the hub, folder, random or tiny
    run: bool = False          # with weights: times and maps. Else on the meta device: shapes, no numbers
    size: str = "512x512"      # height x width of the image in pixels
    batch: int = 1             # images at once
    steps: int = 1             # passes of the U-Net, from noise to an image
    prompt: str = "a lighthouse on a green hill"   # what the text encoder reads
    watch: str = "up_blocks.1"  # keep the maps of cross-attentions with this in their path; others stay fast
    json: bool = False         # write table.json: each call of each module
TINY = dict(model="tiny", run=True, size="64x96")
# Stable Diffusion v1.5; what is not here is the libraries' default.   SMALL: what --model tiny has instead
UNET = dict(sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), cross_attention_dim=768,
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, attention_head_dim=8)  # 8 heads!
VAE = dict(sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
TEXT = dict(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12)
SMALL = dict(block_out_channels=(8, 16, 24, 24), norm_num_groups=4, hidden_size=24, cross_attention_dim=24)
PARTS = dict(text_encoder=(CLIPTextModel, TEXT), vae=(AutoencoderKL, VAE), unet=(UNet2DConditionModel, UNET))
make = lambda kind, c: kind(CLIPTextConfig(**c)) if kind is CLIPTextModel else kind.from_config(c)

# ----------------------------------------------------------------------------------------- Hooks that profile
# B images of C channels and H x W pixels, T = H W; S words; h heads of D = C / h numbers.
tensors = lambda nest: [t for t in torch.utils._pytree.tree_leaves(nest) if torch.is_tensor(t)]
def count_flops(name, args, out):
    """The kind of an operation of torch, and its cost: multiply and add are two. (n, k) @ (k, m) is 2 n k m;
    a convolution is that for each place of its output, or of its input where it is transposed."""
    kinds = dict(mm="linear", addmm="linear", linear="linear", bmm="attention", baddbmm="attention")
    if name in kinds: return kinds[name], 2 * out.numel() * args[0 if name == "linear" else -2].shape[-1]
    if name.startswith("_scaled_dot_product"):            # fused; on the meta device it comes as two of bmm
        return "attention", 2 * (args[0].numel() + out[0].numel()) * args[1].shape[-2]
    if name == "convolution": return "conv", 2 * (args[0] if args[6] else out).numel() * args[1][0].numel()
    return None, 0
def profile_modules(model, *inputs, **named):
    """Run any nn.Module once, with hooks on each module in it.   -> its output, a row for each call of one:
    path, kind (class), depth, ins, outs (shapes), makers (of each input: whose output it is), parameters; of
    all that went on inside: conv, linear, attention, flops (their sum), bytes put out, seconds. A cost is
    counted for all that runs: attention's products happen in a function. On the meta device any size."""
    paths, rows, running = {module: path for path, module in model.named_modules()}, [], []
    maker = torch.utils.weak.WeakTensorKeyDictionary()       # whose output a tensor is, as long as it lives
    clock = lambda: torch.cuda.is_initialized() and torch.cuda.synchronize() or time.perf_counter()
    def enter(module, args, named):
        found = tensors([args, named])
        rows.append(dict(
            path=paths[module], kind=type(module).__name__, depth=len(running), seconds=-clock(),
            makers=[maker.get(t, ["input"]) for t in found], conv=0, linear=0, attention=0, flops=0, bytes=0,
            parameters=sum(w.numel() for w in module.parameters()), ins=[[*t.shape] for t in found]))
        running.append(rows[-1])
    def leave(module, args, output):
        found, row = tensors(output), running.pop()
        row.update(outs=[[*t.shape] for t in found], seconds=row["seconds"] + clock())
        for t in found:
            for outer in (*running, row): outer["bytes"] += 0 if t in maker else t.nbytes    # what is new
            maker.setdefault(t, [row["path"]])
    class Meter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out, name = func(*args, **(kwargs or {})), func.__name__.split(".")[0]
            kind, cost = count_flops(name, args, out)
            for row in running * bool(kind): row[kind] += cost; row["flops"] += cost
            if name == "cat": maker[out] = sum((maker.get(t, []) for t in args[0]), [])
            return out
    hooks = [hook for module in paths for hook in (module.register_forward_pre_hook(enter, with_kwargs=True),
                                                   module.register_forward_hook(leave))]
    try:
        with torch.no_grad(), Meter(): return model(*inputs, **named), rows
    finally:
        for hook in hooks: hook.remove()
def find_skips(rows):
    """Whose output comes back where: [(leaves, returns)], by the identity of tensors. Of the outputs that are
    joined (cat) to be one input, the newest is the stream; the older ones have skipped what lies between."""
    place, joined = {row["path"]: i for i, row in enumerate(rows)}, [
        (tuple(made), row["path"]) for row in reversed(rows) for made in row["makers"] if len({*made}) > 1]
    return [(path, end) for made, end in dict(joined).items() for path in made     # into the outermost module
            if path != max(made, key=lambda path: place.get(path, -1))]
def find_boxes(rows):
    """What a U-Net is drawn of: modules that it calls, or that these call, if they turn images into images.
    -> [(row of the block, own row)]"""
    found, block = [], None
    for row, after in zip(rows, rows[1:] + rows[:1]):
        block = row if row["depth"] == 1 else block
        if row["flops"] and (row["depth"] == 2 or row["depth"] == 1 and after["depth"] < 2):
            if [len(s[0]) for s in (row["ins"], row["outs"]) if s] == [4, 4]: found.append((block, row))
    return found
def print_table(rows, timed):
    """Path, class, shapes without B, parameters, GFLOP, its share, MiB out, ms; skips leave (>), return (<).
    At a new resolution, its share of the operations, on both sides of the U."""
    total, last, skips, boxes = rows[0]["flops"], None, find_skips(rows), [b for _, b in find_boxes(rows)]
    shape = lambda shapes: "x".join(map(str, shapes[0][1:])) if shapes else ""
    for row in (row for row in rows if row["depth"] <= 2):
        marks = [f"< {a}" for a, b in skips if b == row["path"]]
        if any(row is box for box in boxes):
            marks += [f"> {b}" for a, b in skips if f"{a}.".startswith(row["path"] + ".")]
            share = sum(b["flops"] for b in boxes if b["ins"][0][2:] == row["ins"][0][2:]) / total
            if last != (last := row["ins"][0][2:]): print(f"{last[0]} x {last[1]} pixels: {share:.1%}")
        print(f"{row['path'] or 'all':29}{row['kind']:23}{shape(row['ins']):>12} {shape(row['outs']):12}"
              f"{row['parameters']:11,}{row['flops'] / 1e9:9.2f}{row['flops'] / total:7.1%}",
              f"{row['bytes'] / 2**20:7.1f}" + f"{1e3 * row['seconds']:9.1f}" * timed, *marks)

# -------------------------------------------------------------------- Cross-attention by hand, and the latent
def attention_by_hand(layer, x, words=None):
    """softmax(q k^T / sqrt(D)) v, q = x W_q, k = y W_k, v = y W_v, y = words or x itself; all heads times
    W_out (Rombach et al. 2022, "Conditioning Mechanisms").   layer: an Attention of diffusers
    x (B, T, C), words (B, S, C') -> (B, T, C), maps (B, h, T, S): how much each word answers each place"""
    y, split = x if words is None else words, lambda z: z.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    q, k, v = split(layer.to_q(x)), split(layer.to_k(y)), split(layer.to_v(y))             # (B, h, T or S, D)
    maps = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return layer.to_out[0]((maps @ v).transpose(1, 2).flatten(2)), maps
def capture(unet, part):
    """Let cross-attentions with `part` in their path work by hand, and keep their maps. A fused kernel has no
    maps in memory, which is why it is fast: all others keep it.   -> {path: maps}, {path: cross-attention}"""
    layers = {k: layer for k, layer in unet.named_modules() if getattr(layer, "is_cross_attention", False)}
    maps = {path: None for path in layers if part in path}
    for path in maps:
        def processor(layer, hidden_states, encoder_hidden_states=None, path=path, **_):
            output, maps[path] = attention_by_hand(layer, hidden_states, encoder_hidden_states); return output
        layers[path].set_processor(processor)
    return maps, layers

# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """The true Stable Diffusion v1.5, on the meta device, against published sizes and torch's own counter; on
    the CPU, attention against diffusers', and by gradient what a pixel of the latent depends on."""
    torch.manual_seed(0)
    with torch.device("meta"):
        text, vae, unet = models = [make(*part) for part in PARTS.values()]
        inputs = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
    counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with counter: _, rows = profile_modules(unet, *inputs)
    count = [sum(w.numel() for w in model.parameters()) for model in models]
    check("parameters of text encoder, VAE and U-Net", count, [123_060_480, 83_653_863, 859_520_964], 0)
    count = [rows[0]["flops"], counter.get_total_flops()]
    check("operations of a pass, and by torch's counter", count, [803_273_441_280] * 2, 0)
    count = [*sorted(row["ins"][0][1] for row in rows if row["kind"] == "Attention"), len(find_skips(rows))]
    check("attentions by tokens; skips", count, [64] * 2 + [256] * 10 + [1024] * 10 + [4096] * 10 + [12], 0)
    small, caught, one = make(UNet2DConditionModel, UNET | SMALL), [], torch.ones(())
    def hook(layer, args, named, output):
        ours, maps = attention_by_hand(layer, args[0], named["encoder_hidden_states"])
        caught.extend([(ours, output), (maps.sum(-1), one)])
    for m in small.modules(): hasattr(m, "to_q") and m.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad(): small(torch.randn(1, 4, 8, 24), torch.ones(1), torch.randn(1, 7, 24))
    check("attention by hand == diffusers'; its maps sum to 1", *zip(*caught), 1e-5)
    encoder = make(AutoencoderKL, VAE | SMALL).double().encoder
    for m in encoder.modules():                      # norms and attention see the whole image: leave them out
        if hasattr(m, "to_q") or isinstance(m, torch.nn.GroupNorm): m.forward = lambda x, **_: x
    encoder(image := torch.randn(1, 3, 256, 256).double().requires_grad_())[..., 16, 16].sum().backward()
    seen = [(image.grad.abs().amax((0, 1, dim)) > 0).sum() for dim in (2, 3)]
    check("convolutions show a latent pixel 217 x 217 pixels", seen, [217, 217], 0)

# ------------------------------------------------------------------------------------------------------- Data
def locate(cfg, files, instead):
    """The folder of --model: itself, else in the hub's cache, else downloaded (ID, or ID@REVISION). Where the
    default is out of reach: "random", and one line that says what is used instead."""
    if cfg.model == "random" or Path(cfg.model).is_dir(): return cfg.model
    name, _, revision = cfg.model.partition("@")
    place = dict(repo_id=name, revision=revision or "main")
    for cached in [True, False][: 2 - cfg.tiny]:
        try:                       # does the hub answer at all? its own client would go on asking for 23 s
            if not cached: urllib.request.urlopen(hf_hub_url(filename=files[0], **place), timeout=4).close()
            paths = [hf_hub_download(filename=file, local_files_only=cached, **place) for file in files]
            return str(Path(paths[0]).parent)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())[:90]
    require(cfg.model == Config.model and not cfg.tiny, f"--model {cfg.model}: no folder or model ({reason})")
    print(f"no {cfg.model} ({reason}). {instead}")
    return "random"
def load(cfg, device):
    """-> text encoder, VAE, U-Net, tokenizer, what the weights are. Without --run a configuration will do."""
    files = ["model_index.json", *(f"{part}/config.json" for part in PARTS), "text_encoder/model.safetensors",
             *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
             "tokenizer/vocab.json", "tokenizer/merges.txt"]
    folder = "random" if cfg.model == "tiny" or cfg.model == Config.model and not cfg.run else locate(
        cfg, files if cfg.run else files[:4], "Instead, random weights: times are true, pictures are noise.")
    models, tokenizer, real = [], None, cfg.run and folder != "random"
    try:
        for file in Path(folder).glob("*/*.json") if real else []: {**json.loads(file.read_bytes())}  # whole?
        for file in Path(folder).glob("*/tokenizer.json"): tokenizers.Tokenizer.from_buffer(file.read_bytes())
        for part, (kind, config) in PARTS.items():
            if folder != "random": config = json.loads(Path(folder, part, "config.json").read_text("utf-8"))
            if real:
                model, report = kind.from_pretrained(Path(folder, part), use_safetensors=True,
                                                     low_cpu_mem_usage=False, output_loading_info=True)
                if report["missing_keys"]: raise ValueError(f"{part} has no {[*report['missing_keys']][0]}")
            else:
                if cfg.model == "tiny": config = config | SMALL
                with torch.device(device): model = make(kind, config)
            models.append((model.half() if device.type in ("cuda", "mps") else model).eval().to(device))
        if real: tokenizer = CLIPTokenizer.from_pretrained(Path(folder, "tokenizer"))
        text, vae, unet = (model.config for model in models)
        if (text.hidden_size, vae.latent_channels) != (unet.cross_attention_dim, unet.in_channels) or (
           tokenizer and not 99 < len(tokenizer) <= text.vocab_size): raise ValueError("the parts do not fit")
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError,
            safetensors.SafetensorError, errors.StrictDataclassError) as error:
        require(False, f"--model {cfg.model}: {' '.join(str(error).split())[:200]}")
    return *models, tokenizer, cfg.model if real else "random" if cfg.run else "none"

# ------------------------------------------------------------------------------------------- Run and pictures
@torch.no_grad()
def run(cfg, text, vae, unet, ids):
    """Words -> noise, cleaned by the U-Net in --steps of DDIM (week 5) -> image -> its latent's mean and
    log-variance. The same lines run on the meta device.   ids (B, S) -> {model: rows}, and these three"""
    (words, seen), clock = profile_modules(text, ids), time.perf_counter
    sides = [int(n) // 2 ** (len(vae.config.block_out_channels) - 1) for n in cfg.size.split("x")]
    x, rows = torch.randn(len(ids), unet.config.in_channels, *sides).to(words[0]), {"text encoder": seen}
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0).tolist() + [1]
    times = [999 * (cfg.steps - i) // cfg.steps for i in range(cfg.steps)] + [-1]
    for i, (t, after) in enumerate(zip(times, times[1:] if cfg.run else [-1]), 1):
        a, b, began, inputs = kept[t], kept[after], clock(), (x, t, words[0])
        if i == 1: noise, rows["U-Net"] = profile_modules(unet, *inputs)
        else: noise = unet(*inputs)
        x = math.sqrt(b / a) * x + (math.sqrt(1 - b) - math.sqrt(b / a * (1 - a))) * noise.sample
        if cfg.run: print(f"step {i}/{cfg.steps} | {(clock() - began) * (cfg.steps - i):.0f} s left")
    x = vae.post_quant_conv(x / vae.config.scaling_factor)     # the U-Net likes a variance of 1, the VAE 30
    image, rows["VAE decoder"] = profile_modules(vae.decoder, x)
    code, rows["VAE encoder"] = profile_modules(vae.encoder, image)
    return rows, image, *vae.quant_conv(code).chunk(2, 1)
COLORS = dict(conv=("#4878cf", "#34589c"), linear=("#3aa888", "#2a7c64"), attention=("#f2a33a", "#bb7a22"))
def draw(rows):
    """The U-Net from its traced rows: boxes as high as the resolution, as deep as the channels, in colours
    of their work, and bars of what it costs. Another U-Net draws itself as well."""
    top, boxes, font = rows[0], find_boxes(rows), ImageFont.load_default(38)
    widest, most = max(row["outs"][0][1] for _, row in boxes), max(row["flops"] for _, row in boxes)
    sizes, pitch = sorted({row["ins"][0][2] for _, row in boxes}), 2920 // max(30, len(boxes))
    pen, w = ImageDraw.Draw(page := Image.new("RGB", (3200, 630 + 380 * len(sizes)), "white")), 0.6 * pitch
    def arrow(color, *points):
        (_, before), (x, y) = points[-2:]; pen.line(points, color, 6, "curve")
        pen.polygon([(x, y), *((x + dx, y + math.copysign(18, before - y)) for dx in (-11, 11))], color)
    spots = [(230 + pitch * i, 90 + 380 * (len(sizes) - sizes.index(row["ins"][0][2])),
              40 + 130 * math.sqrt(row["ins"][0][2] / sizes[-1])) for i, (_, row) in enumerate(boxes)]
    find = lambda path: next(s for s, (_, b) in zip(spots, boxes) if f"{path}.".startswith(b["path"] + "."))
    ends = sorted(([*map(find, pair)] for pair in find_skips(rows)), key=lambda pair: pair[1][0] - pair[0][0])
    for n, ((x, y, _), (x1, y1, tall)) in enumerate(ends):
        over = y1 - tall - 48 - 28 * sum(y1 == y for _, (_, y, _) in ends[:n])         # shorter ones inside
        first = (x + 0.8 * w, y - tall) if y == y1 else (x + pitch + w / 2, over)
        arrow("#9b59b6", first, (first[0], over), (x1 + w / 2, over), (x1 + w / 2, y1 - tall - 8))
    for (block, row), (x, y, tall), (x1, y1, tall1) in zip(boxes, spots, spots[1:] + spots[-1:]):
        mid, bar, d = y - tall / 2, page.height - 40, 6 + 18 * row["outs"][0][1] / widest
        if y == y1: pen.line([(x, mid), (x1, mid)], "#555555", 6)
        else: arrow("#555555", (x, mid), (x1 + w / 2, mid), (x1 + w / 2, y1 - (tall1 + 8) * (y1 > y)))
        if any(len(s) == 3 for s in row["ins"]): arrow("#d0218a", (x + w / 2, y + 44), (x + w / 2, y + 4))
        mine, share = [s[0] for s, (b, _) in zip(spots, boxes) if b is block], block["flops"] / top["flops"]
        told = f"{re.sub('_?blocks?.?', ' ', block['path']).strip()}\n{block['outs'][0][1]}\n{share:.1%}"
        if x == mine[0]: pen.text(((x + mine[-1] + w) / 2, y + 48), told, "black", font, "ma", align="center")
        pen.text((20, y - 60), f"{row['ins'][0][2]} x {row['ins'][0][3]}", "black", font, "lm")
        for kind, (color, dark) in COLORS.items():
            h, g = tall * row[kind] / row["flops"], 200 * row[kind] / most
            for low, high in ((y, h), (bar, g)): pen.rectangle((x, low - high, x + w, low), color)
            pen.polygon([(x + w, y), (x + w + d, y - d), (x + w + d, y - h - d), (x + w, y - h)], dark)
            y, bar = y - h, bar - g
        pen.polygon([(x, y), (x + d, y - d), (x + w + d, y - d), (x + w, y)], "#d9dde6")
    x, told = 230, {f"{kind} {top[kind] / top['flops']:.1%}": color for kind, (color, _) in COLORS.items()}
    told |= {"skip": "#9b59b6", f"text {top['ins'][-1]}": "#d0218a", "channels, share; bars: FLOPs": "black"}
    for label in told:
        pen.text((x, 132), label, told[label], font, "lm"); x += 80 + pen.textlength(label, font)
    title = "{kind}: {parameters:,} parameters, {g:.4g} GFLOP, {ins[0]}".format(**top, g=top["flops"] / 1e9)
    pen.text((230, 24), title, "black", ImageFont.load_default(54))
    return page.resize((page.width // 2, page.height // 2), Image.LANCZOS)
def draw_maps(image, mean, maps, words):
    """Image, latent, and for each word where the watched layers look for it (noise, with random weights).
    image (3, H, W) from -1 to 1, mean (C, h, w), maps: of each watched layer (heads, T, S)"""
    unit, (C, h, w) = lambda m: (m - m.min()) / (m.max() - m.min() + 1e-9), mean.shape
    fit = lambda m: torch.nn.functional.interpolate(m[None], image.shape[1:])[0]
    maps = sum(fit(m.mean(0).T.unflatten(1, (round(math.sqrt(m.shape[1] * h / w)), -1))) for m in maps)
    tiles = [unit(image), *(unit(c).expand(3, -1, -1) for c in fit(mean))]
    for m in map(unit, maps): tiles.append(0.4 * unit(image.mean(0)) + 0.6 * torch.stack([m, m**2, 1 - m]))
    names, tall = ["image", *(f"latent {i}" for i in range(C)), *words], 40 + 220 * h // w
    pen = ImageDraw.Draw(page := Image.new("RGB", (1220, 10 + tall * math.ceil(len(names) / 5)), "white"))
    for k, (name, tile) in enumerate(zip(names, tiles)):
        x, y, pixels = 20 + 240 * (k % 5), 10 + tall * (k // 5), (tile * 255).byte().permute(1, 2, 0)
        tile = Image.frombytes("RGB", image.shape[:0:-1], bytes(pixels.flatten().tolist()))
        page.paste(tile.resize((220, tall - 40)), (x, y + 28))
        pen.text((x, y + 6), name, "black", ImageFont.load_default(16))
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
    """Check, load, trace, print, draw.  Returns the figures of the RESULT line."""
    for flag, low, high in ("seed", 0, 2**63 - 1), ("batch", 1, 999), ("steps", 1, 999):
        require(low <= getattr(cfg, flag) <= high, f"--{flag} {getattr(cfg, flag)}: must be {low} to {high}")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    for log in diffusers.logging, transformers.logging: log.set_verbosity_error(), log.disable_progress_bar()
    run_checks(), torch.manual_seed(cfg.seed); place = device if cfg.run else torch.device("meta")
    text, vae, unet, tokenizer, weights = load(cfg, place)
    n, sides = 2 ** len(vae.config.block_out_channels) // 2, re.fullmatch(r"(\d{1,4})x(\d{1,4})", cfg.size)
    require(sides and all(int(side) % n == 0 and int(side) >= 8 * n for side in sides.groups()),
            f"--size {cfg.size}: must be HEIGHTxWIDTH, multiples of {n}, at least {8 * n}, at most 9999")
    maps, layers = capture(unet, cfg.watch)
    require(maps, f"--watch {cfg.watch}: is in no path of a cross-attention; {[*layers][-1:]} is one")
    words = tokenizer.tokenize(cfg.prompt) if tokenizer else cfg.prompt.split()
    ids, S = [0, *map(words.index, words), 0], text.config.max_position_embeddings
    if tokenizer: ids = tokenizer(cfg.prompt).input_ids
    ids = torch.tensor(ids[: S - 1] + ids[-1:] * max(1, S - len(ids)), device=place).expand(cfg.batch, S)
    print(f"week 7 | {place}, {str(unet.dtype)[6:]} | torch {torch.__version__} | weights: {weights}")
    rows, image, mean, logvar = run(cfg, text, vae, unet, ids)
    for name, table in rows.items(): print(f"\n{name}"), print_table(table, cfg.run)
    save(cfg.out, "unet.png", draw(rows["U-Net"]).save)
    if cfg.json: save(cfg.out, "table.json", lambda part: part.write_text(json.dumps(rows)))
    if cfg.run:
        maps, words = [m[0].float().cpu() for m in maps.values()], ["start", *words[: S - 2], "end"]
        save(cfg.out, "maps.png", draw_maps(*(t[0].float().cpu() for t in (image, mean)), maps, words).save)
    top = rows["U-Net"][0]              # baseline: torch's counter on a CPU, which misses its fused attention
    result = dict(gflop=top["flops"] / 1e9, baseline_gflop=(top["flops"] - top["attention"]) / 1e9,
                  pass_seconds=top["seconds"], compression=image.numel() / mean.numel())
    return finish(cfg, device, result, weights=weights, parameters=top["parameters"])

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
