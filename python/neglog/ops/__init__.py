"""torch.library ops: schema, fake, CPU implementation and autograd formula, one file a stem."""
