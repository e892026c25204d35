"""Tensors in, tensors out. X.py holds an op's contract, its plain PyTorch form (the definition) and its dispatch; X_triton.py
holds the same signature made fast on a GPU."""

from rorqual.kernels.cache_writers import write_index_keys as write_index_keys
from rorqual.kernels.cache_writers import write_latents as write_latents
from rorqual.kernels.dense_attention import dense_attention as dense_attention
from rorqual.kernels.dense_attention import masked_attention as masked_attention
from rorqual.kernels.experts import experts as experts
from rorqual.kernels.fp8 import dequantize_activation as dequantize_activation
from rorqual.kernels.fp8 import dequantize_weight as dequantize_weight
from rorqual.kernels.fp8 import fp8_matmul as fp8_matmul
from rorqual.kernels.fp8 import pack_index_key as pack_index_key
from rorqual.kernels.fp8 import pack_latent as pack_latent
from rorqual.kernels.fp8 import quantize_activation as quantize_activation
from rorqual.kernels.fp8 import quantize_weight as quantize_weight
from rorqual.kernels.fp8 import unpack_index_key as unpack_index_key
from rorqual.kernels.fp8 import unpack_latent as unpack_latent
from rorqual.kernels.index_loss import index_loss as index_loss
from rorqual.kernels.index_loss import selection_quality as selection_quality
from rorqual.kernels.index_score import index_score as index_score
from rorqual.kernels.linear import invariant_linear as invariant_linear
from rorqual.kernels.logprobs import token_logprobs as token_logprobs
from rorqual.kernels.selection import select_tokens as select_tokens
from rorqual.kernels.sparse_attention import sparse_attention as sparse_attention
