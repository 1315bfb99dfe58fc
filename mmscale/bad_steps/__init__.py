"""Bad steps: steps whose update is rejected, because the loss or the gradient norm is not finite or a spike.

    detector.py     decide which steps are bad.
    bad_steps.py    write their samples to RUN/bad_steps/step-N.json; choose the checkpoint of a roll back.
    roll_back.py    the list of roll backs on the disk, and the checkpoints that a roll back abandons.

The training loop calls the detector before each update. For a bad step it applies the policy: skip, halt or roll back.
"""
