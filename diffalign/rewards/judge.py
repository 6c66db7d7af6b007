"""A vision language model as judge, behind any endpoint that speaks OpenAI's chat completions.

A sample that the judge could not score is NaN and counted, never 0: a 0 would punish whatever makes a judge fail.
Decoding is greedy, and a judgement is kept by picture, prompt, model and template.
"""

import base64
import hashlib
import json
import logging
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import UInt8
from torch import Tensor

from diffalign.errors import InputError, RunError, near_match
from diffalign.rewards.inputs import images_of
from diffalign.rewards.replies import Judged, Scale, parse_scale, parse_yes_no, text_of, top_logprobs_of
from diffalign.rewards.transport import Endpoint, Network, RequestFailed, network_of, ordered
from diffalign.rewards.wire import eight_bit, to_png
from diffalign.strict import build
from diffalign.types import Modality, RewardBatch, RewardOutput

Mode = Literal["yes_no", "score"]

TEMPLATES: dict[str, str] = {
    "yes_no": 'Does this figure show "{prompt}"? Please answer yes or no.',
    "score": (
        'Judge how well this image shows "{prompt}": everything that was asked for, nothing wrong, well made. Say in a '
        'few sentences what fits and what does not, then end with one line "Final Score: x", where x is a number from '
        "1 (nothing fits) to 5 (everything fits)."
    ),
}
"""What the judge is asked; the first is VQAScore's question (Lin et al., arXiv 2404.01291)."""

_log = logging.getLogger(__name__)
_FORMAT = 1  # of what is kept; raise it when a reply comes to mean another score
_HOPELESS = (401, 403, 404)  # wrong key, model or URL: the same for every sample
_PLACE = re.compile(r"\{(\w*)\}")


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What is asked about one sample, and the key of its judgement."""

    picture: UInt8[Tensor, "3 h w"]
    text: str
    key: str


class JudgeReward:
    """How probably a vision language model answers that the image shows its prompt, or its grade; in [0, 1].

    Mode "yes_no" is P(Yes) / (P(Yes) + P(No)) of the first token and needs an endpoint that gives log probabilities;
    mode "score" reads a number from the reply by `scale`. `raw` holds `logprob_yes` and `logprob_no`, or the native
    number of each axis. `failures` counts, by reason, the samples that were not judged. The key is read from the
    environment variable `key_variable` at each request. Judges favour some styles, overlook counts and positions, and
    change when their host changes the model behind a name.

    Paper: Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation", arXiv 2404.01291.
    Departs: Both answers are weighed against each other, over all their spellings.
    """

    name: str
    modality: Modality = "image"
    differentiable = False
    licence = "of the model behind the endpoint"
    range = (0.0, 1.0)

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        endpoint: str = "http://127.0.0.1:8000/v1",
        mode: str = "yes_no",
        template: str | None = None,
        scale: Scale | Mapping[str, Any] | None = None,
        key_variable: str = "OPENAI_API_KEY",
        limit_key: str = "max_completion_tokens",
        network: Network | Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
        name: str = "judge",
    ) -> None:
        """Names a model and where it is asked.

        Args:
            model: As the endpoint calls it.
            endpoint: URL up to `/v1`; by default that of a local server.
            template: The question, with {prompt} where the prompt belongs; one without it is asked of the image alone.
            scale: Fields of `Scale`, of mode "score" alone.
            key_variable: Environment variable with the key; where it is unset none is sent.
            limit_key: What the endpoint calls a reply's longest length; older ones say "max_tokens".
            network: Fields of `Network`.
            cache: Folder for judgements; without it they are kept in memory.

        Raises:
            InputError: An option that is wrong, or that this mode does not use.
        """
        where = f"reward {name!r}"
        if mode not in get_args(Mode):
            raise InputError(f"{where}: mode must be yes_no or score, got {mode!r}{near_match(mode, get_args(Mode))}")
        if mode == "yes_no" and scale is not None:
            raise InputError(f"{where}: scale must be left out in mode 'yes_no', got {scale!r}")
        if endpoint.rstrip("/").endswith("/chat/completions"):
            raise InputError(f"{where}: endpoint must end before /chat/completions, got {endpoint!r}")
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_variable) is None:
            raise InputError(f"{where}: key_variable must be the name of an environment variable, not a key")
        self.name, self.model, self.mode, self.limit_key = name, model, mode, limit_key
        self.template = _checked(TEMPLATES[mode] if template is None else template, where)
        self.scale = scale if isinstance(scale, Scale) else build(Scale, scale or {}, "scale")
        self.endpoint = Endpoint(endpoint, network_of(network), what=f"{where}: endpoint", key_variable=key_variable)
        self.failures: Counter[str] = Counter()
        self._cache = _Cache(None if cache is None else Path(cache))
        self._heard = False

    @property
    def version(self) -> str:
        return f"{self.model}, {self.mode}, template {self._template_version[:12]}"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"images", "prompts"} if "{prompt}" in self.template else {"images"})

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores on the images' device; equal questions are asked once.

        Raises:
            InputError: Images or prompts that are wrong.
            RunError: The endpoint cannot be reached, refuses key or model, or has not given one usable reply.
        """
        images = images_of(batch, self.name, self.requires)
        prompts = (batch.prompts or []) if "prompts" in self.requires else [""] * len(images)
        asked = [self._question(p, prompt) for p, prompt in zip(eight_bit(images), prompts, strict=True)]
        kept = ((q.key, self._cache.get(q.key)) for q in asked)
        known = {key: judged for key, judged in kept if judged is not None}
        fresh = list({q.key: q for q in asked if q.key not in known}.values())
        new = ordered(self._judge, fresh, self.endpoint.network.concurrency)
        if fresh and not self._heard:
            raise RunError(f"reward {self.name!r} must be judged by its endpoint, got no usable reply: {new[0].detail}")
        known |= {question.key: judged for question, judged in zip(fresh, new, strict=True)}
        rows = [known[q.key] for q in asked]
        self.failures.update(row.failure for row in rows if row.failure)
        return RewardOutput(
            scores=torch.tensor([row.score for row in rows], dtype=torch.float32, device=images.device),
            raw={
                name: torch.tensor([row.raw.get(name, math.nan) for row in rows], device=images.device)
                for name in self._columns
            },
        )

    @property
    def _columns(self) -> list[str]:
        return ["logprob_yes", "logprob_no"] if self.mode == "yes_no" else list(self.scale.axes)

    @property
    def _template_version(self) -> str:
        """Of all that makes a reply a score."""
        scale = asdict(self.scale) if self.mode == "score" else None
        return _digest(_FORMAT, self.mode, self.template, scale)

    def _question(self, picture: Tensor, prompt: str) -> _Question:
        image = hashlib.sha256(f"{tuple(picture.shape)}".encode() + picture.numpy().tobytes()).hexdigest()
        key = _digest(image, prompt, self.model, self._template_version)
        return _Question(picture=picture, text=self.template.replace("{prompt}", prompt), key=key)

    def _judge(self, question: _Question) -> Judged:
        try:
            completion = self.endpoint.post("/chat/completions", self._request(question))
        except RequestFailed as error:
            if error.kind == "connection" or error.status in _HOPELESS:
                hint = f"; the key is read from {self.endpoint.key_variable}" if error.status in (401, 403) else ""
                message = f"reward {self.name!r}: {error}{hint}"
                raise RequestFailed(message, kind=error.kind, status=error.status) from None
            judged = Judged(failure=error.kind, detail=str(error))
        else:
            _log.debug("judge %s, sample %s: %s", self.model, question.key[:12], completion)
            judged = self._understood(completion)
        if judged.failure:
            _log.info("judge %s, sample %s not judged: %s", self.model, question.key[:12], judged.detail)
        else:
            self._cache.put(question.key, judged)
        return judged

    def _understood(self, completion: Mapping[str, Any]) -> Judged:
        try:
            said = top_logprobs_of(completion) if self.mode == "yes_no" else text_of(completion)
        except ValueError as error:
            return Judged(failure="nonsense", detail=str(error))
        self._heard = True
        if isinstance(said, Judged):
            return said
        return parse_scale(said, self.scale) if isinstance(said, str) else parse_yes_no(said)

    def _request(self, question: _Question) -> dict[str, Any]:
        url = "data:image/png;base64," + base64.b64encode(to_png(question.picture)).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        if self.mode == "yes_no":
            return body | {self.limit_key: 1, "logprobs": True, "top_logprobs": 20}
        return body | {self.limit_key: self.scale.max_tokens}


class _Cache:
    """Judgements by key, in memory and, where there is a folder, one small file each."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, Judged] = {}

    def get(self, key: str) -> Judged | None:
        if key not in self._held and self._folder is not None and (file := self._file(key)).is_file():
            try:
                table = json.loads(file.read_text(encoding="utf-8"))
                self._held[key] = Judged(
                    score=float(table["score"]), raw={k: float(v) for k, v in table["raw"].items()}
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(f"{file} must be a kept judgement, got {error!r}; delete it to judge again") from error
        return self._held.get(key)

    def put(self, key: str, judged: Judged) -> None:
        self._held[key] = judged
        if self._folder is None:
            return
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        draft.write_text(json.dumps({"score": judged.score, "raw": judged.raw}), encoding="utf-8")
        draft.replace(file)

    def _file(self, key: str) -> Path:
        assert self._folder is not None, "there is a folder"
        return self._folder / key[:2] / f"{key}.json"


def _checked(template: str, where: str) -> str:
    foreign = [place for place in _PLACE.findall(template) if place != "prompt"]
    if foreign or not template.strip():
        hint = near_match(foreign[0], ["prompt"]) if foreign else ""
        raise InputError(f"{where}: template must be a question with the place {{prompt}}, got {template!r}{hint}")
    return template


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
