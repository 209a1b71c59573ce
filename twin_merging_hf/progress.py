"""What a long job says while it runs."""

import sys

from tqdm.auto import tqdm


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
