"""A run that test_ranks.py makes on one rank, and as a process of its own on two:  two_ranks.py FOLDER…

`run` leaves what the first rank has in the end: the log's numbers, and every weight put together.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from tiercel.runtime.exit import hard_exit
from tiercel.train import parallel
from tiercel.train.data import Batches, Documents
from tiercel.train.loop import Settings, fit
from tiercel.train.start import evaluation


def run(folder: Path) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(3, 25, 40).tolist()
    docs = Documents.of((tiny.ids(n, i), random.integers(0, 2, n)) for i, n in enumerate(lengths))
    network = tiny.network(tiny.EVERY_KIND, native=False).requires_grad_(True)
    # every step is clipped, and the rows of the two ranks hold different numbers of counted tokens
    settings = Settings(steps=5, lr=1e-3, clip=0.5, accumulate=2, save_every=3, out=folder, resume=True, quiet=True)
    result = fit(network, Batches(docs, rows=4, length=30, seed=3), settings, held_out=evaluation(docs, 4, 30))
    plain = parallel.gathered(network)
    if parallel.ranks().first:
        torch.save({name: p.detach() for name, p in plain.named_parameters()}, folder / "weights.pt")
        (folder / "told.json").write_text(json.dumps(result.log))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        run(Path(name))
    hard_exit()
