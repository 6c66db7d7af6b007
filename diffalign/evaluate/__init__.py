"""Is an aligned model better than its base, on what, by how much, and how sure? All arms start from the same noise.

Protocol `p2-paired-v1`: one image per (prompt, seed number) and arm, deterministic sampler, scores from the 8-bit
images, win rates with intervals over prompts. What is done is on disk and is not done again; `results.json` is written
last: where it lies, the evaluation is whole.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.data.prompts import PromptSet
from diffalign.evaluate.arms import Aligned
from diffalign.evaluate.processes import joined
from diffalign.evaluate.results import Results
from diffalign.evaluate.settings import EvaluationSettings
from diffalign.evaluate.work import prepare
from diffalign.models.load import ModelSource
from diffalign.types import Reward, SetReward

__all__ = ["EvaluationSettings", "evaluate"]


def evaluate(
    base: str | ModelSource,
    aligned: Aligned,
    prompts: str | Path | Sequence[str] | PromptSet,
    *,
    rewards: Sequence[str | Reward | SetReward],
    output: str | Path,
    roles: Mapping[str, str] | None = None,
    settings: EvaluationSettings | None = None,
) -> Results:
    """Compares aligned models with their base; writes results.json, report.html, scores.parquet and images/.

    Started by `accelerate launch` or `torchrun`, processes share the images and the scoring.

    Args:
        base: A pipeline (folder, hub id, shipped name or `ModelSource`), or the folder of a run or of finished images.
        aligned: A pipeline, or a LoRA, a denoiser, the folder of a run or of finished images, as `arms.arm_source`
            takes it; several of them, as a list or by name.
        prompts: A file or set as `data.prompts.read_prompts` takes it, or the prompts; repeated ones are dropped and
            counted, since they would give the same images again.
        rewards: Specs as `rewards.load` and `rewards.load_set` take them, or rewards.
        output: A folder; an evaluation that lies there is gone on with, if its settings are the same.
        roles: By reward name: whose labels the pairs carry ("labeller"), what training optimised ("trained_on"), what
            it never saw ("held_out"). What is not named is read from the runs' configs and data cards; what they do
            not say counts as held out, and the report says so.

    Raises:
        InputError: A model, prompt, reward or folder is wrong; nothing was generated.
        RunError: An image is not finite, or a reward left more than 1 % of the pairs unjudged.
    """
    with joined() as processes:
        with processes.together():
            work = prepare(
                base, aligned, prompts, rewards, roles or {}, Path(output), settings or EvaluationSettings(), processes
            )
        table = work.images(work.plan)
        work.check(table)
        table |= work.scores(table, work.plan)
        sweeps = work.sweeps()
        found: Results | None = None
        with processes.together():
            if processes.main:
                found = work.results(table, sweeps)
        return processes.from_main(found)
