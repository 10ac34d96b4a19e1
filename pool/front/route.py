"""What a request header resolves to: signature, layout, and how its tensors lie in a slot. Front; no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from pool.errors import InvalidInput
from pool.front.slots import LANE_BITS, LANES
from pool.shm.arena import Layout
from pool.shm.loans import LENDABLE
from pool.signature import Signature, TensorSpec
from pool.wire import TensorMeta

if TYPE_CHECKING:
    from pool.front.generation import Generation


class Route:
    """What a request header resolves to; immutable, shared by all requests with that header.

    Attributes:
        generation: The model as served.
        signature: What runs.
        layout: How slots are cut for it.
        keys: What batches of each priority share (`pool.front.batcher`).
        key: The same for requests that carry no priority.
        capacity: Rows a slot holds in this layout.
        is_batched: Whether a request may have other than one row.
        inputs: For each tensor frame in the request's order: (offset in the slot, bytes of a row).
        regions: The same frames' `InputRegion`s.
        order: For each tensor frame in the request's order: which of the layout's inputs it is.
        is_lendable: Whether a worker may run on inputs where their client keeps them (`pool.shm.loans`).
        is_numeric: Whether every input has a fixed size.
        is_direct: Whether frames may go straight into the open slot.
        outputs: Indices of the outputs wanted, in the order wanted.
        timeout_s: Of requests that carry none; `inf` for none.
        inflight_rows: Most rows one client may have in the arena.
    """

    __slots__ = (
        "capacity",
        "generation",
        "inflight_rows",
        "inputs",
        "is_batched",
        "is_direct",
        "is_lendable",
        "is_numeric",
        "key",
        "keys",
        "layout",
        "order",
        "outputs",
        "regions",
        "signature",
        "timeout_s",
    )

    def __init__(
        self,
        generation: Generation,
        signature: Signature,
        layout: Layout,
        order: Sequence[int],
        outputs: tuple[int, ...],
    ) -> None:
        self.generation = generation
        self.signature = signature
        self.layout = layout
        self.keys = tuple(layout.number << LANE_BITS | priority for priority in range(LANES))
        self.key = self.keys[generation.config.priority]
        self.capacity = layout.capacity
        self.inflight_rows = generation.inflight_rows(layout.capacity)
        self.is_batched = signature.batched
        self.order = tuple(order)
        self.regions = [layout.descriptor.inputs[i] for i in order]
        self.inputs = [(region.offset, region.row_bytes) for region in self.regions]
        self.is_numeric = self.is_direct = all(region.dtype != "string" for region in self.regions)
        self.is_lendable = all(region.dtype in LENDABLE for region in self.regions)
        self.outputs = outputs
        timeout_ms = generation.config.request_timeout_ms
        self.timeout_s = inf if timeout_ms is None else timeout_ms * 1e-3


def check_input(signature: Signature, spec: TensorSpec, tensor: TensorMeta) -> None:
    """Refuse a tensor that the signature does not take.

    Raises:
        InvalidInput: the sentence names what was got and wanted.
    """
    if tensor.dtype != spec.dtype:
        raise InvalidInput(f"input {spec.name!r} has dtype {tensor.dtype}; wanted {spec.dtype}")
    if spec.shape is None:
        return
    wanted = spec.shape[1:] if signature.batched else spec.shape
    if len(tensor.shape) != len(wanted) or any(
        want is not None and want != got for want, got in zip(wanted, tensor.shape, strict=True)
    ):
        what = "rows of shape" if signature.batched else "shape"
        axes = ["any" if n is None else n for n in wanted]
        raise InvalidInput(f"input {spec.name!r} has {what} {list(tensor.shape)}; wanted {axes}")


def choose_outputs(signature: Signature, names: tuple[str, ...] | None) -> tuple[int, ...]:
    """Indices of the outputs of these names; of all for None.

    Raises:
        InvalidInput: there is no such output, one is named twice, or there would be none: a RESULT has at
            least one tensor (`docs/wire.md` 3.6).
    """
    position = {spec.name: i for i, spec in enumerate(signature.outputs)}
    if names is None:
        names = tuple(position)
    if not names:
        wanted = ", ".join(repr(n) for n in position) or "a signature that has outputs"
        raise InvalidInput(f"outputs is empty; wanted {wanted}")
    for name in names:
        if name not in position:
            wanted = ", ".join(repr(n) for n in position)
            raise InvalidInput(f"signature {signature.name!r} has no output {name!r}; wanted {wanted}")
    if len(set(names)) < len(names):
        raise InvalidInput(f"outputs {list(names)} name one twice")
    return tuple(position[name] for name in names)
