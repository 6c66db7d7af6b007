"""Data cards: by whose judgement preference data are labelled, and whose numbers their score columns hold.

A card is a JSON file beside the data, `<name>.card.json`, or `card.json` in a folder: `labels` and `scores`, each the
spec of a reward, and `source`, the data that these were made of.
"""

import json
from pathlib import Path
from typing import Any

from diffalign.errors import InputError
from diffalign.shipped import DATASETS, resolve


def card_file(data: Path) -> Path:
    """Where the card of preference data lies."""
    return data.with_name(f"{data.stem}.card.json") if data.suffix else data / "card.json"


def read_card(data: str) -> dict[str, str]:
    """What the card of preference data says; empty where there is none.

    Raises:
        InputError: It is not an object of texts.
    """
    file = card_file(Path(resolve(data, DATASETS)))
    if not file.is_file():
        return {}
    try:
        card: Any = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} must be JSON, got {error}") from error
    if not isinstance(card, dict) or not all(isinstance(v, str) for v in card.values()):
        raise InputError(f"{file} must be an object of texts, got {card!r}")
    return card


def pass_on(source: str, out: Path, **changes: str) -> None:
    """Writes the card of data that were made of others: what theirs says, and what has changed."""
    card = {"source": source, **read_card(source), **changes}
    card_file(out).write_text(json.dumps(card) + "\n", encoding="utf-8")
