"""Floating-point operations of a traced program: its products, loops by their rounds.

XLA's own cost analysis counts the body of a loop once, whatever its rounds, and a product in a
kernel of its own not at all. What is counted here is the program as it was written: two operations
per multiplication of every product (``dot_general``, ``ragged_dot``, convolutions), what
rematerialisation computes again included; other operations are left out, as in published peaks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.extend.core import jaxprs_in_params

from opd_jax import rounds

_PRODUCTS = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated")


def flops(jaxpr: Any, scored_share: float = 1.0, *, of_kernels: bool = False) -> float:
    """Operations of a program over all devices.

    Args:
      jaxpr: of a traced program, its shapes global.
      scored_share: share of a batch's positions that are scored, see :mod:`opd_jax.rounds`.
      of_kernels: only those inside of kernels.
    """
    return _sum(jaxpr, _Context(scored_share, is_counted=not of_kernels))


@dataclasses.dataclass(frozen=True)
class _Context:
    """What is known around an operation."""

    scored_share: float
    holders: int = 1  # devices that have the same rows, each of which is computed by one of them
    scopes: str = ""  # names of all that it stands in
    is_counted: bool = True  # what is no kernel


def split(
    jaxpr: Any, scored_share: float = 1.0, *, of_kernels: bool = False
) -> tuple[float, float]:
    """Those in the loops of unknown rounds at the top of a program, and all others."""
    inside = outside = 0.0
    context = _Context(scored_share, is_counted=not of_kernels)
    for equation in _open(jaxpr).eqns:
        inner = list(jaxprs_in_params(equation.params))
        if equation.primitive.name == "while":
            inside += _of(equation, context)
        elif equation.primitive.name in ("jit", "pjit", "closed_call") and len(inner) == 1:
            more = split(inner[0], scored_share, of_kernels=of_kernels)
            inside, outside = inside + more[0], outside + more[1]
        else:
            outside += _of(equation, context)
    return inside, outside


def _sum(jaxpr: Any, context: _Context) -> float:
    return sum(_of(equation, context) for equation in _open(jaxpr).eqns)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _of(equation: Any, context: _Context) -> float:
    name, params = equation.primitive.name, equation.params
    shapes: list[Any] = [getattr(v.aval, "shape", ()) for v in equation.invars]
    out: Any = equation.outvars[0].aval.shape if equation.outvars else ()
    if not context.is_counted and name in _PRODUCTS:
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(out) * math.prod(shapes[0][i] for i in contracted)
    if name in ("ragged_dot", "ragged_dot_general"):  # a row meets the weight of its own group
        return 2.0 * math.prod(shapes[0]) * shapes[1][-1] / context.holders
    if name == "conv_general_dilated":
        features = params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(out) * math.prod(shapes[1]) / shapes[1][features]
    if name.startswith("dot_product_attention"):
        return fused_attention(shapes, params["sliding_window_length"], "bwd" in name)
    inner = list(jaxprs_in_params(params))
    scopes = f"{context.scopes}/{equation.source_info.name_stack}"
    context = dataclasses.replace(context, scopes=scopes)
    if name == "shard_map":
        axes, shape = params["newly_manual_axes"], params["mesh"].shape
        devices = math.prod(shape[axis] for axis in axes)
        parts = [part for part in params["in_specs"][0] if part is not None]
        over = [axis for part in parts for axis in ((part,) if isinstance(part, str) else part)]
        holders = devices // math.prod(shape[axis] for axis in over)
        return devices * _sum(inner[0], dataclasses.replace(context, holders=holders))
    if name == "pallas_call":
        context = dataclasses.replace(context, is_counted=True)
    total = [_sum(each, context) for each in inner]
    if name == "pallas_call":
        whole = math.prod(params["grid_mapping"].grid)
        visited, pages = rounds.visited(scopes), rounds.paged(scopes)
        return (whole if visited is None else visited) * (pages or 1.0) * sum(total)
    if name == "scan":
        return params["length"] * sum(total)
    if name == "while":
        times = rounds.of(scopes, context.scored_share)
        return sum(total) * (1 if times is None else times)
    return max(total, default=0.0) if name == "cond" else sum(total)


def fused_attention(shapes: list[Any], window: int | None, is_backward: bool) -> float:
    """cuDNN's causal attention: what a query may read, rows taken as full.

    Args:
      shapes: of queries [B, T, N, H] and whatever follows.
      window: tokens that a query reads; None: all before it.
      is_backward: the gradient, which computes the scores again: five products instead of two.
    """
    rows, num_tokens, heads, head_dim = shapes[0]
    width = min(window or num_tokens, num_tokens)
    read = num_tokens * width - width * (width - 1) / 2
    return (5 if is_backward else 2) * 2.0 * rows * heads * head_dim * read
