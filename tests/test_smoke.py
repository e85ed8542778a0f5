"""Each script on each device, with --tiny, from an empty folder that holds only that file, without a network."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from PIL import Image
from safetensors import safe_open

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
MAY_DIFFER = re.compile("second|_ms$|speed|slow|peak")  # figures of time and memory; everything else must agree
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
on_each_device = pytest.mark.parametrize("device", DEVICES)


def result_line(run):
    words = run.out.strip().splitlines()[-1].split()
    assert words[0] == "RESULT"
    return dict(word.split("=", 1) for word in words[1:])


def metrics(run):
    (path,) = (run.folder / "out").glob("*/metrics.json")
    return json.loads(path.read_text())


@each
@on_each_device
def test_runs_and_prints_its_result(script, device, tiny_runs):
    run = tiny_runs[script, device, 0]
    assert run.code == 0, run.err
    assert "Traceback" not in run.err
    assert result_line(run)
    assert any(line.startswith("ok ") for line in run.out.splitlines()), "no check ran"
    assert "FAIL" not in run.out
    assert run.cpu_seconds < 30, "--tiny is promised to take less than 15 s on one core of its own"


@each
@on_each_device
def test_writes_whole_files_and_only_below_out(script, device, tiny_runs):
    run = tiny_runs[script, device, 0]
    assert {path.name for path in run.folder.iterdir()} == {script.name, "out"}
    (out,) = (run.folder / "out").iterdir()
    assert out.name == script.stem[:6]
    assert not [path.name for path in out.rglob("*") if path.stat().st_size == 0 and not path.name.startswith(".")]
    hidden = [path.name for path in out.rglob(".*")]
    assert not [name for name in hidden if name[1:2].isdigit()], "a temporary file was left behind"


@each
@on_each_device
def test_metrics_tell_what_was_run(script, device, tiny_runs):
    run = tiny_runs[script, device, 0]
    found = metrics(run)
    assert found["config"]["tiny"] is True
    assert found["device"].startswith(device)
    assert found["torch"] == torch.__version__
    assert found["weights"]
    assert found["peak_bytes"] is None or found["peak_bytes"] > 1e6
    for key, value in result_line(run).items():
        assert key in found, f"RESULT has {key}, metrics.json has not"
        if isinstance(found[key], float):
            assert float(value) == pytest.approx(found[key], rel=1e-3)


@each
@on_each_device
def test_pictures_are_pictures(script, device, tiny_runs):
    run = tiny_runs[script, device, 0]
    pictures = [path for path in (run.folder / "out").rglob("*") if path.suffix in (".png", ".gif")]
    assert any(path.suffix == ".png" for path in pictures)
    for path in pictures:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) >= 100, f"{path.name} is too small to read"
        assert pixels.std() > 5, f"{path.name} shows nothing"
        assert len(np.unique(pixels)) > 8


@each
@on_each_device
def test_weights_are_safetensors(script, device, tiny_runs):
    run = tiny_runs[script, device, 0]
    assert not [
        path for path in (run.folder / "out").rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")
    ]
    for path in (run.folder / "out").rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            assert list(weights.keys())
            assert all(torch.isfinite(weights.get_tensor(name).float()).all() for name in weights.keys())


@each
def test_same_seed_same_result(script, tiny_runs):
    first, second = (tiny_runs[script, "cpu", n] for n in (0, 1))
    assert second.code == 0, second.err
    a, b = metrics(first), metrics(second)
    assert a.keys() == b.keys()
    for key in a:
        if not MAY_DIFFER.search(key):
            assert a[key] == b[key], key
    for path in (first.folder / "out").rglob("*.safetensors"):
        twin = second.folder / path.relative_to(first.folder)
        assert path.read_bytes() == twin.read_bytes(), f"{path.name} differs"
