"""Per-user pipelines, actors and channels over one pool, in plain coroutines. Runs in the caller's process.

    channel    CSP: bounded channels, `select`; `stages` joins them
    actor      objects with a mailbox and a parent that supervises them
    pipeline   the steps each user's messages take; `model` makes a step of a prediction
    registry   what there is one of for each user, until it has been idle for long enough

It needs an asyncio loop and, for predictions, a `pool.Predictor`: a `Pool` or an `AsyncClient`.
"""

from pool.flow.actor import Actor, ActorStopped, Ref, System
from pool.flow.channel import Channel, ChannelClosed, select
from pool.flow.deadline import within
from pool.flow.model import Model
from pool.flow.pipeline import Pipeline, Pipelines, Step, each, fork
from pool.flow.registry import Registry
from pool.flow.stages import fan_in, fan_out, stage
from pool.flow.supervision import Directive, Supervision

__all__ = [
    "Actor",
    "ActorStopped",
    "Channel",
    "ChannelClosed",
    "Directive",
    "Model",
    "Pipeline",
    "Pipelines",
    "Ref",
    "Registry",
    "Step",
    "Supervision",
    "System",
    "each",
    "fan_in",
    "fan_out",
    "fork",
    "select",
    "stage",
    "within",
]
