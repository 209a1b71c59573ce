"""What a long job says while it runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging


class Progress:
    """Progress of a build on standard error: a line for each step, a bar where one takes long."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet

    def say(self, message: str) -> None:
        """Print one line."""
        if not self.quiet:
            tqdm.write(message, file=sys.stderr)

    def counter(self, description: str, total: int) -> tqdm:
        """Start a bar that its caller moves by `update` and ends by `close`."""
        return tqdm(desc=description, total=total, disable=self.quiet, leave=False)


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Hide the bars of Transformers' own loading and saving, which say nothing beside ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def no_upload_bars(hidden: bool = True) -> Iterator[None]:
    """Hide the bars of the Hub's client, if `hidden`."""
    if not hidden or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
