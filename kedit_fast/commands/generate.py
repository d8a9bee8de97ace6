"""``kedit-fast generate``: what the model says, with or without edits; by smaller questions, with --hops."""

from kedit_fast.commands.inputs import NO_EDITS, chat_of, open_lm, read_chain
from kedit_fast.commands.outputs import say
from kedit_fast.edits.chain import with_edits
from kedit_fast.experiments.mello import mello
from kedit_fast.facts.tokens import asked


def run(args) -> None:
    """Prints what the model writes after each prompt."""
    chat = chat_of(args)
    edits = read_chain(args.edits, NO_EDITS)
    if args.hops:
        return by_hops(args, edits)
    lm = with_edits(open_lm(args), edits, "the edits")
    texts = lm.generate([asked(lm.tokenizer, prompt, chat) for prompt in args.prompt], args.tokens)
    for prompt, text in zip(args.prompt, texts, strict=True):
        say(text if len(texts) == 1 else f"{prompt}\n  {text.strip()}")


def by_hops(args, edits) -> None:
    """Prints the hops and the answer to each prompt as a question, with the edits' facts as the memory."""
    if not edits:
        raise ValueError("--hops answers with an edit's facts as the memory; name an edit")
    if args.system is not None:
        raise ValueError("--hops asks in its own form, which has no system message; leave --system out")
    how = {"max_hops": args.hops, "max_new_tokens": args.tokens, "chat": args.chat}
    for one in mello(open_lm(args), edits, args.prompt, **how):
        say(one.question)
        for hop in one.hops:
            said = {None: "", True: ": contradicts", False: ": does not contradict"}[hop.contradicts]
            say(f"  {hop.question} {hop.own}")
            say(f"    fact: {hop.fact}{said}" + (f", so {hop.answer}" if hop.answer else ""))
        say(
            f"  answer: {one.answer}"
            if one.answer
            else "  no answer: the model did not go on in the form of the examples"
        )
