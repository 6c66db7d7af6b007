"""Which images of a round a method trains on, by their advantages."""

from dataclasses import replace

from diffalign.advantages import Past, Recipe, choose
from diffalign.types import Scored, Selection


def select_by_advantage(scored: Scored, recipe: Recipe) -> Selection:
    """One image a row with its clipped advantage; prompts without any difference are left out and counted.

    If no prompt is left there are no rows.
    """
    chosen = choose(scored.scores, scored.weights, scored.group, recipe, past=past_by_group(scored))
    return Selection(places=chosen.places[:, None], weight=chosen.advantage.float(), metrics=chosen.metrics)


def penalised(scored: Scored, weight: float) -> Scored:
    """Every score less `weight` times how much likelier its image's way was than under the reference.

    The mean of that log-ratio over ways of the policy is its KL to the reference.

    Raises:
        ValueError: The images come without log-ratios.
    """
    if scored.log_ratio is None:
        raise ValueError("scored.log_ratio must be there for a KL inside the reward, got None")
    less = {name: values - weight * scored.log_ratio.to(values) for name, values in scored.scores.items()}
    return replace(scored, scores=less)


def past_by_group(scored: Scored) -> dict[str, Past]:
    """Earlier scores by reward, and by the number that a prompt has in this round."""
    return {
        name: {number: before[prompt] for number, prompt in enumerate(scored.prompts) if prompt in before}
        for name, before in scored.past.items()
    }
