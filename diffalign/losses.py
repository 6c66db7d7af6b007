"""Links: what a preference loss does with the implicit rewards of winner and loser, and the squared error beneath them.

A link maps (implicit_w, implicit_l), each [B] in nats, to a loss per pair [B]. Writing h = implicit_w - implicit_l:
sigmoid -log S(h); hinge max(0, 1 - h); ipo (h - 1/2)^2; cdpo (1 - e) (-log S(h)) + e (-log S(-h)).
"""

import inspect
from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from diffalign.errors import InputError, near_match

Link = Callable[[Float[Tensor, " b"], Float[Tensor, " b"]], Float[Tensor, " b"]]


def squared_error(pred: Float[Tensor, " b *rest"], target: Float[Tensor, " b *rest"]) -> Float[Tensor, " b"]:
    """Squared error per sample, averaged over all its elements, in float32 or better."""
    if pred.shape != target.shape:
        raise ValueError(f"target must have shape {tuple(pred.shape)} like pred, got {tuple(target.shape)}")
    pred, target = (x.float() if x.dtype.itemsize < 4 else x for x in (pred, target))
    return (pred - target).square().flatten(1).mean(1)


def sigmoid(implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Negative log-likelihood that the winner wins, under Bradley-Terry; log 2 at margin 0.

    Paper: Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, eq. 7.
    """
    return -functional.logsigmoid(implicit_w - implicit_l)


def hinge(implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Linear until the margin reaches 1 nat, then 0: it stops pushing; 1 at margin 0.

    Paper: Liu et al., "Statistical Rejection Sampling Improves Preference Optimization", arXiv 2309.06657 (hinge-norm).
    """
    return functional.relu(1 - (implicit_w - implicit_l))


def ipo(implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Squared distance of the margin from 1/2 nat: a finite goal; 1/4 at margin 0.

    Paper: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv
    2310.12036, eq. 17.
    Departs: the loss is beta^2 times the paper's (log-ratio difference - 1 / (2 beta))^2. Same minimiser, and a
    gradient scale that does not vanish when beta is in the thousands.
    """
    return (implicit_w - implicit_l - 0.5).square()


def cdpo(
    implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"], *, label_smoothing: float
) -> Float[Tensor, " b"]:
    """Negative log-likelihood that the winner wins, under Bradley-Terry with flipped labels.

    Args:
        implicit_w, implicit_l: Implicit rewards of winner and loser, in nats.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Returns:
        Loss per pair, in nats; log 2 at margin 0.

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).

    Paper: Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023 (conservative DPO).
    """
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"link.label_smoothing must be in [0, 0.5), got {label_smoothing}")
    margin = implicit_w - implicit_l
    likely = functional.logsigmoid(margin)
    return -(1 - label_smoothing) * likely - label_smoothing * (likely - margin)


LINKS: dict[str, Callable[..., Tensor]] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "cdpo": cdpo}


def link(name: str, **options: float) -> Link:
    """A link by name, with its options bound.

    Raises:
        InputError: Unknown name, unknown option, or an option missing.
    """
    if name not in LINKS:
        raise InputError(f"method.link must be a known link, got {name!r}{near_match(name, LINKS)}")
    known = {p.name for p in inspect.signature(LINKS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for key in options:
        if key not in known:
            raise InputError(f"method.link: link {name!r} does not take option {key!r}{near_match(key, known)}")
    for key in sorted(known - options.keys()):
        raise InputError(f'method.link: link {name!r} needs option {key!r}; write {{ name = "{name}", {key} = ... }}')
    return partial(LINKS[name], **options) if options else LINKS[name]
