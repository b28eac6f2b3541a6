"""What one decode step has to read from memory: its lower bound on time is bytes / bandwidth.

    bytes(step) = W + R · (t · K + S)

W: every matrix once (of experts those that R rows can touch, of an untied embedding the rows of the tokens) ·
R rows · t tokens of context · K keys and values of one token · S recurrent state.  What is written is next to
nothing: one token's keys and values, and inputs of the open chunk (the state itself is rewritten once per chunk).
"""

from __future__ import annotations

from tiercel.model.decoder import Decoder
from tiercel.model.layers import named_weights
from tiercel.model.parameters import parameters
from tiercel.plan import state_bytes


def bytes_per_step(network: Decoder, context: int, rows: int) -> int:
    """W + R · (t · K + S) with the network's own bytes; a sliding window bounds t."""
    return weight_reads(network, rows) + rows * (_kv_reads(network, context) + state_bytes(network.config))


def weight_bytes(network: Decoder) -> int:
    """What all weights take in memory; shared ones count once."""
    return sum(_holdings(network).values())


def weight_reads(network: Decoder, rows: int) -> int:
    """The part of them that a step of `rows` rows reads."""
    config, total = network.config, 0
    params = parameters(config)
    for name, count in _holdings(network).items():
        if name.startswith("embed.") and not config.tied:
            count = count * rows // config.vocab_size
        elif name in params and len(params[name].shape) == 3:
            feed_forward = config.layers[int(name.split(".")[1])].feed_forward
            assert feed_forward is not None
            active, experts = feed_forward.routing()
            count = count * min(experts, rows * active) // experts
        total += count
    return total


def _holdings(network: Decoder) -> dict[str, int]:
    """Name → bytes of every parameter and packed matrix; shared ones once."""
    found: dict[str, int] = {}
    for name, weight in named_weights(network):
        parts = weight if isinstance(weight, list) else [weight]
        found[name] = sum(part.nbytes for part in parts)
    return found


def _kv_reads(network: Decoder, context: int) -> int:
    """Keys and values of one row."""
    mixers = [mixer for layer in network.config.layers for mixer in layer.mixers if not mixer.recurrent]
    return int(sum(sum(mixer.cost(1, context).reads.values()) for mixer in mixers)) * network.dtype.itemsize
