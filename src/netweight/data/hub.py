"""Datasets of the Hugging Face Hub, through its own library."""

from __future__ import annotations

import importlib
import re
from typing import Any

from netweight.errors import DataError, MissingExtra


def load_hub(source: str) -> Any:
    """The `datasets.Dataset` of `hf:NAME[:CONFIG][@SPLIT]`; the split is train where none is named.

    NAME may also be a local folder of data files. Raises MissingExtra without the library; DataError where
    the Hub cannot be reached or has no such dataset, configuration or split.
    """
    match = re.fullmatch(r"hf:(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>\w+))?", source)
    if match is None:
        raise DataError(f"{source!r} does not name a dataset of the Hub; write hf:NAME[:CONFIG][@SPLIT].")
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise MissingExtra("reading from the Hugging Face Hub", "train") from None
    split = match["split"] or "train"
    try:
        return library.load_dataset(match["name"], match["config"], split=split)
    except ConnectionError:
        raise DataError(
            f"the Hugging Face Hub cannot be reached for {source}; go online, or export the table and give the file."
        ) from None
    except FileNotFoundError as error:
        raise DataError(f"the Hugging Face Hub has no dataset {match['name']!r} that you may read ({error}).") from None
    except (ValueError, OSError, library.exceptions.DatasetsError) as error:
        raise DataError(f"{source} cannot be loaded from the Hugging Face Hub: {error}") from None
