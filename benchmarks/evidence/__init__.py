"""The controlled experiment: when does selection by VIG help, and is it VIG that does it?

`python -m benchmarks evidence` runs it, on the demo's tiny model and drawn scenes, where the truth is known:

    design.py    what is run: arms, shares of blind answers, seeds, in which order
    data.py      the tuning data of a share and a seed, scored by the project's Scorer
    masks.py     which answer tokens each arm trains on
    model.py     the language model on stored features of the frozen vision tower
    fit.py       training, by the recipe of `vig train`
    exams.py     what a tuned model is asked
    runs.py      one run -> one JSON line;  store.py: the lines on disk;  workers.py: the processes
    analysis.py  which comparisons are made, fixed before the runs
    probes.py    the probes of `vig probe` before and after tuning, described beside the experiment
    report.py    docs/evidence.md: tables.py, figures.py, prose.py; verdict.py and advice.py say what the numbers do
"""
