"""examples/chatbot: each conversation with a state of its own, over websockets and in a real browser."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `examples` is not installed")
pytest.importorskip("uvicorn", reason="the extra `examples` is not installed")
pytest.importorskip("websockets", reason="the extra `examples` is not installed")

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from examples.chatbot import talk
from examples.chatbot.__main__ import make_models
from examples.chatbot.application import answer, application
from examples.chatbot.conversation import Conversation, calculate
from pool import Pool
from tests.chromium import PROGRAM, chromium

ROOT = Path(talk.__file__).parents[2]
PATIENCE_S = 60.0

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The example's own, beside models that were trained for this run."""
    folder = tmp_path_factory.mktemp("chatbot")
    make_models(folder / "models")
    return Path(shutil.copy(ROOT / "examples" / "chatbot" / "pool.toml", folder))


@pytest.fixture(scope="module")
def address(config):
    """Where `python -m examples.chatbot` serves."""
    log = config.with_name("log")
    command = [sys.executable, "-m", "examples.chatbot", "--port=0", f"--config={config}"]
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(r"running on http://(\S+)", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[1]
        server.terminate()
        server.wait(PATIENCE_S)
        assert "Application shutdown complete" in log.read_text()
    finally:
        server.kill()
        server.wait()


def status(address):
    with urllib.request.urlopen(f"http://{address}/status") as reply:
        return json.load(reply)


class Chat:
    """A conversation by websocket."""

    def __init__(self, socket):
        self.socket, self.n = socket, 0

    async def say(self, text):
        self.n += 1
        await self.socket.send(json.dumps({"n": self.n, "text": text}))
        answer = json.loads(await asyncio.wait_for(self.socket.recv(), PATIENCE_S))
        assert answer.pop("n") == self.n
        return answer

    async def hear(self, text):
        answer = await self.say(text)
        assert answer["kind"] == "reply"
        return answer["text"]


def new_key():
    return os.urandom(16).hex()


def chatting(address, key=None):
    return connect(f"ws://{address}/chat?id={key or new_key()}")


# -- without a server ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ("what is 12 times 7?", "84"),
        ("3+4", "7"),
        ("10 minus 12", "-2"),
        ("divide 9 by 4", "2.25"),
        ("100 divided by 8", "12.5"),
        ("divide me 3 + 4 apples", "7"),
        ("multiply 5 by 5", "25"),
        ("6 X 7", "42"),
        ("8/2", "4"),
        ("nothing to do", ""),
    ],
)
def test_calculations(line, result):
    assert calculate(line) == result


def test_there_is_something_to_say_to_every_kind_of_line():
    told = talk.load()
    for intent in told.intents:
        needs = [reply.needs for reply in told.replies if reply.intent == intent]
        least = (
            {"lines", "result"}
            if intent == "calculate"
            else {"lines", "name"}
            if intent == "introduce"
            else {"lines"}
        )
        assert any(each <= least for each in needs), intent
    assert {need for reply in told.replies for need in reply.needs} == {"lines", "name", "topic", "result"}
    assert all(reply.says for reply in told.replies if reply.topic)
    assert {reply.intent for reply in told.replies} == set(told.intents)


def test_the_applications_leave_tensorflow_to_the_workers():
    script = (
        "import sys, examples.chatbot.__main__, examples.faces.cascade; sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_without_models_a_conversation_says_so_and_remembers(config):
    async def main():
        conversation = Conversation(Pool.from_file(config), talk.load())
        conversation.memory.name = "Ann"
        answer = await conversation.receive("hello")
        assert (answer.kind, answer.memory["name"]) == ("busy", "Ann")
        assert "UNAVAILABLE" in answer.text

    asyncio.run(main())


def test_who_is_silent_for_long_is_forgotten(tmp_path):
    """Whatever the models are; here they have no answers."""
    config = tmp_path / "pool.toml"
    (tmp_path / "drill.toml").write_text("row_items = 4")
    config.write_text(
        '[models.intent]\nbackend = "drill"\npath = "."\n[models.reply]\nbackend = "drill"\npath = "."\n'
    )

    async def main():
        app = application(config, idle_s=0.05)
        async with app.router.lifespan_context(app):
            conversations = app.state.conversations
            for _ in range(2):
                said = await answer(conversations, "ann", "hello")
                assert (said.kind, said.memory["lines"]) == ("busy", 1)
                while "ann" in conversations:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


# -- by websocket ----------------------------------------------------------------------------------


def test_a_conversation_remembers(address):
    async def main():
        key = new_key()
        async with chatting(address, key) as socket:
            chat = Chat(socket)
            assert await chat.hear("who am I?") == "You have not told me your name."
            assert "Zoe" in await chat.hear("hi, my name's zoe")
            red = await chat.hear("Why's Mars so red?")
            assert "rust" in red
            assert await chat.hear("why is mars red") == f"As I said: {red}"
            more = [await chat.hear("tell me more") for _ in range(4)]
            assert len(set(more)) == 4
            assert more[-1] == "That is all I know about Mars. What else?"
            assert "Venus is the hottest" in await chat.hear("and how hot is Venus?")
            assert "longer than its year" in await chat.hear("how long is a day on it")
            assert await chat.hear("how much is 17 * 3") == "That is 51."
        async with chatting(address, key) as socket:  # connected anew
            chat = Chat(socket)
            assert await chat.hear("do you remember me?") == "You are Zoe, and you asked about Venus."
            assert (
                await chat.hear("how many lines did I write?") == "This is line 13 of our conversation, Zoe."
            )
            jokes = {await chat.hear("tell me a joke") for _ in range(3)}
            assert len(jokes) == 3

    asyncio.run(main())


def test_lines_that_nobody_thought_of(address):
    async def main():
        async with chatting(address) as socket:
            chat = Chat(socket)
            for line in (
                "my dog likes cheese",
                "какая погода",
                "🦊" * 100,
                " ",
                "{name}",
                "<b>\0</b>",
                "x" * 500,
            ):
                assert await chat.hear(line)

    asyncio.run(main())


def test_one_that_fails_is_restarted_says_so_and_disturbs_nobody(address):
    async def main():
        async with chatting(address) as one, chatting(address) as other:
            ann, ben = Chat(one), Chat(other)
            await ann.say("I am Ann")
            await ben.say("I am Ben")
            for _ in range(5):
                failed = await ann.say("what is 1 / 0?")
                assert failed["kind"] == "restarted"
                assert failed["memory"] == {"lines": 0, "name": "", "topic": ""}
            assert await ann.hear("who am I?") == "You have not told me your name."
            assert await ben.hear("who am I?") == "You are Ben."

    asyncio.run(main())


def test_hundreds_at_once_keep_their_own_state_and_share_batches(address):
    names = [f"{a}{b}{c}".capitalize() for a in "bdfgklmr" for b in "aeiou" for c in "lnrstvz"]
    before = status(address)

    async def one(name, topic):
        async with chatting(address) as socket:
            chat = Chat(socket)
            await chat.hear(f"my name is {name}")
            await chat.hear(f"tell me about {topic}")
            assert await chat.hear("do you know who I am?") == f"You are {name}, and you asked about {topic}."

    async def main():
        topics = talk.load().topics
        await asyncio.gather(*(one(name, topics[i % len(topics)]) for i, name in enumerate(names)))

    asyncio.run(main())
    after = status(address)
    assert len(names) == 280
    for model in ("intent", "reply"):
        rows, batches = (
            after["models"][model][key] - before["models"][model][key] for key in ("rows", "batches")
        )
        assert rows == 3 * len(names)
        assert rows / batches > 2


@pytest.mark.parametrize(
    ("query", "message", "code"),
    [
        ("id=1234", None, 1008),
        ("", None, 1008),
        (None, "no JSON", 1007),
        (None, '{"n": 1}', 1007),
        (None, '{"n": "1", "text": "hello"}', 1007),
        (None, '{"n": 1, "text": ""}', 1007),
        (None, json.dumps({"n": 1, "text": "x" * 501}), 1007),
        (None, "x" * 5000, 1009),
        (None, b'{"n": 1, "text": "hello"}', 1003),
    ],
)
def test_what_is_no_line_ends_the_connection(address, query, message, code):
    async def main():
        query_or_key = f"id={new_key()}" if query is None else query
        async with connect(f"ws://{address}/chat?{query_or_key}") as socket:
            if message is not None:
                await socket.send(message)
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.wait_for(socket.recv(), PATIENCE_S)
            assert closed.value.rcvd.code == code

    asyncio.run(main())


# -- in a browser ----------------------------------------------------------------------------------

# Of every text that is seen, against what lies behind it: those of too little contrast (WCAG AA).
FAINT = """(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = channels(colour).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
  };
  return [...document.body.querySelectorAll("*")]
    .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .filter((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
      return Math.max(a, b) / Math.min(a, b) < 4.5;
    })
    .map((e) => e.outerHTML);
})()"""


async def shown(page, lines):
    """Wait until so many lines were answered; gives the last answer."""
    await page.until(f"unanswered.size === 0 && document.querySelectorAll('.own').length === {lines}")
    return await page.get(
        "document.querySelector('#typing').previousElementSibling.querySelector('p').textContent"
    )


@needs_chromium
def test_pages_have_conversations_of_their_own(address):
    async def main():
        async with chromium() as browser:
            names = ["Ann", "Ben", "Carla"]
            pages = await asyncio.gather(*(browser.open(f"http://{address}/") for _ in names))
            for page, name in zip(pages, names, strict=True):
                await page.until("$('connection').textContent === 'connected'")
                await page.click("#text")
                await page.type(f"my name is {name}")
            for page, name in zip(pages, names, strict=True):
                assert f"Nice to meet you, {name}." in await shown(page, 1)
            ann, ben, carla = pages

            # One that asks on.
            await ann.click(".suggestions button:nth-child(2)")
            assert "rust" in await shown(ann, 2)
            memory = "['name', 'topic', 'lines'].map((id) => $(id).textContent)"
            assert await ann.get(memory) == ["Ann", "Mars", "2"]
            assert re.fullmatch(
                r"\d+ ms", await ann.get("[...document.querySelectorAll('small')].pop().textContent")
            )
            assert await ann.get("say('tell me more'), !$('typing').hidden")
            assert "volcano" in await shown(ann, 3)
            assert await ann.get("$('typing').hidden")

            # One that fails.
            await ben.click(".suggestions button:nth-child(5)")
            assert "forgotten" in await shown(ben, 2)
            assert await ben.get("document.querySelectorAll('.restarted').length") == 1
            assert await ben.get(memory) == ["–", "–", "0"]

            # One that loses its connection, and writes meanwhile.
            await carla.get("socket.close()")
            await carla.until("$('connection').textContent === 'reconnecting'")
            await carla.get("say('who am I?')")
            assert await shown(carla, 2) == "You are Carla."
            assert await carla.get("$('connection').textContent") == "connected"

            # What is written is text, and is there again after a reload.
            await carla.click("#text")
            await carla.type("<img src=x onerror=alert(1)>")
            await shown(carla, 3)
            before = await carla.get("log.innerHTML")
            assert "&lt;img" in before
            await carla.call("Page.reload")
            await carla.until(
                "document.readyState === 'complete' && $('connection').textContent === 'connected'"
            )
            assert await carla.get("log.innerHTML") == before
            await carla.get("say('who am I?')")
            assert await shown(carla, 4) == "You are Carla."

            # One whose conversation was let go meanwhile.
            await ann.get("conversation = newConversation(), socket.close()")
            await ann.get("say('who am I?')")
            assert await shown(ann, 4) == "You have not told me your name."
            assert "forgotten" in await ann.get("document.querySelector('.note').textContent")

    asyncio.run(main())


@needs_chromium
def test_the_page_can_be_seen_and_used_on_large_and_small_screens(address):
    async def main():
        async with chromium() as browser:
            for width, height in ((1100, 800), (390, 844)):
                page = await browser.open(f"http://{address}/", width, height)
                await page.until("$('connection').textContent === 'connected'")
                await page.get("say('I am Bartholomew'), say('what is 1 / 0?'), say('tell me about Uranus')")
                await shown(page, 3)
                await page.get("$('behind').open = true")
                await page.until("$('figures').textContent.includes('rows a batch')")
                sizes = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
                assert await page.get(sizes) == [width, height]
                await page.until("log.scrollTop + log.clientHeight >= log.scrollHeight - 1")
                heights = "[...document.querySelectorAll('button, #text')].map((e) => e.offsetHeight)"
                assert min(await page.get(heights)) >= 36  # to be hit with a finger
                for scheme in ("light", "dark"):
                    feature = {"name": "prefers-color-scheme", "value": scheme}
                    await page.call("Emulation.setEmulatedMedia", features=[feature])
                    assert await page.get(FAINT) == []
            unasked = "{ conversations: 0, models: { reply: { rows: 0, batches: 0 } } }"
            await page.get(f"fetch = async () => ({{ json: async () => ({unasked}) }}), showFigures(), 0")
            await page.until("$('figures').textContent === 'conversations: 0 · reply: 0.0 rows a batch'")
            nodes = (await page.call("Accessibility.getFullAXTree"))["nodes"]
            named = {
                (node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if "role" in node
            }
            assert {("log", "Conversation"), ("textbox", "Your line"), ("button", "Send")} <= named
            assert not any(role in ("button", "textbox") and not name for role, name in named)

    asyncio.run(main())
