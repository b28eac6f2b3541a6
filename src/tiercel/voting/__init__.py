"""Many traces, one answer: self-consistency and DeepConf.

At the level of `llm`, because run, serve and evals all hold votes; `evals/` has what is about benchmarks alone.

    confidence.py  the formulas        answers.py  text → answer         settings.py  the methods
    tally.py       traces → vote       voter.py    traces in the engine   pool.py      votes among stored traces
"""

from tiercel.voting.settings import METHODS, VoteSettings
from tiercel.voting.tally import Trace, Vote
from tiercel.voting.voter import Voter, check, vote

__all__ = ["METHODS", "Trace", "Vote", "VoteSettings", "Voter", "check", "vote"]
