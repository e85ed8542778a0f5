"""What all scripts promise alike, as far as a test can hold it. A new script is picked up by itself."""

import ast
import dataclasses
import importlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT, SCRIPTS, call, start

PACKAGES = {"torch", "torchvision", "transformers", "diffusers", "safetensors", "pytest"}
BROUGHT_IN = {"numpy": "numpy", "PIL": "pillow", "tokenizers": "tokenizers", "huggingface_hub": "huggingface-hub"}
WEEKS = [
    "week01_mlp",
    "week02_transformer",
    "week03_gpt2_inspect",
    "week04_router",
    "week05_ddpm_forward",
    "week06_mini_unet",
    "week07_sd_hooks",
    "week08_noisy_router",
    "week09_lora",
    "week10_switch",
    "week11_profile",
    "week12_lora_router",
]
# Every script has functions of these names, each its own. Any other name that two scripts share means the same code.
ANATOMY = {"main", "run_checks", "train", "draw", "predict", "evaluate", "sample", "run", "load"}
BANNERS = ["Config", "Checks", "Data", "Training|Run", "[Pp]ictures?", "Plumbing", "Main"]
COMMON = {"device": "auto", "seed": 1337, "tiny": False}

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def source(script):
    return script.read_text(encoding="utf-8")


def tree(script):
    return ast.parse(source(script))


def module(script):
    return importlib.import_module(script.stem)


def functions(script):
    return {node.name: node for node in tree(script).body if isinstance(node, ast.FunctionDef)}


def imports(script):
    """The top-level names of all modules that a script imports, wherever in the file."""
    names = set()
    for node in ast.walk(tree(script)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


# ------------------------------------------------------------------------------------------------- the files


def test_the_layout_is_fixed():
    assert [script.stem for script in SCRIPTS] == [week for week in WEEKS if (ROOT / f"{week}.py").exists()]
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__pycache__"))}
    assert top - {f"{week}.py" for week in WEEKS} - {"out", "data", "venv"} == {"README.md", "tests"}


@each
def test_inline_metadata_names_just_what_is_imported(script):
    block = re.match(
        r"# /// script\n# requires-python = \"(.+)\"\n# dependencies = (\[(?:.+\n)+?)# ///\n", source(script)
    )
    assert block, "the file must begin with its PEP 723 block"
    assert block[1] == ">=3.10"
    listed = json.loads(block[2].replace("\n#", "\n"))
    names = [re.fullmatch(r"([a-z-]+)>=[\d.]+", requirement)[1] for requirement in listed]
    assert sorted(names) == sorted(BROUGHT_IN.get(name, name) for name in imports(script))


@each
def test_imports_nothing_but_the_agreed_packages(script):
    assert imports(script) <= PACKAGES - {"pytest"} | set(BROUGHT_IN)


@each
def test_numpy_is_used_only_where_a_package_brings_it_in(script):
    if not imports(script) & {"torchvision", "transformers", "diffusers", "numpy"}:
        assert not re.search(r"\.numpy\(|from_numpy|fromarray|safetensors", source(script))


@each
def test_nothing_dangerous_and_nothing_hidden(script):
    text = source(script)
    for word in (
        r"(?<!safetensors\.)torch\.(load|save)\(",
        "pickle",
        "trust_remote_code",
        "matplotlib",
        "TODO",
        "FIXME",
        "simplified",
    ):
        assert not re.search(word, text), word
    for node in ast.walk(tree(script)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type and getattr(node.type, "id", "") not in (
                "Exception",
                "BaseException",
            ), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"line {node.lineno}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.*")) + sorted(ROOT.glob("tests/*.py")), ids=lambda path: path.name)
def test_no_path_of_anybody_s_machine(path):
    if path.is_file():
        assert not re.search(r"(?<![\w.])/(home|root|Users|work|mnt)/\w", path.read_text(encoding="utf-8"))


@each
def test_line_budget(script):
    lines = source(script).splitlines()
    assert len(lines) <= 400
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 110]
    for node in ast.walk(tree(script)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, f"{node.name} is too long"
    comments = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source(script)).readline)
        if token.type == tokenize.COMMENT
    ]
    assert 0.05 < len(comments) / len(lines) < 0.2


@each
def test_sections_stand_in_the_same_order(script):
    banners = re.findall(r"^# -{20,} (.+)$", source(script), re.M)
    places = [next((i for i, banner in enumerate(banners) if re.search(name, banner)), None) for name in BANNERS]
    assert None not in places, banners
    assert places == sorted(places), banners
    assert not [line for line in source(script).splitlines() if line.startswith("# ---") and len(line) != 110]


@each
def test_plumbing_is_small(script):
    code = source(script).split(" Plumbing")[1].split(" Main\n")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 70


@each
def test_everything_has_a_docstring(script):
    head = ast.get_docstring(tree(script))
    assert len(head.splitlines()) <= 25 and "Expected:" in head and f"python {script.name}" in head
    for node in tree(script).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "Config":
            assert ast.get_docstring(node), node.name


def test_helpers_of_one_name_are_the_same_to_the_letter():
    first = {}
    for script in SCRIPTS:
        for name, node in functions(script).items():
            if name not in ANATOMY:
                known, other = first.setdefault(name, (ast.dump(node), script.name))
                assert ast.dump(node) == known, f"{name} in {script.name} differs from {name} in {other}"


# ------------------------------------------------------------------------------------------------- the flags


def import_them(folder):
    """A Python of its own imports the scripts, one after the other. What each of them printed and left behind."""
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT)!r})
sys.argv, sys.dont_write_bytecode = ["x", "--nonsense"], True
for name in {[script.stem for script in SCRIPTS]}:
    torch.manual_seed(3)
    try:
        __import__(name)
    except BaseException as error:
        print("stopped by", repr(error))
    print(name, torch.initial_seed(), os.listdir(), end="\\0", flush=True)
"""
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    done = subprocess.run(command, cwd=folder, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    return done.stdout.split("\0")


@each
@pytest.mark.early(by=import_them)
def test_importing_does_nothing(script, early):
    assert early[SCRIPTS.index(script)] == f"{script.stem} 3 []"


@each
def test_config_is_the_one_place_for_flags(script, capsys):
    Config = module(script).Config
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    assert {name: defaults[name] for name in COMMON} == COMMON
    assert defaults["out"] == f"out/{script.stem[:6]}"
    body = next(node for node in tree(script).body if getattr(node, "name", "") == "Config").body
    lines = source(script).splitlines()
    assert all(re.search(r"  # \S", lines[node.lineno - 1]) for node in body), "each field has its comment"
    with pytest.raises(SystemExit) as stop:
        module(script).parse_config(Config, {}, ["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(lines[node.lineno - 1] in shown for node in body), "--help prints the source of Config"


@each
def test_every_flag_reaches_its_field(script):
    mod = module(script)
    parse = lambda *flags: mod.parse_config(mod.Config, mod.TINY, list(flags))  # noqa: E731
    assert parse() == mod.Config()
    assert parse("--tiny") == mod.Config(tiny=True, **mod.TINY)
    assert mod.TINY and set(mod.TINY) < {field.name for field in dataclasses.fields(mod.Config)}
    for field in dataclasses.fields(mod.Config):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            assert getattr(parse(flag), field.name) is True and getattr(parse("--no" + flag[1:]), field.name) is False
            continue
        choices = getattr(field.type, "__args__", None)
        value = choices[-1] if choices else field.type(7)
        assert getattr(parse(flag, str(value)), field.name) == value
        assert getattr(parse("--tiny", flag, str(value)), field.name) == value, "--tiny must give way"


@each
def test_mistakes_get_one_line_and_exit_code_2(script, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "metrics.json").write_text("{}")
    mod = module(script)
    mistakes = [
        ("--nonsense",),
        ("--see", "1"),
        ("--seed", "x"),
        ("--seed", "-1"),
        ("--device", "toaster"),
        ("--device", "meta"),
        ("--device", "cuda:99"),
        ("--out", "file"),
        ("--out", "file/below"),
        ("--out", "theirs"),
    ]
    for field in dataclasses.fields(mod.Config):
        flag = "--" + field.name.replace("_", "-")
        if field.type in (int, float):
            mistakes += [(flag, "-1"), (flag, "many")] + [(flag, "nan")] * (field.type is float)
        elif getattr(field.type, "__args__", None):
            mistakes += [(flag, "nonsense")]
        elif field.name in ("data", "model", "images"):
            mistakes += [(flag, "no/such/folder")]
    for flags in mistakes:
        refused(call, mod, "--tiny", *flags, names=flags[:1] + flags[1:2])
    monkeypatch.setattr(mod, "run_checks", lambda *args: pytest.fail("an --out of no use must show before the work"))
    refused(call, mod, "--tiny", "--out", "theirs")
    assert (tmp_path / "file").read_text() == "in the way"
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["metrics.json"]


def interrupt_it(folder, script):
    """Ctrl-C as soon as the first line is there."""
    process = start(script, folder / "run", "--tiny")
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return first, process.returncode, err, list((folder / "run" / "out").rglob(".[0-9]*"))


@each
@pytest.mark.early(by=interrupt_it)
def test_ctrl_c_ends_with_one_line(script, early):
    first, code, err, left_behind = early
    assert first.startswith("ok ")
    assert code == 130
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not left_behind, "a temporary file was left behind"


# -------------------------------------------------------------------------------------------------- the README


def commands():
    """Every line of the README's sh blocks."""
    return [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]


def test_readme_starts_with_the_commands():
    first = next(i for i, line in enumerate(README.splitlines(), 1) if "python week01_mlp.py" in line)
    assert first <= 15
    installs = [line for line in commands() if "pip install" in line]
    assert len(installs) == 2
    for line in installs:
        assert set(re.search(r"pip install ([a-z ]+)", line)[1].split()) == PACKAGES


def test_readme_commands_parse():
    seen = 0
    for line in commands():
        for part in re.split(r"&&|\|", line.split("  #")[0]):
            words = shlex.split(part)
            name = next((word for word in words if word.endswith(".py")), None)
            if name and name.startswith("week"):
                mod = importlib.import_module(name[:-3])
                mod.parse_config(mod.Config, mod.TINY, words[words.index(name) + 1 :])
                seen += 1
            elif name:
                assert (ROOT / name).exists(), name
    assert seen >= len(SCRIPTS)


def test_readme_has_a_row_for_every_week():
    rows = re.findall(r"^\| *(\d+) *\|(.+)$", README, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 13))
    for week, (_, row) in zip(WEEKS, rows):
        assert f"{week}.py" in row
        assert ("not there yet" in row) != (ROOT / f"{week}.py").exists()
    assert README.rstrip().splitlines()[-1] and re.findall(r"^## (.+)$", README, re.M)[-1] == "Licence"


def test_readme_shows_every_picture_and_links_to_nothing_that_is_missing():
    shown = set(re.findall(r"\.github/\w+\.png", README))
    assert shown == {f".github/{path.name}" for path in (ROOT / ".github").glob("*.png")}
    rows = re.findall(r"^\| \d+ \|.*$", README, re.M)[:12]
    assert all(f'src=".github/{week[:6]}.png"' in row for week, row in zip(WEEKS, rows, strict=True))
    heads = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", README, re.M)}
    links = re.findall(r"\]\(#(.+?)\)", re.sub(r"\n", " ", README))
    assert links and set(links) <= heads


def test_ci_runs_the_readme_s_own_command():
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert sum("-m pytest" in line for line in commands()) == 1
