"""What became of requests: each is answered, wrong, lost or an error, and counted once. Pure.

Kept by every client process of `pool chaos`, sent to the command as JSON, and added up there.
"""

from __future__ import annotations

import msgspec

from pool.errors import ModelError, PoolError, WorkerLost

# Errors that only a request at fault may get.
_GUILT = (ModelError.code, WorkerLost.code)

# Sentences kept about what should not have been: the first few tell as much as all.
_EXAMPLES_MAX = 5


class Tally(msgspec.Struct):
    """Counts of settled requests; one that is under way is in none of them.

    Attributes:
        requests: Settled: answered + wrong + lost + all errors.
        answered: Right, to the bit.
        wrong: Answered with something else; or answered though the request was at fault.
        lost: Not answered within the client's patience.
        duplicated: Replies to a request that had one, or to none that was ever sent.
        errors: Typed errors, by code.
        harmed: Those of them that blame the request (MODEL_ERROR, WORKER_LOST) though it was innocent.
        examples: Sentences about the first few that were wrong, lost, duplicated or harmed.
    """

    requests: int = 0
    answered: int = 0
    wrong: int = 0
    lost: int = 0
    duplicated: int = 0
    errors: dict[str, int] = {}
    harmed: dict[str, int] = {}
    examples: list[str] = []

    def answer(self, mistake: str = "") -> None:
        """It was answered; `mistake` says what is wrong with the answer, if anything is."""
        self.requests += 1
        if mistake:
            self.wrong += 1
            self._tell(mistake)
        else:
            self.answered += 1

    def fail(self, error: PoolError, *, is_innocent: bool) -> None:
        """It got a typed error."""
        self.requests += 1
        self.errors[error.code] = self.errors.get(error.code, 0) + 1
        if is_innocent and error.code in _GUILT:
            self.harmed[error.code] = self.harmed.get(error.code, 0) + 1
            self._tell(f"harmed: {error.code}: {error.message}")

    def lose(self, example: str) -> None:
        """It got no reply in time."""
        self.requests += 1
        self.lost += 1
        self._tell(example)

    def repeat(self, example: str) -> None:
        """A reply came that nobody waits for."""
        self.duplicated += 1
        self._tell(example)

    def add(self, other: Tally) -> None:
        """Take in the counts of another."""
        self.requests += other.requests
        self.answered += other.answered
        self.wrong += other.wrong
        self.lost += other.lost
        self.duplicated += other.duplicated
        for mine, theirs in ((self.errors, other.errors), (self.harmed, other.harmed)):
            for code, count in theirs.items():
                mine[code] = mine.get(code, 0) + count
        self._tell(*other.examples)

    def _tell(self, *examples: str) -> None:
        """Keep a few, before all those of what must never happen."""
        every = sorted([*self.examples, *examples], key=lambda each: each.startswith("harmed"))
        self.examples = every[:_EXAMPLES_MAX]
