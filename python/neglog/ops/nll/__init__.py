"""nll: log-softmax and negative log-likelihood of rows of logits, in one op."""
