"""Brings what a recipe takes from the Hub into the cache, a part after the other, but for what is there."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
from rich.console import Console

from toolkit.console.screen import bar
from toolkit.doctor.sizes import Part
from toolkit.engine.base import hub
from toolkit.engine.base.quiet import quiet
from toolkit.errors import UserError


def fetch(parts: Sequence[Part], console: Console) -> None:
    """Raises UserError for what cannot be had. The same command goes on where one broke off."""
    for part in parts:
        path = part.repository.path
        kind = "model" if part.source is None else "dataset"
        with (
            bar(console, f"fetching {path}, {part.needed_gib:.2f} GiB", None, hub.fetching(path, kind)),
            quiet(),
        ):
            if part.source is None:
                hub.fetch_weights(path, part.repository.revision)
            else:
                _rows(part)


def _rows(part: Part) -> None:
    """The whole split, as tables: a run that reads a part of it finds it there too."""
    source = part.source
    assert source is not None
    try:
        datasets.load_dataset(
            source.path, source.name, data_dir=source.data_dir, split=source.split, revision=source.revision
        )
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise UserError(
            f"data set {source.path} cannot be read: {' '.join(str(error).split())[:400]}"
        ) from None
    except hub.HUB_ERRORS as error:
        raise UserError(hub.explain(error, "data set", source.path, source.revision)) from None
