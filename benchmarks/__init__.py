"""Benchmarks: whisper_max beside unpatched openai-whisper and the other ways to run Whisper.

    python -m benchmarks              measure, write results/<machine>.json, tables and plots
    python -m benchmarks report       tables and plots from the results that are there
    python -m benchmarks --help

Every peer runs in a process of its own and takes its turn: peers (A B C, A B C, …) alternate, so
that a slow minute of the machine falls on all of them. `scenarios` says what is measured, `peers`
on what, `party` how; `results` is the data, `report` makes everything else from it.
"""
