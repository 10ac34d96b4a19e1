"""How large an arena is: slots and bytes of each, from config and signatures. Pure; runs in the front."""

from __future__ import annotations

from collections.abc import Sequence

from pool.config import ModelConfig
from pool.shm.arena import UNKNOWN_ROWS_BYTES, alignment_bytes, slot_bytes_for
from pool.shm.control import LoadReport
from pool.signature import ITEM_BYTES, Signature, TensorSpec

# Slots when the config does not say: enough to queue while every worker has one running and one
# waiting, and otherwise as many as fit this budget, up to 32: a client with 1,024 rows under way at the
# default batch size (64) finds room, though not all of it is one client's.
_ARENA_BUDGET_BYTES = 512 << 20
_SLOTS_MAX = 32


def row_bytes(specs: Sequence[TensorSpec], batched: bool) -> int | None:
    """Bytes of one row (of the whole tensors if unbatched), or None if the specs leave it open."""
    total = 0
    for spec in specs:
        if spec.shape is None or spec.dtype == "string":
            return None
        items = 1
        for axis in spec.shape[1:] if batched else spec.shape:
            if axis is None:
                return None
            items *= axis
        total += items * ITEM_BYTES[spec.dtype]
    return total


def plan_arena(config: ModelConfig, report: LoadReport) -> tuple[int, int]:
    """Number of slots and bytes of each, from the config where it says, else from the signatures."""
    rows_bytes = config.max_rows_bytes
    if rows_bytes is None:
        rows_bytes = max(_rows_bytes(each, report, config.max_batch_size) for each in report.signatures)
    slot_bytes = slot_bytes_for(rows_bytes)
    # Each worker one running and one waiting, one filling, one being answered.
    least = 2 * config.workers + 2
    return config.slots or max(least, min(_SLOTS_MAX, _ARENA_BUDGET_BYTES // slot_bytes)), slot_bytes


def _rows_bytes(signature: Signature, report: LoadReport, max_batch_size: int) -> int:
    inputs = row_bytes(signature.inputs, signature.batched)
    outputs = row_bytes(signature.outputs, signature.batched)
    seen = report.output_row_bytes.get(signature.name) or 0
    rows = max_batch_size if signature.batched else 1
    slack = alignment_bytes(len(signature.inputs), len(signature.outputs))
    if inputs is None:
        return max(UNKNOWN_ROWS_BYTES, 2 * rows * seen + slack)
    if outputs is None:
        return max(UNKNOWN_ROWS_BYTES, rows * (inputs + max(inputs, 2 * seen)) + slack)
    return rows * (inputs + outputs) + slack
