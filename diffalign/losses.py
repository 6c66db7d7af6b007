"""Links: what a preference loss does with the implicit rewards of winner and loser, and the squared error beneath them.

A link maps (implicit_w, implicit_l), written A and B, each [B] in nats, to a loss per pair [B]. With h = A - B, S the
logistic function and l(z) = -log S(z): sigmoid l(h); hinge max(0, 1 - h); ipo (h - 1/2)^2; cdpo (1-e) l(h) + e l(-h);
robust [(1-e) l(h) - e l(-h)] / (1-2e); exo_pair KL((S(h), S(-h)) : (1-e, e)); nca_pair l(A) + l(-A)/2 + l(-B)/2;
bco_pair l(A-d) + l(d-B); apo_zero 1 - S(A) + S(B); apo_down S(A) + 1 - S(h); sppo_hard (A - 1/2)^2 + (B + 1/2)^2.
beta is not here: an implicit reward is beta times a log-ratio already. Names and defaults are TRL's where it has them.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
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


@torch.no_grad()
def error_gain(
    pred: Float[Tensor, " b *rest"], pred_ref: Float[Tensor, " b *rest"], target: Float[Tensor, " b *rest"]
) -> Float[Tensor, " b"]:
    """squared_error(pred_ref, target) - squared_error(pred, target), without gradient, to more digits.

    With p, r and n for the three it is the mean of (r - p) (r + p - 2n), in float32 or better: a difference of two
    averages would keep the rounding of both, and beta in the thousands multiplies it. Exactly 0 at equal predictions.
    """
    pred, pred_ref, target = (x.float() if x.dtype.itemsize < 4 else x for x in (pred, pred_ref, target))
    return ((pred_ref - pred) * ((pred_ref - target) + (pred - target))).flatten(1).mean(1)


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
        Loss per pair, in nats; log 2 at margin 0; least at margin logit(1 - label_smoothing).

    Raises:
        InputError: `label_smoothing` outside [0, 0.5).

    Paper: Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023 (conservative DPO).
    """
    _check_smoothing(label_smoothing)
    margin = implicit_w - implicit_l
    return -functional.logsigmoid(margin) + label_smoothing * margin


def robust(
    implicit_w: Float[Tensor, " b"],
    implicit_l: Float[Tensor, " b"],
    *,
    label_smoothing: float,
    max_margin: float = 10.0,
) -> Float[Tensor, " b"]:
    """Unbiased estimate of the sigmoid loss that clean labels would give, from labels flipped at a known rate.

    Args:
        label_smoothing: Probability that a label is flipped, in [0, 0.5).
        max_margin: The margin is cut here and pushes no further, in nats; without it the loss falls for ever.

    Raises:
        InputError: `label_smoothing` outside [0, 0.5), or `max_margin` not positive.

    Paper: Chowdhury et al., "Provably Robust DPO", arXiv 2403.00409, eq. 12.
    Departs: the margin is cut at `max_margin`; the paper's loss is not bounded below. inf gives the paper's.
    """
    _check_smoothing(label_smoothing)
    if not max_margin > 0:
        raise InputError(f"link.max_margin must be positive, got {max_margin}")
    margin = (implicit_w - implicit_l).clamp(max=max_margin)
    return -functional.logsigmoid(margin) - label_smoothing / (1 - 2 * label_smoothing) * margin


def exo_pair(
    implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"], *, label_smoothing: float = 1e-3
) -> Float[Tensor, " b"]:
    """Reverse KL divergence from the model's preference to the label's, softened; 0 at margin logit(1 - e).

    Args:
        label_smoothing: Probability e that the label is wrong, in (0, 0.5); at 0 the divergence is infinite.

    Raises:
        InputError: `label_smoothing` outside (0, 0.5).

    Paper: Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment", arXiv 2402.00856, eq. 20.
    """
    if not 0 < label_smoothing < 0.5:
        raise InputError(f"link.label_smoothing of exo_pair must be in (0, 0.5), got {label_smoothing}")
    margin = implicit_w - implicit_l
    log_win, log_lose = functional.logsigmoid(margin), functional.logsigmoid(-margin)
    return log_win.exp() * (log_win - math.log1p(-label_smoothing)) + log_lose.exp() * (
        log_lose - math.log(label_smoothing)
    )


def nca_pair(implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Each image is told apart from noise on its own: the winner's reward has its goal at log 2; 2 log 2 at rewards 0.

    Paper: Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards", arXiv 2402.05369.
    """
    log = functional.logsigmoid
    return -log(implicit_w) - 0.5 * log(-implicit_w) - 0.5 * log(-implicit_l)


def bco_pair(
    implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"], *, delta: Float[Tensor, ""] | float = 0.0
) -> Float[Tensor, " b"]:
    """A classifier of good and bad with its threshold at `delta`: winners above, losers below; 2 log 2 there.

    It bounds the sigmoid loss from above, most tightly with `delta` halfway between the two rewards.

    Args:
        delta: Threshold in nats. As a link by name without this option, the running mean of all implicit rewards.

    Paper: Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656.
    """
    return -functional.logsigmoid(implicit_w - delta) - functional.logsigmoid(delta - implicit_l)


def apo_zero(implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Winner up and loser down, each on its own: for data better than the model; 1 at rewards 0.

    Paper: D'Oosterlinck et al., "Anchored Preference Optimization", arXiv 2408.06266.
    """
    return torch.sigmoid(-implicit_w) + torch.sigmoid(implicit_l)


def apo_down(implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Both down, the loser further: for data worse than the model; 1 at rewards 0.

    Paper: D'Oosterlinck et al., "Anchored Preference Optimization", arXiv 2408.06266.
    """
    return torch.sigmoid(implicit_w) + torch.sigmoid(implicit_l - implicit_w)


def sppo_hard(implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Winner to +1/2 nat, loser to -1/2: half of an ipo with goal 1 and a penalty on both drifting together.

    The winner's goal can be met only if beta / 2 times its reference error exceeds 1/2: beta of 100 or more at errors
    around 0.01 to 0.1.

    Paper: Wu et al., "Self-Play Preference Optimization", arXiv 2405.00675, with TRL's hard targets.
    Departs: beta^2 times TRL's (log-ratio -+ 1 / (2 beta))^2, as `ipo` is.
    """
    return (implicit_w - 0.5).square() + (implicit_l + 0.5).square()


def soft_label(
    link: Link, implicit_w: Float[Tensor, " b"], implicit_l: Float[Tensor, " b"], p: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Expected loss of a link when the first image is the better one with probability `p` in [0, 1].

    With sigmoid this is p l(h) + (1 - p) l(-h), least at margin logit(p); p = 1 is the link itself.

    Paper: the soft labels of Mitchell's conservative DPO, with a probability for every pair.
    """
    return p * link(implicit_w, implicit_l) + (1 - p) * link(implicit_l, implicit_w)


@dataclass(frozen=True, kw_only=True)
class LinkProperties:
    """What the mathematics of a link promises."""

    margin_only: bool
    """Depends on implicit_w - implicit_l alone, so that it makes sense without a reference."""
    convex: bool
    """Convex in the rewards: one draw of (t, noise) bounds the loss of the expectation from above."""
    bounded_below: bool
    optimum: str
    """Rewards at which it is least."""


LINKS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "cdpo": cdpo,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sppo_hard": sppo_hard,
}

_FREE = {"convex": True, "bounded_below": True}
PROPERTIES: dict[str, LinkProperties] = {
    "sigmoid": LinkProperties(margin_only=True, **_FREE, optimum="h = inf"),
    "hinge": LinkProperties(margin_only=True, **_FREE, optimum="h >= 1"),
    "ipo": LinkProperties(margin_only=True, **_FREE, optimum="h = 1/2"),
    "cdpo": LinkProperties(margin_only=True, **_FREE, optimum="h = logit(1 - e)"),
    "robust": LinkProperties(margin_only=True, **_FREE, optimum="h >= max_margin"),
    "exo_pair": LinkProperties(margin_only=True, convex=False, bounded_below=True, optimum="h = logit(1 - e)"),
    "nca_pair": LinkProperties(margin_only=False, **_FREE, optimum="A = log 2, B = -inf"),
    "bco_pair": LinkProperties(margin_only=False, **_FREE, optimum="A = inf, B = -inf"),
    "apo_zero": LinkProperties(margin_only=False, convex=False, bounded_below=True, optimum="A = inf, B = -inf"),
    "apo_down": LinkProperties(
        margin_only=False, convex=False, bounded_below=True, optimum="A, B, h = -inf, -inf, inf"
    ),
    "sppo_hard": LinkProperties(margin_only=False, **_FREE, optimum="A = 1/2, B = -1/2"),
}


def link(name: str, **options: object) -> Link:
    """A link by name, with its options bound.

    Raises:
        InputError: Unknown name, unknown option, an option missing, or one out of its range.
    """
    if name not in LINKS:
        raise InputError(f"method.link must be a known link, got {name!r}{near_match(name, LINKS)}")
    known = {p.name: p for p in inspect.signature(LINKS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in known:
            others = sorted(n for n, f in LINKS.items() if key in inspect.signature(f).parameters)
            hint = f"; it belongs to {', '.join(others)}" if others else near_match(key, known)
            raise InputError(f"method.link: link {name!r} does not take option {key!r}{hint}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"method.link.{key} must be a number, got {value!r}")
    for key in sorted(k for k, p in known.items() if p.default is p.empty and k not in options):
        raise InputError(f'method.link: link {name!r} needs option {key!r}; write {{ name = "{name}", {key} = ... }}')
    bound = partial(LINKS[name], **options) if options else LINKS[name]
    bound(torch.zeros(1), torch.zeros(1))  # an option out of its range shows here, not at the first step
    return bound


def link_name(link: Link) -> str:
    """The name of a link as `link` returns them."""
    function = link.func if isinstance(link, partial) else link
    return next(name for name, known in LINKS.items() if known is function)


def follows_mean(link: Link) -> bool:
    """Whether a link's threshold is the running mean of all implicit rewards: `bco_pair` without a `delta`."""
    return link is bco_pair


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"link.label_smoothing must be in [0, 0.5), got {label_smoothing}")
