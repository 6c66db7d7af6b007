"""The client of a reward server: any server that speaks the JSON of `wire`, such as `diffalign serve-reward`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from diffalign.errors import InputError, RunError
from diffalign.rewards import wire
from diffalign.rewards.inputs import images_of
from diffalign.rewards.transport import Endpoint, Network, RequestFailed, network_of, ordered
from diffalign.types import Modality, RewardBatch, RewardOutput

_REFUSED = (400, 413, 415, 422)


class HTTPReward:
    """What a reward server says, on the scale of the reward that it serves: see `diffalign serve-reward`.

    Version, range and needs are the server's, asked for once, when first needed. Images travel as 8-bit PNG. A sample
    that the server could not judge (null) is NaN; a server that does not answer, or not by one finite number a sample,
    ends the run. `raw` is the server's.
    """

    name: str
    modality: Modality = "image"
    differentiable = False

    def __init__(
        self,
        model: str = "http://127.0.0.1:8100",
        *,
        name: str = "http",
        batch_size: int = 16,
        network: Network | Mapping[str, Any] | None = None,
    ) -> None:
        """`model` is the server's URL; `name` tells this reward from other servers'; `network` as in `Network`."""
        if batch_size < 1:
            raise InputError(f"reward {name!r}: batch_size must be at least 1, got {batch_size!r}")
        self.name = name
        self.batch_size = batch_size
        self.endpoint = Endpoint(model, network_of(network), what=f"reward {name!r}: model")

    @cached_property
    def about(self) -> wire.About:
        """What the server says of its reward."""
        return wire.read_about(self.endpoint.get("/health"), f"{self.endpoint.url}/health")

    @property
    def version(self) -> str:
        return f"{self.about.name}, {self.about.version}"

    @property
    def requires(self) -> frozenset[str]:
        return self.about.requires

    @property
    def range(self) -> tuple[float, float]:
        return self.about.range

    @property
    def licence(self) -> str:
        return self.about.licence

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """The server's scores, on the images' device.

        Raises:
            InputError: The server refuses what it was sent.
            RunError: It does not answer, or not as it must.
        """
        images = images_of(batch, self.name, self.requires)
        if not len(images):
            return RewardOutput(scores=torch.zeros(0, device=images.device))
        size = min(self.batch_size, self.about.batch_limit or self.batch_size)
        chunks = [_rows(batch, slice(i, i + size)) for i in range(0, len(images), size)]
        outs = ordered(self._compute, chunks, self.endpoint.network.concurrency)
        if len({frozenset(out.raw) for out in outs}) > 1:
            raise RunError(f"{self.endpoint.url}/compute must give the same raw components for every sample")
        return RewardOutput(
            scores=torch.cat([out.scores for out in outs]).to(images.device),
            raw={name: torch.cat([out.raw[name] for out in outs]).to(images.device) for name in outs[0].raw},
        )

    def _compute(self, batch: RewardBatch) -> RewardOutput:
        try:
            body = self.endpoint.post("/compute", wire.request(batch, self.requires))
        except TypeError as error:
            raise InputError(f"reward {self.name!r}: metadata must be of JSON's types: {error}") from error
        except RequestFailed as error:
            if error.status in _REFUSED:
                raise InputError(f"reward {self.name!r}: {error}") from error
            raise
        return wire.read_answer(body, len(batch), f"{self.endpoint.url}/compute")


def _rows(batch: RewardBatch, rows: slice) -> RewardBatch:
    """Some of a batch's samples, with the fields that travel."""
    held = {field: getattr(batch, field) for field in wire.FIELDS.values()}
    return replace(
        batch,
        audio=None,
        sample_rate=None,
        **{f: None if values is None else values[rows] for f, values in held.items()},
    )
