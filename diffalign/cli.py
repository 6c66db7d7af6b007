"""The command line: thin commands over the Python road, one line for every error."""

import importlib.metadata
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from diffalign.cli_data import data_app
from diffalign.cli_plan import plan
from diffalign.cli_rewards import Mono, reference, serve_reward
from diffalign.errors import InputError, RunError

app = typer.Typer(
    name="diffalign",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
out = Console(emoji=False)  # or a spec such as fad:clap:x is printed as clapping hands
COMMAND = sys.argv[1:]
"""What was typed, for a report to repeat."""

DEMO = (
    "diffalign train tiny_sd_diffusion_dpo output=runs/demo resume=latest",
    "diffalign evaluate tiny-sd runs/demo --prompts tiny --reward oracle --reward clip:tiny-clip "
    "--reward aesthetic:tiny-aesthetic --labeller oracle --held-out clip --held-out aesthetic --steps 20 "
    "--guidance 2.0 --images-per-prompt 1 --out runs/demo",
)
"""What the demo does, as commands."""
SOUND_DEMO = (
    "python -m diffalign.tiny sounds --out runs/demo-sounds --count 256 --seed 20",
    "diffalign train tiny_audio_dragon output=runs/demo-audio resume=latest online.set_reference=runs/demo-sounds "
    "train.steps=40 checkpoint.every=40",
    "diffalign evaluate tiny-audio runs/demo-audio --prompts tiny-sounds --seconds 1.536 --reward fad:clap:tiny-clap "
    "--reward fad:log_mel --reference runs/demo-sounds --reward sound_oracle --reward clap:tiny-clap --steps 10 "
    "--guidance 3.0 --images-per-prompt 1 --out runs/demo-audio",
)
"""What the demo of sounds does: the clips of the first line are what the model's own are to become more like."""

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Rewards = Annotated[list[str], typer.Option("--reward", help="NAME, NAME:MODEL or package.module:object; repeat it.")]
Prompts = Annotated[str, typer.Option(help="A prompt set by name, or a .txt, .jsonl, .json, .csv or .tsv file.")]
Base = Annotated[str | None, typer.Option(help="Base pipeline, if MODEL is a LoRA or a denoiser alone.")]
Limit = Annotated[int | None, typer.Option(help="Use only so many prompts, chosen by their hash.")]
PerPrompt = Annotated[int, typer.Option(help="Seeds per prompt.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps; the model family's own if left out.")]
Guidance = Annotated[
    float | None, typer.Option(help="Weight w in uncond + w (cond - uncond), 1 is off; the family's own if left out.")
]
BatchSize = Annotated[int, typer.Option(help="Images at a time.")]
ModelBatch = Annotated[int | None, typer.Option(help="Images at a time; by the model's size if left out.")]


def main() -> None:
    """Entry point: runs a command, and turns our errors into one line and an exit status."""
    quiet_libraries()
    try:
        app()
    except InputError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail('stopped; a run goes on with resume = "latest"', 130)


def fail(message: str, status: int) -> None:
    """Prints one line to stderr, from the first process only, and ends."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()
        print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def quiet_libraries() -> None:
    """Keeps libraries' advice for developers off the terminal; their errors still show, and what a run begins with."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)  # Diffusers' sound autoencoders
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffalign.train").setLevel(logging.INFO)


def say_version(wanted: bool) -> bool:
    """Prints the version and ends, if that is what was asked for."""
    if wanted:
        print(f"diffalign {importlib.metadata.version('diffalign')}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Align any Diffusers model to preferences, and prove that it worked."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A TOML file, or the bare name of a shipped config.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
) -> None:
    """Train as a config says."""
    import torch

    from diffalign.config import load
    from diffalign.train import run

    result = run(load(config, overrides or []))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        out.print(f"export of step {result.step}: {result.export}", highlight=False)


app.command("plan")(plan)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Pipeline folder, hub id, shipped name, or a run's folder.")],
    out_dir: Annotated[Path, typer.Option("--out", help="New folder for the images and metadata.jsonl.")],
    prompts: Prompts = "tiny",
    base: Base = None,
    limit: Limit = None,
    images_per_prompt: PerPrompt = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: ModelBatch = None,
    device: Device = "auto",
) -> None:
    """Make images, each from the noise that belongs to its prompt."""
    from diffalign.evaluate.sample import SampleSettings, model_source, sample_to_folder

    settings = SampleSettings(
        images_per_prompt=images_per_prompt, steps=steps, guidance=guidance, batch_size=batch_size, device=device
    )
    count = sample_to_folder(model_source(model, base), prompts, out_dir, settings, limit)
    out.print(f"{count} images: {out_dir}", highlight=False)


@app.command()
def score(
    images: Annotated[Path, typer.Argument(help="Folder of images, such as one that `sample` made.")],
    reward: Rewards,
    out_file: Annotated[Path, typer.Option("--out", help="A .parquet or .csv file.")],
    prompts: Annotated[str | None, typer.Option(help="A prompt set; without it metadata.jsonl or .txt files.")] = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
) -> None:
    """Score a folder of images with rewards."""
    from diffalign import rewards
    from diffalign.data.prompts import read_prompts
    from diffalign.evaluate.preflight import pick_device
    from diffalign.evaluate.score import check_table_file, score_folder, write_table

    check_table_file(out_file)
    loaded = [rewards.load(spec) for spec in reward]
    for one in loaded:
        rewards.move(one, pick_device(device))
    table = score_folder(images, loaded, None if prompts is None else read_prompts(prompts), batch_size=batch_size)
    write_table(table, out_file)
    means = Table("reward", "mean", "images")
    for one in loaded:
        judged = [v for v in table[one.name] if v == v]
        means.add_row(one.name, f"{sum(judged) / len(judged):.4f}", str(len(judged)))
    out.print(means)
    out.print(f"scores: {out_file}", highlight=False)


@app.command()
def evaluate(
    base: Annotated[str, typer.Argument(help="Pipeline folder, hub id, shipped name, or a folder of images or clips.")],
    aligned: Annotated[
        list[str],
        typer.Argument(help="Pipelines, LoRAs, denoisers, runs or folders of images or clips; [NAME=]PLACE each."),
    ],
    reward: Rewards,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results.json, report.html and samples.")],
    prompts: Prompts = "tiny",
    labeller: Annotated[list[str] | None, typer.Option(help="Reward whose labels the pairs carry.")] = None,
    trained_on: Annotated[list[str] | None, typer.Option(help="Reward that training optimised.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Reward that training never saw.")] = None,
    tier: Annotated[str, typer.Option(help="full, or quick: 96 prompts and one seed.")] = "full",
    limit: Limit = None,
    images_per_prompt: Annotated[
        int | None, typer.Option(help="Seeds per prompt; 4, or 1 in the quick tier, if left out.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sweep: Annotated[list[float] | None, typer.Option(help="A guidance to compare at too; repeat it.")] = None,
    pairwise: Annotated[bool, typer.Option("--pairwise", help="Compare every arm with every other.")] = False,
    encoder: Annotated[str | None, typer.Option(help="Encoder for diversity, drift and checks.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Reference set, for rewards of sets that need one: a folder, or a kept file.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of a clip, for models of sound.")] = None,
    heard_hz: Annotated[
        list[str] | None,
        typer.Option(help="Samples a second at which rewards hear clips, or SPEC=NUMBER for one reward; repeat it."),
    ] = None,
    mono: Mono = False,
    dtype: Annotated[str, typer.Option(help="Of the models: float32, float16 or bfloat16.")] = "float32",
    batch_size: ModelBatch = None,
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew in a folder that holds an evaluation.")] = False,
) -> None:
    """Compare models on the same prompts and noise, and write a report; what is done already is not done again."""
    from diffalign.data.prompts import read_prompts
    from diffalign.evaluate import EvaluationSettings
    from diffalign.evaluate import evaluate as compare
    from diffalign.evaluate.arms import parse_arms
    from diffalign.evaluate.settings import parse_hearing

    rate, rates = parse_hearing(heard_hz or [])
    settings = EvaluationSettings(
        tier=tier, images_per_prompt=images_per_prompt, steps=steps, guidance=guidance,
        sweep=tuple(sweep or ()), pairwise=pairwise, encoder=encoder, reference=reference,
        seconds=seconds, heard_hz=rate, heard_hz_of=rates, mono=mono,
        dtype=dtype, batch_size=batch_size,
        device=device, fresh=fresh, command=shlex.join(["diffalign", *COMMAND]),
    )  # fmt: skip
    named = (("labeller", labeller), ("trained_on", trained_on), ("held_out", held_out))
    roles = {name: role for role, names in named for name in names or []}
    asked = read_prompts(prompts, limit)
    arms = parse_arms(aligned)
    results = compare(base, arms, asked, rewards=reward, output=out_dir, roles=roles, settings=settings)
    if os.environ.get("RANK", "0") == "0":
        print_results(results)
        out.print(f"report: {out_dir / 'report.html'}", highlight=False)


app.command("reference")(reference)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run's folder, a LoRA, a denoiser or a checkpoint in one file.")],
    out_dir: Annotated[Path, typer.Option("--out", help="New folder; for kohya a new .safetensors file.")],
    base: Base = None,
    form: Annotated[
        str, typer.Option("--format", help="diffusers: a whole pipeline; kohya or peft: the LoRA alone.")
    ] = "diffusers",
) -> None:
    """Write a model for other programs: a pipeline with a LoRA fused into it, or the LoRA in another form."""
    from diffalign.evaluate import sample as samples

    samples.export(samples.model_source(model, base), out_dir, form)
    out.print(f"{'pipeline' if form == 'diffusers' else 'LoRA'}: {out_dir}", highlight=False)


app.command("serve-reward")(serve_reward)


@app.command()
def env() -> None:
    """Say what is installed and what this machine can do."""
    from diffalign.environment import EXTRAS, bitsandbytes_fault, describe, versions
    from diffalign.evaluate.preflight import pick_device

    device = pick_device("auto")
    about = describe(device)
    table = Table("what", "value", title="environment", title_justify="left")
    for name in ("python", "platform", "commit", "device", "device_name", "cuda", "threads"):
        table.add_row(name, str(about[name]))
    for name, version in about["packages"].items():
        table.add_row(name, version)
    for extra, packages in EXTRAS.items():
        found = versions(packages)
        missing = [p for p, v in found.items() if v == "missing"]
        table.add_row(
            f"extra {extra}",
            f"missing {', '.join(missing)}; pip install 'diffalign\\[{extra}]'"
            if missing
            else ", ".join(f"{p} {v}" for p, v in found.items()),
        )
    if versions(EXTRAS["8bit"])["bitsandbytes"] != "missing":
        fault = bitsandbytes_fault(device)
        table.add_row("quantize 8bit, 4bit", "works" if fault is None else f"no: {fault}")
    for name, words in attention_rows(device):
        table.add_row(f"attention {name}", words)
    out.print(table)


def attention_rows(device: object) -> list[tuple[str, str]]:
    """What every attention kernel does at the head dimensions of all families, forward and backward."""
    import torch

    from diffalign import attention

    assert isinstance(device, torch.device), "attention_rows takes the device that env found"
    dims = sorted({d for dims in attention.HEAD_DIMS.values() for d in dims})
    rows = []
    for name in attention.NAMES[1:]:
        why = attention.missing(name, device)
        if why is not None:
            rows.append((name, f"no: {why}"))
            continue
        for dtype in attention.DTYPES:
            trials = [attention.trial(name, d, dtype, device) for d in dims]
            parts = [f"{t.head_dim}: {f'{t.seconds * 1e3:.1f} ms' if t.seconds else 'no'}" for t in trials]
            rows.append((f"{name} {dtype}", ", ".join(parts)))
    return rows


@app.command(name="list")
def list_() -> None:
    """List methods, families, rewards, configs, models, data and prompt sets."""
    from diffalign import rewards, shipped
    from diffalign.data.prompt_sets import SETS
    from diffalign.denoisers import FAMILIES
    from diffalign.methods import METHODS

    def summary(thing: object) -> str:
        return (thing.__doc__ or "").strip().splitlines()[0]

    rows = [("method", name, summary(cls)) for name, cls in METHODS.items()]
    rows += [("family", f.name, ", ".join(f.pipelines)) for f in FAMILIES.values()]
    for kind, of in (("reward", rewards.GROUP), ("set reward", rewards.SET_GROUP), ("encoder", rewards.ENCODER_GROUP)):
        rows += [(kind, name, rewards.summary(name, of)) for name in rewards.names(of)]
    rows += [("config", file.stem, first_comment(file)) for file in sorted(shipped.configs().glob("*.toml"))]
    rows += [("model", name, "shipped") for name in shipped.MODELS]
    rows += [("data", name, "shipped") for name in shipped.DATASETS]
    rows += [("prompts", name, "shipped") for name in shipped.PROMPTS]
    rows += [("prompts", name, known.about) for name, known in SETS.items()]
    table = Table("kind", "name", "what")
    for i, row in enumerate(rows):
        table.add_row(*row, end_section=i + 1 < len(rows) and rows[i + 1][0] != row[0])
    out.print(table)


@app.command()
def demo(
    audio: Annotated[bool, typer.Option("--audio", help="Clips of sound in the place of images.")] = False,
) -> None:
    """Align a shipped tiny model, evaluate it, and print the commands that do it."""
    from diffalign.tiny.__main__ import main as tiny
    from diffalign.tiny.exemplars import is_written

    for command in SOUND_DEMO if audio else DEMO:
        out.print(f"\n[bold]$ {command}[/bold]", highlight=False)
        program, *words = shlex.split(command)
        if program != "diffalign":
            if not is_written(Path(words[words.index("--out") + 1])):
                tiny(words[2:])
            continue
        COMMAND[:] = words
        app(list(COMMAND), standalone_mode=False)


def print_results(results: object) -> None:
    """The small tables that an evaluation ends with, and its verdicts."""
    from diffalign.evaluate import terminal
    from diffalign.evaluate.results import Results

    assert isinstance(results, Results), "print_results takes what evaluate returns"
    for line in terminal.lines(results, out.width):
        out.print(line, highlight=False)


def first_comment(file: Path) -> str:
    """First line of a config, which says what it is."""
    return file.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip()
