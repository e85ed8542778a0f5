"""How good are week 8's digits?  By five judges that the script never saw, and that differ in kind.

    python tests/judges.py --data data out/week08            # any number of folders;  --tiny to see that it runs

Not a test. A Fréchet distance depends on its judge: on what the features are, and on what the judge was taught to
overlook. So one number says little, and here are five. Each judge reads the images of `samples.safetensors` (right),
and what its last layer reads, its features, is compared with that of the 10,000 test digits. The distance is given in multiples of
that of 1,000 real training digits, the first 100 of each class; so 1 is as far as real ones. "real" says how far five
other thousands of real training digits are, by the same measure: how much of the figure is chance.
"""

import argparse
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import week08_noisy_router as week  # noqa: E402


def plain(i, o, size=3, stride=1):
    return nn.Conv2d(i, o, size, stride, size // 2), nn.ReLU()


def normed(i, o, stride=1):
    return nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()


def head(wide, features=128):
    return nn.Linear(wide, features), nn.ReLU(), nn.Linear(features, 10)


def pool():
    return nn.MaxPool2d(2)


def mean():
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


# name: network, passes over the training digits, highest learning rate, are the digits distorted?
JUDGES = {
    "two convolutions, dense": (
        lambda: (*plain(1, 20, 5), pool(), *plain(20, 50, 5), pool(), nn.Flatten(), *head(2450)), 8, 2e-3, False),
    "dense, distorted": (
        lambda: (*plain(1, 32), *plain(32, 64, stride=2), *plain(64, 64, stride=2), nn.Flatten(), *head(3136, 64)),
        8, 2e-3, True),
    "normed, dense, distorted": (
        lambda: (*normed(1, 32), *normed(32, 32), pool(), *normed(32, 64), *normed(64, 64), pool(), *normed(64, 96),
                 nn.Flatten(), nn.Dropout(0.3), nn.Linear(4704, 128), nn.BatchNorm1d(128), nn.ReLU(),
                 nn.Linear(128, 10)), 6, 4e-3, True),
    "normed, mean over places": (
        lambda: (*normed(1, 32), *normed(32, 64, 2), *normed(64, 64), *normed(64, 128, 2), *normed(128, 128),
                 *mean(), nn.Linear(128, 10)), 5, 4e-3, False),
    "normed, mean, distorted": (
        lambda: (*normed(1, 24), *normed(24, 48, 2), *normed(48, 48), *normed(48, 96, 2), *normed(96, 96),
                 *mean(), nn.Linear(96, 10)), 6, 4e-3, True),
}  # fmt: skip


def train(net, x, y, steps, lr, distorted):
    """AdamW, a batch of 128, one cycle of the learning rate.   x (N, 1, 28, 28) from 0 to 1, y (N)"""
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        i = torch.randint(len(x), (128,))
        batch = week.warp(x[i], affine=0.12, shift=0.08, elastic=0.04) if distorted else x[i]
        loss = F.cross_entropy(net(batch.contiguous(memory_format=torch.channels_last)), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return net.eval().requires_grad_(False)


def features(net, x):
    """What the last layer reads.   (N, 1, 28, 28) -> (N, D)"""
    return torch.cat([net[:-1](part.contiguous(memory_format=torch.channels_last)) for part in x.split(500)])


def right(net, f, y):
    return (net[-1](f).argmax(1) == y).float().mean().item()


def thousand(x, y, k):
    """The k-th hundred of each class: (1000, 1, 28, 28)"""
    return torch.cat([x[y == digit][100 * k : 100 * k + 100] for digit in range(10)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders with a samples.safetensors of week 8")
    parser.add_argument("--data", default="data", help="folder with MNIST/raw")
    parser.add_argument("--threads", type=int, default=0, help="cores to use, 0 = all")
    parser.add_argument("--tiny", action="store_true", help="drawn digits, two steps a judge: to see that it runs")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    x, y, test, test_y, name = week.load_mnist(args.data, args.tiny)
    x, test = (t[:, None] / 255 for t in (x, test))
    files = [safetensors.torch.load_file(Path(folder, "samples.safetensors")) for folder in args.folders]
    print(f"{'judge':<26} |  reads {name} | real: five other thousands |", " | ".join(args.folders))
    for judge, (layers, passes, lr, distorted) in JUDGES.items():
        torch.manual_seed(0)
        started, steps = time.perf_counter(), 2 if args.tiny else passes * len(x) // 128
        net = train(nn.Sequential(*layers()), x, y, steps, lr, distorted)
        seen = features(net, test)
        unit = week.frechet(features(net, thousand(x, y, 0)), seen)
        others = range(1, 3 if args.tiny else 6)
        real = sorted(week.frechet(features(net, thousand(x, y, k)), seen) / unit for k in others)
        cells = [f"{right(net, seen, test_y):16.2%}", f"{real[0]:10.2f} to {real[-1]:.2f}         "]
        for images, labels in ((file["images"], file["labels"]) for file in files):
            f = features(net, images)
            cells.append(f"{right(net, f, labels):.1%} right, {week.frechet(f, seen) / unit:.2f}")
        print(f"{judge:<26} |", " | ".join(cells), f"| {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
