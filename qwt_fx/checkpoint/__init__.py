"""What a cut-off run has found, kept whole or not at all, so that it goes on to the same bits.

Read `resume_folder.py` first, then `journal.py`. What is kept is results and embeddings; decisions
belong to those who ask.
"""
