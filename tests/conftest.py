"""What the tests share. Every week*.py at the top level is found here: a new script is tested without being named."""

import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("week*.py"))
sys.path.insert(0, str(ROOT))  # so that a test can say `import week01_mlp`
torch.set_num_threads(1)  # the tensors of the tests are small, and the other cores have work of their own

# Loaded by every Python that a smoke test starts: whoever asks for the network dies with a code of its own. Ctrl-C is
# heard, even where the tests run in the background of a shell, which tells its children not to listen. And at the end
# it says for how long it had a processor: the time on the wall depends on who else is on the machine.
NO_NETWORK = """
import atexit, os, signal, socket, time
def report(path=os.path.join(os.path.dirname(__file__), "cpu_seconds")):
    with open(path, "w") as file:
        file.write(str(time.process_time()))
atexit.register(report)
signal.signal(signal.SIGINT, signal.default_int_handler)
def refuse(*args, **kwargs):
    os.write(2, b"the network was touched\\n")
    os._exit(99)
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
"""


@pytest.fixture(scope="session", autouse=True)
def empty_folder(tmp_path_factory):
    """Tests work in an empty folder: what is in the reader's own data/ must not change them."""
    os.chdir(tmp_path_factory.mktemp("empty"))


@dataclass
class Run:
    """One finished run of a script."""

    folder: Path  # where it ran; held nothing but the script before
    code: int
    out: str
    err: str
    cpu_seconds: float  # of this process alone, the imports included


def start(script, folder, *flags):
    """Start a script as a stranger would: copied alone into an empty folder, one thread, no network."""
    folder.mkdir(parents=True)
    (folder / script.name).write_bytes(script.read_bytes())
    guard = folder.parent / f"{folder.name}.guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(NO_NETWORK)
    env = {**os.environ, "PYTHONPATH": str(guard), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, script.name, *flags],
        cwd=folder,
        env=env,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(script, folder, *flags):
    """Run a script to its end."""
    process = start(script, folder, *flags)
    out, err = process.communicate(timeout=900)  # a crowded machine takes its time
    report = folder.parent / f"{folder.name}.guard" / "cpu_seconds"
    return Run(folder, process.returncode, out, err, float(report.read_text()) if report.exists() else math.nan)


class Background:
    """Work that other processes do while the tests run in this one: one piece at a time for each further core.

    A test that has to wait for a piece does the next ones in line meanwhile, so that no core idles.
    """

    def __init__(self):
        self.line, self.results = deque(), {}
        self.workers = [threading.Thread(target=self.work) for _ in range(max(1, os.cpu_count() - 1))]

    def start(self, key, function, *args):
        """Put function(*args) in the line, unless something of that key was there before."""
        if key not in self.results:
            self.results[key] = Future()
            self.line.append((self.results[key], function, args))

    def work(self, enough=lambda: False):
        while not enough():
            try:
                result, function, args = self.line.popleft()
            except IndexError:
                return
            try:
                result.set_result(function(*args))
            except Exception as error:  # it is the test that fails, where it asks for the result
                result.set_exception(error)

    def result(self, key):
        self.work(enough=self.results[key].done)
        return self.results[key].result()


class TinyRuns:
    """tiny_runs[script, device, n]: the n-th --tiny run (n = 0, 1; the same seed). Each is run once, for all tests.

    The second one works in a folder whose name has spaces and letters from beyond ASCII.
    """

    def __init__(self, background, root):
        self.background, self.root = background, root

    def start(self, script, device, n):
        folder = self.root / f"{script.stem}-{device}" / ("plain", "with spaces é 数")[n]
        self.background.start((script, device, n), run, script, folder, "--tiny", "--device", device)

    def __getitem__(self, key):
        self.start(*key)
        return self.background.result(key)


def pytest_configure(config):
    config.addinivalue_line("markers", "early(by): the fixture early has the result of by(folder, ...)")


def pytest_collection_modifyitems(items):
    """What does nothing but wait for other processes comes last. The tests of the weeks run meanwhile."""
    waits = {"early", "tiny_runs"}
    items.sort(key=lambda item: not waits.isdisjoint(item.fixturenames) and not item.path.stem.startswith("test_week"))


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """Starts, before the first test, what the selected tests will wait for, in their order."""
    work = Background()
    work.tiny_runs = TinyRuns(work, tmp_path_factory.mktemp("tiny"))
    for item in request.session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "early" in item.fixturenames:
            by, *args = early_key(item)
            work.start((by, *args), by, tmp_path_factory.mktemp("early"), *args)
        device = params.get("device", "cpu")
        if "tiny_runs" in item.fixturenames and (device == "cpu" or torch.cuda.is_available()):
            for n in range(1 + (item.originalname == "test_same_seed_same_result")):
                work.tiny_runs.start(params.get("script") or this_week_s(item.path), device, n)
    for worker in work.workers:
        worker.start()
    yield work
    work.line.clear()
    for worker in work.workers:
        worker.join()


@pytest.fixture(scope="session")
def tiny_runs(background):
    return background.tiny_runs


@pytest.fixture
def early(request, background):
    """What the function of this test's early mark returned. It runs once for all tests that ask for the same."""
    return background.result(early_key(request.node))


def early_key(item):
    """The function of a test's early mark, and which of the test's parameters it wants beside a folder."""
    by = item.get_closest_marker("early").kwargs["by"]
    return by, *(item.callspec.params[name] for name in [*inspect.signature(by).parameters][1:])


def this_week_s(path):
    """The script that a test_weekNN.py is about."""
    return next(script for script in SCRIPTS if script.stem[:6] == path.stem[5:])


@pytest.fixture(scope="module")
def tiny(request, tiny_runs, tmp_path_factory):
    """This week's --tiny run: its figures, a copy of its --out that a test may change, what it printed."""
    done = tiny_runs[this_week_s(request.path), "cpu", 0]
    assert done.code == 0, done.err
    (out,) = (done.folder / "out").iterdir()
    out = shutil.copytree(out, tmp_path_factory.mktemp("tiny") / "out")
    return json.loads((out / "metrics.json").read_text()), out, done.out


def call(module, *flags):
    """Run a script's main in this process with command-line flags."""
    return module.main(module.parse_config(module.Config, module.TINY, [str(flag) for flag in flags]))


@pytest.fixture
def refused(capsys):
    """refused(f, ..., names=...): f(...) must stop with exit code 2 and one line on stderr that has the names in it."""

    def expect(function, *args, names=()):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args)
        err = capsys.readouterr().err
        assert stop.value.code == 2, err
        assert len(err.strip().splitlines()) == 1, err
        assert all(name in err for name in names), err
        return err

    return expect
