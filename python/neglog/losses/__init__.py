"""The losses as functions of torch tensors."""
