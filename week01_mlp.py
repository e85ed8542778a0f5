# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "safetensors>=0.4", "pillow>=10.1"]
# ///
"""Week 1: PyTorch mastery. A multi-layer perceptron on MNIST with every part built by hand, and proved.

Paper: Ciresan, Meier, Gambardella, Schmidhuber 2010, "Deep, Big, Simple Neural Nets for Handwritten Digit
Recognition": a plain MLP that sees every digit distorted anew, every time, errs on 0.35 % of the test set.
The idea: a layer computes y = relu(W x + b). The chain rule carries dL/dy back through it as one more matrix
product, and an optimizer moves every weight a little against its gradient, W <- W - lr dL/dW. Repeat.

    python week01_mlp.py                    # trains, then draws what it reads wrongly: out/week01/mlp.png
    python week01_mlp.py --ablate relu      # what is left without the non-linearity: a linear model
    python week01_mlp.py --predict 7.png    # ten probabilities for a digit of your own

Expected: 99.37 % of the test set (99.34 to 99.39, seeds 1337, 1, 2), 98 % after 2.4 s, all in 29 s of
training on two cores; --epochs 110: 99.51 % in 88 s. The nearest mean image: 82.03 %; the usual MLP: 97.4 %.
"""
import argparse, copy, inspect, json, math, os, socket, sys, tempfile, time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torchvision import datasets, utils

# ----------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    device: str = "auto"       # auto = cuda if there is one, else cpu; or by name: cpu, cuda:1, mps
    seed: int = 1337           # the same seed on the same CPU gives the same losses, bit for bit
    tiny: bool = False         # everything smallest, and no network: to see that it runs
    out: str = "out/week01"    # folder for everything that is written
    data: str = "data"         # folder with MNIST/raw; where there is none, MNIST is downloaded into it
    width: int = 512           # units in each of the two hidden layers
    epochs: int = 36           # passes over the training images
    batch: int = 512           # images per step
    optimizer: Literal["adamw", "sgd"] = "adamw"   # sgd wants --lr 0.1 --decay 0.0001
    lr: float = 3e-3           # peak learning rate, reached after the warm-up
    decay: float = 0.2         # weight decay: each step takes lr * decay of every weight away
    ablate: Literal["none", "relu", "distortion"] = "none"   # take one idea away, to see what it was worth
    predict: str = ""          # do not train: read this picture file, or test digit, with the saved weights
TINY = dict(width=128, epochs=10, batch=50)

# ------------------------------------------------------------------------------------------- Autograd by hand
# N images in a batch, I inputs and O outputs of a layer, K classes.  G = dL/dy is what backward() is handed.
class LinearFunction(torch.autograd.Function):
    """y = x W^T + b, that is y_no = sum_i x_ni W_oi + b_o.   x (N, I), W (O, I), b (O) -> y (N, O)
    The chain rule sums over every path from a number to the loss (Rumelhart, Hinton & Williams 1986):
        dL/dx_ni = sum_o G_no W_oi   so   dL/dx = G W
        dL/dW_oi = sum_n G_no x_ni   so   dL/dW = G^T x
        dL/db_o  = sum_n G_no        so   dL/db = G summed over the batch"""
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias
    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        # The gradient of the pixels is not needed: leaving it out saves a third of the first layer's work.
        return grad @ weight if ctx.needs_input_grad[0] else None, grad.T @ x, grad.sum(0)

class ReLUFunction(torch.autograd.Function):
    """y = max(x, 0), so dL/dx = G where x > 0, else 0.   (At 0 there is no derivative; we take 0.)"""
    @staticmethod
    def forward(ctx, x):
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y
    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].sign()    # 1 where x > 0, else 0; faster than a mask of bools

class CrossEntropyFunction(torch.autograd.Function):
    """L = mean over n of -log p_ny, p = softmax(z).   logits z (N, K), targets y (N) int64 -> scalar, in nats
    log p_k = z_k - log sum_j exp z_j.  Shifting all z by their maximum changes nothing but keeps exp from
    overflowing (log-sum-exp).  d log p_y / dz_k = [k = y] - p_k, so dL/dz = (p - onehot(y)) / N."""
    @staticmethod
    def forward(ctx, logits, targets):
        shifted = logits - logits.amax(1, keepdim=True)
        log_p = shifted - shifted.exp().sum(1, keepdim=True).log()
        ctx.save_for_backward(log_p, targets)
        return -log_p.gather(1, targets[:, None]).mean()
    @staticmethod
    def backward(ctx, grad):
        log_p, targets = ctx.saved_tensors
        onehot = torch.zeros_like(log_p).scatter_(1, targets[:, None], 1)
        return (log_p.exp() - onehot) * (grad / len(targets)), None

linear, relu, cross_entropy = LinearFunction.apply, ReLUFunction.apply, CrossEntropyFunction.apply

# --------------------------------------------------------------------------------------------- Custom modules
class Linear(nn.Module):
    """y = x W^T + b with He initialisation.   (N, I) -> (N, O)
    He et al. 2015, Eq. 10: Var[W] = 2 / I. ReLU zeroes half of the signal; the 2 makes up for it, so that it
    neither fades nor grows from layer to layer. Often confused with Xavier (Glorot & Bengio 2010, Eq. 12),
    Var[W] = 2 / (I + O), derived without ReLU. nn.Linear's own default is neither: Var[W] = 1 / (3 I)."""
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * math.sqrt(2 / inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
    def forward(self, x):
        # As autocast does with nn.Linear: multiply in bfloat16 but keep the weights in float32, since a small
        # step would vanish in 8 bits. The cast is differentiable: the gradient arrives in float32.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

class MLP(nn.Module):
    """Linear layers with an activation between them.   (N, ...) flattened to (N, sizes[0]) -> (N, sizes[-1])
    The last layer starts at zero: the first prediction is uniform, the first loss log K, for every seed."""
    def __init__(self, sizes, activation=relu):
        super().__init__()
        self.layers = nn.ModuleList(Linear(i, o) for i, o in zip(sizes, sizes[1:]))
        self.activation = activation
        nn.init.zeros_(self.layers[-1].weight)
    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)

# ------------------------------------------------------------------------------------------------- Optimizers
class SGD(torch.optim.Optimizer):
    """Momentum (Sutskever et al. 2013, Eq. 1-2, lr outside of v): v <- mu v + g + decay w,  w <- w - lr v."""
    def __init__(self, params, lr=1e-2, momentum=0.9, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in (w for w in group["params"] if w.grad is not None):
                v = self.state[w].setdefault("v", torch.zeros_like(w))
                v.mul_(group["momentum"]).add_(w.grad).add_(w, alpha=group["weight_decay"])
                w.sub_(v, alpha=group["lr"])

class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2):
    m <- b1 m + (1 - b1) g         a running mean of the gradient ...
    v <- b2 v + (1 - b2) g^2       ... and of its square; both start at 0, too small by 1 - b^t at step t
    w <- w - lr decay w            decay goes to the weight itself; inside g, m / sqrt(v) would distort it
    w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)"""
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            group["t"] = t = group.get("t", 0) + 1
            for w in (w for w in group["params"] if w.grad is not None):
                m, v = (self.state[w].setdefault(name, torch.zeros_like(w)) for name in "mv")
                m.lerp_(w.grad, 1 - b1)
                v.mul_(b2).addcmul_(w.grad, w.grad, value=1 - b2)
                w.mul_(1 - lr * group["weight_decay"])
                w.addcdiv_(m, (v / (1 - b2**t)).sqrt_().add_(group["eps"]), value=-lr / (1 - b1**t))

def learning_rate(done, peak, warmup=0.02):
    """Linear warm-up, then half a cosine (Loshchilov & Hutter 2017, Eq. 5).   done: share of steps, 0 to 1"""
    return peak * min(done / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, done - warmup) / (1 - warmup)))

# ----------------------------------------------------------------------------------------------------- Checks
def run_checks():
    """Hold the code above against torch's own, on the CPU, and print the largest differences."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((7, 5), (3, 5), (3,)))
    y = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    losses = cross_entropy(relu(linear(x, w, b)), y), F.cross_entropy(F.relu(F.linear(x, w, b)), y)
    ours, theirs = ([loss, *torch.autograd.grad(loss, (x, w, b))] for loss in losses)
    check("cross_entropy(relu(linear)), gradients == torch's", ours, theirs, 1e-12)
    images, targets = torch.rand(101, 784, dtype=torch.float64), torch.arange(101) % 10
    ours = MLP((784, 64, 10)).double()
    check("first loss of an MLP == log 10", [cross_entropy(ours(images), targets)], [math.log(10)], 1e-9)
    theirs = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))
    for mine, reference, options in ((SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
                                     (AdamW, torch.optim.AdamW, dict(lr=0.01, betas=(0.9, 0.99)))):
        for model, loss, optimizer in ((ours, cross_entropy, mine), (theirs, F.cross_entropy, reference)):
            optimizer = optimizer(model.parameters(), weight_decay=0.1, **options)
            for _ in range(20):
                optimizer.zero_grad(); loss(model(images), targets).backward(); optimizer.step()
        check(f"20 steps of {mine.__name__} == torch's", [*ours.parameters()], [*theirs.parameters()], 1e-9)

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
def train(model, images, labels, test_images, test_labels, cfg, autocast):
    """Train in place; the clock stops while the test digits are read, after each epoch.   Returns [(seconds,
    test accuracy)], the last answers (N), and the model that gave them: not the one that is trained, but a
    running average of its weights (Polyak & Juditsky 1992)."""
    average, log, step, seconds = copy.deepcopy(model), [], 0, 0.0
    optimizer = {"adamw": AdamW, "sgd": SGD}[cfg.optimizer](model.parameters(), weight_decay=cfg.decay)
    for epoch in range(1, cfg.epochs + 1):
        started = time.perf_counter()
        batches = torch.randperm(len(images), device=images.device).split(cfg.batch)
        for batch in batches:
            step += 1
            optimizer.param_groups[0]["lr"] = learning_rate(step / (cfg.epochs * len(batches)), cfg.lr)
            x = images[batch][:, None] / 255                                 # uint8 -> (N, 1, 28, 28) float
            x = x if cfg.ablate == "distortion" else warp(x, affine=0.08, shift=0.07, elastic=0.06)
            with autocast:
                logits = model(x).float()                   # 8 bits are too few to sum exponentials in
            loss = cross_entropy(logits, labels[batch])
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            for kept, w in zip(average.parameters(), model.parameters()):
                kept.data.lerp_(w.data, max(0.02, 8 / (7 + step)))
        loss = loss.item()                                                   # waits for the device
        if not math.isfinite(loss):
            sys.exit(f"step {step}: the loss is {loss}; try a lower --lr")
        seconds += time.perf_counter() - started
        with torch.no_grad(), autocast:
            answers = average(test_images / 255).argmax(1)
        log.append((seconds, (answers == test_labels).float().mean().item()))
        print(f"epoch {epoch:3d}/{cfg.epochs} | loss {loss:.4f} | test {log[-1][1]:.2%} | "
              f"{epoch * len(images) / seconds:,.0f} img/s | {seconds * (cfg.epochs / epoch - 1):.0f} s left")
    return log, answers, average

# ------------------------------------------------------------------------------------ Prediction and pictures
def predict(model, weights, what, test_images):
    """Print the ten probabilities of test digit number `what`, or of the picture file `what`."""
    try:
        model.load_state_dict(safetensors.torch.load_file(weights))
        picture = TF.to_pil_image(test_images[int(what)]) if what.isdigit() else Image.open(what).convert("L")
    except (OSError, RuntimeError, IndexError, safetensors.SafetensorError) as error:
        require(False, f"--predict {what}: {' '.join(str(error).split())}")
    if not what.isdigit():      # as MNIST has them: white on black, 20 pixels high, in the middle of 28 x 28
        picture = ImageOps.invert(picture) if picture.getpixel((0, 0)) > 127 else picture
        picture = ImageOps.expand(ImageOps.pad(picture.crop(picture.getbbox()), (20, 20)), 4)
    p = model(TF.pil_to_tensor(picture).to(test_images.device) / 255).softmax(1)[0].tolist()
    print(*(f"{digit}  {p[digit]:7.2%}  {'#' * int(50 * p[digit])}" for digit in range(10)), sep="\n")
    print(f"RESULT digit={p.index(max(p))} probability={max(p):.4f}")

def draw(model, log, images, labels, answers):
    """Left, the test digits still read wrongly; right, what the first units look for, and error over time."""
    page, wrong = Image.new("RGB", (1240, 660), "white"), (answers != labels).nonzero().flatten().tolist()
    pen = ImageDraw.Draw(page)
    pen.font = ImageFont.load_default(16)
    pen.text((20, 14), f"Read wrongly: {len(wrong)} of {len(labels):,} test digits (label > answer)", "black")
    for i, k in enumerate(wrong[:84]):
        x, y = 20 + i % 12 * 58, 50 + i // 12 * 86
        page.paste(TF.to_pil_image(images[k]).resize((54, 54)), (x, y))
        pen.text((x + 8, y + 56), f"{labels[k]} > {answers[k]}", "firebrick")
    pen.text((740, 14), "Weights of 60 units of the first layer", "black")
    W = utils.make_grid(model.layers[0].weight[:60].view(-1, 1, 28, 28), 12, normalize=True, scale_each=True)
    page.paste(TF.to_pil_image(W).resize((480, 202)), (740, 50))
    pen.text((740, 280), f"Test error over {log[-1][0]:.0f} seconds of training", "black")
    place = lambda t, error: (740 + 480 * t / log[-1][0], 630 - 180 * math.log10(max(error, 0.003) / 0.003))
    for error, note in (0.0035, "0.35 %: Ciresan et al., MNIST"), (0.01, "1 %"), (0.02, "2 %"), (0.05, "5 %"):
        pen.line([place(0, error), place(log[-1][0], error)], "silver")
        pen.text(place(0, error), note, "gray", anchor="lb")
    pen.line([place(t, 1 - accuracy) for t, accuracy in log], "navy", 3)
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
    """Check, load, then train and draw, or predict.  Returns the figures of the RESULT line."""
    for flag, low in (("seed", 0), ("width", 1), ("epochs", 1), ("batch", 1), ("lr", 1e-9), ("decay", 0)):
        require(low <= getattr(cfg, flag) < 2**63, f"--{flag} {getattr(cfg, flag)}: must be at least {low}")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    run_checks()
    *tensors, data = load_mnist(cfg.data, cfg.tiny)
    images, labels, test_images, test_labels = (t.to(device) for t in tensors)
    torch.manual_seed(cfg.seed)
    model = MLP((784, cfg.width, cfg.width, 10), nn.Identity() if cfg.ablate == "relu" else relu).to(device)
    if cfg.predict:
        return predict(model, Path(cfg.out, "mlp.safetensors"), cfg.predict, test_images)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else "bf16" in cpu   # else it is slow
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=fast)
    print(f"week 1 | {device}, {'bfloat16' if fast else 'float32'} | torch {torch.__version__} | data: {data}"
          f", {sum(t.nbytes for t in tensors) / 1e6:.1f} MB on {device} | weights: from scratch")
    means = torch.stack([images[labels == digit].float().mean(0).flatten() for digit in range(10)])
    nearest = torch.cdist(test_images.flatten(1).float(), means).argmin(1)
    log, answers, average = train(model, images, labels, test_images, test_labels, cfg, autocast)
    weights = safetensors.torch.save(average.cpu().state_dict())
    save(cfg.out, "mlp.safetensors", lambda part: part.write_bytes(weights))
    save(cfg.out, "mlp.png", draw(average, log, test_images.cpu(), test_labels.cpu(), answers.cpu()).save)
    return finish(cfg, device, dict(
        test_accuracy=log[-1][1], baseline_accuracy=(nearest == test_labels).float().mean().item(),
        train_seconds=log[-1][0], seconds_to_98=next((t for t, accuracy in log if accuracy >= 0.98), None),
    ), data=data, weights="from scratch")

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
