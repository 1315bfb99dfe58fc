"""Adapters that run a trained model under evaluation harnesses.

trained_model      likelihoods and generated texts of a run, for prompts of text, turns and images
lm_eval_model      the model interface of lm-evaluation-harness (package ``lm_eval``)
lmms_eval_model    the model interface of lmms-eval (package ``lmms_eval``)
tasks              errors for names and data of tasks

Each adapter imports its harness, so import the module that you need.
"""
