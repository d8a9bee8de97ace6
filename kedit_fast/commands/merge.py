"""``kedit-fast merge``: edits into a copy of a checkpoint, or into a LoRA adapter; ``merge undo``: out of it again."""

import os
from pathlib import Path

from kedit_fast.basics.files import existing_folder
from kedit_fast.basics.folders import check_new_folder
from kedit_fast.basics.words import counted
from kedit_fast.commands.inputs import note_failures, read_chain
from kedit_fast.commands.outputs import note, say
from kedit_fast.model.fingerprint import family_name
from kedit_fast.model.opening import named_folder
from kedit_fast.shipping import vllm
from kedit_fast.shipping.adapter import export_peft
from kedit_fast.shipping.merge import merge_checkpoint
from kedit_fast.shipping.unmerge import read_manifest, unmerge


def run(args) -> None:
    """Writes the merged folder or the adapter; says what was written and what it means."""
    if args.truncate and not args.peft:
        raise ValueError("--truncate is for --peft; a merged checkpoint holds the edit as it is")
    if args.server and not args.peft:
        raise ValueError("--server is for --peft; a merged checkpoint is an ordinary one, which every server loads")
    if args.model is None and not args.peft:
        raise ValueError("which model? --model FOLDER names the checkpoint that the edit was made for")
    out = check_new_folder(os.path.expanduser(args.output))
    edits = read_chain(args.edits)
    for edit in edits:
        say(f"{edit!r}")
    note_failures(edits)
    (_adapter if args.peft else _merged)(args, edits, out)


def _merged(args, edits, out) -> None:
    folder = Path(named_folder(args.model, note)).expanduser()
    merged = merge_checkpoint(folder, edits, out, who=args.who, message=args.message, force=args.force)
    if merged.left_out:
        say(f"not copied: {', '.join(merged.left_out[:5])}" + ", ..." * (len(merged.left_out) > 5))
    say(f"{merged.folder}: {counted(len(merged.tensors), 'tensor')} edited; this is now model {merged.fingerprint}")
    say(f"to take the edit out again: kedit-fast merge undo {merged.folder}")


def _adapter(args, edits, out) -> None:
    how = {"max_rank": args.max_rank, "truncate": args.truncate, "check_fingerprint": not args.force}
    made = export_peft(edits, out, model=named_folder(args.model, note), server=args.server, **how)
    cut = {layer: error for layer, error in made.errors.items() if error}
    for layer, error in cut.items():
        say(f"layer {layer}: cut to rank {made.ranks[layer]}, relative error {error:.2g}")
    exact = "" if cut else ", exact"
    say(f"{made.folder}: LoRA adapter of rank {made.rank}{exact}, for model {edits[0].fingerprint}")
    if made.base:
        moved = "; an adapter for other machines wants a hub id, --model ORG/NAME" * Path(made.base).is_absolute()
        say(f"it names its base model: {made.base}{moved}")
    roles = {role for edit in edits for _, role in edit.weights}
    refused = vllm.why_not(family_name(edits[0].fingerprint), roles, made.rank)
    rank = f"--max-lora-rank {vllm.max_lora_rank(made.rank)}"
    served = f"does not load it ({vllm.RELEASE}): {refused}" if refused else rank
    say(f"PEFT: PeftModel.from_pretrained(model, {str(made.folder)!r}); vLLM: {served}")


def undo(args) -> None:
    """Restores a merged folder and says what was taken out."""
    folder = existing_folder(os.path.expanduser(args.folder), "a folder that `kedit-fast merge` wrote")
    record = read_manifest(folder)
    restored = unmerge(folder, args.output if args.output is None else os.path.expanduser(args.output))
    facts = sum(len(edit["facts"]) for edit in record["edits"])
    tensors = counted(len(record["tensors"]), "tensor")
    say(f"{restored}: {tensors} restored bit for bit, {counted(facts, 'fact')} taken out")
    say(f"this is model {record['base']['fingerprint']} again")
