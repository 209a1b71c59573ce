"""The `twin-merging` command. The only module that prints."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import distributed
from ._version import __version__
from .errors import TwinMergingError, storage_error, without_tokens


app = typer.Typer(
    name="twin-merging",
    help="Merge fine-tuned experts of one model into one artifact that routes every row by itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Signals:
    """The first interrupting signal ends the command; later ones leave its clean-up in peace."""

    received: int | None = None

    @classmethod
    def listen(cls) -> None:
        cls.received = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, cls._receive)

    @classmethod
    def _receive(cls, number: int, frame: object) -> None:
        cls.received = number
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt


@contextlib.contextmanager
def _errors(out: Path | None = None) -> Iterator[None]:
    """
    Turn what a user can fix into one message and exit code 2, and an interruption into 130 (143 for SIGTERM).

    An interruption may come out of compiled code as another error; the signal that was received tells.
    """
    try:
        yield
    except typer.Exit:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or _Signals.received is not None:
            written = out is None or out.exists()
            typer.echo("interrupted" + ("" if written else "; nothing was written"), err=True)
            raise typer.Exit(128 + (_Signals.received or signal.SIGINT)) from error
        known = str(error) if isinstance(error, TwinMergingError) else storage_error(error)
        if known is not None:
            typer.echo(without_tokens(f"error: {known}"), err=True)
            raise typer.Exit(2) from error
        raise


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"twin-merging-hf {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _Signals.listen()
    distributed.start()
    if not distributed.is_main():  # of the processes of `accelerate launch` one speaks
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


@app.command()
def init(
    models: Annotated[list[str], typer.Argument(help="Checkpoints: folders or Hub ids (id@revision).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Recipe file to write.")] = Path("recipe.yaml"),
    base: Annotated[str | None, typer.Option(help="The base model that the experts were fine-tuned from.")] = None,
) -> None:
    """Look at checkpoints, say which fit together and why not, and write a starter recipe."""
    from .starter import describe_look, look_at, starter_recipe

    with _errors():
        if output.exists():
            raise TwinMergingError(f"{output} exists already; choose another file with -o")
        looks = look_at(models, base, Path("."))
        for look in looks:
            for line in describe_look(look):
                typer.echo(line)
        text = starter_recipe(looks, output.parent)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise TwinMergingError(f"{output} cannot be written: {error}") from error
        typer.echo(f"\nwrote {output}\nnext: twin-merging build {output} ARTIFACT --dry-run")
        if any(look.misfits for look in looks):
            raise typer.Exit(1)


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[Path, typer.Argument(help="Folder of the artifact; must not exist.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Tensors that are merged and compressed at a time; default: one per core.")
    ] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option(
            "--low-memory/--whole-models",
            help="Hold no model in memory as a whole; default: above 2 GiB in float32. The artifact is the same.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Build one artifact from the experts of a recipe. A build that was killed goes on if it is started again."""
    from .builder import build_artifact, plan_build
    from .progress import Progress
    from .verdict import describe

    with _errors(out):
        progress = Progress(quiet)
        if dry_run:
            _print_plan(plan_build(recipe, out, progress), recipe, out)
            return
        result = build_artifact(recipe, out, progress, workers, low_memory)
        size = result.report["storage"]
        typer.echo("\nVerdict")
        for line in describe(result.verdict):
            typer.echo(f"  {line}")
        typer.echo(
            f"  {size['total'] / 1e6:.2f} MB: {size['ratio']:.2f} times the shared backbone alone "
            f"(deltas {size['deltas'] / 1e6:.2f} MB, heads {size['heads'] / 1e6:.2f} MB, router {size['router'] / 1e6:.2f} MB)"
        )
        for note in result.report["notes"]:
            typer.echo(f"  note: {note}")
        typer.echo(f"\nwrote {out}\nnext: twin-merging check {out}")


def _print_plan(plan, recipe: Path, out: Path) -> None:
    for expert in plan.experts:
        labels = _KINDS.get(expert["problem_type"], f"{len(expert['labels'])} labels")
        typer.echo(f"expert {expert['name']}: {expert['source']}, {labels}")
    shown = ", ".join(plan.labels[:8]) + (", ..." if len(plan.labels) > 8 else "")
    if plan.labels:
        typer.echo(f"labels of the artifact ({len(plan.labels)}): {shown}")
    typer.echo(f"router: {plan.router_type}")
    ratio = 1 + plan.delta_bytes / plan.shared_bytes
    typer.echo(
        f"size: shared {plan.shared_bytes / 1e6:.2f} MB + deltas at most {plan.delta_bytes / 1e6:.2f} MB = {ratio:.2f} times "
        "the shared backbone, heads and router not counted"
    )
    for note in plan.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"\nall checks passed; nothing was written\nnext: twin-merging build {recipe} {out}")


@app.command()
def align(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML); its `alignment` may say how.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    mode: Annotated[
        str, typer.Option(help="align: a checkpoint for each expert; zip: one merged checkpoint.")
    ] = "align",
    heads: Annotated[str, typer.Option(help="Heads of a zip: keep each expert's own, or average them.")] = "keep",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Bring experts of different initialisation to one order of units (MuDSC), without building."""
    from .align_folders import align_recipe, describe_alignment
    from .progress import Progress

    with _errors(out):
        result = align_recipe(recipe, out, mode, heads, Progress(quiet))
        for line in describe_alignment(result.report):
            typer.echo(line)
        for note in result.report["notes"]:
            typer.echo(f"note: {note}")
        typer.echo(f"\nwrote {out}")


@app.command()
def tune(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML); every expert needs `data`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Tuned recipe to write; scores go beside it.")] = Path(
        "tuned.yaml"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Choose lambda, density and rank on held-out rows, and write the recipe with them."""
    from .progress import Progress
    from .tuning import tune_recipe

    with _errors(output):
        tuning = tune_recipe(recipe, output, progress=Progress(quiet))
        for title, candidates in (
            ("merge, with each expert's own head", tuning.merge),
            ("rank, task given", tuning.rank),
        ):
            if candidates:
                typer.echo(f"{title}: share of the experts' own scores on held-out rows")
            for candidate in candidates:
                setting = ", ".join(f"{key} {value:g}" for key, value in candidate.setting.items())
                typer.echo(f"  {setting:<26} {candidate.score:>7.2%}")
        typer.echo("chosen: " + (", ".join(f"{key} {value:g}" for key, value in tuning.chosen.items()) or "nothing"))
        for key, reason in tuning.left.items():
            typer.echo(f"left as it was: {key}, because {reason}")
        scores = output.with_suffix(".json")
        typer.echo(f"\nwrote {output} and {scores}\nnext: twin-merging build {output} ARTIFACT")


@app.command()
def check(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    reload: Annotated[
        bool, typer.Option(help="Also load it in a clean process, with its own code and without this package.")
    ] = True,
) -> None:
    """Tell whether an artifact is whole: config, tensors, model code, companion files, and that it loads anywhere."""
    from .artifact import check_artifact, inspect_artifact
    from .reload import check_whole

    with _errors():
        problems = check_whole(artifact) if reload else check_artifact(artifact)
        for problem in problems:
            typer.echo(f"problem: {problem}", err=True)
        if problems:
            raise typer.Exit(1)
        task = inspect_artifact(artifact).task
        use = _USE if task is not None else _USE_WITHOUT_PIPELINE
        typer.echo(f"{artifact} is whole\nnext: {use.format(artifact=artifact, task=task)}")


# Experts without a list of labels, by their problem type.
_KINDS = {"regression": "regression", "language_modeling": "language model"}
_USE = (
    "in Python:\n"
    "  import twin_merging_hf\n"
    "  from transformers import pipeline\n"
    '  pipe = pipeline("{task}", model="{artifact}")'
)
_USE_WITHOUT_PIPELINE = (
    "in Python:\n"
    "  import twin_merging_hf\n"
    "  from transformers import AutoModelForSeq2SeqLM\n"
    '  model = AutoModelForSeq2SeqLM.from_pretrained("{artifact}")  # and model.generate'
)


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is inside an artifact: experts, labels, router, bytes."""
    from .artifact import inspect_artifact

    with _errors():
        found = inspect_artifact(artifact)
        if as_json:
            typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
            return
        labels = f", {len(found.labels)} labels" if found.labels else ""
        typer.echo(f"{found.folder}: {found.shared_class}, {len(found.experts)} experts{labels}")
        for expert in found.experts:
            kind = _KINDS.get(expert["problem_type"], ", ".join(expert["labels"][:8]))
            entries = f"{found.delta['sizes'][expert['name']]} entries"
            extent = entries if found.delta["kind"] == "sparse" else f"rank {found.rank[expert['name']]}"
            typer.echo(
                f"  {expert['name']}: {kind} ({extent} in {found.delta['dtype']}, from {expert.get('source', '?')})"
            )
        router = ", ".join(f"{key} {value}" for key, value in found.router.items() if value is not None)
        typer.echo(f"router: {router}")
        if found.shared_reference:
            revision = found.shared_reference.get("revision")
            where = found.shared_reference["model"] + (f"@{revision}" if revision else "")
            typer.echo(f"shared: by reference, the base is fetched from {where}")
        size = found.storage
        parts = ", ".join(f"{part} {size[part] / 1e6:.2f} MB" for part in ("shared", "deltas", "heads", "router"))
        typer.echo(f"size: {size['total'] / 1e6:.2f} MB ({parts}), {size['ratio']} times the shared backbone")


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    sources_in: Annotated[
        Path, typer.Option("--from", help="Folder that the recipe's relative paths are relative to.")
    ] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare an artifact's sources of today with the fingerprints of its build; name what changed."""
    from .verification import describe_state, verify_artifact

    with _errors():
        states = verify_artifact(artifact, sources_in)
        if as_json:
            typer.echo(json.dumps([asdict(state) for state in states], indent=2, ensure_ascii=False))
        else:
            for state in states:
                typer.echo(describe_state(state))
        if not all(state.is_same for state in states):
            raise typer.Exit(1)


@app.command()
def upload(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    repo_id: Annotated[
        str, typer.Argument(help="Repository on the Hub: NAME or NAMESPACE/NAME; made if it is not there.")
    ],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made now is private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if needed; or refs/pr/N.")] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Commit message.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Check an artifact and upload it to the Hub as one commit; the token is HF_TOKEN or the stored login."""
    from .hub_upload import push_artifact
    from .progress import Progress, no_upload_bars

    with _errors(), no_upload_bars(quiet):
        pushed = push_artifact(
            artifact, repo_id, private=private or None, create_pr=create_pr, revision=revision, commit_message=message,
            say=Progress(quiet).say,
        )  # fmt: skip
        typer.echo(f"uploaded {artifact} to {pushed.repo_id}: {pushed.pr_url or pushed.commit_url}")
        if pushed.left:
            typer.echo(f"not part of the artifact, so not uploaded: {', '.join(pushed.left)}")
        typer.echo(
            f'next: without this package, pin this commit: from_pretrained("{pushed.repo_id}", '
            f'revision="{pushed.commit}", trust_remote_code=True)'
        )


_ARTIFACT = Annotated[Path, typer.Argument(help="Folder of an artifact; it stays as it is.")]
_OUT = Annotated[Path, typer.Argument(help="Folder of the new artifact; must not exist.")]
_MODEL = Annotated[str, typer.Option(help="The expert's checkpoint: a folder or a Hub id (id@revision).")]
_DATA = Annotated[Path | None, typer.Option(help="JSONL file with rows of the expert, for the router.")]
_LABELS = Annotated[str | None, typer.Option(help="New label names, in id order, with commas between.")]
_RECIPE = Annotated[
    Path | None, typer.Option(help="Recipe with models and `data` of the other experts, matched by name.")
]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.command(name="add-expert")
def add_expert(
    artifact: _ARTIFACT,
    out: _OUT,
    name: Annotated[str, typer.Option(help="The new expert's name.")],
    model: _MODEL,
    data: _DATA = None,
    labels: _LABELS = None,
    recipe: _RECIPE = None,
    quiet: _QUIET = False,
) -> None:
    """Write a new artifact with one more expert; all others, and the shared model, keep every byte."""
    from . import editing
    from .progress import Progress

    with _errors(out):
        newcomer = editing.Newcomer(name, model, data, _label_names(labels))
        _print_edit(editing.add_expert(artifact, out, newcomer, recipe, Progress(quiet)), out)


@app.command(name="remove-expert")
def remove_expert(
    artifact: _ARTIFACT,
    name: Annotated[str, typer.Argument(help="The expert's name.")],
    out: _OUT,
    recipe: _RECIPE = None,
    quiet: _QUIET = False,
) -> None:
    """Write a new artifact without one expert; all others, and the shared model, keep every byte."""
    from . import editing
    from .progress import Progress

    with _errors(out):
        _print_edit(editing.remove_expert(artifact, name, out, recipe, Progress(quiet)), out)


@app.command(name="replace-expert")
def replace_expert(
    artifact: _ARTIFACT,
    name: Annotated[str, typer.Argument(help="The expert's name; it stays.")],
    out: _OUT,
    model: _MODEL,
    data: _DATA = None,
    labels: _LABELS = None,
    recipe: _RECIPE = None,
    quiet: _QUIET = False,
) -> None:
    """Write a new artifact with another checkpoint in an expert's place; all others keep every byte."""
    from . import editing
    from .progress import Progress

    with _errors(out):
        newcomer = editing.Newcomer(name, model, data, _label_names(labels))
        _print_edit(editing.replace_expert(artifact, out, newcomer, recipe, Progress(quiet)), out)


def _label_names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(label.strip() for label in text.split(","))


def _print_edit(result, out: Path) -> None:
    from .editing import describe_edit
    from .verdict import describe

    for line in describe_edit(result):
        typer.echo(line)
    if result.verdict.agreement is not None:
        typer.echo("\nVerdict")
        for line in describe(result.verdict):
            typer.echo(f"  {line}")
    for note in result.report["edits"][-1]["notes"]:
        typer.echo(f"  note: {note}")
    typer.echo(f"\nwrote {out}\nnext: twin-merging check {out}")


@app.command()
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[NAME=FILE]...", help="More of --data.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="NAME=FILE: an expert's JSONL rows (repeat).")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Also evaluate this recipe's experts, on the same rows.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file; a PNG goes beside it.")] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="NAME=METRIC, as in docs (repeat).")] = None,
    merges: Annotated[str, typer.Option(help="Static merges to show too, such as linear,task_arithmetic.")] = "",
    device: Annotated[str, typer.Option(help="Where models run, such as cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap intervals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Score an artifact on rows that it was not made with: routed, with experts given, and relative to the experts."""
    from .evaluate_artifact import evaluate_artifact
    from .evaluate_table import refuse_existing_files, table, write_evaluation
    from .progress import Progress

    with _errors():
        files = _named("--data", [*(data or []), *(more or [])])
        metrics = _named("--metric", metric or [])
        if output is not None:
            refuse_existing_files(output)
        methods = [name.strip() for name in merges.split(",") if name.strip()]
        found = evaluate_artifact(
            artifact,
            files,
            recipe,
            merges=methods,
            metrics=metrics,
            device=device,
            seed=seed,
            progress=Progress(quiet),
        )
        written = write_evaluation(output, found) if output is not None and distributed.is_main() else []
        if as_json:
            typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
            return
        for line in table(found):
            typer.echo(line)
        if written:
            typer.echo(f"\nwrote {' and '.join(map(str, written))}")


def _named(option: str, pairs: list[str]) -> dict[str, str]:
    """Parse `NAME=VALUE`, each name once."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise TwinMergingError(f"{option} must be NAME=VALUE, got {pair!r}")
        if name in found:
            raise TwinMergingError(f"{option} is given twice for {name!r}")
        found[name] = value
    return found


@app.command()
def export(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    out: Annotated[Path, typer.Argument(help="Folder of the export; must not exist.")],
    format: Annotated[str, typer.Option("--format", help="merged, peft or vllm.")],
    expert: Annotated[str | None, typer.Option(help="merged: the one expert.")] = None,
    weights: Annotated[str | None, typer.Option(help="merged: instead, fixed weights: sst2=0.7,qqp=0.3.")] = None,
    head: Annotated[str | None, typer.Option(help="merged, with --weights: whose head it gets.")] = None,
    base_id: Annotated[
        str | None, typer.Option(help="peft, vllm: the base that adapters name, such as its later Hub id.")
    ] = None,
    allow_embeddings: Annotated[
        bool, typer.Option("--allow-embeddings", help="vllm: also adapt the embedding and the output layer.")
    ] = False,
) -> None:
    """Write an artifact as plain models: one merged checkpoint, or LoRAs for PEFT or vLLM."""
    from . import export as exports

    with _errors(out):
        given = {"--expert": expert, "--weights": weights, "--head": head, "--base-id": base_id}
        given["--allow-embeddings"] = "yes" if allow_embeddings else None
        exports.check_options(format, {name for name, value in given.items() if value is not None})
        if format == "merged":
            chosen = exports.parse_weights(weights) if weights is not None else str(expert)
            found = exports.export_merged(artifact, out, chosen, head)
        elif format == "peft":
            found = exports.export_adapters(artifact, out, base_id)
        else:
            found = exports.export_vllm(artifact, out, base_id, allow_embeddings)
        for line in exports.describe_export(found):
            typer.echo(line)
        typer.echo(f"\nwrote {out}\nnext: {found.next}")


@app.command()
def serve(
    source: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an artifact, or of its vllm export.")],
    engine_options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION]...", help="Options of vLLM, after `--`.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    upstream: Annotated[
        list[str] | None, typer.Option(help="A running engine, http://HOST:PORT (repeat); none is started then.")
    ] = None,
    engine: Annotated[str, typer.Option(help="vLLM's program; it may be of another environment.")] = "vllm",
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Larger requests get 413.")] = 1 << 20,
    max_requests: Annotated[int, typer.Option(min=1, help="Of more at once, the rest gets 429.")] = 256,
    read_seconds: Annotated[float, typer.Option(min=0.1, help="Longest time for a request to come in.")] = 10.0,
    request_seconds: Annotated[float, typer.Option(min=1, help="Longest time for an answer.")] = 600.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="After a signal, for requests at work.")] = 60.0,
) -> None:
    """Serve a generative artifact: an OpenAI-compatible front that routes each request to an adapter of a vLLM engine."""
    from . import serving

    with _errors():
        limits = serving.Limits(max_body_bytes, read_seconds, max_requests, request_seconds)
        serving.serve(
            source, host, port, upstream or (), engine, engine_options or (), limits, drain_seconds,
            lambda line: typer.echo(line, err=True),
        )  # fmt: skip


@app.command()
def space(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    out: Annotated[Path, typer.Argument(help="Folder of the Space; must not exist.")],
    repo_id: Annotated[
        str | None, typer.Option(help="Load it from the Hub instead of taking it along: NAMESPACE/NAME@COMMIT.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page; default the folder's name.")] = None,
) -> None:
    """Write a Gradio Space: a page that answers an input and shows who answered."""
    from .space import make_space

    with _errors(out):
        make_space(artifact, out, repo_id, title)
        typer.echo(
            f"wrote {out}\nnext: cd {out} && pip install -r requirements.txt && python app.py\n"
            f"or: hf upload NAMESPACE/NAME {out} --repo-type space"
        )


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for everything the demo makes; must not exist.")] = Path(
        "twin-merging-demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of data splits, training and router.")] = 0,
) -> None:
    """The whole story in three minutes, on handwritten digits: no download, no GPU."""
    from .demo.story import tell

    with _errors():
        tell(folder, seed, typer.echo)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
