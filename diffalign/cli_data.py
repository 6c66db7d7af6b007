"""`diffalign data ...`: look at preference data, and make better data of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from diffalign.data.pairs import PairReader
    from diffalign.data.rewrite import Scored

data_app = typer.Typer(help="Look at preference data, filter, score and relabel it.", no_args_is_help=True)
out = Console(emoji=False)

Source = Annotated[str, typer.Argument(help="Parquet file, folder, `datasets` id, or shipped data by name.")]
Out = Annotated[Path, typer.Option("--out", help="New .parquet file.")]
Split = Annotated[str, typer.Option(help="Split of a `datasets` id.")]
Limit = Annotated[int | None, typer.Option(help="Read only the first rows.")]
RewardSpec = Annotated[str, typer.Option("--reward", help="NAME, NAME:MODEL or package.module:object.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@data_app.command("check")
def check_data(
    path: Source,
    split: Split = "train",
    limit: Limit = None,
    streaming: Annotated[bool, typer.Option(help="Read a hub data set without downloading all of it.")] = False,
    resolution: Annotated[int | None, typer.Option(help="Count rows by aspect bucket of this data.resolution.")] = None,
    bucket_step: Annotated[int, typer.Option(help="data.bucket_step of these buckets.")] = 64,
) -> None:
    """Count rows, ties, broken images and duplicates; for a hub id, say its size before any download."""
    from diffalign.data.buckets import bucket_table
    from diffalign.data.check import check, hub_size
    from diffalign.data.pairs import PairReader, PairSource
    from diffalign.shipped import DATASETS, resolve

    if not Path(resolve(path, DATASETS)).exists() and path.count("/") == 1 and not path.startswith((".", "/")):
        size, rows = hub_size(path, split)
        out.print(
            f"{path}: {gigabytes(size)} to download, {rows or 'unknown'} rows in split {split!r}", highlight=False
        )
        if not streaming:
            out.print("add --streaming to read it without downloading all of it, and --limit N for its first rows")
            return
    buckets = () if resolution is None else bucket_table(resolution, step=bucket_step)
    found = check(PairReader(PairSource(path=path, split=split, limit=limit, streaming=streaming)), buckets)
    table = Table("what", "value", title=path, title_justify="left")
    for name, value in describe_check(found):
        table.add_row(name, value)
    out.print(table)
    found.counts.check("data.path", final=True)


@data_app.command("filter")
def filter_data(
    path: Source,
    out_file: Out,
    absolute_winners: Annotated[bool, typer.Option("--absolute-winners", help="The filter; needed.")] = False,
    all_losers: Annotated[bool, typer.Option("--all-losers", help="Keep all pairs of a winner.")] = False,
    split: Split = "train",
    limit: Limit = None,
) -> None:
    """Keep pairs whose winner wins at least once and never loses or ties, its latest pair alone."""
    from diffalign.data.cards import pass_on
    from diffalign.data.rewrite import filter_absolute_winners
    from diffalign.errors import InputError

    if not absolute_winners:
        raise InputError("data filter must be told what to keep, got no filter; add --absolute-winners")
    found = filter_absolute_winners(reader(path, split, limit), out_file, all_losers=all_losers)
    pass_on(path, out_file)
    rows = [("rows", found.rows), ("with a label", found.compared), ("absolute winners", found.winners)]
    show(out_file, [*rows, ("kept", found.kept)])


@data_app.command("score")
def score_data(
    path: Source,
    reward: RewardSpec,
    out_file: Out,
    split: Split = "train",
    limit: Limit = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
) -> None:
    """Write the same rows with a reward's scores of both images, for soft labels and margins."""
    show(out_file, describe_scored(scored(path, reward, out_file, split, limit, batch_size, device, relabel=False)))


@data_app.command("relabel")
def relabel_data(
    path: Source,
    reward: RewardSpec,
    out_file: Out,
    split: Split = "train",
    limit: Limit = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
) -> None:
    """Write the same rows with a reward's scores, and labels by these; equal scores are ties."""
    found = scored(path, reward, out_file, split, limit, batch_size, device, relabel=True)
    show(out_file, [*describe_scored(found), ("labels changed", found.labels.changed)])


@data_app.command("unpair")
def unpair_data(
    path: Source,
    out_file: Out,
    mixed: Annotated[
        Literal["good", "bad", "drop"], typer.Option(help="What images are that won some and lost some.")
    ] = "good",
    split: Split = "train",
    limit: Limit = None,
) -> None:
    """Write the single images of pairs, each labelled good or bad by what it won and lost."""
    from diffalign.data.cards import pass_on
    from diffalign.data.rewrite import unpair

    found = unpair(reader(path, split, limit), out_file, mixed=mixed)
    pass_on(path, out_file)
    groups = [(name.replace("_", " "), number) for name, number in sorted(found.groups.items())]
    show(out_file, [("rows", found.rows), *groups, ("good", found.good), ("bad", found.bad), ("broken", found.broken)])


def reader(path: str, split: str, limit: int | None) -> "PairReader":
    """An opened source."""
    from diffalign.data.pairs import PairReader
    from diffalign.data.sources import PairSource

    return PairReader(PairSource(path=path, split=split, limit=limit))


def scored(
    path: str, spec: str, out_file: Path, split: str, limit: int | None, batch_size: int, device: str, *, relabel: bool
) -> "Scored":
    """Scores a source by a reward that is named."""
    from diffalign import rewards
    from diffalign.data.cards import pass_on
    from diffalign.data.output import check_out
    from diffalign.data.rewrite import score_pairs
    from diffalign.evaluate.preflight import pick_device

    check_out(out_file)
    source = reader(path, split, limit)
    reward = rewards.load(spec)
    rewards.move(reward, pick_device(device))
    found = score_pairs(source, reward, out_file, relabel=relabel, batch_size=batch_size)
    pass_on(path, out_file, scores=spec, **({"labels": spec} if relabel else {}))
    return found


def describe_scored(found: "Scored") -> list[tuple[str, object]]:
    """Rows of the table that scoring ends with."""
    labels = found.labels
    agree = f"{labels.agree} of {labels.decided} ({100 * labels.share:.1f} %)"
    return [
        ("rows", found.rows),
        ("distinct images", found.images),
        ("of these not judged", found.invalid),
        ("mean score gap", f"{found.mean_gap:.4f}"),
        ("scores agree with labels", agree),
    ]


def show(file: Path, rows: "list[tuple[str, object]]") -> None:
    """What was done, and where the result is."""
    table = Table("what", "value")
    for name, value in rows:
        table.add_row(name, str(value))
    out.print(table)
    out.print(f"data: {file}", highlight=False)


def describe_check(found: object) -> list[tuple[str, str]]:
    """Rows of the table that `data check` prints."""
    from diffalign.data.buckets import name_of
    from diffalign.data.check import Check

    assert isinstance(found, Check), "describe_check takes what check returns"
    counts = found.counts
    rows = [
        ("layout", found.layout),
        ("columns", ", ".join(found.columns) or "-"),
        ("rows", str(counts.rows)),
        ("used", str(counts.kept)),
        *[(reason + ("s" if reason == "tie" else ""), str(n)) for reason, n in sorted(counts.dropped.items())],
        ("distinct prompts", str(found.prompts)),
        ("distinct images", str(found.images)),
        ("repeated rows", str(found.repeated_pairs)),
        ("pairs of equal images", str(found.equal_pairs)),
        ("image sizes", ", ".join(f"{w}x{h} ({n})" for (w, h), n in found.sizes.most_common(4))),
        ("images", gigabytes(found.bytes)),
    ]
    filled = [(name_of(size), found.filled[i]) for i, size in enumerate(found.buckets)]
    rows += [(f"bucket {name}", str(n)) for name, n in filled if n]
    if found.buckets:
        rows.append(("losers cropped to another bucket", str(found.cropped)))
    if found.labelled:
        word = "first image wins" if found.layout == "pickapic" else "good labels"
        rows.append((word, f"{found.first_wins} of {found.labelled} ({100 * found.first_wins / found.labelled:.1f} %)"))
    if found.gaps:
        agree = sum(gap > 0 for gap in found.gaps) + 0.5 * sum(gap == 0 for gap in found.gaps)
        share = f"{agree:g} of {len(found.gaps)} ({100 * agree / len(found.gaps):.1f} %)"
        rows.append(("scores agree with labels", share + ", a tie counts half"))
        rows.append(("mean score gap", f"{sum(found.gaps) / len(found.gaps):+.4f}, winner minus loser"))
    return rows + [("broken", text) for text in counts.broken[:5]]


def gigabytes(size: int | None) -> str:
    """A size in words."""
    if size is None:
        return "unknown size"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
