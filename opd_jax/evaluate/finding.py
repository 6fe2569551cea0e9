r"""Where a response says its answer.

What counts, in this order; each rule is the whole rule:

1. **Thoughts are no answers.** Of a response with a closed thought (``</think>`` and its kin) only
   what stands behind the last closing tag counts. A response whose last thought is not closed has
   no answer, whatever it says before or inside. A prompt may have opened the thought already:
   :func:`opens_thought` tells.
2. The last ``<answer>...</answer>`` with something in it; marks inside it (a box) are read as in a
   whole response, and without one all of it is the answer. One that is opened last and not closed
   is no answer.
3. The last ``\boxed{...}`` or ``\fbox{...}`` with something in it; neighbours that are joined by
   "and", "or" or a comma are one answer. ``\boxed 42`` without braces is a box too. A box that is
   opened last and not closed is no answer, and neither is an earlier one: the text had not ended.
4. The last line ``#### x`` where x is a plain number, or where nothing follows it (as GSM8K writes
   it; other such lines are headings).
5. What follows the last ``answer is`` or ``answer:``, up to the end of the sentence or line.

Anything else is a response without an answer; the last number of a text is none. A response that
was cut by its length (``truncated``) counts by the same rules, if its answer is complete: closed by
its brace or tag, or for rules 4 and 5 followed by a space, a new line or a closing dollar sign.
"""

from __future__ import annotations

import dataclasses
import re

from opd_jax.evaluate import arithmetic, cleaning

NO_ANSWER = "no answer"
UNFINISHED_THOUGHT = "unfinished thought"
UNFINISHED_ANSWER = "unfinished answer"

_THOUGHT = re.compile(
    r"<(?P<end>/)?(?:think|thinking|thought|thoughts|reasoning|scratchpad)>|\[(?P<end2>/)?THINK\]|"
    r"<\|(?:begin|(?P<end3>end))_of_thought\|>|◁(?P<end4>/)?think▷",
    re.IGNORECASE,
)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_TOKENS = re.compile(r"\\{1,4}(?:boxed|fbox)(?![a-zA-Z])\s{0,3}(\{)?|\\[{}\\]|[{}]")
_JOINT = re.compile(r"[\s$.,;]*(?:,|;|and|or|\\text\s?\{\s*(?:and|or)\s*\})?[\s$]*")
_BARE = re.compile(
    r"[ \t]{0,3}(?P<answer>(?:\\[a-zA-Z]+|\\[{},;! ]|[-+0-9a-zA-Z.,^_/*{}()\[\]|=<>%°:'!]|[ \t]"
    r"(?![a-zA-Z]{2})){1,200})"
)
_HASHES = re.compile(r"^[ \t]{0,8}####[ \t]{1,8}(\S.*)$", re.MULTILINE)
_ANSWER = re.compile(
    r"\banswer(?:\s{1,3}is\b|[*_]{0,3}\s{0,3}[:=])[*_:\s]{0,8}(?=[^\s*_:])", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.?](?=\s|[*_]+(?:\s|$)|$)")
_REASON = re.compile(r"[,;]?\s(?:because|since|which|where|so that|as shown)\b", re.IGNORECASE)
_LEAD = re.compile(
    r"(?:therefore|thus|then|simply|hence|now|clearly|indeed|equal to)\b,?\s{0,3}", re.IGNORECASE
)
_DISPLAY = (("\\[", "\\]"), ("$$", "$$"))


@dataclasses.dataclass(frozen=True)
class Found:
    """What a response says.

    Attributes:
      answer: the marked answer as it is written; None without one.
      missing: why there is none: one of the constants above; empty where there is one.
      rest: the response without its thoughts, for graders with marks of their own; None in an
        unfinished thought.
    """

    answer: str | None
    missing: str = ""
    rest: str | None = None


def find(text: str, *, truncated: bool = False, in_thought: bool = False) -> Found:
    """The answer that a response marks, by the rules in the module's docstring.

    Args:
      text: the response.
      truncated: whether its length limit cut it.
      in_thought: whether its prompt had opened a thought already.
    """
    rest = _behind_thoughts(text, in_thought)
    if rest is None:
        return Found(None, UNFINISHED_THOUGHT)
    answer, missing = _marked(rest, truncated)
    return Found(answer, missing, rest)


def opens_thought(prompt: str) -> bool:
    """Whether a prompt, as the model sees it, ends inside a thought."""
    tags = list(_THOUGHT.finditer(prompt))
    return bool(tags) and not _is_end(tags[-1])


def _behind_thoughts(text: str, in_thought: bool) -> str | None:
    tags = list(_THOUGHT.finditer(text))
    if not tags:
        return None if in_thought else text
    return text[tags[-1].end() :] if _is_end(tags[-1]) else None


def _is_end(tag: re.Match) -> bool:
    return any(tag[name] for name in ("end", "end2", "end3", "end4"))


def _marked(text: str, truncated: bool) -> tuple[str | None, str]:
    inside, is_open = _tagged(text)
    if is_open:
        return None, UNFINISHED_ANSWER
    if inside is not None:
        answer, missing = _marked(inside, truncated=False)
        return (answer, missing) if answer or missing == UNFINISHED_ANSWER else (inside, "")
    box, is_open = _boxed(text, truncated)
    if is_open:
        return None, UNFINISHED_ANSWER
    if box is not None:
        return box, ""
    end = len(text.rstrip())
    for match in reversed(list(_HASHES.finditer(text))):
        if match.end() >= end or arithmetic.value(cleaning.clean(match[1])) is not None:
            is_cut = truncated and match.end() == len(text)
            return (None, UNFINISHED_ANSWER) if is_cut else (match[1].strip(), "")
    return _sentence(text, truncated)


def _tagged(text: str) -> tuple[str | None, bool]:
    """Content of the last answer tag that holds something, and whether one is left open."""
    start, found = None, None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            found = text[start : tag.start()].strip() or found
            start = None
    return found, start is not None and bool(text[start:].strip())


def _boxed(text: str, truncated: bool) -> tuple[str | None, bool]:
    """Content of the last boxes, and whether the box that opens last is left open."""
    opened: list[tuple[int, int] | None] = []  # start and start of content; None for plain braces
    boxes: list[tuple[int, int, str]] = []
    for match in _TOKENS.finditer(text):
        token = match[0]
        if token == "{":
            opened.append(None)
        elif token == "}":
            box = opened.pop() if opened else None
            if box is not None and text[box[1] : match.start()].strip():
                boxes.append((box[0], match.end(), text[box[1] : match.start()].strip()))
        elif match[1]:
            opened.append((match.start(), match.end()))
        elif len(token) > 2:
            bare = _BARE.match(text, match.end())
            if bare and (answer := _bare(bare["answer"])):
                if truncated and bare.end() == len(text):
                    return None, True
                boxes.append((match.start(), bare.end(), answer))
    last = max((box[0] for box in boxes), default=-1)
    left = max((box[0] for box in opened if box and text[box[1] :].strip()), default=-1)
    if left > last:
        return None, True
    if not boxes:
        return None, False
    boxes = sorted(boxes)
    parts = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        is_inside = box[1] > parts[0][0]
        if is_inside or not _JOINT.fullmatch(text, box[1], parts[0][0]):
            break
        if text[box[1] : parts[0][0]].strip(" $\n."):
            parts.insert(0, box)
        else:
            break
    return ", ".join(box[2] for box in parts), False


def _bare(text: str) -> str | None:
    """An answer without braces, if it looks like one and not like a sentence about boxes."""
    text = re.split(r"\\[)\]]|[.?](?=\s|$)", text, maxsplit=1)[0].strip(" .,;:")
    if re.match(r"[-+]?[\\0-9.(\[]|[A-Za-z](?![A-Za-z])", text):
        return text
    return None


def _sentence(text: str, truncated: bool) -> tuple[str | None, str]:
    """What follows the last "answer is"."""
    start = max((match.end() for match in _ANSWER.finditer(text)), default=None)
    if start is None:
        return None, NO_ANSWER
    for left, right in _DISPLAY:
        if text.startswith(left, start):
            end = text.find(right, start + len(left))
            if end >= 0:
                return text[start + len(left) : end].strip() or None, ""
    line = text[start:].split("\n", maxsplit=1)[0]
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0]
    is_cut = truncated and start + len(sentence) >= len(text.rstrip("."))
    if is_cut and not sentence.rstrip().endswith(("$", "\\)", "\\]", "**")):
        return None, UNFINISHED_ANSWER
    answer = _REASON.split(sentence, maxsplit=1)[0]
    if match := _LEAD.match(answer):
        answer = answer[match.end() :]
    answer = answer.strip(" \t\r*_")
    return (answer, "") if answer else (None, NO_ANSWER)
