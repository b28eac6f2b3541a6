"""Makes golden/sessions: states as commit 002aba0 saved them, and what its networks answer after them.

    PYTHONPATH=<that checkout>/src python tests/golden/make_sessions.py

Weights are plain arithmetic, so that every machine has the same.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from tiercel.model.decoder import Decoder

FOLDER = Path(__file__).parent / "sessions"
NETWORKS = {
    "hybrid": ("attention+mamba2 mamba1 mamba2/moe attention/-", {}),
    "windowed": ("attention mamba2", {"window": 24}),
}


def network(name: str) -> Decoder:
    words, changes = NETWORKS[name]
    net = Decoder(tiny.config(words, **changes))
    with torch.no_grad():
        for i, (name, p) in enumerate(net.named_parameters()):
            n = torch.arange(p.numel(), dtype=torch.int64) * 2654435761 + 40503 * i
            u = (n % 65536).float() / 65536 - 0.5
            if "norm" in name:
                u = 1 + 0.1 * u
            elif "A_log" in name or "dt_bias" in name:
                u = u + (1 if "A_log" in name else -2)
            elif not name.endswith(".D"):
                u = u * (2.0 if "embed" in name else 0.5)
            p.copy_(u.view(p.shape))
    net.eval().requires_grad_(False)
    net.pack()
    return net


def ids() -> torch.Tensor:
    return torch.arange(75) * 37 % 256


@torch.no_grad()
def main() -> None:
    answers = {}
    for name in NETWORKS:
        net = network(name)
        state = net.new_state()
        net(ids()[:25], state)
        early = state.snapshot()
        net(ids()[25:60], state)
        earlier = [early, state.snapshot()]
        for token in ids()[60:]:
            net(token.view(1), state)
        state.save(FOLDER / f"{name}.state", ids().tolist(), earlier)
        end = net(torch.tensor([7, 9, 11]), state)[-1]
        state.restore(early)
        answers[name] = {"end": end[:20].tolist(), "early": net(torch.tensor([7, 9]), state)[-1, :20].tolist()}
    (FOLDER / "answers.json").write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()
