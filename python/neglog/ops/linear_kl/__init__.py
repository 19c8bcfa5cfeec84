"""linear_kl: kl of linear(input) and of a teacher, whose logits never lie in memory whole."""
