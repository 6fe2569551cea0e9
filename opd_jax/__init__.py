"""On-policy distillation of language models in JAX, with an instrument for Rock Tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["distill", "eval", "export", "generate", "knockout", "rocks", "sweep", "table"]

if TYPE_CHECKING:
    from opd_jax.api import distill, eval, export, generate, knockout, rocks, sweep, table


def __getattr__(name: str) -> Any:
    """Import the functions when they are first asked for: config files import this package too.

    ``api.report`` is not among them, as ``opd_jax.report`` is the room where pages are made.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from opd_jax import api

    return getattr(api, name)
