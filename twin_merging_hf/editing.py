"""
Experts added to, removed from or replaced in a finished artifact, without building it again.

The shared model and the other experts' deltas and heads keep every byte; what changes is the one expert's, the router
and the label ids, and a new folder is written. How far that is from a full rebuild is measured where it can be.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from twin_merging_hf import modeling
from twin_merging_hf.hub_upload.model_card import write_card
from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.configuration_twin_merging import check_expert_names
from twin_merging_hf.modeling.deltas_twin_merging import delta_key
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace
from twin_merging_hf.modeling.modeling_twin_merging import AUTO_MAP
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class

from . import builder
from .artifact import (
    LAYOUT,
    Storage,
    check_files,
    read_config,
    refuse_existing,
    staged,
    storage,
    tensor_sizes,
    write_json,
)
from .build_router import make_router
from .checkpoints import Checkpoint, open_checkpoint
from .drift import Drift, measure_drift
from .edit_recipe import Newcomer, StoredRecipe
from .edit_router import drop_expert, measure, new_subspace, put_subspace
from .errors import TwinMergingError
from .pictures import draw_confusion
from .preflight import Inputs, check_newcomer, input_kind, preflight, read_all_rows
from .probe import probe
from .processing import Processing, load_processing
from .progress import Progress, no_loading_bars
from .recipe import Recipe
from .router_training import RouterReport
from .separation import Separation, separate
from .stacking import Stack, trimmed, with_expert, without_expert
from .verdict import Verdict, reach_verdict


@dataclass(frozen=True)
class EditResult:
    """
    What an edit made.

    labels: label names of the new artifact, in id order. moved: labels that were there before under another id: name ->
    (old id, new id). drift: None where it could not be measured (`notes` in the report say why).
    """

    folder: Path
    report: dict
    verdict: Verdict
    labels: list[str]
    moved: dict[str, tuple[int, int]]
    drift: Drift | None


def remove_expert(
    artifact: str | Path, name: str, out: str | Path, recipe: str | Path | None = None, progress: Progress | None = None
) -> EditResult:
    """
    Write a new artifact without one expert.

    Label ids close up (ids after the removed ones move; see `EditResult.moved`). The router loses what belonged to the
    expert, exactly: the remaining logits are as before, and the softmax runs over the rest.

    Args:
        out: folder of the new artifact; must not exist.
        recipe: a recipe file with `data` (and models) of the remaining experts, by name: then the temperature is fitted
            again, and agreement and drift are measured.

    Raises:
        TwinMergingError: unknown or last expert, `out` exists, or the artifact is damaged.
    """
    edit = _Edit("remove-expert", artifact, name, out, recipe, progress)
    position = edit.position()
    if len(edit.stack.entries) == 1:
        raise TwinMergingError(f"{name!r} is the artifact's only expert; an artifact needs at least one")
    return edit.finish(without_expert(edit.stack, position), None, position)


def add_expert(
    artifact: str | Path,
    out: str | Path,
    newcomer: Newcomer,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
) -> EditResult:
    """
    Write a new artifact with one more expert: its delta from the stored shared model, its head, its labels at the end.

    A trained router is trained again, on train rows of all experts: from `recipe`, else from the paths in the stored
    recipe, as seen from the current folder or the artifact's. `projection` gets the new expert's subspace.

    Raises:
        TwinMergingError: the name is taken, the checkpoint does not fit, old labels would get other ids, data that the
            router needs are not there, or `out` exists.
    """
    edit = _Edit("add-expert", artifact, newcomer.name, out, recipe, progress)
    names = edit.stack.names
    if newcomer.name.lower() in [name.lower() for name in names]:
        raise TwinMergingError(
            f"the artifact has an expert {newcomer.name!r} already ({', '.join(names)}); choose another name, or use "
            "replace-expert"
        )
    try:
        check_expert_names([*names, newcomer.name])
    except ValueError as error:
        raise TwinMergingError(str(error)) from error
    return edit.bring(newcomer, len(names), replaces=False)


def replace_expert(
    artifact: str | Path,
    out: str | Path,
    newcomer: Newcomer,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
) -> EditResult:
    """
    Write a new artifact in which `newcomer` stands in the place of the expert of that name; as remove and add there.

    Raises:
        TwinMergingError: as `add_expert` and `remove_expert`.
    """
    edit = _Edit("replace-expert", artifact, newcomer.name, out, recipe, progress)
    return edit.bring(newcomer, edit.position(), replaces=True)


class BuiltBackbone(Checkpoint):
    """An artifact's shared model seen as a checkpoint, so that a new expert is compared with it like with another."""

    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, folder: Path, config: TwinMergingConfig, state: dict[str, torch.Tensor]) -> "BuiltBackbone":
        task_class = find_shared_class(config.shared_class)[0]
        task_config = copy.deepcopy(config.shared_config)
        with torch.device("meta"):
            skeleton = task_class(task_config)
        heads = tuple(f"shared.{module}." for module in config.head_modules)
        names = [
            key.removeprefix("shared.") for key in state if key.startswith("shared.") and not key.startswith(heads)
        ]
        built = cls(
            role=f"the artifact {folder}",
            source=str(folder),
            path=folder,
            config=task_config,
            task_class=task_class,
            skeleton=skeleton,
            places={name: (folder, name) for name in names},
            missing=[],
            extra=[],
            ignored=[],
        )
        built.state = state
        return built

    def tensor(self, name: str) -> torch.Tensor:
        return self.state[f"shared.{name}"]

    def shape(self, name: str) -> torch.Size:
        return self.tensor(name).shape


@dataclass
class _Router:
    """What became of the router: `how`, its figures if there are rows, and what was to be said."""

    how: str
    report: RouterReport | None = None
    notes: list[str] = field(default_factory=list)


class _Edit:
    """One edit of one artifact, from its files to the new folder."""

    def __init__(self, what: str, artifact, name: str, out, recipe, progress: Progress | None):
        self.what, self.name = what, name
        self.folder, self.out = Path(artifact), Path(out)
        self.progress = progress or Progress()
        refuse_existing(self.out)
        self.config = read_config(self.folder)
        if getattr(self.config, "sparse_deltas", None):
            raise TwinMergingError(f"{self.folder}: sparse deltas are an ablation and cannot be edited; build it again")
        self.report = _read_report(self.folder)
        self.model = _load(self.folder, self.config)
        state = {key: value for key, value in self.model.state_dict().items() if not key.startswith("router.")}
        self.stack = Stack(
            self.config.experts,
            self.config.head_modules,
            self.config.ranks,
            self.config.exact_deltas,
            state,
            self.report.get("tensors", {}),
        )
        text = self.folder / LAYOUT.recipe
        self.recipes = StoredRecipe(
            text.read_text(encoding="utf-8") if text.is_file() else "",
            Path(recipe) if recipe is not None else None,
            [Path("."), self.folder.parent, self.folder],
        )
        self.built_from = self.config.provenance.get("shared_experts") or self.stack.names
        self.notes: list[str] = []

    def position(self) -> int:
        """Index of the expert. Raises `TwinMergingError` if there is none of that name."""
        if self.name not in self.stack.names:
            raise TwinMergingError(f"the artifact has no expert {self.name!r}; it has {', '.join(self.stack.names)}")
        return self.stack.names.index(self.name)

    # ---- an expert joins --------------------------------------------------------------------------------------

    def bring(self, newcomer: Newcomer, position: int, replaces: bool) -> EditResult:
        """Add an expert at `position`, in the place of the one there if it `replaces`."""
        if not self.recipes.has_settings():
            raise TwinMergingError(
                f"{self.folder} was built from Python without a recipe, so how its deltas were compressed is not known; "
                "give --recipe"
            )
        names = list(self.stack.names)
        names[position : position + int(replaces)] = [newcomer.name]
        recipe = self._recipe(names, newcomer)
        spec = recipe.experts[position]
        built = BuiltBackbone.of(self.folder, self.config, self.stack.state)
        self.progress.say(f"checking expert {newcomer.name!r}")
        alone = check_newcomer(self._as_built(recipe), spec, built)
        try:
            entry = alone.entries[0]
            before = without_expert(self.stack, position) if replaces and len(names) > 1 else self.stack
            self._check_labels(entry, position, replaces)
            self.progress.say("compressing its delta from the shared model")
            separation = self._separate(alone, built)
            stack = with_expert(before, separation, entry, position)
            if replaces and len(names) == 1:
                stack = without_expert(stack, 1)
            self.notes += alone.notes
            return self.finish(stack, alone, position, separation, recipe)
        finally:
            alone.close()

    def _recipe(self, names: list[str], newcomer: Newcomer | None) -> Recipe:
        """The new artifact's recipe; where a trained router needs data of all experts, they must be there."""
        old = [name for name in names if newcomer is None or name != newcomer.name]
        trained = newcomer is not None and self.config.router_type != "projection"
        folder = self.recipes.folder(old, data=trained, base=newcomer is not None and not trained)
        if folder is None and trained:
            raise TwinMergingError(
                f"the artifact's router ({self.config.router_type}) is trained on rows of all experts, and `data` of "
                f"{', '.join(old)} {self._not_found()}; give --recipe FILE, a recipe whose experts of these names have `data`"
            )
        if folder is None and newcomer is not None:
            raise TwinMergingError(
                f"`projection` measures the new expert from the base model {self.recipes.content['base_model']!r}, which "
                f"{self._not_found()}; give --recipe FILE, a recipe with `base_model`"
            )
        recipe = self.recipes.recipe(names, newcomer, folder or self.recipes.places[0], self.built_from)
        if trained and any(expert.data is None for expert in recipe.experts):
            raise TwinMergingError(
                f"the artifact's router ({self.config.router_type}) is trained on rows of all experts; give --data FILE with "
                f"rows of {self.name!r}"
            )
        return recipe

    def _not_found(self) -> str:
        if self.recipes.given is not None:
            return f"not in {self.recipes.given}"
        shown = ", ".join(str(place.resolve()) for place in self.recipes.places)
        return f"not found by the paths of its recipe.yaml in {shown}"

    def _as_built(self, recipe: Recipe) -> Recipe:
        """The recipe with what the artifact is, where a recipe leaves it open."""
        dtype = str(_dtype(self.model)).removeprefix("torch.")
        router = replace(
            recipe.router,
            type=self.config.router_type,
            layer=self.config.router_layer if self.config.router_pass == "prefix" else None,
            router_pass=self.config.router_pass,
            top_k=self.config.router_top_k,
        )
        return replace(recipe, out_dtype=dtype, router=router)

    def _check_labels(self, entry: dict, position: int, replaces: bool) -> None:
        """Refuse to change what old label ids mean by a change of the kind of label space."""
        entries = list(self.stack.entries)
        entries[position : position + int(replaces)] = [entry]
        before, after = LabelSpace.of(self.stack.entries), LabelSpace.of(entries)
        if before.kind == after.kind:
            return
        kept = [i for i in range(len(self.stack.entries)) if not (replaces and i == position)]
        moved = [i for i in kept if before.columns(i) != after.columns(i + int(not replaces and i >= position))]
        if moved:
            name = self.stack.names[moved[0]]
            raise TwinMergingError(
                f"expert {entry['name']!r} has labels {', '.join(entry['labels'])}, so the label space would change from "
                f"`{before.kind}` ({', '.join(before.labels[:6])}) to `{after.kind}`, and labels of {name!r} would get other "
                "ids; if its labels mean the same, give them the same names by --labels, else build a new artifact"
            )
        self.notes.append(
            f"the label space changed from `{before.kind}` to `{after.kind}`: old ids stay, names are now "
            f"{', '.join(after.labels[:4])}, ..."
        )

    def _separate(self, alone: Inputs, built: BuiltBackbone) -> Separation:
        for name in built.backbone:
            mine = alone.experts[0].tensor(name)
            if not mine.is_floating_point() and not torch.equal(mine, built.tensor(name)):
                raise TwinMergingError(
                    f"expert {self.name!r}: tensor {name!r} holds integers that differ from the artifact's; that cannot be "
                    "merged"
                )
        exclusive = alone.recipe.exclusive
        if getattr(exclusive, "budget", None) is None:
            return separate(alone)
        # A budget was shared out over all experts; the newcomer gets what they have on average.
        mean = {name: max(1, round(sum(ranks) / len(ranks))) for name, ranks in self.stack.ranks.items()}
        usual = max(1, round(sum(mean.values()) / max(1, len(mean))))
        settings = replace(exclusive, budget=None, rank=max([usual, *mean.values()]))  # type: ignore[call-arg]
        separation = separate(replace(alone, recipe=replace(alone.recipe, exclusive=settings)))
        return trimmed(separation, {name: mean.get(name, usual) for name in separation.ranks})

    # ---- the new artifact -------------------------------------------------------------------------------------

    def finish(
        self,
        stack: Stack,
        alone: Inputs | None,
        position: int,
        separation: Separation | None = None,
        recipe: Recipe | None = None,
    ) -> EditResult:
        """Router, files, probe, report: the end of every edit."""
        if recipe is None and self.recipes.has_settings():
            recipe = self._recipe(stack.names, None)
        if recipe is not None:
            recipe = self._as_built(recipe)
        full = self._all_inputs(recipe)
        try:
            inputs = full or self._some_inputs(recipe, stack, alone)
            model = _assemble(self.model, stack, self._new_config(stack, recipe))
            router = self._edit_router(model, inputs, alone, position, separation)
            drift = None
            if full is not None:
                self.progress.say("measuring the drift from a full rebuild")
                drift = measure_drift(stack.state, stack.coverage, full)
            with staged(self.out) as folder, no_loading_bars():
                return self._write(folder, model, stack, recipe, inputs, full, router, drift)
        finally:
            if full is not None:
                full.close()

    def _all_inputs(self, recipe: Recipe | None) -> Inputs | None:
        """All experts as for a build, if the user's recipe leads to them; else None, with a note that says why not."""
        if recipe is None or self.recipes.given is None:
            self.notes.append("drift and agreement were not measured: no --recipe was given")
            return None
        try:
            return preflight(recipe, self.progress.say)
        except TwinMergingError as error:
            first = next(line for line in str(error).splitlines() if line.strip(" -"))
            self.notes.append(f"drift and agreement were not measured, as the recipe cannot be built: {first}")
            return None

    def _some_inputs(self, recipe: Recipe | None, stack: Stack, alone: Inputs | None) -> Inputs | None:
        """What a router needs when not every checkpoint is there: rows of all experts, if they all have some."""
        if recipe is None:
            return None
        built = BuiltBackbone.of(self.folder, self.config, self.stack.state)
        kind = input_kind(built)
        processing = alone.processing if alone is not None else self._processing(kind, recipe)
        rows = None
        if self.recipes.given is not None or (alone is not None and self.config.router_type != "projection"):
            rows = read_all_rows(recipe, stack.entries, kind, processing)
        experts = alone.experts if alone is not None else []
        return Inputs(recipe, experts, None, built, stack.entries, processing, rows, [])

    def _processing(self, kind: str, recipe: Recipe) -> Processing | None:
        return load_processing(self.folder, kind, "the artifact", recipe.trust_remote_code)

    def _edit_router(
        self,
        model: Any,
        inputs: Inputs | None,
        alone: Inputs | None,
        position: int,
        separation: Separation | None,
    ) -> _Router:
        if alone is None:
            drop_expert(self.model.router, model.router, position)
            return self._measured(model, inputs, "the expert's part was dropped, the rest is as before")
        assert separation is not None and inputs is not None
        if self.config.router_type == "projection":
            base = self._base(alone)
            basis = new_subspace(self.config, alone.experts[0], base, separation, alone.recipe.seed)
            replaces = len(model.expert_names) == len(self.stack.entries)
            put_subspace(self.model.router, model.router, basis, position, replaces)
            return self._measured(model, inputs, "the new expert's subspace was added")
        self.progress.say("training the router again")
        report = make_router(model, separation, inputs, self.progress)
        return _Router("trained again on rows of all experts", report)

    def _base(self, alone: Inputs) -> Checkpoint | None:
        source = alone.recipe.base_model
        return None if source is None else open_checkpoint(source, alone.recipe.folder, "base model", alone.experts[0])

    def _measured(self, model: Any, inputs: Inputs | None, how: str) -> _Router:
        """Figures on held-out rows, where there are some; the temperature is fitted there, as a build does it."""
        if inputs is None or inputs.rows is None:
            return _Router(how)
        fixed = inputs.recipe.router.temperature
        if self.config.router_type == "projection":
            fixed = self.config.router_temperature
        counter = self.progress.counter("router features", sum(len(rows.held_out) for rows in inputs.rows))
        report = measure(model, inputs, fixed, counter.update)
        counter.close()
        return _Router(how, report)

    def _new_config(self, stack: Stack, recipe: Recipe | None) -> TwinMergingConfig:
        space = LabelSpace.of(stack.entries)
        fields = copy.deepcopy(self.config.to_dict())
        fields |= {
            "experts": stack.entries,
            "ranks": stack.ranks,
            "exact_deltas": stack.exact,
            "id2label": dict(enumerate(space.labels)),
            "label2id": {label: i for i, label in enumerate(space.labels)},
            "problem_type": "regression" if space.kind == "value" else "single_label_classification",
        }
        fields.pop("num_labels", None)
        top_k = self.config.router_top_k
        if top_k is not None and top_k > len(stack.entries):
            fields["router_top_k"] = len(stack.entries)
            self.notes.append(f"`router.top_k` was {top_k} and is now {len(stack.entries)}, the number of experts")
        return TwinMergingConfig.from_dict(fields)

    def _write(
        self,
        folder: Path,
        model: Any,
        stack: Stack,
        recipe: Recipe | None,
        inputs: Inputs | None,
        full: Inputs | None,
        router: _Router,
        drift: Drift | None,
    ) -> EditResult:
        text = recipe.text if recipe is not None else ""
        self._provenance(model.config, text, inputs)
        self._save(folder, model, text, router)
        dtype = _dtype(self.model)
        loaded = type(model).from_pretrained(folder, config=model.config, dtype=torch.float32).eval()
        self.progress.say("probing: a batch that mixes experts against dense models")
        difference = probe(loaded, model.config.provenance.get("seed", 0))
        verdict = Verdict(None, None, None, None, None)
        if full is not None:
            verdict = reach_verdict(loaded, full, router.report, self.progress.counter)
        config = loaded.config
        labels, moved = self._labels(stack)
        edit = self._entry(moved, labels, router, drift)
        config.provenance["verdict"] = self._verdict(verdict)
        config.provenance["edits"] = [*config.provenance.get("edits", []), {"what": self.what, "name": self.name}]
        report = self._new_report(folder, config, stack, inputs, router, difference, verdict, edit)
        write_json(folder / LAYOUT.report, report)
        if LAYOUT.confusion in config.provenance["companions"]:
            assert router.report is not None
            draw_confusion(folder / LAYOUT.confusion, stack.names, router.report.confusion)
        write_card(folder / LAYOUT.card, config, report, text, input_kind(self._built()))
        config.dtype = config.shared_config.dtype = dtype
        (folder / LAYOUT.unfinished_config).write_text(config.to_json_string(), encoding="utf-8")
        problems = check_files(folder, config)
        if problems:
            raise TwinMergingError("the edited artifact is not whole: " + "; ".join(problems))
        return EditResult(self.out, report, verdict, labels, moved, drift)

    def _built(self) -> BuiltBackbone:
        return BuiltBackbone.of(self.folder, self.config, self.stack.state)

    def _provenance(self, config: TwinMergingConfig, text: str, inputs: Inputs | None) -> None:
        provenance = config.provenance
        provenance["recipe_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        provenance["shared_experts"] = list(self.built_from)
        provenance["versions"] = builder.versions()
        sources = {n: s for n, s in provenance.get("sources", {}).items() if n not in self.stack.names}
        old = provenance.get("sources", {})
        for expert in config.expert_names:
            if expert in old and (expert != self.name or self.what == "remove-expert"):
                sources[expert] = old[expert]
        newcomers = [c for c in (inputs.experts if inputs else []) if c.role == f"expert {self.name!r}"]
        for checkpoint in newcomers if self.what != "remove-expert" else []:
            sources[self.name] = builder.source_of(checkpoint)
        order = [n for n in sources if n not in config.expert_names] + [n for n in config.expert_names if n in sources]
        provenance["sources"] = {n: sources[n] for n in order}

    def _save(self, folder: Path, model: Any, text: str, router: _Router) -> None:
        """Write companions, recipe, weights and code; the list of companions goes into the config."""
        written = {LAYOUT.report, LAYOUT.card, LAYOUT.recipe, LAYOUT.confusion}
        companions = set(self.config.provenance.get("companions", [])) - written
        for name in companions:
            if Path(name).name != name or not (self.folder / name).is_file():
                raise TwinMergingError(f"{self.folder}: {name} is missing; `twin-merging check` tells what else is")
            shutil.copyfile(self.folder / name, folder / name)
        (folder / LAYOUT.recipe).write_text(text, encoding="utf-8")
        companions |= {LAYOUT.report, LAYOUT.card, LAYOUT.recipe}
        if router.report is not None and builder.can_draw():
            companions.add(LAYOUT.confusion)
        model.config.provenance["companions"] = sorted(companions)
        builder.save_weights(model, folder)

    def _labels(self, stack: Stack) -> tuple[list[str], dict[str, tuple[int, int]]]:
        before, after = self.config.label_names, list(LabelSpace.of(stack.entries).labels)
        moved = {label: (before.index(label), i) for i, label in enumerate(after) if label in before}
        return after, {label: ids for label, ids in moved.items() if ids[0] != ids[1]}

    def _entry(self, moved: dict, labels: list[str], router: _Router, drift: Drift | None) -> dict:
        before = self.config.label_names
        return {
            "what": self.what,
            "name": self.name,
            "labels": {
                "added": [label for label in labels if label not in before],
                "removed": [label for label in before if label not in labels],
                "moved": {label: list(ids) for label, ids in moved.items()},
            },
            "router": router.how,
            "drift": asdict(drift) if drift is not None else None,
            "notes": self.notes,
            "versions": builder.versions(),
        }

    def _verdict(self, verdict: Verdict) -> dict:
        content = asdict(verdict)
        if verdict.agreement is None:
            content["stale"] = f"not measured again after {self.what} {self.name}"
        return content

    def _new_report(self, folder, config, stack, inputs, router, difference, verdict, edit) -> dict:
        sizes: Storage = storage(folder, config)
        figures = {"type": config.router_type, "temperature": config.router_temperature, "held_out_rows": 0}
        if router.report is not None:
            figures = asdict(router.report)
        else:
            figures["stale"] = f"not measured again after {self.what} {self.name}"
        gone = f"expert {self.name!r}" if self.what != "add-expert" else None
        notes = [note for note in self.report.get("notes", []) if gone is None or not note.startswith(gone)]
        data = {n: rows for n, rows in self.report.get("data", {}).items() if n in stack.names and n != self.name}
        if inputs is not None and inputs.rows is not None:
            data = builder.data_report(inputs)
        return {
            **self.report,
            "experts": stack.entries,
            "labels": list(LabelSpace.of(stack.entries).labels),
            "storage": {**asdict(sizes), "total": sizes.total, "ratio": round(sizes.ratio, 4)},
            "router": figures,
            "probe": {"largest_relative_difference": float(f"{difference:.1e}")},
            "verdict": self._verdict(verdict),
            "data": data,
            "notes": [*notes, *self.notes],
            "edits": [*self.report.get("edits", []), edit],
            "tensors": _with_bytes(stack.coverage, tensor_sizes(folder)),
        }


def _with_bytes(coverage: dict[str, dict], sizes: dict[str, int]) -> dict[str, dict]:
    """Bytes of the deltas as they are on disk now."""
    result = {}
    for name, entry in coverage.items():
        if entry.get("treatment") in ("factored", "exact"):
            prefix = f"deltas.{delta_key(name)}."
            entry = {**entry, "bytes": sum(size for key, size in sizes.items() if key.startswith(prefix))}
        result[name] = entry
    return result


def _read_report(folder: Path) -> dict:
    path = folder / LAYOUT.report
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TwinMergingError(
            f"{path} cannot be read ({error}); `twin-merging check` tells what else is wrong"
        ) from error
    if not isinstance(report, dict):
        raise TwinMergingError(f"{path} is no report of a build")
    return report


def _load(folder: Path, config: TwinMergingConfig) -> Any:
    auto_class = find_shared_class(config.shared_class)[1]
    model_class = getattr(modeling, AUTO_MAP[auto_class].split(".")[-1])
    try:
        with no_loading_bars():
            return model_class.from_pretrained(folder, dtype="auto").eval()
    except (ValueError, OSError, RuntimeError) as error:
        raise TwinMergingError(f"{folder} cannot be loaded: {error}") from error


def _dtype(model: Any) -> torch.dtype:
    """Type of the artifact's weights (the router is always float32)."""
    return next(parameter.dtype for parameter in model.shared.parameters() if parameter.is_floating_point())


def _assemble(old: Any, stack: Stack, config: TwinMergingConfig) -> Any:
    """A model of the new config with the stack's tensors as they are, type included; its router is still to be filled."""
    model = type(old)(config)
    missing, unexpected = model.load_state_dict(stack.state, strict=False, assign=True)
    missing = [name for name in missing if not name.startswith("router.")]
    if missing or unexpected:
        raise RuntimeError(f"editing: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model.eval()


def describe_edit(result: EditResult) -> Sequence[str]:
    """An edit in lines for people: labels with their ids, and the drift."""
    edit = result.report["edits"][-1]
    lines = [f"labels ({len(result.labels)}):"]
    lines += [f"  {i} {label}" for i, label in enumerate(result.labels)]
    lines += [f"  moved: {label} was {old} and is {new}" for label, (old, new) in result.moved.items()]
    lines.append(f"router: {edit['router']}")
    if result.drift is not None:
        drift = result.drift
        lines.append(
            f"shared model against a full rebuild: {drift.shared:.2%} of its norm, {drift.shared_per_delta:.1%} of a delta's; "
            f"energy kept {drift.energy_kept:.1%} (rebuilt {drift.energy_kept_rebuilt:.1%})"
        )
    return lines
