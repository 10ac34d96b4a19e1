"""What the chatbot can say, read from talk.json. Pure; the training and the conversations share it."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """One thing to say.

    Attributes:
        intent: The kind of line that it answers.
        text: With the names of what it tells in braces: `{name}`, `{topic}`, `{lines}`, `{result}`.
        topic: What it is about, or "".
        says: Lines that it answers.
    """

    intent: str
    text: str
    topic: str
    says: tuple[str, ...]

    @property
    def needs(self) -> frozenset[str]:
        """The names in braces."""
        return frozenset(name for _, name, _, _ in string.Formatter().parse(self.text) if name)


class Talk(NamedTuple):
    """All that can be said.

    Attributes:
        intents: Kind of line -> such lines; a `{name}` stands for any of `names`.
        names: Of people.
        replies: In the order of the reply model's scores.
    """

    intents: dict[str, tuple[str, ...]]
    names: tuple[str, ...]
    replies: tuple[Reply, ...]

    @property
    def topics(self) -> tuple[str, ...]:
        """What replies are about."""
        return tuple(dict.fromkeys(reply.topic for reply in self.replies if reply.topic))


def load() -> Talk:
    """Read talk.json."""
    told: dict[str, Any] = json.loads(Path(__file__).with_name("talk.json").read_text("utf-8"))
    replies = tuple(
        Reply(each.get("intent", "ask"), each["text"], each.get("topic", ""), tuple(each.get("says", ())))
        for each in told["replies"]
    )
    intents = {intent: tuple(lines) for intent, lines in told["intents"].items()}
    intents["ask"] = tuple(line for reply in replies for line in reply.says)
    return Talk(intents, tuple(told["names"]), replies)
