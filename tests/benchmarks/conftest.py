"""What benchmark commands change for their own process, which in tests is everybody's, is set back."""

import pytest
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="module", autouse=True)
def _settings_stay():
    """The commands quieten Transformers for their own process, which here is everybody's."""
    level, shown = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(level)
    if shown:
        transformers_logging.enable_progress_bar()
