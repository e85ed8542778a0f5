"""Week 4: heads, calibration and rejection against references; modules by what they do; CLIP from folders made here."""

import io
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import week04_router as week
from conftest import call
from PIL import Image

f64 = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------- features


def router_of(texts=("draw a circle", "two plus three", "good day"), labels=("a", "b")):
    return week.Router(week.make_notes([*texts], [*labels], "random")).eval().requires_grad_(False)


def test_the_words_are_tf_idf_by_the_formula():
    router = router_of(("red red circle", "blue circle", "a red"))
    idf = router.notes["idf"]
    assert idf["blue"] == pytest.approx(math.log(4 / 2) + 1) and idf["circle"] == pytest.approx(math.log(4 / 3) + 1)
    assert idf["red"] == idf["circle"], "a text counts once, however often the word is in it"
    row = router.encode(["RED, red circle? unknown"])[0, router.D :]
    expected = torch.tensor([dict(red=2 * idf["red"], circle=idf["circle"]).get(word, 0) for word in idf])
    assert torch.allclose(row, expected / expected.norm())
    assert (router.encode(["unknown"])[0, router.D :] == 0).all()


def test_padding_and_company_change_nothing():
    router = router_of()
    alone, together = router.encode(["draw"])[0], router.encode(["draw", "two plus three good day"])
    assert torch.allclose(alone, together[0], atol=1e-6) and not torch.allclose(together[0], together[1], atol=1e-3)
    assert torch.allclose(together[:, : router.D].norm(dim=1), torch.ones(2))
    assert router.encode(["draw " * 500]).shape == router.encode([""]).shape == (1, 64 + 8)
    assert router.encode(["draw"] * 257).shape == (257, 64 + 8)


def test_tokens_are_those_of_the_tokenizer_between_begin_and_end():
    router = router_of()
    ids = router.tokenizer.encode("draw two", add_special_tokens=False).ids
    assert router.tokens(["draw two"]).tolist() == [[0, *ids, 1]]
    assert router.tokens(["draw two", ""]).tolist()[1] == [0] + [1] * (len(ids) + 1)
    assert router.tokens(["two " * 100]).shape == (1, 77)


def test_dice_cut_words_and_leave_tokens_out_and_only_in_training():
    router, dice = router_of(("draw a circle",) * 3), random.Random(3)
    plain = router.tokens(["draw a circle"])
    assert torch.equal(plain, router.tokens(["draw a circle"]))
    rows = [[i for i in router.tokens(["draw a circle"], dice)[0].tolist() if i > 1] for _ in range(300)]
    whole = [[i for i in router.tokens(["draw a circle"], dice, False)[0].tolist() if i > 1] for _ in range(300)]
    known = [i for i in plain[0].tolist() if i > 1]
    text = "draw a circle"
    assert {i for row in whole for i in row} == {*known} and {i for row in rows for i in row} > {*known}
    assert sum(len(row) for row in whole) / (300 * len(known)) == pytest.approx(0.8, abs=0.05)
    assert any(router.tokenizer.decode(row) == text and row != known for row in rows), "parts of all letters"


# -------------------------------------------------------------------------------------- heads and decisions


@pytest.mark.parametrize("decay", [0.1, 2.0])
def test_logistic_regression_is_at_the_minimum(decay):
    x, y = torch.randn(53, 7, dtype=f64), torch.arange(53) % 5
    net = week.fit(torch.nn.Linear(7, 5).double(), x, y, decay).requires_grad_(True)
    loss = F.cross_entropy(net(x), y, reduction="sum") + decay * net.weight.square().sum() / 2
    assert max(g.abs().max() for g in torch.autograd.grad(loss, [*net.parameters()])) < 1e-3


def test_the_mlp_learns_what_a_line_cannot():
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).repeat(5, 1)
    y = torch.tensor([0, 1, 1, 0]).repeat(5)
    mlp = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    assert (week.fit(mlp, x, y)(x).argmax(1) == y).all()
    assert not any(w.requires_grad for w in mlp.parameters()), "what is fitted is frozen"


def test_temperature_is_found_and_bounded():
    scores = torch.randn(4000, 5) * 3
    y = torch.multinomial((scores / 2.5).softmax(1), 1)[:, 0]
    assert week.best_temperature(scores, y).item() == pytest.approx(2.5, rel=0.1)
    sure = F.one_hot(torch.arange(50) % 5).float()
    assert week.best_temperature(sure, torch.arange(50) % 5) > 0.1, "all right is no proof of certainty"


def test_calibration_error_is_the_sum_over_bins():
    sure, right = torch.rand(211), torch.rand(211) < 0.5
    total = 0
    for m in range(15):
        inside = (sure > m / 15) & (sure <= (m + 1) / 15)
        if inside.any():
            total += inside.sum().item() / 211 * abs(right[inside].float().mean() - sure[inside].mean()).item()
    assert week.calibration_error(sure, right) == pytest.approx(total, abs=1e-5)
    assert week.calibration_error(torch.ones(3), torch.tensor([True] * 3)) == 0
    assert week.calibration_error(torch.zeros(3), torch.tensor([False] * 3)) == 0
    two_bins = week.calibration_error(torch.tensor([0.03, 0.1]), torch.tensor([True, False]))
    assert two_bins == pytest.approx((0.97 + 0.1) / 2), "gaps of two bins do not cancel"


def test_auroc_is_the_share_of_pairs():
    assert week.auroc(torch.tensor([2.0, 3]), torch.tensor([0.0, 1, 1])) == 1
    assert week.auroc(torch.tensor([0.0]), torch.tensor([2.0])) == 0
    assert week.auroc(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5
    assert week.auroc(torch.tensor([1.0, 3]), torch.tensor([2.0, 1, 0])) == pytest.approx(4.5 / 6)


def test_the_threshold_separates_or_keeps_nineteen_of_twenty():
    assert week.best_threshold(torch.tensor([0.7, 0.8, 0.9]), torch.tensor([0.1, 0.5])) == pytest.approx(0.7)
    assert week.best_threshold(torch.tensor([0.3, 0.8, 0.9]), torch.tensor([0.4, 0.5])) == pytest.approx(0.8)
    inside = torch.rand(200)
    assert (inside >= week.best_threshold(inside, torch.tensor([]))).float().mean().item() == pytest.approx(0.95)


def table_of(noise=0.5):
    """evaluate on made-up features: 3 modules, 5 numbers of the tower, 7 words."""
    router = router_of(("a b c d e f g",), ("x", "y", "z"))
    router.D = 5
    router.head = torch.nn.Linear(12, 3)
    y = {part: torch.arange(n) % 3 for part, n in dict(train=60, val=31, test=43).items()}
    y["val"][-10:], y["test"][-13:] = -1, -1
    centre = torch.randn(3, 12)
    x = {part: (y[part] >= 0)[:, None] * centre[y[part]] + noise * torch.randn(len(y[part]), 12) for part in y}
    return router, x, y, *week.evaluate(router, x, y, centre)


def test_the_router_adds_the_scores_of_its_halves(capsys):
    router, x, y, rows, p = table_of()
    D = router.D
    halves = [
        week.fit(torch.nn.Linear(n, 3), part, y["train"])
        for n, part in ((5, x["train"][:, :D]), (7, x["train"][:, D:]))
    ]
    scores = halves[0](x["test"][:, :D]) + halves[1](x["test"][:, D:])
    assert torch.allclose(router.head(x["test"]).softmax(1), scores.softmax(1), atol=5e-3)
    assert torch.allclose(p, (router.head(x["test"]) / router.temperature).softmax(1))
    inside = y["test"] >= 0
    right = (p.argmax(1) == y["test"])[inside]
    sure = p.amax(1)
    assert rows["router"]["test_accuracy"] == pytest.approx(right.float().mean().item())
    assert rows["router"]["ece"] == pytest.approx(week.calibration_error(sure[inside], right))
    assert rows["router"]["oos_auroc"] == pytest.approx(week.auroc(sure[inside], sure[~inside]))
    before = router.head(x["test"]).softmax(1).amax(1)[inside]
    assert rows["router"]["ece_before"] == pytest.approx(week.calibration_error(before, right))
    assert [*rows] == ["zero-shot", "class means", "MLP", "logistic", "bag of words", "router"]


def test_each_head_sees_its_own_half_of_the_features():
    router, x, y, rows, _ = table_of(0.9)
    inside, D = y["test"] >= 0, router.D
    share = lambda scores: (scores.argmax(1) == y["test"])[inside].float().mean().item()  # noqa: E731

    def fitted(part):
        return week.fit(torch.nn.Linear(part(x["train"]).shape[1], 3), part(x["train"]), y["train"])

    for name, part in (("logistic", lambda x: x[:, :D]), ("bag of words", lambda x: x[:, D:])):
        assert rows[name]["test_accuracy"] == pytest.approx(share(fitted(part)(part(x["test"]))))
    means = torch.stack([x["train"][y["train"] == k, :D].mean(0) for k in range(3)])
    assert rows["class means"]["test_accuracy"] == pytest.approx(share(x["test"][:, :D] @ F.normalize(means).T))


def test_the_mlp_of_the_table_bends():
    router, x, y, *_ = table_of()
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    for part in x:
        n = len(y[part])
        x[part][:, :5] = F.pad(corners[torch.arange(n) % 4], (0, 3))
        y[part] = torch.where(y[part] >= 0, torch.tensor([0, 1, 1, 0])[torch.arange(n) % 4], -1)
    y["train"][:3] = 2  # all three modules occur
    rows, _ = week.evaluate(router, x, y, torch.randn(3, 12))
    assert rows["MLP"]["test_accuracy"] > 0.95 > rows["logistic"]["test_accuracy"]


def test_temperature_and_threshold_come_from_validation_alone():
    torch.manual_seed(0)
    router, x, y, *_ = table_of()
    before = router.temperature.item(), router.threshold.item()
    centre = torch.randn(3, 12)
    x["test"] = torch.randn_like(x["test"])
    week.evaluate(router, x, y, centre)
    assert (router.temperature.item(), router.threshold.item()) == pytest.approx(before, rel=0.05)
    sure = (router.head(x["val"]) / router.temperature).softmax(1).amax(1)
    inside = y["val"] >= 0
    assert router.threshold == week.best_threshold(sure[inside], sure[~inside])
    assert router.temperature == week.best_temperature(router.head(x["val"])[inside], y["val"][inside])


# ----------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize(
    "text, value",
    [
        ("what is 12 * (3 + 4)?", "= 84"),
        ("3 plus 5 times 2", "= 13"),
        ("7 minus 10", "= -3"),
        ("8 divided by 5", "= 1.6"),
        ("what is 2 ^ 10.", "= 1024"),
        ("17 % 5", "= 2"),
        ("-3 + 1", "= -2"),
        ("2 * -(1 + 2)", "= -6"),
        ("9**9**9", "I cannot calculate '9**9**9'"),
        ("5 / 0", "by zero"),
        ("what is love", "I cannot calculate"),
        ("((((", "I cannot calculate"),
        ("(" * 5000 + "1" + ")" * 5000, "I cannot calculate"),
        ("(-8) ** 0.5", "I cannot calculate"),
        ("1 // 2", "I cannot calculate"),
        ("(1, 2)", "I cannot calculate '(1'"),
    ],
)
def test_calculate(text, value):
    assert value in week.calculate(text, "")


def test_draw_renders_what_is_named(tmp_path):
    reply = week.draw_shapes("draw a red circle and a BLUE square and a triangle", tmp_path / "o")
    with Image.open(tmp_path / "o" / "drawing.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (120, 361, 3) and reply.startswith("3 shapes") and "drawing.png" in reply
    assert [tuple(pixels[60, x]) for x in (60, 180, 300)] == [(255, 0, 0), (0, 0, 255), (0, 0, 0)]
    assert tuple(pixels[15, 60]) == (255, 0, 0) and tuple(pixels[15, 180]) == (255, 255, 255), "a circle is taller"
    week.draw_shapes("circle " * 99, tmp_path / "o")
    with Image.open(tmp_path / "o" / "drawing.png") as image:
        assert image.width == 2401, "no more than 20"


def test_the_other_modules():
    do = {name: module[1] for name, module in week.MODULES.items()}
    assert do["spell"]("how do you spell word", "") == "W-O-R-D"
    assert do["count"]("count the words: to be or not", "") == "4 words"
    assert week.re.fullmatch(r"\w+, \d\d \w+ \d{4}, \d\d:\d\d", do["clock"]("", ""))
    assert all(what in do["chat"]("", "") for what, _, _ in week.MODULES.values())
    assert len(do) == 7 and do["oos"] is None


# -------------------------------------------------------------------------------------------------------- data


def test_phrasings_of_the_test_never_occur_in_training(monkeypatch):
    monkeypatch.setattr(week, "SLOTS", {name: [name] for name in week.SLOTS} | dict(Y=[""]))
    monkeypatch.setattr(week.random.Random, "choices", lambda self, *args: [1])  # nobody mistypes
    parts, labels = week.load_prompts(week.Config())
    assert labels == ["calculate", "chat", "clock", "count", "draw", "spell"]
    made = {name: " ".join(module[2].split()).split(" | ") for name, module in week.MODULES.items()}
    for name in labels:
        assert len(made[name]) % 7 == 0 and len({*made[name]}) == len(made[name])
        for part, turns in dict(val=[0], test=[1], train=[2, 3, 4, 5, 6]).items():
            assert {text for text, label in parts[part].items() if label == name} == {
                text for i, text in enumerate(made[name]) if i % 7 in turns
            }
    assert {*parts["val"].values()} == {*parts["test"].values()} == {*labels, "oos"}
    assert {*parts["train"].values()} == {*labels}


def test_built_in_prompts_are_the_same_for_all_and_in_one_part_each():
    parts, _ = week.load_prompts(week.Config())
    again, _ = week.load_prompts(week.Config(seed=5))
    assert parts == again and 1000 < len(parts["train"]) and 200 < len(parts["test"])
    assert not {*parts["train"]} & {*parts["test"]} and not {*parts["val"]} & {*parts["test"]}
    leaked, _ = week.load_prompts(week.Config(ablate="leak"))
    assert {*leaked["test"]} & {*parts["train"]}, "now phrasings of the training are tested"
    rows = week.make_prompts("none")
    assert not any("S" in text or "W" in text for _, text in rows), "all slots are filled"
    assert any("speell" in text for _, text in rows) and any("spel " in text for _, text in rows)


def tsv(path, labels=("up", "down"), n=20, extra=""):
    path.write_text("".join(f"{a}\tplease go {a} {i} times\n" for a in labels for i in range(n)) + extra, "utf-8")
    return path


def test_prompts_of_a_user_are_parted(tmp_path):
    file = tsv(tmp_path / "p.tsv", n=21, extra="".join(f"oos\tfish {i}\n" for i in range(6)))
    parts, labels = week.load_prompts(week.Config(prompts=str(file)))
    assert labels == ["down", "up"] and {k: len(v) for k, v in parts.items()} == dict(val=9, test=9, train=30)
    other = tsv(tmp_path / "t.tsv", n=2)
    parts, _ = week.load_prompts(week.Config(prompts=str(file), test=str(other)))
    assert {k: len(v) for k, v in parts.items()} == dict(val=7, test=4, train=34), "what is tested is not trained on"


@pytest.mark.parametrize(
    "content, word",
    [(b"", "TAB"), (b"no tab here\n", "TAB"), (b"a\t\n", "TAB"), (b"a\t\xff\n", "utf-8"), (b"a\tx\n", "2 modules")],
)
def test_wrong_prompt_files_are_refused(tmp_path, refused, content, word):
    (tmp_path / "p.tsv").write_bytes(content)
    refused(week.load_prompts, week.Config(prompts=str(tmp_path / "p.tsv")), names=["--prompts", word])


def test_other_mistakes_are_refused(tmp_path, refused):
    one, two = tsv(tmp_path / "1.tsv", ("up",)), tsv(tmp_path / "2.tsv")
    strange = tsv(tmp_path / "3.tsv", ("left",))
    refused(week.load_prompts, week.Config(prompts=str(one)), names=["--prompts", "2 modules"])
    refused(week.load_prompts, week.Config(prompts=str(two), test=str(strange)), names=["--test", "left"])
    refused(week.load_prompts, week.Config(prompts=str(tmp_path / "none.tsv")), names=["--prompts", "none.tsv"])
    refused(week.load_prompts, week.Config(test=str(tmp_path / "none.tsv")), names=["--test", "none.tsv"])


# --------------------------------------------------------------------------------------------- CLIP in a folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP text tower with random weights and a vocabulary of letters."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    size = dict(hidden_size=16, intermediate_size=22, num_hidden_layers=1, num_attention_heads=2, projection_dim=14)
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPTextConfig(
        vocab_size=514, bos_token_id=512, eos_token_id=513, pad_token_id=513, max_position_embeddings=77, **size
    )
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_s_features_are_those_of_transformers(clip):
    tokenizer, tower = week.load_clip(week.Config(model=str(clip)), "")
    router = week.Router(week.make_notes(["a red circle"], ["x", "y"], str(clip)), (tokenizer, tower)).eval()
    texts = ["A red circle", "hm", "cafe " * 40]
    theirs = transformers.CLIPTokenizer.from_pretrained(clip)
    batch = theirs(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    model = transformers.CLIPTextModelWithProjection.from_pretrained(clip).eval()
    with torch.no_grad():
        expected = F.normalize(model(**batch).text_embeds)
    assert torch.equal(router.tokens(texts), batch.input_ids)
    assert torch.allclose(router.encode(texts)[:, :14], expected, atol=1e-6)


def test_a_pretrained_tower_is_frozen_and_not_saved(clip, tmp_path, monkeypatch, capsys):
    before, load, kept = week.safetensors.torch.load_file(clip / "model.safetensors"), week.load_clip, []
    monkeypatch.setattr(week, "load_clip", lambda *a: kept.append(load(*a)) or kept[-1])
    monkeypatch.setattr(week, "train", lambda *args: pytest.fail("CLIP is not trained"))
    figures = call(week, "--out", tmp_path, "--model", clip)
    for name, w in kept[0][1].state_dict().items():
        assert torch.equal(w, before[name]), name
    saved = week.safetensors.torch.load_file(tmp_path / "router.safetensors")
    assert not [name for name in saved if name.startswith("tower")] and figures["test_accuracy"] > 0.5
    assert json.loads((tmp_path / "metrics.json").read_text())["weights"] == str(clip)
    (decision,), _ = routed(capsys, "--out", tmp_path, "--route", "draw a red circle")
    assert decision["module"] == "draw", "routing finds the tower that was trained with"


def test_wrong_model_folders_are_refused(clip, tmp_path, refused):
    load = lambda folder: week.load_clip(week.Config(model=str(folder)), "")  # noqa: E731
    refused(load, tmp_path, names=["--model", str(tmp_path)])
    for name, keep in (("notok", "config.json model.safetensors"), ("noweights", "config.json tokenizer.json")):
        (tmp_path / name).mkdir()
        for file in keep.split():
            (tmp_path / name / file).write_bytes((clip / file).read_bytes())
        refused(load, tmp_path / name, names=["--model", name])
    (tmp_path / "notok" / "tokenizer.json").write_text("{}")
    refused(load, tmp_path / "notok", names=["--model", "no CLIP"])
    (tmp_path / "notok" / "tokenizer.json").write_text('{"model": "<|endoftext|>"}')
    refused(load, tmp_path / "notok", names=["--model"])
    config = json.loads((clip / "config.json").read_text())
    config["num_attention_heads"] = "two"
    (tmp_path / "notok" / "config.json").write_text(json.dumps(config))
    refused(load, tmp_path / "notok", names=["--model"])
    (tmp_path / "notok" / "config.json").write_bytes((clip / "config.json").read_bytes())
    (tmp_path / "notok" / "tokenizer.json").write_bytes((clip / "tokenizer.json").read_bytes())
    (tmp_path / "notok" / "model.safetensors").write_bytes(b"broken")
    refused(load, tmp_path / "notok", names=["--model"])
    (tmp_path / "notok" / "model.safetensors").unlink()
    weights = week.safetensors.torch.load_file(clip / "model.safetensors")
    torch.save(weights, tmp_path / "notok" / "pytorch_model.bin")
    refused(load, tmp_path / "notok", names=["--model"])  # a pickle is not opened
    size = dict(n_embd=8, n_layer=1, n_head=1, n_positions=16, vocab_size=514)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "tokenizer.json").write_bytes((clip / "tokenizer.json").read_bytes())
    refused(load, tmp_path / "gpt", names=["--model"])


# --------------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("week04")
    return call(week, "--model", "random", "--out", out), out


def test_the_router_beats_the_bag_of_words(trained):
    figures, out = trained
    found = json.loads((out / "metrics.json").read_text())
    assert {"test_accuracy", "baseline_accuracy", "ece", "oos_auroc", "route_ms", "weights"} <= found.keys()
    assert figures["test_accuracy"] > max(0.95, figures["baseline_accuracy"]) and figures["oos_auroc"] > 0.9
    assert found["table"]["bag of words"]["test_accuracy"] == figures["baseline_accuracy"]
    with Image.open(out / "router.png") as image:
        assert image.size == (900, 800)


def routed(capsys, *flags):
    capsys.readouterr()
    call(week, *flags)
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")], lines


def test_routing_needs_no_training(trained, capsys, monkeypatch):
    _, out = trained
    before = (out / "router.safetensors").read_bytes()
    monkeypatch.setattr(week, "train", lambda *args: pytest.fail("must not train"))
    (decision,), lines = routed(capsys, "--out", out, "--route", "draw a red circle")
    assert decision["module"] == "draw" and not decision["rejected"] and (out / "drawing.png").exists()
    assert sum(decision["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert decision["confidence"] == max(decision["probabilities"].values()) and decision["milliseconds"] > 0
    assert lines[-1] == "RESULT decisions=1" and (out / "router.safetensors").read_bytes() == before
    monkeypatch.setattr(week.sys, "stdin", io.StringIO("calculate 3 + 4\n\norder 3 pizzas\n"))
    (first, empty, last), lines = routed(capsys, "--out", out, "--route", "-")
    assert first["module"] == "calculate" and "3 + 4 = 7" in lines
    assert empty["rejected"] and empty["module"] == "chat" and lines[-1] == "RESULT decisions=3"
    assert last["rejected"] and last["module"] == "chat"
    monkeypatch.setattr(week.sys, "stdin", io.StringIO(""))
    assert routed(capsys, "--out", out, "--route", "-")[1][-1] == "RESULT decisions=0"


def test_a_saved_router_decides_as_it_was_tested(trained, capsys):
    _, out = trained
    parts, labels = week.load_prompts(week.Config())
    router = week.Router(json.loads(notes_of(out))).eval()
    router.load_state_dict(week.safetensors.torch.load_file(out / "router.safetensors"))
    inside = [text for text, label in parts["test"].items() if label != "oos"]
    right = [max(p, key=p.get) == parts["test"][t] for t in inside for p in [week.decide(router, t)["probabilities"]]]
    assert sum(right) / len(right) == pytest.approx(trained[0]["test_accuracy"], abs=1e-4)
    positions = [w for name, w in router.tower.named_parameters() if "position" in name]
    assert positions and all((w == 0).all() for w in positions), "the small tower does without positions"


def notes_of(out):
    with week.safetensors.safe_open(out / "router.safetensors", "pt") as file:
        return file.metadata()["notes"]


def test_a_missing_or_broken_router_is_refused(trained, tmp_path, refused):
    refused(call, week, "--out", tmp_path / "new", "--route", "x", names=["--route", "train first"])
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / ".week04_router").touch()
    (tmp_path / "o" / "router.safetensors").write_bytes(b"broken")
    refused(call, week, "--out", tmp_path / "o", "--route", "x", names=["--route", "train first"])
    state = week.safetensors.torch.load_file(trained[1] / "router.safetensors")
    for change in (dict(idf={"one": 1.0}), dict(labels=["a"]), dict(tokenizer=3), dict(idf=7)):
        notes = json.dumps(json.loads(notes_of(trained[1])) | change)
        week.safetensors.torch.save_file(state, tmp_path / "o" / "router.safetensors", {"notes": notes})
        refused(call, week, "--out", tmp_path / "o", "--route", "x", names=["--route", "train first"])


def test_a_user_s_own_modules(tmp_path, capsys, monkeypatch):
    file, out = tsv(tmp_path / "p.tsv", n=40), tmp_path / "o"
    figures = call(week, "--tiny", "--out", out, "--prompts", file)
    assert figures["test_accuracy"] == 1 and math.isnan(figures["oos_auroc"])
    (decision,), lines = routed(capsys, "--out", out, "--route", "please go up 3 times")
    assert decision["probabilities"]["up"] > 0.5
    text = "".join(f"please go up {i} times\n" for i in range(9))
    monkeypatch.setattr(week.sys, "stdin", io.StringIO(text))
    decisions, lines = routed(capsys, "--out", out, "--route", "-")
    assert "up" in {decision["module"] for decision in decisions}
    replies = [line for line in lines if line.startswith("I can")]
    assert len(replies) == sum(d["module"] == "chat" for d in decisions), "a module without a function says nothing"


def test_ablations_change_the_result(tmp_path):
    figures = {idea: call(week, "--tiny", "--out", tmp_path, "--ablate", idea) for idea in ("none", "cuts", "leak")}
    assert len({tuple(f[k] for k in ("test_accuracy", "ece", "oos_auroc")) for f in figures.values()}) == 3
    assert figures["leak"]["baseline_accuracy"] > figures["none"]["baseline_accuracy"], "how good it looks"


def test_the_confusion_matrix_shows_what_is_counted():
    y, p = torch.tensor([0, 0, 0, 1, -1]), torch.eye(3)[[0, 0, 1, 1, 2]] * 0.8 + 0.05
    full = np.asarray(week.draw(["a", "b", "c"], y, p, torch.tensor(0.5)))
    unsure = np.asarray(week.draw(["a", "b", "c"], y, p, torch.tensor(0.9)))
    cell = lambda page, i, j: tuple(page[70 + 180 * i + 9, 150 + 180 * j + 9])  # noqa: E731
    assert cell(full, 0, 0) == (155, 155, 255) and cell(full, 0, 1) == (205, 205, 255)
    assert cell(full, 1, 1) == (105, 105, 255) and cell(full, 3, 2) == (105, 105, 255)
    assert cell(unsure, 0, 3) == cell(unsure, 1, 3) == cell(unsure, 3, 3) == (105, 105, 255)
    assert cell(full, 2, 0) == (255, 255, 255)


@pytest.mark.parametrize(
    "name, broken",
    [
        ("auroc", lambda a, b: (a[:, None] > b).float().mean()),
        ("calibration_error", lambda sure, right: (right.float() - sure).mean().abs().item()),
        ("fit", lambda net, x, y, decay, right=week.fit: right(net, x, y, 2 * decay)),
    ],
)
def test_the_checks_at_the_start_catch_broken_maths(name, broken, monkeypatch):
    monkeypatch.setattr(week, name, broken)
    with pytest.raises(SystemExit) as stop:
        week.run_checks()
    assert stop.value.code == 1
