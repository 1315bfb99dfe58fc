"""The legend of every shape in the code. Letters are never reused.

T packed tokens · S segments · D decoder width · H query heads · G key/value heads · K head dim · F mlp width ·
E experts · A experts per token · V vocabulary · P packed patches or frames · N media items · M features written into
token slots · X cross-attention spans · C codebook · W ranks.

There is no batch letter: batches are packed. Signatures write shapes as ``hidden: Float[Tensor, "T D"]``; the tests
check them at run time through jaxtyping's import hook (``tests/conftest.py``), production code does not pay for it.
"""
