"""What a judge's reply says, without the judge: the probability of Yes, or numbers in a text.

A reply that does not say it is NaN with the reason, never 0, which would be a judgement.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffalign.errors import InputError

FINAL_SCORE = r"(?i)final score\s*:[\s*]*(-?\d+(?:\.\d+)?)"
"""A line such as "Final Score: 4.5", in bold or not."""

_BLANKS = " \t\r\n▁Ġ"
"""With how tokenizers write a leading blank."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A reply, understood or not."""

    score: float = math.nan
    raw: dict[str, float] = field(default_factory=dict)
    """Native values by name."""
    failure: str = ""
    """Why there is no score, in a word or two, for counting."""
    detail: str = ""
    """The same at length."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where the numbers are in a reply, and between which bounds they lie."""

    pattern: str | dict[str, str] = FINAL_SCORE
    """A regular expression with one group, the number; or one for each axis by its name. The last match counts."""
    low: float = 1.0
    high: float = 5.0
    """Bounds of every axis, which become 0 and 1."""
    max_tokens: int = 1024
    """Of a reply; one that is cut off is not judged."""

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise InputError(f"scale must have low < high, got {self.low!r} and {self.high!r}")
        if self.max_tokens < 1 or not self.pattern:
            raise InputError(
                f"scale must have a pattern and at least 1 token, got {self.pattern!r}, {self.max_tokens!r}"
            )
        for axis, pattern in self.axes.items():
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise InputError(
                    f"scale.pattern of {axis} must be a regular expression, got {pattern!r}: {error}"
                ) from error
            if groups != 1:
                raise InputError(
                    f"scale.pattern of {axis} must have one group, the number, got {groups} in {pattern!r}"
                )

    @property
    def axes(self) -> dict[str, str]:
        """Patterns by name; a single one is "native"."""
        return {"native": self.pattern} if isinstance(self.pattern, str) else self.pattern


def parse_yes_no(top_logprobs: Sequence[Any]) -> Judged:
    """P(Yes) / (P(Yes) + P(No)) = sigmoid(logprob_yes - logprob_no) of a reply's first token.

    Spellings that differ in case or leading blanks are added up first. A word that is not listed is bounded by the
    least likely token that is; where only one word's spellings are listed, nothing bounds the other.

    Args:
        top_logprobs: The likeliest tokens as JSON has them, each an object with its `token` and `logprob`.
    """
    listed: list[tuple[str, float]] = []
    for entry in top_logprobs:
        token, logprob = (entry.get("token"), entry.get("logprob")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(token, str) or not isinstance(logprob, (int, float)) or not logprob <= 1e-3:
            return _malformed(f"an entry that is not a token with its log probability: {entry!r}")
        listed.append((token.lstrip(_BLANKS).lower(), float(logprob)))
    found = {word: [logprob for token, logprob in listed if token == word] for word in ("yes", "no")}
    if not any(found.values()):
        return _malformed(f"neither Yes nor No among {[token for token, _ in listed]}")
    if not all(found.values()) and all(token in found for token, _ in listed):
        return _malformed(f"nothing but {listed[0][0]!r} is listed, which does not bound the other")
    least = min(logprob for _, logprob in listed)
    yes, no = (_log_sum(found[word]) if found[word] else least for word in ("yes", "no"))
    return Judged(score=_sigmoid(yes - no), raw={"logprob_yes": yes, "logprob_no": no})


def parse_score(
    reply: str, *, pattern: str | dict[str, str] = FINAL_SCORE, low: float = 1.0, high: float = 5.0
) -> Judged:
    """The number that a pattern finds last, or the mean of several axes', brought from [low, high] to [0, 1].

    Every axis must be there, within its bounds: a mean of some, or of what was cut to the bounds, would not compare.

    Raises:
        InputError: A pattern or bounds that make no scale.
    """
    return parse_scale(reply, Scale(pattern=pattern, low=low, high=high))


def parse_scale(reply: str, scale: Scale) -> Judged:
    """`parse_score` for a scale."""
    raw: dict[str, float] = {}
    for axis, pattern in scale.axes.items():
        matches = re.findall(pattern, reply)
        if not matches:
            return _malformed(f"no {axis} in {_short(reply)!r}")
        try:
            value = float(matches[-1])
        except ValueError:
            return _malformed(f"{axis} must be a number, got {matches[-1]!r}")
        if not scale.low <= value <= scale.high:
            return _malformed(f"{axis} must be in [{scale.low:g}, {scale.high:g}], got {value:g}")
        raw[axis] = value
    mean = sum(raw.values()) / len(raw)
    return Judged(score=(mean - scale.low) / (scale.high - scale.low), raw=raw)


def text_of(completion: Mapping[str, Any]) -> str | Judged:
    """The text of a chat completion; a reply that was cut off has none.

    Raises:
        ValueError: It is not a chat completion.
    """
    choice = _choice(completion)
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise ValueError("a choice without message")
    if choice.get("finish_reason") == "length":
        return _malformed("a reply cut off at its longest; raise scale.max_tokens")
    return message["content"] if isinstance(message.get("content"), str) else ""


def top_logprobs_of(completion: Mapping[str, Any]) -> Sequence[Any]:
    """The likeliest first tokens of a chat completion; none of an empty reply.

    Raises:
        ValueError: It is not a chat completion, or has no log probabilities.
    """
    logprobs = _choice(completion).get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(tokens, list):
        raise ValueError("no logprobs, which mode 'yes_no' reads; does this endpoint give them for this model?")
    if not tokens:
        return []
    top = tokens[0].get("top_logprobs") if isinstance(tokens[0], Mapping) else None
    if not isinstance(top, list):
        raise ValueError("logprobs without top_logprobs")
    return top


def _choice(completion: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = completion.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ValueError(f"not a chat completion: {_short(repr(completion))}")
    return choices[0]


def _malformed(detail: str) -> Judged:
    return Judged(failure="malformed", detail=detail)


def _log_sum(logprobs: list[float]) -> float:
    top = max(logprobs)
    return top if math.isinf(top) else top + math.log(sum(math.exp(logprob - top) for logprob in logprobs))


def _sigmoid(x: float) -> float:
    """Without overflow."""
    e = math.exp(-abs(x))
    return 1 / (1 + e) if x >= 0 else e / (1 + e)


def _short(text: str) -> str:
    return " ".join(text.split())[-200:]
