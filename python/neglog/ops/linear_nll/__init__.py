"""linear_nll: the loss of linear(input), whose logits never lie in memory whole."""
