"""An artifact to the Hub: checked first, as one commit, under a card that names its repository."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from twin_merging_hf.artifact import LAYOUT, read_config
from twin_merging_hf.errors import TwinMergingError, without_tokens
from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class
from twin_merging_hf.publish import artifact_files, refuse_local_base
from twin_merging_hf.reload import check_whole

from .model_card import LOCATION, render_card


# The client's own base class for broken connections; its module differs between versions of the client.
_HTTP_ERROR: type[Exception] = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
_KINDS = {
    "AutoModelForImageClassification": "image",
    "AutoModelForTokenClassification": "tokens",
    "AutoModelForCausalLM": "prompt",
    "AutoModelForSeq2SeqLM": "prompt",
    "AutoModelForMaskedLM": "masked",
}
_QUOTA_CODES = (402, 413, 507)
# By name, as the client's library for connections differs between its versions.
_NO_NETWORK = {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}


@dataclass(frozen=True)
class Pushed:
    """
    What an upload did. commit: hash that readers should pin. pr_url: of the pull request, if one was opened.
    left: files of the folder that are no part of the artifact and stayed here.
    """

    repo_id: str
    commit: str
    commit_url: str
    pr_url: str | None
    left: list[str]


def push_artifact(
    artifact: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    say: Callable[[str], object] = lambda message: None,
) -> Pushed:
    """
    Upload an artifact as one commit, so that a reader gets all of the old one or all of the new one.

    The repository is made if it does not exist (not for a pull request). Weights, index and model code of an earlier
    artifact that this one does not have are deleted in the same commit. Doing it again uploads nothing twice, also after an
    interruption.

    Args:
        private: of a repository that is made now; None: the account's default.
        create_pr: open a pull request instead of committing.
        revision: branch, made if needed; or `refs/pr/N` to add to a pull request.
        token: as in huggingface_hub; None: HF_TOKEN or the stored login.
        say: takes sentences on progress.

    Raises:
        TwinMergingError: the artifact does not pass `check_whole`, refers to a base on this machine, holds a link to outside
            of its folder, its card was edited so that the Hub cannot read it, or the Hub refuses or cannot be had (no such
            repository, bad token, no permission, quota, no network, broken connection).
    """
    folder = Path(artifact)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise TwinMergingError(f"{repo_id!r} can be no repository, give NAME or NAMESPACE/NAME: {error}") from error
    if create_pr and revision not in (None, "main"):
        raise TwinMergingError("a pull request is opened against main: give either `create_pr` or `revision`, not both")
    refuse_local_base(folder)
    say("checking the artifact")
    problems = check_whole(folder)
    if problems:
        raise TwinMergingError(
            f"{folder} is not whole, so it is not uploaded:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    config = read_config(folder)
    names = artifact_files(folder, config)
    contents: dict[str, Path | str] = {name: folder / name for name in names}
    contents[LAYOUT.card] = card_for(folder, config, say)
    message = commit_message or "Upload Twin-Merging artifact"
    try:
        api = HfApi(token=token)
        if not create_pr:
            repo_id = _made(api, repo_id, private, revision)
        say(f"uploading {len(names)} files to {repo_id}")
        commit = _push(api, repo_id, contents, message, create_pr, revision)
        return Pushed(repo_id, commit.oid, commit.commit_url, commit.pr_url, _left(folder, names))
    except (_HTTP_ERROR, LocalTokenNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise TwinMergingError(_explain(error, repo_id, create_pr, token)) from None


def _made(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Make repository and branch where they are not there; the repository's full name."""
    full = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and revision != "main" and not revision.startswith("refs/"):
        api.create_branch(full, branch=revision, exist_ok=True)
    return full


def _push(
    api: HfApi, repo_id: str, contents: dict[str, Path | str], message: str, create_pr: bool, revision: str | None
) -> CommitInfo:
    """One commit of files, or of texts in which the repository's name is still to be filled in."""
    additions = [
        CommitOperationAdd(name, c.replace(LOCATION, repo_id).encode() if isinstance(c, str) else c)
        for name, c in contents.items()
    ]
    there = api.list_repo_files(repo_id, revision=revision)
    stale = [CommitOperationDelete(name) for name in there if name not in contents and _is_ours(name)]
    return api.create_commit(
        repo_id, [*additions, *stale], commit_message=message, revision=revision, create_pr=create_pr
    )


def _is_ours(name: str) -> bool:
    """Whether a file of the repository would be read together with an artifact's."""
    weights = name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    return "/" not in name and (weights or name.endswith("_twin_merging.py"))


def _left(folder: Path, names: list[str]) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in names and path.name != "__pycache__")


def card_for(folder: Path, config: TwinMergingConfig, say: Callable[[str], object] = lambda message: None) -> str:
    """
    The card to upload, with `LOCATION` for the repository's name: rendered again with the scores of an evaluation.json in the
    folder; a card that was edited by hand keeps every word, and an empty one is none.

    Raises:
        TwinMergingError: the evaluation cannot be read, or is of other experts; the edited card's metadata cannot be read.
    """
    evaluation = _evaluation(folder, config)
    kind = _KINDS.get(find_shared_class(config.shared_class)[1], "text")
    try:
        written = (folder / LAYOUT.card).read_text(encoding="utf-8")
        report = json.loads((folder / LAYOUT.report).read_text(encoding="utf-8"))
        recipe = (folder / LAYOUT.recipe).read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise TwinMergingError(f"{folder} cannot be given a card: {error}; build the artifact again") from error
    if not written.strip() or written == render_card(config, report, recipe, kind):
        return render_card(config, report, recipe, kind, evaluation=evaluation)
    try:
        ModelCard(written)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise TwinMergingError(
            f"{folder / LAYOUT.card}: the metadata between its `---` lines cannot be read: {error}"
        ) from error
    if evaluation is not None:
        say(f"{LAYOUT.card} was edited, or is of another version; it is uploaded as it is, without {LAYOUT.evaluation}")
    return written


def _evaluation(folder: Path, config: TwinMergingConfig) -> dict | None:
    path = folder / LAYOUT.evaluation
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        unknown = [name for name in content["data"] if name not in config.expert_names]
        if unknown:
            raise ValueError(f"it is about {unknown[0]!r}, which is no expert of this artifact")
        for key in ("routed", "given"):
            content[key]["raw"]
        return {**content, "experts": dict(content["experts"]), "merges": dict(content["merges"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TwinMergingError(f"{path} cannot be read ({error}); write it with `twin-merging evaluate -o`") from error


def _explain(error: Exception, repo_id: str, create_pr: bool, token: str | bool | None) -> str:
    """One sentence on what the Hub refused and what to do; no token stands in it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = without_tokens(" ".join(str(error).split()))
    if isinstance(token, str) and token:
        text = text.replace(token, "[token]")
    if isinstance(error, OfflineModeIsEnabled):
        advice = "nothing can be uploaded in offline mode; unset HF_HUB_OFFLINE"
    elif any(kind.__name__ in _NO_NETWORK for kind in type(error).__mro__):
        advice = f"{constants.ENDPOINT} cannot be reached; is there a network, and is HF_ENDPOINT right if it is set?"
    elif isinstance(error, LocalTokenNotFoundError) or status == 401:
        advice = "the token is missing or not valid; log in with `hf auth login`, or set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        advice = "there is no such revision; `refs/pr/N` must be an open pull request"
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        advice = "there is no such repository" + ("; without a pull request it would be made" if create_pr else "")
    elif status in _QUOTA_CODES or (status == 403 and "storage" in text.lower()):
        advice = "the account's storage is full; free some, or upload to another namespace"
    elif status == 403:
        advice = "the token may not write there; use one with write permission for this repository"
    elif status is not None and status < 500 and status != 429:
        advice = "the Hub refuses the request"
    else:
        advice = "the upload broke off; run it again, and what is there already is not sent twice"
    return f"{repo_id}: {advice} ({type(error).__name__}: {text[:500]})"
