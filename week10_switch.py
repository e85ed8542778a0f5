# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.10", "pillow>=10.1"]
# ///
"""Week 10: the Switch layer. Many experts, each token is routed to one: more parameters, no more work.
Paper: Fedus, Zoph & Shazeer 2021, "Switch Transformers".
The idea: a router p(x) = softmax(W x) sends each token to its likeliest expert i, and y = p_i(x) E_i(x).

    python week10_switch.py                       # a Transformer, dense and sparse, on tiny Shakespeare
    python week10_switch.py --ablate balance      # no auxiliary loss to keep all experts at work
    python week10_switch.py --balance bias        # balance without a loss (Wang et al. 2024)

Expected: 1.644 nats per character (1.638 to 1.653, three seeds), dense 1.705, same steps and work per token;
78 s and 43 s on one core. Eight functions in one: 2.7 % of error; dense 19 %, without balancing 29 %.
"""
import argparse, inspect, itertools, json, math, os, socket, sys, time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import nn

# ----------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    device: str = "auto"       # auto = cuda if there is one, else cpu; or by name: cpu, cuda:1, mps
    seed: int = 1337           # the same seed on the same CPU gives the same losses, bit for bit
    tiny: bool = False         # everything smallest, and no network: to see that it runs
    out: str = "out/week10"    # folder for everything that is written
    data: str = "data"         # folder with tinyshakespeare.txt; where there is none, it is downloaded
    text: str = ""             # a text file of your own to train on, UTF-8
    experts: int = 8           # feed-forward layers to choose from, in each block
    top_k: int = 1             # experts that a token asks: 1 = Switch, 2 = as in GShard and Mixtral
    capacity: float = 1.25     # seats at an expert, as a multiple of what it gets if all get the same
    balance: Literal["loss", "bias"] = "loss"      # the paper's auxiliary loss, or biases without one
    alpha: float = 0.01        # weight of the balance loss
    layers: int = 2            # blocks
    width: int = 64            # numbers per token: a multiple of 32, the width of an attention head
    context: int = 64          # characters that the model sees at once
    batch: int = 32            # windows of text per step
    steps: int = 1000          # optimizer steps, of the dense model and of the sparse one
    lr: float = 0.015          # peak learning rate of Muon; AdamW's is half of it
    ablate: Literal["none", "balance", "capacity"] = "none"    # no balancing at all; or a seat for everyone
TINY = dict(experts=4, width=32, context=32, batch=16, steps=60)

# ------------------------------------------------------------------------------------------------ The experts
# N tokens of D numbers; E experts of F hidden units, each with C seats; a token asks k of them.
# Four ways to gate * act(x w_in_i) w_out_i: x (M, D) and gate (M, 1) sorted by expert, counts (E) of each.
def in_a_loop(x, gate, w_in, w_out, counts, act):
    """One after the other. Not w_in[i]: its gradient is as large as w_in, and E of these would add up."""
    parts = zip(x.split(n := counts.tolist()), gate.split(n), w_in.unbind(), w_out.unbind())
    return torch.cat([act(part @ u) @ v * g for part, g, u, v in parts])
def seats_of(counts):
    """Expert and seat of each row, when counts (E) rows in a line come to each.   -> (M), (M)"""
    expert = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return expert, torch.arange(len(expert), device=counts.device) - (counts.cumsum(0) - counts)[expert]
def padded(x, gate, w_in, w_out, counts, act):
    """All experts get as many rows as the busiest has, zeros behind their own: one product does them all."""
    queues = x.new_zeros(len(counts), int(counts.max()), x.shape[1]).index_put(seats_of(counts), x)
    return (act(queues @ w_in) @ w_out)[seats_of(counts)] * gate
def grouped(x, gate, w_in, w_out, counts, act):
    """torch's own product of sorted rows, for which it wants to know where each expert's rows end."""
    ends = counts.cumsum(0).int()
    return F.grouped_mm(act(F.grouped_mm(x, w_in, offs=ends)), w_out, offs=ends) * gate
def one_hot(x, gate, w_in, w_out, counts, act):
    """As on chips that want fixed shapes: products with a mask (M, E, C), 1 where row m has seat c at e."""
    mask = x.new_zeros(len(x), len(counts), int(counts.max()))
    mask[torch.arange(len(x), device=x.device), *seats_of(counts)] = 1
    answers = act(torch.einsum("mec,md->ecd", mask, x) @ w_in) @ w_out
    return torch.einsum("mec,ecd->md", mask * gate[:, :, None], answers)
def fastest(x, gate, w_in, w_out, counts, act):
    """On a CPU, a loop for long queues, as its pieces fit into the cache, and grouped for short ones."""
    fits = x.dtype == torch.float32 and all(n % 4 == 0 for n in w_in.shape[1:])
    way = padded if x.device.type != "cpu" else in_a_loop if len(x) >= 256 * len(counts) else grouped
    return (padded if way is grouped and not fits else way)(x, gate, w_in, w_out, counts, act)

# ------------------------------------------------------------------------------------------- The Switch layer
def balance_loss(p, load):
    """E sum_i f_i P_i (Eq. 4, yet without alpha): 1 if all experts get the same, E if one gets everything.
    f_i, a share of tokens, is a count, without gradient (Eq. 5); P_i, the mean of p_i, has one (Eq. 6)"""
    return len(load) * (load / load.sum() * p.mean(0)).sum()
class SwitchFFN(nn.Module):
    """A feed-forward layer of which each token uses a part.   x (..., D) -> y (..., D), auxiliary loss
    y = sum of p_i(x) E_i(x) over the k likeliest experts (Eq. 1 and 2; the p_i of k > 1 are made to add up to
    1, as in GShard). A token with no seat gets exactly 0: the residual path carries it. Rule "bias" (Wang et
    al. 2024) has no balance loss: a bias in the choice, not in the gate, moves in steps against the load."""
    def __init__(self, d_model, d_ff, n_experts, capacity_factor=1.25, top_k=1, alpha=0.01, z=0.001,
                 jitter=0.0, rule="loss", activation=F.relu, dispatch=fastest):
        super().__init__()
        self.capacity_factor, self.top_k, self.alpha, self.z = capacity_factor, top_k, alpha, z
        self.jitter, self.rule, self.act, self.dispatch, self.dropped = jitter, rule, activation, dispatch, 0
        self.router = nn.Parameter(0.1 * d_model**-0.5 * torch.randn(n_experts, d_model))
        self.w_in = nn.Parameter(d_model**-0.5 * torch.randn(n_experts, d_model, d_ff))
        self.w_out = nn.Parameter(d_ff**-0.5 * torch.randn(n_experts, d_ff, d_model))
        self.register_buffer("bias", torch.zeros(n_experts))
    def route(self, x):
        """x (N, D) -> logits and p (N, E), the k experts of each token (N, k) int64, and their gates (N, k);
        in float32 or better (section 2.4): bfloat16 keeps 3 digits, and some tokens would go elsewhere."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.training and self.jitter: x = x * (1 + self.jitter * torch.empty_like(x).uniform_(-1, 1))
            p = (logits := F.linear(x, self.router.to(x.dtype))).softmax(-1)
        score = p + self.bias                                             # 0, but for the rule "bias"
        expert = score.topk(self.top_k).indices if self.top_k > 1 else score.argmax(-1, keepdim=True)
        gate = p.gather(1, expert)
        return logits, p, expert, gate / gate.sum(-1, keepdim=True) if self.top_k > 1 else gate
    def seat(self, choice):
        """Sort the choices (N k) by expert and, at each, as in the text: who comes later displaces nobody.
        Seats: tokens / experts * capacity factor (Eq. 3).   -> who has a seat (M), load (E), served (E)"""
        load, order = choice.bincount(minlength=len(self.router)), choice.argsort(stable=True)
        seats = math.ceil(min(len(choice), len(choice) / len(load) * self.capacity_factor))
        return order[seats_of(load)[1] < seats], load, load.clamp(max=seats)
    def forward(self, x):
        if len(self.router) == 1:                      # nothing to choose, gate 1: this is the dense layer
            return self.act(x @ self.w_in.squeeze(0)) @ self.w_out.squeeze(0), x.new_zeros(())
        logits, p, self.expert, gate = self.route(flat := x.flatten(0, -2))
        seated, load, served = self.seat(self.expert.flatten())
        token, self.load, self.dropped = seated // self.top_k, load, 1 - len(seated) / gate.numel()
        y = self.dispatch(flat[token], gate.view(-1, 1)[seated], self.w_in, self.w_out, served, self.act)
        aux = self.z * logits.logsumexp(-1).square().mean()      # against large logits (Zoph et al. 2022)
        if self.rule == "loss": aux = aux + self.alpha * balance_loss(p, load)
        if self.rule == "bias" and self.training: self.bias += 0.001 * (load.sum() - len(load) * load).sign()
        return y.new_zeros(flat.shape).index_add(0, token, y).view(x.shape).to(x.dtype), aux
def token_by_token(layer, x):
    """The layer as the paper tells it, slowly, for the checks: x (N, D) -> y (N, D), auxiliary loss."""
    E, y, logits = len(layer.router), torch.zeros_like(x), x @ layer.router.T
    asked, seats = torch.zeros(E), math.ceil(len(x) * layer.top_k / E * layer.capacity_factor)
    for n, p in enumerate(logits.softmax(1)):
        for i in (chosen := p.topk(layer.top_k).indices):
            asked[i] += 1
            gate = (asked[i] <= seats) * p[i] / (p[chosen].sum() if layer.top_k > 1 else 1)
            answer = gate * layer.act(x[n : n + 1] @ layer.w_in[i]) @ layer.w_out[i]
            y = y.index_add(0, torch.tensor([n]), answer)
    balance = E * sum(asked[i] / asked.sum() * logits.softmax(1)[:, i].mean() for i in range(E))
    return y, layer.alpha * balance + layer.z * logits.exp().sum(1).log().square().mean()

# ------------------------------------------------------------------------------------------------ Transformer
# The recipe of week 2, shorter. B windows of T characters, C = width, H heads of 32, V characters.
def rotate(x, angle):
    """Rotary positions (Su et al. 2021, section 3.2): turn each pair of x (..., T, D) by its angle (T, D/2).
    A query turned by m and a key by n match as if one were turned by m - n: only their distance counts."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
class Block(nn.Module):
    """Attention, then one feed-forward expert (dense) or more.   x (B, T, C) -> (B, T, C), total + loss"""
    def __init__(self, cfg, experts):
        super().__init__()
        self.heads, self.norm1, self.norm2 = cfg.width // 32, nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.qkv_proj, self.out_proj = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)
        self.ffn = SwitchFFN(
            cfg.width, 4 * cfg.width, experts, math.inf if cfg.ablate == "capacity" else cfg.capacity,
            min(experts, cfg.top_k), cfg.alpha, jitter=0.01, activation=lambda y: F.relu(y).square(),
            rule="none" if cfg.ablate == "balance" else cfg.balance)
    def forward(self, x, angle, total):
        q, k, v = self.qkv_proj(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(F.rms_norm(y, (32,), eps=1e-5), angle) for y in (q, k))                 # (B, H, T, 32)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        y, aux = self.ffn(self.norm2(x := x + self.out_proj(y)))
        return x + y, total + aux
class GPT(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, V), auxiliary losses, added. The embedding is the output layer."""
    def __init__(self, cfg, vocabulary, experts):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg, experts) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(nn.init.normal_(self.embedding.weight, std=0.02).shape[1])
    def forward(self, tokens):
        x, total = F.rms_norm(self.embedding(tokens), self.norm.weight.shape, eps=1e-5), 0
        angle = torch.outer(torch.arange(tokens.shape[1]), 10000 ** -torch.arange(0, 1, 1 / 16)).to(x.device)
        for block in self.blocks: x, total = block(x, angle, total)
        return F.linear(self.norm(x), self.embedding.weight), total

# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """Hold the layer against the paper, token by token in float64, and against what must be, on the CPU."""
    torch.manual_seed(0)
    x, weigh = torch.randn(41, 8, requires_grad=True), torch.randn(41, 8) / 9
    values = lambda y, aux: [y, aux, *torch.autograd.grad((y * weigh).sum() + aux, [x, *layer.parameters()])]
    for k, way in itertools.product((2, 1), (in_a_loop, padded, one_hot, grouped)):
        layer = SwitchFFN(8, 12, 5, 0.8, k, 0.5, 0.5, dispatch=way)
        ours, layer = values(*layer(x)), layer.double()
        check(f"k = {k}, {way.__name__}, with gradients == token by token", ours,
              values(*token_by_token(layer, x.double())), 1e-6)
    left = torch.ones(41, dtype=torch.bool).index_fill(0, layer.seat(layer.expert[:, 0])[0], False)
    check(f"{left.sum()} of 41 tokens find no seat: exactly 0", [ours[0][left], left.any() * 1], [0, 1], 0)
    one = torch.eye(5)[[2] * 45]
    check("balance loss: 1 if all get the same, E if one all",
          [balance_loss(one, torch.full((5,), 9)), balance_loss(one, one.sum(0))], [1, 5], 1e-6)
    with torch.autocast("cpu", torch.bfloat16): under = layer.float().route(x)
    check("the router stays in float32 under autocast", under, layer.route(x), 0)
    model, tokens = GPT(Config(context=16), 11, 8).eval(), torch.randint(11, (1, 16))
    check("a future token cannot change the past", [model(tokens)[0][:, :9]],
          [model((tokens + (torch.arange(16) > 8)) % 11)[0][:, :9]], 1e-6)

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
def train(model, ids, val, cfg, name):
    """Train in place, as in week 2. Muon wants matrices: it gets each expert's, a view.   ids, val (N) int64
    -> seconds, and the mean cross-entropy over val, at most 2^17 characters, in windows side by side"""
    parts = [(w, i, nn.Parameter(v)) for w in model.parameters() if w.ndim == 3 for i, v in enumerate(w.data)]
    muon = [w for key, w in model.blocks.named_parameters() if w.ndim == 2 and "router" not in key]
    rest = [w for w in model.parameters() if w.ndim < 3 and not any(w is matrix for matrix in muon)]
    muon = torch.optim.Muon(muon + [part for *_, part in parts], cfg.lr, weight_decay=0)
    optimizers = [torch.optim.AdamW(rest, cfg.lr / 2, betas=(0.9, 0.99), weight_decay=0), muon]
    dice, started = torch.Generator().manual_seed(cfg.seed), time.perf_counter()
    for step in range(1, cfg.steps + 1):
        first = torch.randint(len(ids) - cfg.context, (cfg.batch,), generator=dice).to(ids.device)
        text = ids[first[:, None] + torch.arange(cfg.context + 1, device=ids.device)]           # (B, T + 1)
        logits, aux = model(text[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        model.zero_grad(); (loss + aux).backward()
        for w, i, part in parts: part.grad = w.grad[i]
        for optimizer in optimizers:        # the learning rate rises for 10 % of the steps, then falls to 0
            share = min(10 * step / cfg.steps, 1, (cfg.steps + 1 - step) / (0.9 * cfg.steps))
            optimizer.param_groups[0]["lr"] = share * optimizer.defaults["lr"]
            optimizer.step()
        if step % max(1, cfg.steps // 20) == 0:
            loss, s = loss.item(), (time.perf_counter() - started) / step
            if not math.isfinite(loss): sys.exit(f"step {step}: the loss is {loss}; try a lower --lr")
            print(f"{name} step {step:5}/{cfg.steps} | loss {loss:.4f} | {(cfg.steps - step) * s:.0f} s left",
                  f"| {cfg.batch * cfg.context / s:,.0f} tok/s | {model.blocks[0].ffn.dropped:.1%} dropped")
    seconds, n = time.perf_counter() - started, min(len(val) - 1, 2**17) // cfg.context * cfg.context
    with torch.no_grad(): logits = model.eval()(val[:n].view(-1, cfg.context))[0].flatten(0, 1)
    return seconds, F.cross_entropy(logits, val[1 : n + 1]).item()
def bits(rows, columns):
    """Mutual information of two lists (N): H(row) + H(column) - H(both), H = -sum p log2 p, in bits."""
    H = lambda x: -sum(n / len(x) * math.log2(n / len(x)) for n in x.unique(return_counts=True)[1].tolist())
    return H(rows) + H(columns) - H(rows * (1 + columns.max()) + columns)
def specialise(rule, experts, seed, steps=300):
    """Learn eight rotations, each around a centre of its own.   -> error left, bits known of k, all loads"""
    torch.manual_seed(seed)
    turns, centres, loads = torch.linalg.qr(torch.randn(8, 16, 16)).Q, 1.5 * torch.randn(8, 16), []
    layer = SwitchFFN(16, 32, experts, alpha=0.1, rule=rule)
    optimizer = torch.optim.Adam(layer.parameters())
    for step in range(steps + 1):
        k = torch.randint(8, (512 if step < steps else 4096,))                         # the last are the test
        y, aux = layer(x := centres[k] + torch.randn(len(k), 16))
        error = (y - (x[:, None] @ turns[k])[:, 0]).square().mean() / x.square().mean()
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, 2 - 2 * step / steps)          # 0 in the test
        optimizer.zero_grad(); (error + aux).backward(); optimizer.step()
        if experts > 1: loads.append(layer.load / len(k))
    return error.item(), bits(k, layer.expert[:, 0]) if loads else 0.0, loads
def time_layers(experts, tokens, device, ways, repeats, width=128):
    """Median milliseconds of forward + backward, dense and then in some ways; all take turns."""
    x, ways = torch.randn(tokens, width, device=device, requires_grad=True), [None, *ways]
    rows = [(SwitchFFN(width, 4 * width, experts if way else 1, dispatch=way).to(device), []) for way in ways]
    for _, (layer, times) in itertools.product(range(repeats + 1), rows):
        x.grad = None; layer.zero_grad(); started = time.perf_counter()
        sum(t.square().sum() for t in layer(x)).backward()
        x.grad.sum().item()                                                            # waits for a GPU
        times.append(1e3 * (time.perf_counter() - started))
    return [sorted(times[1:])[repeats // 2] for _, times in rows]                      # the first warms up

# --------------------------------------------------------------------------------------------------- Pictures
def draw(studies, text, asked):
    """studies {title: share of each expert in each step (S, E)}; whom each character asks (layers, T)"""
    page, font = Image.new("RGB", (1180, 282 + 34 * len(asked)), "white"), ImageFont.load_default(15)
    pen, color = ImageDraw.Draw(page), lambda i: ImageColor.getrgb(f"hsl({137 * i % 360},70%,70%)")
    palette = torch.tensor([color(i) for i in range(8)], dtype=torch.uint8)
    for i, (title, loads) in enumerate(studies.items()):
        share = torch.stack(loads)[torch.linspace(0, len(loads) - 1, 360).long()].cumsum(1)      # (360, E)
        owner = (torch.linspace(0.002, 0.998, 180)[:, None, None] > share).sum(2)                # (180, 360)
        image = Image.frombytes("RGB", (360, 180), bytes(palette[owner].flatten().tolist()))
        page.paste(image, (20 + 390 * i, 42)); pen.text((20 + 390 * i, 14), title, "black", font)
    pen.text((20, 234), "Above: load of each expert.  Below: expert per character, by block", "black", font)
    for (i, row), (k, c) in itertools.product(enumerate(asked.tolist()), enumerate(text)):
        x, y, step = 20 + 1140 * k / len(text), 266 + 34 * i, 1140 / len(text)
        pen.rectangle((x, y, x + step, y + 30), color(row[k]))
        pen.text((x + step / 2, y + 15), c.strip(), "black", font, "mm")
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
    """Check, train dense and sparse, study, time, draw.  Returns the figures of the RESULT line."""
    for flag, low in dict(seed=0, experts=2, top_k=1, capacity=1e-3, alpha=0, layers=1, width=32,
                          context=2, batch=1, steps=1, lr=1e-9).items():
        value, flag = getattr(cfg, flag), "--" + flag.replace("_", "-")
        require(low <= value < 2**40, f"{flag} {value}: must be at least {low}")
    require(cfg.width % 32 == 0, f"--width {cfg.width}: must be a multiple of 32")
    require(cfg.top_k <= cfg.experts, f"--top-k {cfg.top_k}: must be at most --experts {cfg.experts}")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    run_checks()
    chars, ids, data = load_text(cfg)
    ids, val = ids.to(device).tensor_split([int(0.9 * len(ids))])
    require(len(val) > cfg.context, f"--context {cfg.context}: the last tenth of the text is shorter")
    print(f"week 10 | {device}, float32 | torch {torch.__version__} | "
          f"data: {data}, {len(ids):,} characters to train on | weights: from scratch")
    result, studies, N, repeats = {}, {}, *((256, 1) if cfg.tiny else (4096, 9))
    for name, experts in dict(dense=1, sparse=cfg.experts).items():
        torch.manual_seed(cfg.seed)
        model, kind = GPT(cfg, len(chars), experts).to(device), "dense_" * (experts == 1)
        seconds, loss = train(model, ids, val, cfg, name)
        result.update({kind + "val_loss": loss, kind + "train_seconds": seconds})
        print(f"{name}: validation loss {loss:.4f}")
    layers = [block.ffn for block in model.blocks]              # they remember whom all of val asked, (N, k)
    asked, said = torch.stack([s.expert[:, 0] for s in layers]).cpu(), val[: len(layers[0].expert)].cpu()
    for i, e in itertools.product(range(cfg.layers), range(cfg.experts)):
        count = said[asked[i] == e].bincount(minlength=len(chars))
        best = (f"{chars[c]!r} {count[c] / count.sum():.0%}" for c in count.argsort(descending=True)[:8])
        print(f"block {i}, expert {e}: {count.sum() / len(said):5.1%} of the characters,", *best)
    result.update(max_over_mean_load=max((s.load.max() / s.load.float().mean()).item() for s in layers),
                  dropped_fraction=sum(s.dropped for s in layers) / len(layers), bits=bits(said, asked[-1]))
    for rule, experts in dict(dense=1, none=8, loss=8, bias=8).items():
        error, known, loads = specialise(rule, experts, cfg.seed)
        result.update({f"{rule}_error": error, f"{rule}_bits": known})
        print(f"rotations, balance by {rule}: error {error:.1%}, the experts know {known:.2f} of 3 bits")
        if loads: studies[f"balance by {rule}: error {error:.1%}, {known:.2f} of 3 bits known"] = loads
    for E, n in (2, N), (4, N), (8, N), (16, N), (32, N), (64, N), (32, N // 4):
        dense, ours, *masks = time_layers(E, n, device, [fastest, one_hot][: 1 + (E == 8)], repeats)
        print(f"{n} tokens, {E:2} experts: {ours:5.1f} ms, {ours / dense:.2f} times the dense layer")
        if E == 8: result.update(slowdown_vs_dense=ours / dense, speedup_vs_onehot=masks[0] / ours)
    result.update(slowdown_32_experts=ours / dense)
    save(cfg.out, "switch.png", draw(studies, "".join(chars[c] for c in said[:95]), asked[:, :95]).save)
    return finish(cfg, device, result, data=data, weights="from scratch")

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
