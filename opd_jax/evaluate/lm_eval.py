"""``opd_jax`` as a model of lm-evaluation-harness; needs that to be imported (see ``harness``).

A model is named by ``pretrained``, as in every command: a Hugging Face folder, ``owner/name`` on
the Hub, ``embedded:NAME`` or ``RUN[@STEP]``. Prompts are tokenised, cut and scored as the harness's
own ``hf`` model does, so the numbers are the same up to rounding; the model runs sharded over all
devices of one process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import lm_eval.utils as harness_utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from opd_jax import bounded
from opd_jax import mesh as meshlib
from opd_jax.data import templates, widths
from opd_jax.data.prompts import Example
from opd_jax.evaluate import scoring
from opd_jax.rollout import answers as drawing
from opd_jax.store import pair as pairs

_BATCH = 16
_MAX_NEW = 256  # ids of a response, where a task does not say
_ROUND = 128  # ids after which rows that have met a stop string are left out
_NAMES_OF_MAX_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_FILTERS = ("temperature", "top_k", "top_p", "min_p")
# Others that change no response at these values; any other value of them, or name, is refused.
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1, "use_cache": True}


@register_model("opd_jax")
class OpdJax(TemplateLM):
    """A model of this library."""

    backend = "causal"

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str | None = None,
        batch_size: int | str = _BATCH,
        slots: int = 0,
        max_length: int | None = None,
        max_gen_toks: int = _MAX_NEW,
        mesh_fsdp: int = 1,
        mesh_model: int = 1,
        add_bos_token: bool | None = None,
        seed: int = 0,
        think_end_token: str | None = None,
        template: str | dict[str, Any] = "{}",
        **others: Any,
    ):
        """Open a model; the arguments are those of ``--model_args``.

        Args:
          pretrained: a model reference.
          dtype: compute dtype; default: float32 on CPU, bfloat16 elsewhere.
          batch_size: rows at a time; ``auto`` is 16.
          slots: rows of a batch decoded at a time, see ``rollout.refill``; 0: all.
          max_length: most ids of context and continuation; default: the model's positions.
          max_gen_toks: most ids of a response, where a task does not say.
          mesh_fsdp, mesh_model: as the flags of the other commands.
          add_bos_token: whether a BOS is put in front; default: as the tokenizer does.
          seed: of sampled responses.
          think_end_token: what ends a thought, such as ``</think>``; only what follows counts.
          template: variables of the chat template, as a JSON object.

        Raises:
          ValueError: an unknown argument, or a model that cannot be used.
        """
        super().__init__()
        unknown = sorted({*others} - {"device", "max_batch_size", "trust_remote_code"})
        if unknown:
            raise ValueError(
                f"model argument {unknown[0]!r} is not known: expected pretrained, dtype, "
                "batch_size, slots, max_length, max_gen_toks, mesh_fsdp, mesh_model, "
                "add_bos_token, seed, think_end_token, template; correct --model_args"
            )
        if jax.process_count() > 1:
            raise ValueError(
                f"{jax.process_count()} processes: expected one for lm-eval, whose devices the "
                "model is spread over; start one, or use opd-jax eval"
            )
        mesh = meshlib.make(fsdp=int(mesh_fsdp), model=int(mesh_model))
        self.model = pairs.open_model(pretrained, mesh=mesh, dtype=dtype)
        self.tokenizer: Any = self.model.tokenizer
        self.batch_size = _BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self.slots = int(slots)
        change = "set slots in --model_args, or raise --batch_size"
        drawing.check_slots(self.slots, self.batch_size, 1, mesh, change=change)
        self.max_length = min(int(max_length or 1 << 30), self.model.cfg.max_positions)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self.seed = int(seed)
        self.think_end_token = think_end_token
        self.template = json.loads(template) if isinstance(template, str) else dict(template)
        self.params = self.model.load()

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has no context: BOS, or else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; a BOS that it has already is not put in front again."""
        given = self.add_bos_token if add_special_tokens is None else add_special_tokens
        prefix = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and prefix and string.startswith(prefix):
            given = False
        if given is None:
            return list(self.tokenizer.encode(string))
        return list(self.tokenizer.encode(string, add_special_tokens=given))

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; a template without a system role gets none."""
        import jinja2

        def render(messages: list[dict[str, str]]) -> str:
            templates.set_clock(self.tokenizer, self.model.started)
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.template,
            )
            return str(text)

        def work(begin: Any) -> str:
            begin("rendering a chat")
            try:
                return render(chat_history)
            except jinja2.exceptions.TemplateError:
                return render([m for m in chat_history if m["role"] != "system"])

        return bounded.run(work, change="mend the chat template")

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of continuations, contexts cut from the left to fit."""
        rows = []
        for _, context, continuation in requests:
            if not continuation:
                raise ValueError(
                    "a continuation is empty: expected text to score behind every context; mend "
                    "doc_to_choice or doc_to_target of the task"
                )
            ids = [*context, *continuation][-(self.max_length + 1) :]
            if len(continuation) >= len(ids):
                raise ValueError(
                    f"a continuation of {len(continuation)} ids and {self.max_length} positions: "
                    "expected room for at least one id of context; raise max_length"
                )
            rows.append((ids[: -len(continuation)], continuation))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        progress = tqdm(
            total=len(rows), desc="loglikelihood", disable=bool(kwargs.get("disable_tqdm"))
        )
        for places, logp_B, greedy_B in scoring.scores(
            self.params,
            rows,
            self.model.mesh,
            cfg=self.model.cfg,
            num_ids=self.model.cfg.vocab_size,  # with the padding, as hf counts it
            pad_id=self.model.sampler().pad_id,
            batch=self.batch_size,
        ):
            for place, logp, is_greedy in zip(places, logp_B, greedy_B, strict=True):
                found[place] = (float(logp), bool(is_greedy))
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], found[place])
            progress.update(len(places))
        progress.close()
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that predict every id once."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolling = harness_utils.get_rolling_token_windows(  # pyright: ignore[reportAttributeAccessIssue]
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = map(harness_utils.make_disjoint_window, rolling)  # pyright: ignore[reportAttributeAccessIssue]
            own = [(None, *window) for window in disjoint]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Responses, each up to the first of its stop strings."""
        found = [""] * len(requests)
        progress = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        plans = [_Plan(json.loads(each), self.max_gen_toks, self.max_length) for each in groups]
        for plan, places in zip(plans, groups.values(), strict=True):
            room = self.max_length - plan.max_new
            contexts = [
                self.tok_encode(requests[place].args[0])[-room:] or [self.prefix_token_id]
                for place in places
            ]
            for place, text in self._responses(places, contexts, plan):
                found[place] = plan.cut(text, self.think_end_token)
                self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
                progress.update(1)
        progress.close()
        return found

    def _responses(self, places: list[int], contexts: list[list[int]], plan: _Plan) -> Any:
        """Pairs of place and text; rows that are done leave the batch after each round."""
        cfg, mesh = self.model.cfg, self.model.mesh
        sampler = self.model.sampler(**plan.filters)
        written: list[list[int]] = [[] for _ in contexts]
        live, taken = list(range(len(contexts))), 0
        while live:
            room = plan.max_new - taken
            max_new = min(room, _ROUND) if plan.until else room
            # Long ones first, so that what does not fit shows at once.
            live.sort(key=lambda row: -len(contexts[row]))
            still = []
            for width, rows in self._by_width(live, contexts, written):
                drawn = drawing.sample(
                    self.params,
                    [Example(tuple(contexts[r] + written[r]), None, "", r) for r in rows],
                    jax.random.fold_in(jax.random.key(self.seed), taken),
                    mesh,
                    cfg=cfg,
                    sampler=sampler,
                    max_new=max_new,
                    width=width,
                    size=meshlib.batch_rows(min(self.batch_size, len(rows)), mesh),
                    numbers=[places[r] for r in rows],
                    slots=self.slots,
                )
                waiting = iter(rows)
                with jax.set_mesh(mesh):
                    for rollouts, real in drawn:
                        drawing.texts(rollouts, real, self.tokenizer)  # raises where not finite
                        host = meshlib.to_host(rollouts)
                        for number in range(real):
                            row = next(waiting)
                            written[row] += host.ids_BT[number][host.mask_BT[number]].tolist()
                            text = self.tok_decode(written[row])
                            is_done = not host.truncated_B[number] or room <= max_new
                            if is_done or any(stop in text for stop in plan.until):
                                yield places[row], text
                            else:
                                still.append(row)
            live, taken = still, taken + max_new

    def _by_width(
        self, live: list[int], contexts: list[list[int]], written: list[list[int]]
    ) -> list[tuple[int, list[int]]]:
        groups: dict[int, list[int]] = {}
        for row in live:
            width = widths.padded(len(contexts[row]) + len(written[row]))
            groups.setdefault(min(width, self.max_length), []).append(row)
        return sorted(groups.items(), reverse=True)


class _Plan:
    """What a task's ``generation_kwargs`` mean."""

    def __init__(self, given: dict[str, Any], max_new: int, max_length: int):
        until = given.pop("until", None) or []
        self.until: list[str] = [s for s in ([until] if isinstance(until, str) else until) if s]
        told = [given.pop(name) for name in _NAMES_OF_MAX_NEW if name in given]
        self.max_new = int(next((number for number in told if number is not None), max_new))
        if not 0 < self.max_new < max_length:
            raise ValueError(
                f"a task asks for {self.max_new} new ids and the model has {max_length} positions: "
                "expected room for context and response; set --gen_kwargs max_gen_toks=..."
            )
        do_sample = given.pop("do_sample", None)
        self.filters = {name: given.pop(name) for name in _FILTERS if name in given}
        temperature = float(self.filters.get("temperature", 1.0 if do_sample else 0.0))
        if do_sample is False or not temperature:
            self.filters = {}
            temperature = 0.0
        self.filters["temperature"] = temperature
        for name, value in given.items():
            if name not in _NEUTRAL or value != _NEUTRAL[name]:
                raise ValueError(
                    f"a task, or --gen_kwargs, asks for {name}={value!r}, which this model cannot "
                    "do: expected until, do_sample, max_gen_toks, temperature, top_k, top_p or "
                    "min_p; leave it out"
                )

    def cut(self, text: str, think_end: str | None) -> str:
        """A response without its thought, up to the first stop string."""
        if think_end:
            text = text.split(think_end)[-1].lstrip()
        for stop in self.until:
            text = text.split(stop)[0]
        return text
