"""What the tests share. Every week*.py at the top level is found here: a new script is tested without being named."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("week*.py"))
sys.path.insert(0, str(ROOT))  # so that a test can say `import week01_mlp`

# Loaded by every Python that a smoke test starts: whoever asks for the network dies with a code of its own. And
# Ctrl-C is heard, even where the tests run in the background of a shell, which tells its children not to listen.
NO_NETWORK = """
import os, signal, socket
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
    seconds: float


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
    started = time.perf_counter()
    process = start(script, folder, *flags)
    out, err = process.communicate(timeout=300)
    return Run(folder, process.returncode, out, err, time.perf_counter() - started)


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """tiny_runs[script, device, n]: the n-th --tiny run (n = 0, 1; the same seed), all started early, one to a core.

    The second one works in a folder whose name has spaces and letters from beyond ASCII.
    """
    root = tmp_path_factory.mktemp("tiny")
    pool = ThreadPoolExecutor(os.cpu_count())
    started = {}
    for script in SCRIPTS:
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            for n, name in enumerate(("plain", "with spaces é 数")):
                folder = root / f"{script.stem}-{device}" / name
                started[script, device, n] = pool.submit(run, script, folder, "--tiny", "--device", device)

    class Results:
        def __getitem__(self, key):
            return started[key].result()

    yield Results()
    pool.shutdown(cancel_futures=True)


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
