"""Muon's step beside torch.optim.Muon's: `python -m bench.muon`."""
