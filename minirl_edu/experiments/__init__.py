"""The paper's figures as data: settings × variants × seeds become runs, runs become statistics, statistics verdicts.

    paper.yaml      settings, variants, figures, tiers, thresholds and claims: no code per figure
    spec            reads paper.yaml and the CSV file of each run
    runner          trains the runs
    statistics      effects, intervals and p-values
    claims          criteria become verdicts, verdicts become CLAIMS.md

A run is a setting with a variant, such as `("n4", "r3")`. Its seeds are paired with those of every other variant: the
same seed means the same start, the same held-out problems and, in the same setting, the same training problems.
"""
