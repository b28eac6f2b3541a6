"""`tiercel run --vote K`: the live line, the answer, the table, and what is refused before a model is loaded."""

import json
import sys

import pytest
from typer.testing import CliRunner

import tiny
from tiercel.commands import cli, run
from tiercel.commands.chat.render import answer_by_vote
from tiercel.sampling.params import SamplingParams
from tiercel.voting import VoteSettings

TOLD = {
    "text": "It is 42.", "thinking": "", "answer": "42", "traces": 5, "counted": 4, "stopped": 1, "threshold": 7.5,
    "consensus": True, "fallback": False, "prompt_tokens": 30, "cached_tokens": 0, "completion_tokens": 99,
    "seconds": 2.0, "table": [{"answer": "42", "votes": 3, "weight": 24.0, "share": 0.8},
                              {"answer": "\x1b[31m6", "votes": 1, "weight": 6.0, "share": 0.2}],
}  # fmt: skip


class ChatBackend:
    def vote(self, prompt, params, settings, progress, *, raw=False, think=None):
        progress({"k": settings.k, "done": 3, "stopped": 1, "leader": "42", "share": 0.75})
        return dict(TOLD)


def ask(**more):
    return answer_by_vote(ChatBackend(), "?", SamplingParams(), VoteSettings(k=16), **more)


def test_a_live_line_on_a_terminal_and_only_there(capsys, monkeypatch):
    ask()
    assert capsys.readouterr() == ("It is 42.\n", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ask()
    out, err = capsys.readouterr()
    assert out == "It is 42.\n" and "3 of 16 answers, 1 stopped early, leading: 42 (75 %)" in err
    assert err.endswith("\r\x1b[K"), "nothing of it stays"


def test_the_table_with_verbose(capsys, monkeypatch):
    ask(verbose=True)
    lines = capsys.readouterr().err.splitlines()
    assert ["42", "3", "24.00", "80", "%"] in [line.split() for line in lines]
    assert "answers begun:        5, 4 counted, 1 stopped early" in lines
    assert "ended by:             consensus" in lines and "eval count:           99 token(s)" in lines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ask(verbose=True)
    assert "\x1b[31m" not in capsys.readouterr().err, "an answer never steers the terminal"


def test_a_vote_of_a_real_model(tmp_path):
    folder = tiny.checkpoint(tmp_path, template=tiny.TEMPLATE)
    words = ["run", str(folder), "3 + 4", "--vote", "6", "--vote-method", "deepconf-low", "--vote-set", "window=3",
             "--temperature", "9", "--seed", "1", "--max-tokens", "8", "--json"]  # fmt: skip
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["settings"]["window"] == 3 and told["threshold"] > 0
    assert told["completion_tokens"] == sum(trace["tokens"] for trace in told["details"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["--vote", "0"], "vote.k must be a whole number from 1"),
        (["--vote", "4", "--vote-method", "loudest"], "vote.method must be one of"),
        (["--vote-method", "deepconf"], "need --vote K"),
        (["--vote", "4", "--vote-set", "window"], "takes NAME=VALUE"),
        (["--vote", "4", "--vote-set", "voices=3"], "vote has no 'voices'"),
    ],
)
def test_refusals(words, said, monkeypatch):
    monkeypatch.setattr(run, "_open", lambda *_, **__: pytest.fail("no model is loaded for this"))
    result = CliRunner().invoke(cli.app, ["run", "smollm2", "hi", *words])
    assert result.exit_code == 2 and said in result.output + str(result.stderr)
