"""Chat templates, which are programs: the time that they tell, and arithmetic that ends."""

from __future__ import annotations

import datetime
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from opd_jax import files

_MAX_BITS = 4096  # of a number in a template


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, without numbers so large that their arithmetic hangs.

    Such arithmetic is one instruction of the interpreter: nothing in the process can interrupt it.
    """

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * right if operator == "**" else left.bit_length()
            if max(size, right.bit_length()) > _MAX_BITS:
                raise ValueError(
                    f"the chat template computes a number of more than {_MAX_BITS} bits: expected "
                    "small ones; mend chat_template.jinja"
                )
        return super().call_binop(context, operator, left, right)


chat_template_utils.__dict__["ImmutableSandboxedEnvironment"] = _Environment  # where it looks


def set_clock(tokenizer: PreTrainedTokenizerFast, now: str | None) -> None:
    """Make ``strftime_now`` in chat templates tell the time ``now`` (as ``files.TIME``).

    It cannot be passed: transformers lets templates see plain data only. The compiled template is
    the one that it will use, since it keeps them.
    """
    then = datetime.datetime.now() if now is None else datetime.datetime.strptime(now, files.TIME)
    compiled = chat_template_utils._compile_jinja_template(tokenizer.get_chat_template())
    compiled.globals["strftime_now"] = then.strftime
