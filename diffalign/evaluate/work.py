"""The steps of an evaluation, between what was asked for and its results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from diffalign import environment
from diffalign.data.prompts import PromptSet, quick_rows
from diffalign.evaluate import preflight, sets, sweep
from diffalign.evaluate.arms import Aligned, Arm, find_arms
from diffalign.evaluate.comparison import Judge, compare, ratings
from diffalign.evaluate.examine import Examiner, encoder_of
from diffalign.evaluate.form import Form, form_of
from diffalign.evaluate.images import Plan, Studio, check_pairs, plan_of, take_over, write_metadata
from diffalign.evaluate.judging import score_rows
from diffalign.evaluate.media import Medium
from diffalign.evaluate.processes import Processes, own_device
from diffalign.evaluate.report import write_report
from diffalign.evaluate.results import PROTOCOL, Comparison, Results, SetDifference, Sweep, Tier, write_results
from diffalign.evaluate.roles import assign, optimised
from diffalign.evaluate.score import Table, write_table
from diffalign.evaluate.settings import EvaluationSettings, Sampling, as_table, sampling_of
from diffalign.evaluate.summary import write_summary
from diffalign.models.load import ModelSource, detect_family, load_pipeline
from diffalign.rewards import OnDevice, load_encoder
from diffalign.types import MediaEncoder, Reward, SetReward

FORMAT = 1
"""Of manifest.json and of the journals."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """An evaluation that was checked and may begin."""

    arms: tuple[Arm, ...]
    plan: Plan
    repeated: int
    """Prompts that were given again and dropped."""
    rewards: tuple[Reward, ...]
    judges: tuple[Judge, ...]
    sets: Mapping[str, SetReward]
    encoder: MediaEncoder | None
    """That somebody named."""
    declared: Mapping[str, str]
    settings: EvaluationSettings
    sampling: Sampling | None
    """None where all arms are finished images."""
    form: Form
    batch: int | None
    digests: Mapping[str, str]
    device: torch.device
    folder: Path
    processes: Processes

    def images(self, plan: Plan, guidance: float | None = None) -> Table:
        """One row per image of all arms, made where they are lacking; at another guidance in a folder of its own."""
        place = self.form.medium.folder if guidance is None else f"sweep/g{guidance:g}"
        table: Table = {}
        for arm in self.arms:
            with self.processes.together():
                rows = self._images_of(arm, plan, guidance, f"{place}/{arm.name}")
            if arm.source is not None:
                rows = self._studio(arm).rows(plan, self._sampling(guidance))
            for column, values in rows.items():
                table.setdefault(column, []).extend(values)
        return table

    def scores(self, table: Table, plan: Plan) -> Table:
        """Columns of scores for a table of images."""
        return score_rows(
            self.rewards, table, plan.prompts, self.folder, self.device, self.processes, self.form.medium, self.media
        )

    def check(self, table: Table) -> None:
        """Arms started from the same noise, and metadata.jsonl says so beside their images."""
        check_pairs(table, [arm.name for arm in self.arms])
        if self.processes.main:
            for arm in self.arms:
                write_metadata(table, arm.name, self.folder, self.form.medium)

    @property
    def media(self) -> dict[str, Medium]:
        """What each reward gets, by its name."""
        return {judge.name: self.form.of(judge.spec) for judge in self.judges}

    def sweeps(self) -> dict[float, Table]:
        """Scored tables of the quick prompts by guidance."""
        if not self.settings.sweep:
            return {}
        plan = plan_of(quick(self.plan.prompts), 1)
        made = {g: self.images(plan, g) for g in self.settings.sweep}
        return {g: {**table, **self.scores(table, plan)} for g, table in made.items()}

    def results(self, table: Table, sweeps: Mapping[float, Table]) -> Results:
        """Everything that is computed from the raw scores, written to the folder."""
        write_table({k: v for k, v in table.items() if k != "file"}, self.folder / "scores.parquet")
        if sweeps:
            rows = [{"guidance": [g] * len(t["arm"]), **t} for g, t in sweeps.items()]
            write_table({k: [v for t in rows for v in t[k]] for k in rows[0]}, self.folder / "sweep.parquet")
        names = [arm.name for arm in self.arms]
        rewards = [judge.name for judge in self.judges]
        asked = self.plan.prompts
        with_base = len(names) - 1
        compared = [self._compare(table, *pair) for pair in self._pairs()]
        compared[:with_base] = [self.examiner().examine(one, table) for one in compared[:with_base]]
        of_sets = sets.Sets(
            rewards=self.sets,
            table=table,
            folder=self.folder,
            reference=self.settings.reference,
            medium=self.form.medium,
            media=self.form.media,
            seed=self.settings.seed,
        )
        found = Results(
            arms=tuple(names),
            n_prompts=len(asked),
            n_seeds=self.settings.seeds,
            tier=cast(Tier, self.settings.tier),
            comparisons=tuple(compared),
            ratings=ratings(table, names, rewards, seed=self.settings.seed) if len(names) > 2 else (),
            sets=of_sets.score() if self.sets else (),
            set_differences=tuple(map(self._told, of_sets.compare(self._pairs()))) if self.sets else (),
            sweep=self._summary(sweeps) if sweeps else None,
            prompt_set={"name": asked.name, "sha256": asked.sha256, "duplicates_dropped": self.repeated},
            settings=as_table(self.settings, self.sampling, self.batch, self.form.size),
            models={arm.name: self._about(arm) for arm in self.arms},
            latents_sha256=check_pairs(table, names),
            environment=environment.describe(self.device),
            manifest=self.manifest(),
        )  # fmt: skip
        write_report(found, table, self.folder, preflight.labels_of(asked), self.form.medium)
        write_summary(found, self.folder, self.form.medium)
        write_results(found, self.folder / preflight.RESULTS_FILE)
        return found

    def examiner(self) -> Examiner:
        """What comparisons with the base are examined with."""
        labels = preflight.labels_of(self.plan.prompts)
        return Examiner(
            prompts=self.plan.prompts.prompts,
            strata=next(iter(labels.values()), None),
            rewards=self.rewards,
            encoder=self.encoder or encoder_of(self.rewards, self.form.medium.modality),
            folder=self.folder,
            seed=self.settings.seed,
            medium=self.form.medium,
            media=self.media,
        )

    def manifest(self) -> dict[str, Any]:
        """What the images depend on."""
        asked = self.plan.prompts
        return {
            "format": FORMAT,
            "protocol": PROTOCOL,
            "tier": self.settings.tier,
            "prompts": {"name": asked.name, "sha256": asked.sha256, "count": len(asked)},
            "seeds": self.settings.seeds,
            "sampling": None if self.sampling is None else self.sampling.table,
            "arms": {arm.name: {"spec": arm.spec, "digest": self.digests[arm.name]} for arm in self.arms},
        }

    def _images_of(self, arm: Arm, plan: Plan, guidance: float | None, place: str) -> Table:
        if arm.source is None:
            return take_over(arm, plan, self.folder, self.form.medium)
        self._studio(arm).make(plan, self._sampling(guidance), place)
        return {}

    def _studio(self, arm: Arm) -> Studio:
        return Studio(
            arm=arm,
            digest=self.digests[arm.name],
            folder=self.folder,
            device=self.device,
            batch_size=self.batch or 1,
            processes=self.processes,
            form=self.form,
        )

    def _sampling(self, guidance: float | None) -> Sampling:
        assert self.sampling is not None, "an arm that is a model has a sampling"
        return self.sampling if guidance is None else replace(self.sampling, guidance=guidance)

    def _pairs(self) -> list[tuple[str, str]]:
        """(arm, against): all with the base, then all others if asked for."""
        base, *others = [arm.name for arm in self.arms]
        pairs = [(arm, base) for arm in others]
        if self.settings.pairwise:
            pairs += [(arm, against) for i, arm in enumerate(others) for against in others[:i]]
        return pairs

    def _compare(self, table: Table, arm: str, against: str) -> Comparison:
        chosen = [a for a in self.arms if a.name in (arm, against)]
        judges = assign(self.judges, self.rewards, self.declared, chosen)
        labels = preflight.labels_of(self.plan.prompts)
        return compare(table, judges, arm=arm, against=against, labels=labels, seed=self.settings.seed)

    def _told(self, found: SetDifference) -> SetDifference:
        """A difference of sets that says whether a run of the two arms was trained on its reward."""
        chosen = [a for a in self.arms if a.name in (found.arm, found.against)]
        return replace(found, optimised=optimised(found.spec, chosen))

    def _summary(self, sweeps: Mapping[float, Table]) -> Sweep:
        labels = preflight.labels_of(quick(self.plan.prompts))
        rewards = [judge.name for judge in self.judges]
        strata = next(iter(labels.values()), None)
        return sweep.summarise(sweeps, self._pairs(), rewards, strata=strata, seed=self.settings.seed)

    def _about(self, arm: Arm) -> dict[str, Any]:
        """An arm for results.json."""
        about = {"spec": arm.spec, "digest": self.digests[arm.name], "run": arm.run and str(arm.run)}
        if arm.source is None:
            return about | {
                "source": None,
                "images": str(arm.images),
                "scheduler": {"class": f"finished {self.form.medium.folder}"},
            }
        pipeline = load_pipeline(arm.source, only=())
        detect_family(arm.source).use_sampler(pipeline)
        config = {k: _as_json(v) for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
        scheduler = {"class": type(pipeline.scheduler).__name__, **config}
        return about | {"source": asdict(arm.source), "images": None, "scheduler": scheduler}


def prepare(
    base: str | ModelSource,
    aligned: Aligned,
    prompts: str | Path | Sequence[str] | PromptSet,
    rewards: Sequence[str | Reward | SetReward],
    roles: Mapping[str, str],
    folder: Path,
    settings: EvaluationSettings,
    processes: Processes,
) -> Work:
    """Checks everything that can be wrong, and claims the folder."""
    device = own_device(preflight.pick_device(settings.device))
    asked, repeated = preflight.distinct(prompts)
    if settings.tier == "quick":
        asked = quick(asked)
    arms = find_arms(base, aligned)
    plugins, judges, of_sets = preflight.load_judges(rewards, roles)
    models = {arm.name: arm.source for arm in arms if arm.source is not None}
    form = form_of(arms, settings, [*(judge.spec for judge in judges), *of_sets])
    sampling, batch = None, None
    if models:
        sampling = sampling_of(settings, detect_family(next(iter(models.values()))), form.size, device.type)
        batch = settings.batch_size or form.batch
    preflight.rehearse(plugins, judges, asked, form)
    sets.prepare(of_sets, settings.reference, device, form, len(asked) * settings.seeds)
    named = None if settings.encoder is None else load_encoder(settings.encoder)
    if settings.encoder is not None and named is not None:
        preflight.check_encoder(named, settings.encoder, form.medium)
    if isinstance(named, OnDevice):
        named.to(device)
    preflight.check_arms(arms, settings.sweep)
    work = Work(
        arms=arms,
        plan=plan_of(asked, settings.seeds),
        repeated=repeated,
        rewards=tuple(plugins),
        judges=tuple(judges),
        sets=of_sets,
        encoder=named,
        declared=dict(roles),
        settings=settings,
        sampling=sampling,
        form=form,
        batch=batch,
        digests={arm.name: arm.digest() for arm in arms},
        device=device,
        folder=folder,
        processes=processes,
    )
    for source in list(models.values())[1:]:
        load_pipeline(source)  # what is wrong with it shows here, not after the base's images
    if processes.main:
        preflight.claim(folder, asked, work.manifest(), fresh=settings.fresh)
    return work


def quick(prompts: PromptSet) -> PromptSet:
    """The quick tier's prompts of a set."""
    labels = preflight.labels_of(prompts)
    return quick_rows(prompts, next(iter(labels.values()), None))


def _as_json(value: Any) -> Any:
    """A scheduler's entry; DPM-Solver's bound of minus infinity becomes text, which JSON has."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
