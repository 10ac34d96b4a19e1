"""`python -m examples.chatbot`: train the models if there are none yet, then serve the page."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import uvicorn

from examples.chatbot.application import application

MODELS = ("intent", "reply")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m examples.chatbot", description="Serve a chatbot.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--idle-s", type=float, default=600.0, help="silence after which all is forgotten")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("pool.toml"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    make_models(given.config.parent / "models")
    app = application(given.config, given.idle_s)
    # One process: it holds the conversations, and the pool's workers do the work. A line is short.
    uvicorn.run(app, host=given.host, port=given.port, access_log=False, ws_max_size=4096)


def make_models(folder: Path) -> None:
    """Have the models trained, once, by a process of its own: this one never imports TensorFlow.

    Raises:
        subprocess.CalledProcessError: that failed, and said why.
    """
    if not all((folder / name / "1").exists() for name in MODELS):
        print("training the models, which takes some seconds", flush=True)
        subprocess.run([sys.executable, "-m", "examples.chatbot.training", str(folder)], check=True)


if __name__ == "__main__":
    main()
