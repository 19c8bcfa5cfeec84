"""neglog inside other trainers: a module for each framework, imported when it is asked for.

deferred               a head whose logits are not made until something reads them
transformers           fuse(model): the losses of Hugging Face's models without their logits
sentence_transformers  its losses, of neglog's kernels
open_clip              its losses, of neglog's kernels
"""
