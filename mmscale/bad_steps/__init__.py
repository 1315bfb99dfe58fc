"""Steps whose update is refused, and what follows.

    detector.py     which steps are bad
    bad_steps.py    their samples, in RUN/bad_steps/step-N.json; where a roll back goes
    roll_back.py    the list of roll backs on the disk, and which checkpoints it leaves behind

The training loop asks the detector before each update and applies the policy: skip, halt or roll back.
"""
