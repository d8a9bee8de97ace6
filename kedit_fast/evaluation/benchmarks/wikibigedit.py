"""WikiBigEdit (Thede et al. 2025, arXiv:2503.05683), and every record of its form (EasyEdit's, LocFT's 3,000): a
question, the answer to write, a rephrase, and a locality question with its answer."""

from kedit_fast.evaluation.benchmarks.knowedit import read_record
from kedit_fast.evaluation.questions import of_questions

WIKIBIGEDIT = of_questions(
    "wikibigedit", read=read_record, score_of=("rewrite.token", "paraphrase.token", "locality.same")
)
