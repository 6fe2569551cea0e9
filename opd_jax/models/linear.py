"""Products of rows with weights, and the form of a weight that suits few rows.

A CPU streams the left factor of a product from memory and repacks the right one. With the 8 rows of
a decode step, repacking the weight is most of the work (LOG.md), so a decode loop holds its weights
turned, outputs first, and multiplies by them from the left.
"""

from __future__ import annotations

import math

import jax
from flax import struct

from opd_jax import mesh


@struct.dataclass
class Turned:
    """A weight with its outputs first.

    **Sharding**: ``model`` over the outputs or over the inputs, as the weight was.
    """

    w_OI: jax.Array  # [outputs, inputs], both flat
    outputs: tuple[int, ...] = struct.field(pytree_node=False)  # dimensions that O stands for
    is_split_by_output: bool = struct.field(pytree_node=False)

    @property
    def axes(self) -> tuple[str | None, str | None]:
        """Mesh axes of outputs and inputs."""
        return ("model", None) if self.is_split_by_output else (None, "model")


def turn(w: jax.Array, num_inputs: int, *, axes: tuple[str | None, ...]) -> Turned:
    """Turn a weight whose first ``num_inputs`` dimensions are inputs.

    Args:
      w: off the ``fsdp`` axis.
      num_inputs: how many dimensions the rows have beside their number.
      axes: its mesh axes as declared; ``model`` is on the first input or the first output.
    """
    inputs, outputs = w.shape[:num_inputs], w.shape[num_inputs:]
    is_split_by_output = axes[num_inputs] == "model"
    place = (None, "model") if is_split_by_output else ("model", None)
    flat = (math.prod(inputs), math.prod(outputs))
    w_IO = jax.lax.reshape(w, flat, out_sharding=mesh.out(*place))
    return Turned(w_IO.T, outputs, is_split_by_output)


def times(x: jax.Array, w: jax.Array | Turned, out=None) -> jax.Array:
    """Rows [R, ...] times a weight whose first dimensions are the rows' others: [R, ...].

    ``out`` places the result, which is needed where the inputs are split; a turned weight knows.
    """
    if not isinstance(w, Turned):
        numbers = ((tuple(range(1, x.ndim)), tuple(range(x.ndim - 1))), ((), ()))
        return jax.lax.dot_general(x, w, numbers, out_sharding=out)
    over_outputs, over_inputs = w.axes
    flat = (x.shape[0], w.w_OI.shape[1])
    x_RI = jax.lax.reshape(x, flat, out_sharding=mesh.out(mesh.BATCH, over_inputs))
    y_RO = from_left(w.w_OI, x_RI, over_outputs)
    shape, rest = (x.shape[0], *w.outputs), [None] * (len(w.outputs) - 1)
    return jax.lax.reshape(y_RO, shape, out_sharding=mesh.out(mesh.BATCH, over_outputs, *rest))


def from_left(w_OI: jax.Array, x_RI: jax.Array, axis: str | None, dtype=None) -> jax.Array:
    """``x w^T`` [R, O] with the weight as left factor; ``axis`` is the mesh axis of its outputs."""
    y_OR = jax.lax.dot_general(
        w_OI,
        x_RI,
        (((1,), (1,)), ((), ())),
        preferred_element_type=dtype,
        out_sharding=mesh.out(axis, mesh.BATCH),
    )
    return jax.lax.optimization_barrier(y_OR).T  # without the barrier XLA swaps the factors back
