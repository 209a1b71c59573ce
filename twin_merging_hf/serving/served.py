"""What is served: an export for vLLM, read back from its folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.export import BASE_FOLDER, EXPORT_FILE, ROUTER_FOLDER


NONE = BASE_FOLDER  # the model that answers what the router gives to no expert: the shared one


@dataclass(frozen=True)
class Served:
    """An export for vLLM. folder: absolute. experts: names of its adapters. max_lora_rank: of every adapter."""

    folder: Path
    experts: tuple[str, ...]
    max_lora_rank: int

    @property
    def base(self) -> Path:
        return self.folder / BASE_FOLDER

    @property
    def router(self) -> Path:
        return self.folder / ROUTER_FOLDER

    @property
    def models(self) -> tuple[str, ...]:
        """Names that an engine must know."""
        return (NONE, *self.experts)


def read_served(folder: Path) -> Served | None:
    """
    Read a folder that `export --format vllm` wrote; None for a folder that no export wrote.

    Raises:
        TwinMergingError: an export of another format, or one that is damaged.
    """
    file = folder / EXPORT_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != "vllm":
            raise TwinMergingError(f"{folder} is an export of format {content['format']!r}; only `vllm` can be served")
        served = Served(
            folder.absolute(),
            tuple(str(expert["name"]) for expert in content["experts"]),
            int(content["max_lora_rank"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TwinMergingError(f"{file} is damaged ({type(error).__name__}: {error}); export again") from error
    for path in (served.base, served.router, *(served.folder / name for name in served.experts)):
        if not path.is_dir():
            raise TwinMergingError(f"{path} is missing, which {file} names; export again")
    return served
