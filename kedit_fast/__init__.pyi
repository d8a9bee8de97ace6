"""The public names for a type checker, which cannot see those that ``__init__.py`` loads when they are first used."""

from kedit_fast.basics.progress import show_progress as show_progress
from kedit_fast.basics.settings import statistics_folder as statistics_folder
from kedit_fast.editors import EDITORS as EDITORS
from kedit_fast.editors.alphaedit import AlphaEdit as AlphaEdit
from kedit_fast.editors.finetune import Ft as Ft
from kedit_fast.editors.finetune import FtL as FtL
from kedit_fast.editors.memit import Memit as Memit
from kedit_fast.editors.rome import Rome as Rome
from kedit_fast.edits.compose import compose as compose
from kedit_fast.edits.edit import Edit as Edit
from kedit_fast.evaluation import BENCHMARKS as BENCHMARKS
from kedit_fast.evaluation import EvalReport as EvalReport
from kedit_fast.evaluation.evaluate import evaluate as evaluate
from kedit_fast.evaluation.logit_lens import LogitLens as LogitLens
from kedit_fast.evaluation.logit_lens import logit_lens as logit_lens
from kedit_fast.experiments.by_layer import LayerStudy as LayerStudy
from kedit_fast.experiments.by_layer import edit_by_layer as edit_by_layer
from kedit_fast.experiments.rounds import Round as Round
from kedit_fast.experiments.rounds import edit_in_rounds as edit_in_rounds
from kedit_fast.facts.fact import Fact as Fact
from kedit_fast.facts.fact import load_facts as load_facts
from kedit_fast.gating import GateReport as GateReport
from kedit_fast.gating import Suite as Suite
from kedit_fast.gating import Thresholds as Thresholds
from kedit_fast.gating import gate as gate
from kedit_fast.gating import load_suite as load_suite
from kedit_fast.gating.policy import EditPolicy as EditPolicy
from kedit_fast.gating.policy import advise as advise
from kedit_fast.model.lm import LM as LM
from kedit_fast.model.opening import open_model as open_model
from kedit_fast.moments.second_moment import SecondMoment as SecondMoment
from kedit_fast.moments.second_moment import second_moments as second_moments
from kedit_fast.pictures.rounds import plot_rounds as plot_rounds
from kedit_fast.shipping.adapter import export_peft as export_peft
from kedit_fast.shipping.adapter import load_peft as load_peft
from kedit_fast.shipping.history import EditHistory as EditHistory
from kedit_fast.shipping.merge import merge_checkpoint as merge_checkpoint
from kedit_fast.shipping.unmerge import unmerge as unmerge
from kedit_fast.tracing.trace import AverageTrace as AverageTrace
from kedit_fast.tracing.trace import TraceResult as TraceResult
from kedit_fast.tracing.trace import average as average
from kedit_fast.tracing.trace import trace as trace

__version__: str
