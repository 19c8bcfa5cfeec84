"""The torch.library ops, a folder a family: schema, implementations, formula, autograd."""
