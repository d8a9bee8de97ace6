"""Everything that needs a GPU, cut for one visit to a card that can be had for minutes.

A visit is two commands from a clone, each well inside its limit of time, with a machine that has torch for CUDA,
transformers and Triton already (pytest for the tests). Nothing is installed, built or fetched, the package is used from
the tree, and the compiled extension may be absent: it serves the CPU alone. Where the copy has no .git, say the commit:

    python3 -m bench gpu --out "$OUT" --budget 480 --commit HASH
    python3 -m bench gpu --out "$OUT" --budget 180 --commit HASH --parts kernels tests

The first goes through all parts in order of worth (``plan.PARTS``); the second takes what the first had no time for, or
again what failed. Give the first 60 seconds more than its budget at the outside. Before, without any GPU:

    python -m bench gpu --out DIR --dry-run

which goes the same ways on tiny shapes on the CPU (under a minute).

Each figure is in its file when it is made: a command that is cut off loses nothing but what it was at. The folder holds
seven files at most, each below 16 MB:

    <gpu>.csv            the figures, with what they depend on; rows as in bench/results
    summary.md           how each part ended, and the figures as tables; written anew after each part
    log.txt              what was printed, with tracebacks
    trace-*.json.gz, values.json.gz    profiles for chrome://tracing or Perfetto

Parts share a process, so that torch and CUDA start once. One that raises is recorded and the next runs. A fault on the
device spoils the process for good: after each part the device is asked for a sum, and where it gives none, or the
process is gone, the next part has a fresh one. A part that hangs past its time is made to print where it stands and is
killed with its process.

Tried, without a GPU, on the versions of the machines it was cut for (Python 3.12, torch 2.11+cu130, Triton 3.6.0,
transformers 5.17.0, numpy 2.5) and on those of constraints.txt. Triton 3.6's interpreter does not work with numpy 2.5;
nothing here uses it.
"""
