"""``kedit-fast generate``: what the model says, with or without edits."""

from kedit_fast.commands.inputs import chat_of, open_lm, read_chain
from kedit_fast.commands.outputs import say
from kedit_fast.edits.chain import with_edits
from kedit_fast.facts.tokens import asked


def run(args) -> None:
    """Prints what the model writes after each prompt."""
    chat = chat_of(args)
    edits = read_chain(args.edits)
    lm = with_edits(open_lm(args), edits, "the edits")
    texts = lm.generate([asked(lm.tokenizer, prompt, chat) for prompt in args.prompt], args.tokens)
    for prompt, text in zip(args.prompt, texts, strict=True):
        say(text if len(texts) == 1 else f"{prompt}\n  {text.strip()}")
