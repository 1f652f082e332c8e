"""What a run needs beside the algorithm, which is `minirl_edu.trainer`'s.

build        config → task, model, engine, optimizer
prompts      which problems a step and an evaluation get
folder       the run's folder: lock, resume, the lines of metrics.jsonl, a stop by signal
checkpoint   tensors and state on disk
"""
