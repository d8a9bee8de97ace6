"""The production gate: what an edit must reach before it ships, measured on the form in which it ships."""

from kedit_fast.gating.judge import gate
from kedit_fast.gating.questions import draft_suite
from kedit_fast.gating.report import GateReport
from kedit_fast.gating.suite import Suite, load_suite
from kedit_fast.gating.thresholds import Check, Thresholds

__all__ = ["Check", "GateReport", "Suite", "Thresholds", "draft_suite", "gate", "load_suite"]
