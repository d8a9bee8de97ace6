"""QAEdit and WILD (Yang et al. 2025, arXiv:2502.11177): questions that models get wrong, answered in free writing.

WILD's number is the judge's; offline, mode "match" is its exact match and "contains" lies between. Each prompt is the
bare question here, and the chat form of it below where the model has a template. At most 32 tokens are written (WILD:
512), which end before "." or a new line.
"""

from kedit_fast.evaluation.benchmarks.knowedit import read_record
from kedit_fast.evaluation.questions import of_questions

QAEDIT = of_questions("qaedit", read=read_record, score_of=("rewrite.match", "paraphrase.match", "locality.same_text"))
