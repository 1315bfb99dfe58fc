"""Legend of the dimension letters in shape annotations.

T packed tokens · S segments · D decoder width · H query heads · G key/value heads · F mlp width · E experts ·
V vocabulary · P packed patches · M features written into token slots · X cross-attention spans · W ranks · L blocks.

Some letters have a second meaning, which the docstring names: A rows that cross-attention reads, or experts per token;
K head dim, or pairs of a batch; N media items, pairs of a step or extra ids; C channels of a feature or pair vector;
R rows of one call, or rotated channels of a head. ``F_rows`` are feature rows after a tower or a projector.

There is no letter for a batch dimension: batches are packed. Signatures write shapes as
``hidden: Float[Tensor, "T D"]``. The tests check them at run time through jaxtyping's import hook
(``tests/conftest.py``); production code does not.
"""
