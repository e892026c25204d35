"""Floor 0: tensors in, tensors out. X.py holds the contract and plain PyTorch; X_triton.py the fast form."""
