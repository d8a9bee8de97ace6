"""Trace, edit and evaluate facts in language models; see README.md for the map from paper to file.

Public names are imported when first used, so that ``import kedit_fast`` and the command line's
``--help`` stay free of torch (under 0.3 s).
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "open_model": "model.opening",
    "LM": "model.lm",
    "Fact": "facts.fact",
    "load_facts": "facts.fact",
    "forgetting": "facts.forgetting",
    "keeping": "facts.forgetting",
    "related": "facts.relations",
    "trace": "tracing.trace",
    "average": "tracing.trace",
    "TraceResult": "tracing.trace",
    "AverageTrace": "tracing.trace",
    "knowledge_neurons": "tracing.neurons",
    "NeuronAttribution": "tracing.neurons",
    "second_moments": "moments.second_moment",
    "SecondMoment": "moments.second_moment",
    "statistics_folder": "basics.settings",
    "Rome": "editors.rome",
    "Memit": "editors.memit",
    "AlphaEdit": "editors.alphaedit",
    "Emmet": "editors.emmet",
    "Encore": "editors.encore",
    "MemitBlue": "editors.blue",
    "AlphaEditBlue": "editors.blue",
    "BetaEdit": "editors.betaedit",
    "Pmet": "editors.pmet",
    "Rect": "editors.rect",
    "Nas": "editors.nas",
    "Grace": "editors.grace",
    "Wise": "editors.wise",
    "Memoir": "editors.memoir",
    "KnowledgeNeurons": "editors.neurons",
    "Ft": "editors.finetune",
    "FtL": "editors.finetune",
    "FtM": "editors.finetune",
    "LocFt": "editors.locft",
    "UltraEdit": "editors.ultraedit",
    "StableEdit": "editors.ultraedit",
    "CrispEdit": "editors.crispedit",
    "Ike": "editors.ike",
    "IkePlain": "editors.ike",
    "Ice": "editors.ice",
    "Serac": "editors.serac",
    "Mend": "editors.mend",
    "Malmen": "editors.malmen",
    "Ke": "editors.ke",
    "Network": "editors.networks",
    "train_editor": "editors.training",
    "Unlearn": "editors.unlearn",
    "leace": "editors.leace",
    "fold": "editors.leace",
    "LeaceFitter": "moments.leace",
    "Eraser": "moments.leace",
    "citation": "basics.citations",
    "EDITORS": "editors",
    "routed": "editors.routed",
    "retrieve": "edits.retrieval",
    "evaluate": "evaluation.evaluate",
    "BENCHMARKS": "evaluation",
    "EvalReport": "evaluation",
    "compare": "evaluation.compare",
    "Comparison": "evaluation",
    "counterfact_with": "evaluation.benchmarks.counterfact",
    "load_easyedit": "evaluation.easyedit",
    "capability": "evaluation.harness",
    "Capability": "evaluation.scores",
    "Edit": "edits.edit",
    "compose": "edits.compose",
    "export_peft": "shipping.adapter",
    "load_peft": "shipping.adapter",
    "merge_checkpoint": "shipping.merge",
    "unmerge": "shipping.unmerge",
    "EditHistory": "shipping.history",
    "gate": "gating",
    "GateReport": "gating",
    "Suite": "gating",
    "Thresholds": "gating",
    "load_suite": "gating",
    "logit_lens": "evaluation.logit_lens",
    "LogitLens": "evaluation.logit_lens",
    "what_moved": "evaluation.moved",
    "Moved": "evaluation.moved_report",
    "EditPolicy": "gating.policy",
    "advise": "gating.policy",
    "edit_in_rounds": "experiments.rounds",
    "Round": "experiments.rounds",
    "plot_rounds": "pictures.rounds",
    "edit_by_layer": "experiments.by_layer",
    "LayerStudy": "experiments.by_layer",
    "mello": "experiments.mello",
    "evaluate_edit": "experiments.edit_summary",
    "EditSummary": "experiments.edit_summary",
    "implied": "experiments.implied",
    "Implied": "experiments.implied",
    "consistency": "experiments.consistency",
    "Consistency": "experiments.consistency",
    "load_relations": "facts.knowledge",
    "RelationTable": "facts.knowledge",
    "verify_forgotten": "experiments.forgotten",
    "Forgotten": "experiments.forgotten",
    "show_progress": "basics.progress",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
