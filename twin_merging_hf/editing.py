"""
Experts added to, removed from or replaced in a finished artifact, without building it again.

The shared model and the other experts' deltas and heads keep every byte; what changes is the one expert's, the router
and the label ids, and a new folder is written. How far that is from a full rebuild is measured where it can be.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.configuration_twin_merging import check_expert_names
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace

from .align_experts import align_inputs, align_newcomer
from .artifact import LAYOUT, label_fields, refuse_existing, staged
from .drift import Drift, measure_drift
from .edit_folder import Edited, write_edited
from .edit_newcomer import as_built, check_adapter_base, check_labels, separate_newcomer
from .edit_recipe import Newcomer, StoredRecipe
from .edit_record import REMOVE, edited_labels
from .edit_router import EditedRouter, edited_fields, grow_router, needs_rows, shrink_router
from .edit_source import assemble, open_source
from .errors import TwinMergingError
from .preflight import Inputs, check_newcomer, preflight, read_all_rows
from .processing import load_processing
from .progress import Progress, no_loading_bars
from .recipe import Recipe
from .separation import Separation
from .stacking import Stack, with_expert, without_expert
from .verdict import Verdict


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
    expert, exactly: the remaining logits are as before, and the softmax runs over the rest (`knn`: the other experts'
    exemplars vote among themselves). The rows that it was made with stay recorded.

    Args:
        out: folder of the new artifact; must not exist.
        recipe: a recipe file with `data` (and models) of the remaining experts, by name: then the temperature is fitted
            and the `none` route learned again, and agreement and drift are measured.

    Raises:
        TwinMergingError: unknown or last expert, `out` exists, or the artifact is damaged.
    """
    edit = _Edit(REMOVE, artifact, name, out, recipe, progress)
    position = edit.source.position(name)
    if len(edit.stack.entries) == 1:
        raise TwinMergingError(f"{name!r} is the artifact's only expert; an artifact needs at least one")
    return edit.finish(without_expert(edit.stack, position), position)


def add_expert(
    artifact: str | Path,
    out: str | Path,
    newcomer: Newcomer,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
) -> EditResult:
    """
    Write a new artifact with one more expert: its delta from the stored shared model, its head, its labels at the end.

    A trained router (all types but `projection`, and every `none` route) is trained again, of its type and on its layers,
    on train rows of all experts: from `recipe`, else from the paths in the stored recipe, as seen from the current folder
    or the artifact's. `projection` gets the new expert's subspace.

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
    return edit.bring(newcomer, edit.source.position(newcomer.name), replaces=True)


class _Edit:
    """One edit of one artifact, from its files to the new folder: the order of the steps."""

    def __init__(self, what: str, artifact, name: str, out, recipe, progress: Progress | None):
        self.what, self.name, self.out = what, name, Path(out)
        self.progress = progress or Progress()
        refuse_existing(self.out)
        folder = Path(artifact)
        self.source = open_source(folder)
        self.config, self.stack = self.source.config, self.source.stack
        text = folder / LAYOUT.recipe
        self.recipes = StoredRecipe(
            text.read_text(encoding="utf-8") if text.is_file() else "",
            Path(recipe) if recipe is not None else None,
            [Path("."), folder.parent, folder],
        )
        self.notes: list[str] = []

    def bring(self, newcomer: Newcomer, position: int, replaces: bool) -> EditResult:
        """Add an expert at `position`, in the place of the one there if it `replaces`."""
        if not self.recipes.has_settings():
            raise TwinMergingError(
                f"{self.source.folder} was built from Python without a recipe, so how its deltas were compressed is not "
                "known; give --recipe"
            )
        names = list(self.stack.names)
        others = [i for i in range(len(names)) if not (replaces and i == position)]
        names[position : position + int(replaces)] = [newcomer.name]
        recipe = self._recipe(names, newcomer)
        self.progress.say(f"checking expert {newcomer.name!r}")
        alone = check_newcomer(as_built(recipe, self.source), recipe.experts[position], self.source.built)
        try:
            alone = replace(alone, rows=read_all_rows(alone.recipe, alone.entries, self.source.kind, alone.processing))
            check_adapter_base(self.source, alone.experts[0])
            alone = align_newcomer(alone, self.source.built, self.progress)
            entry = alone.entries[0]
            self.notes += [*check_labels(self.source, entry, position, replaces), *alone.notes]
            self.progress.say("compressing its delta from the shared model")
            separation = separate_newcomer(self.source, alone, others or [position])
            before = without_expert(self.stack, position) if replaces and others else self.stack
            stack = with_expert(before, separation, entry, position)
            if replaces and not others:
                stack = without_expert(stack, 1)
            return self.finish(stack, position, recipe, alone, separation)
        finally:
            alone.close()

    def _recipe(self, names: list[str], newcomer: Newcomer | None) -> Recipe:
        """The new artifact's recipe; what its router needs to take in a new expert must be there."""
        old = [name for name in names if newcomer is None or name != newcomer.name]
        rows = newcomer is not None and needs_rows(self.config)
        base = newcomer is not None and self.config.router_type == "projection"
        folder = self.recipes.folder(old, data=rows, base=base)
        if folder is None and self.recipes.folder(old, data=rows, base=False) is None:
            kind = self.config.router_type + (", none" if self.config.router_none_distance is not None else "")
            raise TwinMergingError(
                f"the artifact's router ({kind}) is trained on rows of all experts, and `data` of {', '.join(old)} "
                f"{self._not_found()}; give --recipe FILE (`recipe=` in Python), a recipe whose experts of these names "
                "have `data`"
            )
        if folder is None:
            raise TwinMergingError(
                f"`projection` measures the new expert from the base model {self.recipes.content['base_model']!r}, which "
                f"{self._not_found()}; give --recipe FILE, a recipe with `base_model`"
            )
        return self.recipes.recipe(names, newcomer, folder, self.source.built_from, needs_data=rows)

    def _not_found(self) -> str:
        if self.recipes.given is not None:
            return f"is not in {self.recipes.given}"
        shown = ", ".join(str(place.resolve()) for place in self.recipes.places)
        return f"was not found by the paths of its recipe.yaml in {shown}"

    def finish(
        self,
        stack: Stack,
        position: int,
        recipe: Recipe | None = None,
        alone: Inputs | None = None,
        separation: Separation | None = None,
    ) -> EditResult:
        """Router, files, probe, report: the end of every edit."""
        if recipe is None and self.recipes.has_settings():
            recipe = self._recipe(stack.names, None)
        if recipe is not None:
            recipe = as_built(recipe, self.source)
        full = self._all_inputs(recipe)
        try:
            inputs = full or self._some_inputs(recipe, stack, alone)
            config = self._new_config(stack, position, inputs)
            model = assemble(self.source, stack, config)
            router = self._router(model, inputs, position, alone, separation)
            drift = None
            if full is not None:
                self.progress.say("measuring the drift from a full rebuild")
                drift = measure_drift(stack.state, stack.coverage, full)
            text = recipe.text if recipe is not None else ""
            edited = Edited(
                self.what, self.name, self.source, model, stack, text, inputs, full, alone, router, drift, self.notes
            )
            with staged(self.out) as folder, no_loading_bars():
                report, verdict = write_edited(folder, edited, self.progress)
        finally:
            if full is not None:
                full.close()
        labels, moved = edited_labels(self.source, stack)
        return EditResult(self.out, report, verdict, labels, moved, drift)

    def _all_inputs(self, recipe: Recipe | None) -> Inputs | None:
        """All experts as for a build, if the user's recipe leads to them; else None, with a note that says why not."""
        if recipe is None or self.recipes.given is None:
            self.notes.append("drift and agreement were not measured: no --recipe was given")
            return None
        try:
            return align_inputs(preflight(recipe, self.progress.say), self.progress)
        except TwinMergingError as error:
            first = next(line for line in str(error).splitlines() if line.strip(" -"))
            self.notes.append(f"drift and agreement were not measured, as the recipe cannot be built: {first}")
            return None

    def _some_inputs(self, recipe: Recipe | None, stack: Stack, alone: Inputs | None) -> Inputs | None:
        """What a router needs when not every checkpoint is there: rows of all experts, if they all have some."""
        if recipe is None:
            return None
        source, rows = self.source, None
        processing = alone.processing if alone is not None else None
        if alone is None:
            processing = load_processing(source.folder, source.kind, "the artifact", recipe.trust_remote_code)
        if self.recipes.given is not None or (alone is not None and needs_rows(self.config)):
            rows = read_all_rows(recipe, stack.entries, source.kind, processing)
        experts = alone.experts if alone is not None else []
        return Inputs(recipe, experts, None, source.built, stack.entries, processing, rows, [])

    def _router(
        self, model, inputs: Inputs | None, position: int, alone: Inputs | None, separation: Separation | None
    ) -> EditedRouter:
        if alone is None or separation is None:
            return shrink_router(self.source, model, inputs, position, self.progress)
        assert inputs is not None
        return grow_router(self.source, model, inputs, alone, separation, position, self.progress)

    def _new_config(self, stack: Stack, position: int, inputs: Inputs | None) -> TwinMergingConfig:
        space = LabelSpace.of(stack.entries)
        routing, notes = edited_fields(self.source, stack.entries, position, inputs)
        self.notes += notes
        fields = copy.deepcopy(self.config.to_dict())
        fields |= {
            "experts": stack.entries,
            "ranks": stack.ranks,
            "exact_deltas": stack.exact,
            "sparse_deltas": stack.sparse,
            **label_fields(space),
            **routing,
        }
        fields.pop("num_labels", None)
        return TwinMergingConfig.from_dict(fields)


def describe_edit(result: EditResult) -> Sequence[str]:
    """An edit in lines for people: labels with their ids, and the drift."""
    edit = result.report["edits"][-1]
    lines = [f"labels ({len(result.labels)}):"] if result.labels else []
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
