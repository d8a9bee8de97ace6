"""Two small tasks in lm-evaluation-harness's own format, which need no network, and how a task file reads documents.

A task file of one's own beside its ``.jsonl`` file reads it in the same way:

    custom_dataset: !function kedit_fast.evaluation.tasks.documents
    dataset_kwargs: {file: mine.jsonl}
    test_split: test
"""

import json
from pathlib import Path

from kedit_fast.basics.files import reading

FOLDER = Path(__file__).parent


def documents(file: str, config_source: str, split: str = "test", **_: object) -> dict:
    """{split: the documents of a ``.jsonl`` file, a line each}, as the harness's ``custom_dataset`` wants them.

    file: relative to the folder of the task file; config_source: the task file, which the harness names; it hands over
    the rest of a task's metadata too, and nobody asks for it.
    Raises OSError for a file that is not there, ValueError for one that holds anything but objects.
    """
    from datasets import Dataset

    path = Path(config_source).parent / file
    with reading(path, "expected a JSON object a line"):
        lines = path.read_text(encoding="utf-8").splitlines()
        return {split: Dataset.from_list([json.loads(line) for line in lines if line.strip()])}
