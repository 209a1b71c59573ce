"""Write the folder of a Space: the page, its requirements, its card, and the artifact or where it is."""

import json
import re
import shutil
from pathlib import Path

from twin_merging_hf.artifact import check_artifact, read_config, staged
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class
from twin_merging_hf.publish import artifact_files, refuse_local_base


ARTIFACT_FOLDER, SETTINGS_FILE = "artifact", "settings.json"
_HERE = Path(__file__).parent
_REQUIREMENTS = ("gradio>=5", "transformers>=5.17", "torch>=2.6", "accelerate>=1.0", "safetensors>=0.5")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def make_space(artifact: Path, out: Path, repo_id: str | None = None, title: str | None = None) -> Path:
    """
    Write a Gradio Space for an artifact.

    Args:
        artifact: folder of an artifact; its files go along, unless `repo_id` says where they are.
        out: folder to write; must not exist.
        repo_id: `NAME/NAME@COMMIT` of the uploaded artifact; the page loads exactly that commit, for its code runs there.
        title: of the page; default the folder's name.

    Raises:
        TwinMergingError: the artifact is not whole, or refers to a base on this machine or to a file outside of its folder;
            `out` exists; a repository without its commit.
    """
    problems = check_artifact(artifact)
    if problems:
        raise TwinMergingError(f"{artifact} is not whole: {problems[0]}")
    refuse_local_base(artifact)
    config = read_config(artifact)
    source, revision = ARTIFACT_FOLDER, None
    if repo_id is not None:
        source, _, revision = repo_id.partition("@")
        if source.count("/") != 1 or not _COMMIT.fullmatch(revision):
            raise TwinMergingError(
                f"the page runs the repository's code, so give it as NAMESPACE/NAME@COMMIT, all 40 digits; got {repo_id!r}"
            )
    title = " ".join((title or artifact.resolve().name).split())
    settings = {
        "source": source,
        "revision": revision,
        "auto_class": find_shared_class(config.shared_class)[1],
        "experts": config.expert_names,
        "title": title,
    }
    requirements = list(_REQUIREMENTS)
    if settings["auto_class"] == "AutoModelForImageClassification":
        requirements.append("pillow>=10")
    with staged(out, artifact=False) as folder:
        shutil.copyfile(_HERE / "answering.py", folder / "answering.py")
        shutil.copyfile(_HERE / "app.txt", folder / "app.py")  # no module of this package: it needs Gradio
        (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        content = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / SETTINGS_FILE).write_text(content, encoding="utf-8")
        (folder / "README.md").write_text(_card(title, config.expert_names, repo_id, source), encoding="utf-8")
        if repo_id is None:
            (folder / ARTIFACT_FOLDER).mkdir()
            for name in artifact_files(artifact, config):
                shutil.copyfile(artifact / name, folder / ARTIFACT_FOLDER / name)
    return out


def _card(title: str, experts: list[str], repo_id: str | None, source: str) -> str:
    return (
        (_HERE / "card_template.md")
        .read_text(encoding="utf-8")
        .format(
            title=json.dumps(title, ensure_ascii=False) if re.search(r"[^\w .-]", title) else title,
            models="" if repo_id is None else f"models:\n  - {source}\n",
            count=len(experts),
            experts=", ".join(f"`{name}`" for name in experts),
            where="in this folder" if repo_id is None else f"`{repo_id}`",
        )
    )
