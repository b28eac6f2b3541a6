"""States saved by earlier builds still load, and continue as they did there (golden/make_sessions.py)."""

import json

import pytest
import torch

from golden.make_sessions import FOLDER, NETWORKS, ids, network
from tiercel import version
from tiercel.model import state_file

ANSWERS = json.loads((FOLDER / "answers.json").read_text())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_state_saved_by_002aba0_continues(name, monkeypatch):
    monkeypatch.setattr(version, "__version__", "0.1.0")  # the file names the version that wrote it
    net = network(name)
    state = net.new_state()
    tokens, earlier = state_file.load(state, FOLDER / f"{name}.state")
    assert tokens == ids().tolist() and state.length == 75 and [s.length for s in earlier] == [25, 60]
    end = net(torch.tensor([7, 9, 11]), state)[-1, :20]
    assert torch.allclose(end, torch.tensor(ANSWERS[name]["end"]), atol=1e-4)
    state.restore(earlier[0])
    early = net(torch.tensor([7, 9]), state)[-1, :20]
    assert torch.allclose(early, torch.tensor(ANSWERS[name]["early"]), atol=1e-4)
    state.restore(earlier[1])
    state.trim(state.length - 2)
    again = net(ids()[58:], state)
    fresh = net(ids())[58:]
    assert torch.allclose(again, fresh, atol=1e-4)
