"""The contracts of the four ops: checks, dispatch, custom op, autograd."""
