# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "transformers>=5.1", "huggingface-hub>=1.3", "tokenizers>=0.22",
#                 "safetensors>=0.4", "pillow>=10.1"]
# ///
"""Week 3: GPT-2 from the inside. Every tensor's shape; its forward pass and its tokenizer by hand.

Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
The idea: text is cut into tokens, a token is a vector, and each block adds to the residual stream,
x <- x + attention(norm(x)), x <- x + mlp(norm(x)). After any block, that stream times the embedding matrix
gives a guess of the next token. Tokenizer and model are written out here, and equal Hugging Face's.

    python week03_gpt2_inspect.py                      # all of it, for one text: out/week03/gpt2.png
    python week03_gpt2_inspect.py --prompt "One, two, three," --versus "Six, five, four,"
    python week03_gpt2_inspect.py --model FOLDER       # or an ID on the hub: openai-community/gpt2-xl

Expected: logits within 3e-6 of transformers', 27 tokens/s beside its 25 (one core, float32), and the
ids of its tokenizer. Offline, weights are random, and the vocabulary is learned from Python's own manual.
"""
import argparse, http.client, inspect, itertools, json, math, os, re, statistics, sys, time
import unicodedata, urllib.request
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pydoc_data.topics import topics                 # Python's own manual: English, and on every machine
from typing import Literal, get_args
import safetensors, tokenizers, torch, transformers
import torch.nn.functional as F
from huggingface_hub import errors, hf_hub_download, hf_hub_url
from PIL import Image, ImageDraw, ImageFont

# ----------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    device: str = "auto"       # auto = cuda if there is one, else cpu; or by name: cpu, cuda:1, mps
    seed: int = 1337           # the same seed on the same CPU gives the same weights, where they are random
    tiny: bool = False         # everything smallest, and no network: to see that it runs
    out: str = "out/week03"    # folder for everything that is written
    model: str = "openai-community/gpt2"    # ID on the hub, or a folder; or random: true size, random weights
    prompt: str = "Berlin is the capital of Germany, and Paris is the capital of"  # the text to look into ...
    versus: str = "Berlin is the capital of Germany, and Rome is the capital of"   # ... and one beside it
    tokens: int = 48           # tokens to write after the prompt
    vocab: int = 1000          # size of the vocabulary that is trained here where GPT-2's is out of reach
    ablate: Literal["none", "cache"] = "none"   # take the KV cache away, to see what it was worth
TINY = dict(model="random", tokens=8, vocab=400)

# ----------------------------------------------------------------------------- Tokens: byte-level BPE by hand
# A text is a string of bytes, and GPT-2 writes each byte as a visible character: itself, or one from 256 on.
VISIBLE = {b: chr(b) for b in range(256) if 33 <= b <= 126 or 161 <= b != 173}
VISIBLE |= {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*VISIBLE}))}   # a space becomes "Ġ"
BYTE = {char: byte for byte, char in VISIBLE.items()}
# A token never reaches across words, and a word takes the space before it along.
NUMBERS = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "N")
SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"             # Python's \s has more
WORD = re.compile(rf"'(?:[stmd]|re|ve|ll)| ?[^\W_{NUMBERS}]+| ?[{NUMBERS}]+| ?(?:(?![^\W_])[^{SPACES}])+"
                  rf"|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+")
END = "<|endoftext|>"                                             # stands between texts, and is never cut

def merge(word, a, b):
    """Join tokens a and b wherever they are neighbours, from left to right: "x a b a b" -> "x ab ab"."""
    return re.sub(rf"(?<!\S){re.escape(a)} {re.escape(b)}(?!\S)", lambda _: a + b, word)

class BPE:
    """Byte-pair encoding (Sennrich et al. 2016, section 3.2) of bytes (Radford et al. 2019, section 2.2).
    ids {token: id}, merges [(token, token)] in the order in which they were learned."""
    def __init__(self, ids, merges):
        self.ids, self.tokens = ids, {i: token for token, i in ids.items()}
        self.rank = {tuple(pair): i for i, pair in enumerate(merges)}
    @classmethod
    def train(cls, text, size):
        """From single bytes, join the two neighbours that occur most often, until there are `size` tokens.
        Among equals the pair of older tokens goes first, as in Hugging Face's trainer."""
        words = {" ".join(map(VISIBLE.get, w.encode())): n for w, n in Counter(WORD.findall(text)).items()}
        ids, merges = {char: i for i, char in enumerate(sorted(BYTE))}, []
        while len(ids) < size - 1:
            count = Counter()
            for word, n in words.items():
                for pair in itertools.pairwise(word.split()): count[pair] += n
            best = max(count, key=lambda pair: (count[pair], -ids[pair[0]], -ids[pair[1]]), default=None)
            if count[best] < 2: break
            merges.append(best)
            ids["".join(best)] = len(ids)
            words = {merge(word, *best) if " ".join(best) in word else word: n for word, n in words.items()}
        return cls({**ids, END: len(ids)}, merges)
    def steps(self, word):
        """Yield a word in tokens, merge by merge: of the pairs that are in it, the one learned first."""
        word = word if word == END else " ".join(map(VISIBLE.get, word.encode()))
        yield word
        while pairs := {*itertools.pairwise(word.split())} & self.rank.keys():
            word = merge(word, *min(pairs, key=self.rank.get))
            yield word
    def encode(self, text):
        """Text -> ids. Any text: what was never seen falls into smaller tokens, at worst into bytes."""
        words = [word for part in re.split(f"({re.escape(END)})", text)
                 for word in ([END] if part == END else WORD.findall(part))]
        return [self.ids[token] for word in words for token in [*self.steps(word)][-1].split()]
    def decode(self, ids):
        """Ids -> text, without a loss. One token alone can be a torn character, which is shown as U+FFFD."""
        text = "".join(self.tokens.get(i, f"<{i}>") for i in ids)
        return bytes(BYTE[char] for char in text).decode("utf-8", "replace")

# ------------------------------------------------------------------------------- GPT-2's forward pass by hand
# B texts of T new tokens, S in all; H = width, h heads of D = H / h numbers, L blocks, V tokens in the table.
def gpt2(w, config, tokens, cache=None, past=0):
    """tokens (B, T) -> logits (B, T, V), the stream before, between and after the blocks: L + 1 of (B, T, H),
    and what each block looks at: L of (B, h, T, S).   w: the state dict, with GPT-2's own names.
    cache (L, 2, B, h, S, D) has keys and values of the `past` tokens before; those of the new are put in."""
    B, T = tokens.shape
    norm = lambda y, name: F.layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
    linear = lambda y, name: y @ w[f"{name}.weight"] + w[f"{name}.bias"]     # (in, out): nn.Linear transposed
    sees = torch.ones(T, past + T, dtype=torch.bool, device=tokens.device).tril(past)        # no look ahead
    x = w["wte.weight"][tokens] + w["wpe.weight"][past : past + T]
    stream, attention = [x], []
    for i in range(config.n_layer):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")                                # (B, T, 3H)
        q, k, v = qkv.view(B, T, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)                   # (B, h, T, D)
        if cache is not None:
            cache[i, :, :, :, past : past + T] = torch.stack([k, v])
            k, v = cache[i, :, :, :, : past + T]                                                # (B, h, S, D)
        scores = q @ k.mT / math.sqrt(q.shape[-1])                                              # (B, h, T, S)
        attention.append(scores.masked_fill(~sees, -math.inf).softmax(-1))
        x = x + linear((attention[i] @ v).transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")        # (B, T, H)
        hidden = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")    # (B, T, 4H)
        x = x + linear(hidden, f"h.{i}.mlp.c_proj")
        stream.append(x)
    return unembed(w, x), stream, attention

def unembed(w, x):
    """The stream (B, T, H), normed, times each row of the table of embeddings -> logits (B, T, V). After the
    last block that is the model's answer; after an earlier one its guess so far, the "logit lens"."""
    return F.layer_norm(x, x.shape[-1:], w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T

@torch.no_grad()
def generate(w, config, tokens, count, cached=True):
    """The likeliest token, `count` times.   tokens (B, S) -> (B, S + count)
    A token sees nothing that comes after it, so its keys and values stay: computed once, and kept."""
    (B, S), h, past = tokens.shape, config.n_head, 0
    cache = w["wte.weight"].new_zeros(config.n_layer, 2, B, h, S + count, config.n_embd // h)
    for _ in range(count):
        logits, _, _ = gpt2(w, config, tokens[:, past:], cache, past)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        past = tokens.shape[1] - 1 if cached else 0
    return tokens

# -------------------------------------------------------------------------------------------- Shapes by hooks
def trace_shapes(model, *args, **kwargs):
    """Run any nn.Module once and note what each module in it puts out, parents before children.
    -> [(path, class, [shape], parameters, bytes)]   On the meta device, without numbers, any size runs."""
    paths, rows = {module: path for path, module in model.named_modules()}, []
    def tensors(out):                           # what is returned can be a tuple, list or dict, of tuples ...
        parts = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else ()
        return [out] if torch.is_tensor(out) else sum(map(tensors, parts), [])
    def note(module, inputs, output):
        found, count = tensors(output), sum(p.numel() for p in module.parameters())
        if module in paths: rows.append((paths[module], type(module).__name__, [(*t.shape,) for t in found],
                                         count, sum(t.nbytes for t in found)))
    with torch.no_grad(), torch.nn.modules.module.register_module_forward_hook(note):    # one hook for all
        model(*args, **kwargs)
    return sorted(rows, key=lambda row: [*paths.values()].index(row[0]))

def print_shapes(rows, letters):
    """A line for each module; of the blocks, which are all alike, only the first.   letters: {size: name}"""
    print(*(f"{letter} = {size}" for size, letter in letters.items()), sep=", ")
    for path, kind, shapes, count, nbytes in rows:
        put = " ".join(f"({', '.join(letters.get(n, str(n)) for n in shape)})" for shape in shapes)
        if not re.search(r"\.[1-9]", path):
            print(f"{path:35}{kind:18}{put:25}{count:12,} {count / rows[0][3]:6.1%} {nbytes:10,} B")

# ------------------------------------------------------------------------------------------- GPT, BERT and T5
def three_families(**size):
    """GPT-2, BERT and T5, random: of their true size (small, base, small), or of the size given."""
    T = transformers
    return [T.GPT2LMHeadModel(T.GPT2Config(**size)).eval(), T.BertForPreTraining(T.BertConfig(**size)).eval(),
            T.T5ForConditionalGeneration(T.T5Config(**size)).eval()]

def visibility(forward, *lengths, width=32):
    """Who sees whom, measured: |d output_i / d input_j| is 0 where nothing of j arrives at i.
    forward: embeddings (1, n, H), one for each n of `lengths` -> outputs (T, H).   -> (T, sum of lengths)"""
    inputs, probe = tuple(torch.randn(1, n, width) for n in lengths), torch.randn(width)
    # A plain sum over H would not do: a layer norm makes it the same for every input.
    jacobian = torch.autograd.functional.jacobian(lambda *x: forward(*x) @ probe, inputs)
    return torch.cat([part[:, 0].norm(dim=-1) for part in jacobian], 1)

def compare(gpt, bert, t5, n=8):
    """Who sees whom, as maps (outputs, inputs), T5's of n tokens in the encoder, then the decoder. And what
    each is trained for, as losses on one batch, nats per token."""
    def encode_decode(source, target):
        memory = t5.encoder(inputs_embeds=source)[0]
        return torch.cat([memory[0], t5.decoder(inputs_embeds=target, encoder_hidden_states=memory)[0][0]])
    maps = [visibility(lambda x: gpt.transformer(inputs_embeds=x)[0][0], n),
            visibility(lambda x: bert.bert(inputs_embeds=x)[0][0], n), visibility(encode_decode, n, n)]
    ids, hide, hole = torch.randint(96, (64, n)), torch.rand(64, n) < 0.15, torch.full((64, 1), 96)
    source, target = torch.cat([ids[:, :2], hole, ids[:, 5:]], 1), torch.cat([hole, ids[:, 2:5]], 1)
    loss, given = F.cross_entropy, F.pad(target, (1, -1))                          # the decoder starts with 0
    return maps, [loss(gpt(ids).logits[:, :-1].mT, ids[:, 1:]),                          # say what comes next
                  loss(bert(ids.masked_fill(hide, 96)).prediction_logits[hide], ids[hide]),   # what is hidden
                  loss(t5(source, decoder_input_ids=given).logits.mT, target)]               # what is cut out

# ----------------------------------------------------------------------------------------------------- Checks
def run_checks(maps):
    """What needs no weights: the published sizes, and how many pairs of tokens see each other."""
    with torch.device("meta"): gpt, bert, t5 = three_families()
    sizes = [sum(p.numel() for p in model.parameters()) for model in (gpt, bert.bert, t5)]
    check("parameters of GPT-2, BERT-base, T5-small", sizes, [124_439_808, 109_482_240, 60_506_624], 0)
    check("pairs: the past; all; all + the past + all", [m.sign().sum() for m in maps], [36, 64, 164], 0)

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
def load(cfg):
    """-> transformers' GPT-2, our tokenizer, the library's with that vocabulary, and what the weights are"""
    folder = locate(cfg, ("config.json", "model.safetensors", "vocab.json", "merges.txt"),
                    "Instead, random weights: all shapes and speeds are true, what it says is noise.")
    if folder == "random":
        size = dict(n_embd=48, n_layer=2, n_head=4, n_positions=256, vocab_size=cfg.vocab) if cfg.tiny else {}
        text, library = "\n".join(topics.values())[:100_000], tokenizers.ByteLevelBPETokenizer()
        library.train_from_iterator([text], cfg.vocab - 1, 2, show_progress=False)
        library.add_special_tokens([END])
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
        return model.eval(), BPE.train(text, cfg.vocab), library, folder
    try:
        read = lambda name: Path(folder, name).read_text("utf-8")
        if Path(folder, "tokenizer.json").exists(): told = read("tokenizer.json")
        else: told = json.dumps(dict(model=dict(type="BPE", vocab=json.loads(read("vocab.json")),
                                                merges=re.findall("^(?!#v).+", read("merges.txt"), re.M))))
        tokenizers.Tokenizer.from_buffer(told.encode())      # a ValueError, where theirs is a bare Exception
        model, report = transformers.GPT2LMHeadModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        library = transformers.GPT2Tokenizer.from_pretrained(folder).backend_tokenizer
        part = json.loads(library.to_str())["model"]
        fits = END in part["vocab"] and len(part["vocab"]) <= model.config.vocab_size
        if report["missing_keys"] or not fits: raise ValueError("no GPT-2 with its tokenizer")
        return model.eval(), BPE(part["vocab"], part["merges"]), library, cfg.model
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError,
            safetensors.SafetensorError, errors.StrictDataclassError) as error:
        require(False, f"--model {cfg.model}: {' '.join(str(error).split())}")

# -------------------------------------------------------------------------------------------------------- Run
def write(model, w, tokens, cfg):
    """generate() and transformers' write in turns, three times each.   -> ids, and their median tokens/s"""
    ask = dict(max_new_tokens=cfg.tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    runs = {"here": lambda: generate(w, model.config, tokens, cfg.tokens, cfg.ablate != "cache"),
            "transformers": lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **ask)}
    texts, rates = [], []
    for name, run in [*runs.items()] * 3:
        started = time.perf_counter()
        texts.append(run().cpu())                                                            # waits for a GPU
        rates.append(cfg.tokens / (time.perf_counter() - started))
        print(f"writing {len(texts)}/6 | {rates[-1]:6.1f} tok/s | {name}")
    check("tokens written == transformers' generate", texts[::2], texts[1::2], 0)
    return texts[0][0].tolist(), *(statistics.median(rates[i::2]) for i in range(2))

def print_thoughts(w, bpe, ids, stream, other):
    """Nearest tokens in the embedding; per block, cosine of the two last tokens and the likeliest next."""
    name = lambda top: "  ".join(f"{bpe.decode([i])!r} {v:.2f}"
                                 for v, i in zip(top.values.cpu().tolist(), top.indices.cpu().tolist()))
    table = F.normalize(w["wte.weight"][: len(bpe.ids)], dim=-1)
    for i in sorted({*ids}, key=lambda i: len(bpe.tokens[i]))[-3:]: print(name((table @ table[i]).topk(5)))
    for depth, (x, y) in enumerate(zip(stream, other)):
        likeness, p = F.cosine_similarity(x[0, -1], y[0, -1], 0).item(), unembed(w, x)[0, -1].softmax(-1)
        print(f"after block {depth:2} | cosine {likeness:6.3f} | next {name(p.topk(3))}")

# --------------------------------------------------------------------------------------------------- Pictures
def draw(maps, attention, weights):
    """Left, who sees whom in the three families; right, where each head of GPT-2 looks."""
    pen = ImageDraw.Draw(page := Image.new("RGB", (1240, 970), "white"))
    pen.font = ImageFont.load_default(16)
    def paste(m, x, y, side):                                        # what is not 0 is at least a light grey
        grey = bytes((255 - 40 * m.sign() - 215 * (m / m.max()).sqrt()).byte().flatten().tolist())
        page.paste(Image.frombytes("L", m.shape[::-1], grey).resize((side, side), Image.NEAREST), (x, y))
    for i, name in enumerate(("GPT-2: tokens see the past", "BERT: tokens see all", "T5: encoder, decoder")):
        pen.text((20, 14 + 316 * i), name, "black")
        paste(maps[i], 20, 40 + 316 * i, 280)
    pen.text((340, 14), f"Where each head looks: a row is a block of GPT-2, with {weights} weights", "black")
    side = 888 // max(attention.shape[:2])
    for i, j in itertools.product(*map(range, attention.shape[:2])):
        paste(attention[i, j], 340 + side * j, 40 + side * i, side - 4)
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
    """Check, load, look inside, write, draw.  Returns the figures of the RESULT line."""
    for flag, low, high in ("seed", 0, 2**63), ("tokens", 1, 10**6), ("vocab", 257, 50_257):
        require(low <= getattr(cfg, flag) <= high, f"--{flag} {getattr(cfg, flag)}: must be {low} to {high}")
    require(not re.search("[\ud800-\udfff]", cfg.prompt + cfg.versus), "--prompt, --versus: must be in UTF-8")
    device = pick_device(cfg.device)
    save(cfg.out, ".started", Path.touch)            # an --out that cannot be written shows now, not later
    transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    maps, losses = compare(*three_families(vocab_size=97, hidden_size=32, num_hidden_layers=2,
                                           num_attention_heads=4, initializer_range=0.2))
    run_checks(maps)
    torch.manual_seed(cfg.seed)
    model, bpe, library, weights = load(cfg)
    config, w = model.config, model.to(device).transformer.state_dict()
    ids, most = [bpe.encode(text) for text in (cfg.prompt, cfg.versus)], config.n_positions - cfg.tokens
    for flag, S in ("versus", len(ids[1])), ("prompt", len(ids[0])):
        require(2 < S <= most, f"--{flag}: {S} tokens, --tokens {cfg.tokens}; 3 to {config.n_positions} fit")
    print(f"week 3 | {device}, float32 | torch {torch.__version__} | weights: {weights}, {len(bpe.ids)} ids")
    print("untrained: next token (GPT-2) {:.2f}, hidden (BERT) {:.2f}, span (T5) {:.2f} nats".format(*losses))
    with torch.device("meta"):
        skeleton = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
        rows = trace_shapes(skeleton, torch.zeros(1, S, dtype=torch.long))
    H = config.n_embd
    letters = {1: "B", config.n_head: "h", S: "S", H: "H", 3 * H: "3H", 4 * H: "4H", config.vocab_size: "V"}
    print_shapes(rows, letters)
    hard = f"{cfg.prompt} a  b\t\n we'll cafe\u0301 漢字👩‍👩²½Ⅷ _(_a)\0\x1c\x85\uffff{END}{END[1:]}{'x' * 3000}"
    same = bpe.encode(hard) == library.encode(hard).ids and bpe.decode(bpe.encode(hard)) == hard
    check("tokens of a nasty text == the library's, and back", [float(same)], [1], 0)
    print(*bpe.steps(max(WORD.findall(cfg.prompt), key=len)), sep="\n")
    tokens, versus = (torch.tensor([part], device=device) for part in ids)
    with torch.no_grad():
        (logits, stream, attention), theirs = gpt2(w, config, tokens), model(tokens)
        print_thoughts(w, bpe, ids[0], stream, gpt2(w, config, versus)[1])
    check("gpt2() == transformers' logits, at each token", [logits], [theirs.logits], 1e-4)
    kept = [float(sum(t.nbytes for x in theirs[1].layers for t in (x.keys, x.values)))]     # logits, cache
    check("bytes of a KV cache == 2 L H S 4", kept, [2 * config.n_layer * H * S * 4], 0)
    written, rate, baseline = write(model, w, tokens, cfg)
    print(f"{bpe.decode(written)!r}{', which is noise: the weights are random' * (weights == 'random')}")
    save(cfg.out, "gpt2.png", draw(maps, torch.cat(attention).cpu(), weights).save)
    result = dict(parameters=rows[0][3], tokens_per_second=rate,
                  baseline_tokens_per_second=baseline, bytes_per_token=len(cfg.prompt.encode()) / S)
    return finish(cfg, device, result, weights=weights, losses=[loss.item() for loss in losses])

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main(parse_config(Config, TINY))
    except KeyboardInterrupt:
        print("\nstopped; every file in --out is whole", file=sys.stderr)
        sys.exit(130)
