#!/usr/bin/env bash
# tokenizers 0.23.3: Tokenizer.encode(text) keeps Python's global lock until the whole text is cut and merged, so
# a server that tokenizes one long prompt in a worker thread stops its event loop with it. encode_batch([text])
# and encode_batch_fast([text]) give the same ids and release the lock.
# Needs Python 3.11 and a package registry; installs into a temporary folder, exits 0 while the behaviour is as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cd "$work"
TRANSFORMERS_VERBOSITY=critical HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PY'
import threading
import time

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words = [f"word{i} and {i * i} others, state space {i % 97}" for i in range(4000)]
tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
text = " ".join(words) * 12


def longest_wait(call):
    """The longest time for which a second thread did not come to its turn, over the time of the call."""
    ticks, done = [], threading.Event()

    def watch():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.05)
    began = time.perf_counter()
    out = call()
    ended = time.perf_counter()
    done.set()
    watcher.join()
    inside = [began, *(t for t in ticks if began <= t <= ended), ended]
    return out, max(b - a for a, b in zip(inside, inside[1:])) / (ended - began), ended - began


calls = {
    "encode": lambda: tokenizer.encode(text).ids,
    "encode_batch": lambda: tokenizer.encode_batch([text])[0].ids,
    "encode_batch_fast": lambda: tokenizer.encode_batch_fast([text])[0].ids,
}
ids, shares = {}, {}
for name, call in calls.items():
    call()
    tries = [longest_wait(call) for _ in range(5)]
    ids[name], shares[name] = tries[0][0], sorted(share for _, share, _ in tries)[2]
    print(f"tokenizers {tokenizers.__version__}  {name:18s} {len(ids[name])} ids of {len(text)} characters; "
          f"a second thread waits for {shares[name]:.0%} of the call (median of 5)")
assert ids["encode"] == ids["encode_batch"] == ids["encode_batch_fast"]
assert shares["encode"] > 0.6 > 0.4 > max(shares["encode_batch"], shares["encode_batch_fast"])
PY
