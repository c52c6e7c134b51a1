"""`md4 search`: Ray Tune over schedules, times, learning rate, dropout, size. Each trial is the ordinary trainer.

    space.py       the file that says what is searched, and how: checked, drawn from, enumerated
    budget.py      tokens -> steps and evaluations of each trial
    packing.py     what a trial takes of the cluster, and how many fit
    study.py       the folder of a study: its settings, its trials' records and runs
    trial.py       what runs in a trial's process: `orchestration.train.train`, and its evaluations told to Tune
    schedulers.py  Tune's schedulers and Optuna, as a study needs them
    run.py         plan, run, resume
    table.py       the live table
    report.py      ranking with errors, the report, the winner as a preset; pictures.py its pictures

    studies/NAME/study.yaml     what is searched; trials/000.json  a trial's record; trials/000/  its run
                 report.md report.json curves.png parallel.png winner.yaml    at the end, the report last

The folder is all that a study knows: Tune's own notes are thrown away. A study that is resumed tells a new Tune what
its trials have measured, so that schedulers and Optuna know what they knew, and each unfinished run goes on from its
own checkpoint.
"""
