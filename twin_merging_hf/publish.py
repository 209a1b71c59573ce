"""What of an artifact may leave this machine."""

from pathlib import Path

from twin_merging_hf.modeling import TwinMergingConfig

from .artifact import LAYOUT, code_files, read_config, weight_files
from .errors import TwinMergingError, holds_token


_WRITTEN = (LAYOUT.config, LAYOUT.card, LAYOUT.recipe, LAYOUT.report, LAYOUT.evaluation)


def artifact_files(folder: Path, config: TwinMergingConfig) -> list[str]:
    """
    Names of the files that make up an artifact; whatever else lies in its folder is no part of it.

    Raises:
        TwinMergingError: one of them is a link to outside of the folder, whose content nobody meant to publish, or holds a
            Hub token, as a comment in a recipe may.
    """
    wanted = [
        LAYOUT.config,
        LAYOUT.card,
        *(file.name for file in code_files()),
        *config.provenance.get("companions", []),
    ]
    optional = ["generation_config.json", LAYOUT.index, LAYOUT.evaluation, LAYOUT.evaluation_picture]
    wanted += [file.name for file in weight_files(folder)] + [name for name in optional if (folder / name).is_file()]
    names = sorted(set(wanted))
    for name in names:
        path = folder / name
        if path.resolve().parent != folder.resolve():
            raise TwinMergingError(
                f"{path} is a link to {path.resolve()}, outside of the artifact; put the file itself there"
            )
        if name in _WRITTEN and holds_token(path.read_bytes()):
            raise TwinMergingError(
                f"{path} holds a Hub token, which everybody could read; take it out of the recipe and build again, and revoke it"
            )
    return names


def refuse_local_base(folder: Path) -> None:
    """An artifact whose shared model is a reference to a folder of this machine would load nowhere else."""
    reference = read_config(folder).shared_reference
    if reference and not reference.get("revision"):
        raise TwinMergingError(
            f"{folder} refers to the base in {reference['model']}, which nobody else has; build it again with the base's Hub id "
            "as `base_model`, or without `shared_by_reference`"
        )
