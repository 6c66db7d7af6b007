"""What may be read, and what is said when reading fails: one line that names the key and the path."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffalign.errors import InputError
from diffalign.progress import loading
from diffalign.shipped import MODELS, resolve

PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickle(where: str, path: str) -> None:
    """Raises InputError for a file of a format that can run code."""
    if path.endswith(PICKLE):
        raise InputError(
            f"{where} must be safetensors weights, got the pickle checkpoint {path!r}, which can run code when read; "
            "convert it first (load it in a trusted place, then save_pretrained(..., safe_serialization=True))"
        )


def check_weights(folder: Path, where: str) -> None:
    """Raises InputError unless a component's folder is there with safetensors weights."""
    if not folder.is_dir():
        raise InputError(f"{where} must be a folder with weights, got {str(folder)!r}, which is missing")
    if any(folder.glob("*.safetensors")):
        return
    for file in sorted(folder.iterdir()):
        refuse_pickle(where, str(file))
    raise InputError(f"{where} must hold a .safetensors file in {str(folder)!r}, got none")


@contextmanager
def one_line(where: str, path: str) -> Iterator[None]:
    """Turns the loaders' long messages into one line that names the key and the path."""
    from huggingface_hub.errors import HTTPError

    try:
        with loading(resolve(path, MODELS)):
            yield
    except (OSError, ValueError, LookupError, RuntimeError, SafetensorError, HTTPError) as error:
        if isinstance(error, InputError):
            raise
        known = None if Path(path).exists() else _hub_message(where, path, error)
        reason = " ".join(str(error).split())[:300]
        raise InputError(known or f"{where} must be a loadable model, got {path!r}: {reason}") from error


def hub_files(repo: str, names: Sequence[str], revision: str | None = None) -> list[str]:
    """Those of `names` that are files of a repository of the hub; where that is out of reach, those in the cache.

    Raises:
        RepositoryNotFoundError: The hub has no such repository, or hides it.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    try:
        there = {file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()}
    except RepositoryNotFoundError:
        raise
    except (OSError, HTTPError):
        there = {n for n in names if isinstance(try_to_load_from_cache(repo, n, revision=revision), str)}
    return [name for name in names if name in there]


def _hub_message(where: str, path: str, error: BaseException) -> str | None:
    """What the hub had against a repository, if that is what went wrong; loaders say it in words of their own."""
    from huggingface_hub import errors

    told: BaseException | None = error
    while told is not None:
        if isinstance(told, errors.GatedRepoError):
            return (
                f"{where} must be a repository that you may read, got {path!r}, which is gated; accept its terms on "
                f"https://huggingface.co/{path} and log in (hf auth login)"
            )
        if isinstance(told, errors.RepositoryNotFoundError):
            return (
                f"{where} must be a folder or a repository of the hub, got {path!r}, which is neither; a private one "
                "needs a login (hf auth login)"
            )
        if isinstance(told, errors.RevisionNotFoundError):
            return f"{where} must have the revision that is asked for, got {path!r}, which the hub has without it"
        unreached = isinstance(told, errors.HTTPError) and not isinstance(told, errors.HfHubHTTPError)
        if unreached or isinstance(told, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            return (
                f"{where} must be a folder, or be in the hub's cache while the hub is out of reach, got {path!r}, "
                f"which is neither; fetch it where there is a network (hf download {path})"
            )
        told = told.__cause__ or told.__context__
    return None
