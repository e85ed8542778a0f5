# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "safetensors>=0.4", "pillow>=10.1"]
# ///
"""Week 2: the Transformer. Attention from scratch, held against torch's own, then a character language model.

Paper: Vaswani et al. 2017, "Attention Is All You Need".
The idea: tokens ask (query), offer (key) and tell (value): softmax(Q K^T / sqrt(D)) V, without recurrence.

    python week02_transformer.py                            # train on tiny Shakespeare, then write like it
    python week02_transformer.py --prompt ROMEO:            # write on with the trained model
    python week02_transformer.py --ablate all --position sinusoidal --lr 0.008       # as in 2017, but AdamW
    torchrun --nproc_per_node=2 week02_transformer.py       # data-parallel: two processes, the same losses
    python week02_transformer.py --layers 6 --heads 6 --width 384 --context 256 --batch 64 --dropout 0.2 # GPU

Expected: 1.569 nats per character (1.567 to 1.572, seeds 1337, 1, 2) after 92 s of training on one core; with
--steps 600, 1.738 after 30 s. nanoGPT's own command: 1.898 after 119 s. A table of letter pairs: 2.484.
"""
import argparse, inspect, itertools, json, math, os, socket, sys, time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont
from torch import nn

# ----------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    device: str = "auto"       # auto = cuda if there is one, else cpu; or by name: cpu, cuda:1, mps
    seed: int = 1337           # the same seed on the same CPU gives the same losses, bit for bit
    tiny: bool = False         # everything smallest, and no network: to see that it runs
    out: str = "out/week02"    # folder for everything that is written
    data: str = "data"         # folder with tinyshakespeare.txt; where there is none, it is downloaded
    text: str = ""             # a text file of your own to train on, UTF-8
    layers: int = 4            # blocks
    heads: int = 4             # attentions side by side in a block
    width: int = 128           # numbers per token: a multiple of 2 * heads
    context: int = 64          # characters that the model sees at once
    batch: int = 12            # windows of text per step, over all processes
    steps: int = 2000          # optimizer steps
    lr: float = 0.015          # peak learning rate of Muon; AdamW's is half of it
    dropout: float = 0.0       # share of each sub-layer's output that is zeroed in training
    position: Literal["rotary", "sinusoidal", "learned", "none"] = "rotary"         # how order is told
    ablate: Literal["none", "prenorm", "relu2", "qknorm", "muon", "all"] = "none"    # take a later idea away
    prompt: str = ""           # do not train: go on with this text, with the saved weights
    temperature: float = 0.8   # of sampling: the lower, the more it keeps to what is likely
    top_k: int = 0             # sample from the k likeliest characters; 0 = from all
TINY = dict(layers=2, heads=2, width=32, context=32, batch=16, steps=60)
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # set by torchrun

# ------------------------------------------------------------------------------------------ Attention by hand
# B sequences of T tokens that look at S tokens; C = width, H heads of D = C / H numbers each, V characters.
def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v (section 3.2.1, Eq. 1).   q (..., T, D), k and v (..., S, D) -> (..., T, D)
    and the weights (..., T, S), whose rows sum to 1.   mask (T, S) bool: True where a token may look.
    A sum of D products of variance 1 has variance D: undivided, softmax would be all or nothing."""
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)
    if mask is not None: scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)
    return weights @ v, weights

class MultiHeadAttention(nn.Module):
    """H attentions side by side, each on D numbers of its own (section 3.2.2).
    x (B, T, C) asks, memory (B, S, C) answers; in self-attention it is x -> (B, T, C)
    angle (T, D/2): rotary positions.   cache: a list that keeps keys and values of the tokens before x."""
    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.heads, self.qk_norm, self.weights = heads, qk_norm, None
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
    def forward(self, x, memory, mask=None, angle=None, cache=None):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # (B, T, C) -> (B, H, T, D)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(memory)), split(self.v_proj(memory))
        if self.qk_norm: q, k = unit_rms(q), unit_rms(k)                  # then only their directions count
        if angle is not None: q, k = rotate(q, angle), rotate(k, angle)
        if cache: k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        if cache is not None: cache[:] = k, v
        y, weights = attention(q, k, v, mask)
        self.weights = None if self.training else weights                 # for the picture
        return self.out_proj(y.transpose(1, 2).flatten(2))                         # (B, H, T, D) -> (B, T, C)

# -------------------------------------------------------------------------------------------------- Positions
# Attention alone sees a set of tokens: without positions, "dog bites man" is "man bites dog".
def angles(positions, width):
    """position / 10000^(2i / width), i < width / 2 (section 3.5).   positions (T) -> (T, width/2), radians"""
    return positions[:, None] / 10000 ** (torch.arange(0, width, 2, device=positions.device) / width)

def sinusoidal_encoding(length, width):
    """PE(pos, 2i) = sin(angle), PE(pos, 2i + 1) = cos(angle) (section 3.5).   -> (length, width)
    PE(pos + k) is PE(pos), every pair turned by an angle that k alone decides: "k back" is a linear map."""
    angle = angles(torch.arange(length), width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

def rotate(x, angle):
    """Rotary positions (Su et al. 2021, section 3.2): turn each pair of x (..., T, D) by its angle (T, D/2).
    A query turned by m and a key by n match as if one were turned by m - n: only their distance counts."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

# ----------------------------------------------------------------------------------------------------- Blocks
def unit_rms(x):
    """x over the root mean square of its last axis (Zhang & Sennrich 2019, Eq. 4, without the gain)."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

class LayerNorm(nn.Module):
    """Ba et al. 2016: the numbers of each token with mean 0 and variance 1; then a learned gain and bias."""
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
    def forward(self, x):
        return unit_rms(x - x.mean(-1, keepdim=True)) * self.weight + self.bias

class TransformerBlock(nn.Module):
    """Self-attention, attention to a memory if cross, feed-forward; each with a residual path past it.
    x (B, T, C), memory (B, S, C), mask (T, T) -> (B, T, C).   Without mask it is the paper's encoder layer,
    with mask and memory its decoder layer (section 3.1).   There norm(x + f(x)); pre_norm: x + f(norm(x))."""
    def __init__(self, width, heads, hidden, cross=False, pre_norm=False, activation=F.relu, qk_norm=False,
                 dropout=0.0):
        super().__init__()
        self.pre_norm, self.activation, self.dropout = pre_norm, activation, nn.Dropout(dropout)
        self.self_attn = MultiHeadAttention(width, heads, qk_norm)
        self.multihead_attn = cross and MultiHeadAttention(width, heads, qk_norm)             # torch's name
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2, self.norm3 = LayerNorm(width), LayerNorm(width), cross and LayerNorm(width)
    def forward(self, x, memory=None, mask=None, angle=None, cache=None):
        layers = [lambda y: self.self_attn(y, y, mask, angle, cache),
                  lambda y: self.linear2(self.activation(self.linear1(y)))]    # each token alone: section 3.3
        if self.multihead_attn: layers.insert(1, lambda y: self.multihead_attn(y, memory))
        for f, norm in zip(layers, (self.norm1, self.norm2, self.norm3)):
            x = x + self.dropout(f(norm(x))) if self.pre_norm else norm(x + self.dropout(f(x)))
        return x

class GPT(nn.Module):
    """Blocks in which a token sees itself and what came before.   tokens (B, T) int64 -> logits (B, T, V)
    The embedding is the output layer too (section 3.4).   cache: a list per block, for tokens given before.
    Later ideas: prenorm (Xiong et al. 2020), relu2 (So et al. 2021), qknorm (Henry et al. 2020)."""
    def __init__(self, cfg, vocabulary):
        super().__init__()
        keeps = lambda idea: cfg.ablate not in (idea, "all")
        self.context, self.width, self.heads, self.position = cfg.context, cfg.width, cfg.heads, cfg.position
        self.embedding, self.prenorm = nn.Embedding(vocabulary, cfg.width), keeps("prenorm")
        nn.init.normal_(self.embedding.weight, std=0.02 if self.prenorm else cfg.width**-0.5)
        self.place = nn.Parameter(torch.randn(cfg.context, cfg.width)) if cfg.position == "learned" else None
        relu = (lambda y: F.relu(y).square()) if keeps("relu2") else F.relu
        self.blocks = nn.ModuleList(TransformerBlock(
            cfg.width, cfg.heads, 4 * cfg.width, False, self.prenorm, relu, keeps("qknorm"), cfg.dropout)
            for _ in range(cfg.layers))
        self.norm = LayerNorm(cfg.width) if self.prenorm else nn.Identity()
    def forward(self, tokens, cache=None):
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        place, x = torch.arange(past + tokens.shape[1], device=tokens.device), self.embedding(tokens)
        x = unit_rms(x) if self.prenorm else x * math.sqrt(self.width)       # prenorm: the embedding, too
        if self.position == "sinusoidal": x = x + sinusoidal_encoding(len(place), self.width).to(x)[past:]
        if self.position == "learned": x = x + self.place[past:len(place)]
        angle = angles(place[past:], self.width // self.heads) if self.position == "rotary" else None
        mask = place[past:, None] >= place                                         # (T, S): no look ahead
        for block, kept in zip(self.blocks, cache or [None] * len(self.blocks)):
            x = block(x, mask=mask, angle=angle, cache=kept)
        return F.linear(self.norm(x), self.embedding.weight)

# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """Hold the code above against torch's own, and against what the papers say of it, on the CPU."""
    torch.manual_seed(0)
    x, y, mask = *torch.randn(2, 2, 7, 12, dtype=torch.float64), torch.ones(7, 7, dtype=torch.bool).tril()
    check("attention == F.scaled_dot_product_attention", [attention(x, y, x + y, mask)[0]],
          [F.scaled_dot_product_attention(x, y, x + y, is_causal=True)], 1e-9)
    ours = TransformerBlock(12, 3, 29, cross=True).double()
    theirs, state = nn.TransformerDecoderLayer(12, 3, 29, 0, batch_first=True).double(), ours.state_dict()
    for name, kind in itertools.product(("self_attn", "multihead_attn"), ("weight", "bias")):
        state[f"{name}.in_proj_{kind}"] = torch.cat([state.pop(f"{name}.{p}_proj.{kind}") for p in "qkv"])
    theirs.load_state_dict(state)                            # torch keeps query, key and value in one matrix
    check("TransformerBlock == nn.TransformerDecoderLayer", [ours(x, y, mask)], [theirs(x, y, ~mask)], 1e-9)
    check("no positions: reversed tokens, reversed outputs", [ours(x.flip(1), y)], [ours(x, y).flip(1)], 1e-9)
    q, k = (rotate(torch.randn(8).expand(40, 8), angles(torch.arange(40), 8)) for _ in range(2))
    check("rotary: a score depends on the distance only", [(q @ k.T)[1:, 1:]], [(q @ k.T)[:-1, :-1]], 1e-5)
    tokens, cache = torch.randint(11, (2, 16)), [[], []]
    model = GPT(Config(layers=2, heads=3, width=12, context=16), 11).eval()
    check("a future token cannot change the past", [model(tokens)[:, :9]], [model(tokens[:, :9])], 1e-6)
    parts = [model(part, cache) for part in tokens.split([5, 1, 1, 9], 1)]
    check("logits with a KV cache == without", [torch.cat(parts, 1)], [model(tokens)], 1e-5)

# ------------------------------------------------------------------------------------------------------- Data
def load_text(cfg):
    """--text, else tiny Shakespeare in --data, else downloaded into it, else Python's own source code.
    Returns its characters, sorted, the text as their numbers (N) int64, and its name."""
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    require(cfg.data == "data" or Path(cfg.data).is_dir(), f"--data {cfg.data}: there is no such folder")
    file = Path(cfg.text or Path(cfg.data, "tinyshakespeare.txt"))
    try:
        if not (cfg.text or cfg.tiny or file.exists()):
            file.parent.mkdir(exist_ok=True)
            socket.setdefaulttimeout(4)                  # a network that swallows packets must not hold us up
            torch.hub.download_url_to_file(url, file, progress=False)      # moved into place when whole
        text, name = file.read_text(encoding="utf-8"), cfg.text or "tiny Shakespeare"
    except (OSError, UnicodeDecodeError) as error:
        require(not (cfg.text or file.exists()), f"--{'text' if cfg.text else 'data'} {file}: {error}")
        print(f"no {file} ({error}). Instead, the source code of Python's own library: other losses.")
        files, name = sorted(Path(os.__file__).parent.glob("*.py")), "Python's source"
        text = "".join(f.read_text("ascii", "ignore") for f in files)[:100_000 if cfg.tiny else 1_100_000]
    chars = "".join(sorted({*text, "\n"}))
    return chars, torch.tensor([chars.index(c) for c in text]), name

# --------------------------------------------------------------------------------------------------- Training
def make_optimizers(model, cfg):
    """Muon (Jordan 2024) for the matrices of the blocks: momentum with all singular values near 1, so that
    what is rare is learned too. AdamW for all else."""
    muon = [w for w in model.blocks.parameters() if w.ndim == 2 and cfg.ablate not in ("muon", "all")]
    rest = [w for w in model.parameters() if not any(w is matrix for matrix in muon)]
    adamw = torch.optim.AdamW(rest, cfg.lr / 2, betas=(0.9, 0.99), weight_decay=0)
    return [adamw, torch.optim.Muon(muon, cfg.lr, weight_decay=0)] if muon else [adamw]

@torch.no_grad()
def evaluate(model, ids):
    """Mean cross-entropy over all of ids (N), in nats per character, in windows that do not overlap."""
    n = (len(ids) - 1) // model.context * model.context
    parts = zip(*(ids[i : i + n].view(-1, model.context).split(256) for i in (0, 1)))
    return sum(F.cross_entropy(model(x).mT, y, reduction="sum").item() for x, y in parts) / n

def train(model, ids, val, cfg, chars, autocast):
    """Train in place; the clock stops for validation.   ids, val (N) int64 -> (seconds, validation loss)"""
    net = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    optimizers, started = make_optimizers(model, cfg), time.perf_counter()
    for step in range(1, cfg.steps + 1):
        first = torch.randint(len(ids) - cfg.context, (cfg.batch,))[RANK::WORLD].to(ids.device)
        text = ids[first[:, None] + torch.arange(cfg.context + 1, device=ids.device)]           # (B, T + 1)
        with autocast:
            logits = net(text[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:        # the learning rate rises for 10 % of the steps, then falls to 0
            share = min(10 * step / cfg.steps, 1, (cfg.steps + 1 - step) / (0.9 * cfg.steps))
            optimizer.param_groups[0]["lr"] = share * optimizer.defaults["lr"]
            optimizer.step()
        if step % max(1, cfg.steps // 100) == 0:
            if WORLD > 1: torch.distributed.all_reduce(loss.detach())
            loss, rate = loss.item() / WORLD, step / (time.perf_counter() - started)
            if not math.isfinite(loss): sys.exit(f"step {step}: the loss is {loss}; try a lower --lr")
            print(f"step {step:5d}/{cfg.steps} | loss {loss:.4f} | "
                  f"{rate * cfg.batch * cfg.context:,.0f} tok/s | {(cfg.steps - step) / rate:.0f} s left")
        if step % max(1, cfg.steps // 5) == 0 or step == cfg.steps:
            seconds, val_loss = time.perf_counter() - started, evaluate(model.eval(), val)
            print(f"validation loss {val_loss:.4f} | {sample(model, chars, cfg, 60)!r}")
            model.train()
            started = time.perf_counter() - seconds
    return seconds, val_loss

# --------------------------------------------------------------------------------------- Writing and pictures
@torch.no_grad()
def sample(model, chars, cfg, count, cached=True):
    """--prompt, or a new line, and `count` characters more. With a KV cache each token goes through the model
    once. Where the context is full, it starts afresh with the later half."""
    tokens, start, cache = [chars.index(c) for c in cfg.prompt or "\n"], 0, []
    dice = torch.Generator().manual_seed(cfg.seed)
    for _ in range(count):
        if len(tokens) - start > model.context: start, cache = len(tokens) - model.context // 2, []
        fresh = torch.tensor([tokens[-1:] if cache else tokens[start:]], device=model.embedding.weight.device)
        cache = (cache or [[] for _ in model.blocks]) if cached else []
        logits = model(fresh, cache)[0, -1].cpu() / cfg.temperature
        if cfg.top_k: logits[logits < logits.topk(min(cfg.top_k, len(chars))).values[-1]] = -math.inf
        tokens.append(torch.multinomial(logits.softmax(-1), 1, generator=dice).item())
    return "".join(chars[i] for i in tokens)

def predict(model, chars, cfg):
    """Write on from --prompt with the weights in --out."""
    try:
        model.load_state_dict(safetensors.torch.load_file(Path(cfg.out, "gpt.safetensors")))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        require(False, f"--prompt {cfg.prompt!r}: {' '.join(str(error).split())}")
    print(f"{sample(model.eval(), chars, cfg, 500)}\nRESULT characters=500")

def draw(model, text, chars):
    """Whom each head of each block looks at in a text: a row asks, a column answers."""
    model(torch.tensor([[chars.index(c) for c in text]], device=model.embedding.weight.device))
    maps = torch.stack([block.self_attn.weights[0].cpu() for block in model.blocks])      # (layers, H, T, T)
    page = Image.new("RGB", (60 + 260 * model.heads, 80 + 260 * len(maps)), "white")
    pen, cell, font = ImageDraw.Draw(page), 240 / len(text), ImageFont.load_default(11)
    pen.text((30, 10), "Attention: row = query, column = key; by block", "black", ImageFont.load_default(18))
    for i, h in itertools.product(range(len(maps)), range(model.heads)):
        x, y = 50 + 260 * h, 60 + 260 * i
        page.paste(TF.to_pil_image(1 - maps[i, h].sqrt()).resize((240, 240), Image.NEAREST), (x, y))
        for k, c in enumerate(text):
            pen.text((x + cell * (k + 0.5), y - 9), c.strip(), "navy", font, "mm")
            if h == 0: pen.text((x - 9, y + cell * (k + 0.5)), c.strip(), "firebrick", font, "mm")
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
    """Check, load, train, write, draw.  Returns the figures of the RESULT line."""
    for flag, low in dict(seed=0, layers=1, heads=1, width=2, context=2, batch=1, steps=1, lr=1e-9, dropout=0,
                          temperature=1e-3, top_k=0).items():
        value, flag = getattr(cfg, flag), "--" + flag.replace("_", "-")
        require(low <= value < 2**40, f"{flag} {value}: must be at least {low}")
    require(cfg.width % (2 * cfg.heads) == 0, f"--width {cfg.width}: must be a multiple of 2 x --heads")
    require(cfg.batch % WORLD == 0, f"--batch {cfg.batch}: must be a multiple of the {WORLD} processes")
    require(cfg.dropout < 1, f"--dropout {cfg.dropout}: must be below 1")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    run_checks()
    if WORLD > 1:
        if device.type == "cuda": torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    chars, ids, data = load_text(cfg)
    require(set(cfg.prompt) <= set(chars), f"--prompt {cfg.prompt!r}: may consist of {chars!r}")
    ids, val = ids.to(device).tensor_split([int(0.9 * len(ids))])
    require(len(val) > cfg.context, f"--context {cfg.context}: the last tenth of the text is shorter")
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, len(chars)).to(device)
    if cfg.prompt: return predict(model, chars, cfg)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else "bf16" in cpu   # else it is slow
    print(f"week 2 | {device}, {'bfloat16' if fast else 'float32'} | torch {torch.__version__} | "
          f"data: {data}, {len(ids):,} characters to train on | weights: from scratch")
    pairs = (ids[:-1] * len(chars) + ids[1:]).bincount(minlength=len(chars) ** 2).view(len(chars), -1) + 0.1
    bigram = -(pairs / pairs.sum(1, keepdim=True))[val[:-1], val[1:]].log().mean().item()
    seconds, val_loss = train(model, ids, val, cfg, chars, torch.autocast(device.type, torch.bfloat16, fast))
    for cached in (True, False):
        started, text = time.perf_counter(), sample(model.eval(), chars, cfg, 500, cached)
        print(f"{500 / (time.perf_counter() - started):.0f} characters/s, KV cache {cached}\n{text * cached}")
    tokens = cfg.steps * cfg.batch * cfg.context
    result = dict(val_loss=val_loss, baseline_loss=bigram, train_seconds=seconds, tokens=tokens,
                  parameters=sum(w.numel() for w in model.parameters()), tokens_per_second=tokens / seconds)
    if RANK: return result
    weights = safetensors.torch.save(model.cpu().state_dict())
    save(cfg.out, "gpt.safetensors", lambda part: part.write_bytes(weights))
    save(cfg.out, "transformer.png", draw(model, text[-min(24, cfg.context) :], chars).save)
    return finish(cfg, device, result, data=data, weights="from scratch")

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
