"""Three worlds of logit tables in which training without the train–inference weight fails, each in seconds.

    doomed_tails            wrong responses are longer: the drift (`minirl_edu.drift`) locks wrong modes in
    leaky_engine            the sampler's garbage makes a mediocre habit look better than average
    who_gets_the_gradient   a noisy router: the expert that wrote a token is not the one that learns from it

In each, every objective and every correction, and the controls in which leaving out the weight does no harm:

    python -m minirl_edu.worlds doomed_tails --seeds 8 --out FOLDER      # a table, FOLDER/doomed_tails.csv and .png
    python -m minirl_edu.worlds table --out FOLDER                       # one table from the CSV files of all three

`simulations` has the worlds and what they predict, `report` the files, the figures and the tables.
"""
