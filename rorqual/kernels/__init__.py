"""Tensors in, tensors out. X.py holds an op's contract, its plain PyTorch form (the definition) and its dispatch; X_triton.py
holds the same signature made fast on a GPU."""

from rorqual.kernels.dense_attention import dense_attention as dense_attention
from rorqual.kernels.dense_attention import masked_attention as masked_attention
from rorqual.kernels.experts import experts as experts
from rorqual.kernels.index_score import index_score as index_score
from rorqual.kernels.linear import invariant_linear as invariant_linear
from rorqual.kernels.selection import select_tokens as select_tokens
from rorqual.kernels.sparse_attention import sparse_attention as sparse_attention
