"""Matrix-free linear algebra on torch tensors: no model, no data, no torch.nn."""
