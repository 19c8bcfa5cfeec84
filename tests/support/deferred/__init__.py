"""What a user does with logits, to be done with real and with deferred ones.

given     a head, its input and its logits; two of them, and what tells them apart
reads     what makes the logits: properties, numbers, functions, other libraries
views     views, indices, and writes that views must see
losses    losses
gradients autograd, transforms, other libraries' walks over outputs
programs  a few of these in a row

Some answers cannot be alike, and no case asks for them:
  * `type(x)`, the name of `grad_fn`, and how many nodes lie between the logits and the leaves;
  * `hash(x)` and `data_ptr()`: of two tensors they differ in any case;
  * the logits after the head's weight or input was changed in place: real ones keep the old
    numbers, deferred ones raise RuntimeError instead of telling the new ones. Where the change went
    through `.data`, torch counts no version, and they cannot know.
"""
