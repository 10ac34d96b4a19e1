"""A conversation: an actor that remembers what was said, and asks two models what to say next.

Runs in the application's process. What an actor remembers is its attributes: when it fails, its supervisor
puts a new one in its place, which remembers nothing.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.chatbot.talk import Talk
from pool import PoolError, Predictor
from pool.flow import Actor

LEAST_PROBABILITY = 0.4  # below, a line is not understood
PATIENCE_S = 5.0  # with the models

_NAME = re.compile(r"\b(?:name is|name's|i am|i'm|call me)\s+(\w[\w'-]{0,30})", re.IGNORECASE)
_SUM = re.compile(r"(\d{1,9})\s*([-+*/x]|plus|minus|times|(?:divided )?by)\s*(\d{1,9})", re.IGNORECASE)
_OPERATIONS = {
    "+": operator.add,
    "plus": operator.add,
    "-": operator.sub,
    "minus": operator.sub,
} | dict.fromkeys(("*", "x", "times", "by"), operator.mul)


@dataclass
class Memory:
    """What a conversation knows of itself.

    Attributes:
        lines: Lines that the user has written.
        name: What the user is called, or "".
        topic: What was spoken about last, or "".
        told: How often each reply was given, by its place in the talk.
    """

    lines: int = 0
    name: str = ""
    topic: str = ""
    told: Counter[int] = field(default_factory=Counter)

    def shown(self) -> dict[str, Any]:
        """What the page shows of it."""
        return {"lines": self.lines, "name": self.name, "topic": self.topic}


@dataclass(frozen=True)
class Answer:
    """What a conversation says to a line.

    Attributes:
        kind: `reply`; `busy`, the line was not taken; `restarted`, the conversation failed and began anew.
        text: What it says.
        memory: What it remembers afterwards; None where it was not asked.
    """

    kind: str
    text: str
    memory: dict[str, Any] | None


class Conversation(Actor[str, Answer]):
    """One user's conversation.

    Args:
        predictor: Of the models `intent` and `reply`.
        talk: What can be said.
    """

    def __init__(self, predictor: Predictor, talk: Talk) -> None:
        self.predictor = predictor
        self.talk = talk
        self.memory = Memory()

    async def receive(self, line: str) -> Answer:
        """Answer a line.

        Raises:
            ZeroDivisionError: it asks to divide by 0. Nobody thought of that, as of most mistakes: the
                conversation fails, and only this one.
        """
        memory = self.memory
        memory.lines += 1
        try:
            intent = await self.understand(line)
            known = self.learn(line, intent)
            scores = await self.score(line, intent)
        except PoolError as e:  # which says nothing against the conversation
            return Answer("busy", f"I cannot think ({e.code}). Say that again, please.", memory.shown())
        return Answer("reply", self.say(intent, known, scores), memory.shown())

    async def understand(self, line: str) -> str:
        """What kind of line it is."""
        outputs = await self.predictor.predict("intent", {"text": [line]}, timeout=PATIENCE_S)
        is_clear = outputs["probability"][0] >= LEAST_PROBABILITY
        return str(outputs["intent"][0], "utf-8") if is_clear else "unknown"

    async def score(self, line: str, intent: str) -> npt.NDArray[np.float32]:
        """How well each reply suits it here."""
        inputs = {"text": [line], "intent": [intent], "topic": [self.memory.topic]}
        outputs = await self.predictor.predict("reply", inputs, timeout=PATIENCE_S)
        scores: npt.NDArray[np.float32] = outputs["scores"][0]
        return scores

    def learn(self, line: str, intent: str) -> dict[str, str]:
        """Take from a line what is to be remembered; gives what a reply may mention."""
        memory = self.memory
        found = _NAME.search(line) if intent == "introduce" else None
        if found:
            memory.name = found[1].title()
        known = {"lines": str(memory.lines), "name": memory.name, "topic": memory.topic}
        known["result"] = calculate(line) if intent == "calculate" else ""
        return {what: text for what, text in known.items() if text}

    def say(self, intent: str, known: dict[str, str], scores: npt.NDArray[np.float32]) -> str:
        """Choose a reply, and remember that it was given."""
        memory, replies = self.memory, self.talk.replies
        fits = self.fitting(intent, known) or self.fitting("unknown", known)  # a calculation without numbers
        if intent == "more":
            fits = self.untold() or fits
        if intent == "ask":
            chosen = max(fits, key=lambda i: scores[i])
        else:  # what tells most of what is known; what was said least often; what suits best
            chosen = max(fits, key=lambda i: (len(replies[i].needs), -memory.told[i], scores[i]))
        reply = replies[chosen]
        is_old_news = bool(reply.topic) and memory.told[chosen] > 0
        memory.told[chosen] += 1
        memory.topic = reply.topic or memory.topic
        text = reply.text.format(**known)
        return f"As I said: {text}" if is_old_news else text

    def fitting(self, intent: str, known: dict[str, str]) -> list[int]:
        """The replies to a kind of line that mention nothing but what is known."""
        replies = enumerate(self.talk.replies)
        return [i for i, reply in replies if reply.intent == intent and reply.needs <= known.keys()]

    def untold(self) -> list[int]:
        """What was not said of the topic yet."""
        topic, told = self.memory.topic, self.memory.told
        return [
            i for i, reply in enumerate(self.talk.replies) if topic and reply.topic == topic and not told[i]
        ]


def calculate(line: str) -> str:
    """The result of the first calculation in a line, or "" if there is none.

    Raises:
        ZeroDivisionError: it divides by 0.
    """
    found = _SUM.search(line)
    if not found:
        return ""
    first, sign, second = found.groups()
    is_division = sign == "/" or (sign.lower().endswith("by") and "divi" in line.lower())
    operation = operator.truediv if is_division else _OPERATIONS[sign.lower()]
    return f"{operation(int(first), int(second)):.12g}"
