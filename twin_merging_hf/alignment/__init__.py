"""
Alignment of experts that do not share an initialisation (MuDSC, arXiv 2403.01753): the stage before the split.

    from twin_merging_hf.alignment import align

    result = align(reference_model, expert_model, batches, weight_share=0.5, seed=0)
    result.apply(expert_model)                  # in place; or result.state_dict(expert_model.state_dict())
    result.permutation.align(name, tensor)      # one tensor at a time
    result.report.to_dict()                     # similarity by site, share moved, objective by sweep

- `align(reference, expert, batches=None, *, weight_share=0.5, similarity="pearson", max_sweeps=20, patience=5, seed=0)`
- `align_all(models, batches=None, *, reference=0, **options)`: each with one of them; None for the reference
- `AlignmentResult`, `AlignmentReport`, `Permutation`
- `register_spec(model_type, spec, example, inputs=None)` with `Spec`, `Site`, `Hook`, `rule`: symmetries of your own models
- `verify_spec(model)`, `layout_of(model)`: proof that a specification leaves a model's function unchanged; what it covers
- `merge_models(models, batches=None, *, mode="align", weight_share=0.5, heads="average", ...)`: one checkpoint by `average`
  (the baseline), `align` or `zip`; `Merge.apply(model, batches)` puts it into a model
- `reestimate_batch_norm(model, batches)`

Weights alone (`weight_share=1`) are Git Re-Basin's matching, activations alone (`weight_share=0`) ZipIt's, between is MuDSC.
"""

from .align import AlignmentResult, align, align_all, checked_layout
from .batchnorm import has_batch_norm, reestimate_batch_norm
from .merge import MODES, Merge, merge_models
from .permutation import Permutation
from .registry import layout_of, register_spec, verify_spec
from .report import AlignmentReport, SiteReport
from .spec import Hook, Layout, Rule, Site, Spec, rule


__all__ = [
    "AlignmentReport",
    "AlignmentResult",
    "Hook",
    "MODES",
    "Layout",
    "Merge",
    "Permutation",
    "Rule",
    "Site",
    "SiteReport",
    "Spec",
    "align",
    "align_all",
    "checked_layout",
    "has_batch_norm",
    "layout_of",
    "merge_models",
    "reestimate_batch_norm",
    "register_spec",
    "rule",
    "verify_spec",
]
