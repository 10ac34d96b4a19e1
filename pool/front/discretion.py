"""What of an error's sentence a client may read. Pure; runs in the front.

Where files lie on the server, and where in its memory things are, is no business of whoever may send a
request: the name of a shared region in an error message has led to running code elsewhere. The log has all.
"""

from __future__ import annotations

import re

# Codes whose sentences hold words of others: the model's, the framework's, the system's. The other sentences
# are made of the request and the signature alone.
_FOREIGN = frozenset({"INTERNAL", "MODEL_ERROR", "MODEL_LOAD", "UNAVAILABLE", "WORKER_LOST"})

_PATH = re.compile(r"(?<![\w./-])(?:\w+://)?/(?:[^\s/'\"`,:;<>()\[\]{}|]+/)*([^\s/'\"`,:;<>()\[\]{}|]*)")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{5,}")
_MEMFD = re.compile(r"\bmemfd:\S*")


def discreet(code: str, sentence: str) -> str:
    """The sentence without directories, addresses and names of memory.

    Args:
        code: Of the error.
        sentence: Of any length.
    """
    if code not in _FOREIGN:
        return sentence
    sentence = _PATH.sub(lambda match: f"…/{match[1]}" if len(match[0]) > 1 else match[0], sentence)
    return _MEMFD.sub("memfd:…", _ADDRESS.sub("0x…", sentence))
