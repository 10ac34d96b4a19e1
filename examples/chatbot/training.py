"""Trains the chatbot's two models, in seconds. Runs as a child of the example.

    python -m examples.chatbot.training FOLDER     writes FOLDER/intent and FOLDER/reply

    intent   text                  -> intent, probability
    reply    text, intent, topic   -> scores, one for each reply of talk.json

All inputs are strings, [rows]; `topic` is what the conversation is about, or "". Both models see a text as a
bag of its words and of its threes of letters, hashed, so that neither has a vocabulary and both bear with
words that they never saw.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from examples.chatbot.talk import Talk, load

INTENT, REPLY = "intent", "reply"
SEED = 20_261_122
BUCKETS = 2048  # a few times as many as there are different words and threes of letters
EPOCHS, BATCH_ROWS, RATE = 12, 64, 5e-3
LEAST_ACCURACY = 0.97  # on what it was trained with; less means that the texts contradict each other


def train(folder: Path) -> None:
    """Train both models and export them, each whole or not at all."""
    keras.utils.set_random_seed(SEED)
    talk = load()
    train_intent(talk, folder / INTENT)
    train_reply(talk, folder / REPLY)


def train_intent(talk: Talk, folder: Path) -> None:
    """What kind of line it is."""
    names = list(talk.intents)
    examples = [(line, names.index(intent)) for intent, line in lines(talk)]
    texts, labels = zip(*examples, strict=True)
    model = classifier(len(names))
    accuracy = fit(model, bag(tf.constant(texts)), labels)
    assert accuracy >= LEAST_ACCURACY, f"intents: accuracy is {accuracy:.3f}; wanted {LEAST_ACCURACY} or more"

    def serve(text: Any) -> dict[str, Any]:
        probabilities = model(bag(text))
        intent = tf.gather(tf.constant(names), tf.argmax(probabilities, -1))
        return {"intent": intent, "probability": tf.reduce_max(probabilities, -1)}

    export(model, serve, folder, ["text"])


def train_reply(talk: Talk, folder: Path) -> None:
    """Which reply suits a line, given what kind it is and what the conversation is about."""
    intents, topics = list(talk.intents), list(talk.topics)

    def features(text: Any, intent: Any, topic: Any) -> Any:
        return tf.concat([bag(text), one_of(intent, intents), one_of(topic, topics)], -1)

    texts, kinds, topics_before, labels = zip(*situations(talk), strict=True)
    model = classifier(len(talk.replies))
    fit(model, features(*map(tf.constant, (texts, kinds, topics_before))), labels)

    def serve(text: Any, intent: Any, topic: Any) -> dict[str, Any]:
        return {"scores": model(features(text, intent, topic))}

    export(model, serve, folder, ["text", "intent", "topic"])


# -- the examples ----------------------------------------------------------------------------------


def lines(talk: Talk) -> Iterator[tuple[str, str]]:
    """Each intent with each line of it, also with "it" for what a line is about."""
    for intent, patterns in talk.intents.items():
        for pattern in patterns:
            for name in talk.names if "{name}" in pattern else [""]:
                yield intent, pattern.replace("{name}", name)
    for reply in talk.replies:
        for line in reply.says:
            yield "ask", line.replace(reply.topic.lower(), "it")


def situations(talk: Talk) -> Iterator[tuple[str, str, str, int]]:
    """A line, its intent, the topic before it, and the place of a reply that suits them."""
    random = np.random.default_rng(SEED)
    for place, reply in enumerate(talk.replies):
        for line in reply.says:
            for topic in ["", reply.topic, *random.choice(talk.topics, 3)]:
                yield line, "ask", topic, place
            yield line.replace(reply.topic.lower(), "it"), "ask", reply.topic, place
        if reply.topic:
            for line in talk.intents["more"]:
                yield line, "more", reply.topic, place
        else:
            for line in talk.intents[reply.intent]:
                yield line, reply.intent, "", place


# -- the networks ----------------------------------------------------------------------------------


def bag(text: Any) -> Any:
    """Which words and threes of letters are in a text, float32 [rows, BUCKETS]."""
    clean = tf.strings.regex_replace(tf.strings.lower(text), r"[^\pL\pN+*/-]+", " ")
    clean = tf.strings.regex_replace(clean, r"\pN+", "7")  # one number is like another
    clean = tf.strings.regex_replace(clean, r"[+*/-]", r" \0 ")
    letters = tf.strings.unicode_split(tf.strings.join(["^", tf.strings.strip(clean), "$"]), "UTF-8")
    threes = tf.strings.ngrams(letters, 3, separator="")
    words = tf.strings.split(clean)
    buckets = tf.strings.to_hash_bucket_fast(tf.concat([words, threes], 1), BUCKETS)
    counts = tf.math.bincount(
        tf.cast(buckets, tf.int32), minlength=BUCKETS, maxlength=BUCKETS,
        axis=-1, binary_output=True, dtype=tf.float32,
    )  # fmt: skip
    return tf.ensure_shape(counts, [None, BUCKETS])


def one_of(text: Any, known: list[str]) -> Any:
    """Which of the known ones it is, float32 [rows, len(known)]; all 0 where none."""
    return tf.cast(tf.equal(text[:, None], tf.constant(known)), tf.float32)


def classifier(classes: int) -> Any:
    """A network from features to probabilities."""
    return keras.Sequential(
        [
            keras.layers.Dense(96, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(classes, activation="softmax"),
        ]
    )


def fit(model: Any, features: Any, labels: tuple[int, ...]) -> float:
    """Train it; gives its accuracy on the same examples."""
    model.compile(keras.optimizers.Adam(RATE), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(features, np.array(labels), batch_size=BATCH_ROWS, epochs=EPOCHS, verbose=0)
    return float(model.evaluate(features, np.array(labels), verbose=0, return_dict=True)["accuracy"])


def export(model: Any, serve: Callable[..., Any], folder: Path, inputs: list[str]) -> None:
    """Write a SavedModel of inputs that are strings, [rows]."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serving_default", serve, [tf.TensorSpec([None], tf.string, name) for name in inputs]
    )
    partial = folder / ".exporting"  # no number: never taken for a version
    shutil.rmtree(partial, ignore_errors=True)
    archive.write_out(str(partial), verbose=False)
    partial.rename(folder / "1")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
