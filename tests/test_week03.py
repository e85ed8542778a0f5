"""Week 3: GPT-2, its tokenizer and its shapes against the libraries', on models made here; no network."""

import http.client
import json
import math
import random
import re
import shutil
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import week03_gpt2_inspect as week
from conftest import call
from PIL import Image
from torch import nn

B, T, H, D, L, V, CONTEXT = 2, 11, 5, 6, 3, 101, 37
END = week.END
f64 = torch.float64


def near(a, b, tol=1e-12):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol


def shaken(model):
    """All weights drawn anew: a gain of 1 or a bias of 0 would hide a mistake."""
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn_like(w) * 0.3)
    return model.eval()


def make_gpt2(**size):
    size = {**dict(n_embd=H * D, n_head=H, n_layer=L, vocab_size=V, n_positions=CONTEXT), **size}
    torch.manual_seed(1)
    config = transformers.GPT2Config(**size)
    model = shaken(transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager"))
    model.transformer.wpe.weight.data.mul_(3)  # else it would say one word for ever
    return model


@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.enable_progress_bar()  # as it is when a script starts


@pytest.fixture(scope="module")
def gpt():
    """transformers' GPT-2, small and in float64; what it says of a batch; its weights by name."""
    model = make_gpt2().double()
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        said = model(tokens, output_hidden_states=True, output_attentions=True)
    return SimpleNamespace(model=model, config=model.config, w=model.transformer.state_dict(), tokens=tokens, said=said)


# --------------------------------------------------------------------------------------------------- tokens

TEXT = "".join(week.topics[key] for key in sorted(week.topics))
NASTY = [
    "",
    " ",
    "\n",
    "Hello, world!  It's   the cat's; we'll they've I'm he'd can't you're 'TIS 'S 's's '' 'x 'l 'v 'r",
    "a  b   c\t\td \t e\n\nf \n g\r\nh\v\fi ",
    "  leading and trailing   ",
    "emoji 👩‍👩‍👧 🇩🇪🇫🇷 👍🏽!! 漢字かな交じり 한국어 العربية עברית हिन्दी ไทย",
    "cafe\u0301 café naïve ß ẞ ſ ﬁ İı ǅ ª º",
    "1234 12a34 3.14 ²½Ⅷ٣ ²a ½b aⅧ ٣_٣ 一二三 \u3007 ₂ ⑦ 𝟘𝟙",
    "_ __ a_b _a a_ _1 1_ snake_case __init__(self) \u203f\u2040",
    "\0\1 \x1b\x1c\x1d\x1e\x1f a\x1cb \x1c\x1c  \x1d \x7f\x80\x84\x85\x86 \x85\x85a\xa0\xa0b\xad\u200b\u200d\ufeff",
    "\u1680\u180e\u2000\u2003\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000a \u3000b\u2003 c",
    "\ufffe\uffff\ufffd\ue000\U000f0000\U0010ffff\U00040000x\U000dffff",
    "x" * 3000 + "y" * 999 + " " + "ab" * 500 + " " * 300 + "1" * 300 + "!?" * 200,
    f"{END}",
    f"a{END}b {END} c{END}{END}\n{END[1:]}{END[:-1]}<|endoftext |>< |endoftext|>{END}  ",
    f"'{END}s 'll{END}",
    TEXT[50_000:58_000],
]


def stable():
    """The characters that are what they were in Unicode 3.2: of the rest, two libraries may think differently."""
    then = unicodedata.ucd_3_2_0
    return [c for c in map(chr, range(0x110000)) if unicodedata.category(c) == then.category(c) not in ("Cn", "Cs")]


def noise(count, length, draw=random.Random(5)):
    """Random texts: of common characters, of all characters, and of planes in which nothing is assigned."""
    every = stable()
    for _ in range(count):
        few = [*"aZ 's't l0_-.\n\t\r\x1c\x85\xa0é²\u2003漢👍\u0301", *draw.choices(every, k=8)]
        few.append(chr(draw.randrange(0x40000, 0xE0000)))
        yield "".join(draw.choices(few, k=length))
        yield "".join(draw.choices(every, k=length))


NASTY += noise(40, 60)


def visible(word):
    return "".join(week.VISIBLE[byte] for byte in word.encode())


@pytest.fixture(scope="module")
def pair():
    """Our tokenizer and the library's, trained on the same text."""
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([TEXT[:30_000]], 499, 2, show_progress=False)
    library.add_special_tokens([END])
    return week.BPE.train(TEXT[:30_000], 500), library


def test_bytes_are_written_as_in_gpt2():
    assert sorted(week.VISIBLE) == list(range(256)) and len(set(week.VISIBLE.values())) == 256
    assert {byte: char for char, byte in week.BYTE.items()} == week.VISIBLE
    assert "".join(week.VISIBLE[b] for b in b" \n\t\0aZ~!\x7f\xa0\xad\xff") == "ĠĊĉĀaZ~!ġłŃÿ"
    assert set(week.BYTE) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    try:
        from transformers.convert_slow_tokenizer import bytes_to_unicode
    except ImportError:
        return
    assert week.VISIBLE == bytes_to_unicode()


def split_by_the_library(text):
    return [word for word, _ in tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_words_are_the_library_s(text):
    words = week.WORD.findall(text)
    assert "".join(words) == text
    assert [visible(word) for word in words] == split_by_the_library(text)


def test_every_character_is_of_the_library_s_kind():
    kinds = stable()
    assert len(kinds) > 90_000
    text = "".join(f"{c}1{c}a" for c in kinds)
    assert [visible(word) for word in week.WORD.findall(text)] == split_by_the_library(text)


def test_merge_joins_whole_tokens_from_left_to_right():
    assert week.merge("x a b a b", "a", "b") == "x ab ab"
    assert week.merge("a a a a a", "a", "a") == "aa aa a"
    assert week.merge("aa b a bb a b", "a", "b") == "aa b a bb ab"
    assert week.merge("xa b a bx", "a", "b") == "xa b a bx"
    assert week.merge(r". * a \ 1 \ 1 .*", ".", "*") == r".* a \ 1 \ 1 .*"
    assert week.merge(r"x \ 1 y", "\\", "1") == r"x \1 y"


TRAINING = {
    "manual": TEXT[:12_000],
    "unicode": "Größe, 漢字 漢字, größe ²½ ²½ 👍👍 👍 naïve naïve\n" * 3 + TEXT[-3000:],
    "ties": "ab cd ef gh ba dc fe hg abcd cdab efgh ghef " * 2,
    "one letter": "aaaa aaa aa a aaaaa aaaa aaaaaaa",
    "too small": "to be or not to be",
    "nothing": "",
}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("size", [257, 258, 293, 389])
def test_training_learns_what_the_library_learns(name, size):
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([TRAINING[name]], size - 1, 2, show_progress=False)
    library.add_special_tokens([END])
    ours = week.BPE.train(TRAINING[name], size)
    merges = json.loads(library._tokenizer.to_str())["model"]["merges"]
    assert list(ours.rank) == [tuple(pair) for pair in merges]
    assert list(ours.rank.values()) == list(range(len(merges)))
    assert ours.ids == library.get_vocab()
    assert ours.ids[END] == len(ours.ids) - 1 == 256 + len(merges)
    assert (len(ours.ids) == size) == (size == 257 or name in ("manual", "unicode") or (name, size) in SMALL)
    assert [ours.tokens[i] for i in range(len(ours.ids))] == sorted(ours.ids, key=ours.ids.get)


SMALL = {("ties", 258), ("one letter", 258), ("too small", 258)}


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_ids_are_the_library_s_and_nothing_is_lost(pair, text):
    ours, library = pair
    assert ours.encode(text) == library.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


def test_steps_join_the_pair_learned_first(pair):
    ours, _ = pair
    assert list(ours.steps(END)) == [END] and ours.encode(END) == [ours.ids[END]]
    longest = 0
    for word in {*week.WORD.findall(TEXT[:4000] + "".join(NASTY[1:12]))}:
        steps = [step.split(" ") for step in ours.steps(word)]
        assert steps[0] == list(visible(word))
        for now, then in zip(steps, steps[1:]):
            best = min((pair for pair in zip(now, now[1:]) if pair in ours.rank), key=lambda pair: ours.rank[pair])
            joined = []
            while now:
                size = 2 if tuple(now[:2]) == best else 1
                joined, now = [*joined, "".join(now[:size])], now[size:]
            assert then == joined
        assert not {*zip(steps[-1], steps[-1][1:])} & ours.rank.keys()
        assert [ours.ids[token] for token in steps[-1]] == ours.encode(word)
        longest = max(longest, len(steps))
    assert longest > 4


def test_decoding_shows_what_is_torn_or_unknown(pair):
    ours, library = pair
    first, second = (ours.ids[week.VISIBLE[byte]] for byte in "é".encode())
    assert ours.decode([first, second]) == "é" and ours.decode([first]) == ours.decode([second]) == "\ufffd"
    assert ours.decode([ours.ids["a"], 99_999, ours.ids["b"]]) == "a<99999>b"
    assert ours.decode([]) == "" and ours.decode([ours.ids[END]]) == END
    for i in range(len(ours.ids)):
        assert ours.decode([i]) == library.decode([i], skip_special_tokens=False)


# ----------------------------------------------------------------------------------------------------- gpt2


def test_gpt2_is_transformers_inside_and_out(gpt):
    logits, stream, attention = week.gpt2(gpt.w, gpt.config, gpt.tokens)
    near(logits, gpt.said.logits, 1e-10)
    assert len(stream) == len(gpt.said.hidden_states) == L + 1 and len(attention) == L
    for ours, theirs in zip(stream[:-1], gpt.said.hidden_states[:-1]):
        near(ours, theirs, 1e-10)
    near(gpt.model.transformer.ln_f(stream[-1]), gpt.said.hidden_states[-1], 1e-10)
    for ours, theirs in zip(attention, gpt.said.attentions, strict=True):
        assert ours.shape == (B, H, T, T)
        near(ours, theirs, 1e-10)


def test_unembed_reads_the_stream_at_any_depth(gpt):
    for x in gpt.said.hidden_states[:-1]:
        near(week.unembed(gpt.w, x), gpt.model.lm_head(gpt.model.transformer.ln_f(x)), 1e-10)
        near(week.unembed(gpt.w, x[0, -1:]), week.unembed(gpt.w, x)[0, -1:], 1e-10)


def test_a_future_token_cannot_change_the_past(gpt):
    before, *_ = week.gpt2(gpt.w, gpt.config, gpt.tokens)
    for t in range(1, T):
        other = gpt.tokens.clone()
        other[:, t] = (other[:, t] + 1) % V
        after, _, attention = week.gpt2(gpt.w, gpt.config, other)
        near(after[:, :t], before[:, :t])
        assert ((after - before)[:, t:].abs().amax(-1) > 1e-3).all()
        assert all((a.triu(1) == 0).all() for a in attention)


@pytest.mark.parametrize("parts", [[11], [1] * 11, [4, 1, 6], [1, 9, 1]])
def test_a_cache_changes_nothing(gpt, parts):
    cache, past, found = torch.full((L, 2, B, H, T + 3, D), math.nan, dtype=f64), 0, []
    whole, stream, attention = week.gpt2(gpt.w, gpt.config, gpt.tokens)
    for part in gpt.tokens.split(parts, 1):
        logits, x, maps = week.gpt2(gpt.w, gpt.config, part, cache, past)
        found.append(logits)
        now = slice(past, past := past + part.shape[1])
        near(x[-1], stream[-1][:, now], 1e-12)
        near(maps[1], attention[1][:, :, now, :past], 1e-12)
    near(torch.cat(found, 1), whole, 1e-12)
    for i, layer in enumerate(gpt.said[1].layers):
        near(cache[i, 0, :, :, :T], layer.keys, 1e-10)
        near(cache[i, 1, :, :, :T], layer.values, 1e-10)
    assert cache[..., T:, :].isnan().all(), "more was written than there is"


def test_greedy_text_is_transformers_with_a_cache_and_without(gpt, monkeypatch):
    seen, right = [], week.gpt2

    def spy(w, config, tokens, *rest):
        seen.append((tokens.shape[1], torch.is_grad_enabled()))
        return right(w, config, tokens, *rest)

    monkeypatch.setattr(week, "gpt2", spy)
    count, prompt = CONTEXT - 7, gpt.tokens[:, :7]
    ask = dict(max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
    theirs = gpt.model.generate(prompt, attention_mask=torch.ones_like(prompt), **ask)
    assert theirs.shape == (B, CONTEXT) and len(theirs[:, 7:].unique()) > 5
    assert torch.equal(week.generate(gpt.w, gpt.config, prompt, count), theirs)
    assert seen == [(7, False)] + [(1, False)] * (count - 1)
    seen.clear()
    assert torch.equal(week.generate(gpt.w, gpt.config, prompt, count, cached=False), theirs)
    assert seen == [(7 + i, False) for i in range(count)]
    assert torch.equal(week.generate(gpt.w, gpt.config, prompt[:1], 3), theirs[:1, :10])


# --------------------------------------------------------------------------------------------------- shapes


class Outputs(nn.Module):
    """Returns a dict of a list and more, calls one part twice, and shares a weight."""

    def __init__(self, fail=False):
        super().__init__()
        self.late, self.early = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.early.weight, self.fail, self.grad = self.late.weight, fail, None

    def forward(self, x, *, scale):
        self.grad = torch.is_grad_enabled()
        y = self.late(self.late(self.early(x))) * scale
        if self.fail:
            raise KeyError("inside")
        return {"y": y, "more": [(x.half(),), [x[:1].double()]], "none": None, "text": "y"}


def hooks():
    return len(torch.nn.modules.module._global_forward_hooks)


def test_shapes_of_dicts_of_calls_and_of_shared_weights():
    model = Outputs()
    rows = week.trace_shapes(model, torch.zeros(2, 3), scale=2)
    assert rows == [
        ("", "Outputs", [(2, 3), (2, 3), (1, 3)], 12, 24 + 12 + 24),
        ("late", "Linear", [(2, 3)], 12, 24),
        ("late", "Linear", [(2, 3)], 12, 24),
        ("early", "Linear", [(2, 3)], 9, 24),
    ]
    assert model.grad is False and torch.is_grad_enabled() and hooks() == 0


def test_shapes_of_nested_tuples():
    rows = week.trace_shapes(nn.LSTM(3, 5, 2), torch.zeros(7, 2, 3))
    assert rows == [("", "LSTM", [(7, 2, 5), (2, 2, 5), (2, 2, 5)], 4 * (5 * 8 + 10) + 4 * (5 * 10 + 10), 4 * 110)]


def test_parents_come_before_their_children():
    twice = nn.Linear(3, 3)
    model = nn.Sequential(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), twice, nn.Dropout(), twice)
    rows = week.trace_shapes(model, torch.zeros(2, 7))
    assert [row[:2] for row in rows] == [
        ("", "Sequential"),
        ("0", "Sequential"),
        ("0.0", "Linear"),
        ("0.1", "ReLU"),
        ("0.2", "Linear"),
        ("1", "Linear"),
        ("1", "Linear"),
        ("2", "Dropout"),
    ]
    assert [row[3] for row in rows] == [70, 58, 40, 0, 18, 12, 12, 0]
    assert rows[0][2] == [(2, 3)] and rows[2][2] == [(2, 5)]


def test_modules_of_nobody_do_no_harm():
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.hidden = nn.Linear(3, 5), [nn.ReLU()]

        def forward(self, x):
            return self.hidden[0](self.seen(x))

    rows = week.trace_shapes(Hides(), torch.zeros(2, 3))
    assert rows == [("", "Hides", [(2, 5)], 20, 40), ("seen", "Linear", [(2, 5)], 20, 40)]


def test_no_hook_is_left_behind():
    with pytest.raises(KeyError, match="inside"):
        week.trace_shapes(Outputs(fail=True), torch.zeros(2, 3), scale=2)
    assert hooks() == 0 and torch.is_grad_enabled()


@pytest.fixture(scope="module")
def true_size():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
        return week.trace_shapes(model, torch.zeros(1, 13, dtype=torch.long))


def test_shapes_of_gpt2_of_its_true_size(true_size):
    rows = {row[0]: row[1:] for row in true_size}
    assert len(rows) == len(true_size) == 151
    assert rows[""] == ("GPT2LMHeadModel", [(1, 13, 50257)], 124_439_808, 4 * 13 * 50257)
    assert rows["transformer.wte"] == ("Embedding", [(1, 13, 768)], 38_597_376, 4 * 13 * 768)
    assert rows["transformer.wpe"][2] == 786_432 and rows["transformer.ln_f"][2] == 1536
    assert all(rows[f"transformer.h.{i}"][2] == 7_087_872 for i in range(12))
    assert rows["transformer.h.11.attn.c_attn"] == ("Conv1D", [(1, 13, 2304)], 768 * 2304 + 2304, 4 * 13 * 2304)
    assert rows["lm_head"] == ("Linear", [(1, 13, 50257)], 38_597_376, 4 * 13 * 50257)
    assert [row[0] for row in true_size][:6] == ["", "transformer"] + [
        f"transformer.{name}" for name in ("wte", "wpe", "drop", "h.0")
    ]


def test_printed_shapes_have_letters_and_shares_and_one_block(true_size, capsys):
    week.print_shapes(true_size, {1: "B", 13: "S", 768: "H", 2304: "3H", 50257: "V"})
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "B = 1, S = 13, H = 768, 3H = 2304, V = 50257"
    columns = {line[:35].strip(): re.split(r"  +", line[35:]) for line in lines}
    assert columns["transformer.wte"] == ["Embedding", "(B, S, H)", "38,597,376", "31.0%", "39,936 B"]
    assert columns["transformer.h.0.attn.c_attn"][1] == "(B, S, 3H)"
    assert columns["transformer.h.0.mlp.c_fc"][1] == "(B, S, 3072)"
    assert columns["lm_head"][1:4] == ["(B, S, V)", "38,597,376", "31.0%"]
    assert columns[""][:3] == ["GPT2LMHeadModel", "(B, S, V)", "124,439,808 100.0%"]
    paths = [row[0] for row in true_size]
    assert list(columns) == [path for path in paths if ".h." not in path or ".h.0" in path]
    root = ("", "X", [(2, 3), (4,)], 8, 40)
    week.print_shapes([root, ("a.0", "Y", [(3,)], 2, 12), ("a.10", "Z", [], 1, 0)], {3: "a"})
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown == [
        ["a", "=", "3"],
        ["X", "(2,", "a)", "(4)", "8", "100.0%", "40", "B"],
        ["a.0", "Y", "(a)", "2", "25.0%", "12", "B"],
    ]


# ------------------------------------------------------------------------------------------- three families


def small_families(**size):
    torch.manual_seed(7)
    return week.three_families(
        **{**dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), **size}
    )


def test_the_families_have_their_published_sizes():
    with torch.device("meta"):
        gpt, bert, t5 = week.three_families()
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert [count(m) for m in (gpt, bert.bert, t5)] == [124_439_808, 109_482_240, 60_506_624]
    assert len(gpt.state_dict()) == 149
    assert not gpt.training and not bert.training and not t5.training
    assert [m.config.vocab_size for m in small_families()] == [97] * 3


def test_visibility_is_the_jacobian_of_a_map_that_is_known():
    A, C = torch.randn(3, 4), torch.randn(3, 5)
    A[1, 2] = C[2, 0] = 0
    torch.manual_seed(3)
    found = week.visibility(lambda x, y: A @ x[0] + 2 * C @ y[0], 4, 5, width=7)
    torch.manual_seed(3)
    torch.randn(1, 4, 7), torch.randn(1, 5, 7)
    near(found, torch.cat([A, 2 * C], 1).abs() * torch.randn(7).norm(), 1e-5)
    mean_free = week.visibility(lambda x: F.layer_norm(x[0], (7,)), 4, width=7)
    assert torch.equal(mean_free > 1e-3, torch.eye(4, dtype=torch.bool)), "behind a layer norm, too"


def test_who_sees_whom_is_the_past_all_or_both():
    n = 7
    (gpt, bert, t5), _ = week.compare(*small_families(initializer_range=0.2), n=n)
    past = torch.ones(n, n).tril()
    assert torch.equal(gpt.sign(), past)
    assert torch.equal(bert.sign(), torch.ones(n, n))
    top, bottom = torch.cat([torch.ones(n, n), torch.zeros(n, n)], 1), torch.cat([torch.ones(n, n), past], 1)
    assert torch.equal(t5.sign(), torch.cat([top, bottom]))


def test_the_losses_are_those_of_transformers():
    gpt, bert, t5 = models = small_families(initializer_range=0.2)
    n = 13
    torch.manual_seed(11)
    _, losses = week.compare(*models, n=n)
    torch.manual_seed(11)
    for lengths in ((n,), (n,), (n, n)):
        for shape in [(1, m, 32) for m in lengths] + [(32,)]:
            torch.randn(shape)
    ids, hide = torch.randint(96, (64, n)), torch.rand(64, n) < 0.15
    assert 0.1 < hide.float().mean() < 0.2
    near(losses[0], gpt(ids, labels=ids).loss, 1e-5)
    sentence = torch.zeros(64, dtype=torch.long)
    masked = torch.where(hide, torch.full_like(ids, 96), ids)
    said = bert(masked, labels=torch.where(hide, ids, -100), next_sentence_label=sentence)
    near(losses[1], said.loss - F.cross_entropy(said.seq_relationship_logits, sentence), 1e-5)
    t5.config.decoder_start_token_id = 0
    source = torch.stack([torch.tensor([*row[:2], 96, *row[5:]]) for row in ids.tolist()])
    target = torch.stack([torch.tensor([96, *row[2:5]]) for row in ids.tolist()])
    near(losses[2], t5(source, labels=target).loss, 1e-5)


def test_the_untrained_know_nothing():
    _, losses = week.compare(*small_families())
    assert [loss.item() for loss in losses[:2]] == pytest.approx([math.log(97)] * 2, abs=0.15)
    assert all(3.5 < loss.item() < 7 for loss in losses)


def test_the_checks_at_the_start_are_these(capsys):
    maps = [torch.ones(8, 8).tril(), torch.ones(8, 8), torch.ones(164)]
    week.run_checks(maps)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("ok ") for line in lines)
    assert "parameters" in lines[0] and "past" in lines[1]


@pytest.mark.parametrize("which", range(3))
def test_the_checks_at_the_start_catch_a_wrong_map(which, capsys):
    maps = [torch.ones(36) * 0.01, torch.ones(64) * 3, torch.ones(164)]
    maps[which][5] = 0
    with pytest.raises(SystemExit) as stop:
        week.run_checks(maps)
    assert stop.value.code == 1 and "FAIL pairs" in capsys.readouterr().out


@pytest.mark.parametrize("which", range(3))
def test_the_checks_at_the_start_catch_a_wrong_size(which, monkeypatch, capsys):
    right = week.three_families

    def wrong(**size):
        models = right(**size)
        (models[0], models[1].bert, models[2])[which].register_parameter("more", nn.Parameter(torch.zeros(1)))
        return models

    monkeypatch.setattr(week, "three_families", wrong)
    with pytest.raises(SystemExit) as stop:
        week.run_checks([torch.ones(36), torch.ones(64), torch.ones(164)])
    assert stop.value.code == 1 and "FAIL parameters" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the model

FILES = ("config.json", "model.safetensors", "vocab.json")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the hub: holds files, and those that are cached; serves, or raises."""
    state = SimpleNamespace(cached=set(), error=None, broken=None, asked=[], got=[], closed=0)
    state.folder = tmp_path / "snapshot"

    def download(repo_id, filename, revision=None, local_files_only=False):
        if state.broken:
            raise state.broken
        state.got.append((repo_id, filename, revision, local_files_only))
        if local_files_only and filename not in state.cached:
            raise FileNotFoundError(f"{filename} is not in the cache")
        return str(state.folder / filename)

    def urlopen(url, timeout=None):
        assert timeout is not None and 0 < timeout <= 5, "a network that answers nothing would hang"
        state.asked.append(url)
        if state.error:
            raise state.error
        return SimpleNamespace(close=lambda: setattr(state, "closed", state.closed + 1))

    monkeypatch.setattr(week, "hf_hub_download", download)
    monkeypatch.setattr(week.urllib.request, "urlopen", urlopen)
    return state


def locate(**flags):
    return week.locate(week.Config(**flags), FILES, "Instead, noise.")


def test_random_and_folders_ask_nobody(hub, tmp_path, capsys):
    hub.error = hub.broken = KeyError("nobody is asked")
    assert locate(model="random") == "random" == locate(model="random", tiny=True)
    for tiny in (True, False):
        assert locate(model=str(tmp_path), tiny=tiny) == str(tmp_path)
    assert capsys.readouterr().out == "" and not hub.asked


@pytest.mark.parametrize("tiny", [True, False])
def test_a_cached_model_is_used_without_the_network(hub, tiny, capsys):
    hub.cached, hub.error = set(FILES), KeyError("nobody is asked")
    assert locate(model="some/one", tiny=tiny) == str(hub.folder)
    assert hub.got == [("some/one", file, "main", True) for file in FILES]
    assert not hub.asked and capsys.readouterr().out == ""


@pytest.mark.parametrize("cached", [(), FILES[:2]])
def test_a_model_is_downloaded_with_all_its_files(hub, cached, capsys):
    hub.cached = set(cached)
    assert locate() == str(hub.folder)
    assert [got[1] for got in hub.got if not got[3]] == list(FILES)
    assert len(hub.asked) == hub.closed == 1
    assert re.fullmatch(r"https://.+/openai-community/gpt2/resolve/main/config.json", hub.asked[0])
    assert capsys.readouterr().out == ""


def test_a_revision_is_passed_on(hub):
    assert locate(model="some/one@v1.0") == str(hub.folder)
    assert {(repo, revision) for repo, _, revision, _ in hub.got} == {("some/one", "v1.0")}
    assert "/some/one/resolve/v1.0/config.json" in hub.asked[0]


UNREACHABLE = [
    OSError("unreachable"),
    TimeoutError("timed\nout"),
    http.client.RemoteDisconnected("gone"),
    http.client.IncompleteRead(b""),
    ValueError("a bad name"),
]


@pytest.mark.parametrize("error", UNREACHABLE, ids=lambda error: type(error).__name__)
def test_no_network_means_random_weights_and_one_line(hub, error, capsys):
    hub.error = error
    assert locate() == "random"
    (line,) = capsys.readouterr().out.splitlines()
    assert "openai-community/gpt2" in line and " ".join(str(error).split()) in line
    assert line.endswith(" Instead, noise.")
    assert len(hub.asked) == 1 and not [got for got in hub.got if not got[3]]


def test_a_long_reason_is_cut(hub, capsys):
    hub.error = OSError("long " * 100)
    locate()
    (line,) = capsys.readouterr().out.splitlines()
    assert 100 < len(line) < 160


def test_a_model_that_was_asked_for_is_not_replaced(hub, refused):
    hub.error = OSError("unreachable")
    refused(lambda: locate(model="some/one"), names=["--model some/one", "unreachable"])
    refused(lambda: locate(model="no/such/folder/here"), names=["--model no/such/folder/here"])
    refused(lambda: locate(model="some/one", tiny=True), names=["--model some/one", "not in the cache"])
    assert all(url.count("/resolve/") == 1 for url in hub.asked)


def test_tiny_never_asks_the_network(hub, refused):
    refused(lambda: locate(tiny=True), names=["--model openai-community/gpt2"])
    assert not hub.asked and all(local for *_, local in hub.got)
    assert week.TINY["model"] == "random"


def test_other_errors_are_not_swallowed(hub):
    hub.error = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        locate()
    hub.broken = ZeroDivisionError("another")
    with pytest.raises(ZeroDivisionError):
        locate()


def write_tokenizer(folder, bpe, layout="vocab.json"):
    if layout == "tokenizer.json":
        transformers.GPT2Tokenizer(vocab=bpe.ids, merges=list(bpe.rank)).save_pretrained(folder)
        return
    (folder / "vocab.json").write_text(json.dumps(bpe.ids), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, bpe.rank)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def bpe():
    return week.BPE.train(TEXT[:20_000] + "Berlin is the capital of Germany, Rome " * 3, 331)


@pytest.fixture(scope="module")
def model(bpe):
    """Its table has more rows than there are ids, and what it says most often is the end of the text."""
    return make_gpt2(vocab_size=len(bpe.ids) + 6, n_positions=127, eos_token_id=3, bos_token_id=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bpe, model):
    """A small GPT-2 as others save it; copied by the tests that break it."""
    folder = tmp_path_factory.mktemp("a folder é") / "gpt2"
    model.save_pretrained(folder)
    write_tokenizer(folder, bpe)
    return folder


def config(**flags):
    return week.Config(**{**dict(tiny=True, vocab=331, tokens=8), **flags})


@pytest.mark.parametrize("layout", ["vocab.json", "tokenizer.json"])
def test_a_folder_is_loaded_whole(folder, tmp_path, bpe, model, layout):
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("vocab.json", "merges.txt"))
    write_tokenizer(tmp_path / "copy", bpe, layout)
    assert (tmp_path / "copy" / layout).exists() and (tmp_path / "copy" / "model.safetensors").exists()
    loaded, ours, library, weights = week.load(config(model=str(tmp_path / "copy")))
    assert weights == str(tmp_path / "copy") and not loaded.training
    assert ours.ids == bpe.ids and ours.rank == bpe.rank
    theirs = model.state_dict()
    assert {name: w.shape for name, w in loaded.state_dict().items()} == {name: w.shape for name, w in theirs.items()}
    assert all(torch.equal(w, theirs[name]) for name, w in loaded.state_dict().items())
    for text in NASTY:
        assert ours.encode(text) == library.encode(text).ids == bpe.encode(text)


def test_half_precision_becomes_float32(folder, tmp_path, model):
    shutil.copytree(folder, tmp_path / "half")
    size = {name: getattr(model.config, name) for name in ("vocab_size", "n_positions")}
    make_gpt2(**size).half().save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    loaded, *_ = week.load(config(model=str(tmp_path / "half")))
    for name, w in loaded.state_dict().items():
        near(w, model.state_dict()[name].half().float(), 0)


def test_random_weights_are_small_or_of_the_true_size():
    with torch.device("meta"):
        model, bpe, library, weights = week.load(week.Config(model="random", vocab=300))
    assert sum(w.numel() for w in model.parameters()) == 124_439_808 and weights == "random" and not model.training
    assert bpe.ids == library.get_vocab() and len(bpe.ids) == 300
    small, bpe, library, weights = week.load(config(model="random"))
    assert small.config.vocab_size == len(bpe.ids) == 331 and sum(w.numel() for w in small.parameters()) < 1e5
    for text in NASTY:
        assert bpe.encode(text) == library.encode(text).ids
    assert bpe.ids == week.BPE.train("\n".join(week.topics.values())[:100_000], 331).ids
    assert weights == "random" and not small.training


def test_out_of_reach_means_random_weights(hub, capsys, monkeypatch):
    hub.error = OSError("unreachable")
    with torch.device("meta"):
        *_, weights = week.load(week.Config(vocab=300))
    (line,) = capsys.readouterr().out.splitlines()
    assert weights == "random" and "openai-community/gpt2" in line and "random weights" in line


def test_all_four_files_are_fetched(hub, folder):
    hub.folder = folder
    _, bpe, _, weights = week.load(week.Config())
    assert weights == "openai-community/gpt2" and len(bpe.ids) == 331
    fetched = [file for _, file, _, local in hub.got if not local]
    assert fetched == ["config.json", "model.safetensors", "vocab.json", "merges.txt"]


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def no_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def other_shapes(folder):
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, "n_embd": 20}))


def other_depth(folder):
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, "n_layer": L + 1}))


def bert(folder):
    size = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=17, vocab_size=31)
    empty(folder)
    transformers.BertModel(transformers.BertConfig(**size)).save_pretrained(folder)


def bert_with_a_tokenizer(folder):
    keep = {name: (folder / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    bert(folder)
    for name, data in keep.items():
        (folder / name).write_bytes(data)


def no_tokenizer(folder):
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def small_table(folder):
    make_gpt2(vocab_size=300, n_positions=127).save_pretrained(folder)


def no_end(folder):
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    del ids[END]
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")


def rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def heads_by_name(folder):
    rewrite(folder / "config.json", n_head="two")


def no_heads(folder):
    rewrite(folder / "config.json", n_head=0)


def ids_by_name(folder):
    rewrite(folder / "vocab.json", a="b")


def vocab_is_a_list(folder):
    (folder / "vocab.json").write_text("[1, 2]")


def merges_of_three(folder):
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")


BROKEN = [
    heads_by_name,
    no_heads,
    ids_by_name,
    vocab_is_a_list,
    merges_of_three,
    empty,
    truncated,
    no_json,
    other_shapes,
    other_depth,
    bert,
    bert_with_a_tokenizer,
    no_tokenizer,
    no_weights,
    pickled_weights,
    small_table,
    no_end,
]


@pytest.mark.parametrize("how", BROKEN, ids=lambda how: how.__name__)
def test_a_broken_folder_is_refused(folder, tmp_path, refused, how):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    how(copy)
    refused(call, week, "--tiny", "--out", tmp_path / "out", "--model", copy, names=[f"--model {copy}: "])


# ---------------------------------------------------------------------------------- writing, and the whole


def weights_of(model):
    return model.transformer.state_dict()


@pytest.fixture
def written(model):
    """Arguments for write(): a prompt that has id 0 in it, and the model's ways to stop early or to draw lots."""
    tokens = torch.tensor([[5, 0, 7, 11, 0, 2, 3]])
    text = week.generate(weights_of(model), model.config, tokens, 8)
    model.generation_config.update(eos_token_id=text[0, 9].item(), do_sample=True, top_k=50, temperature=9.0)
    yield SimpleNamespace(args=(model, weights_of(model), tokens, config()), text=text[0].tolist())
    model.generation_config = transformers.GenerationConfig()


def test_both_write_the_same_to_the_last_token(written, capsys):
    text, rate, baseline = week.write(*written.args)
    assert text == written.text and len(text) == 7 + 8 and rate > 0 and baseline > 0
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[2] for line in lines] == ["here", "transformers"] * 3
    assert [line.split()[1] for line in lines] == [f"{i}/6" for i in range(1, 7)] and verdict.startswith("ok ")


def test_speeds_are_medians_of_turns(written, monkeypatch):
    times = [0, 8, 0, 80, 0, 4, 0, 40, 0, 1, 0, 160]
    monkeypatch.setattr(week, "time", SimpleNamespace(perf_counter=lambda: times.pop(0)))
    _, rate, baseline = week.write(*written.args)
    assert (rate, baseline) == (8 / 4, 8 / 80) and not times


@pytest.mark.parametrize("place", [7, 11, 14])
def test_a_text_that_differs_stops_the_run(written, monkeypatch, capsys, place):
    right = week.generate

    def wrong(*args):
        tokens = right(*args)
        tokens[0, place] += 1
        return tokens

    monkeypatch.setattr(week, "generate", wrong)
    with pytest.raises(SystemExit) as stop:
        week.write(*written.args)
    assert stop.value.code == 1 and "FAIL tokens written" in capsys.readouterr().out


@pytest.mark.parametrize("ablate, cached", [("none", True), ("cache", False)])
def test_the_cache_can_be_taken_away(written, monkeypatch, ablate, cached):
    asked, right = [], week.generate
    monkeypatch.setattr(week, "generate", lambda *args: asked.append(args[-1]) or right(*args))
    model, w, tokens, _ = written.args
    assert week.write(model, w, tokens, config(ablate=ablate))[0] == written.text
    assert asked == [cached] * 3


def test_thoughts_are_the_model_s_own(model, bpe, capsys):
    w, ids = weights_of(model), bpe.encode(" the capital of Germany, and is")
    other = bpe.encode(" Rome is the capital of")
    streams = [week.gpt2(w, model.config, torch.tensor([part]))[1] for part in (ids, other)]
    capsys.readouterr()
    week.print_thoughts(w, bpe, ids, *streams)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + L + 1
    table, longest = F.normalize(model.transformer.wte.weight[:331], dim=-1), sorted(len(bpe.tokens[i]) for i in {*ids})
    for line, size in zip(lines, longest[-3:]):
        likely = re.findall(r"""(?:^|  )('.*?'|".*?") (-?\d\.\d\d)(?=  |$)""", line)
        assert len(likely) == 5 and likely[0][1] == "1.00"
        i = next(i for i in ids if repr(bpe.decode([i])) == likely[0][0] and len(bpe.tokens[i]) == size)
        best = (table @ table[i]).topk(5)
        top = zip(best.values.tolist(), best.indices.tolist())
        assert likely == [(repr(bpe.decode([j])), f"{v:.2f}") for v, j in top]
    with torch.no_grad():
        for depth, (line, x, y) in enumerate(zip(lines[3:], *streams)):
            p = model.lm_head(model.transformer.ln_f(x[0, -1])).softmax(-1).topk(3)
            likeness = (x[0, -1] @ y[0, -1] / x[0, -1].norm() / y[0, -1].norm()).item()
            best = "  ".join(f"{bpe.decode([j])!r} {v:.2f}" for v, j in zip(p.values.tolist(), p.indices.tolist()))
            assert line == f"after block {depth:2} | cosine {likeness:6.3f} | next {best}"


def test_neighbours_are_tokens_that_there_are(model, bpe, capsys):
    w, ids = {**weights_of(model)}, bpe.encode(" the capital of Germany, and is")
    w["wte.weight"] = w["wte.weight"].clone()
    longest = max(ids, key=lambda i: len(bpe.tokens[i]))
    w["wte.weight"][331:] = w["wte.weight"][longest]
    stream = week.gpt2(w, model.config, torch.tensor([ids]))[1]
    capsys.readouterr()
    week.print_thoughts(w, bpe, ids, stream, stream)
    assert not [line for line in capsys.readouterr().out.splitlines()[:3] if re.search(r"'<\d+>'", line)]


def test_an_error_of_many_lines_becomes_one(folder, monkeypatch, refused):
    def fail(*args, **options):
        raise OSError("first\n\n  second\n")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", fail)
    refused(week.load, config(model=str(folder)), names=["--model", "first second"])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A finished run with the folder as its model: (figures, folder of the results)."""
    out = tmp_path_factory.mktemp("week03")
    return call(week, "--tiny", "--out", out, "--model", folder), out


def test_the_whole_runs_with_a_folder(finished, folder, bpe, model):
    figures, out = finished
    assert set(figures) == {"parameters", "tokens_per_second", "baseline_tokens_per_second", "bytes_per_token"}
    assert figures["parameters"] == sum(w.numel() for w in model.parameters())
    prompt = week.Config.prompt
    assert figures["bytes_per_token"] == pytest.approx(len(prompt) / len(bpe.encode(prompt)))
    found = json.loads((out / "metrics.json").read_text())
    assert figures.items() <= found.items() and found["weights"] == found["config"]["model"] == str(folder)
    torch.manual_seed(0)
    _, losses = week.compare(
        *week.three_families(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
        )
    )
    assert found["losses"] == pytest.approx([loss.item() for loss in losses], abs=1e-4)


def test_the_whole_shows_all_of_it(folder, tmp_path, capsys, bpe, model):
    prompt, versus = "Rome is the cäpital of", "Berlin is"
    flags = ("--tiny", "--out", tmp_path, "--model", folder, "--prompt", prompt, "--versus", versus, "--tokens", 17)
    ids, texts = torch.tensor([bpe.encode(prompt)]), []
    for more in ((), ("--ablate", "cache")):
        capsys.readouterr()
        figures = call(week, *flags, *more)
        lines = capsys.readouterr().out.splitlines()
        texts.append(next(line for line in lines if line.startswith(repr(prompt)[:-1])))
    text = bpe.decode(week.generate(weights_of(model), model.config, ids, 17)[0].tolist())
    assert texts == [repr(text)] * 2
    assert figures["bytes_per_token"] == pytest.approx(len(prompt.encode()) / ids.shape[1])
    S = ids.shape[1]
    assert f"B = 1, h = 5, S = {S}, H = 30, 3H = 90, 4H = 120, V = 337" in lines
    shown = {(row := re.split(r"  +", line))[0]: row for line in lines}
    assert shown["transformer.h.0.attn"][2] == "(B, S, H) (B, h, S, S)"
    assert shown["transformer.h.0.mlp.c_fc"][2] == "(B, S, 4H)" and shown["lm_head"][2] == "(B, S, V)"
    steps = [*bpe.steps(" cäpital")]
    assert "\n".join(steps) in "\n".join(lines) and lines.count(steps[0]) == 1
    assert sum(line.startswith("ok ") for line in lines) == 6
    (last,) = [line for line in lines if line.startswith(f"after block {L:2}")]
    a, b = (week.gpt2(weights_of(model), model.config, torch.tensor([bpe.encode(x)]))[1] for x in (prompt, versus))
    assert f"cosine {F.cosine_similarity(a[L][0, -1], b[L][0, -1], 0).item():6.3f} " in last
    assert lines[-1].startswith("RESULT parameters=")


def test_sizes_that_do_not_fit_are_refused(tmp_path, refused, folder):
    tiny = ("--tiny", "--out", tmp_path, "--model", folder)
    refused(call, week, *tiny, "--prompt", "", names=["--prompt: 0 tokens"])
    refused(call, week, *tiny, "--prompt", "ab", names=["--prompt: 2 tokens"])
    refused(call, week, *tiny, "--versus", "ab", names=["--versus: 2 tokens"])
    refused(call, week, *tiny, "--prompt", "qx" * 2000, names=["--prompt", "127"])
    refused(call, week, *tiny, "--versus", "qx" * 2000, names=["--versus", "127"])
    refused(call, week, *tiny, "--tokens", 5000, names=["--tokens 5000"])
    refused(call, week, *tiny, "--tokens", 0, names=["--tokens 0"])
    refused(call, week, *tiny, "--vocab", 100, names=["--vocab 100", "257"])
    refused(call, week, *tiny, "--vocab", 50_258, names=["--vocab 50258", "50257"])
    refused(call, week, *tiny, "--prompt", "qx" * 60, names=["--prompt: 120 tokens", "127"])
    for flag in ("--prompt", "--versus"):
        refused(call, week, *tiny, flag, "caf\udce9 is it", names=[flag, "UTF-8"])  # bytes of another encoding


def test_the_longest_text_that_fits_is_written(tmp_path, folder, capsys):
    flags = ("--tiny", "--out", tmp_path, "--model", folder, "--versus", "abc", "--prompt")
    call(week, *flags, "qx" * 59 + "q")  # 119 + 8 = 127
    capsys.readouterr()
    call(week, *flags, "qxq", "--tokens", 1)
    assert "\nRESULT " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["logits", "encode", "split", "decode", "kept"])
def test_a_wrong_result_stops_the_run(name, tmp_path, monkeypatch, capsys, folder):
    right = getattr(week, "gpt2"), week.BPE.encode, week.BPE.decode, week.trace_shapes
    if name == "logits":
        wrong = lambda *args: ((out := right[0](*args))[0] + 2e-4, *out[1:])  # noqa: E731
        monkeypatch.setattr(week, "gpt2", wrong)
    elif name == "encode":
        monkeypatch.setattr(week.BPE, "encode", lambda self, text: right[1](self, text.replace("\x1c", " ")))
    elif name == "split":  # nothing is lost, but these are not the library's ids
        spell = lambda self, text: [self.ids[week.VISIBLE[b]] for b in text.encode()]  # noqa: E731
        monkeypatch.setattr(week.BPE, "encode", lambda self, text: (spell if "x" in text else right[1])(self, text))
    elif name == "decode":
        monkeypatch.setattr(week.BPE, "decode", lambda self, ids: right[2](self, ids).replace("\x85", " "))
    else:
        layer = transformers.cache_utils.DynamicLayer
        grow = layer.update

        def update(self, k, v, *rest, **options):
            result = grow(self, k, v, *rest, **options)
            self.values = v[..., :2]
            return result

        monkeypatch.setattr(layer, "update", update)
    with pytest.raises(SystemExit) as stop:
        call(week, "--tiny", "--out", tmp_path, "--model", folder)
    assert stop.value.code == 1
    claim = {"logits": "gpt2()", "kept": "bytes of a KV"}.get(name, "tokens of a nasty")
    assert f"FAIL {claim}" in capsys.readouterr().out


def test_the_seed_matters_to_random_weights_only(tmp_path, monkeypatch):
    seen = []

    def write(model, w, tokens, cfg):
        seen.append(w["h.1.mlp.c_fc.weight"].clone())
        return [1, 2, 3], 7.0, 3.0

    monkeypatch.setattr(week, "write", write)
    losses = []
    for seed in (2, 2, 3):
        figures = call(week, "--tiny", "--out", tmp_path, "--vocab", 257, "--seed", seed)
        assert (figures["tokens_per_second"], figures["baseline_tokens_per_second"]) == (7, 3)
        losses.append(json.loads((tmp_path / "metrics.json").read_text())["losses"])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert losses[0] == losses[1] == losses[2]


# -------------------------------------------------------------------------------------------------- picture


def grey(m):
    return (255 - 40 * m.sign() - 215 * (m / m.max()).sqrt()).numpy()


def test_a_picture_s_greys_are_what_is_seen():
    maps = [torch.rand(8, 8).tril(), torch.rand(8, 8), torch.rand(14, 14).triu()]
    maps[1][3, 5] = 1e-9
    attention = torch.rand(2, 3, 11, 11).tril().softmax(-1).tril()
    page = np.asarray(week.draw(maps, attention, "whose").convert("L")).astype(float)
    assert page.shape == (970, 1240)
    for i, m in enumerate(maps):
        size = 280 // len(m)
        square = page[40 + 316 * i :, 20:][:280, :280]
        assert np.abs(square[size // 2 :: size, size // 2 :: size] - grey(m)).max() <= 1
        assert (page[40 + 316 * i :, 301:339][:280] == 255).all()
    assert page[40 + 316 :, 20:][3 * 35 + 17, 5 * 35 + 17] in (214, 215), "what is not 0 is not white"
    for i in range(2):
        for j in range(3):
            square = page[40 + 296 * i :, 340 + 296 * j :][:292, :292]
            centres = ((np.arange(11) + 0.5) * 292 / 11).astype(int)
            assert np.abs(square[np.ix_(centres, centres)] - grey(attention[i, j])).max() <= 1
    for i in range(3):
        assert page[14 + 316 * i : 34 + 316 * i, 20:200].min() < 50
    assert page[14:34, 340:900].min() < 50, "the pictures have names"


def test_the_picture_shows_who_sees_whom(finished, model, bpe):
    with Image.open(finished[1] / "gpt2.png") as image:
        page = np.asarray(image.convert("L")).astype(float)
    past, all_of_it = np.tril(np.ones((8, 8))), np.ones((8, 8))
    t5 = np.block([[all_of_it, 0 * all_of_it], [all_of_it, past]])
    for i, m in enumerate((past, all_of_it, t5)):
        centres = ((np.arange(len(m)) + 0.5) * 280 / len(m)).astype(int)
        cells = page[40 + 316 * i :, 20:][np.ix_(centres, centres)]
        assert ((cells < 255) == (m > 0)).all()
    *_, attention = week.gpt2(weights_of(model), model.config, torch.tensor([bpe.encode(week.Config.prompt)]))
    side, S = 888 // 5, attention[0].shape[-1]
    for i in range(L):
        for j in range(H):
            centres = ((np.arange(S) + 0.5) * (side - 4) / S).astype(int)
            cells = page[40 + side * i :, 340 + side * j :][np.ix_(centres, centres)]
            assert np.abs(cells - grey(attention[i][0, j])).max() <= 2
