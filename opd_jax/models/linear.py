"""Products of rows with weights, and the forms that a weight may have beside an array.

:class:`Turned` suits few rows. A CPU streams the left factor of a product from memory and repacks
the right one. With the 8 rows of a decode step, repacking the weight is most of the work (LOG.md),
so a decode loop holds its weights turned, outputs first, and multiplies by them from the left.
:class:`Adapted` is a weight that is kept as it is and has a trained one of low rank beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
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


class Adapted(struct.PyTreeNode):
    """A frozen weight, and what is trained beside it: together ``w + scale a b``.

    Arrays may have a leading axis of layers.

    **Sharding**: ``a`` as the weight's inputs, ``b`` as its outputs, neither over the rank.
    """

    w: jax.Array | Turned | Adapted  # [inputs..., outputs...]; adapted again where a run began so
    a: jax.Array  # [inputs..., rank] f32
    b: jax.Array  # [rank, outputs...] f32
    scale: float = struct.field(pytree_node=False)

    def placed(self, move: Callable[..., jax.Array], axes: tuple, num_inputs: int) -> Adapted:
        """Each array through ``move(array, axes)``, the scale taken into ``b``, in f32.

        Args:
          move: such as a cast and a change of place.
          axes: mesh axes of the weight.
          num_inputs: how many of its dimensions are inputs.
        """
        inputs, outputs = axes[:num_inputs], axes[num_inputs:]
        a, b = move(self.a, (*inputs, None)), move(self.b * self.scale, (None, *outputs))
        return Adapted(move(self.w, axes), a, b, 1.0)

    def merged(self, num_inputs: int, num_stacked: int = 0) -> jax.Array:
        """The weight that it stands for, added up in f32 and left in f32.

        Args:
          num_inputs: how many dimensions of the weight are inputs.
          num_stacked: leading axes, of layers.
        """
        stack, last = tuple(range(num_stacked)), num_stacked + num_inputs
        numbers = (((last,), (num_stacked,)), (stack, stack))
        change = jax.lax.dot_general(
            self.a,
            self.b * self.scale,
            numbers,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        w = self.w.merged(num_inputs, num_stacked) if isinstance(self.w, Adapted) else self.w
        assert not isinstance(w, Turned)
        return w.astype(jnp.float32) + change


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


def times(x: jax.Array, w: jax.Array | Turned | Adapted, out=None) -> jax.Array:
    """Rows [R, ...] times a weight whose first dimensions are the rows' others: [R, ...].

    ``out`` places the result, which is needed where the inputs are split; a turned weight knows.
    An adapted one is multiplied in its parts, and has taken its scale (:meth:`Adapted.placed`).
    """
    if isinstance(w, Adapted):
        low_RA = times(x, w.a, mesh.out(mesh.BATCH, None))
        return times(x, w.w, out) + _raised(low_RA, w.b, out)
    if not isinstance(w, Turned):
        numbers = ((tuple(range(1, x.ndim)), tuple(range(x.ndim - 1))), ((), ()))
        return jax.lax.dot_general(x, w, numbers, out_sharding=out)
    over_outputs, over_inputs = w.axes
    flat = (x.shape[0], w.w_OI.shape[1])
    x_RI = jax.lax.reshape(x, flat, out_sharding=mesh.out(mesh.BATCH, over_inputs))
    y_RO = from_left(w.w_OI, x_RI, over_outputs)
    shape, rest = (x.shape[0], *w.outputs), [None] * (len(w.outputs) - 1)
    return jax.lax.reshape(y_RO, shape, out_sharding=mesh.out(mesh.BATCH, over_outputs, *rest))


def _raised(low_RA: jax.Array, b: jax.Array, out) -> jax.Array:
    """Rows of low rank times ``b``: [R, ...].

    It has a batch dimension, of one: so the remat policy ``dots`` does not keep what takes as much
    memory as the frozen product beside it and hardly any work to compute again.
    """
    placed = None if out is None else jax.P(None, *out)
    numbers = (((2,), (1,)), ((0,), (0,)))
    y = jax.lax.dot_general(low_RA[None], b[None], numbers, out_sharding=placed)
    return jax.lax.squeeze(y, (0,))


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
