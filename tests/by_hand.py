"""One prompt without an engine: what the engine must equal, token for token."""

import torch

from tiercel.engine.output_processor import OutputProcessor
from tiercel.model.prefill import prefill


def generate_reference(network, prompt, count, num_tokens=None):
    """Greedy tokens without a state: everything is computed again for every token.  num_tokens: those with a text."""
    tokens, device = list(prompt), network.embed.weight.device
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(network(torch.tensor(tokens, device=device), logits_to_keep=1)[-1][:num_tokens].argmax()))
    return tokens[len(prompt) :]


class Generation(OutputProcessor):
    """One sequence with a state: prefill, then one step for each token."""

    def __init__(self, network, prompt_ids, params, max_length, *, index=0, progress=None):
        super().__init__(None, network.config.vocab_size, prompt_ids, params, max_length, index=index)
        self.network, self.state, self.progress = network, network.new_state(), progress

    def run(self):
        logits_V = prefill(self.network, torch.tensor(self.prompt_ids), self.state, self.progress)
        while True:
            self.sample(logits_V)
            if self.finish_reason is not None:
                return self
            logits_V = self.network(torch.tensor(self.token_ids[-1:]), self.state, logits_to_keep=1)[-1]
